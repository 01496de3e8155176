"""Making the shards of a new instance, and refusing to make those whose journal Postgres already knows.

Must not: hide a loss of Redis: a shard that Postgres has entries of and Redis does not stays frozen (fail closed).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from metering.keys import SHARDS
from metering.redis_ledger import RedisLedger
from storage.database import Connection
from storage.redis_client import RedisClient


async def ensure_shards(redis: RedisClient, ledger: RedisLedger, connection: Connection) -> Sequence[int]:
    """Create what may be created. Returns the shards that are missing in Redis though the journal knows them.

    Raises LedgerUnavailable and `storage.database.FAILED`. Idempotent; several processes may run it at once.
    """
    rows = await connection.fetch("SELECT shard FROM shard_cursor WHERE n > 0 OR ep > 1")
    known = {row["shard"] for row in rows}
    await ledger.init_shards([shard.number for shard in SHARDS if shard.number not in known])
    await ledger.start()
    found = await asyncio.gather(*(redis.call("EXISTS", SHARDS[number].meta) for number in sorted(known)))
    return [number for number, exists in zip(sorted(known), found, strict=True) if not exists]
