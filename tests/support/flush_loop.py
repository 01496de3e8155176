"""Run by tests as a process of its own: one flusher until it is killed. Arguments: Redis URL, database URL."""

from __future__ import annotations

import asyncio
import sys

from metering.journal import Flusher
from storage.redis_client import RedisClient


async def main(redis_url: str, database_url: str) -> None:
    redis = RedisClient(redis_url, call_ms=2_000, connect_ms=2_000, pending_max=50_000)
    await redis.start()
    print("flushing", flush=True)
    await Flusher(redis, database_url, batch_max=16, every_ms=1).run()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
