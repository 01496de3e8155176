"""The HTTP application of a data worker: which path goes to which handler, and the one error handler.

Must not: build what it serves (`gateway.lifespan` does) or hold logic. Anything under /v1 that is not listed is a 404.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from litestar import Litestar, Request, Response, asgi, route
from litestar.types import Receive, Scope, Send

from gateway import errors, health
from gateway.health import Health
from proxy import telemetry
from proxy.errors import RouteNotFound
from proxy.ids import request_id
from proxy.routes import DataPlane

Handler = Callable[[Any, Any, Any], Awaitable[None]]


CHAT = "/v1/chat/completions"


class Front:
    """The busiest path, handed over before the framework: its routing and its wrapped `send` cost a tenth of a call
    (decision 0005). Everything else is the framework's, which knows no such path: another method there is a 404."""

    def __init__(self, app: Litestar, plane: DataPlane) -> None:
        self.app = app
        self._chat = plane.chat_completions

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI."""
        if scope["type"] != "http" or scope["path"] != CHAT or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        try:
            await self._chat(scope, receive, send)
        except errors.NAMED as error:
            await errors.answer(scope, send, error)


def create_app(plane: DataPlane, health_of: Health, *, with_metrics: bool) -> Front:
    """The application. `with_metrics`: whether /metrics is served here (only when the main port is loopback)."""
    handlers = [
        *_models(plane),
        _route("/health/live", "GET", _live),
        _route("/health/ready", "GET", _ready(health_of)),
    ]
    if with_metrics:
        handlers.append(_route("/metrics", "GET", _metrics))
    app = Litestar(
        route_handlers=handlers,
        openapi_config=None,
        logging_config=None,
        debug=False,
        exception_handlers={Exception: errors.handle},
    )
    return Front(app, plane)


def _models(plane: DataPlane) -> list[Any]:
    # OPTIONS is named so that the framework does not answer it by itself.
    @route("/v1/models", http_method=["GET", "OPTIONS"])
    async def models(request: Request[Any, Any, Any]) -> Response[Any]:
        _only_get(request)
        return _model_answer(await plane.list_models(request.scope))

    @route("/v1/models/{name:path}", http_method=["GET", "OPTIONS"])
    async def model(request: Request[Any, Any, Any], name: str) -> Response[Any]:
        _only_get(request)
        return _model_answer(await plane.find_model(request.scope, name.removeprefix("/")))

    return [models, model]


def _only_get(request: Request[Any, Any, Any]) -> None:
    if request.method != "GET":
        raise RouteNotFound(f"Invalid URL ({request.method} {request.scope['path'][:200]})")


def _model_answer(content: dict[str, Any]) -> Response[Any]:
    telemetry.REQUESTS.labels(200, "").inc()
    body = msgspec.json.encode(content)
    return Response(body, media_type="application/json", headers={"x-request-id": request_id()})


def _route(path: str, method: str, handler: Handler) -> Any:
    @asgi(path, copy_scope=False)
    async def handle(scope: Scope, receive: Receive, send: Send) -> None:
        used = scope.get("method")
        if used != method:
            raise RouteNotFound(f"Invalid URL ({used} {scope['path'][:200]})")
        await handler(scope, receive, send)

    return handle


async def _answer(send: Send, status: int, body: bytes, content_type: bytes = b"application/json") -> None:
    headers = [
        (b"content-type", content_type),
        (b"content-length", b"%d" % len(body)),
        (b"cache-control", b"no-store"),
        (b"x-request-id", request_id().encode()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def _live(scope: Scope, receive: Receive, send: Send) -> None:
    await _answer(send, 200, b'{"status":"ok"}')


def _ready(health_of: Health) -> Handler:
    async def ready(scope: Scope, receive: Receive, send: Send) -> None:
        readiness = await health_of.readiness()
        await _answer(send, 200 if readiness.ready else 503, health.encoded(readiness))

    return ready


async def _metrics(scope: Scope, receive: Receive, send: Send) -> None:
    telemetry.publish()  # what this worker has counted since its last tick
    text, content_type = health.metrics_text()
    await _answer(send, 200, text, content_type.encode())
