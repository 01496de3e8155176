"""Making the shards of a new instance, and refusing to make those whose journal Postgres already knows.

Must not: hide a loss of Redis: a shard that Postgres has entries of and Redis does not stays frozen (fail closed).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from metering.journal_store import open_cursors, shards_without_journal
from metering.keys import SHARDS
from metering.redis_ledger import RedisLedger
from storage.database import Pool
from storage.redis_client import RedisClient


async def ensure_shards(redis: RedisClient, ledger: RedisLedger, pool: Pool) -> Sequence[int]:
    """Create what may be created, in Redis and as journal cursors. Returns the shards that are missing in Redis though
    the journal knows them.

    Raises LedgerUnavailable, RedisUnavailable and `storage.database.FAILED`. Idempotent; several processes may run it
    at once.
    """
    fresh = await shards_without_journal(pool)
    await ledger.init_shards(sorted(fresh))
    await open_cursors(pool, fresh)
    await ledger.start()
    known = [shard for shard in SHARDS if shard.number not in fresh]
    found = await asyncio.gather(*(redis.call("EXISTS", shard.meta) for shard in known))
    return [shard.number for shard, exists in zip(known, found, strict=True) if not exists]
