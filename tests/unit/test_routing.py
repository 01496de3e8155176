"""The order of candidates: what is removed and why, and what each strategy puts first."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, pairwise, product
from time import perf_counter
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from providers.breaker import Breaker, BreakerPolicy
from providers.bulkhead import Bulkhead, Limits, QueuePolicy
from providers.latency import PeakEwma
from providers.routing import (
    RANK,
    Facts,
    Live,
    Needs,
    Preferences,
    Reason,
    Removal,
    Strategy,
    Target,
    order,
    removals,
    rendezvous,
    shuffled,
    verdict,
)

NAMES = ("openai", "azure", "groq")
THREE = [Target(name, "m") for name in NAMES]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


def live(count: int = 3) -> list[Live]:
    return [
        Live(Breaker(BreakerPolicy(consecutive_max=1, open_s=7, jitter=0), lambda: 0.0), PeakEwma(10), PeakEwma(10))
        for _ in range(count)
    ]


def open_breaker(it: Live, now: float = 0.0) -> None:
    permit = it.breaker.try_pass(now)
    assert permit is not None
    it.breaker.failed(permit, now)


def full(length_max: int = 0) -> Bulkhead:
    it = Bulkhead(Limits(concurrent=1), queue=QueuePolicy(length_max))
    it.try_take("m", 0, 0)
    return it


def only(target: Target, facts: Facts) -> Removal | None:
    return removals([target], facts)[0]


def needing(needs: Needs | None = None, preferences: Preferences | None = None) -> Facts:
    return Facts(0, live(1), needs, preferences)


def test_a_healthy_route_is_tried_as_it_stands() -> None:
    assert order(THREE, "ordered", Facts(0, live())) == [0, 1, 2]
    assert order([], "ordered", Facts(0, [])) == []
    assert order(THREE[:1], "weighted", Facts(0, live(1))) == [0]


def test_an_open_breaker_removes_until_it_may_be_probed() -> None:
    now = live()
    open_breaker(now[0])
    assert order(THREE, "ordered", Facts(6.9, now)) == [1, 2]
    assert removals(THREE, Facts(6, now))[0] == Removal("breaker_open", "openai/m", 1.0)
    assert order(THREE, "ordered", Facts(7, now)) == [0, 1, 2]
    assert now[0].breaker.try_pass(7) is not None
    assert order(THREE, "ordered", Facts(7, now)) == [1, 2], "its probe is under way"


def test_a_full_bulkhead_removes_and_one_with_a_queue_goes_last() -> None:
    now = live()
    now[0].bulkhead = full()
    assert order(THREE, "ordered", Facts(0, now)) == [1, 2]
    assert removals(THREE, Facts(0, now)) == [Removal("bulkhead_full", "openai/m"), None, None]
    now[0].bulkhead, now[1].bulkhead = full(1), Bulkhead(Limits(concurrent=1))
    assert order(THREE, "ordered", Facts(0, now)) == [1, 2, 0]


def test_rate_budgets_are_asked_for_what_the_call_needs() -> None:
    now = live()
    now[0].bulkhead = Bulkhead(Limits(tokens_per_minute=100))
    now[0].bulkhead.try_take("m", 50, 0)
    assert order(THREE, "ordered", Facts(0, now, Needs(budget_tokens=50))) == [0, 1, 2]
    assert order(THREE, "ordered", Facts(0, now, Needs(budget_tokens=51))) == [1, 2, 0]


def test_a_model_that_the_provider_lacks_is_left_out_for_a_time() -> None:
    now = live()
    now[2].missing_until = 60
    assert order(THREE, "ordered", Facts(59, now)) == [0, 1]
    assert removals(THREE, Facts(59, now))[2] == Removal("model_missing", "groq/m", 1)
    assert order(THREE, "ordered", Facts(60, now)) == [0, 1, 2]


def test_context_and_features_are_checked_where_they_are_known() -> None:
    small = Target("p", "m", context_tokens=100, features=frozenset(("tools",)))
    assert only(small, needing(Needs(100, features=frozenset(("tools",))))) is None
    assert only(small, needing(Needs(101))) == Removal("context_length", "101 tokens, at most 100")
    assert only(small, needing(Needs(1, features=frozenset(("image", "audio", "tools"))))) == Removal(
        "feature", "audio, image"
    )
    assert only(Target("p", "m"), needing(Needs(10**9, features=frozenset(("image",))))) is None


@pytest.mark.parametrize("name", ["p", "p/m"])
def test_preferences_name_providers_or_their_models(name: str) -> None:
    target, chosen = Target("p", "m"), frozenset((name,))
    assert only(target, needing(preferences=Preferences(allowed=chosen))) is None
    assert only(target, needing(preferences=Preferences(excluded=chosen))) == Removal("preference", "p/m is excluded")
    assert order([Target("q", "m"), target], "ordered", Facts(0, live(2), None, Preferences(preferred=(name,)))) == [
        1,
        0,
    ]


def test_what_is_not_allowed_is_removed_and_an_empty_list_allows_nothing() -> None:
    other = Preferences(allowed=frozenset(("q", "p/other")))
    assert only(Target("p", "m"), needing(preferences=other)) == Removal("preference", "p/m is not allowed")
    assert order(THREE, "ordered", Facts(0, live(), None, Preferences(allowed=frozenset()))) == []


def test_a_candidate_must_carry_every_data_policy_tag() -> None:
    both = Preferences(tags=frozenset(("eu", "no-training")))
    assert only(Target("p", "m", tags=frozenset(("eu", "no-training", "x"))), needing(preferences=both)) is None
    assert only(Target("p", "m", tags=frozenset(("eu",))), needing(preferences=both)) == Removal(
        "data_policy", "no-training"
    )


lists = st.none() | st.frozensets(st.sampled_from(["p", "q", "p/1", "p/2", "q/1"]), max_size=4)
preferences = st.builds(
    Preferences,
    allowed=lists,
    excluded=lists.map(lambda names: names or frozenset()),
    tags=st.frozensets(st.sampled_from(["eu", "zdr"])),
)


@settings(deadline=None)
@given(preferences, preferences, st.sampled_from(["p", "q", "r"]), st.sampled_from(["1", "2"]), lists)
def test_a_hint_allows_exactly_what_both_allow(
    account: Preferences, hint: Preferences, provider: str, model: str, tags: frozenset[str] | None
) -> None:
    target = Target(provider, model, tags=frozenset(("eu",)) if tags else frozenset())
    each = [only(target, needing(preferences=given)) is None for given in (account, hint)]
    assert (only(target, needing(preferences=account.narrowed(hint))) is None) == all(each)


def test_a_hints_list_cuts_the_accounts_list() -> None:
    names = ("p", "q", "p/1", "q/1")
    some = [None, *(frozenset(chosen) for size in range(4) for chosen in combinations(names, size))]
    for account, hint in product(some, some):
        both = Preferences(account).narrowed(Preferences(hint))
        for target in (Target("p", "1"), Target("p", "2"), Target("q", "1"), Target("q", "2")):
            each = [only(target, needing(preferences=Preferences(given))) is None for given in (account, hint)]
            assert (only(target, needing(preferences=both)) is None) == all(each)


def test_a_hints_order_goes_before_the_accounts() -> None:
    assert Preferences(preferred=("a", "b")).narrowed(Preferences(preferred=("b",))).preferred == ("b", "a", "b")


def test_where_none_is_left_the_most_hopeful_reason_is_told() -> None:
    asleep, later = Removal("breaker_open", "a", 9.0), Removal("breaker_open", "b", 3.0)
    small, barred = Removal("context_length", "c"), Removal("preference", "d")
    assert verdict([barred, small, asleep, later]) == later
    assert verdict([barred, small]) == small
    assert verdict([barred, None]) is None
    assert verdict([]) is None
    assert set(RANK) == set(get_args(Reason))


def test_least_latency_sees_waiting_attempts_and_looks_again_at_the_idle() -> None:
    now = live()
    for seconds, each in zip((1.0, 0.4, 0.6), now, strict=True):
        each.latency.observe(seconds, 0)
    assert order(THREE, "least_latency", Facts(0, now)) == [1, 2, 0]
    now[1].waiting = 1
    assert order(THREE, "least_latency", Facts(0, now)) == [2, 1, 0]
    for at in range(100):
        now[2].latency.observe(0.6, at)
        now[1].latency.observe(0.5, at)
    assert order(THREE, "least_latency", Facts(99, now)) == [0, 2, 1]


def test_cheapest_puts_unknown_costs_last_and_keeps_the_order_of_equals() -> None:
    assert order(THREE, "cheapest", Facts(0, live(), costs=(None, 30, 20))) == [2, 1, 0]
    assert order(THREE, "cheapest", Facts(0, live(), costs=(20, 20, 20))) == [0, 1, 2]
    assert order(THREE, "cheapest", Facts(0, live())) == [0, 1, 2]


def test_least_busy_reckons_with_weights() -> None:
    now = live()
    for count, each in zip((3, 3, 1), now, strict=True):
        each.in_flight = count
    assert order(THREE, "least_busy", Facts(0, now)) == [2, 0, 1]
    heavy = [Target("openai", "m", weight=4), *THREE[1:]]
    assert order(heavy, "least_busy", Facts(0, now)) == [0, 2, 1]


def test_weights_are_shares_of_first_places_and_of_second_ones() -> None:
    weights, many = [1.0, 2.0, 5.0], 8_000
    ways = [shuffled([0, 1, 2], weights, (number + 0.5) / many) for number in range(many)]
    firsts = Counter(way[0] for way in ways)
    assert [firsts[item] for item in (0, 1, 2)] == [1_000, 2_000, 5_000]
    seconds = Counter(way[1] for way in ways if way[0] == 2)
    assert [seconds[0], seconds[1]] == pytest.approx([5_000 / 3, 10_000 / 3], abs=2)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=8), st.floats(0, 1, exclude_max=True))
def test_a_weighted_order_has_everybody_once_and_the_weightless_last(weights: list[float], draw: float) -> None:
    items = list(range(len(weights)))
    way = shuffled(items, weights, draw)
    assert sorted(way) == items
    assert way == shuffled(items, weights, draw)
    none = [item for item in items if weights[item] == 0]
    assert way[len(way) - len(none) :] == none


STICKY = [Target(name, "m", weight=weight, sticky=True) for name, weight in zip("abcd", (1, 1, 2, 4), strict=True)]
KEYS = [b"user-%d" % number for number in range(4_000)]


def winner(key: bytes, targets: list[Target]) -> Target:
    return max(targets, key=lambda target: rendezvous(key, target))


def test_keys_spread_over_candidates_by_weight() -> None:
    won = Counter(winner(key, STICKY).provider for key in KEYS)
    assert [won[name] for name in "abcd"] == pytest.approx([500, 500, 1_000, 2_000], rel=0.12)


def test_when_a_candidate_leaves_only_its_own_keys_move_and_they_spread() -> None:
    before = [winner(key, STICKY) for key in KEYS]
    after = [winner(key, STICKY[:3]) for key in KEYS]
    moved = [(old, new) for old, new in zip(before, after, strict=True) if old is not new]
    assert {old.provider for old, _ in moved} == {"d"}
    assert {new.provider for _, new in moved} == {"a", "b", "c"}


@pytest.mark.parametrize("strategy", ["weighted", "least_latency", "least_busy"])
def test_a_key_sticks_to_one_that_profits_whatever_the_strategy_says(strategy: Strategy) -> None:
    mixed = [THREE[0], *STICKY]
    now = live(5)
    firsts = set()
    for number in range(50):
        for each in now[1:]:
            each.in_flight = each.waiting = number % 7
        way = order(mixed, strategy, Facts(0, now, draw=number / 50, sticky_key=b"k"))
        firsts.add(way[0])
        assert way[-1] == 0
    assert len(firsts) == 1
    first = firsts.pop()
    open_breaker(now[first])
    elsewhere = order(mixed, strategy, Facts(0, now, sticky_key=b"k"))[0]
    assert mixed[elsewhere] is winner(b"k", [each for each in STICKY if each is not mixed[first]])


def test_a_key_does_not_overrule_an_order_or_a_price() -> None:
    ways = [order(STICKY, "ordered", Facts(0, live(4), sticky_key=key)) for key in KEYS[:20]]
    assert ways == [[0, 1, 2, 3]] * 20
    costs = [order(STICKY, "cheapest", Facts(0, live(4), costs=(5, 5, 1, 9), sticky_key=key)) for key in KEYS[:20]]
    assert {way[0] for way in costs} == {2}
    assert {way[1] for way in costs} == {0, 1}, "between equals the key decides"
    assert {way[3] for way in costs} == {3}


@settings(deadline=None)
@given(
    st.sampled_from(STRATEGIES),
    st.lists(st.sampled_from(["fine", "open", "full", "missing", "small", "barred"]), min_size=1, max_size=6),
    st.floats(0, 1, exclude_max=True),
    st.none() | st.binary(max_size=8),
    st.booleans(),
)
def test_every_candidate_is_either_in_the_order_once_or_removed_with_a_reason(
    strategy: Strategy, states: list[str], draw: float, key: bytes | None, asks: bool
) -> None:
    targets, now = [], live(len(states))
    expected: list[Reason | None] = []
    for place, (state, each) in enumerate(zip(states, now, strict=True)):
        targets.append(Target("bad" if state == "barred" else f"p{place}", "m", 1.0, 10 if state == "small" else None))
        reasons: dict[str, Reason] = {"open": "breaker_open", "full": "bulkhead_full", "missing": "model_missing"}
        if asks:
            reasons |= {"small": "context_length", "barred": "preference"}
        expected.append(reasons.get(state))
        if state == "open":
            open_breaker(each)
        each.bulkhead = full() if state == "full" else None
        each.missing_until = 1.0 if state == "missing" else 0.0
    needs, likes = (Needs(11), Preferences(excluded=frozenset(("bad",)))) if asks else (None, None)
    facts = Facts(0, now, needs, likes, draw, (), key)
    removed = [None if each is None else each.reason for each in removals(targets, facts)]
    assert removed == expected
    way = order(targets, strategy, facts)
    assert sorted(way) == [place for place, reason in enumerate(expected) if reason is None]
    assert way == order(targets, strategy, facts), "the same facts give the same order"


def test_the_order_of_a_healthy_route_costs_next_to_nothing() -> None:
    facts, rounds = Facts(0, live()), []
    for _ in range(20):
        start = perf_counter()
        for _ in range(1_000):
            order(THREE, "ordered", facts)
        rounds.append(perf_counter() - start)
    assert min(rounds) * 1e6 / 1_000 < 5, "microseconds"


def test_latencies_rise_in_the_order_given() -> None:
    now = live()
    for seconds, each in zip((3.0, 1.0, 2.0), now, strict=True):
        each.latency.observe(seconds, 0)
    way = order(THREE, "least_latency", Facts(5, now))
    loads = [now[index].latency.load(5, 0) for index in way]
    assert all(first <= second for first, second in pairwise(loads))
