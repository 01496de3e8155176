"""Hedging: a second attempt beside one that is slow to its first content. The first content wins; the other attempt is
cancelled, and what it cost is the house's.

The delay is a quantile of the candidate's own recent first contents ("The Tail at Scale", Dean & Barroso 2013).
Must not: hedge a call whose candidate is too little known, or tell a breaker of an attempt that it cancelled itself.
"""

from __future__ import annotations

import asyncio

from prometheus_client import Counter

from config.routing import Hedge
from config.settings import Bounds
from providers.events import Event
from proxy import telemetry
from proxy.attempts import AttemptOver, Attempts
from proxy.candidates import Candidate
from proxy.errors import UpstreamTimedOut
from proxy.live_session import LiveSession
from proxy.prepared import PreparedCall
from proxy.sending import Going, NotSent, Sender, Sent
from proxy.session import Phase

HEDGES = Counter("tollgate_hedges_total", "Second attempts begun, by route and whose content came first.", [
    "route", "first",
])  # fmt: skip
Reading = asyncio.Task[list[Event]]


def delay_s(hedge: Hedge, candidate: Candidate, now: float) -> float | None:
    """Seconds without content after which a second attempt begins. None: too little is known."""
    recent = candidate.live.recent
    slow_s = None if recent is None else recent.quantile_s(hedge.percentile / 100, now, least=hedge.samples_min)
    return None if slow_s is None else max(slow_s, hedge.delay_ms_min / 1000)


class Hedger:
    """Races the attempts of this worker."""

    def __init__(self, sender: Sender, attempts: Attempts, bounds: Bounds) -> None:
        self._sender = sender
        self._attempts = attempts
        self._content_s = bounds.first_content_ms / 1000
        self._hidden_s = bounds.first_content_hidden_ms / 1000

    async def race(
        self, session: LiveSession, call: PreparedCall, first: Sent, going: Going
    ) -> tuple[Sent, list[Event]]:
        """The attempt that showed content first, and its events up to it; `going` is at its place. Raises AttemptOver
        when both failed (the later one's), SessionEnded."""
        hedge, others = call.route.hedge, len(call.plan) - going.place - 1
        if len(session.attempts) >= call.policy.attempts_max:
            others = 0
        wait_s = None if hedge is None or not others else delay_s(hedge, first.candidate, first.asked_at)
        if wait_s is None:
            return first, await self._attempts.first_content(session, call, first)
        tasks: list[Reading] = [self._reading(session, call, first)]
        sents, won = [first], False
        try:
            await asyncio.wait(tasks, timeout=wait_s)
            second = None if tasks[0].done() else await self._second(session, call, going)
            if second is None:
                events = await tasks[0]
            else:
                _last(session, first)
                sents.append(second)
                tasks.append(self._reading(session, call, second))
                first, events = await self._decided(session, call, (first, second), tasks, going)
            won = True
            return first, events
        finally:
            await _over(tasks)
            if not won:
                self._lost(session, call, sents)

    def _lost(self, session: LiveSession, call: PreparedCall, sents: list[Sent]) -> None:
        """Nobody's content is wanted any more: the session has ended, or all have failed. The attempt that leads is
        settled with the session, if it still runs; what the other one cost is the house's."""
        for sent in sents:
            beside = sent.attempt is not session.attempts[-1] and sent.attempt.outcome == session.ending
            if sent.attempt.outcome == "running" or beside:
                self._attempts.given_up(session, call, sent, session.ending or "abandoned")

    async def _second(self, session: LiveSession, call: PreparedCall, going: Going) -> Sent | None:
        candidate = call.plan[going.place + 1]
        try:
            # At the first one's place in the plan, where nobody waits for a place at the provider.
            return await self._sender.send(session, call, candidate, Going(going.began, going.place))
        except NotSent:
            return None  # the first goes on; the next candidate's turn comes when it fails

    async def _decided(
        self,
        session: LiveSession,
        call: PreparedCall,
        pair: tuple[Sent, Sent],
        tasks: list[Reading],
        going: Going,
    ) -> tuple[Sent, list[Event]]:
        first, second = pair
        loop = asyncio.get_running_loop()
        bound_s = self._hidden_s if call.route.hidden_reasoning else self._content_s
        due = loop.call_later(bound_s, second.exchange.abort, UpstreamTimedOut())
        session.rival = second.exchange
        failed: AttemptOver | None = None
        pending = set(tasks)  # one that was done before the second was on its way is found so at once
        try:
            while pending:
                _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for sent, task in zip(pair, tasks, strict=True):
                    if task.done() and task.exception() is None:
                        await self._won(session, call, pair, tasks, sent)
                        if sent is second:
                            _moved(going)
                        telemetry.count(HEDGES, 1, call.route.name, "first" if sent is first else "second")
                        return sent, task.result()
                    failed = _failure(task) or failed
                if tasks[0].done() and not tasks[1].done():
                    self._lead(session, call, second)
        finally:
            due.cancel()
            session.rival = None
        _moved(going)
        telemetry.count(HEDGES, 1, call.route.name, "none")
        assert failed is not None
        raise failed

    async def _won(
        self, session: LiveSession, call: PreparedCall, pair: tuple[Sent, Sent], tasks: list[Reading], winner: Sent
    ) -> None:
        """Cancel the other attempt, if it still runs, and make the winner the session's."""
        for sent, task in zip(pair, tasks, strict=True):
            if sent is winner or sent.attempt.outcome != "running":
                continue
            await _over([task])
            self._attempts.given_up(session, call, sent, "hedge_lost")
            if sent is pair[0]:
                _observed(sent, session.clock.monotonic())
        if session.exchange is not winner.exchange:
            if session.phase in (Phase.SENT, Phase.ANSWERED):
                session.advance(Phase.HELD)
            self._lead(session, call, winner)

    def _lead(self, session: LiveSession, call: PreparedCall, second: Sent) -> None:
        self._sender.lead(session, call, second)
        _last(session, second)
        session.content_due = None  # it has a bound of its own
        if second.attempt.status is not None:
            session.advance(Phase.ANSWERED)

    def _reading(self, session: LiveSession, call: PreparedCall, sent: Sent) -> Reading:
        return asyncio.get_running_loop().create_task(self._attempts.first_content(session, call, sent))


def _moved(going: Going) -> None:
    """The walk stands at the second attempt's candidate."""
    going.place += 1
    going.tries = 1


def _last(session: LiveSession, sent: Sent) -> None:
    """The last of the attempts is the one whose answer, bill and name are the session's."""
    if session.attempts[-1] is not sent.attempt:
        at = next(at for at, each in enumerate(session.attempts) if each is sent.attempt)
        session.attempts.append(session.attempts.pop(at))


def _observed(lost: Sent, now: float) -> None:
    """It took at least so long. Were only those observed that come first, a candidate that got slow would never be
    known to be, and each of its calls would be sent twice."""
    live, took = lost.candidate.live, now - lost.asked_at
    live.latency.observe(took, now)
    if live.recent is not None:
        live.recent.observe(took, now)


def _failure(task: Reading) -> AttemptOver | None:
    """The failure of a task that is done. Raises what else it ended with (the session's end)."""
    if not task.done():
        return None
    error = task.exception()
    if isinstance(error, AttemptOver):
        return error
    if error is not None:
        raise error
    return None


async def _over(tasks: list[Reading]) -> None:
    """Cancel what still runs, and wait until it has let go of its exchange."""
    running = [task for task in tasks if not task.done()]
    for task in running:
        task.cancel()
    if running:
        await asyncio.wait(running)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # looked at: what matters of it was told already
