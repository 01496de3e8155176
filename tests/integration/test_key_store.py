"""API keys on real stores: which store is asked when, what revocation reaches, what a store's absence means."""

from __future__ import annotations

import asyncio
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from accounts import admin, keys
from accounts.key_lookup import PostgresKeys
from accounts.key_store import LOOKUPS_MAX, TTL_S, KeyRecord, KeyStore, Principal, record_key
from storage.database import Pool, connect_pool
from storage.redis_client import RedisClient, RedisUnavailable
from tests.support.redis_server import RedisServer

PEPPER = b"a pepper for these tests"
FINGERPRINT = keys.fingerprint(PEPPER)


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with tempfile.TemporaryDirectory(prefix="tg-", dir="/tmp") as name:
        running = RedisServer(Path(name))
        running.start()
        yield running
        running.kill()


@pytest.fixture
async def redis(server: RedisServer) -> AsyncIterator[RedisClient]:
    client = RedisClient(server.url, call_ms=1_000, connect_ms=1_000, pending_max=1_000)
    await client.start()
    yield client
    await client.aclose()


@pytest.fixture
async def pool(ledger_database: str) -> AsyncIterator[Pool]:
    opened = await connect_pool(ledger_database, size_max=4)
    yield opened
    await opened.close()


def bearer(key: keys.NewKey) -> bytes:
    return f"Bearer {key.text}".encode()


async def until(condition: Callable[[], bool], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.005)


async def make_key(pool: Pool, redis: RedisClient, **limits: Any) -> keys.NewKey:
    account = await admin.create_account(pool, "Acme")
    return await admin.create_key(pool, redis, PEPPER, account, "laptop", **limits)


def store_on(redis: RedisClient, **options: Any) -> KeyStore:
    return KeyStore(redis, options.pop("lookup", None), PEPPER, FINGERPRINT, **options)


async def commands_processed(redis: RedisClient) -> int:
    info = await redis.call("INFO", "stats")
    return int(info.split(b"total_commands_processed:")[1].split(b"\r\n")[0])


async def test_a_created_key_authenticates_as_its_account_with_its_limits(pool: Pool, redis: RedisClient) -> None:
    account = await admin.create_account(pool, "Acme")
    key = await admin.create_key(pool, redis, PEPPER, account, "laptop", requests_per_minute=60, parallel_sessions=4)
    principal = await store_on(redis).authenticate(bearer(key))
    assert principal == Principal(
        key_id=key.id, account_id=account.id, shard=account.shard, requests_per_minute=60, parallel_sessions=4,
        name="laptop",
    )  # fmt: skip


async def test_a_bad_key_touches_no_store(redis: RedisClient) -> None:
    asked: list[str] = []

    async def lookup(key_id: str) -> KeyRecord | None:
        asked.append(key_id)
        return None

    store = store_on(redis, lookup=lookup)
    good = keys.mint().text
    bad = [good[:-1] + ("0" if good[-1] != "0" else "1"), "'; DROP TABLE api_key; --", '"' * 50, "x" * 10_240]
    bad += ["\0" * 67, good + "'", "tg_live_", "sk-1234"]
    before = await commands_processed(redis)
    for text in bad:
        header = f"Bearer {text}".encode()
        assert store.peek(header) is None
        with pytest.raises(keys.MalformedKey):
            await store.authenticate(header)
    with pytest.raises(keys.MissingKey):
        await store.authenticate(b"")
    assert await commands_processed(redis) == before + 1, "only the INFO that counted"
    assert asked == []


async def test_an_unknown_id_and_a_wrong_secret_are_refused_alike(pool: Pool, redis: RedisClient) -> None:
    key, other = await make_key(pool, redis), keys.mint()
    store = store_on(redis)
    body = f"tg_live_{key.id}_{other.secret.decode()}"
    forged = f"Bearer {body}_{keys.checksum(body.encode())}".encode()
    answers = []
    for header in (forged, bearer(other)):
        with pytest.raises(keys.UnknownKey) as refused:
            await store.authenticate(header)
        answers.append(str(refused.value))
    assert answers[0] == answers[1]
    assert store.peek(forged) is None


async def test_a_leaked_digest_is_no_key(pool: Pool, redis: RedisClient) -> None:
    key = await make_key(pool, redis)
    stored = await redis.call("GET", record_key(key.id))
    row = dict(await pool.fetchrow("SELECT * FROM api_key WHERE id = $1", key.id))
    for dump in (stored, repr(row).encode()):
        assert key.secret not in dump
    digest = row["mac"].hex()[:43]
    body = f"tg_live_{key.id}_{digest}"
    with pytest.raises(keys.UnknownKey):
        await store_on(redis).authenticate(f"Bearer {body}_{keys.checksum(body.encode())}".encode())


async def test_a_checked_key_is_answered_from_memory_for_thirty_seconds(pool: Pool, redis: RedisClient) -> None:
    now = 1_000.0
    store = store_on(redis, clock=lambda: now)
    key = await make_key(pool, redis)
    assert store.peek(bearer(key)) is None
    principal = await store.authenticate(bearer(key))
    before = await commands_processed(redis)
    now += TTL_S - 0.001
    assert store.peek(bearer(key)) == principal
    assert await store.authenticate(bearer(key)) == principal
    assert store.peek(f"bearer {key.text}".encode()) == principal
    assert await commands_processed(redis) == before + 1
    now += 0.001
    assert store.peek(bearer(key)) is None, "the age counts from the check, not from the last use"


async def test_the_cache_is_bounded_and_drops_the_least_recently_used(pool: Pool, redis: RedisClient) -> None:
    store = store_on(redis, entries_max=2)
    first, second, third = [await make_key(pool, redis) for _ in range(3)]
    await store.authenticate(bearer(first))
    await store.authenticate(bearer(second))
    assert store.peek(bearer(first)) is not None
    await store.authenticate(bearer(third))
    assert store.peek(bearer(second)) is None
    assert store.peek(bearer(first)) is not None
    assert store.peek(bearer(third)) is not None


async def test_refused_keys_take_no_place_in_the_cache(pool: Pool, redis: RedisClient) -> None:
    store = store_on(redis, entries_max=1)
    key = await make_key(pool, redis)
    await store.authenticate(bearer(key))
    for _ in range(20):
        with pytest.raises(keys.UnknownKey):
            await store.authenticate(bearer(keys.mint()))
    assert store.peek(bearer(key)) is not None


async def test_revoking_reaches_another_gateway(pool: Pool, redis: RedisClient, server: RedisServer) -> None:
    elsewhere = RedisClient(server.url, call_ms=1_000, connect_ms=1_000, pending_max=100)
    await elsewhere.start()
    store = store_on(elsewhere)
    await store.start()
    try:
        assert store.listening
        key, bystander = await make_key(pool, redis), await make_key(pool, redis)
        await store.authenticate(bearer(key))
        await store.authenticate(bearer(bystander))
        assert await admin.revoke_key(pool, redis, key.id)
        await until(lambda: store.peek(bearer(key)) is None)
        with pytest.raises(keys.RevokedKey):
            await store.authenticate(bearer(key))
        assert store.peek(bearer(bystander)) is not None
        assert not await admin.revoke_key(pool, redis, key.id), "repeating it changes nothing"
    finally:
        await store.aclose()
        await elsewhere.aclose()


async def test_without_pub_sub_a_revoked_key_ends_with_its_entry(pool: Pool, redis: RedisClient) -> None:
    now = 0.0
    store = store_on(redis, clock=lambda: now)
    key = await make_key(pool, redis)
    await store.authenticate(bearer(key))
    await admin.revoke_key(pool, redis, key.id)
    assert store.peek(bearer(key)) is not None
    now += TTL_S
    with pytest.raises(keys.RevokedKey):
        await store.authenticate(bearer(key))


async def test_a_revocation_during_the_check_leaves_nothing_cached(pool: Pool, redis: RedisClient) -> None:
    key = await make_key(pool, redis)
    store = store_on(redis)
    checking = asyncio.create_task(store.authenticate(bearer(key)))
    await asyncio.sleep(0)
    store.purge(key.id.encode())  # the message overtakes the reply
    await checking
    assert store.peek(bearer(key)) is None


async def test_the_cache_is_emptied_when_the_subscription_was_interrupted(
    pool: Pool, redis: RedisClient, server: RedisServer
) -> None:
    store = store_on(redis)
    await store.start()
    key = await make_key(pool, redis)
    await store.authenticate(bearer(key))
    server.kill()
    await until(lambda: not store.listening)
    assert store.peek(bearer(key)) is not None, "a cached key stays valid while Redis is away"
    server.start()
    await until(lambda: store.listening)
    assert store.peek(bearer(key)) is None, "a revocation may have been missed"
    await store.aclose()


async def test_postgres_is_asked_when_redis_lacks_it(pool: Pool, redis: RedisClient, ledger_database: str) -> None:
    asked: list[str] = []
    from_postgres = PostgresKeys(ledger_database)

    async def lookup(key_id: str) -> KeyRecord | None:
        asked.append(key_id)
        return await from_postgres(key_id)

    key = await make_key(pool, redis, requests_per_minute=7)
    await store_on(redis, lookup=lookup).authenticate(bearer(key))
    assert asked == []
    await redis.call("DEL", record_key(key.id))
    principal = await store_on(redis, lookup=lookup).authenticate(bearer(key))
    assert principal.requests_per_minute == 7
    assert asked == [key.id]
    await store_on(redis, lookup=lookup).authenticate(bearer(key))
    assert asked == [key.id], "the record was written back to Redis"
    await from_postgres.aclose()


async def test_a_key_revoked_in_postgres_does_not_come_back_with_a_fresh_redis(
    pool: Pool, redis: RedisClient, ledger_database: str
) -> None:
    key = await make_key(pool, redis)
    await admin.revoke_key(pool, redis, key.id)
    await redis.call("FLUSHALL")
    from_postgres = PostgresKeys(ledger_database)
    with pytest.raises(keys.RevokedKey):
        await store_on(redis, lookup=from_postgres).authenticate(bearer(key))
    await from_postgres.aclose()


async def test_a_revocation_during_the_write_back_wins(pool: Pool, redis: RedisClient, ledger_database: str) -> None:
    from_postgres = PostgresKeys(ledger_database)

    async def lookup(key_id: str) -> KeyRecord | None:
        record = await from_postgres(key_id)
        await admin.revoke_key(pool, redis, key_id)
        return record

    key = await make_key(pool, redis)
    await redis.call("DEL", record_key(key.id))
    for store in (store_on(redis, lookup=lookup), store_on(redis)):
        with pytest.raises(keys.RevokedKey):
            await store.authenticate(bearer(key))
    await from_postgres.aclose()


async def test_with_postgres_down_known_keys_pass_and_others_get_503(pool: Pool, redis: RedisClient) -> None:
    key = await make_key(pool, redis)
    from_postgres = PostgresKeys("postgresql://tollgate@/ledger?host=/nonexistent")
    store = store_on(redis, lookup=from_postgres)
    assert (await store.authenticate(bearer(key))).key_id == key.id
    with pytest.raises(keys.KeysUnavailable):
        await store.authenticate(bearer(keys.mint()))
    started = time.monotonic()
    for _ in range(50):
        with pytest.raises(keys.KeysUnavailable):
            await store.authenticate(bearer(keys.mint()))
    assert time.monotonic() - started < 1, "after a failure nobody waits for Postgres"
    await from_postgres.aclose()


async def test_with_redis_down_only_cached_keys_pass(pool: Pool, redis: RedisClient, server: RedisServer) -> None:
    store = store_on(redis)
    cached, other = await make_key(pool, redis), await make_key(pool, redis)
    await store.authenticate(bearer(cached))
    server.signal(signal.SIGSTOP)
    server.kill()
    await until(lambda: not redis.connected)
    assert (await store.authenticate(bearer(cached))).key_id == cached.id
    with pytest.raises(keys.KeysUnavailable):
        await store.authenticate(bearer(other))


async def test_invented_ids_cannot_queue_up_at_postgres(redis: RedisClient) -> None:
    gate = asyncio.Event()
    waiting: list[str] = []

    async def lookup(key_id: str) -> KeyRecord | None:
        waiting.append(key_id)
        await gate.wait()
        return None

    store = store_on(redis, lookup=lookup)
    tasks = [asyncio.create_task(store.authenticate(bearer(keys.mint()))) for _ in range(LOOKUPS_MAX + 10)]
    await until(lambda: len(waiting) == LOOKUPS_MAX and sum(task.done() for task in tasks) == 10)
    gate.set()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert sum(isinstance(answer, keys.KeysUnavailable) for answer in answers) == 10
    assert sum(isinstance(answer, keys.UnknownKey) for answer in answers) == LOOKUPS_MAX
    with pytest.raises(keys.UnknownKey):
        await store.authenticate(bearer(keys.mint()))


async def test_another_secret_makes_every_key_invalid_and_says_how_many(pool: Pool, redis: RedisClient) -> None:
    assert await admin.check_pepper(pool, redis, PEPPER) == 0
    key = await make_key(pool, redis)
    assert await admin.check_pepper(pool, redis, PEPPER) == 0
    assert await redis.call("GET", "auth:pepper") == FINGERPRINT.encode()
    other = b"quite another pepper"
    assert await admin.check_pepper(pool, redis, other) == 1
    with pytest.raises(keys.UnknownKey):
        await KeyStore(redis, None, other, keys.fingerprint(other)).authenticate(bearer(key))


async def test_a_damaged_record_is_neither_yes_nor_no(pool: Pool, redis: RedisClient) -> None:
    key = await make_key(pool, redis)
    await redis.call("SET", record_key(key.id), '{"id": 7')
    with pytest.raises(keys.KeysUnavailable):
        await store_on(redis).authenticate(bearer(key))
    assert await admin.revoke_key(pool, redis, key.id), "revoking repairs it from Postgres"
    with pytest.raises(keys.RevokedKey):
        await store_on(redis).authenticate(bearer(key))


async def test_accounts_are_found_by_id_or_by_an_unambiguous_name(pool: Pool) -> None:
    first = await admin.create_account(pool, "Grün & Söhne")
    assert await admin.find_account(pool, "Grün & Söhne") == await admin.find_account(pool, first.id) == first
    await admin.create_account(pool, "Grün & Söhne")
    with pytest.raises(admin.AmbiguousAccount):
        await admin.find_account(pool, "Grün & Söhne")
    assert await admin.find_account(pool, first.id) == first
    for unknown in ("nobody", "'; DROP TABLE account; --", ""):
        with pytest.raises(admin.UnknownAccount):
            await admin.find_account(pool, unknown)


@pytest.mark.parametrize("name", ["", "   ", "a\0b", "x" * 201, "line\nbreak", "\udcff"])
async def test_a_name_that_cannot_be_shown_is_refused(pool: Pool, name: str) -> None:
    with pytest.raises(admin.InvalidInput):
        await admin.create_account(pool, name)


async def test_lists_show_no_digest_and_filter_by_account(pool: Pool, redis: RedisClient) -> None:
    first, second = await make_key(pool, redis), await make_key(pool, redis)
    listed = await admin.list_keys(pool)
    assert {info.id for info in listed} == {first.id, second.id}
    assert "mac" not in admin.KeyInfo.__slots__
    owner = await admin.find_account(pool, next(info.account_id for info in listed if info.id == second.id))
    assert [info.id for info in await admin.list_keys(pool, owner)] == [second.id]


async def test_revoking_what_does_not_exist_is_an_error_and_changes_nothing(pool: Pool, redis: RedisClient) -> None:
    for key_id in ("00000000", "short", "'; DROP--"):
        with pytest.raises(admin.UnknownKeyId):
            await admin.revoke_key(pool, redis, key_id)
    assert await redis.call("DBSIZE") == 0


async def test_revoking_without_redis_revokes_nothing(pool: Pool, redis: RedisClient, server: RedisServer) -> None:
    key = await make_key(pool, redis)
    server.kill()
    await until(lambda: not redis.connected)
    with pytest.raises(RedisUnavailable):
        await admin.revoke_key(pool, redis, key.id)
    assert await pool.fetchval("SELECT revoked_at FROM api_key WHERE id = $1", key.id) is None


async def test_a_full_redis_does_not_stop_a_key(pool: Pool, redis: RedisClient, ledger_database: str) -> None:
    await redis.call("CONFIG", "SET", "maxmemory", 1)
    key = await make_key(pool, redis)
    assert await redis.call("GET", record_key(key.id)) is None
    from_postgres = PostgresKeys(ledger_database)
    assert (await store_on(redis, lookup=from_postgres).authenticate(bearer(key))).key_id == key.id
    await from_postgres.aclose()
