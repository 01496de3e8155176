"""How long a candidate takes to its first content: a peak EWMA for choosing, recent quantiles for hedging. Pure.

Must not: read a clock (`now` is any monotonic time in seconds), wait, or know what a candidate is.

Peak EWMA is Finagle's (com.twitter.finagle.loadbalancer.PeakEwma): an observation above the average becomes the average
at once, one below it counts with the weight 1 - w of the time since the last observation, w = exp(-dt / tau).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from math import ceil, isfinite

UNKNOWN_S = 1e9
"""What a candidate without any observation costs while its first attempt is under way (Finagle's penalty)."""


class PeakEwma:
    """One candidate's latency: quick to see that it got slow, slow to believe that it got fast.

    Unlike Finagle's, reading changes nothing (there each read takes weight from the next observation), and the decay of
    an idle candidate lets one attempt look again: while that one is under way, its last known latency counts.
    """

    __slots__ = ("_half_life_s", "_seen_at", "_value_s")

    def __init__(self, half_life_s: float) -> None:
        """`half_life_s`: how long until half of what is known is forgotten (tau x ln 2). Raises ValueError."""
        if not half_life_s > 0:
            raise ValueError("a half-life is above 0 seconds")
        self._half_life_s = half_life_s
        self._value_s: float | None = None
        self._seen_at = 0.0

    def observe(self, seconds: float, now: float) -> None:
        """An attempt took `seconds` to its first content, or had shown none after `seconds` (a time limit). Failures
        that came quickly are not observed: they would make a broken candidate look fast."""
        if not (isfinite(seconds) and seconds >= 0):
            return
        known = self._value_s
        if known is None or seconds > known:
            self._value_s = seconds
        else:
            weight = self._weight(now)
            self._value_s = known * weight + seconds * (1 - weight)
        self._seen_at = max(now, self._seen_at) if known is not None else now

    def value_s(self, now: float) -> float | None:
        """The average as far as it is still believed: it decays towards 0 while nothing is observed. None: unknown."""
        known = self._value_s
        return None if known is None else known * self._weight(now)

    def load(self, now: float, waiting: int) -> float:
        """What one more attempt would meet: seconds x (attempts that wait for their first content + 1). Lower is
        better; an unknown candidate is tried first, by one attempt at a time."""
        known = self._value_s
        if known is None:
            return UNKNOWN_S + waiting if waiting else 0.0
        return known * (waiting + 1) if waiting else known * self._weight(now)

    def _weight(self, now: float) -> float:
        idle_s = now - self._seen_at
        return 0.5 ** (idle_s / self._half_life_s) if idle_s > 0 else 1.0


class RecentQuantiles:
    """Exact quantiles of a candidate's most recent observations: at most `size` of them, none older than `age_s_max`.

    A bounded window rather than the P2 estimator (Jain & Chlamtac 1985): P2 keeps five numbers but never forgets, and a
    hedge must follow a candidate whose latency changes.
    """

    __slots__ = ("_age_s_max", "_recent", "_size", "_sorted")

    def __init__(self, size: int = 256, age_s_max: float = 900.0) -> None:
        """Raises ValueError for bounds that hold nothing."""
        if size < 1 or not age_s_max > 0:
            raise ValueError("a window holds at least one observation for some time")
        self._size = size
        self._age_s_max = age_s_max
        self._recent: deque[tuple[float, float]] = deque()
        self._sorted: list[float] = []

    def __len__(self) -> int:
        return len(self._sorted)

    def observe(self, seconds: float, now: float) -> None:
        """Add an observation; the oldest leaves where the window is full."""
        if not (isfinite(seconds) and seconds >= 0):
            return
        self._forget(now)
        if len(self._recent) == self._size:
            self._drop_oldest()
        self._recent.append((now, seconds))
        insort(self._sorted, seconds)

    def quantile_s(self, share: float, now: float, *, least: int = 20) -> float | None:
        """The smallest observation that at least `share` (0-1) of them do not exceed (nearest rank). None below `least`
        observations: a hedge by chance costs money."""
        self._forget(now)
        count = len(self._sorted)
        if count < max(1, least):
            return None
        rank = ceil(min(max(share, 0.0), 1.0) * count)
        return self._sorted[max(rank, 1) - 1]

    def _forget(self, now: float) -> None:
        oldest = now - self._age_s_max
        while self._recent and self._recent[0][0] < oldest:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        _, seconds = self._recent.popleft()
        del self._sorted[bisect_left(self._sorted, seconds)]
