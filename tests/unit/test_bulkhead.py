"""The bulkhead: limits hold at every moment, first come is first served, nobody waits longer than bounded."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from providers.bulkhead import (
    Bulkhead,
    Limits,
    QueuePolicy,
    Refusal,
    Standing,
    Ticket,
    TokenBucket,
    share,
)

MODELS = {"a": Limits(concurrent=1), "b": Limits(concurrent=2)}
HELD, WAITING, EXPIRED, ENDED = Standing.HELD, Standing.WAITING, Standing.EXPIRED, Standing.ENDED


def taken(it: Bulkhead, model: str = "m", tokens: float = 0, now: float = 0) -> Ticket:
    ticket = it.try_take(model, tokens, now)
    assert ticket is not None
    return ticket


def queued(it: Bulkhead, model: str = "m", tokens: float = 0, now: float = 0, patience_s: float = inf) -> Ticket:
    ticket = it.wait(model, tokens, now, patience_s)
    assert isinstance(ticket, Ticket)
    return ticket


def test_places_are_given_up_to_the_limit_and_come_back_once() -> None:
    it = Bulkhead(Limits(concurrent=2))
    first, second = taken(it), taken(it)
    assert it.room("m", 0, 0) == "queue"
    assert it.try_take("m", 0, 0) is None
    it.release(first, 0)
    it.release(first, 0)
    it.cancel(first, 0)
    assert (it.under_way, first.standing, second.standing) == (1, ENDED, HELD)
    taken(it)
    assert it.try_take("m", 0, 0) is None


def test_no_limit_is_no_bound() -> None:
    it = Bulkhead(Limits())
    assert [taken(it, tokens=1e9).standing for _ in range(1000)] == [HELD] * 1000


def test_first_come_is_first_served_and_a_newcomer_does_not_overtake() -> None:
    it = Bulkhead(Limits(concurrent=1))
    held = taken(it)
    waiters = [queued(it) for _ in range(3)]
    assert it.wake(0) == []
    for waiter in waiters:
        it.release(held, 0)
        assert it.room("m", 0, 0) == "queue"
        assert it.try_take("m", 0, 0) is None
        assert it.wake(0) == [waiter]
        held = waiter


def test_a_full_model_does_not_hold_up_another() -> None:
    it = Bulkhead(Limits(concurrent=3), MODELS)
    held = taken(it, "a")
    first, other, second = queued(it, "a"), queued(it, "b"), queued(it, "a")
    assert it.wake(0) == [other]
    it.release(held, 0)
    assert it.wake(0) == [first]
    assert second.standing is WAITING


def test_a_large_request_is_not_starved_by_small_ones() -> None:
    it = Bulkhead(Limits(tokens_per_minute=600), queue=QueuePolicy(wait_s_max=100))
    taken(it, tokens=600)
    large, small = queued(it, tokens=500), queued(it, tokens=1)
    assert it.wake(40) == []
    assert it.wake(50) == [large]
    assert it.wake(50.1) == [small]


def test_the_queue_is_bounded_in_length() -> None:
    it = Bulkhead(Limits(concurrent=1), queue=QueuePolicy(length_max=2))
    taken(it)
    queued(it)
    queued(it)
    assert it.room("m", 0, 0) == "full"
    assert it.wait("m", 0, 0) == Refusal("queue_full", "concurrent", 1.0)
    assert it.waiting == 2


def test_the_queue_is_bounded_in_time_by_the_policy_and_by_the_callers_patience() -> None:
    it = Bulkhead(Limits(concurrent=1), queue=QueuePolicy(wait_s_max=5))
    held = taken(it)
    patient, hasty, _ = queued(it), queued(it, patience_s=2), queued(it)
    assert it.next_at(0) == 2
    assert it.wake(1.9) == []
    assert it.wake(2) == [hasty]
    assert (hasty.standing, it.next_at(2)) == (EXPIRED, 5)
    it.release(held, 5)
    left = it.wake(5)
    assert left[0] is patient, "a place that is free at the deadline is still given"
    assert [ticket.standing for ticket in left] == [HELD, EXPIRED]
    assert it.next_at(5) is None


def test_who_cannot_be_served_in_time_is_told_at_once_and_when() -> None:
    it = Bulkhead(Limits(requests_per_minute=60, tokens_per_minute=600), queue=QueuePolicy(wait_s_max=5))
    taken(it, tokens=600)
    assert it.wait("m", 100, 0) == Refusal("too_long", "tokens", 10.0)
    queued(it, tokens=30)
    assert it.wait("m", 30, 0) == Refusal("too_long", "tokens", 6.0)
    assert isinstance(it.wait("m", 10, 0), Ticket)


def test_small_requests_do_not_overtake_a_large_one_of_their_model() -> None:
    it = Bulkhead(Limits(), {"a": Limits(tokens_per_minute=600)}, QueuePolicy(wait_s_max=100))
    taken(it, "a", tokens=600)
    large, small, other = queued(it, "a", 500), queued(it, "a", 1), queued(it, "b")
    assert it.wake(40) == [other]
    assert it.next_at(40) == 50
    assert it.wake(50) == [large]
    assert it.next_at(50) == pytest.approx(50.1)
    assert it.wake(50.1) == [small]


def test_a_refilled_budget_is_a_reason_to_wake() -> None:
    it = Bulkhead(Limits(requests_per_minute=60))
    for _ in range(60):
        taken(it)
    waiter = queued(it)
    assert it.next_at(0) == 1
    assert it.wake(1) == [waiter]
    early = queued(it, now=1)
    assert (it.next_at(2.5), early.standing) == (2.5, WAITING), "it is due now"


def test_waiters_of_other_models_do_not_count_against_a_models_budget() -> None:
    it = Bulkhead(Limits(concurrent=1), {"a": Limits(requests_per_minute=1)})
    taken(it, "b")
    queued(it, "b")
    assert queued(it, "a").standing is WAITING
    assert isinstance(it.wait("a", 0, 0), Refusal)


def test_an_idle_bucket_holds_one_minutes_worth_and_no_more() -> None:
    bucket = TokenBucket(60)
    bucket.take(60, 0)
    bucket.take(60, 3_600)
    assert bucket.wait_s(1, 3_600) == 1.0


def test_a_models_own_budget_refuses_too() -> None:
    it = Bulkhead(Limits(), {"a": Limits(requests_per_minute=6)})
    for _ in range(6):
        taken(it, "a")
    assert it.wait("a", 0, 0) == Refusal("too_long", "requests", 10.0)
    assert taken(it, "b").standing is HELD


def test_a_request_beyond_the_whole_budget_passes_when_it_is_full_and_leaves_a_debt() -> None:
    it = Bulkhead(Limits(tokens_per_minute=60))
    taken(it, tokens=600)
    assert it.try_take("m", 1, 500) is None
    assert it.try_take("m", 1, 541.1) is not None


def test_what_was_really_used_is_charged() -> None:
    it = Bulkhead(Limits(tokens_per_minute=60))
    it.release(taken(it, tokens=60), 0, tokens=20)
    second = taken(it, tokens=40)
    assert it.try_take("m", 1, 0) is None
    it.release(second, 0, tokens=100)
    assert it.try_take("m", 1, 60.9) is None
    assert it.try_take("m", 1, 61) is not None


def test_a_cancelled_waiter_leaves_no_trace_and_a_cancelled_place_is_given_back_whole() -> None:
    it = Bulkhead(Limits(concurrent=1, requests_per_minute=2, tokens_per_minute=60))
    held = taken(it, tokens=60)
    waiter, next_one = queued(it, patience_s=5, tokens=0), it.wait("m", 0, 0)
    assert isinstance(next_one, Refusal), "the budget has no third request"
    it.cancel(waiter, 0)
    it.cancel(waiter, 0)
    assert (waiter.standing, it.waiting) == (ENDED, 0)
    it.cancel(held, 0)
    assert it.under_way == 0
    it.release(taken(it, tokens=60), 0)
    assert taken(it, tokens=0).standing is HELD
    assert it.room("m", 0, 29) == "queue"


def test_a_budget_that_never_refills_is_refused() -> None:
    with pytest.raises(ValueError, match="above 0"):
        Bulkhead(Limits(requests_per_minute=0))


@settings(deadline=None)
@given(st.floats(0.5, 1e6), st.lists(st.tuples(st.floats(0, 200), st.floats(0, 50)), max_size=40))
def test_a_bucket_never_gives_more_than_its_rate(per_minute: float, rows: list[tuple[float, float]]) -> None:
    bucket, now, given_out = TokenBucket(per_minute), 0.0, 0.0
    for step, minutes in rows:
        need = minutes * per_minute
        now += step
        now += (wait_s := bucket.wait_s(need, now))
        assert bucket.wait_s(need, now) == 0, "a wait of what it said is enough"
        assert wait_s >= 0
        before = given_out + min(need, per_minute)
        assert before <= per_minute + now * per_minute / 60 * 1.0001 + 1e-4 * per_minute
        bucket.take(need, now)
        given_out += need


EVENTS = st.tuples(
    st.sampled_from(["take", "wait", "wait", "release", "cancel", "cancel_waiter", "nothing"]),
    st.sampled_from(["a", "b", "m"]),
    st.integers(0, 50),
    st.sampled_from([0.0, 0.0, 0.1, 1.0, 7.0]),
)
LIMITS = st.builds(
    Limits,
    concurrent=st.none() | st.integers(1, 3),
    requests_per_minute=st.none() | st.sampled_from([6.0, 60.0]),
    tokens_per_minute=st.none() | st.sampled_from([30.0, 600.0]),
)


@settings(deadline=None)
@given(LIMITS, LIMITS, st.integers(0, 4), st.lists(EVENTS, max_size=60))
def test_under_any_schedule_limits_hold_and_waiters_leave_in_order_and_in_time(
    provider: Limits, model: Limits, length_max: int, events: list[tuple[str, str, int, float]]
) -> None:
    it = Bulkhead(provider, {"a": model, "b": Limits(concurrent=2)}, QueuePolicy(length_max, 5.0))
    now, held, waiting = 0.0, list[Ticket](), list[Ticket]()
    for what, name, tokens, step in events:
        until = now + step
        while (due := it.next_at(now)) is not None and due <= until:
            assert due >= now
            now = max(now, due)
            woken = it.wake(now)
            _left(woken, held, waiting)
            after = it.next_at(now)
            assert after is None or after > now, "what was due has been done"
        now = until
        if what == "take" and (ticket := it.try_take(name, tokens, now)):
            assert not waiting
            held.append(ticket)
        elif what == "wait" and isinstance(place := it.wait(name, tokens, now), Ticket):
            waiting.append(place)
        elif what in ("release", "cancel") and held:
            (it.release if what == "release" else it.cancel)(held.pop(tokens % len(held)), now)
        elif what == "cancel_waiter" and waiting:
            it.cancel(waiting.pop(tokens % len(waiting)), now)
        _left(it.wake(now), held, waiting)
        assert it.under_way == len(held) <= (provider.concurrent or 1000)
        assert it.waiting == len(waiting) <= length_max
        assert sum(ticket.model == "a" for ticket in held) <= (model.concurrent or 1000)
        assert sum(ticket.model == "b" for ticket in held) <= 2
        assert all(ticket.deadline > now for ticket in waiting)
    for ticket in held:
        it.release(ticket, now)
    for ticket in waiting:
        it.cancel(ticket, now)
    assert (it.under_way, it.waiting) == (0, 0)
    assert it.room("a", 0, now + 1e6) == "free"


def _left(woken: list[Ticket], held: list[Ticket], waiting: list[Ticket]) -> None:
    """Move woken tickets: of one model nobody who came later is served before one who still waits."""
    for ticket in woken:
        earlier = waiting[: waiting.index(ticket)]
        if ticket.standing is HELD:
            assert all(each.model != ticket.model or each in woken for each in earlier)
            held.append(ticket)
        else:
            assert ticket.standing is EXPIRED
        waiting.remove(ticket)


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_workers_shares_add_up_where_there_is_enough_for_all(workers: int) -> None:
    parts = [share(Limits(10, 60, 600), workers, index) for index in range(workers)]
    assert sum(part.concurrent or 0 for part in parts) == 10
    assert sum(part.requests_per_minute or 0 for part in parts) == pytest.approx(60)
    assert sum(part.tokens_per_minute or 0 for part in parts) == pytest.approx(600)
    assert share(Limits(1), 4, 3) == Limits(1)
    assert share(Limits(), workers, 0) == Limits()
