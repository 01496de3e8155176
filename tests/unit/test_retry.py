"""The table of failures: each row, and the bounds that stand above every row."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from providers.events import FailureKind, ProviderFailure
from providers.retry import (
    FAULTS,
    RULES,
    Action,
    Behaviour,
    Fault,
    Mark,
    Point,
    RetryPolicy,
    Situation,
    backoff_s,
    decide,
    fault_of,
)

HEAD, BODY, AFTER = Point.BEFORE_HEADERS, Point.BEFORE_CONTENT, Point.AFTER_CONTENT
AGAIN, ELSE, NEXT = Behaviour.RETRY, Behaviour.ELSEWHERE, Behaviour.NEXT
CONF, CONT, STOP = Behaviour.IF_CONFIGURED, Behaviour.CONTINUE, Behaviour.GIVE_UP
BAD, FINE, KEY, MISSING, NONE = Mark.FAILURE, Mark.HEALTHY, Mark.KEY_REFUSED, Mark.MISSING, Mark.NOTHING

TABLE: list[tuple[Fault, Behaviour, Behaviour, Behaviour, Mark]] = [
    # fault, before headers, before content, after content, what the breaker is told
    ("connect", AGAIN, ELSE, CONT, BAD),
    ("closed", AGAIN, ELSE, CONT, BAD),
    ("server", AGAIN, ELSE, CONT, BAD),
    ("connect_timeout", ELSE, ELSE, CONT, BAD),
    ("protocol", ELSE, ELSE, CONT, BAD),
    ("garbage", ELSE, ELSE, CONT, BAD),
    ("truncated", ELSE, ELSE, CONT, BAD),
    ("overloaded", ELSE, ELSE, CONT, BAD),
    ("rate_limited", ELSE, ELSE, CONT, Mark.PAUSE),
    ("head_timeout", NEXT, NEXT, CONT, BAD),
    ("stall", NEXT, NEXT, CONT, BAD),
    ("key_refused", NEXT, NEXT, CONT, KEY),
    ("model_missing", NEXT, NEXT, CONT, MISSING),
    ("caller", STOP, STOP, STOP, FINE),
    ("context_length", CONF, CONF, STOP, FINE),
    ("content_policy", CONF, CONF, STOP, FINE),
    ("unsupported", NEXT, NEXT, STOP, NONE),
    ("busy", NEXT, NEXT, STOP, NONE),
    ("breaker_open", NEXT, NEXT, STOP, NONE),
    ("total_timeout", STOP, STOP, STOP, NONE),
]
ROWS = [(row[0], point, row[1 + point], row[4]) for row in TABLE for point in Point]
POLICY = RetryPolicy()
FREE = RetryPolicy(falls_back_on=frozenset(("context_length", "content_policy")), continuation=True)

faults = st.sampled_from(sorted(FAULTS))
points = st.sampled_from(Point)
draws = st.floats(0, 1, exclude_max=True)
policies = st.builds(
    RetryPolicy,
    retries=st.integers(0, 5),
    attempts_max=st.integers(1, 8),
    deadline_s=st.floats(0.01, 100),
    backoff_s=st.floats(0, 5),
    backoff_s_max=st.floats(0, 20),
    retry_after_s_max=st.floats(0, 20),
    falls_back_on=st.frozensets(st.sampled_from(["context_length", "content_policy"])),
    continuation=st.booleans(),
)
situations = st.builds(
    Situation,
    tries=st.integers(1, 6),
    attempts=st.integers(1, 9),
    others=st.integers(0, 3),
    elapsed_s=st.floats(0, 120),
    continuable=st.booleans(),
)


def step(fault: Fault, point: Point, policy: RetryPolicy = POLICY, **there: int | float | bool) -> Action:
    situation = Situation(1, 1, 1, 0.0)
    for name, value in there.items():
        setattr(situation, name, value)
    return decide(fault, point, policy, situation, 0.5).action


@pytest.mark.parametrize(("fault", "point", "behaviour", "mark"), ROWS, ids=lambda value: getattr(value, "name", value))
def test_each_row_does_what_it_says(fault: Fault, point: Point, behaviour: Behaviour, mark: Mark) -> None:
    assert (RULES[fault, point].behaviour, RULES[fault, point].mark) == (behaviour, mark)
    others = step(fault, point)
    alone = step(fault, point, others=0)
    freely = step(fault, point, FREE, continuable=True)
    assert (others, alone, freely) == {
        AGAIN: (Action.RETRY, Action.RETRY, Action.RETRY),
        ELSE: (Action.NEXT, Action.RETRY, Action.NEXT),
        NEXT: (Action.NEXT, Action.GIVE_UP, Action.NEXT),
        CONF: (Action.GIVE_UP, Action.GIVE_UP, Action.NEXT),
        CONT: (Action.GIVE_UP, Action.GIVE_UP, Action.NEXT),
        STOP: (Action.GIVE_UP, Action.GIVE_UP, Action.GIVE_UP),
    }[behaviour]


def test_the_table_has_every_fault_at_every_point_and_nothing_else() -> None:
    assert {(fault, point) for fault, point, _, _ in ROWS} == set(RULES)
    assert {row[0] for row in TABLE} == set(FAULTS)
    assert set(get_args(FailureKind)) < set(FAULTS)


@settings(deadline=None)
@given(faults, points, policies, situations, draws, st.none() | st.floats(0, 300))
def test_no_bound_is_ever_passed(
    fault: Fault, point: Point, policy: RetryPolicy, there: Situation, draw: float, told_s: float | None
) -> None:
    made = decide(fault, point, policy, there, draw, told_s)
    if made.action is not Action.GIVE_UP:
        assert there.attempts < policy.attempts_max
        assert point is AFTER or there.elapsed_s + made.delay_s < policy.deadline_s
        assert made.rule.behaviour is not STOP
    if made.action is Action.RETRY:
        assert there.tries <= policy.retries
        assert point is not AFTER
        assert made.delay_s >= (told_s or 0.0)
        assert made.delay_s <= (told_s or 0.0) + policy.backoff_s_max
        assert told_s is None or told_s <= policy.retry_after_s_max
    else:
        assert made.delay_s == 0.0
    if made.action is Action.NEXT:
        assert there.others > 0
    if fault == "caller":
        assert made.action is Action.GIVE_UP
    if point is AFTER and not (policy.continuation and there.continuable):
        assert made.action is Action.GIVE_UP


def test_tries_of_one_candidate_end_and_the_next_has_its_own() -> None:
    policy = RetryPolicy(retries=2)
    assert [step("server", HEAD, policy, tries=tries) for tries in (1, 2, 3)] == ["retry", "retry", "next"]
    assert step("server", HEAD, policy, tries=3, others=0) == "give_up"


def test_a_wait_that_would_pass_the_deadline_is_not_begun() -> None:
    policy = RetryPolicy(deadline_s=10, retry_after_s_max=60)
    late = Situation(1, 1, 1, 9.0)
    assert decide("server", HEAD, policy, late, 0.0, 2.0).action == "next"
    assert decide("server", HEAD, policy, Situation(1, 1, 0, 9.0), 0.0, 2.0).action == "give_up"
    assert decide("server", HEAD, policy, late, 0.0, 0.5).delay_s == 0.5


def test_a_stream_may_be_continued_long_after_the_deadline_of_its_start() -> None:
    assert step("truncated", AFTER, FREE, elapsed_s=3_000, continuable=True) == "next"
    assert step("truncated", BODY, FREE, elapsed_s=3_000, continuable=True) == "give_up"


def test_a_stream_that_cannot_be_continued_is_not() -> None:
    assert step("truncated", AFTER, FREE, continuable=False) == "give_up"


def test_only_the_fault_that_a_route_names_falls_back() -> None:
    policy = RetryPolicy(falls_back_on=frozenset(("context_length",)))
    assert step("context_length", HEAD, policy) == "next"
    assert step("content_policy", HEAD, policy) == "give_up"


@settings(deadline=None)
@given(policies, st.integers(1, 2000), draws)
def test_backoff_is_full_jitter(policy: RetryPolicy, tries: int, draw: float) -> None:
    most = min(policy.backoff_s_max, policy.backoff_s * 2.0 ** min(tries - 1, 64))
    assert backoff_s(policy, tries, draw) == draw * most
    assert backoff_s(policy, tries, 0.0) == 0.0


def test_backoff_doubles_up_to_its_bound() -> None:
    policy = RetryPolicy(backoff_s=1, backoff_s_max=5)
    assert [backoff_s(policy, tries, 0.5) for tries in (1, 2, 3, 4, 5000)] == [0.5, 1, 2, 2.5, 2.5]


def test_a_retry_after_is_waited_for_in_full_or_not_at_all() -> None:
    policy = RetryPolicy(retry_after_s_max=10)
    assert backoff_s(policy, 1, 0.5, 3.0) == 3.125
    assert backoff_s(policy, 1, 0.5, 10.5) is None


@pytest.mark.parametrize("status", [400, 404, 409, 410, 422, 500])
def test_a_model_that_the_provider_lacks_is_not_the_callers_fault(status: int) -> None:
    kind: FailureKind = "caller" if status < 500 else "server"
    expected = "model_missing" if status in (404, 410) else kind
    assert fault_of(ProviderFailure(kind, status, "The model `M-1` does not exist."), "m-1") == expected
    assert fault_of(ProviderFailure(kind, status, "", code="DeploymentNotFound"), "m-1") == expected


def test_something_else_that_the_provider_lacks_is_the_callers_fault() -> None:
    assert fault_of(ProviderFailure("caller", 404, "No such File object: file-abc"), "m-1") == "caller"
    assert fault_of(ProviderFailure("caller", 404, "Not found."), "") == "caller"
