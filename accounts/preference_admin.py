"""Changing what accounts and keys say about providers: Postgres is the record, then the keys' Redis records follow,
then the processes' caches.

Must not: run on a request's path, bring a revoked key back, or put an earlier change over a later one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import msgspec

from accounts.admin import AccountsError, InvalidInput, UnknownAccount, UnknownKeyId
from accounts.key_lookup import read_record, read_records
from accounts.key_store import CHANNEL, KeyRecord, decode_record, encode_record, record_key
from accounts.keys import KeysUnavailable
from accounts.preferences import RoutingPreferences, changed, from_text, to_text
from storage.database import FAILED, Connection, Pool
from storage.redis_client import RedisError
from storage.redis_open import Redis

KEYS_AT_ONCE = 100
"""Keys whose records are read from Postgres and written to Redis together."""
TRIES_MAX = 10
"""How often a record that somebody else changes meanwhile is read again."""
LOCK_CLASS = 0x74676B70
"""First half of the advisory locks that order changes of one account; `turn_of` is the second."""

_SWAP = """#!lua
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
return 1
"""
_TAKE_TURN = "SELECT pg_advisory_xact_lock($1::int, $2::int)"
_OF_ACCOUNT = "SELECT id AS account_id, preferences FROM account WHERE id = $1 FOR NO KEY UPDATE"
_SET_ACCOUNT = "UPDATE account SET preferences = $2 WHERE id = $1"
_OF_KEY = "SELECT account_id, preferences FROM api_key WHERE id = $1 FOR NO KEY UPDATE"
_SET_KEY = "UPDATE api_key SET preferences = $2 WHERE id = $1"


class HalfChanged(AccountsError):
    """The preferences are recorded, but not all keys follow them yet: run the command again when both stores answer."""


@dataclass(frozen=True, slots=True)
class Changed:
    """What an account or a key says now (None: nothing), and how many keys in force follow it."""

    account_id: str
    preferences: RoutingPreferences | None
    keys: int


async def prefer_account(
    pool: Pool, redis: Redis, account_id: str, lists: Mapping[str, Sequence[str]], *, clear: bool = False
) -> Changed:
    """Put `lists` (see `accounts.preferences.changed`) into an account, and bring all its keys up to it. Repeatable.

    Raises InvalidInput, UnknownAccount, KeysUnavailable (what is stored is damaged: clear it), FAILED of
    storage.database (nothing was changed), HalfChanged (repeat it).
    """
    async with pool.acquire() as connection, connection.transaction():
        row = await connection.fetchrow(_OF_ACCOUNT, account_id)
        if row is None:
            raise UnknownAccount(f"There is no account with the id '{account_id}'.")
        after = _after(row, lists, clear)
        await connection.execute(_SET_ACCOUNT, account_id, to_text(after))
    return Changed(account_id, after, await _follow(pool, redis, account_id, None))


async def prefer_key(
    pool: Pool, redis: Redis, key_id: str, lists: Mapping[str, Sequence[str]], *, clear: bool = False
) -> Changed:
    """Put `lists` into a key; they narrow its account's. Raises UnknownKeyId, else as `prefer_account`."""
    async with pool.acquire() as connection, connection.transaction():
        row = await connection.fetchrow(_OF_KEY, key_id) if key_id.isalnum() and key_id.isascii() else None
        if row is None:
            raise UnknownKeyId(f"There is no key with the id '{key_id}'.")
        after = _after(row, lists, clear)
        await connection.execute(_SET_KEY, key_id, to_text(after))
    return Changed(row["account_id"], after, await _follow(pool, redis, row["account_id"], key_id))


def turn_of(account_id: str) -> int:
    """The account's CRC-32, in the signed range that Postgres takes."""
    return crc32(account_id.encode()) - 2**31


def _after(row: Any, lists: Mapping[str, Sequence[str]], clear: bool) -> RoutingPreferences | None:
    try:
        return changed(None if clear else from_text(row["preferences"]), lists)
    except ValueError as error:
        raise InvalidInput(f"{error}.") from None


async def _follow(pool: Pool, redis: Redis, account_id: str, key_id: str | None) -> int:
    """Bring the records of one key, or of all keys in force, to what Postgres says by now; how many they were.

    Changes of one account take turns from reading Postgres to writing Redis, so that the later one is written later.
    """
    try:
        async with pool.acquire() as connection, connection.transaction():
            await connection.execute(_TAKE_TURN, LOCK_CLASS, turn_of(account_id))
            if key_id is not None:
                record = await read_record(connection, key_id)
                return await _bring(redis, [record] if record is not None and not record.revoked else [])
            return await _bring_all(connection, redis, account_id)
    except (RedisError, KeysUnavailable):
        raise HalfChanged(HalfChanged.__doc__) from None
    except FAILED:
        raise HalfChanged(HalfChanged.__doc__) from None


async def _bring_all(connection: Connection, redis: Redis, account_id: str) -> int:
    done, last = 0, ""
    while records := await read_records(connection, account_id, last, KEYS_AT_ONCE):
        done += await _bring(redis, records)
        last = records[-1].id
    return done


async def _bring(redis: Redis, records: list[KeyRecord]) -> int:
    """Write the records, then purge them from every cache; how many they are. Raises HalfChanged, RedisError.

    A record only takes the place of the one that was read: a revocation (Redis first, then Postgres) may come between.
    One that is absent is made, else a lookup that has read Postgres before the change could put its own there.
    """
    left = records
    for _ in range(TRIES_MAX):
        stored = await _answers([redis.call("GET", record_key(record.id)) for record in left])
        swaps = [
            redis.call("EVAL", _SWAP, 1, record_key(record.id), raw or b"", encode_record(_as_revoked(record, raw)))
            for record, raw in zip(left, stored, strict=True)
        ]
        left = [record for record, swapped in zip(left, await _answers(swaps), strict=True) if not swapped]
        if not left:
            break
    else:
        raise HalfChanged(HalfChanged.__doc__)
    await _answers([redis.call("PUBLISH", CHANNEL, record.id) for record in records])
    return len(records)


def _as_revoked(record: KeyRecord, raw: bytes | None) -> KeyRecord:
    """The record, revoked where the one in Redis is."""
    if raw is not None:
        with contextlib.suppress(KeysUnavailable):  # damaged: Postgres has a whole one
            if decode_record(raw).revoked:
                return msgspec.structs.replace(record, revoked=True)
    return record


async def _answers(calls: Sequence[asyncio.Future[Any]]) -> list[Any]:
    """All answers, when all have come. Raises the first error."""
    answers = await asyncio.gather(*calls, return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return answers
