"""The walk through a call's candidates until one answers with content; what follows a failure, `providers.retry` says.

Must not: write to the client or settle. What an attempt cost and how it ended is left on the session.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import msgspec
from prometheus_client import Counter

from config.settings import Bounds
from providers.breaker import Change
from providers.codec import Answer
from providers.events import Event
from providers.retry import Action, Point, RetryPolicy, Situation, decide
from proxy import telemetry
from proxy.attempts import AttemptOver, Attempts
from proxy.candidates import Candidate
from proxy.errors import CallError
from proxy.failures import Failure
from proxy.hedging import Hedger
from proxy.live_session import LiveSession
from proxy.prepared import PreparedCall
from proxy.resuming import Resumed
from proxy.sending import SKIPPED, Going, NotSent, Sender, Sent, pause

RETRIED = Counter("tollgate_retries_total", "Attempts at the candidate that had failed, by provider.", ["provider"])
FELL_BACK = Counter(
    "tollgate_fallbacks_total", "Calls that went on to another candidate, by route and fault.", ["route", "fault"]
)
CONTINUED = Counter(
    "tollgate_continuations_total", "Streams that broke after content, by route and result.", ["route", "result"]
)
NOT_SENT = frozenset(("unsupported", "busy", "breaker_open"))


class Opened(msgspec.Struct):
    """A stream that has shown its first content: `events` are what was read up to it, in order; `place` is its
    candidate's in the plan."""

    sent: Sent
    events: list[Event]
    place: int


class Upstreams:
    """The way to all providers of this worker."""

    def __init__(
        self,
        sender: Sender,
        bounds: Bounds,
        confirm: Callable[[LiveSession], object],
        changed: Callable[[str, Change], object] = lambda name, change: None,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """`confirm` is called when a provider's 2xx headers arrive, and at the first content where another candidate
        could have taken its place until then (the first progress of a costly prompt). `changed`: as `Attempts`.
        `draw` gives random numbers of [0, 1)."""
        self._sender = sender
        self._draw = draw
        self._attempts = Attempts(bounds, confirm, changed)
        self._hedger = Hedger(sender, self._attempts, bounds)

    async def open_stream(self, session: LiveSession, call: PreparedCall) -> Opened:
        """The first stream that shows content. Raises CallError (the failure to tell) or SessionEnded."""
        going = Going(session.clock.monotonic())
        while True:
            try:
                sent = await self._next(session, call, going)
                if call.route.hedge is None:
                    events = await self._attempts.first_content(session, call, sent)
                else:
                    sent, events = await self._hedger.race(session, call, sent, going)
            except (NotSent, AttemptOver) as over:
                await self._after(session, call, going, over)
            else:
                self._attempts.won(session, sent)
                return Opened(sent, events, going.place)

    async def fetch_answer(self, session: LiveSession, call: PreparedCall) -> tuple[Candidate, Answer]:
        """The first whole answer. Raises as `open_stream` does."""
        going = Going(session.clock.monotonic())
        while True:
            try:
                sent = await self._next(session, call, going)
                answer = await self._attempts.answer(session, call, sent)
            except (NotSent, AttemptOver) as over:
                await self._after(session, call, going, over)
            else:
                session.exchange = None
                self._attempts.won(session, sent)
                telemetry.count(telemetry.ATTEMPTS, 1, sent.attempt.provider, "completed")
                return sent.candidate, answer

    async def go_on(self, session: LiveSession, call: PreparedCall, broken: Opened, failure: Failure) -> Opened | None:
        """A stream that failed after content, continued by the next candidates; None where that is not to be, or none
        of them could. Raises SessionEnded."""
        self._attempts.failed_later(session, broken.sent, failure)
        broken.sent.exchange.release()  # an error inside a stream leaves its connection open
        resumed = Resumed.of(broken.sent.codec, call.request.root) if call.continuable else None
        if resumed is None:
            return None
        going = Going(session.clock.monotonic(), broken.place, resumed=resumed)
        session.carry()
        broken.sent.attempt.close(failure.fault)
        try:
            await self._after(session, call, going, AttemptOver(failure, Point.AFTER_CONTENT))
            while True:
                try:
                    sent = await self._next(session, call, going)
                    events = await self._attempts.first_content(session, call, sent)
                except (NotSent, AttemptOver) as over:
                    await self._after(session, call, going, over)
                else:
                    _tell_continued(session, call, broken.sent, sent)
                    return Opened(sent, events, going.place)
        except CallError:
            telemetry.count(CONTINUED, 1, call.route.name, "failed")
            return None

    async def _next(self, session: LiveSession, call: PreparedCall, going: Going) -> Sent:
        """The attempt at the walk's place, on its way."""
        others = len(call.plan) - going.place - 1
        session.may_fall_back = others > 0
        sent = await self._sender.send(session, call, call.plan[going.place], going)
        self._sender.lead(session, call, sent, resumed=going.resumed is not None)
        if others:
            left_s = max(0.0, call.policy.deadline_s - (sent.asked_at - going.began))
            session.content_due = sent.asked_at + left_s / (others + 1)  # those behind it have their share too
        return sent

    async def _after(self, session: LiveSession, call: PreparedCall, going: Going, over: NotSent | AttemptOver) -> None:
        """Go on with the walk after a failure, or raise the CallError that the client is told."""
        failure = over.failure
        candidate = call.plan[going.place]
        point = Point.BEFORE_HEADERS
        if isinstance(over, AttemptOver):
            point = over.point
        else:
            telemetry.count(SKIPPED, 1, candidate.upstream.name, failure.fault)
        going.tell = _weightier(going.tell, failure)
        situation = Situation(
            tries=going.tries,
            attempts=len(session.attempts),
            others=len(call.plan) - going.place - 1,
            elapsed_s=session.clock.monotonic() - going.began,
            continuable=going.resumed is not None,
        )
        decision = decide(failure.fault, point, call.policy, situation, self._draw(), failure.retry_after_s)
        action = decision.action
        further = going.resumed is not None and point is not Point.AFTER_CONTENT  # of that the table says enough
        if further and _may_go_on(call.policy, situation):
            action = Action.NEXT  # a refusal to continue is not the caller's fault, and the client is waiting
        if action is Action.GIVE_UP:
            raise going.tell.error
        if action is Action.RETRY:
            telemetry.count(RETRIED, 1, candidate.upstream.name)
            going.tries += 1
            await pause(session, decision.delay_s)
        else:
            telemetry.count(FELL_BACK, 1, call.route.name, failure.fault)
            going.place += 1
            going.tries = 1


def _may_go_on(policy: RetryPolicy, situation: Situation) -> bool:
    """Whether another candidate may be asked to continue."""
    in_time = situation.elapsed_s < policy.deadline_s
    return bool(situation.others) and situation.attempts < policy.attempts_max and in_time


def _tell_continued(session: LiveSession, call: PreparedCall, broken: Sent, further: Sent) -> None:
    telemetry.count(CONTINUED, 1, call.route.name, "continued")
    telemetry.count(telemetry.ATTEMPTS, 1, broken.attempt.provider, broken.attempt.outcome)
    telemetry.log.warning(
        "stream continued",
        request_id=session.request_id,
        session=session.id,
        provider=broken.attempt.provider,
        model=broken.attempt.model,
        outcome=broken.attempt.outcome,
        by=further.attempt.provider,
    )


def _weightier(last: Failure | None, failure: Failure) -> Failure:
    """Which failure of two candidates the client is told: the later one, but that a request was not sent is told only
    when it was sent to none of them, and of such reasons one that passes by waiting."""
    if last is None or failure.fault not in NOT_SENT:
        return failure
    if last.fault not in NOT_SENT or (failure.fault == "unsupported" and last.fault != "unsupported"):
        return last
    return failure
