"""Breakers of several workers on one real Valkey: what one finds the others know, and Redis' absence hurts nobody."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import msgspec
import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from config import routing
from providers.breaker import Breaker, BreakerPolicy, State
from providers.breaker_record import decode
from proxy.shared_breakers import SharedBreakers, breaker_policy, record_ttl_s
from storage.breaker_store import BreakerStore
from storage.redis_client import RedisClient
from tests.support.redis_server import RedisServer
from tests.support.replicas import connected, figure
from tests.support.valkey import valkey

SHORT = BreakerPolicy(consecutive_max=1, open_s=0.05, jitter=0.0)
LONG = msgspec.structs.replace(SHORT, open_s=60.0)
EVERY_S = 0.1
NEVER_S = 3_600.0


class Worker:
    """One worker's breakers, and a client of its own."""

    def __init__(self, redis: RedisClient, policy: BreakerPolicy, every_s: float, models: list[str]) -> None:
        self.store = BreakerStore(redis)
        self.shared = SharedBreakers(self.store, every_s, record_ttl_s(policy))
        self.breakers = {f"p/{model}": Breaker(policy, random.random) for model in models}
        for name, breaker in self.breakers.items():
            self.shared.register(name, breaker)

    def state(self, model: str) -> State:
        return self.breakers[f"p/{model}"].state

    def records(self) -> list[bytes]:
        return [breaker.record() for breaker in self.breakers.values()]

    def call(self, model: str, *, fails: bool, retry_after_s: float | None = None, key_refused: bool = False) -> bool:
        """One call as the router makes it; whether it passed."""
        breaker, now = self.breakers[f"p/{model}"], time.monotonic()
        permit = breaker.try_pass(now)
        if permit is None:
            return False
        if fails:
            change = breaker.failed(permit, now, retry_after_s=retry_after_s, key_refused=key_refused)
        else:
            change = breaker.succeeded(permit, now)
        if change is not None:
            self.shared.changed(f"p/{model}", change)
        return True


class Makers:
    """Makes workers on one server, closed with the test."""

    def __init__(self, server: RedisServer, stack: AsyncExitStack) -> None:
        self.server = server
        self._stack = stack

    async def worker(
        self, *models: str, policy: BreakerPolicy = LONG, every_s: float = EVERY_S, start: bool = True
    ) -> Worker:
        redis = await self._stack.enter_async_context(connected(self.server))
        worker = Worker(redis, policy, every_s, list(models))
        self._stack.push_async_callback(worker.shared.aclose)
        if start:
            await worker.shared.start()
        return worker


@contextlib.asynccontextmanager
async def makers_on(server: RedisServer) -> AsyncIterator[Makers]:
    async with AsyncExitStack() as stack:
        yield Makers(server, stack)


@pytest.fixture
async def make(server: RedisServer) -> AsyncIterator[Makers]:
    async with connected(server) as client:
        await client.call("FLUSHALL")
    async with makers_on(server) as makers:
        yield makers


async def until(holds: Callable[[], bool], seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.005)


def shown(model: str) -> float | None:
    return REGISTRY.get_sample_value("tollgate_breaker_open", {"provider": "p", "model": model})


def counted(model: str, state: str, reason: str) -> float:
    labels = {"provider": "p", "model": model, "state": state, "reason": reason}
    return REGISTRY.get_sample_value("tollgate_breaker_changes_total", labels) or 0.0


async def test_what_one_worker_opens_the_others_leave_alone_within_a_second(make: Makers) -> None:
    one, two, other = [await make.worker("a", "org/b", every_s=0.2) for _ in range(3)]
    began = time.monotonic()
    assert one.call("a", fails=True)
    await until(lambda: two.state("a") is other.state("a") is State.OPEN)
    assert time.monotonic() - began < 1.0
    assert not two.call("a", fails=False)
    assert two.state("org/b") is State.CLOSED
    assert one.records() == two.records() == other.records()


async def test_a_closing_spreads_too_and_the_gauge_falls_to_0(make: Makers) -> None:
    one, two = [await make.worker("healed", policy=SHORT) for _ in range(2)]
    assert one.call("healed", fails=True)
    assert shown("healed") == 1
    await until(lambda: two.state("healed") is State.OPEN)
    await until(lambda: one.call("healed", fails=False))
    await until(lambda: two.state("healed") is State.CLOSED)
    assert shown("healed") == 0
    assert [counted("healed", "open", why) for why in ("consecutive", "heard")] == [1, 1]
    assert [counted("healed", "closed", why) for why in ("healed", "heard")] == [1, 1]


async def test_changes_are_published_at_once_and_many_of_them_in_one_command(make: Makers) -> None:
    models = [f"m{number}" for number in range(20)]
    worker = await make.worker(*models, every_s=NEVER_S)
    async with connected(make.server) as client:
        await client.call("CONFIG", "RESETSTAT")
        for model in models:
            worker.call(model, fails=True)
        async with asyncio.timeout(10):
            while await worker.store.read(list(worker.breakers)) != worker.records():
                await asyncio.sleep(0.005)
        assert b"cmdstat_eval:calls=1," in await client.call("INFO", "commandstats")


async def test_a_worker_that_begins_anew_knows_before_its_first_call(make: Makers) -> None:
    one = await make.worker("a", every_s=NEVER_S)
    one.call("a", fails=True)
    await one.shared.aclose()  # it is the last that it publishes
    again = await make.worker("a", every_s=NEVER_S)
    assert again.state("a") is State.OPEN
    assert again.records() == one.records()


async def test_without_redis_breakers_go_on_alone_and_everything_is_shared_when_it_is_back() -> None:
    with valkey() as server:
        async with makers_on(server) as make:
            one, two = [await make.worker("early", "late", policy=LONG) for _ in range(2)]
            one.call("early", fails=True)
            await until(lambda: two.state("early") is State.OPEN)
            with capture_logs() as lines:
                server.kill()
                await until(lambda: len([line for line in lines if "not shared" in line["event"]]) == 2)
                one.call("late", fails=True)
                assert one.state("late") is State.OPEN
                assert not one.call("late", fails=False)
                assert two.call("late", fails=False)
                await asyncio.sleep(2 * EVERY_S)  # further looks fail, and nobody is told again
                server.start()  # with nothing in it
                await until(lambda: two.state("late") is State.OPEN)
                await until(lambda: len([line for line in lines if "shared again" in line["event"]]) == 2)
            told = [line["event"] for line in lines if "shared" in line["event"]]
            assert len(told) == 4
            new = await make.worker("early", "late", every_s=NEVER_S)
            assert new.records() == two.records() == one.records()


async def test_a_worker_starts_and_ends_while_redis_is_away() -> None:
    with valkey() as server:
        async with makers_on(server) as make:
            worker = await make.worker("a", start=False)
            server.kill()
            await worker.shared.start()
            assert worker.call("a", fails=True)
            await worker.shared.aclose()


async def test_a_refused_key_alerts_once_and_only_where_it_was_refused(make: Makers) -> None:
    with capture_logs() as lines:
        one, two = [await make.worker("key") for _ in range(2)]
        one.call("key", fails=True, key_refused=True)
        await until(lambda: two.state("key") is State.OPEN)
    alerts = [line for line in lines if line["event"] == "the provider refuses our key"]
    assert [(line["log_level"], line["provider"], line["model"]) for line in alerts] == [("error", "p", "key")]
    opened = [line for line in lines if line["event"] == "breaker opened"]
    assert [(line["log_level"], line["heard"], line["reason"]) for line in opened] == [
        ("warning", False, "key_refused"),
        ("info", True, "key_refused"),
    ]
    assert all(LONG.key_refused_s - 5 < line["seconds"] <= LONG.longest_s() for line in opened)


async def test_a_pause_that_a_provider_asked_for_ends_in_the_metrics_without_a_call(make: Makers) -> None:
    with capture_logs() as lines:
        worker = await make.worker("pause")
        worker.call("pause", fails=True, retry_after_s=0.3)
        assert shown("pause") == 1
        await until(lambda: shown("pause") == 0)
    assert [(line["event"], line["reason"]) for line in lines] == [
        ("breaker opened", "retry_after"),
        ("breaker closed", "resumed"),
    ]
    assert counted("pause", "closed", "resumed") == 1


async def test_an_opening_whose_time_is_over_is_shown_until_a_probe_succeeds(make: Makers) -> None:
    worker = await make.worker("idle", policy=SHORT, every_s=0.02)
    worker.call("idle", fails=True)
    await until(lambda: worker.breakers["p/idle"].blocked_s(time.monotonic()) == 0)
    await worker.shared.look()
    assert shown("idle") == 1
    assert worker.call("idle", fails=False)
    assert shown("idle") == 0


@pytest.mark.parametrize("seed", range(5))
async def test_workers_agree_whatever_the_order_in_which_they_change_and_look(make: Makers, seed: int) -> None:
    chance = random.Random(seed)
    policy = msgspec.structs.replace(SHORT, open_s=0.0, open_s_max=0.0)
    workers = [await make.worker("a", "b", policy=policy, every_s=NEVER_S, start=False) for _ in range(3)]
    async with connected(make.server) as client:
        for _ in range(60):
            worker = chance.choice(workers)
            if chance.random() < 0.3:
                await worker.shared.look()
            else:
                worker.call(chance.choice("ab"), fails=chance.random() < 0.6)
            if chance.random() < 0.03:
                await client.call("FLUSHALL")
    for worker in (*workers, *workers):
        await worker.shared.look()
    assert workers[0].records() == workers[1].records() == workers[2].records()
    assert await workers[0].store.read(["p/a", "p/b"]) == workers[0].records()
    assert all(record is not None and record.era > 3 for record in map(decode, workers[0].records()))


async def test_nothing_is_written_for_a_breaker_that_never_opened(make: Makers) -> None:
    worker = await make.worker("a", "b", every_s=NEVER_S)
    await worker.shared.look()
    async with connected(make.server) as client:
        assert await client.call("DBSIZE") == 0
        worker.call("b", fails=True)
        await worker.shared.look()
        assert await client.call("KEYS", "*") == [b"br:{breakers}:p/b"]
        left_ms = await client.call("PTTL", "br:{breakers}:p/b")
        assert 0 < left_ms <= record_ttl_s(LONG) * 1000
        assert await figure(client, "stats", "total_error_replies") == 0


async def test_a_name_is_shared_by_one_breaker_only(make: Makers) -> None:
    worker = await make.worker("a")
    worker.shared.register("p/a", worker.breakers["p/a"])
    with pytest.raises(ValueError, match="p/a has a breaker already"):
        worker.shared.register("p/a", Breaker(LONG, random.random))


def test_the_policy_is_the_configuration_s_in_seconds_and_shares() -> None:
    given = routing.Breaker(
        consecutive_max=2, error_percent=40, calls_min=7, window_ms=1_500, open_ms=250, open_ms_max=2_500,
        forget_ms=3_500, key_refused_ms=4_500, retry_after_ms_max=5_500,
    )  # fmt: skip
    policy = breaker_policy(given)
    assert policy == BreakerPolicy(
        consecutive_max=2, error_rate=0.4, calls_min=7, window_s=1.5, open_s=0.25, open_s_max=2.5, forget_s=3.5,
        key_refused_s=4.5, retry_after_s_max=5.5,
    )  # fmt: skip
    assert record_ttl_s(policy) == 60.0
    assert record_ttl_s(breaker_policy(routing.Breaker())) == 300 * 1.2 + 600
