"""Identical calls at once, over a real server: within a worker, between workers, and when the first one dies."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from config.settings import Bounds
from metering.pricing import TokenUsage
from proxy.response_cache_entry import Kept, pack
from proxy.response_cache_flights import Flight, Flights, Told
from proxy.response_cache_waiting import Wait
from proxy.threads import Threads
from storage.redis_client import RedisClient
from storage.response_store import ResponseStore
from tests.support.redis_server import RedisServer
from tests.support.replicas import connected

NAME, OTHER = "a" * 64, "b" * 64
ANSWER = Kept([b"{}"], b"", b"", TokenUsage(1, 1, 0, 1, 0), 1, 1)
CLAIM_MS = 300
TTL_MS = 60_000
PATIENT_S = 20.0


@dataclass
class Connection:
    """What of a client's connection the flights know."""

    disconnected: bool = False
    on_gone: Callable[[], None] | None = None

    def leave(self) -> None:
        self.disconnected = True
        if self.on_gone is not None:
            self.on_gone()


@dataclass
class Worker:
    """One worker's flights; `die` stops all that keeps its claims, as a kill does."""

    store: ResponseStore
    waiting_max: int = 100
    per_answer_max: int = 100
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.threads = Threads()
        bounds = Bounds(
            cache_claim_ms=CLAIM_MS,
            cache_waiting_max=self.waiting_max,
            cache_waiting_per_answer_max=self.per_answer_max,
        )
        self.flights = Flights(self.store, self.detach, self.threads, bounds)

    def detach(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        return task

    async def find(
        self, connection: Connection | None = None, seconds: float = PATIENT_S, name: str = NAME
    ) -> tuple[Kept | None, Flight | None]:
        return await self.flights.find(name, Wait(cast(Any, connection or Connection()), seconds))

    async def lead(self, name: str = NAME) -> Flight:
        found, flight = await self.find(name=name)
        assert found is None
        assert flight is not None
        return flight

    def waiting(self, count: int) -> list[asyncio.Task[tuple[Kept | None, Flight | None]]]:
        return [self.detach(self.find()) for _ in range(count)]

    async def keep(self) -> None:
        await self.store.keep(NAME, pack(ANSWER), TTL_MS)

    async def die(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.threads.aclose()


@pytest.fixture
async def redis(server: RedisServer) -> AsyncIterator[RedisClient]:
    async with connected(server) as client:
        await client.call("FLUSHALL")
        yield client


@pytest.fixture
async def worker(redis: RedisClient) -> AsyncIterator[Callable[..., Worker]]:
    made: list[Worker] = []

    def make(waiting_max: int = 100, per_answer_max: int = 100) -> Worker:
        made.append(Worker(ResponseStore(redis, 64 * 1024 * 1024), waiting_max, per_answer_max))
        return made[-1]

    yield make
    for each in made:
        await each.die()


async def results(tasks: list[asyncio.Task[Any]]) -> list[Any]:
    async with asyncio.timeout(PATIENT_S):
        return await asyncio.gather(*tasks)


async def until_waiting(worker: Worker, flight: Flight, count: int) -> None:
    async with asyncio.timeout(PATIENT_S):
        while len(flight.waiters) < count:
            await asyncio.sleep(0.005)


async def test_those_who_wait_in_a_worker_get_the_first_ones_answer_and_the_claim_goes_after_it_is_kept(
    redis: RedisClient, worker: Callable[..., Worker]
) -> None:
    one = worker()
    flight = await one.lead()
    waiting = one.waiting(5)
    await until_waiting(one, flight, 5)
    assert await redis.call("EXISTS", f"cl:{{ca}}:{NAME}") == 1
    one.flights.over(flight, ANSWER, one.keep())
    assert await results(waiting) == [(ANSWER, None)] * 5
    async with asyncio.timeout(PATIENT_S):
        while await redis.call("EXISTS", f"cl:{{ca}}:{NAME}"):
            await asyncio.sleep(0.005)
    assert await one.find() == (ANSWER, None)


async def test_another_worker_waits_for_the_claim_and_takes_what_was_kept(worker: Callable[..., Worker]) -> None:
    one, two = worker(), worker()
    flight = await one.lead()
    waiting = two.waiting(3)
    await asyncio.sleep(2 * CLAIM_MS / 1000)  # longer than a claim that nobody renews
    assert not any(task.done() for task in waiting)
    one.flights.over(flight, ANSWER, one.keep())
    assert await results(waiting) == [(ANSWER, None)] * 3


async def test_when_the_first_ones_worker_dies_one_of_another_worker_takes_its_place(
    worker: Callable[..., Worker],
) -> None:
    one, two = worker(), worker()
    await one.lead()
    waiting = two.waiting(3)
    await one.die()
    async with asyncio.timeout(PATIENT_S):
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    (first,) = done
    found, flight = first.result()
    assert found is None
    assert flight is not None
    two.flights.over(flight, ANSWER, two.keep())
    left = [task for task in waiting if task is not first]
    assert await results(left) == [(ANSWER, None)] * 2


async def test_when_the_first_one_leaves_the_next_takes_its_place_and_the_others_wait_for_that_one(
    worker: Callable[..., Worker],
) -> None:
    one = worker()
    flight = await one.lead()
    waiting = one.waiting(4)
    await until_waiting(one, flight, 4)
    one.flights.over(flight, Told.AGAIN)
    async with asyncio.timeout(PATIENT_S):
        (first,), _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    second = first.result()[1]
    assert second is not None
    await until_waiting(one, second, 3)
    one.flights.over(second, ANSWER, one.keep())
    assert await results([task for task in waiting if task is not first]) == [(ANSWER, None)] * 3


async def test_when_there_is_nothing_to_share_each_goes_his_own_way_at_once(worker: Callable[..., Worker]) -> None:
    one = worker()
    flight = await one.lead()
    waiting = one.waiting(4)
    await until_waiting(one, flight, 4)
    one.flights.over(flight, Told.ALONE)
    assert await results(waiting) == [(None, None)] * 4


async def test_nobody_waits_beyond_his_time_or_beyond_the_number_that_may_wait_or_after_his_client_left(
    worker: Callable[..., Worker],
) -> None:
    one, two = worker(waiting_max=1), worker()
    flight = await one.lead()
    async with asyncio.timeout(PATIENT_S):
        assert await one.find(seconds=0.05) == (None, None)
        assert await two.find(seconds=0.05) == (None, None)
        left = Connection()
        leaving = one.detach(one.find(left))
        await until_waiting(one, flight, 1)
        assert await one.find() == (None, None)  # one waits already
        left.leave()
        assert await leaving == (None, None)
        assert left.on_gone is None
        waiting = one.detach(one.find())
        await until_waiting(one, flight, 1)  # its place is free again
        one.flights.over(flight, ANSWER)
        assert await waiting == (ANSWER, None)


async def test_one_hot_request_leaves_places_for_those_who_wait_for_others(worker: Callable[..., Worker]) -> None:
    one = worker(waiting_max=4, per_answer_max=3)
    hot, other = await one.lead(), await one.lead(OTHER)
    leaving = Connection()
    async with asyncio.timeout(PATIENT_S):
        left = one.detach(one.find(leaving))
        waiting = one.waiting(2)
        await until_waiting(one, hot, 3)
        assert await one.find() == (None, None)
        patient = one.detach(one.find(name=OTHER))
        await until_waiting(one, other, 1)
        leaving.leave()
        assert await left == (None, None)
        waiting += one.waiting(1)  # the place of the one who left
        await until_waiting(one, hot, 3)
        one.flights.over(hot, ANSWER)
        one.flights.over(other, ANSWER)
        assert await results([*waiting, patient]) == [(ANSWER, None)] * 4


async def test_those_who_wait_for_another_worker_count_among_those_who_may_wait(worker: Callable[..., Worker]) -> None:
    one, two = worker(), worker(waiting_max=1)
    flight = await one.lead()
    await one.lead(OTHER)
    async with asyncio.timeout(PATIENT_S):
        polling = two.waiting(1)
        while not two.flights.waiting:
            await asyncio.sleep(0.005)
        assert await two.find(name=OTHER) == (None, None)
        one.flights.over(flight, ANSWER, one.keep())
        assert await results(polling) == [(ANSWER, None)]
        left = Connection()
        again = two.detach(two.find(left, name=OTHER))
        while not two.flights.waiting:  # its place is free again
            assert not again.done()
            await asyncio.sleep(0.005)
        left.leave()
        assert await again == (None, None)


async def test_one_that_is_cancelled_while_it_looks_keeps_nobody_waiting(worker: Callable[..., Worker]) -> None:
    one, two = worker(), worker()
    flight = await one.lead()
    looking = two.detach(two.find())
    waiting = two.waiting(1)
    await asyncio.sleep(0)
    looking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await looking
    one.flights.over(flight, ANSWER, one.keep())
    assert await results(waiting) == [(ANSWER, None)]


async def test_a_damaged_answer_is_fetched_again(worker: Callable[..., Worker]) -> None:
    one = worker()
    await one.store.keep(NAME, b"not what we keep", TTL_MS)
    flight = await one.lead()
    one.flights.over(flight, ANSWER, one.keep())
    await asyncio.gather(*[task for task in one.tasks if not task.cancelled()])
    assert await one.find() == (ANSWER, None)


async def test_without_redis_each_worker_still_shares_among_its_own_calls(
    server: RedisServer, worker: Callable[..., Worker]
) -> None:
    gone = RedisClient(server.url, call_ms=1_000, connect_ms=1_000, pending_max=100)
    await gone.start()
    await gone.aclose()
    one = Worker(ResponseStore(gone, 1_000_000))
    flight = await one.lead()
    assert not flight.claimed
    waiting = one.waiting(2)
    await until_waiting(one, flight, 2)
    one.flights.over(flight, ANSWER)
    assert await results(waiting) == [(ANSWER, None)] * 2
    await one.die()
