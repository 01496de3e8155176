"""Attempts at a route's candidates, in order, until one answers with content; failures before it fall back.

Must not: write to the client or settle. What an attempt cost and how it ended is left on the session.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from config.settings import Bounds
from metering.meter import Meter
from metering.prompt import PromptKind
from metering.ranks import encoding
from providers.codec import Answer, BadRequest, ChatCall, Codec, Unsupported, UpstreamRequest
from providers.events import Chunk, Completed, Event, Failed, ProviderFailure
from proxy import telemetry
from proxy.candidates import Candidate, Route
from proxy.errors import (
    CallError,
    InvalidValue,
    LeaseLost,
    ProviderError,
    UnsupportedParameter,
    UpstreamGarbage,
    UpstreamUnreachable,
)
from proxy.failures import failure_error, transport_error
from proxy.http_request import build_request
from proxy.live_session import Attempt, LiveSession
from proxy.request import ChatRequest
from proxy.session import Ending, Phase
from proxy.transport import Exchange, Transport
from proxy.transport_errors import (
    TransportError,
)

ERROR_BODY_BYTES_MAX = 256 * 1024
LIMIT_SLACK, LIMIT_SLACK_TOKENS = 4, 1024
"""How far a reported output may exceed the request's limit: some servers do not count reasoning into the limit."""


class SessionEnded(Exception):
    """The session was ended from outside (client gone, lease lost, shutdown) while an attempt ran."""


class PreparedCall(msgspec.Struct, frozen=True):
    """A checked, priced and held request. `output_limit` is what the hold covers of each choice's output
    where the call cannot be metered in flight, else None."""

    request: ChatRequest
    route: Route
    prompt_tokens: int
    prompt_kind: PromptKind
    output_limit: int | None


class Opened(msgspec.Struct):
    """A stream that has shown its first content: `events` are what was read up to it, in order."""

    candidate: Candidate
    codec: Codec
    exchange: Exchange
    events: list[Event]


class Upstreams:
    """The way to all providers of this worker."""

    def __init__(self, transport: Transport, bounds: Bounds, confirm: Callable[[LiveSession], object]) -> None:
        """`confirm` is called when a provider's 2xx headers arrive, and at the first content where another candidate
        could have taken its place until then (the first progress of a costly prompt)."""
        self._transport = transport
        self._bounds = bounds
        self._confirm = confirm
        self._stream_deadlines = transport.deadlines_with(head_ms=bounds.headers_ms)
        self._whole_deadlines = transport.deadlines_with(head_ms=bounds.headers_nonstream_ms)

    async def open_stream(self, session: LiveSession, call: PreparedCall) -> Opened:
        """The first candidate that streams content. Raises CallError (the last failure) or SessionEnded."""
        last: CallError | None = None
        left = len(call.route.candidates)
        for candidate in call.route.candidates:
            left -= 1
            session.may_fall_back = left > 0
            try:
                return await self._stream_attempt(session, call, candidate)
            except CallError as error:
                if not _falls_back(error):
                    raise
                last = _weightier(last, error)
        raise last or UpstreamUnreachable()

    async def fetch_answer(self, session: LiveSession, call: PreparedCall) -> tuple[Candidate, Answer]:
        """The first candidate's whole answer. Raises as `open_stream` does."""
        last: CallError | None = None
        left = len(call.route.candidates)
        for candidate in call.route.candidates:
            left -= 1
            session.may_fall_back = left > 0
            try:
                return candidate, await self._answer_attempt(session, call, candidate)
            except CallError as error:
                if not _falls_back(error):
                    raise
                last = _weightier(last, error)
        raise last or UpstreamUnreachable()

    async def _stream_attempt(self, session: LiveSession, call: PreparedCall, candidate: Candidate) -> Opened:
        attempt, codec, exchange = self._send(session, call, candidate)
        try:
            await self._expect_success(codec, exchange)
            attempt.status = exchange.status
            self._answered(session, call)
            events = await self._first_content(codec, exchange, candidate.wire.stream_types)
        except (TransportError, CallError) as error:
            raise self._failed(session, attempt, error) from None
        finally:
            session.content_due = None
            if attempt.outcome == "running" and session.ending is not None:
                attempt.close(session.ending, exchange.status or None)
        session.first_content_at = session.clock.monotonic()
        session.advance(Phase.CONTENT)
        if session.may_fall_back:
            self._confirm(session)  # not before: what a failed attempt cost could not be taken back
        return Opened(candidate, codec, exchange, events)

    async def _answer_attempt(self, session: LiveSession, call: PreparedCall, candidate: Candidate) -> Answer:
        attempt, codec, exchange = self._send(session, call, candidate)
        try:
            await self._expect_success(codec, exchange)
            attempt.status = exchange.status
            self._answered(session, call)
            body = await self._body(exchange, self._bounds.answer_bytes_max)
            answer = codec.answer(body)
            if isinstance(answer, ProviderFailure):
                raise failure_error(answer)
        except (TransportError, CallError) as error:
            raise self._failed(session, attempt, error) from None
        if session.ending is None and session.clock.boot_ms() >= session.fence_ms:
            session.end(Ending.LEASE_LOST, LeaseLost())
            attempt.close(Ending.LEASE_LOST, exchange.status)
            raise SessionEnded  # the sweeper may have settled it: nothing of the answer may reach the client
        exchange.release()
        session.exchange = None
        session.first_content_at = session.clock.monotonic()
        session.advance(Phase.CONTENT)
        attempt.close("completed", exchange.status)
        telemetry.count(telemetry.ATTEMPTS, 1, candidate.upstream.name, "completed")
        return answer

    def _send(self, session: LiveSession, call: PreparedCall, candidate: Candidate) -> tuple[Attempt, Codec, Exchange]:
        session.finishing = candidate.finish_on_disconnect
        if session.client_gone and not session.finishing:
            session.end(Ending.CLIENT_GONE)
        if session.ending is not None:
            raise SessionEnded
        request = call.request
        upstream = candidate.upstream
        body = request.upstream_body(
            candidate.model,
            include_usage=upstream.include_usage,
            output_limit=call.output_limit,
            limit_field=upstream.limit_field,
        )
        chat = ChatCall(
            body=body,
            model=candidate.model,
            stream=request.stream,
            choices=request.choices,
            usage_wanted=request.usage_wanted,
            rename_to=call.route.name if call.route.rename_model else None,
            frame_bytes_max=self._bounds.frame_bytes_max,
            created=int(time.time()),
        )
        codec = candidate.wire.codec(upstream, chat)
        attempt = Attempt(upstream.name, candidate.model)
        session.attempts.append(attempt)
        out = _told(codec, chat, session, attempt)
        session.meter = Meter(candidate.price, call.prompt_tokens, encoding(candidate.encoding), call.prompt_kind)
        session.price, session.cost = candidate.price, candidate.cost
        limit = call.output_limit or request.limit
        session.output_most = None if limit is None else LIMIT_SLACK * limit * request.choices + LIMIT_SLACK_TOKENS
        deadlines = self._stream_deadlines if request.stream else self._whole_deadlines
        if candidate.pool is None:
            origin = candidate.origin
            raw = build_request(out.method, out.target, origin, out.headers, out.body, out.own)
            exchange = self._transport.open(origin, raw, deadlines)
        else:
            exchange = candidate.pool.open(out, deadlines)
        session.exchange = exchange
        session.request_sent = False
        session.advance(Phase.SENT)
        return attempt, codec, exchange

    def _answered(self, session: LiveSession, call: PreparedCall) -> None:
        session.advance(Phase.ANSWERED)
        self._confirm(session)
        if not session.stream:
            return  # a whole answer shows no content before its end; the idle and total bounds watch it
        hidden = call.route.hidden_reasoning
        bound_ms = self._bounds.first_content_hidden_ms if hidden else self._bounds.first_content_ms
        session.content_due = session.clock.monotonic() + bound_ms / 1000

    async def _expect_success(self, codec: Codec, exchange: Exchange) -> None:
        await exchange.head()
        if 200 <= exchange.status < 300:
            return
        body = await self._body(exchange, ERROR_BODY_BYTES_MAX)
        exchange.release()
        if 300 <= exchange.status < 400:
            raise UpstreamGarbage(f"The provider answered with a redirect (status {exchange.status}).")
        raise failure_error(codec.failure(exchange.status, exchange.headers, body))

    async def _first_content(self, codec: Codec, exchange: Exchange, types: tuple[bytes, ...]) -> list[Event]:
        """Events up to and with the first content. A stream that fails, ends or errs before it raises CallError."""
        if not _is_stream(exchange, types):
            failure = codec.answer(await self._body(exchange, ERROR_BODY_BYTES_MAX))
            if isinstance(failure, ProviderFailure) and failure.kind != "garbage":
                raise failure_error(failure)
            raise UpstreamGarbage("The provider did not answer with an event stream.")
        events: list[Event] = []
        size = 0
        while True:
            data = await exchange.read()
            size += len(data)
            shown = False
            for event in codec.feed(data) if data else codec.end_of_stream():
                events.append(event)
                if isinstance(event, Chunk):
                    shown = shown or event.content
                elif isinstance(event, Failed):
                    raise failure_error(event.failure)
                elif isinstance(event, Completed):
                    shown = True
            if shown:
                return events
            if size > self._bounds.frame_bytes_max and events:
                return events  # so much that shows nothing is let through rather than gathered

    async def _body(self, exchange: Exchange, bytes_max: int) -> bytes:
        parts, size = [], 0
        while data := await exchange.read():
            parts.append(data)
            size += len(data)
            if size > bytes_max:
                raise UpstreamGarbage("The provider's answer is larger than the gateway accepts.")
        return b"".join(parts)

    def _failed(self, session: LiveSession, attempt: Attempt, error: Exception) -> Exception:
        """Close a failed attempt; returns what to raise."""
        exchange, session.exchange = session.exchange, None
        if exchange is not None:
            session.request_sent = exchange.sent
            exchange.release()
        if session.ending is not None:
            attempt.close(session.ending)
            return SessionEnded()
        public = error if isinstance(error, CallError) else transport_error(error)
        _close(session, attempt, public, exchange.status or None if exchange is not None else None)
        session.advance(Phase.HELD)
        return public


def _told(codec: Codec, chat: ChatCall, session: LiveSession, attempt: Attempt) -> UpstreamRequest:
    """The request in the provider's words. What it has no words for is no fault of the request's: it raises
    UnsupportedParameter, and the next candidate may take it. A request that is wrong in itself is InvalidValue."""
    public: CallError
    try:
        return codec.request(chat, session.request_id)
    except Unsupported as error:
        public = UnsupportedParameter(error.message, param=error.param)
    except BadRequest as error:
        public = InvalidValue(error.message, param=error.param)
    _close(session, attempt, public, None)
    raise public


def _close(session: LiveSession, attempt: Attempt, error: Exception, status: int | None) -> None:
    """A failed attempt's record, count and log line."""
    attempt.close(type(error).__name__, status)
    telemetry.ATTEMPTS.labels(attempt.provider, type(error).__name__).inc()
    telemetry.log.warning(
        "attempt failed",
        request_id=session.request_id,
        session=session.id,
        provider=attempt.provider,
        model=attempt.model,
        outcome=attempt.outcome,
        status=attempt.status,
        ms=attempt.ms,
    )


def _is_stream(exchange: Exchange, types: tuple[bytes, ...]) -> bool:
    for name, value in exchange.headers:
        if name == b"content-type":
            kind = value.lower()
            for each in types:  # once a stream: a generator costs more than the loop
                if each in kind:
                    return True
    return False


def _falls_back(error: CallError) -> bool:
    """Whether another candidate may answer: not when the request itself is at fault."""
    if isinstance(error, ProviderError):
        return error.status in (408, 429) or error.status >= 500
    return not isinstance(error, InvalidValue)


def _weightier(last: CallError | None, error: CallError) -> CallError:
    """Which failure of two candidates the client is told: the later one, but that the request is not for a provider is
    told only when it is for none of them."""
    return last if last is not None and isinstance(error, UnsupportedParameter) else error
