"""One attempt from its sending to its first content, or to its failure: what is read, what is told to its breaker.

Must not: decide what follows a failure (`providers.retry` does), write to the client or settle.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from config.settings import Bounds
from metering.pricing import TokenUsage, cost
from providers.breaker import Change
from providers.codec import Answer, Codec
from providers.events import Chunk, Completed, Event, Failed, ProviderFailure
from providers.retry import RULES, Mark, Point
from proxy import telemetry
from proxy.candidates import Candidate
from proxy.errors import CallError, LeaseLost, UpstreamGarbage
from proxy.failures import AttemptFailed, Failure, failure_of
from proxy.live_session import LiveSession
from proxy.prepared import PreparedCall, SessionEnded
from proxy.sending import Sent
from proxy.session import Ending, Phase
from proxy.transport import Exchange
from proxy.transport_errors import TransportError
from proxy.usage import report

ERROR_BODY_BYTES_MAX = 256 * 1024
TOO_LARGE = ProviderFailure(
    "caller", 502, "The provider's answer is larger than the gateway accepts.", "server_error", "upstream_invalid"
)
"""An answer that is so large because so much was asked for: nobody buys it a second time."""


class AttemptOver(Exception):
    """An attempt failed before content, at this point."""

    def __init__(self, failure: Failure, point: Point) -> None:
        super().__init__(failure.fault)
        self.failure = failure
        self.point = point


class Attempts:
    """Reads the attempts of this worker."""

    def __init__(
        self,
        bounds: Bounds,
        confirm: Callable[[LiveSession], object],
        changed: Callable[[str, Change], object],
    ) -> None:
        """`confirm`: as `Upstreams`. `changed` is told when the breaker of a candidate (by its name) has opened or
        closed."""
        self._bounds = bounds
        self._confirm = confirm
        self._changed = changed

    async def first_content(self, session: LiveSession, call: PreparedCall, sent: Sent) -> list[Event]:
        """A stream's events up to and with its first content. Raises AttemptOver or SessionEnded."""
        exchange, attempt = sent.exchange, sent.attempt
        try:
            await self._expect_success(sent.codec, exchange)
            attempt.status = exchange.status
            self._answered(session, call, sent)
            events = await self._read_to_content(session, sent)
        except (TransportError, CallError, AttemptFailed) as error:
            raise self._failed(session, call, sent, error) from None
        except asyncio.CancelledError:
            sent.candidate.live.breaker.abandoned(sent.permit)  # a probe would be waited for
            raise
        finally:
            if session.exchange is exchange:
                session.content_due = None
            if attempt.outcome == "running" and session.ending is not None:
                self._ended(session, call, sent)
        self._succeeded(session, call, sent)
        return events

    async def answer(self, session: LiveSession, call: PreparedCall, sent: Sent) -> Answer:
        """A whole answer. Raises as `first_content` does."""
        exchange = sent.exchange
        try:
            await self._expect_success(sent.codec, exchange)
            sent.attempt.status = exchange.status
            self._answered(session, call, sent)
            answer = sent.codec.answer(await self._body(exchange, self._bounds.answer_bytes_max))
            if isinstance(answer, ProviderFailure):
                raise AttemptFailed(answer)
        except (TransportError, CallError, AttemptFailed) as error:
            too_large = isinstance(error, UpstreamGarbage) and sent.attempt.status is not None
            wanted = AttemptFailed(TOO_LARGE) if too_large and _asks_for_much(call) else error
            raise self._failed(session, call, sent, wanted) from None
        except asyncio.CancelledError:
            sent.candidate.live.breaker.abandoned(sent.permit)
            raise
        finally:
            session.content_due = None
        if session.ending is None and session.clock.boot_ms() >= session.fence_ms:
            session.end(Ending.LEASE_LOST, LeaseLost())
            sent.attempt.close(Ending.LEASE_LOST, exchange.status)
            sent.candidate.live.breaker.abandoned(sent.permit)
            raise SessionEnded  # the sweeper may have settled it: nothing of the answer may reach the client
        exchange.release()
        self._succeeded(session, call, sent)
        return answer

    def won(self, session: LiveSession, sent: Sent) -> None:
        """The client gets this attempt's answer."""
        session.first_content_at = session.clock.monotonic()
        session.advance(Phase.CONTENT)
        if session.may_fall_back:
            self._confirm(session)  # not before: what a failed attempt cost could not be taken back

    def failed_later(self, session: LiveSession, sent: Sent, failure: Failure) -> None:
        """A stream failed after its first content."""
        sent.attempt.fault = failure.fault  # it is closed when it is known what it has used
        self._mark(session, sent, failure, Point.AFTER_CONTENT)
        _tell(session, sent, failure, Point.AFTER_CONTENT)

    def given_up(self, session: LiveSession, call: PreparedCall, sent: Sent, outcome: str) -> None:
        """We ended an attempt ourselves: nothing is said about its provider, and the house pays for it."""
        sent.exchange.release()
        _leave(call, sent)
        self._cost(session, call, sent)
        sent.attempt.close(outcome, sent.exchange.status or None)
        sent.candidate.live.breaker.abandoned(sent.permit)
        telemetry.count(telemetry.ATTEMPTS, 1, sent.attempt.provider, outcome)

    def _answered(self, session: LiveSession, call: PreparedCall, sent: Sent) -> None:
        if session.exchange is not sent.exchange:
            return  # a hedge: the session is still the first attempt's
        if session.phase is Phase.SENT:
            session.advance(Phase.ANSWERED)
            self._confirm(session)
        if not session.stream:
            return  # it shows no content before its end; its share of the deadline, the idle and total bounds watch it
        hidden = call.route.hidden_reasoning
        bound_ms = self._bounds.first_content_hidden_ms if hidden else self._bounds.first_content_ms
        due = session.clock.monotonic() + bound_ms / 1000
        session.content_due = due if session.content_due is None else min(due, session.content_due)

    def _succeeded(self, session: LiveSession, call: PreparedCall, sent: Sent) -> None:
        live, attempt = sent.candidate.live, sent.attempt
        now = session.clock.monotonic()
        attempt.waiting = False
        attempt.first_content_ms = int((now - sent.asked_at) * 1000)
        live.waiting -= 1
        if not session.stream or sent.permit.probe_at is not None:
            # Of other streams their end is told: one that breaks after its first content is no success before it.
            change = live.breaker.succeeded(sent.permit, now)
            if change is not None:
                self._changed(sent.candidate.target.name, change)
        if call.route.timed:
            took = now - sent.asked_at
            (live.latency if session.stream else live.whole_latency).observe(took, now)
            if live.recent is not None and session.stream:
                live.recent.observe(took, now)

    async def _expect_success(self, codec: Codec, exchange: Exchange) -> None:
        await exchange.head()
        if 200 <= exchange.status < 300:
            return
        # Servers quote what they refuse: a long request makes an error long, and no other error of it.
        try:
            body = await self._body(exchange, ERROR_BODY_BYTES_MAX, cut=True)
        except TransportError:
            body = b""  # the status says enough: who refuses a large request often closes before it was sent
        exchange.release()
        if 300 <= exchange.status < 400:
            raise UpstreamGarbage(f"The provider answered with a redirect (status {exchange.status}).")
        raise AttemptFailed(codec.failure(exchange.status, exchange.headers, body))

    async def _read_to_content(self, session: LiveSession, sent: Sent) -> list[Event]:
        codec, exchange = sent.codec, sent.exchange
        if not _is_stream(exchange, sent.candidate.wire.stream_types):
            failure = codec.answer(await self._body(exchange, ERROR_BODY_BYTES_MAX))
            if isinstance(failure, ProviderFailure) and failure.kind != "garbage":
                raise AttemptFailed(failure)
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
                    raise AttemptFailed(event.failure)
                elif isinstance(event, Completed):
                    shown = True
                elif not shown and session.exchange is exchange:
                    # Who leaves before the first text pays it. What follows text is the pump's, in its order.
                    report(session, event.usage)
            if shown:
                return events
            if size > 2 * self._bounds.frame_bytes_max and events:  # one frame may be unfinished
                return events  # so much that shows nothing is let through rather than gathered

    async def _body(self, exchange: Exchange, bytes_max: int, *, cut: bool = False) -> bytes:
        """The whole body. Of a longer one so much, where it may be `cut`; else raises UpstreamGarbage."""
        parts, size = [], 0
        while data := await exchange.read():
            parts.append(data)
            size += len(data)
            if size > bytes_max:
                if cut:
                    break
                raise UpstreamGarbage("The provider's answer is larger than the gateway accepts.")
        return b"".join(parts)

    def _failed(self, session: LiveSession, call: PreparedCall, sent: Sent, error: Exception) -> Exception:
        """Close a failed attempt; returns what to raise."""
        exchange, attempt = sent.exchange, sent.attempt
        leads = session.exchange is exchange
        if leads:
            session.request_sent = exchange.sent
        exchange.release()
        if session.ending is not None:
            self._ended(session, call, sent)
            if leads:
                session.exchange = None
            return SessionEnded()
        root = call.request.root
        failure = failure_of(error, answered=attempt.status is not None, model=attempt.model, root=root)
        point = Point.BEFORE_HEADERS if attempt.status is None else Point.BEFORE_CONTENT
        self._cost(session, call, sent)
        if not exchange.sent and attempt.places is not None and attempt.ticket is not None:
            attempt.places.cancel(attempt.ticket)  # the provider saw nothing of it
        attempt.close(failure.fault, exchange.status or None)
        self._mark(session, sent, failure, point)
        telemetry.count(telemetry.ATTEMPTS, 1, attempt.provider, failure.fault)
        _tell(session, sent, failure, point)
        if leads:
            session.exchange = session.content_due = None  # the next attempt has a time of its own
            if session.phase is not Phase.CONTENT:
                session.advance(Phase.HELD)
        return AttemptOver(failure, point)

    def _ended(self, session: LiveSession, call: PreparedCall, sent: Sent) -> None:
        _leave(call, sent)
        if session.ending is not None:
            sent.attempt.close(session.ending)
        sent.candidate.live.breaker.abandoned(sent.permit)

    def _cost(self, session: LiveSession, call: PreparedCall, sent: Sent) -> None:
        """What a lost attempt costs the house: its prompt, once the provider had begun to answer. One that was to go on
        with another's text has read that, too."""
        attempt, price, carried = sent.attempt, sent.candidate.cost, session.carried
        if attempt.status is not None and attempt.prompt == 0:
            attempt.prompt = call.prompt_tokens if carried is None else carried.prompt + carried.output
            attempt.cost = None if price is None else cost(price, TokenUsage(attempt.prompt, 0, 0, 0, 0))

    def _mark(self, session: LiveSession, sent: Sent, failure: Failure, point: Point) -> None:
        """Tell the candidate's breaker, by the table's row."""
        candidate, now = sent.candidate, session.clock.monotonic()
        mark, breaker = RULES[failure.fault, point].mark, candidate.live.breaker
        change: Change | None = None
        if mark is Mark.NOTHING or (failure.share_over and not session.stream):
            # A long whole answer looks like none until it is there: whoever asks for long ones proves nothing.
            breaker.abandoned(sent.permit)
        elif mark is Mark.PAUSE:
            if failure.retry_after_s is None:
                breaker.abandoned(sent.permit)
            else:
                change = breaker.failed(sent.permit, now, retry_after_s=failure.retry_after_s)
        elif mark is Mark.FAILURE:
            if failure.fault in ("head_timeout", "stall") and session.stream:
                candidate.live.latency.observe(now - sent.asked_at, now)
            change = breaker.failed(sent.permit, now, retry_after_s=failure.retry_after_s)
        elif mark is Mark.KEY_REFUSED:
            change = breaker.failed(sent.permit, now, key_refused=True)
            if failure.everywhere:
                self._refused_everywhere(candidate, now)
        else:
            change = breaker.succeeded(sent.permit, now)
            if mark is Mark.MISSING:
                candidate.live.missing_until = now + candidate.live.missing_s
        if change is not None:
            self._changed(candidate.target.name, change)

    def _refused_everywhere(self, candidate: Candidate, now: float) -> None:
        """The provider knows our key for none of its models."""
        for name, live in candidate.siblings:
            if live is candidate.live:
                continue
            permit = live.breaker.try_pass(now)
            change = None if permit is None else live.breaker.failed(permit, now, key_refused=True)
            if change is not None:
                self._changed(name, change)


def _leave(call: PreparedCall, sent: Sent) -> None:
    """Give back the place of an attempt that we ended ourselves. The provider counts the prompt of one that was sent,
    whoever pays it."""
    attempt = sent.attempt
    if attempt.places is None or attempt.ticket is None:
        return
    if sent.exchange.sent:
        attempt.places.release(attempt.ticket, float(call.prompt_tokens))
    else:
        attempt.places.cancel(attempt.ticket)


def _tell(session: LiveSession, sent: Sent, failure: Failure, point: Point) -> None:
    attempt = sent.attempt
    telemetry.log.warning(
        "attempt failed",
        request_id=session.request_id,
        session=session.id,
        route=session.route,
        provider=attempt.provider,
        model=attempt.model,
        outcome=failure.fault,
        when=point.name.lower(),
        status=attempt.status,
        ms=int((session.clock.monotonic() - sent.asked_at) * 1000),
        retry_after_s=failure.retry_after_s,
        detail=failure.detail or None,
    )


def _asks_for_much(call: PreparedCall) -> bool:
    """Whether a request can make an answer of a model's length larger than any gateway takes."""
    request = call.request
    return request.choices > 1 or request.audio or request.root.raw("logprobs") not in (None, b"null", b"false")


def _is_stream(exchange: Exchange, types: tuple[bytes, ...]) -> bool:
    for name, value in exchange.headers:
        if name == b"content-type":
            kind = value.lower()
            for each in types:  # once a stream: a generator costs more than the loop
                if each in kind:
                    return True
    return False
