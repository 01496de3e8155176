"""Preferences on real stores: whom a change reaches, and what it must not undo."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import asyncpg  # type: ignore[import-untyped]
import msgspec
import pytest

from accounts import admin, keys
from accounts.key_lookup import PostgresKeys, read_record
from accounts.key_store import KeyRecord, KeyStore, decode_record, encode_record, record_key
from accounts.preference_admin import KEYS_AT_ONCE, LOCK_CLASS, HalfChanged, prefer_account, prefer_key, turn_of
from accounts.preferences import RoutingPreferences, to_text
from storage.database import Pool, connect_pool
from storage.redis_client import RedisClient
from tests.support.redis_server import RedisServer

PEPPER = b"a pepper for these tests"
FINGERPRINT = keys.fingerprint(PEPPER)
GROQ = RoutingPreferences(preferred=("groq",))


def client(server: RedisServer) -> RedisClient:
    return RedisClient(server.url, call_ms=1_000, connect_ms=1_000, pending_max=1_000)


@pytest.fixture
async def redis(server: RedisServer) -> AsyncIterator[RedisClient]:
    opened = client(server)
    await opened.start()
    yield opened
    await opened.aclose()


@pytest.fixture
async def pool(ledger_database: str) -> AsyncIterator[Pool]:
    opened = await connect_pool(ledger_database, size_max=8)
    yield opened
    await opened.close()


@pytest.fixture
async def account(pool: Pool) -> admin.Account:
    return await admin.create_account(pool, "Acme")


async def make_key(pool: Pool, redis: RedisClient, account: admin.Account) -> keys.NewKey:
    return await admin.create_key(pool, redis, PEPPER, account, "laptop")


def bearer(key: keys.NewKey) -> bytes:
    return f"Bearer {key.text}".encode()


async def in_redis(redis: RedisClient, key: keys.NewKey) -> KeyRecord:
    raw = await redis.call("GET", record_key(key.id))
    assert raw is not None
    return decode_record(raw)


async def until(condition: Callable[[], bool], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.005)


async def test_a_change_reaches_every_gateway_and_no_other_account_s_keys(
    pool: Pool, redis: RedisClient, server: RedisServer, account: admin.Account
) -> None:
    key, bystander = await make_key(pool, redis, account), await make_key(pool, redis, await other_account(pool))
    clients = [client(server), client(server)]
    stores = [KeyStore(each, None, PEPPER, FINGERPRINT) for each in clients]
    for each, store in zip(clients, stores, strict=True):
        await each.start()
        await store.start()
        assert (await store.authenticate(bearer(key))).preferences is None
        await store.authenticate(bearer(bystander))
    changed = await prefer_account(pool, redis, account.id, {"preferred": ["groq"]})
    assert (changed.preferences, changed.keys) == (GROQ, 1)
    for each, store in zip(clients, stores, strict=True):
        await until(lambda store=store: store.peek(bearer(key)) is None)  # type: ignore[misc]
        assert (await store.authenticate(bearer(key))).preferences == GROQ
        assert store.peek(bearer(bystander)) is not None
        await store.aclose()
        await each.aclose()
    assert (await admin.find_account(pool, account.id)).preferences == GROQ


async def other_account(pool: Pool) -> admin.Account:
    return await admin.create_account(pool, "Umbrella")


async def test_an_account_s_change_reaches_all_its_keys_however_many(
    pool: Pool, redis: RedisClient, account: admin.Account
) -> None:
    made = [await make_key(pool, redis, account) for _ in range(KEYS_AT_ONCE + 2)]
    await admin.revoke_key(pool, redis, made.pop().id)
    assert (await prefer_account(pool, redis, account.id, {"tags": ["eu"]})).keys == KEYS_AT_ONCE + 1
    for key in made:
        assert (await in_redis(redis, key)).routing == RoutingPreferences(tags=("eu",))
    assert (await prefer_account(pool, redis, account.id, {}, clear=True)).preferences is None
    assert {(await in_redis(redis, key)).routing for key in made} == {None}


async def test_a_key_narrows_its_account_and_both_stores_agree(
    pool: Pool, redis: RedisClient, account: admin.Account, ledger_database: str
) -> None:
    key, sibling = await make_key(pool, redis, account), await make_key(pool, redis, account)
    await prefer_account(pool, redis, account.id, {"allowed": ["openai", "groq"], "preferred": ["groq"]})
    changed = await prefer_key(pool, redis, key.id, {"allowed": ["openai/gpt-4o", "azure"], "excluded": ["groq"]})
    assert (changed.account_id, changed.keys) == (account.id, 1)
    both = RoutingPreferences(allowed=("openai/gpt-4o",), excluded=("groq",), preferred=("groq",))
    assert (await in_redis(redis, key)).routing == both
    assert (await in_redis(redis, sibling)).routing == RoutingPreferences(
        allowed=("openai", "groq"), preferred=("groq",)
    )
    assert await read_record(pool, key.id) == await in_redis(redis, key)
    shown = {info.id: info.preferences for info in await admin.list_keys(pool, account)}
    assert shown == {key.id: changed.preferences, sibling.id: None}, "lists show the key's own"
    await redis.call("DEL", record_key(key.id))
    lookup = PostgresKeys(ledger_database)
    store = KeyStore(redis, lookup, PEPPER, FINGERPRINT)
    assert (await store.authenticate(bearer(key))).preferences == both
    await lookup.aclose()


async def test_a_key_made_later_has_its_account_s_preferences(
    pool: Pool, redis: RedisClient, account: admin.Account
) -> None:
    await prefer_account(pool, redis, account.id, {"preferred": ["groq"]})
    key = await make_key(pool, redis, account)  # with an account that was read before the change
    assert (await in_redis(redis, key)).routing == GROQ


async def test_a_lookup_that_read_before_the_change_puts_nothing_old_in_its_place(
    pool: Pool, redis: RedisClient, account: admin.Account
) -> None:
    key = await make_key(pool, redis, account)
    await redis.call("DEL", record_key(key.id))

    async def slow(key_id: str) -> KeyRecord | None:
        read = await read_record(pool, key_id)
        await prefer_account(pool, redis, account.id, {"preferred": ["groq"]})
        return read

    assert (await KeyStore(redis, slow, PEPPER, FINGERPRINT).authenticate(bearer(key))).preferences == GROQ
    assert (await in_redis(redis, key)).routing == GROQ


async def test_a_key_that_only_redis_knows_as_revoked_stays_revoked(
    pool: Pool, redis: RedisClient, account: admin.Account
) -> None:
    key = await make_key(pool, redis, account)
    revoked = msgspec.structs.replace(await in_redis(redis, key), revoked=True)
    await redis.call("SET", record_key(key.id), encode_record(revoked))  # Postgres was away then
    await prefer_account(pool, redis, account.id, {"preferred": ["groq"]})
    with pytest.raises(keys.RevokedKey):
        await KeyStore(redis, None, PEPPER, FINGERPRINT).authenticate(bearer(key))


class Overtaken(RedisClient):
    """A client whose first EVALs arrive just after another's command."""

    before: tuple[Any, ...] = ()
    times = 1

    def call(self, *args: Any) -> asyncio.Future[Any]:
        if args[0] == "EVAL" and self.times:
            self.times -= 1
            super().call(*self.before).add_done_callback(lambda done: done.exception())
        return super().call(*args)


async def test_a_revocation_between_reading_and_writing_wins(
    pool: Pool, redis: RedisClient, server: RedisServer, account: admin.Account
) -> None:
    key = await make_key(pool, redis, account)
    overtaken = Overtaken(server.url, call_ms=1_000, connect_ms=1_000, pending_max=100)
    revoked = msgspec.structs.replace(await in_redis(redis, key), revoked=True)
    overtaken.before = ("SET", record_key(key.id), encode_record(revoked))
    await overtaken.start()
    assert (await prefer_account(pool, overtaken, account.id, {"preferred": ["groq"]})).keys == 1
    await overtaken.aclose()
    record = await in_redis(redis, key)
    assert (record.revoked, record.routing) == (True, GROQ)


async def test_a_record_that_never_rests_ends_the_command_and_not_the_change(
    pool: Pool, redis: RedisClient, server: RedisServer, account: admin.Account
) -> None:
    key = await make_key(pool, redis, account)
    overtaken = Overtaken(server.url, call_ms=1_000, connect_ms=1_000, pending_max=100)
    overtaken.before, overtaken.times = ("APPEND", record_key(key.id), " "), 1_000
    await overtaken.start()
    with pytest.raises(HalfChanged, match="run the command again"):
        await prefer_account(pool, overtaken, account.id, {"preferred": ["groq"]})
    await overtaken.aclose()
    assert (await in_redis(redis, key)).routing is None
    await prefer_account(pool, redis, account.id, {"preferred": ["groq"]})
    assert (await in_redis(redis, key)).routing == GROQ


async def test_without_redis_the_change_is_recorded_and_asks_to_be_repeated(
    pool: Pool, redis: RedisClient, server: RedisServer, account: admin.Account
) -> None:
    key = await make_key(pool, redis, account)
    gone = client(server)
    await gone.start()
    await gone.aclose()
    with pytest.raises(HalfChanged, match="run the command again"):
        await prefer_account(pool, gone, account.id, {"preferred": ["groq"]})
    assert (await admin.find_account(pool, account.id)).preferences == GROQ
    await prefer_account(pool, redis, account.id, {"preferred": ["groq"]})
    assert (await in_redis(redis, key)).routing == GROQ


async def test_after_changes_at_the_same_time_redis_says_what_postgres_says(
    pool: Pool, redis: RedisClient, account: admin.Account
) -> None:
    key = await make_key(pool, redis, account)
    for _ in range(5):
        changes = [prefer_account(pool, redis, account.id, {"preferred": [f"p{number}"]}) for number in range(6)]
        await asyncio.gather(*changes, prefer_key(pool, redis, key.id, {"excluded": ["azure"]}))
        assert await in_redis(redis, key) == await read_record(pool, key.id)


async def test_a_change_takes_its_turn_and_then_writes_what_postgres_says_by_then(
    pool: Pool, redis: RedisClient, account: admin.Account
) -> None:
    key = await make_key(pool, redis, account)
    async with pool.acquire() as connection, connection.transaction():
        turn = (LOCK_CLASS, turn_of(account.id))
        await connection.execute("SELECT pg_advisory_xact_lock($1::int, $2::int)", *turn)
        change = asyncio.create_task(prefer_account(pool, redis, account.id, {"preferred": ["openai"]}))
        waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid = $1 AND NOT granted"
        deadline = time.monotonic() + 5
        while await pool.fetchval(waiting, LOCK_CLASS) == 0:
            assert time.monotonic() < deadline, "it did not wait for its turn"
            await asyncio.sleep(0.005)
        assert (await in_redis(redis, key)).routing is None
        await pool.execute("UPDATE account SET preferences = $2 WHERE id = $1", account.id, to_text(GROQ))
    await change
    assert (await in_redis(redis, key)).routing == GROQ


async def test_lists_of_different_changes_are_kept_beside_each_other(
    pool: Pool, redis: RedisClient, account: admin.Account
) -> None:
    lists = {"allowed": ["groq"], "excluded": ["azure"], "preferred": ["groq"], "tags": ["eu"]}
    await asyncio.gather(*(prefer_account(pool, redis, account.id, {name: lists[name]}) for name in lists))
    assert (await admin.find_account(pool, account.id)).preferences == RoutingPreferences(
        allowed=("groq",), excluded=("azure",), preferred=("groq",), tags=("eu",)
    )


async def test_what_is_no_name_and_who_does_not_exist_change_nothing(
    pool: Pool, redis: RedisClient, account: admin.Account
) -> None:
    with pytest.raises(admin.InvalidInput, match="'a b' is not a provider"):
        await prefer_account(pool, redis, account.id, {"allowed": ["a b"]})
    assert (await admin.find_account(pool, account.id)).preferences is None
    with pytest.raises(admin.UnknownAccount):
        await prefer_account(pool, redis, "acct_nobody", {"preferred": ["groq"]})
    for nobody in ("00000000", "'; DROP--", "a\0b", "\udcff"):
        with pytest.raises(admin.UnknownKeyId):
            await prefer_key(pool, redis, nobody, {"preferred": ["groq"]})


async def test_damaged_preferences_answer_neither_yes_nor_no_until_they_are_cleared(
    pool: Pool, redis: RedisClient, account: admin.Account, ledger_database: str
) -> None:
    key = await make_key(pool, redis, account)
    await redis.call("DEL", record_key(key.id))
    await pool.execute("UPDATE account SET preferences = '{\"allowed\": 7}' WHERE id = $1", account.id)
    lookup = PostgresKeys(ledger_database)
    with pytest.raises(keys.KeysUnavailable):
        await KeyStore(redis, lookup, PEPPER, FINGERPRINT).authenticate(bearer(key))
    await lookup.aclose()
    assert (await prefer_account(pool, redis, account.id, {}, clear=True)).keys == 1
    assert (await in_redis(redis, key)).routing is None


@pytest.mark.parametrize("table", ["account", "api_key"])
async def test_postgres_bounds_what_is_kept(pool: Pool, redis: RedisClient, account: admin.Account, table: str) -> None:
    await make_key(pool, redis, account)
    for size in (1, 32_769):
        with pytest.raises(asyncpg.CheckViolationError):
            await pool.execute(f"UPDATE {table} SET preferences = $1", "x" * size)
