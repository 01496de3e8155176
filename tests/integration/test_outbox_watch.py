"""A worker's watch over the outbox: the report where there is one, the outbox itself where there is none."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import msgspec
import pytest

from config.settings import Metering
from metering.keys import SHARDS
from metering.outbox_watch import OutboxWatch, memory_percent
from metering.status import STATUS_KEY, JournalReport, Outbox, Over
from storage.redis_client import RedisClient
from storage.redis_open import Redis, open_redis
from tests.support.gateway import until
from tests.support.redis_cluster import Cluster, clustered
from tests.support.redis_server import RedisServer

LIMITS = Metering(outbox_age_s_max=10, outbox_memory_percent_max=25)
MAXMEMORY = 64 * 1024 * 1024
MIB = "x" * 1024 * 1024
FOUND = JournalReport(entries_behind=3, oldest_age_ms=0, dead=0, stopped_shards=0, memory_percent=0)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with clustered() as running:
        yield running


@pytest.fixture
async def redis(server: RedisServer) -> AsyncIterator[RedisClient]:
    """An empty server with a memory of 64 MiB."""
    client = RedisClient(server.url, call_ms=500, connect_ms=2_000, pending_max=1_000)
    await client.start()
    await client.call("FLUSHALL")
    await client.call("CONFIG", "SET", "maxmemory", MAXMEMORY)
    yield client
    await client.aclose()


class Changes(list[tuple[Over | None, Outbox]]):
    """What the watch said."""

    def __call__(self, over: Over | None, seen: Outbox) -> None:
        self.append((over, seen))

    @property
    def words(self) -> list[Over | None]:
        return [over for over, _ in self]


def watch_of(redis: Redis, changes: Changes, *, measure_every_s: float = 0.0) -> OutboxWatch:
    return OutboxWatch(redis, LIMITS, changes, every_s=0.02, measure_every_s=measure_every_s)


async def publish(redis: RedisClient, *, age_s: float = 0, percent: int = 0) -> None:
    report = msgspec.structs.replace(FOUND, oldest_age_ms=int(age_s * 1000), memory_percent=percent)
    await redis.call("SET", STATUS_KEY, msgspec.json.encode(report))


async def entry(redis: Redis, shard: int, *, age_s: float, payload: str = "") -> None:
    """An entry as the scripts write it, so old by Redis' clock."""
    seconds, _ = await redis.call("TIME")
    moment = int((int(seconds) - age_s) * 1000)
    await redis.call("XADD", SHARDS[shard].outbox, "*", "t", "settle", "ts", moment, "md", payload)


async def test_by_the_report_it_opens_and_closes_once_each_and_does_not_flap(redis: RedisClient) -> None:
    changes = Changes()
    watch = watch_of(redis, changes)
    for age_s, over in (
        (1, None),
        (10, None),
        (11, "journal_age"),
        (9.5, "journal_age"),
        (11, "journal_age"),
        (9, None),
    ):
        await publish(redis, age_s=age_s)
        await watch.look()
        assert (watch.over, watch.readable) == (over, True)
        assert watch.report is not None
        assert watch.report.oldest_age_ms == age_s * 1000
    assert changes == [("journal_age", (11_000, 0)), (None, (9_000, 0))]


async def test_all_memory_in_use_is_told_in_percent_of_its_maximum_and_as_none_without_one(redis: RedisClient) -> None:
    before = await memory_percent(redis)
    for number in range(32):
        await redis.call("SET", f"other:{number}", MIB)
    assert 50 <= await memory_percent(redis) - before <= 75
    await redis.call("CONFIG", "SET", "maxmemory", 0)
    assert await memory_percent(redis) == 0


async def test_memory_that_others_use_is_not_the_outboxs(redis: RedisClient) -> None:
    changes = Changes()
    watch = watch_of(redis, changes)
    for number in range(24):
        await redis.call("SET", f"other:{number}", MIB)
    await publish(redis, percent=40)
    await watch.look()
    assert watch.over is None
    for shard in range(20):
        await entry(redis, shard, age_s=0, payload=MIB)
    await publish(redis, percent=70)
    await watch.look()
    assert watch.over == "journal_memory"
    assert 30 <= changes[0][1].memory_percent <= 45
    for shard in range(20):
        await redis.call("XTRIM", SHARDS[shard].outbox, "MAXLEN", 0)
    await watch.look()
    assert changes.words == ["journal_memory", None]
    assert changes[1][1].memory_percent == 0


async def test_a_server_that_may_not_be_asked_for_a_keys_size_counts_whole(redis: RedisClient) -> None:
    await redis.call("ACL", "SETUSER", "default", "-memory")
    try:
        await publish(redis, percent=30)
        for number in range(20):
            await redis.call("SET", f"other:{number}", MIB)
        watch = watch_of(redis, Changes())
        await watch.look()
        assert (watch.over, watch.readable) == ("journal_memory", True)
    finally:
        await redis.call("ACL", "SETUSER", "default", "+memory")


async def test_without_a_report_the_oldest_entry_tells_how_long_nobody_has_drained(redis: RedisClient) -> None:
    watch = watch_of(redis, Changes())
    await watch.look()
    assert (watch.over, watch.report, watch.readable) == (None, None, True)
    await entry(redis, 3, age_s=5)
    await redis.call("XADD", SHARDS[4].outbox, "*", "by", "hand")  # it does not say when
    await watch.look()
    assert watch.over is None
    await entry(redis, 7, age_s=12)
    await watch.look()
    assert watch.over == "journal_age"
    await publish(redis, age_s=5)  # a ledger process is back, and knows better
    await watch.look()
    assert watch.over is None


async def test_without_a_report_the_outboxs_size_counts_too(redis: RedisClient) -> None:
    watch = watch_of(redis, Changes())
    for shard in range(20):
        await entry(redis, shard, age_s=0, payload=MIB)
    await watch.look()
    assert watch.over == "journal_memory"
    await redis.call("CONFIG", "SET", "maxmemory", 0)
    await watch.look()
    assert watch.over is None


async def test_its_own_look_at_the_outbox_is_rare(redis: RedisClient) -> None:
    watch = watch_of(redis, Changes(), measure_every_s=60.0)
    await watch.look()
    await redis.call("CONFIG", "RESETSTAT")
    await entry(redis, 7, age_s=12)
    for _ in range(5):
        await watch.look()
    assert watch.over is None
    assert b"cmdstat_xread" not in await redis.call("INFO", "commandstats")


async def test_a_server_that_does_not_answer_changes_nothing(server: RedisServer, redis: RedisClient) -> None:
    changes = Changes()
    watch = watch_of(redis, changes)
    await publish(redis, age_s=11)
    await watch.start()
    assert watch.over == "journal_age"
    server.signal(signal.SIGSTOP)
    try:
        await until(lambda: not watch.readable)
        assert watch.over == "journal_age"
    finally:
        server.signal(signal.SIGCONT)
    await until(lambda: watch.readable)
    await publish(redis, age_s=1)
    await until(lambda: watch.over is None)
    await watch.aclose()
    assert changes.words == ["journal_age", None]


async def test_a_watch_that_fails_begins_again(redis: RedisClient) -> None:
    failures = 0

    def fails_once(over: Over | None, seen: Outbox) -> None:
        nonlocal failures
        failures += 1
        if failures == 1:
            raise ZeroDivisionError

    watch = OutboxWatch(redis, LIMITS, fails_once, every_s=0.02)
    await publish(redis)
    await watch.start()
    await publish(redis, age_s=11)
    await until(lambda: failures == 1)
    await publish(redis)
    await until(lambda: failures == 2)
    assert watch.over is None
    await watch.aclose()


@asynccontextmanager
async def opened(cluster: Cluster) -> AsyncIterator[Redis]:
    client = await open_redis(cluster.url, call_ms=2_000, connect_ms=2_000, pending_max=10_000)
    try:
        yield client
    finally:
        await client.aclose()


async def test_in_a_cluster_the_fullest_server_and_the_oldest_entry_count(cluster: Cluster) -> None:
    async with opened(cluster) as client:
        await asyncio.gather(*(node.ask("CONFIG", "SET", "maxmemory", MAXMEMORY) for node in cluster.nodes))
        changes = Changes()
        watch = watch_of(client, changes)
        for number in range(20):  # all at one of the three
            await client.call("SET", f"other:{number}:{{v005}}", MIB)
        await watch.look()
        assert (watch.over, watch.readable) == (None, True)
        for _ in range(20):
            await entry(client, 5, age_s=0, payload=MIB)
        await watch.look()
        assert changes.words == ["journal_memory"]
        assert 30 <= changes[0][1].memory_percent <= 45
        await client.call("XTRIM", SHARDS[5].outbox, "MAXLEN", 0)
        await entry(client, 6, age_s=12)
        await watch.look()
        assert changes.words == ["journal_memory", "journal_age"]
