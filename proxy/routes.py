"""The data plane's HTTP: who is calling, the body within its bounds, the models, and the hand-over to the relays.

Handlers are bare ASGI functions; an error leaves as an exception that the edge (`gateway.errors`) renders.
Must not: meter, or know a provider's wire.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from accounts.key_store import KeyStore, Principal
from config.logs import lines
from config.settings import Bounds
from metering.ledger import AccountRef, KeyLimits
from providers.routing import Preferences
from proxy import route_hint, telemetry
from proxy.admission import Admission, Caller
from proxy.answer import credits_text, stream_headers
from proxy.bodies import BodyShare
from proxy.candidates import Route
from proxy.client_stream import ClientConnection, ClientStream
from proxy.errors import BodyTooLarge, BodyTooSlow, CallError, ModelNotFound
from proxy.idempotency import HEADER, read_key
from proxy.ids import request_id
from proxy.live_session import LiveSession
from proxy.live_sessions import LiveSessions
from proxy.prepared import PreparedCall, SessionEnded
from proxy.relay import StreamRelay
from proxy.request import ChatRequest, read_chat
from proxy.response_cache import ResponseCache, Turn
from proxy.route_hint import combined, read_hint
from proxy.session import Ending
from proxy.settlement import Bill, Settler
from proxy.whole_relay import WholeAnswer, WholeRelay

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class ClientGone(Exception):
    """The client left before its request had arrived; there is nobody to answer."""


class DataPlane:
    """The handlers under /v1. One per worker."""

    def __init__(
        self,
        keys: KeyStore,
        admission: Admission,
        live: LiveSessions,
        relays: tuple[StreamRelay, WholeRelay, Settler],
        routes: Mapping[str, Route],
        bounds: Bounds,
    ) -> None:
        self._keys = keys
        self._admission = admission
        self._live = live
        self._stream_relay, self._whole_relay, self._settler = relays
        self._bounds = bounds
        self.cache: ResponseCache | None = None
        """Where some route keeps its answers."""
        self._started = int(time.time())
        self._models = {name: self._model(name, route) for name, route in routes.items()}

    async def chat_completions(self, scope: Scope, receive: Receive, send: Send) -> None:
        """POST /v1/chat/completions. Raises CallError and the key errors while no response has begun.

        In one piece: each coroutine on the way is gone through again whenever the call goes on."""
        began = time.monotonic()
        share = BodyShare(self._live.bodies)
        state = scope["state"]
        connection: ClientConnection = state["connection"]
        turn: Turn | None = None
        try:
            request_key = state["request_id"] = request_id()
            authorization, idempotency_keys, announced, hints = _head(scope)
            principal = await self._principal(authorization)
            state["key"], state["account"] = principal.key_id, principal.account_id
            idempotency = read_key(idempotency_keys)
            preferences = combined(principal.preferences, read_hint(hints)) if hints or principal.preferences else None
            request = await self._read(await self._body(announced, connection, receive, share))
            state["route"] = request.model if request.model in self._models else None
            caller = _caller(principal, idempotency, preferences)
            if self.cache is not None:
                teller = send, request_key
                turn = await self.cache.turn(scope["headers"], request, principal.account_id, preferences, teller)
            self._live.admission_begins()
            try:
                if turn is None:
                    session, call = await self._admission.admit(caller, request, request_key)
                else:
                    session, call = await self._admit(turn, connection, caller, request, request_key)
            finally:
                self._live.admission_ended()
            self._bind(session, connection, began)
            state["session"] = session.ref.session
            bill: Bill | None = None
            try:
                if request.stream and turn is not None:
                    bill = await turn.stream(session, call, send, connection)
                elif request.stream:
                    client = ClientStream(send, connection, lambda: stream_headers(session))
                    bill = await self._stream_relay.run(session, call, client)
                else:
                    answer = await (self._whole_relay.run if turn is None else turn.whole)(session, call)
                    bill = answer.bill
                    headers = _whole_headers(session, answer)
                    if not connection.respond(200, headers, answer.body):
                        await send({"type": "http.response.start", "status": 200, "headers": headers})
                        await send({"type": "http.response.body", "body": answer.body})
            except SessionEnded:
                pass  # there is nobody to answer
            finally:
                connection.on_gone = None
                session.abort_client = None  # the connection may carry another request next
                session.client = session.task = None
                self._settler.abandoned(session, call)
            cached = None if turn is None else turn.result
            _log(state, session, bill, (began, cached), answered=connection.response_started)
        except CallError as error:
            if turn is None or not await turn.told(error):
                raise
        finally:
            if turn is not None:
                turn.close()
            share.release()
            state.pop("connection", None)  # it knows its scope: a circle that only a collection would free

    async def _admit(
        self, turn: Turn, connection: ClientConnection, caller: Caller, request: ChatRequest, request_key: str
    ) -> tuple[LiveSession, PreparedCall]:
        """Hold what the call's answer costs, once it is known whether it was kept. Raises CallError, ClientGone."""
        self._live.admit()
        await turn.begin(connection)
        if connection.disconnected:
            raise ClientGone
        if turn.charge is None:
            return await self._admission.admit(caller, request, request_key)
        return await self._admission.admit_cached(caller, request, request_key, turn.charge)

    def _bind(self, session: LiveSession, connection: ClientConnection, began: float) -> None:
        """Tie the session and the client's connection together, until the call is over."""
        session.started_at = began
        session.task = connection.task
        session.abort_client = connection.abort
        connection.on_gone = lambda: self._client_gone(session)
        if connection.disconnected:
            self._client_gone(session)

    async def aclose(self) -> None:
        """Serve nothing more; does not wait for work beside the event loop."""
        await self._admission.aclose()

    async def list_models(self, scope: Scope) -> dict[str, Any]:
        """The body of GET /v1/models. Raises the key errors."""
        await self._principal(_head(scope)[0])
        return {"object": "list", "data": list(self._models.values())}

    async def find_model(self, scope: Scope, name: str) -> dict[str, Any]:
        """The body of GET /v1/models/{id}; ids may contain slashes. Raises ModelNotFound and the key errors."""
        await self._principal(_head(scope)[0])
        found = self._models.get(name)
        if found is None:
            raise ModelNotFound()
        return found

    async def _principal(self, authorization: bytes) -> Principal:
        return self._keys.peek(authorization) or await self._keys.authenticate(authorization)

    async def _read(self, body: bytes) -> ChatRequest:
        """The checked request. Raises as `read_chat`; a large body is read beside the event loop."""
        if len(body) <= self._bounds.body_inline_bytes:
            return read_chat(body, self._bounds)

        def read() -> ChatRequest:
            request = read_chat(body, self._bounds)
            request.body_hash()
            return request

        return await self._admission.threads.run(read)

    async def _body(self, announced: bytes, connection: ClientConnection, receive: Receive, share: BodyShare) -> bytes:
        """The request body, counted in `share`. Raises BodyTooLarge, at the announced length or at the bound,
        Overloaded when the worker's bodies leave no room for it, BodyTooSlow, ClientGone."""
        bytes_max = self._bounds.body_bytes_max
        if announced.isdigit():
            if int(announced) > bytes_max:
                raise BodyTooLarge(f"The request body is larger than {bytes_max} bytes.")
            share.expect(int(announced))
            whole = connection.whole_body()
            if whole is not None:
                share.grow(len(whole))
                return whole
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._bounds.client_body_ms / 1000):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    part = message.get("body", b"")
                    size += len(part)
                    if size > bytes_max:
                        raise BodyTooLarge(f"The request body is larger than {bytes_max} bytes.")
                    share.grow(len(part))
                    parts.append(part)
                    if not message.get("more_body"):
                        return parts[0] if len(parts) == 1 else b"".join(parts)
        except TimeoutError:
            raise BodyTooSlow() from None

    def _client_gone(self, session: LiveSession) -> None:
        """End the session when the client leaves, wherever it is, unless its provider shall finish."""
        session.client_gone = True
        if session.stream or not session.finishing:
            session.end(Ending.CLIENT_GONE)

    def _model(self, name: str, route: Route) -> dict[str, Any]:
        owner = route.candidates[0].upstream.name
        return {"id": name, "object": "model", "created": self._started, "owned_by": owner}


def _caller(principal: Principal, idempotency: str, preferences: Preferences | None) -> Caller:
    account = AccountRef(principal.account_id, principal.shard)
    limits = KeyLimits(principal.requests_per_minute, principal.parallel_sessions)
    return Caller(account, principal.key_id, limits, idempotency, preferences)


def _whole_headers(session: LiveSession, answer: WholeAnswer) -> list[tuple[bytes, bytes]]:
    return [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(answer.body)),
        (b"x-request-id", session.request_id.encode()),
        *answer.headers,
    ]


def _head(scope: Scope) -> tuple[bytes, list[bytes], bytes, list[bytes]]:
    """The first authorization header, all idempotency keys, the announced length and all route hints, in one pass."""
    authorization: bytes | None = None
    keys: list[bytes] = []
    hints: list[bytes] = []
    announced = b""
    for name, value in scope["headers"]:
        if name == b"authorization":
            if authorization is None:
                authorization = value
        elif name == HEADER:
            keys.append(value)
        elif name == b"content-length":
            announced = value
        elif name == route_hint.HEADER:
            hints.append(value)
    return authorization or b"", keys, announced, hints


def _log(
    state: Mapping[str, Any],
    session: LiveSession,
    bill: Bill | None,
    call: tuple[float, str | None],
    *,
    answered: bool,
) -> None:
    """The request's one log line. `call` is when it began, and what came of it in the response cache."""
    began, cached = call
    telemetry.count(telemetry.REQUESTS, 1, "200" if answered else "499", "")
    first = session.first_content_at
    if first is not None:
        telemetry.first_content(session.route, first - began)
    last = session.attempts[-1] if session.attempts else None
    lines.info(
        "chat",
        {
            "request_id": session.request_id,
            "session": session.ref.session,
            "account": state["account"],
            "key": state["key"],
            "route": session.route,
            "stream": session.stream,
            "provider": last.provider if last else None,
            "attempts": len(session.attempts),
            "cache": cached,
            "ending": bill.ending if bill else session.ending,
            "prompt": bill.usage.prompt if bill else None,
            "output": bill.usage.output if bill else None,
            "charge": credits_text(bill.micros) if bill else None,
            "first_content_ms": None if first is None else int((first - began) * 1000),
            "duration_ms": int((time.monotonic() - began) * 1000),
        },
    )
