"""Breakers' records in a real server: only greater ones are set, many at once, each with an expiry."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest

from metering.keys import mark_beside
from providers.breaker_record import Reason, Record, encode, merge
from storage.breaker_store import BATCH, BreakerStore, Calls
from storage.redis_client import RedisClient, RedisReplyError, RedisUnavailable
from storage.redis_open import open_redis, open_replicated
from tests.support.redis_cluster import clustered
from tests.support.redis_server import RedisServer
from tests.support.replicas import connected, replicated

TTL_MS = 60_000
NAME = "openai/gpt-4o-mini"


def record(era: int, **fields: Any) -> bytes:
    return encode(Record(era, **fields))


@pytest.fixture
async def redis(server: RedisServer) -> AsyncIterator[RedisClient]:
    async with connected(server) as client:
        await client.call("FLUSHALL")
        yield client


@pytest.fixture
def store(redis: RedisClient) -> BreakerStore:
    return BreakerStore(redis)


async def put(store: BreakerStore, records: Mapping[str, bytes]) -> int:
    return await store.raise_to(records, TTL_MS)


async def test_only_a_greater_record_replaces_what_is_there(store: BreakerStore) -> None:
    assert await store.read([NAME]) == [None]
    for era, done, there in ((3, 1, 3), (3, 0, 3), (2, 0, 3), (4, 1, 4)):
        assert await put(store, {NAME: record(era)}) == done
        assert await store.read([NAME]) == [record(there)]


async def test_who_has_another_key_of_a_provider_knows_nothing_of_what_was_found_with_the_old_one(
    redis: RedisClient,
) -> None:
    old, new = BreakerStore(redis, {NAME: "0a"}), BreakerStore(redis, {NAME: "0b"})
    await old.raise_to({NAME: record(7, open=True)}, TTL_MS)
    assert await new.read([NAME]) == [None]
    assert await BreakerStore(redis, {NAME: "0a"}).read([NAME]) == [record(7, open=True)]


async def test_records_merge_to_the_same_in_any_order(store: BreakerStore) -> None:
    records = [
        record(2, open=True, until_ms=5_000, strikes=1, reason=Reason.PROBE),
        record(2, open=True, until_ms=0xABCDEF, strikes=10, reason=Reason.CONSECUTIVE),
        record(2, at_ms=9_999),
        record(0xA9, at_ms=1),
    ]
    truth = merge(merge(records[0], records[1]), merge(records[2], records[3]))
    for number, order in enumerate(itertools.permutations(records)):
        for each in order:
            await put(store, {f"p/{number}": each})
        assert await store.read([f"p/{number}"]) == [truth]


@pytest.mark.parametrize("greater", [b"2" + record(1)[1:], record(1) + b"0", b"zz", b"\xff"])
async def test_what_a_later_version_wrote_stays_if_its_bytes_are_greater(store: BreakerStore, greater: bytes) -> None:
    assert await put(store, {NAME: greater}) == 1
    assert await put(store, {NAME: record(1)}) == 0
    assert await store.read([NAME]) == [greater]
    assert await put(store, {"p/short": b"1"}) == await put(store, {"p/short": record(1)}) == 1


async def test_more_records_than_one_command_takes_are_read_and_set_in_their_order(store: BreakerStore) -> None:
    records = {f"p/{number}": record(number) for number in range(1, 2 * BATCH + 10)}
    assert await put(store, records) == len(records)
    names = [*reversed(records), "p/unknown"]
    assert await store.read(names) == [*(records[name] for name in reversed(records)), None]
    assert await store.read([]) == []
    assert await put(store, {}) == 0


async def test_a_record_expires_and_a_lesser_one_does_not_keep_it(redis: RedisClient, store: BreakerStore) -> None:
    assert await store.raise_to({NAME: record(2)}, 200) == 1
    assert await store.raise_to({NAME: record(1)}, TTL_MS) == 0
    async with asyncio.timeout(10):
        while await redis.call("DBSIZE"):
            await asyncio.sleep(0.02)
    assert await store.read([NAME]) == [None]
    assert await put(store, {NAME: record(1)}) == 1


async def test_names_that_could_end_a_tag_or_a_word_have_keys_of_their_own(
    redis: RedisClient, store: BreakerStore
) -> None:
    names = ["p/a", "p/a ", "p/a\r\n", "p/{a}", "p/%7Ba%7D", "p/\u00e9", "P/a", "p//a", "p/a:0"]
    assert await put(store, {name: record(place) for place, name in enumerate(names)}) == len(names)
    assert await store.read(names) == [record(place) for place in range(len(names))]
    assert {key.partition(b"}")[0] for key in await redis.call("KEYS", "*")} == {b"br:{breakers"}


async def test_a_damaged_key_and_a_server_that_is_away_are_redis_errors(
    redis: RedisClient, store: BreakerStore
) -> None:
    await redis.call("LPUSH", f"br:{{breakers}}:{NAME}", "x")
    with pytest.raises(RedisReplyError, match="WRONGTYPE"):
        await put(store, {NAME: record(1)})
    assert await store.read([NAME]) == [None]
    await redis.aclose()
    with pytest.raises(RedisUnavailable):
        await put(store, {NAME: record(1)})
    with pytest.raises(RedisUnavailable):
        await store.read([NAME])


async def works_on(redis: Calls) -> None:
    store = BreakerStore(redis)
    records = {f"p/{number}": record(number) for number in range(1, 40)}
    assert await put(store, records) == len(records)
    assert await put(store, records) == 0
    assert await store.read(list(records)) == list(records.values())


async def test_records_are_kept_by_a_server_with_a_replica() -> None:
    with replicated() as pair:
        await pair.following()
        redis = await open_replicated(
            pair.primary.url,
            call_ms=5_000,
            connect_ms=2_000,
            pending_max=100,
            on_unconfirmed=lambda _: None,
            mark_beside=mark_beside,
        )
        try:
            await works_on(redis)
        finally:
            await redis.aclose()


def test_records_are_kept_by_a_cluster() -> None:
    async def run(url: str) -> None:
        redis = await open_redis(url, call_ms=5_000, connect_ms=2_000, pending_max=100)
        try:
            await works_on(redis)
        finally:
            await redis.aclose()

    with clustered() as cluster:
        asyncio.run(run(cluster.url))
