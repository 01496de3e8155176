"""Making and ending accounts and keys: Postgres is the record, Redis gets what the gateways read.

Must not: run on a request's path, store or print a key's text, or touch credit and policies (`metering.grants`,
`metering.policies`).
"""

from __future__ import annotations

import contextlib
import logging
import re
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from zlib import crc32

import msgspec

from accounts import keys
from accounts.key_lookup import read_record
from accounts.key_store import CHANNEL, PEPPER_KEY, KeyRecord, decode_record, encode_record, record_key
from accounts.preferences import RoutingPreferences, from_text
from storage.database import FAILED, Connection, Pool
from storage.redis_client import RedisError
from storage.redis_open import Redis

log = logging.getLogger(__name__)

SHARD_COUNT = 128
NAME_CHARS_MAX = 200
LIMIT_MAX = 1_000_000
_ACCOUNT = "id, name, shard, created_at, policy, credit_limit, preferences"
_KEY_ID = re.compile(r"[0-9A-Za-z]{8}")


class AccountsError(Exception):
    """The account or key could not be changed."""


class UnknownAccount(AccountsError):
    """There is no such account."""


class AmbiguousAccount(AccountsError):
    """Several accounts have this name: use an id."""


class UnknownKeyId(AccountsError):
    """There is no key with this id."""


class InvalidInput(AccountsError):
    """A value is not acceptable."""


class HalfRevoked(AccountsError):
    """The key is refused from now on, but Postgres could not record it: run the command again when Postgres answers."""


@dataclass(frozen=True, slots=True)
class Account:
    """Who pays. `shard` (0..127) is where it lives in Redis; `policy` (cutoff, grace, postpaid) with `credit_limit` in
    micros says what it may do when its grants are used up; `preferences`, which providers may answer it."""

    id: str
    name: str
    shard: int
    created_at: datetime
    policy: str
    credit_limit: int
    preferences: RoutingPreferences | None = None


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """A key as lists show it, without anything that could be used as one."""

    id: str
    account_id: str
    name: str
    pepper_fingerprint: str
    requests_per_minute: int | None
    parallel_sessions: int | None
    created_at: datetime
    revoked_at: datetime | None
    preferences: RoutingPreferences | None = None


async def create_account(pool: Pool | Connection, name: str) -> Account:
    """A new account with a minted id. Raises InvalidInput, storage.database.FAILED."""
    account_id = f"acct_{keys.random_base62(16)}"
    row = await pool.fetchrow(
        f"INSERT INTO account (id, name, shard) VALUES ($1, $2, $3) RETURNING {_ACCOUNT}",  # noqa: S608
        account_id, _checked_name(name), crc32(account_id.encode()) % SHARD_COUNT,
    )  # fmt: skip
    return _account(row)


async def find_account(pool: Pool, id_or_name: str) -> Account:
    """An account by its id, else by its name. Raises UnknownAccount, AmbiguousAccount, storage.database.FAILED."""
    rows = await pool.fetch(
        f"SELECT {_ACCOUNT} FROM account WHERE id = $1 OR name = $1 ORDER BY id = $1 DESC LIMIT 2",  # noqa: S608
        _storable(id_or_name),
    )
    if not rows:
        raise UnknownAccount(f"There is no account with the id or name '{id_or_name}'.")
    if len(rows) > 1 and rows[0]["id"] != id_or_name:
        raise AmbiguousAccount(f"Several accounts are named '{id_or_name}'. Use the id.")
    return _account(rows[0])


async def list_accounts(pool: Pool, limit: int = 1_000) -> list[Account]:
    """The newest accounts first."""
    rows = await pool.fetch(
        f"SELECT {_ACCOUNT} FROM account ORDER BY created_at DESC, id LIMIT $1",  # noqa: S608
        limit,
    )
    return [_account(row) for row in rows]


def _account(row: Any) -> Account:
    return Account(**{**row, "preferences": from_text(row["preferences"])})


async def create_key(
    pool: Pool,
    redis: Redis,
    pepper: bytes,
    account: Account,
    name: str,
    *,
    requests_per_minute: int | None = None,
    parallel_sessions: int | None = None,
) -> keys.NewKey:
    """A new key; its text is in the answer and nowhere else. Raises InvalidInput, storage.database.FAILED.

    Without Redis the key still works: gateways find it in Postgres.
    """
    record_name = _checked_name(name)
    for limit in (requests_per_minute, parallel_sessions):
        if limit is not None and not 1 <= limit <= LIMIT_MAX:
            raise InvalidInput(f"A key's limit is between 1 and {LIMIT_MAX}.")
    made = keys.mint()
    await pool.execute(
        "INSERT INTO api_key (id, account_id, name, mac, pepper_fingerprint, requests_per_minute, parallel_sessions)"
        " VALUES ($1, $2, $3, $4, $5, $6, $7)",
        made.id, account.id, record_name, keys.mac_of(pepper, made.secret), keys.fingerprint(pepper),
        requests_per_minute, parallel_sessions,
    )  # fmt: skip
    try:  # read back only now: a change of the account's preferences sees the new key, or is seen here
        record = await read_record(pool, made.id)
        if record is not None:
            await redis.call("SET", record_key(made.id), encode_record(record), "NX")
    except (RedisError, keys.KeysUnavailable) as error:
        log.warning("the new key's record is not in Redis yet: %s", error)
    except FAILED as error:
        log.warning("the new key's record could not be read back: %s", type(error).__name__)
    return made


async def list_keys(pool: Pool, account: Account | None = None, limit: int = 1_000) -> list[KeyInfo]:
    """Keys of one account or of all, the newest first, revoked ones included. Raises storage.database.FAILED."""
    rows = await pool.fetch(
        "SELECT id, account_id, name, pepper_fingerprint, requests_per_minute, parallel_sessions, created_at,"
        "       revoked_at, preferences FROM api_key"
        " WHERE $1::text IS NULL OR account_id = $1 ORDER BY created_at DESC, id LIMIT $2",
        account.id if account else None, limit,
    )  # fmt: skip
    return [KeyInfo(**{**row, "preferences": from_text(row["preferences"])}) for row in rows]


async def revoke_key(pool: Pool, redis: Redis, key_id: str) -> bool:
    """Refuse a key from now on, everywhere: Redis first, then the caches, then Postgres. False: it was revoked before.

    Raises UnknownKeyId, HalfRevoked (repeat later), storage.redis_client.RedisError (nothing was revoked).
    """
    if _KEY_ID.fullmatch(key_id) is None:
        raise UnknownKeyId("A key's id is the 8 characters after 'tg_live_'.")
    record = await _known_record(pool, redis, key_id)
    await redis.call("SET", record_key(key_id), encode_record(msgspec.structs.replace(record, revoked=True)))
    await redis.call("PUBLISH", CHANNEL, key_id)
    try:
        changed = await pool.execute(
            "UPDATE api_key SET revoked_at = now() WHERE id = $1 AND revoked_at IS NULL", key_id
        )
    except FAILED:
        raise HalfRevoked(HalfRevoked.__doc__) from None
    return changed != "UPDATE 0"


async def _known_record(pool: Pool, redis: Redis, key_id: str) -> KeyRecord:
    raw = await redis.call("GET", record_key(key_id))
    record: KeyRecord | None = None
    if raw is not None:
        with contextlib.suppress(keys.KeysUnavailable):  # damaged: Postgres has a whole one
            record = decode_record(raw)
    record = record or await read_record(pool, key_id)
    if record is None:
        raise UnknownKeyId(f"There is no key with the id '{key_id}'.")
    return record


async def check_pepper(pool: Pool, redis: Redis, pepper: bytes) -> int:
    """How many keys in force were made with another secret, and are therefore refused now; 0 is the healthy answer.

    Remembers the fingerprint in Redis when it is the only one in use. Raises storage.database.FAILED, RedisError.
    """
    own = keys.fingerprint(pepper)
    foreign: Any = await pool.fetchval(
        "SELECT count(*) FROM api_key WHERE revoked_at IS NULL AND pepper_fingerprint <> $1", own
    )
    if not foreign:
        await redis.call("SET", PEPPER_KEY, own)
    return int(foreign)


def _checked_name(name: str) -> str:
    stripped = _storable(name).strip()
    if not 1 <= len(stripped) <= NAME_CHARS_MAX or not stripped.isprintable():
        raise InvalidInput(f"A name has 1 to {NAME_CHARS_MAX} printable characters.")
    return stripped


def _storable(text: str) -> str:
    """Postgres keeps no NUL and no half of a surrogate pair."""
    if "\0" in text or (not text.isascii() and any(0xD800 <= ord(char) <= 0xDFFF for char in text)):
        raise InvalidInput("A name must be valid text without NUL characters.")
    return text
