"""A circuit breaker per candidate: no calls to what fails, a few probes after a while, word of it to other gateways.

Pure. Must not: read a clock (`now` is monotonic seconds), draw numbers itself, do I/O or know what a candidate is.
The pattern is Nygard's (Release It!, 2007); `MOVES` is its whole state machine. How the states of several gateways
become one is told in `breaker_record`.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, IntEnum

import msgspec

from providers.breaker_record import ERA_MAX, STRIKES_MAX, Reason, Record, decode, encode

BUCKETS = 10
"""Parts of the sliding window; what is older than the window leaves a tenth of it at a time."""


class State(IntEnum):
    """CLOSED lets everything through, OPEN nothing, HALF_OPEN a bounded number of probes."""

    CLOSED = 0
    OPEN = 1
    HALF_OPEN = 2


class Step(Enum):
    """What moves a breaker."""

    TRIP = "trip"
    """Too many failures, a failed probe, a `Retry-After`, or our key was refused."""
    RIPEN = "ripen"
    """The open time is over."""
    RESUME = "resume"
    """A pause that the provider asked for is over."""
    HEAL = "heal"
    """Enough probes succeeded, or another gateway's did."""


MOVES: dict[tuple[State, Step], State] = {
    (State.CLOSED, Step.TRIP): State.OPEN,
    (State.OPEN, Step.TRIP): State.OPEN,  # for longer, or what another gateway knows better
    (State.HALF_OPEN, Step.TRIP): State.OPEN,
    (State.OPEN, Step.RIPEN): State.HALF_OPEN,
    (State.OPEN, Step.RESUME): State.CLOSED,  # it said when; one probe at a time would only hold up who waited
    (State.HALF_OPEN, Step.HEAL): State.CLOSED,
    (State.OPEN, Step.HEAL): State.CLOSED,  # only another gateway's word: here nothing passes that could succeed
}
"""Every move there is. CLOSED has nothing to ripen, resume or heal; HALF_OPEN has ripened already."""


class BreakerPolicy(msgspec.Struct, frozen=True):
    """When a breaker opens, and for how long. It opens at `consecutive_max` failures in a row, or when at least
    `error_rate` of at least `calls_min` calls within `window_s` failed. The n-th opening in a row lasts
    `open_s` x 2^(n-1), at most `open_s_max`, and up to `jitter` of that longer; openings count as in a row until it
    has been closed for `forget_s`. A probe that says nothing for `probe_s` no longer takes a place. A refused key or a
    `Retry-After` whose time is 0 here is a failure like any other."""

    consecutive_max: int = 5
    error_rate: float = 0.5
    calls_min: int = 20
    window_s: float = 30.0
    open_s: float = 5.0
    open_s_max: float = 300.0
    jitter: float = 0.2
    forget_s: float = 600.0
    probes_max: int = 1
    probes_to_close: int = 1
    probe_s: float = 150.0
    key_refused_s: float = 900.0
    retry_after_s_max: float = 300.0

    def longest_s(self) -> float:
        """No opening lasts longer than this, whoever says so."""
        return max(self.open_s_max, self.key_refused_s, self.retry_after_s_max) * (1 + self.jitter)


class Permit(msgspec.Struct):
    """Leave to make one call; to be handed back once, with its outcome. `term` counts a breaker's states: the outcome
    of a call that began in an earlier one says nothing about this one."""

    term: int
    probe_at: float | None = None


class Change(msgspec.Struct, frozen=True):
    """A breaker opened, stays open for longer, or closed: to be logged, counted, and `record()` shared. `alert`: our
    key was refused, which no waiting will heal. `heard`: another gateway said so (nothing to share)."""

    state: State
    reason: Reason
    open_s: float = 0.0
    alert: bool = False
    heard: bool = False


class Breaker:
    """One candidate's breaker. Memory is bounded: a window of counters and at most `probes_max` probes."""

    __slots__ = (
        "_draw",
        "_permit",
        "_probes",
        "_proved",
        "_record",
        "_row",
        "_until",
        "_window",
        "policy",
        "state",
        "wall_offset_s",
    )

    def __init__(self, policy: BreakerPolicy, draw: Callable[[], float], wall_offset_s: float = 0.0) -> None:
        """`draw` gives random numbers of [0, 1). `wall_offset_s` added to `now` is the time since 1970."""
        self.policy = policy
        self.state = State.CLOSED
        self.wall_offset_s = wall_offset_s
        self._draw = draw
        self._permit = Permit(0)
        self._until = 0.0
        self._row = 0
        self._window = Window(policy.window_s)
        self._probes: list[Permit] = []
        self._proved = 0
        self._record = Record()

    def blocked_s(self, now: float) -> float:
        """0 when a call may pass now; else the seconds until one might. Changes nothing."""
        if self.state is State.CLOSED:
            return 0.0
        if self.state is State.OPEN:
            return max(0.0, self._until - now)
        if len(self._probes) < self.policy.probes_max:
            return 0.0
        lost_s = min(probe.probe_at or 0.0 for probe in self._probes) + self.policy.probe_s - now
        return min(max(0.0, lost_s), self.policy.open_s)  # a probe is rarely lost: its outcome comes sooner

    def try_pass(self, now: float) -> Permit | None:
        """Leave for one call, or None. In HALF_OPEN the leave is a probe's."""
        if self.state is State.CLOSED:
            return self._permit
        if self.blocked_s(now) > 0:
            return None
        if self.state is State.OPEN:
            if self._record.reason is Reason.RETRY_AFTER:
                self._move(Step.RESUME)
                return self._permit
            self._move(Step.RIPEN)
        lost = now - self.policy.probe_s
        self._probes = [probe for probe in self._probes if (probe.probe_at or 0.0) > lost]
        probe = Permit(self._permit.term, now)
        self._probes.append(probe)
        return probe

    def succeeded(self, permit: Permit, now: float) -> Change | None:
        """The candidate answered (also when it answered that the caller is at fault)."""
        if permit.term != self._permit.term:
            return None
        if self.state is State.CLOSED:
            self._row = 0
            self._window.add(now, failed=False)
            return None
        if not self._hand_back(permit):
            return None
        self._proved += 1
        return self._heal(now) if self._proved >= self.policy.probes_to_close else None

    def failed(
        self, permit: Permit, now: float, *, retry_after_s: float | None = None, key_refused: bool = False
    ) -> Change | None:
        """The call failed by the candidate's fault. A `Retry-After` opens at once and until then: a pause after which
        everything passes again, unless it was already in doubt."""
        if permit.term != self._permit.term:
            return self._failed_late(now, retry_after_s, key_refused)
        probing = self.state is State.HALF_OPEN
        if probing and not self._hand_back(permit):
            return None
        if key_refused and self.policy.key_refused_s:
            return self._trip(now, Reason.KEY_REFUSED, self.policy.key_refused_s)
        told_s = None if not retry_after_s else min(retry_after_s, self.policy.retry_after_s_max) or None
        if probing or told_s is not None:
            return self._trip(now, Reason.PROBE if probing else Reason.RETRY_AFTER, told_s)
        self._row += 1
        self._window.add(now, failed=True)
        if self._row >= self.policy.consecutive_max:
            return self._trip(now, Reason.CONSECUTIVE, None)
        if self._window.too_many(self.policy):
            return self._trip(now, Reason.ERROR_RATE, None)
        return None

    def abandoned(self, permit: Permit) -> None:
        """The call ended without saying anything about the candidate (the client left, or it was never sent)."""
        self._hand_back(permit)

    def record(self) -> bytes:
        """The last opening or closing that is known here, to be shared (`breaker_record.merge`)."""
        return encode(self._record)

    def adopt(self, data: bytes, now: float) -> Change | None:
        """Take over another gateway's record where it is greater than ours. Its time is cut to the longest that our
        policy knows (a clock may be wrong), and gateways probe one after another rather than all at once."""
        heard = decode(data)
        if heard is None or heard <= self._record or heard.era >= ERA_MAX:
            return None
        left_s = min(heard.until_ms / 1000 - (now + self.wall_offset_s), self.policy.longest_s())
        self._record = heard
        if not heard.open:
            if self.state is State.CLOSED:
                return None
            self._move(Step.HEAL)
            return Change(State.CLOSED, Reason.NONE, heard=True)
        left_s = max(0.0, left_s)
        if heard.reason is not Reason.RETRY_AFTER:
            left_s += self._draw() * self.policy.jitter * self.policy.open_s
        self._until = now + left_s
        self._move(Step.TRIP)
        return Change(State.OPEN, heard.reason, left_s, heard=True)

    def _failed_late(self, now: float, retry_after_s: float | None, key_refused: bool) -> Change | None:
        """A call from an earlier term failed. It is no further strike; while open it may ask for more time, and of many
        calls with a refused key one alerts."""
        if self.state is not State.OPEN:
            return None
        if key_refused and self._record.reason is not Reason.KEY_REFUSED:
            return self._trip(now, Reason.KEY_REFUSED, self.policy.key_refused_s)
        if retry_after_s is not None and now + retry_after_s > self._until:
            return self._trip(now, self._record.reason, min(retry_after_s, self.policy.retry_after_s_max))
        return None

    def _trip(self, now: float, reason: Reason, told_s: float | None) -> Change | None:
        """Open, for `told_s` or by backoff. While open: for longer, in the same era."""
        policy, before = self.policy, self._record
        extends = self.state is State.OPEN
        known = extends and before.reason is Reason.KEY_REFUSED
        strikes = before.strikes
        if told_s is None:
            strikes = 1 if self._forgotten(now) else min(strikes + 1, STRIKES_MAX)
            told_s = min(policy.open_s * 2.0 ** (strikes - 1), policy.open_s_max)
        jitter = 0.0 if reason is Reason.RETRY_AFTER else policy.jitter  # who waits for that time shall not come early
        until = now + told_s * (1 + jitter * self._draw())
        if extends and until <= self._until:
            return None
        self._until = until
        self._record = Record(
            era=before.era if extends else min(before.era + 1, ERA_MAX),
            open=True,
            until_ms=self._wall_ms(until),
            strikes=strikes,
            reason=reason,
            at_ms=self._wall_ms(now),
        )
        self._move(Step.TRIP)
        return Change(State.OPEN, reason, until - now, alert=reason is Reason.KEY_REFUSED and not known)

    def _heal(self, now: float) -> Change:
        before = self._record
        self._record = Record(min(before.era + 1, ERA_MAX), strikes=before.strikes, at_ms=self._wall_ms(now))
        self._move(Step.HEAL)
        return Change(State.CLOSED, Reason.NONE)

    def _forgotten(self, now: float) -> bool:
        """Whether it was closed for so long that its openings no longer count."""
        last = self._record
        if last.open and last.reason is not Reason.RETRY_AFTER:
            return False
        return self._wall_ms(now) - (last.until_ms if last.open else last.at_ms) >= self.policy.forget_s * 1000

    def _move(self, step: Step) -> None:
        self.state = MOVES[self.state, step]
        self._permit = Permit(self._permit.term + 1)
        self._row = self._proved = 0
        self._probes = []
        if self.state is State.CLOSED:
            self._window = Window(self.policy.window_s)

    def _hand_back(self, permit: Permit) -> bool:
        """Whether it was a probe of this term whose outcome was not told yet."""
        for place, probe in enumerate(self._probes):
            if probe is permit:
                del self._probes[place]
                return True
        return False

    def _wall_ms(self, now: float) -> int:
        return int((now + self.wall_offset_s) * 1000)


class Window:
    """Calls and failures of the last `window_s` seconds, in a ring of `BUCKETS`."""

    __slots__ = ("_calls", "_failures", "_slot", "_slot_s", "calls", "failures")

    def __init__(self, window_s: float) -> None:
        self._slot_s = window_s / BUCKETS
        self._slot: int | None = None
        self._calls = [0] * BUCKETS
        self._failures = [0] * BUCKETS
        self.calls = self.failures = 0

    def add(self, now: float, *, failed: bool) -> None:
        """Count one call."""
        slot = int(now // self._slot_s)
        if slot != self._slot:
            self._advance(slot)
        place = slot % BUCKETS
        self._calls[place] += 1
        self.calls += 1
        if failed:
            self._failures[place] += 1
            self.failures += 1

    def too_many(self, policy: BreakerPolicy) -> bool:
        """Whether the share of failures is too high, of enough calls."""
        return self.calls >= policy.calls_min and self.failures >= policy.error_rate * self.calls

    def _advance(self, slot: int) -> None:
        """Empty the buckets between the last slot and this one. A clock that went back empties them all."""
        last = self._slot
        self._slot = slot
        passed = BUCKETS if last is None or slot < last else min(slot - last, BUCKETS)
        for step in range(passed):
            place = (slot - step) % BUCKETS
            self.calls -= self._calls[place]
            self.failures -= self._failures[place]
            self._calls[place] = self._failures[place] = 0
