"""The circuit breaker: when it opens, for how long, and how it comes back."""

from __future__ import annotations

import sys

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from providers.breaker import BUCKETS, MOVES, Breaker, BreakerPolicy, Change, State, Step, Window
from providers.breaker_record import Reason

CLOSED, OPEN, HALF_OPEN = State.CLOSED, State.OPEN, State.HALF_OPEN
POLICY = BreakerPolicy(jitter=0.0)
WALL_S = 1_800_000_000.0


def breaker(draw: float = 0.0, wall_offset_s: float = WALL_S, **changes: float) -> Breaker:
    return Breaker(msgspec.structs.replace(POLICY, **changes), lambda: draw, wall_offset_s)


def fail(it: Breaker, now: float, *, retry_after_s: float | None = None, key_refused: bool = False) -> Change | None:
    permit = it.try_pass(now)
    assert permit is not None
    return it.failed(permit, now, retry_after_s=retry_after_s, key_refused=key_refused)


def succeed(it: Breaker, now: float) -> Change | None:
    permit = it.try_pass(now)
    assert permit is not None
    return it.succeeded(permit, now)


def trip(it: Breaker, now: float) -> Change:
    changes = [fail(it, now) for _ in range(it.policy.consecutive_max)]
    assert changes[:-1] == [None] * (len(changes) - 1)
    assert changes[-1] is not None
    return changes[-1]


def test_the_moves_are_these_and_no_others() -> None:
    assert {(now.name, step.name): then.name for (now, step), then in MOVES.items()} == {
        ("CLOSED", "TRIP"): "OPEN",
        ("OPEN", "TRIP"): "OPEN",
        ("HALF_OPEN", "TRIP"): "OPEN",
        ("OPEN", "RIPEN"): "HALF_OPEN",
        ("OPEN", "RESUME"): "CLOSED",
        ("HALF_OPEN", "HEAL"): "CLOSED",
        ("OPEN", "HEAL"): "CLOSED",
    }
    assert len(Step) == 4


def test_failures_in_a_row_open_it_and_a_success_breaks_the_row() -> None:
    it = breaker(consecutive_max=3, calls_min=1000)
    for _ in range(4):
        assert [fail(it, 0), fail(it, 0), succeed(it, 0)] == [None, None, None]
    assert trip(it, 1) == Change(OPEN, Reason.CONSECUTIVE, 5.0)
    assert it.try_pass(1) is None
    assert it.blocked_s(2) == 4.0


def test_a_share_of_failures_opens_it_only_of_enough_calls_within_the_window() -> None:
    it = breaker(consecutive_max=1000, calls_min=10, error_rate=0.5, window_s=30)
    for _ in range(4):
        assert [succeed(it, 0), fail(it, 0)] == [None, None]
    assert [fail(it, 40), succeed(it, 41)] == [None, None]
    for _ in range(3):
        assert [succeed(it, 42), fail(it, 42)] == [None, None]
    assert succeed(it, 43) is None
    assert fail(it, 43) == Change(OPEN, Reason.ERROR_RATE, 5.0)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 40), st.booleans()), max_size=80))
def test_the_window_counts_what_is_recent(rows: list[tuple[float, bool]]) -> None:
    window, now, seen = Window(30.0), 0.0, list[tuple[float, bool]]()
    for step, failed in rows:
        now += step
        window.add(now, failed=failed)
        seen.append((now // 3.0, failed))
    young = [failed for slot, failed in seen if slot > now // 3.0 - BUCKETS]
    assert (window.calls, window.failures) == (len(young), sum(young))


def test_a_clock_that_goes_back_empties_the_window() -> None:
    window = Window(30.0)
    for now in (100.0, 110.0, 50.0):
        window.add(now, failed=True)
    assert (window.calls, window.failures) == (1, 1)


def test_half_open_lets_only_so_many_probes_through() -> None:
    it = breaker(probes_max=2, probes_to_close=2)
    trip(it, 0)
    assert it.try_pass(4.999) is None
    probes = [it.try_pass(5), it.try_pass(5)]
    assert it.state is HALF_OPEN
    assert it.try_pass(5) is None
    assert it.blocked_s(5) > 0
    first, second = probes
    assert first is not None
    assert second is not None
    assert it.succeeded(first, 6) is None
    assert it.succeeded(first, 6) is None, "the same outcome told twice counts once"
    assert it.succeeded(second, 6) == Change(CLOSED, Reason.NONE)
    assert it.blocked_s(6) == 0.0


def test_a_probe_that_says_nothing_leaves_its_place() -> None:
    it = breaker(probe_s=150)
    trip(it, 0)
    lost = it.try_pass(5)
    assert lost is not None
    assert it.try_pass(154) is None
    found = it.try_pass(155)
    assert found is not None
    assert it.failed(lost, 156) is None
    it.abandoned(found)
    assert it.blocked_s(156) == 0.0
    assert succeed(it, 156) == Change(CLOSED, Reason.NONE)


def test_openings_in_a_row_last_longer_up_to_a_bound_and_are_forgotten() -> None:
    it = breaker(open_s=5, open_s_max=30, forget_s=600)
    now, lasted = 0.0, [trip(it, 0).open_s]
    for _ in range(3):
        now += lasted[-1]
        again = fail(it, now)
        assert again is not None
        assert again.reason is Reason.PROBE
        lasted.append(again.open_s)
    assert lasted == [5, 10, 20, 30]
    now += lasted[-1]
    succeed(it, now)
    assert trip(it, now + 599).open_s == 30, "it had not been well for long"
    now += 599 + 30
    succeed(it, now)
    assert trip(it, now + 600).open_s == 5


def test_jitter_only_makes_it_longer() -> None:
    assert trip(breaker(0.999, jitter=0.2), 0).open_s == pytest.approx(5 * 1.1998)


def test_a_retry_after_is_honoured_at_once_and_is_no_strike() -> None:
    it = breaker(retry_after_s_max=60)
    assert fail(it, 0, retry_after_s=7) == Change(OPEN, Reason.RETRY_AFTER, 7.0)
    assert it.try_pass(6.9) is None
    assert fail(it, 7, retry_after_s=86_400) == Change(OPEN, Reason.RETRY_AFTER, 60.0)
    assert trip(it, 67).open_s == 5.0


def test_after_a_pause_that_the_provider_asked_for_everything_passes_again() -> None:
    it = breaker(0.999, jitter=0.2, probes_max=1)
    fail(it, 0, retry_after_s=7)
    assert [it.try_pass(7) is not None for _ in range(5)] == [True] * 5
    assert it.state is CLOSED
    other = breaker(0.999, jitter=0.2)
    other.adopt(it.record(), 6)
    assert other.blocked_s(6) == 1.0
    assert [other.try_pass(7) is not None for _ in range(5)] == [True] * 5


def test_a_retry_after_does_not_take_a_doubt_away() -> None:
    it = breaker()
    early = it.try_pass(0)
    assert early is not None
    trip(it, 0)
    assert it.failed(early, 0, retry_after_s=9) == Change(OPEN, Reason.CONSECUTIVE, 9.0)
    assert fail(it, 9, retry_after_s=20) == Change(OPEN, Reason.PROBE, 20.0)
    assert it.try_pass(29) is not None
    assert it.try_pass(29) is None, "it is a probe's turn"


def test_pauses_between_openings_do_not_make_them_forgotten() -> None:
    it = breaker(forget_s=600)
    trip(it, 0)
    succeed(it, 5)
    fail(it, 10, retry_after_s=100)
    assert trip(it, 110).open_s == 10.0
    succeed(it, 120)
    fail(it, 130, retry_after_s=100)
    assert trip(it, 731).open_s == 20.0, "the pause itself is no time of health"
    succeed(it, 751)
    fail(it, 760, retry_after_s=100)
    assert trip(it, 1_460).open_s == 5.0


def test_a_refused_key_trips_for_long_and_alerts() -> None:
    it = breaker()
    assert fail(it, 0, key_refused=True) == Change(OPEN, Reason.KEY_REFUSED, 900.0, alert=True)
    again = fail(it, 900)
    assert again is not None
    assert (again.alert, again.reason) == (False, Reason.PROBE)


def test_late_outcomes_neither_close_it_nor_strike_again() -> None:
    it = breaker()
    early = [it.try_pass(0) for _ in range(4)]
    trip(it, 0)
    late = [permit for permit in early if permit is not None]
    assert it.succeeded(late[0], 1) is None
    assert it.failed(late[1], 1) is None
    assert (it.state, it.blocked_s(1)) == (OPEN, 4.0)
    assert it.failed(late[2], 1, retry_after_s=3) is None, "it is open for longer already"
    assert it.failed(late[2], 1, retry_after_s=9) == Change(OPEN, Reason.CONSECUTIVE, 9.0)
    assert it.failed(late[3], 2, key_refused=True) == Change(OPEN, Reason.KEY_REFUSED, 900.0, alert=True)
    assert it.failed(late[0], 3, key_refused=True) is None, "one alert is enough"
    succeed(it, 902)
    assert it.failed(late[1], 903, key_refused=True) is None, "a probe knows better than an older call"
    assert it.state is CLOSED


def test_a_late_success_does_not_break_a_row_of_failures() -> None:
    it = breaker(consecutive_max=3)
    early = it.try_pass(0)
    assert early is not None
    trip(it, 0)
    succeed(it, 5)
    assert [fail(it, 6), fail(it, 6), it.succeeded(early, 6)] == [None, None, None]
    assert fail(it, 6) is not None


def test_an_open_time_is_never_made_shorter() -> None:
    it = breaker(key_refused_s=1)
    early = it.try_pass(0)
    assert early is not None
    trip(it, 0)
    assert it.failed(early, 1, key_refused=True) is None
    assert it.blocked_s(1) == 4.0


def test_a_refused_key_that_was_told_alerts_no_second_time() -> None:
    it = breaker(key_refused_s=5)
    early = it.try_pass(0)
    assert early is not None
    fail(it, 0, key_refused=True)
    assert it.failed(early, 1, retry_after_s=9) == Change(OPEN, Reason.KEY_REFUSED, 9.0, alert=False)


def test_memory_stays_bounded_whatever_happens() -> None:
    it = breaker(probes_max=3)
    size = sys.getsizeof(it) + sys.getsizeof(it._window._calls)
    for now in range(20_000):
        permit = it.try_pass(now)
        if permit is not None and now % 3:
            it.failed(permit, now)
    assert len(it._probes) <= 3
    assert sys.getsizeof(it) + sys.getsizeof(it._window._calls) == size
