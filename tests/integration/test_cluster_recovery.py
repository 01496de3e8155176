"""One primary of a Redis Cluster loses everything: its shards are made anew, and the others' go on as they were."""

from __future__ import annotations

import asyncio
from typing import cast

from metering import journal_store
from metering.keys import SHARDS
from metering.receipts import Receipts
from metering.recovery import Recovery
from metering.redis_ledger import RedisLedger
from storage.database import connect_pool
from storage.redis_client import RedisClient
from storage.redis_open import open_redis
from tests.support.recovering import Teller, agree
from tests.support.redis_cluster import clustered, shards_at
from tests.support.stack import Stack

OWNERS = 30


async def test_the_shards_of_a_primary_that_lost_everything_are_made_anew_and_no_others(ledger_database: str) -> None:
    manager = clustered()
    cluster = await asyncio.to_thread(manager.__enter__)
    pool = await connect_pool(ledger_database, size_max=6)
    client = await open_redis(cluster.url, call_ms=5_000, connect_ms=2_000, pending_max=10_000)
    redis, ledger = cast(RedisClient, client), RedisLedger(client)  # the stack needs what both clients have
    await ledger.init_shards(range(len(SHARDS)))
    await ledger.start()
    await journal_store.open_cursors(pool, await journal_store.shards_without_journal(pool))
    stack = Stack(ledger_database, cluster.url, pool, redis, ledger, cluster.nodes[1].server)
    gateway = Teller(stack, redis, ledger, Receipts("pv1", ledger.suspect))
    recovery = Recovery(client, ledger_database, pool=pool)
    try:
        await recovery.recover()
        accounts = [await stack.account(f"account-{number}") for number in range(OWNERS)]
        await asyncio.gather(*(stack.grant(each, f"g-{each.id}", 1_000) for each in accounts))
        await asyncio.gather(*(gateway.spend(each, 30) for each in accounts))
        await stack.drained()
        await asyncio.gather(*(gateway.spend(each, 20) for each in accounts))  # of the lost ones only receipts know
        held = [await gateway.hold(each, 100) for each in accounts]
        lost = shards_at(cluster, cluster.nodes[0])
        await cluster.nodes[0].ask("FLUSHALL")
        await gateway.deliver()
        done = await recovery.recover()
        assert done is not None
        assert list(done.shards) == lost
        theirs = sum(each.shard in lost for each in accounts)
        assert 0 < theirs < OWNERS
        assert (done.accounts, done.settled, done.held, done.failed) == (theirs, theirs, theirs, 0)
        assert {(await gateway.settle(each, 60)).charged for each in held} == {60}
        await agree(stack, gateway.told)
        assert (await recovery.look()).well
    finally:
        await stack.close()
        await asyncio.to_thread(manager.__exit__, None, None, None)
