"""Whether the world's Valkey may be used again after it lost something, as the gateways must see it too.

Read past every link. Must not: repair anything, or judge how long it took.
"""

from __future__ import annotations

import asyncio
import contextlib
import time

from loadtests.chaos.collect import OUT_OF_ORDER
from loadtests.chaos.world import World
from metering.keys import SHARDS

PATIENCE_S = 40.0
POLL_S = 0.05
FROZEN = b"-1"


async def epochs(world: World) -> dict[int, int]:
    """Each shard's epoch as Postgres has it."""
    rows = await world.fetch("SELECT shard, ep FROM shard_cursor")
    return {row["shard"]: row["ep"] for row in rows}


async def usable(world: World) -> bool:
    """Whether the server is the one that was verified, and every shard of one epoch with Postgres and open."""
    known = await epochs(world)
    store = world.redis()
    async with contextlib.aclosing(store), store.pipeline(transaction=False) as pipeline:
        pipeline.info("server")
        pipeline.get("server:verified")
        for shard in SHARDS:
            pipeline.hmget(shard.meta, "ep", "fz")
        info, verified, *metas = await pipeline.execute()
    if verified is None or verified.decode() != info["run_id"]:
        return False
    found = {shard.number: meta for shard, meta in zip(SHARDS, metas, strict=True)}
    return all(found[number][0] == b"%d" % epoch and found[number][1] is None for number, epoch in known.items())


async def until_usable(world: World, since: float, seconds: float = PATIENCE_S) -> float | None:
    """Seconds from `since` (of the monotonic clock) until it may be used; None where that takes too long."""
    while time.monotonic() - since < seconds:
        with contextlib.suppress(*OUT_OF_ORDER):
            if await usable(world):
                return time.monotonic() - since
        await asyncio.sleep(POLL_S)
    return None
