"""Latency: the peak EWMA sees at once that a candidate got slow, and quantiles are those of what is recent."""

from __future__ import annotations

from math import ceil, inf, nan

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from providers.latency import UNKNOWN_S, PeakEwma, RecentQuantiles

SECONDS = st.floats(0, 1e4)
STEPS = st.floats(0, 1e3)


def test_a_slow_observation_is_the_value_at_once() -> None:
    ewma = PeakEwma(10)
    ewma.observe(0.2, 0)
    ewma.observe(3.0, 0.001)
    assert ewma.value_s(0.001) == 3.0


def test_a_fast_observation_counts_by_the_time_since_the_last() -> None:
    ewma = PeakEwma(10)
    ewma.observe(4.0, 0)
    ewma.observe(0.0, 10)
    assert ewma.value_s(10) == pytest.approx(2.0)
    ewma.observe(1.0, 10)
    assert ewma.value_s(10) == pytest.approx(2.0)


def test_an_idle_candidate_is_forgotten_by_halves() -> None:
    ewma = PeakEwma(10)
    assert ewma.value_s(0) is None
    ewma.observe(4.0, 0)
    assert [ewma.value_s(now) for now in (0, 10, 20, 30)] == pytest.approx([4.0, 2.0, 1.0, 0.5])


def test_one_attempt_looks_again_and_the_next_reckon_with_what_was_known() -> None:
    ewma = PeakEwma(1)
    ewma.observe(5.0, 0)
    assert ewma.load(60, 0) < 1e-9
    assert ewma.load(60, 1) == 10.0


def test_an_unknown_candidate_is_tried_first_and_by_one_attempt_at_a_time() -> None:
    ewma = PeakEwma(10)
    assert ewma.load(0, 0) == 0.0
    assert UNKNOWN_S < ewma.load(0, 1) < ewma.load(0, 2)


@settings(deadline=None)
@given(st.lists(st.tuples(STEPS, SECONDS, STEPS), min_size=1, max_size=30))
def test_reading_changes_nothing_and_the_value_stays_within_what_was_seen(
    rows: list[tuple[float, float, float]],
) -> None:
    read, unread = PeakEwma(7), PeakEwma(7)
    now = 0.0
    for step, seconds, later in rows:
        now += step
        for ewma in (read, unread):
            ewma.observe(seconds, now)
        value = read.value_s(now)
        assert value is not None
        assert seconds * (1 - 1e-9) <= value <= max(each for _, each, _ in rows) * (1 + 1e-9)
        read.value_s(now + later)
        assert read.load(now, 3) == unread.load(now, 3) >= read.load(now, 0)


@pytest.mark.parametrize("seconds", [nan, inf, -1.0])
def test_what_is_no_duration_is_not_observed(seconds: float) -> None:
    ewma, recent = PeakEwma(10), RecentQuantiles()
    ewma.observe(seconds, 0)
    recent.observe(seconds, 0)
    assert ewma.value_s(0) is None
    assert len(recent) == 0


def test_a_clock_that_goes_back_gives_no_weight() -> None:
    ewma = PeakEwma(10)
    ewma.observe(4.0, 100)
    ewma.observe(0.0, 50)
    assert ewma.value_s(50) == 4.0


def test_bounds_that_hold_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="half-life"):
        PeakEwma(0)
    with pytest.raises(ValueError, match="window"):
        RecentQuantiles(0)


@settings(deadline=None)
@given(st.lists(st.tuples(STEPS, SECONDS), max_size=60), st.floats(0, 1), st.integers(1, 20))
def test_quantiles_are_exact_over_the_newest_that_are_young_enough(
    rows: list[tuple[float, float]], share: float, size: int
) -> None:
    recent = RecentQuantiles(size, age_s_max=500)
    now, seen = 0.0, list[tuple[float, float]]()
    for step, seconds in rows:
        now += step
        recent.observe(seconds, now)
        seen.append((now, seconds))
    young = sorted(seconds for at, seconds in seen[-size:] if at >= now - 500)
    assert len(recent) == len(young) <= size
    expected = young[max(1, ceil(share * len(young))) - 1] if young else None
    assert recent.quantile_s(share, now, least=1) == expected


def test_what_leaves_the_window_is_the_oldest_and_not_the_smallest() -> None:
    recent = RecentQuantiles(2)
    for seconds in (5.0, 1.0, 2.0):
        recent.observe(seconds, 0)
    assert [recent.quantile_s(share, 0, least=1) for share in (0.5, 1.0)] == [1.0, 2.0]


def test_few_observations_tell_no_quantile() -> None:
    recent = RecentQuantiles()
    for at in range(19):
        recent.observe(1.0, at)
    assert recent.quantile_s(0.95, 19) is None
    recent.observe(2.0, 19)
    assert recent.quantile_s(0.95, 19) == 1.0
    assert recent.quantile_s(0.96, 19) == 2.0
    assert recent.quantile_s(0.95, 19 + 901) is None
