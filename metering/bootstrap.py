"""Making the shards of a new instance, and refusing to make those whose journal Postgres already knows.

Must not: hide a loss of Redis: a shard that Postgres has entries of and Redis does not stays frozen (fail closed).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from metering.journal_store import open_cursors, shards_without_journal
from metering.keys import SHARDS
from metering.ledger_calls import FROZEN
from metering.recovery import Recovery
from metering.redis_ledger import RedisLedger
from storage.database import Pool
from storage.redis_open import Redis


async def ensure_shards(redis: Redis, ledger: RedisLedger, pool: Pool) -> Sequence[int]:
    """Create what may be created, in Redis and as journal cursors. Returns the shards that are missing in Redis though
    the journal knows them.

    Raises LedgerUnavailable, RedisUnavailable and `storage.database.FAILED`. Idempotent; several processes may run it
    at once.
    """
    fresh = await shards_without_journal(pool)
    await ledger.init_shards(sorted(fresh))
    await open_cursors(pool, fresh)
    recovery = Recovery(redis, "", pool=pool)
    if not (await recovery.look()).verified:  # a server that was started since it was compared with the journal
        await recovery.recover(rebuild=False)
    await ledger.start()
    epochs = await asyncio.gather(*(redis.call("HGET", shard.meta, "ep") for shard in SHARDS))
    return [shard.number for shard, epoch in zip(SHARDS, epochs, strict=True) if epoch in (None, FROZEN)]
