"""The places of one provider in this worker, with somebody who waits for them: futures and one timer beside a bulkhead.

Nobody polls and no waiter has a task: what frees a place hands it on, and the timer is set for the next moment at which
a budget has refilled or somebody's patience ends.
Must not: know what a place is used for, or give one to a waiter that has left.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import msgspec
from prometheus_client import Counter, Gauge

from config import providers as config
from providers.bulkhead import Bulkhead, Limits, QueuePolicy, Refusal, Standing, Ticket, share
from proxy import telemetry

TIMER_S_MIN = 0.001
"""Event loops count in milliseconds: a shorter timer could come too early, again and again."""

IN_USE = Gauge(
    "tollgate_places_in_use", "Attempts under way at a provider with limits.", ["provider"], multiprocess_mode="livesum"
)
WAITING = Gauge(
    "tollgate_places_waiting",
    "Attempts that wait for a place at a provider.",
    ["provider"],
    multiprocess_mode="livesum",
)
PLACES = Counter(
    "tollgate_places_total", "Attempts that found no place at once, by what became of them.", ["provider", "result"]
)


class Waiting:
    """One attempt in the queue. `future` gives its ticket: HELD, EXPIRED, or ENDED when the places were closed. Where
    the future is cancelled, as a task that awaits it does, everything is given back, also a place that came just then;
    who stops waiting in any other way calls `cancel`."""

    __slots__ = ("_places", "future", "ticket")

    def __init__(self, places: Places, ticket: Ticket, future: asyncio.Future[Ticket]) -> None:
        self._places = places
        self.ticket = ticket
        self.future = future

    async def held(self) -> Ticket | None:
        """The ticket with a place, or None when none came in time. Cancelled, it gives everything back."""
        try:
            ticket = await self.future
        except asyncio.CancelledError:
            self.cancel()
            raise
        return ticket if ticket.standing is Standing.HELD else None

    def cancel(self) -> None:
        """Leave the queue, or give back the place that came; nothing after a `release`."""
        self._places.cancel(self.ticket)


class Places:
    """One provider's. All methods belong to the loop that made it."""

    def __init__(self, provider: str, bulkhead: Bulkhead, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: the seconds that routing too asks the bulkhead with."""
        self.provider = provider
        self.bulkhead = bulkhead
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[Ticket, Waiting] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._shown = -1, -1

    def try_take(self, model: str, tokens: float) -> Ticket | None:
        """A place at once, or None."""
        return self.bulkhead.try_take(model, tokens, self._clock())

    def begin_wait(self, model: str, tokens: float, patience_s: float) -> Waiting | Refusal:
        """A place in the queue, for at most `patience_s` and the queue's own bound; or why there is none."""
        now = self._clock()
        ticket = self.bulkhead.wait(model, tokens, now, patience_s)
        if isinstance(ticket, Refusal):
            telemetry.count(PLACES, 1, self.provider, ticket.reason)
            return ticket
        waiting = self._waiting[ticket] = Waiting(self, ticket, self._loop.create_future())
        waiting.future.add_done_callback(lambda future: waiting.cancel() if future.cancelled() else None)
        self._wake(now)
        return waiting

    def release(self, ticket: Ticket, tokens: float | None = None) -> None:
        """The attempt ended, having used so many tokens where that is known. Again: nothing."""
        now = self._clock()
        self.bulkhead.release(ticket, now, tokens)
        if self._waiting:
            self._wake(now)

    def cancel(self, ticket: Ticket) -> None:
        """The place, or the place in the queue, was not used: it and what was taken from the budgets is given back."""
        now = self._clock()
        waiting = self._waiting.pop(ticket, None)
        self.bulkhead.cancel(ticket, now)
        if waiting is not None and not waiting.future.done():
            waiting.future.cancel()
        if self._waiting or waiting is not None:
            self._wake(now)

    def publish(self) -> None:
        """Bring the figures into the metrics, where they changed. For a tick, not for a call."""
        in_use, waiting = self._shown
        figures = self.bulkhead.under_way, self.bulkhead.waiting
        if figures[0] != in_use:
            IN_USE.labels(self.provider).set(figures[0])
        if figures[1] != waiting:
            WAITING.labels(self.provider).set(figures[1])
        self._shown = figures

    async def aclose(self) -> None:
        """Nobody waits any longer: each waiter's ticket is ENDED."""
        now = self._clock()
        left, self._waiting = self._waiting, {}
        for ticket, waiting in left.items():
            self.bulkhead.cancel(ticket, now)
            if not waiting.future.done():
                waiting.future.set_result(ticket)
        self._disarm()
        self.publish()

    def _wake(self, now: float) -> None:
        """Hand on what is free, and set the timer."""
        while self._hand_on(now):
            pass
        self._arm(now)

    def _hand_on(self, now: float) -> bool:
        """Whether a place came for somebody whose future was cancelled in this turn of the loop: it is free again."""
        again = False
        for ticket in self.bulkhead.wake(now):
            waiting = self._waiting.pop(ticket)
            if waiting.future.done():
                self.bulkhead.cancel(ticket, now)
                again = True
                continue
            held = ticket.standing is Standing.HELD
            telemetry.count(PLACES, 1, self.provider, "waited" if held else "expired")
            waiting.future.set_result(ticket)
        return again

    def _arm(self, now: float) -> None:
        """One timer, for the soonest moment; one that comes too early looks again, and is set anew then."""
        at = self.bulkhead.next_at(now)
        if at is None:
            self._disarm()
        elif self._timer is None or at < self._timer_at:
            self._disarm()
            self._timer_at = at
            self._timer = self._loop.call_later(max(at - now, TIMER_S_MIN), self._due)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _due(self) -> None:
        self._timer = None
        self._wake(self._clock())


def build_places(provider_name: str, provider: config.Provider, workers: int, index: int) -> Places | None:
    """One worker's part of a provider's places, in a running loop; None where the provider has no limits."""
    if not provider.bounded:
        return None

    def part(limits: config.Limits) -> Limits:
        return share(msgspec.convert(msgspec.structs.asdict(limits), Limits), workers, index)

    models = {name: part(limits) for name, limits in provider.models.items()}
    queue = QueuePolicy(provider.queue.length_max, provider.queue.wait_ms / 1000)
    return Places(provider_name, Bulkhead(part(provider.limits), models, queue))
