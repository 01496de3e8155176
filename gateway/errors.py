"""Where every exception gets its status: one table, one JSON and one SSE renderer. The only broad handler is here.

Must not: put a stack, a path, SQL or a secret into an answer; what is unknown is a plain 500 and a log line.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import structlog
from litestar import Request, Response
from litestar.exceptions import HTTPException, MethodNotAllowedException, NotFoundException

from accounts import keys
from proxy import errors as call
from proxy import telemetry
from proxy.ids import request_id
from proxy.routes import ClientGone

log = structlog.get_logger()
Send = Callable[[Any], Awaitable[None]]
NAMED = (call.CallError, keys.KeyRefused, keys.KeysUnavailable, ClientGone)
"""What handlers raise on purpose; anything else is a fault of ours."""

_INVALID, _SERVER, _LIMIT = "invalid_request_error", "server_error", "rate_limit_error"
_QUOTA = "insufficient_quota"


@dataclass(frozen=True, slots=True)
class Shown:
    """How an error looks outside. `retry` becomes x-should-retry (None: the status speaks for itself)."""

    status: int
    type: str
    code: str | None
    retry: bool | None = None


TABLE: dict[type[Exception], Shown] = {
    call.InvalidBody: Shown(400, _INVALID, None),
    call.InvalidValue: Shown(400, _INVALID, "invalid_value"),
    call.UnsupportedParameter: Shown(400, _INVALID, "unsupported_parameter"),
    call.BodyTooLarge: Shown(413, _INVALID, "request_too_large"),
    call.BodyTooSlow: Shown(408, _INVALID, "request_timeout", retry=False),
    call.ModelNotFound: Shown(404, _INVALID, "model_not_found"),
    call.ModelUnpriced: Shown(503, _SERVER, "model_unpriced", retry=False),
    call.RouteNotFound: Shown(404, _INVALID, None),
    call.OutOfCredit: Shown(402, _QUOTA, _QUOTA, retry=False),
    call.CreditInFlight: Shown(402, _QUOTA, _QUOTA, retry=True),
    call.RequestRateExceeded: Shown(429, "requests", "rate_limit_exceeded"),
    call.ParallelSessionsExceeded: Shown(429, "requests", "rate_limit_exceeded"),
    call.AccountBlocked: Shown(403, "permission_error", "account_blocked", retry=False),
    call.IdempotencyConflict: Shown(422, _INVALID, "idempotency_conflict", retry=False),
    call.IdempotencyInFlight: Shown(409, _INVALID, "idempotency_in_flight", retry=False),
    call.IdempotencyFinished: Shown(409, _INVALID, "idempotency_finished", retry=False),
    call.Overloaded: Shown(503, _SERVER, "overloaded"),
    call.Draining: Shown(503, _SERVER, "shutting_down"),
    call.LedgerDown: Shown(503, _SERVER, "ledger_unavailable"),
    call.UpstreamUnreachable: Shown(502, _SERVER, "upstream_unreachable"),
    call.UpstreamGarbage: Shown(502, _SERVER, "upstream_invalid"),
    call.UpstreamTruncated: Shown(502, _SERVER, "upstream_truncated"),
    call.UpstreamTimedOut: Shown(504, _SERVER, "upstream_timeout"),
    call.UpstreamKeyRefused: Shown(502, _SERVER, "upstream_key_refused", retry=False),
    call.ProviderUnavailable: Shown(503, _SERVER, "provider_unavailable"),
    call.ProviderBusy: Shown(503, _SERVER, "provider_busy"),
    call.ProviderNotAllowed: Shown(403, "permission_error", "provider_not_allowed", retry=False),
    call.ContextLengthExceeded: Shown(400, _INVALID, "context_length_exceeded"),
    call.LeaseLost: Shown(503, _SERVER, "lease_lost"),
    call.InternalError: Shown(500, _SERVER, None),
    keys.MissingKey: Shown(401, _INVALID, None),
    keys.MalformedKey: Shown(401, _INVALID, "invalid_api_key"),
    keys.UnknownKey: Shown(401, _INVALID, "invalid_api_key"),
    keys.RevokedKey: Shown(401, _INVALID, "invalid_api_key"),
    keys.KeysUnavailable: Shown(503, _SERVER, "keys_unavailable"),
}


def shown(error: Exception) -> Shown:
    """The outside look of an error; a provider's own status and words pass through."""
    if isinstance(error, call.ProviderError):
        return Shown(error.status, error.type or _provider_type(error.status), error.code)
    return TABLE.get(type(error), TABLE[call.InternalError])


def _provider_type(status: int) -> str:
    if status == 429:
        return _LIMIT
    return _INVALID if status < 500 else _SERVER


def error_object(error: Exception) -> dict[str, Any]:
    """OpenAI's four fields, and `metadata` where the error has some."""
    look = shown(error)
    known = isinstance(error, (call.CallError, *_KEY_ERRORS))
    message = str(error) or str(type(error).__doc__) if known else call.InternalError.__doc__
    fields: dict[str, Any] = {
        "message": message,
        "type": look.type,
        "param": getattr(error, "param", None),
        "code": look.code,
    }
    metadata = getattr(error, "metadata", None)
    if metadata:
        fields["metadata"] = dict(metadata)
    return fields


_KEY_ERRORS = (keys.KeyRefused, keys.KeysUnavailable)


def sse_payload(error: Exception) -> bytes:
    """The in-band error frame's JSON."""
    return msgspec.json.encode({"error": error_object(error)})


def headers_of(error: Exception) -> dict[str, str]:
    """retry-after, retry-after-ms, x-should-retry and the bill, where the error has them."""
    headers: dict[str, str] = {}
    look = shown(error)
    wait_ms = getattr(error, "retry_after_ms", None)
    if wait_ms is None and isinstance(error, keys.KeysUnavailable):
        wait_ms = 1_000
    if wait_ms is not None:
        headers["retry-after"] = str(-(-wait_ms // 1000))
        headers["retry-after-ms"] = str(wait_ms)
    if isinstance(error, call.Draining):
        headers["connection"] = "close"  # the next try shall find another instance
    if look.retry is not None:
        headers["x-should-retry"] = "true" if look.retry else "false"
    if isinstance(error, call.CallError):
        headers |= {name.decode(): value.decode() for name, value in error.headers}
    return headers


def handle(request: Request[Any, Any, Any], error: Exception) -> Response[Any]:
    """Litestar's exception handler for everything."""
    status, headers, body = _answer(request.scope, _public(request, error))
    return Response(body, status_code=status, headers=headers, media_type="application/json")


async def answer(scope: Mapping[str, Any], send: Send, error: Exception) -> None:
    """Answer a request that failed before its response began, without the framework."""
    status, fields, body = _answer(scope, error)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        *((name.encode("latin-1"), value.encode("latin-1")) for name, value in fields.items()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _answer(scope: Mapping[str, Any], public: Exception) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of an error; its log line and its count."""
    if isinstance(public, ClientGone):
        return 400, {}, b""
    look = shown(public)
    state: Mapping[str, Any] = scope.get("state", {})
    identity = state.get("request_id") or request_id()
    if look.status == 500 and not isinstance(public, call.ProviderError):
        log.error("request failed", request_id=identity, path=_path(scope), exc_info=public)
    else:
        log.info(
            "refused",
            request_id=identity,
            path=_path(scope),
            status=look.status,
            code=look.code,
            error=type(public).__name__,
            key=state.get("key"),
            account=state.get("account"),
            route=state.get("route"),
            session=state.get("session"),
        )
    telemetry.REQUESTS.labels(look.status, _label(public, look)).inc()
    headers = {"x-request-id": identity, **headers_of(public)}
    return look.status, headers, msgspec.json.encode({"error": error_object(public)})


def _label(error: Exception, look: Shown) -> str:
    """The metric's `code`: one of ours, because a provider's own words would be a series each."""
    return "provider_error" if isinstance(error, call.ProviderError) else look.code or ""


def _public(request: Request[Any, Any, Any], error: Exception) -> Exception:
    """Framework errors under our names."""
    if isinstance(error, MethodNotAllowedException | NotFoundException):
        return call.RouteNotFound(f"Invalid URL ({request.method} {_path(request.scope)})")
    if isinstance(error, HTTPException) and error.status_code < 500:
        return call.InvalidValue("The request is not valid.")
    return error


def _path(scope: Mapping[str, Any]) -> str:
    """The path as far as it is safe to repeat and to log."""
    path: str = scope["path"]
    return path[:200] if path.isprintable() else "/"
