"""How much may be under way at a provider: concurrency per provider and model, rate budgets, and a bounded queue. Pure.

Must not: wait, read a clock (`now` is monotonic seconds), make futures or know what is sent. The wiring keeps a future
beside each waiting ticket and calls `wake` after every `release`, `cancel` and `wait`, and at `next_at`.

Fairness: first come, first served. A waiter whose model is full lets those of other models pass; nobody passes one that
waits for the provider itself, so that a large request is not starved by small ones. The limits are one process's
(`share` splits a gateway's).
"""

from __future__ import annotations

from collections import deque
from enum import Enum
from math import inf
from typing import Literal

import msgspec

MINUTE_S = 60.0
ROUNDING = 1e-6
"""Share of a bucket that may be missing: a wait of exactly `wait_s` must suffice in floating point too."""


class Limits(msgspec.Struct, frozen=True):
    """Bounds of a provider or of one of its models; None is no bound."""

    concurrent: int | None = None
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None


class QueuePolicy(msgspec.Struct, frozen=True):
    """How many may wait at a provider, and for how long."""

    length_max: int = 100
    wait_s_max: float = 5.0


Limit = Literal["concurrent", "requests", "tokens"]
Room = Literal["free", "queue", "full"]


class Refusal(msgspec.Struct, frozen=True):
    """No place, now or in time. `limit` is what stands in the way, `retry_after_s` when to try again (an estimate)."""

    reason: Literal["queue_full", "too_long"]
    limit: Limit
    retry_after_s: float


class Standing(Enum):
    """A ticket's state; it leaves WAITING once."""

    WAITING = "waiting"
    HELD = "held"
    EXPIRED = "expired"
    ENDED = "ended"


class Ticket(msgspec.Struct, eq=False):
    """A place in a bulkhead, or in its queue until `deadline`. `tokens` is the estimate taken from the budgets."""

    model: str
    tokens: float
    deadline: float
    standing: Standing = Standing.WAITING


class TokenBucket:
    """A budget per minute that refills steadily and holds at most one minute's worth.

    A need beyond the whole bucket is met by a full one and leaves a debt, so that every request passes at some time.
    """

    __slots__ = ("_at", "_level", "most", "per_s")

    def __init__(self, per_minute: float) -> None:
        """Raises ValueError for a budget that never refills."""
        if not per_minute > 0:
            raise ValueError("a budget per minute is above 0")
        self.most = per_minute
        self.per_s = per_minute / MINUTE_S
        self._level = per_minute
        self._at = -inf

    def level(self, now: float) -> float:
        """What is left; below 0 after a debt."""
        if now > self._at:
            if self._at != -inf:
                self._level = min(self.most, self._level + (now - self._at) * self.per_s)
            self._at = now
        return self._level

    def wait_s(self, need: float, now: float) -> float:
        """Seconds until `need` can be taken."""
        missing = min(need, self.most) - self.level(now)
        return missing / self.per_s if missing > self.most * ROUNDING else 0.0

    def wait_behind_s(self, ahead: float, need: float, now: float) -> float:
        """The same after others took `ahead`."""
        return (ahead + min(need, self.most) - self.level(now)) / self.per_s

    def take(self, amount: float, now: float) -> None:
        """Take what `wait_s` said is there; a negative amount gives back."""
        self._level = min(self.most, self.level(now) - amount)


class _Compartment:
    """One set of limits and what is under way in it."""

    __slots__ = ("concurrent", "requests", "tokens", "under_way")

    def __init__(self, limits: Limits) -> None:
        self.concurrent = inf if limits.concurrent is None else limits.concurrent
        self.requests = None if limits.requests_per_minute is None else TokenBucket(limits.requests_per_minute)
        self.tokens = None if limits.tokens_per_minute is None else TokenBucket(limits.tokens_per_minute)
        self.under_way = 0

    def obstacle(self, tokens: float, now: float) -> tuple[Limit, float] | None:
        """The limit in the way and the seconds until it may be gone (0 for concurrency: nobody knows)."""
        if self.under_way >= self.concurrent:
            return "concurrent", 0.0
        if self.requests is not None and (wait_s := self.requests.wait_s(1.0, now)) > 0:
            return "requests", wait_s
        if self.tokens is not None and (wait_s := self.tokens.wait_s(tokens, now)) > 0:
            return "tokens", wait_s
        return None

    def refill_s(self, ahead: int, tokens_ahead: float, tokens: float, now: float) -> tuple[Limit, float]:
        """The slower budget and its seconds for a newcomer behind `ahead` others: no wait is shorter."""
        waits: list[tuple[Limit, float]] = [("concurrent", 0.0)]
        if self.requests is not None:
            waits.append(("requests", self.requests.wait_behind_s(ahead, 1.0, now)))
        if self.tokens is not None:
            waits.append(("tokens", self.tokens.wait_behind_s(tokens_ahead, tokens, now)))
        return max(waits, key=_second)

    def take(self, tokens: float, now: float) -> None:
        self.under_way += 1
        if self.requests is not None:
            self.requests.take(1.0, now)
        if self.tokens is not None:
            self.tokens.take(tokens, now)

    def leave(self, tokens_more: float, requests_back: float, now: float) -> None:
        self.under_way -= 1
        if self.requests is not None and requests_back:
            self.requests.take(-requests_back, now)
        if self.tokens is not None and tokens_more:
            self.tokens.take(tokens_more, now)


class Bulkhead:
    """One provider's places. Memory is bounded: a compartment per configured model and `length_max` waiters."""

    def __init__(
        self, provider: Limits, models: dict[str, Limits] | None = None, queue: QueuePolicy | None = None
    ) -> None:
        self._provider = _Compartment(provider)
        self._models = {name: _Compartment(limits) for name, limits in (models or {}).items()}
        self._policy = queue or QueuePolicy()
        self._queue: deque[Ticket] = deque()
        self._soonest = inf
        """No deadline in the queue is before this."""

    @property
    def under_way(self) -> int:
        """Tickets held."""
        return self._provider.under_way

    @property
    def waiting(self) -> int:
        """Tickets in the queue."""
        return len(self._queue)

    def room(self, model: str, tokens: float, now: float) -> Room:
        """What a call would meet: a place at once, a place in the queue, or neither. Takes nothing."""
        if not self._queue and self._obstacle(model, tokens, now) is None:
            return "free"
        return "queue" if len(self._queue) < self._policy.length_max else "full"

    def try_take(self, model: str, tokens: float, now: float) -> Ticket | None:
        """A place at once, or None: also where somebody waits (they came first)."""
        if self._queue or self._obstacle(model, tokens, now) is not None:
            return None
        ticket = Ticket(model, tokens, now)
        self._take(ticket, now)
        return ticket

    def wait(self, model: str, tokens: float, now: float, patience_s: float = inf) -> Ticket | Refusal:
        """A place in the queue, for at most `patience_s` and the policy's own bound; or why not: the queue is full, or
        the budgets cannot refill in time. The ticket is HELD by a later `wake`, perhaps by the next."""
        longest_s = min(patience_s, self._policy.wait_s_max)
        limit, least_s = self._least_wait(model, tokens, now)
        if len(self._queue) >= self._policy.length_max:
            return Refusal("queue_full", limit, max(least_s, 1.0))
        if least_s > longest_s:
            return Refusal("too_long", limit, least_s)
        ticket = Ticket(model, tokens, now + max(0.0, longest_s))
        self._queue.append(ticket)
        self._soonest = min(self._soonest, ticket.deadline)
        return ticket

    def wake(self, now: float) -> list[Ticket]:
        """Tickets that left the queue: HELD in the order they came, and EXPIRED ones. A place that is free at the
        deadline is still given."""
        left: list[Ticket] = []
        if not self._queue:
            return left
        kept: deque[Ticket] = deque()
        full: set[str] = set()
        queue = self._queue
        while queue:
            ticket = queue.popleft()
            if ticket.model in full or self._model_obstacle(ticket.model, ticket.tokens, now):
                full.add(ticket.model)
                kept.append(ticket)
            elif self._provider.obstacle(ticket.tokens, now):
                kept.append(ticket)
                break  # nobody passes one that waits for the provider
            else:
                self._take(ticket, now)
                left.append(ticket)
        kept.extend(queue)
        self._queue = kept
        if now >= self._soonest:
            left.extend(self._expire(now))
        return left

    def next_at(self, now: float) -> float | None:
        """When `wake` is due though nothing is released: at a deadline, or when a budget has refilled. None: never."""
        if not self._queue:
            return None
        soonest, full = self._soonest, set[str]()
        for ticket in self._queue:
            obstacle = self._model_obstacle(ticket.model, ticket.tokens, now)
            if ticket.model in full or obstacle:
                if obstacle and ticket.model not in full and obstacle[1] > 0:
                    soonest = min(soonest, now + obstacle[1])
                full.add(ticket.model)
                continue
            obstacle = self._provider.obstacle(ticket.tokens, now)
            if obstacle is None or obstacle[1] > 0:
                soonest = min(soonest, now + (obstacle[1] if obstacle else 0.0))
            break
        return soonest

    def release(self, ticket: Ticket, now: float, tokens: float | None = None) -> None:
        """A call ended; `tokens` is what it really used, where that is known: the budgets are charged the difference.
        A second release does nothing."""
        if ticket.standing is Standing.HELD:
            self._leave(ticket, 0.0 if tokens is None else tokens - ticket.tokens, 0.0, now)

    def cancel(self, ticket: Ticket, now: float) -> None:
        """The caller left, waiting or holding a place that it did not use: everything is given back."""
        if ticket.standing is Standing.WAITING:
            self._queue.remove(ticket)
            ticket.standing = Standing.ENDED
        elif ticket.standing is Standing.HELD:
            self._leave(ticket, -ticket.tokens, 1.0, now)

    def _obstacle(self, model: str, tokens: float, now: float) -> tuple[Limit, float] | None:
        return self._provider.obstacle(tokens, now) or self._model_obstacle(model, tokens, now)

    def _model_obstacle(self, model: str, tokens: float, now: float) -> tuple[Limit, float] | None:
        compartment = self._models.get(model)
        return None if compartment is None else compartment.obstacle(tokens, now)

    def _take(self, ticket: Ticket, now: float) -> None:
        ticket.standing = Standing.HELD
        self._provider.take(ticket.tokens, now)
        compartment = self._models.get(ticket.model)
        if compartment is not None:
            compartment.take(ticket.tokens, now)

    def _leave(self, ticket: Ticket, tokens_more: float, requests_back: float, now: float) -> None:
        ticket.standing = Standing.ENDED
        self._provider.leave(tokens_more, requests_back, now)
        compartment = self._models.get(ticket.model)
        if compartment is not None:
            compartment.leave(tokens_more, requests_back, now)

    def _expire(self, now: float) -> list[Ticket]:
        gone = [ticket for ticket in self._queue if ticket.deadline <= now]
        for ticket in gone:
            ticket.standing = Standing.EXPIRED
        self._queue = deque(ticket for ticket in self._queue if ticket.standing is Standing.WAITING)
        self._soonest = min((ticket.deadline for ticket in self._queue), default=inf)
        return gone

    def _least_wait(self, model: str, tokens: float, now: float) -> tuple[Limit, float]:
        """What the budgets alone make a newcomer wait behind the queue."""
        compartment = self._models.get(model)
        every = [ticket.tokens for ticket in self._queue]
        slowest = self._provider.refill_s(len(every), sum(every), tokens, now)
        if compartment is None:
            return slowest
        same = [ticket.tokens for ticket in self._queue if ticket.model == model]
        return max(slowest, compartment.refill_s(len(same), sum(same), tokens, now), key=_second)


def share(limits: Limits, workers: int, index: int) -> Limits:
    """One worker's part of a gateway's limits: concurrency split whole (never below 1), budgets evenly."""
    concurrent = limits.concurrent
    if concurrent is not None:
        concurrent = max(1, concurrent // workers + (index < concurrent % workers))
    requests, tokens = limits.requests_per_minute, limits.tokens_per_minute
    return Limits(
        concurrent,
        None if requests is None else requests / workers,
        None if tokens is None else tokens / workers,
    )


def _second(pair: tuple[Limit, float]) -> float:
    return pair[1]
