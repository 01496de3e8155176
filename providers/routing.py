"""Which candidates of a route may answer a call, and in which order they are tried. Pure.

Must not: read a clock, draw numbers, take places or permits, or know a codec: all facts are handed in.

`order` removes what cannot or may not answer (each with a reason, see `removals`), orders the rest by the route's
strategy, moves a sticky candidate and the account's preferred providers to the front, and those without a free place in
their bulkhead to the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from math import inf, log
from typing import Literal

import msgspec

from providers.breaker import Breaker, State
from providers.bulkhead import Bulkhead
from providers.latency import PeakEwma, RecentQuantiles

Strategy = Literal["ordered", "weighted", "least_latency", "cheapest", "least_busy"]
NOTHING: frozenset[str] = frozenset()


class Target(msgspec.Struct, frozen=True):
    """A candidate as routing sees it. `context_tokens` and `features` ("image", "audio", "file", "video", "tools",
    "json_schema" ...) are None where unknown: then everything is let through. `tags` say how the provider treats data;
    `sticky` that it profits from seeing the same prompt again."""

    provider: str
    model: str
    weight: float = 1.0
    context_tokens: int | None = None
    features: frozenset[str] | None = None
    tags: frozenset[str] = NOTHING
    sticky: bool = False

    @property
    def name(self) -> str:
        """`provider/model`, as configuration and preferences write it."""
        return f"{self.provider}/{self.model}"


class Live(msgspec.Struct):
    """What a process knows about a candidate now; one object for its lifetime. `waiting` are attempts that have shown
    no content yet, `in_flight` all attempts; until `missing_until` the provider is believed not to have the model,
    `missing_s` seconds after it said so.
    `latency` is that of streams to their first content, `whole_latency` of whole answers to their end; `recent` are the
    former of late, where a route hedges."""

    breaker: Breaker
    latency: PeakEwma
    whole_latency: PeakEwma
    recent: RecentQuantiles | None = None
    bulkhead: Bulkhead | None = None
    in_flight: int = 0
    waiting: int = 0
    missing_until: float = 0.0
    missing_s: float = 60.0


class Needs(msgspec.Struct, frozen=True):
    """What a call asks of a candidate. `tokens`: the least that prompt and asked output can be (an estimate that is too
    high removes candidates wrongly); `budget_tokens`: what rate budgets are asked for."""

    tokens: int = 0
    budget_tokens: int = 0
    features: frozenset[str] = NOTHING


class Preferences(msgspec.Struct, frozen=True):
    """What an account, or a request within what its key allows, says about providers (`provider` or `provider/model`).
    `allowed` None is all; a candidate must carry all `tags`; `preferred` come first, in this order."""

    allowed: frozenset[str] | None = None
    excluded: frozenset[str] = NOTHING
    preferred: tuple[str, ...] = ()
    tags: frozenset[str] = NOTHING

    def narrowed(self, hint: Preferences) -> Preferences:
        """These with a request's hint: a hint never widens what the account allows; its order goes first."""
        allowed = hint.allowed if self.allowed is None else self.allowed
        if self.allowed is not None and hint.allowed is not None:
            allowed = frozenset(
                name
                for name in self.allowed | hint.allowed
                if _within(name, self.allowed) and _within(name, hint.allowed)
            )
        return Preferences(
            allowed, self.excluded | hint.excluded, (*hint.preferred, *self.preferred), self.tags | hint.tags
        )


class Facts(msgspec.Struct):
    """All that an order depends on. `live` is parallel to the candidates, as is `costs` (the caller's estimate for this
    call in micros; None where unknown). `draw`: a random number of [0, 1). `whole`: the call is answered whole."""

    now: float
    live: Sequence[Live]
    needs: Needs | None = None
    preferences: Preferences | None = None
    draw: float = 0.0
    costs: Sequence[int | None] = ()
    sticky_key: bytes | None = None
    whole: bool = False


Reason = Literal[
    "breaker_open", "bulkhead_full", "model_missing", "context_length", "feature", "preference", "data_policy"
]


class Removal(msgspec.Struct, frozen=True):
    """Why a candidate is not tried: for logs and, where none is left, for the caller (see `verdict`). `detail` names
    features, tags or the limit; `retry_after_s` when it may be back."""

    reason: Reason
    detail: str = ""
    retry_after_s: float | None = None


RANK: tuple[Reason, ...] = (
    "bulkhead_full",
    "breaker_open",
    "model_missing",
    "context_length",
    "feature",
    "data_policy",
    "preference",
)
"""Which reason tells the caller most where none is left: what passes by waiting, then what it can change itself."""


def order(candidates: Sequence[Target], strategy: Strategy, facts: Facts) -> list[int]:
    """Indices of the candidates to try, best first; empty where all are removed."""
    left = _passing(candidates, facts)
    if len(left) > 1:
        if strategy != "ordered":
            left = _STRATEGIES[strategy](left, candidates, facts)
        if facts.preferences is not None and facts.preferences.preferred:
            left = _preferred_first(left, candidates, facts.preferences.preferred)
        if any(facts.live[index].bulkhead is not None for index in left):
            left.sort(key=lambda index: _queues(candidates[index], facts.live[index], facts))
    return left


def removals(candidates: Sequence[Target], facts: Facts) -> list[Removal | None]:
    """For each candidate why `order` leaves it out, or None."""
    return [removal(target, live, facts) for target, live in zip(candidates, facts.live, strict=True)]


def verdict(removed: Sequence[Removal | None]) -> Removal | None:
    """The one reason to tell where no candidate is left: the most hopeful, by the shortest wait. None: one is left."""
    known = [each for each in removed if each is not None]
    if not known or len(known) < len(removed):
        return None
    return min(
        known, key=lambda each: (RANK.index(each.reason), inf if each.retry_after_s is None else each.retry_after_s)
    )


def removal(target: Target, live: Live, facts: Facts) -> Removal | None:
    """Why this candidate is not tried. What the account or the request rules out is said before what is down."""
    preferences, needs, now = facts.preferences, facts.needs, facts.now
    if preferences is not None and (refused := _refused(target, preferences)) is not None:
        return refused
    if needs is not None:
        if target.context_tokens is not None and needs.tokens > target.context_tokens:
            return Removal("context_length", f"{needs.tokens} tokens, at most {target.context_tokens}")
        if target.features is not None and (lacks := needs.features - target.features):
            return Removal("feature", ", ".join(sorted(lacks)))
    if now < live.missing_until:
        return Removal("model_missing", target.name, live.missing_until - now)
    if (blocked_s := live.breaker.blocked_s(now)) > 0:
        return Removal("breaker_open", target.name, blocked_s)
    if live.bulkhead is not None and _room(target, live.bulkhead, facts) == "full":
        return Removal("bulkhead_full", target.name)
    return None


def _passing(candidates: Sequence[Target], facts: Facts) -> list[int]:
    """Indices without a removal. Where nothing is asked and nothing is wrong, nothing is looked at twice."""
    if facts.needs is None and facts.preferences is None:
        now = facts.now
        for live in facts.live:
            if live.breaker.state is not State.CLOSED or now < live.missing_until or live.bulkhead is not None:
                break
        else:
            return list(range(len(candidates)))
    return [index for index, target in enumerate(candidates) if removal(target, facts.live[index], facts) is None]


def _refused(target: Target, preferences: Preferences) -> Removal | None:
    names = {target.provider, target.name}
    if preferences.excluded & names:
        return Removal("preference", f"{target.name} is excluded")
    if preferences.allowed is not None and not preferences.allowed & names:
        return Removal("preference", f"{target.name} is not allowed")
    if lacks := preferences.tags - target.tags:
        return Removal("data_policy", ", ".join(sorted(lacks)))
    return None


def _within(name: str, allowed: frozenset[str]) -> bool:
    """Whether a provider, or a provider/model, is in a list of both."""
    return name in allowed or name.partition("/")[0] in allowed


def _room(target: Target, bulkhead: Bulkhead, facts: Facts) -> str:
    return bulkhead.room(target.model, facts.needs.budget_tokens if facts.needs is not None else 0, facts.now)


def _queues(target: Target, live: Live, facts: Facts) -> bool:
    """A place now beats a place in a queue."""
    return live.bulkhead is not None and _room(target, live.bulkhead, facts) != "free"


def _preferred_first(left: list[int], candidates: Sequence[Target], preferred: tuple[str, ...]) -> list[int]:
    def place(index: int) -> int:
        names = (candidates[index].provider, candidates[index].name)
        return min((rank for rank, name in enumerate(preferred) if name in names), default=len(preferred))

    return sorted(left, key=place)


def _weighted(left: list[int], candidates: Sequence[Target], facts: Facts) -> list[int]:
    return _sticky_first(shuffled(left, [candidates[index].weight for index in left], facts.draw), candidates, facts)


def _least_latency(left: list[int], candidates: Sequence[Target], facts: Facts) -> list[int]:
    now = facts.now

    def load(index: int) -> float:
        live = facts.live[index]
        return (live.whole_latency if facts.whole else live.latency).load(now, live.waiting)

    best = sorted(left, key=load)
    return _sticky_first(best, candidates, facts)


def _least_busy(left: list[int], candidates: Sequence[Target], facts: Facts) -> list[int]:
    """By attempts under way per weight."""

    def load(index: int) -> float:
        weight = candidates[index].weight
        return (facts.live[index].in_flight + 1) / weight if weight > 0 else inf

    return _sticky_first(sorted(left, key=load), candidates, facts)


def _cheapest(left: list[int], candidates: Sequence[Target], facts: Facts) -> list[int]:
    """Unknown costs last. Sticky decides only between equal costs."""

    def micros(index: int) -> float:
        known = facts.costs[index] if index < len(facts.costs) else None
        return inf if known is None else known

    return sorted(_sticky_first(left, candidates, facts), key=micros)


_STRATEGIES = {
    "weighted": _weighted,
    "least_latency": _least_latency,
    "cheapest": _cheapest,
    "least_busy": _least_busy,
}


def shuffled(items: list[int], weights: list[float], draw: float) -> list[int]:
    """A weighted order without repetition, from one number of [0, 1): each next item is drawn with the chance that its
    weight has of the rest's, and what is left of the number draws on. Items without weight come last, as they stand."""
    left = [(item, weight) for item, weight in zip(items, weights, strict=True) if weight > 0]
    chosen: list[int] = []
    while len(left) > 1:
        point = draw * sum(weight for _, weight in left)
        place = 0
        while place < len(left) - 1 and point >= left[place][1]:
            point -= left[place][1]
            place += 1
        item, weight = left.pop(place)
        chosen.append(item)
        draw = min(max(point / weight, 0.0), 1 - 2**-53)
    chosen.extend(item for item, _ in left)
    return chosen + [item for item, weight in zip(items, weights, strict=True) if not weight > 0]


def _sticky_first(left: list[int], candidates: Sequence[Target], facts: Facts) -> list[int]:
    """Candidates that profit from a prompt seen before first, by their score for the call's key; the rest as it is."""
    key = facts.sticky_key
    if key is None:
        return left
    profit = [index for index in left if candidates[index].sticky]
    if not profit:
        return left
    profit.sort(key=lambda index: rendezvous(key, candidates[index]), reverse=True)
    return profit + [index for index in left if not candidates[index].sticky]


def rendezvous(key: bytes, target: Target) -> float:
    """A candidate's score for a key; the highest wins (Thaler & Ravishankar 1998, highest random weight): when a
    candidate leaves, only its own keys move, and they spread over the others. Weights by the logarithmic method
    (Schindelhauer & Schomaker 2005): -weight / ln(hash of (0, 1))."""
    digest = blake2b(key, digest_size=8, key=blake2b(target.name.encode(), digest_size=32).digest()).digest()
    share = (int.from_bytes(digest, "big") + 0.5) / 2**64
    return -target.weight / log(share) if 0 < share < 1 else (inf if share >= 1 else 0.0)
