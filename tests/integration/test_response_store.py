"""The response cache's keys in a real server: bounds in bytes and time, claims, and nothing left behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from storage.redis_client import RedisClient
from storage.redis_slots import slot_of
from storage.response_store import OVERHEAD_BYTES, PARTS, Kept, ResponseStore
from tests.support.redis_server import RedisServer
from tests.support.replicas import connected

LONG_MS = 60_000
VALUE = b"v" * 1_000
COST = len(VALUE) + OVERHEAD_BYTES
FITS = 4


@pytest.fixture
async def redis(server: RedisServer) -> AsyncIterator[RedisClient]:
    async with connected(server) as client:
        await client.call("FLUSHALL")
        yield client


@pytest.fixture
def store(redis: RedisClient) -> ResponseStore:
    """Room for four answers in each part."""
    return ResponseStore(redis, COST * FITS * PARTS)


def name(number: int, part: int = 0) -> str:
    return f"{part:x}{number:063x}"


async def sizes(redis: RedisClient, part: int = 0) -> dict[bytes, int]:
    """What the part's books say."""
    flat = await redis.call("HGETALL", f"cs:{{c{part:x}}}")
    return {key: int(value) for key, value in zip(flat[::2], flat[1::2], strict=True)}


async def consistent(redis: RedisClient) -> int:
    """The part's answers, which its books agree with."""
    books = await sizes(redis)
    total = books.pop(b"", 0)
    names = await redis.call("ZRANGE", "ci:{c0}", 0, -1)
    there = {key.rpartition(b":")[2] for key in await redis.call("KEYS", "c:*")}
    assert set(names) == set(books) == there
    assert total == sum(books.values())
    return len(names)


async def test_an_answer_is_found_until_its_time_is_over(redis: RedisClient, store: ResponseStore) -> None:
    assert await store.find(name(1)) == (None, False)
    assert await store.keep(name(1), VALUE, 150) == Kept(kept=True, evicted=0)
    assert await store.find(name(1)) == (VALUE, False)
    assert await store.find(name(2)) == (None, False)
    async with asyncio.timeout(10):
        while (await store.find(name(1))).value is not None:
            await asyncio.sleep(0.02)
        while await redis.call("DBSIZE"):  # the books of a part without answers go with the last one
            await asyncio.sleep(0.02)


async def test_when_a_part_is_full_those_that_expire_first_make_room(redis: RedisClient, store: ResponseStore) -> None:
    for number in range(FITS):
        assert (await store.keep(name(number), VALUE, LONG_MS - number * 1_000)).evicted == 0
    assert await store.keep(name(9), VALUE * 2, LONG_MS) == Kept(kept=True, evicted=2)
    found = [number for number in range(FITS) if (await store.find(name(number))).value is not None]
    assert found == [0, 1]
    assert await consistent(redis) == 3
    assert (await store.keep(name(1, part=5), VALUE, LONG_MS)).evicted == 0  # another part has its own room


async def test_an_answer_larger_than_a_part_is_not_kept_and_evicts_nobody(
    redis: RedisClient, store: ResponseStore
) -> None:
    await store.keep(name(1), VALUE, LONG_MS)
    assert await store.keep(name(2), b"v" * COST * FITS, LONG_MS) == Kept(kept=False, evicted=0)
    assert await store.keep(name(3), b"v" * (COST * FITS - OVERHEAD_BYTES), LONG_MS) == Kept(kept=True, evicted=1)
    assert await consistent(redis) == 1


async def test_one_that_is_kept_again_is_replaced_and_counted_once(redis: RedisClient, store: ResponseStore) -> None:
    for value in (VALUE, VALUE * 2, b"small"):
        assert (await store.keep(name(1), value, LONG_MS)).kept
        assert (await store.find(name(1))).value == value
        assert (await sizes(redis))[b""] == len(value) + OVERHEAD_BYTES
    assert await consistent(redis) == 1


async def test_what_has_expired_counts_no_longer(redis: RedisClient, store: ResponseStore) -> None:
    for number in range(FITS - 1):
        await store.keep(name(number), VALUE, 50)
    await store.keep(name(8), VALUE, LONG_MS)
    async with asyncio.timeout(10):
        while len(await redis.call("KEYS", "c:*")) > 1:
            await asyncio.sleep(0.02)
    assert (await sizes(redis))[b""] == FITS * COST
    assert await store.keep(name(9), VALUE, LONG_MS) == Kept(kept=True, evicted=0)
    assert await consistent(redis) == 2


async def test_a_claim_has_one_owner_who_alone_renews_and_gives_it_up(store: ResponseStore) -> None:
    assert await store.claim(name(1), "one", LONG_MS) == (None, True)
    assert await store.claim(name(1), "two", LONG_MS) == (None, False)
    assert await store.find(name(1)) == (None, True)
    assert not await store.renew(name(1), "two", LONG_MS)
    assert not await store.release(name(1), "two")
    assert await store.renew(name(1), "one", LONG_MS)
    assert await store.release(name(1), "one")
    assert not await store.release(name(1), "one")
    assert await store.claim(name(1), "two", LONG_MS) == (None, True)


async def test_a_claim_ends_by_itself_unless_it_is_renewed(redis: RedisClient, store: ResponseStore) -> None:
    await store.claim(name(1), "dead", 100)
    await store.claim(name(2), "alive", 100)
    assert await store.renew(name(2), "alive", LONG_MS)
    async with asyncio.timeout(10):
        while not (await store.claim(name(1), "next", LONG_MS)).claimed:
            await asyncio.sleep(0.02)
    assert (await store.find(name(2))).claimed


async def test_who_claims_learns_of_an_answer_that_was_kept_a_moment_ago(store: ResponseStore) -> None:
    await store.keep(name(1), VALUE, LONG_MS)
    assert await store.claim(name(1), "late", LONG_MS) == (VALUE, True)


async def test_all_keys_of_an_answer_are_in_one_slot_and_none_is_made_of_anything_but_a_hash(
    redis: RedisClient, store: ResponseStore
) -> None:
    await store.claim(name(1, part=7), "t", LONG_MS)
    await store.keep(name(1, part=7), VALUE, LONG_MS)
    keys = await redis.call("KEYS", "*")
    assert len(keys) == 4
    assert len({slot_of(key) for key in keys}) == 1
    for bad in ("", "x" * 64, name(1) + "0", "{a}" + name(1)[3:]):
        with pytest.raises(ValueError, match="64 hex digits"):
            await store.find(bad)
