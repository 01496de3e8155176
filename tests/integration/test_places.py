"""Places at a provider on a real event loop: fair, bounded in time, given back, and never polled for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
import uvloop
from prometheus_client import REGISTRY

from config import providers as config
from providers.bulkhead import Bulkhead, Limits, QueuePolicy, Refusal, Standing, Ticket
from proxy import telemetry
from proxy.places import Places, Waiting, build_places

HELD, EXPIRED, ENDED = Standing.HELD, Standing.EXPIRED, Standing.ENDED
LONG_S = 60.0


class Clock:
    """Monotonic seconds, counting how often they were read."""

    def __init__(self) -> None:
        self.read = 0

    def __call__(self) -> float:
        self.read += 1
        return time.monotonic()


def make(
    limits: Limits, models: dict[str, Limits] | None = None, *, name: str = "p", length_max: int = 100
) -> tuple[Places, Clock]:
    clock = Clock()
    queue = QueuePolicy(length_max=length_max, wait_s_max=LONG_S)
    return Places(name, Bulkhead(limits, models, queue), clock), clock


def taken(places: Places, model: str = "m", tokens: float = 0) -> Ticket:
    ticket = places.try_take(model, tokens)
    assert ticket is not None
    return ticket


def queued(places: Places, model: str = "m", tokens: float = 0, patience_s: float = LONG_S) -> Waiting:
    waiting = places.begin_wait(model, tokens, patience_s)
    assert isinstance(waiting, Waiting)
    return waiting


async def soon(waiting: Waiting) -> Ticket:
    """Its ticket, which must come."""
    async with asyncio.timeout(10):
        return await waiting.future


def counted(name: str, result: str) -> float:
    telemetry.publish()
    return REGISTRY.get_sample_value("tollgate_places_total", {"provider": name, "result": result}) or 0.0


@pytest.fixture
async def one() -> AsyncIterator[Places]:
    """A provider with one place."""
    places, _ = make(Limits(concurrent=1))
    yield places
    await places.aclose()


async def test_a_place_that_is_given_back_goes_to_who_waited_longest(one: Places) -> None:
    held = taken(one)
    assert one.try_take("m", 0) is None
    waiters = [queued(one) for _ in range(5)]
    for place, waiter in enumerate(waiters):
        assert not any(each.future.done() for each in waiters[place:])
        one.release(held)
        held = await soon(waiter)
        assert held is waiter.ticket
        assert held.standing is HELD
        assert one.try_take("m", 0) is None, "nobody overtakes"
    one.release(held)
    one.release(held)
    assert (one.bulkhead.under_way, one.bulkhead.waiting) == (0, 0)
    taken(one)


async def test_many_attempts_never_exceed_the_limit_and_all_get_their_turn() -> None:
    places, _ = make(Limits(concurrent=4), {"a": Limits(concurrent=2)})
    under_way, most, done = 0, 0, list[int]()

    async def attempt(number: int) -> None:
        nonlocal under_way, most
        ticket = places.try_take("ab"[number % 2], 0) or await queued(places, "ab"[number % 2]).held()
        assert ticket is not None
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.001)
        under_way -= 1
        done.append(number)
        places.release(ticket)

    async with asyncio.timeout(20):
        await asyncio.gather(*(attempt(number) for number in range(100)))
    assert (most, len(done), places.bulkhead.under_way) == (4, 100, 0)
    for model in (0, 1):
        turns = [number for number in done if number % 2 == model]
        assert turns == sorted(turns)
    await places.aclose()


async def test_a_full_model_does_not_hold_up_another() -> None:
    places, _ = make(Limits(concurrent=2), {"a": Limits(concurrent=1)})
    taken(places, "a")
    waiter = queued(places, "a")
    other = queued(places, "b")  # one waits, so it queues too, and passes at once
    assert other.future.done()
    assert (await soon(other)).standing is HELD
    assert not waiter.future.done()
    await places.aclose()


async def test_who_waits_too_long_is_told_when_its_patience_ends(one: Places) -> None:
    held = taken(one)
    hasty, patient = queued(one, patience_s=0.05), queued(one)
    began = time.monotonic()
    ticket = await soon(hasty)
    assert ticket.standing is EXPIRED
    assert 0.04 < time.monotonic() - began < 5
    assert await hasty.held() is None
    assert not patient.future.done()
    one.release(held)
    assert (await soon(patient)).standing is HELD


async def test_who_leaves_the_queue_lets_the_next_one_up(one: Places) -> None:
    held = taken(one)
    first, second = queued(one), queued(one)
    first.cancel()
    first.cancel()
    assert first.future.cancelled()
    assert one.bulkhead.waiting == 1
    one.release(held)
    assert await soon(second) is second.ticket
    first.cancel()
    assert one.bulkhead.under_way == 1


async def test_a_large_wait_that_is_given_up_frees_the_small_one_behind_it() -> None:
    places, _ = make(Limits(tokens_per_minute=1_000))
    taken(places, tokens=900)
    large, small = queued(places, tokens=500), queued(places, tokens=50)
    assert not small.future.done()
    large.cancel()
    assert small.future.done()
    assert (await soon(small)).standing is HELD
    await places.aclose()


async def test_a_task_that_is_cancelled_while_it_waits_leaves_nothing(one: Places) -> None:
    held = taken(one)
    waiting, behind = queued(one), queued(one)
    task = asyncio.create_task(waiting.held())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})
    assert one.bulkhead.waiting == 1
    one.release(held)
    assert (await soon(behind)).standing is HELD
    assert waiting.ticket.standing is ENDED


async def test_a_place_that_came_in_the_moment_of_the_cancellation_goes_on_to_the_next(one: Places) -> None:
    held = taken(one)
    waiting, behind = queued(one), queued(one)
    task = asyncio.create_task(waiting.held())
    await asyncio.sleep(0)
    one.release(held)
    assert waiting.ticket.standing is HELD
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
    assert (await soon(behind)).standing is HELD
    assert one.bulkhead.under_way == 1


async def test_a_place_is_not_given_to_a_waiter_whose_task_was_cancelled_before(one: Places) -> None:
    held = taken(one)
    waiting, behind = queued(one), queued(one)
    waiting.future.cancel()  # as a cancelled task does; it has had no turn yet to say so
    one.release(held)
    assert behind.future.done()
    assert (await soon(behind)).standing is HELD
    assert one.bulkhead.under_way == 1


async def test_who_cancels_the_future_itself_leaves_the_queue_too(one: Places) -> None:
    taken(one)
    waiting = queued(one)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(waiting.future, 0.01)
    async with asyncio.timeout(10):
        while one.bulkhead.waiting:
            await asyncio.sleep(0)
    assert waiting.ticket.standing is ENDED


async def test_a_budget_that_has_refilled_wakes_the_next_without_polling() -> None:
    places, clock = make(Limits(requests_per_minute=600))  # one each 0.1 s
    began = time.monotonic()
    while places.try_take("m", 0) is not None:
        pass
    waiters = [queued(places) for _ in range(3)]
    before = clock.read
    assert [(await soon(waiter)).standing for waiter in waiters] == [HELD] * 3
    assert 0.25 < time.monotonic() - began < 5
    assert clock.read - before <= 8, "one timer for each place, and perhaps one that came a moment early"
    await places.aclose()


async def test_tokens_that_were_not_used_serve_who_waits() -> None:
    places, _ = make(Limits(tokens_per_minute=1_000))
    held = taken(places, tokens=1_000)
    waiting = queued(places, tokens=500)
    assert not waiting.future.done()
    places.release(held, tokens=100)
    assert waiting.future.done()
    assert (await soon(waiting)).standing is HELD
    await places.aclose()


async def test_a_place_that_was_not_used_gives_its_request_back() -> None:
    places, _ = make(Limits(requests_per_minute=1))
    held = taken(places)
    assert isinstance(places.begin_wait("m", 0, 5.0), Refusal)
    places.cancel(held)
    taken(places)
    await places.aclose()


async def test_places_that_are_closed_leave_nobody_waiting_and_no_timer() -> None:
    places, clock = make(Limits(concurrent=1))
    taken(places)
    waiting = queued(places, patience_s=0.05)
    task = asyncio.create_task(waiting.held())
    await places.aclose()
    async with asyncio.timeout(10):
        assert await task is None
    assert waiting.ticket.standing is ENDED
    read = clock.read
    await asyncio.sleep(0.1)
    assert clock.read == read


async def test_metrics_say_how_full_it_is_and_what_became_of_who_waited() -> None:
    places, _ = make(Limits(concurrent=1), name="told", length_max=3)
    held = taken(places)
    served, hasty, left = queued(places), queued(places, patience_s=0.2), queued(places)
    assert isinstance(places.begin_wait("m", 0, LONG_S), Refusal)
    places.publish()
    in_use, waiting = "tollgate_places_in_use", "tollgate_places_waiting"
    assert [REGISTRY.get_sample_value(name, {"provider": "told"}) for name in (in_use, waiting)] == [1, 3]
    left.cancel()
    await soon(hasty)
    places.release(held)
    places.release(await soon(served))
    await places.aclose()
    assert [REGISTRY.get_sample_value(name, {"provider": "told"}) for name in (in_use, waiting)] == [0, 0]
    results = {result: counted("told", result) for result in ("waited", "expired", "queue_full", "too_long")}
    assert results == {"waited": 1, "expired": 1, "queue_full": 1, "too_long": 0}


async def test_a_wait_that_cannot_end_in_time_is_refused_at_once() -> None:
    places, _ = make(Limits(tokens_per_minute=60), name="slow")
    taken(places, tokens=60)
    refusal = places.begin_wait("m", 30, 5.0)
    assert isinstance(refusal, Refusal)
    assert (refusal.reason, refusal.limit) == ("too_long", "tokens")
    assert 29 < refusal.retry_after_s <= 30
    assert counted("slow", "too_long") == 1
    await places.aclose()


def test_the_timer_of_the_other_event_loop_serves_too() -> None:
    async def run() -> None:
        places, clock = make(Limits(requests_per_minute=6_000))  # one each 10 ms
        while places.try_take("m", 0) is not None:
            pass
        before = clock.read
        for _ in range(20):
            assert (await soon(queued(places))).standing is HELD
        assert clock.read - before <= 80, "no timer comes early again and again"
        await places.aclose()

    uvloop.run(run())


async def test_a_worker_gets_its_part_of_the_configured_limits() -> None:
    provider = config.Provider(
        kind="openai",
        limits=config.Limits(concurrent=5),
        models={"small": config.Limits(concurrent=1), "paced": config.Limits(requests_per_minute=4)},
        queue=config.Queue(length_max=1, wait_ms=20),
    )
    found = []
    for index in range(2):
        places = build_places("p", provider, 2, index)
        assert places is not None
        while places.try_take("m", 0) is not None:
            pass
        found.append(places.bulkhead.under_way)
        waiting = queued(places)
        assert isinstance(places.begin_wait("m", 0, LONG_S), Refusal)
        assert (await soon(waiting)).standing is EXPIRED
        await places.aclose()
    assert found == [3, 2]
    paced = build_places("p", provider, 2, 0)
    assert paced is not None
    assert [paced.try_take(model, 0) is not None for model in ("paced", "paced", "paced")] == [True, True, False]
    assert [paced.try_take("small", 0) is not None for _ in range(2)] == [True, False]
    assert build_places("p", config.Provider(kind="openai"), 2, 0) is None
