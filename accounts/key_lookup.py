"""The last place where a key is looked for: one bounded asyncpg query, used by gateways when Redis lacks the record.

Must not: import SQLAlchemy, hold more than a few connections, or make callers queue while Postgres is down.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from accounts.key_store import KeyRecord
from accounts.keys import KeysUnavailable
from accounts.preferences import from_text, narrowed
from storage.database import FAILED, Connection, Pool, connect_pool

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 2
QUERY_S_MAX = 2.0
REST_S = 1.0
"""After a failure Postgres is left alone for this long; callers meanwhile get KeysUnavailable at once."""

_RECORDS = """
SELECT k.id, k.mac, k.pepper_fingerprint, k.account_id, a.shard, k.name,
       k.requests_per_minute, k.parallel_sessions, k.revoked_at IS NOT NULL AS revoked,
       a.preferences AS of_account, k.preferences AS of_key
  FROM api_key k JOIN account a ON a.id = k.account_id
"""
_ONE = f"{_RECORDS} WHERE k.id = $1"
_SOME = f"{_RECORDS} WHERE k.account_id = $1 AND k.id > $2 AND k.revoked_at IS NULL ORDER BY k.id LIMIT $3"


async def read_record(pool: Pool | Connection, key_id: str) -> KeyRecord | None:
    """One key as Redis keeps it. Raises storage.database.FAILED, KeysUnavailable (damaged preferences)."""
    row = await pool.fetchrow(_ONE, key_id)
    return None if row is None else _record(row)


async def read_records(pool: Pool | Connection, account_id: str, after_id: str, limit: int) -> list[KeyRecord]:
    """The next keys in force of an account, by id, as Redis keeps them. Raises as `read_record`."""
    return [_record(row) for row in await pool.fetch(_SOME, account_id, after_id, limit)]


def _record(row: Any) -> KeyRecord:
    return KeyRecord(
        id=row["id"],
        mac=row["mac"],
        pepper=row["pepper_fingerprint"],
        account=row["account_id"],
        shard=row["shard"],
        name=row["name"],
        requests_per_minute=row["requests_per_minute"],
        parallel_sessions=row["parallel_sessions"],
        revoked=row["revoked"],
        routing=narrowed(from_text(row["of_account"]), from_text(row["of_key"])),
    )


class PostgresKeys:
    """A `Lookup` for `KeyStore`: connects when first asked, and again after failures."""

    def __init__(self, database_url: str) -> None:
        self._url = database_url
        self._pool: Pool | None = None
        self._opening = asyncio.Lock()
        self._resting_until = 0.0

    async def __call__(self, key_id: str) -> KeyRecord | None:
        """The record, or None when Postgres knows no such key. Raises KeysUnavailable."""
        if time.monotonic() < self._resting_until:
            raise KeysUnavailable
        try:
            async with asyncio.timeout(QUERY_S_MAX):
                return await read_record(self._pool or await self._open(), key_id)
        except FAILED as error:
            log.warning("Postgres could not be asked for a key: %s", type(error).__name__)
            self._resting_until = time.monotonic() + REST_S
            raise KeysUnavailable from None

    async def _open(self) -> Pool:
        async with self._opening:
            if self._pool is None:
                self._pool = await connect_pool(self._url, size_max=CONNECTIONS_MAX)
            return self._pool

    async def aclose(self) -> None:
        """Close the connections."""
        pool, self._pool = self._pool, None
        if pool is not None:
            await pool.close()
