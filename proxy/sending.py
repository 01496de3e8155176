"""One attempt on its way: the request in the provider's words, leave of its breaker, a place, and the bytes sent.

What keeps an attempt from being sent at all (its provider has no words for the request, an open breaker, no place) is
`NotSent`: it cost nobody anything, and is no attempt. Must not: read an answer, or choose a candidate.
"""

from __future__ import annotations

import asyncio
import time

import msgspec
from prometheus_client import Counter

from config.settings import Bounds
from metering.meter import Meter
from metering.ranks import encoding
from providers.breaker import Permit
from providers.bulkhead import Refusal, Ticket
from providers.codec import BadRequest, ChatCall, Codec, Unsupported, UpstreamRequest
from proxy.candidates import Candidate
from proxy.errors import CallError, InvalidValue, ProviderBusy, ProviderUnavailable, UnsupportedParameter
from proxy.failures import Failure
from proxy.http_request import build_request
from proxy.live_session import Attempt, LiveSession
from proxy.places import Places
from proxy.prepared import PreparedCall, SessionEnded
from proxy.resuming import Keeper, Resumed, continued_price
from proxy.session import Ending, Phase
from proxy.threads import Threads
from proxy.transport import Exchange, Transport

LIMIT_SLACK, LIMIT_SLACK_TOKENS = 4, 1024
"""How far a reported output may exceed the request's limit: some servers do not count reasoning into the limit."""
ASKED_TOKENS = 512
"""Output that a call takes from a budget of tokens per minute where it names no limit."""
BUSY_RETRY_MS = 1_000
TRANSLATED_INLINE_BYTES = 64 * 1024
"""Up to here a request is put into another provider's words on the event loop: 17 ms in the worst case."""

SKIPPED = Counter(
    "tollgate_candidates_skipped_total", "Candidates passed over without an attempt, by provider and reason.",
    ["provider", "reason"],
)  # fmt: skip


class NotSent(Exception):
    """The attempt was not begun."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.fault)
        self.failure = failure


class Sent(msgspec.Struct, eq=False):
    """An attempt under way. `asked_at`: monotonic seconds when it was sent."""

    candidate: Candidate
    codec: Codec
    exchange: Exchange
    attempt: Attempt
    permit: Permit
    asked_at: float


class Going(msgspec.Struct):
    """Where a call's walk through its plan stands: when it began (monotonic seconds), the place in the plan, the tries
    of that candidate, the failure to tell so far, and what is continued."""

    began: float
    place: int = 0
    tries: int = 1
    tell: Failure | None = None
    resumed: Resumed | None = None


class Sender:
    """Sends the attempts of this worker."""

    def __init__(self, transport: Transport, bounds: Bounds, threads: Threads | None = None) -> None:
        """`threads`: where large requests are translated; None: nowhere."""
        self._transport = transport
        self._bounds = bounds
        self._threads = threads
        self._stream_deadlines = transport.deadlines_with(head_ms=bounds.headers_ms)
        self._whole_deadlines = transport.deadlines_with(head_ms=bounds.headers_nonstream_ms)

    async def send(self, session: LiveSession, call: PreparedCall, candidate: Candidate, going: Going) -> Sent:
        """Begin an attempt. Raises NotSent, SessionEnded."""
        session.finishing = candidate.finish_on_disconnect
        if session.client_gone and not session.finishing:
            session.end(Ending.CLIENT_GONE)
        if session.ending is not None:
            raise SessionEnded
        chat = self._chat(session, call, candidate, going.resumed)
        codec: Codec = candidate.wire.codec(candidate.upstream, chat)
        if len(chat.body) <= TRANSLATED_INLINE_BYTES or self._threads is None or not candidate.wire.translates:
            out = _told(codec, chat, session.request_id)
        else:
            out = await self._threads.run(lambda: _told(codec, chat, session.request_id))
        if session.ending is not None:  # while it was translated
            raise SessionEnded
        live, now = candidate.live, session.clock.monotonic()
        permit = live.breaker.try_pass(now)
        if permit is None:
            wait_ms = int(live.breaker.blocked_s(now) * 1000) + 1
            raise NotSent(Failure("breaker_open", ProviderUnavailable(retry_after_ms=wait_ms)))
        attempt = Attempt(candidate.upstream.name, candidate.model, live=live)
        if candidate.places is not None:
            try:
                attempt.ticket = await self._place(session, call, candidate, candidate.places, going)
            except (NotSent, SessionEnded, asyncio.CancelledError):
                live.breaker.abandoned(permit)
                raise
            attempt.places = candidate.places
            attempt.began = now = session.clock.monotonic()
        session.attempts.append(attempt)
        live.in_flight += 1
        live.waiting += 1
        attempt.waiting = True
        if going.resumed is not None:
            codec = going.resumed.continued(codec, candidate, attempt)
        elif call.continuable:
            codec = Keeper(codec)
        return Sent(candidate, codec, self._opened(candidate, out, call), attempt, permit, now)

    def lead(self, session: LiveSession, call: PreparedCall, sent: Sent, *, resumed: bool = False) -> None:
        """From now on this attempt is the session's: it is metered, and the session's end is its end."""
        candidate = sent.candidate
        prompt, price = call.prompt_tokens, candidate.price
        if resumed:  # what is continued has paid its prompt
            prompt, price = 0, continued_price(price, prompt)
        session.meter = Meter(price, prompt, encoding(candidate.encoding), call.prompt_kind)
        session.price, session.cost = price, candidate.cost
        limit = call.output_limit or call.request.limit
        session.output_most = None if limit is None else LIMIT_SLACK * limit * call.request.choices + LIMIT_SLACK_TOKENS
        session.exchange = sent.exchange
        session.request_sent = False
        if session.phase is not Phase.CONTENT:
            session.advance(Phase.SENT)

    def _chat(
        self, session: LiveSession, call: PreparedCall, candidate: Candidate, resumed: Resumed | None
    ) -> ChatCall:
        request, upstream = call.request, candidate.upstream
        body = request.upstream_body(
            candidate.model,
            include_usage=upstream.include_usage,
            output_limit=call.output_limit,
            limit_field=upstream.limit_field,
        )
        if resumed is not None:
            body = resumed.body(body, candidate, session.carried.output if session.carried is not None else 0)
        return ChatCall(
            body=body,
            model=candidate.model,
            stream=request.stream,
            choices=request.choices,
            usage_wanted=request.usage_wanted,
            rename_to=call.route.name if call.route.rename_model else None,
            frame_bytes_max=self._bounds.frame_bytes_max,
            created=int(time.time()),
            root=request.root,
        )

    def _opened(self, candidate: Candidate, out: UpstreamRequest, call: PreparedCall) -> Exchange:
        deadlines = self._stream_deadlines if call.request.stream else self._whole_deadlines
        if candidate.pool is not None:
            return candidate.pool.open(out, deadlines)
        raw = build_request(out.method, out.target, candidate.origin, out.headers, out.body, out.own)
        return self._transport.open(candidate.origin, raw, deadlines)

    async def _place(
        self, session: LiveSession, call: PreparedCall, candidate: Candidate, places: Places, going: Going
    ) -> Ticket:
        """A place at the provider: at once, or, where no other candidate is left, in its queue."""
        tokens = budget_tokens(call)
        ticket = places.try_take(candidate.model, tokens)
        if ticket is not None:
            return ticket
        if going.place + 1 < len(call.plan):
            raise NotSent(Failure("busy", ProviderBusy(retry_after_ms=BUSY_RETRY_MS)))
        left_s = call.policy.deadline_s - (session.clock.monotonic() - going.began)
        waiting = places.begin_wait(candidate.model, tokens, max(0.0, left_s))
        if isinstance(waiting, Refusal):
            raise NotSent(Failure("busy", ProviderBusy(retry_after_ms=int(waiting.retry_after_s * 1000) + 1)))
        session.waking = waiting.cancel
        try:
            got = await waiting.held()
        except asyncio.CancelledError:
            if session.ending is None:
                raise
            raise SessionEnded from None
        finally:
            session.waking = None
        if session.ending is not None:
            if got is not None:
                places.cancel(got)
            raise SessionEnded
        if got is None:
            raise NotSent(Failure("busy", ProviderBusy(retry_after_ms=BUSY_RETRY_MS)))
        return got


def budget_tokens(call: PreparedCall) -> int:
    """Tokens that a call takes from a budget per minute before it is known what it uses. To ask for output costs
    nothing, so no more than the route's most for one answer is taken on a caller's word: others wait for the rest."""
    asked = call.output_limit or call.request.limit or ASKED_TOKENS
    return call.prompt_tokens + min(asked * call.request.choices, call.route.max_output_tokens)


def _told(codec: Codec, chat: ChatCall, request_id: str) -> UpstreamRequest:
    """The request in the provider's words. What it has no words for is no fault of the request's: the next candidate
    may take it. A request that is wrong in itself is the caller's fault."""
    public: CallError
    try:
        return codec.request(chat, request_id)
    except Unsupported as error:
        public = UnsupportedParameter(error.message, param=error.param)
        raise NotSent(Failure("unsupported", public)) from None
    except BadRequest as error:
        public = InvalidValue(error.message, param=error.param)
        raise NotSent(Failure("caller", public)) from None


async def pause(session: LiveSession, seconds: float) -> None:
    """Wait between two attempts; the session's end ends it. Raises SessionEnded."""
    loop = asyncio.get_running_loop()
    over: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not over.done():
            over.set_result(None)

    timer = loop.call_later(seconds, wake)
    session.waking = wake
    try:
        await over
    finally:
        timer.cancel()
        session.waking = None
    if session.ending is not None:
        raise SessionEnded
