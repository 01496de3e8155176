"""A replica is promoted while the old primary goes on: two servers with one history, and two ends of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from metering.keys import SHARDS
from metering.ledger import AccountRef, LedgerFrozen
from metering.recovery import Recovery
from tests.support.recovering import agree, teller, verified
from tests.support.replicas import Pair, connected, replicated
from tests.support.stack import Stack, eventually, open_stack

CREDIT = 10**6


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A primary with its replica."""
    with replicated() as made:
        yield made


@asynccontextmanager
async def stack_on(database_url: str, pair: Pair, *, promoted: bool) -> AsyncIterator[Stack]:
    """The stack of a gateway that uses one of the two servers."""
    made = await open_stack(database_url, pair.replica if promoted else pair.primary, lease_ms=15_000)
    try:
        yield made
    finally:
        await made.close()


async def promoted(pair: Pair) -> None:
    """The replica has everything, and is a primary from now on."""
    await pair.following()
    async with connected(pair.replica) as client:
        await client.call("REPLICAOF", "NO", "ONE")


async def account(stack: Stack, name: str) -> AccountRef:
    """An account with credit."""
    made = await stack.account(name)
    await stack.grant(made, f"g-{made.id}", CREDIT)
    return made


async def test_what_both_ends_of_a_forked_history_acknowledged_arrives_whoever_flushes_first(
    ledger_database: str, pair: Pair
) -> None:
    async with stack_on(ledger_database, pair, promoted=False) as old:
        payer = await account(old, "payer")
        await verified(old)
        flusher = old.flusher()
        await flusher.drain()
        await promoted(pair)
        async with stack_on(ledger_database, pair, promoted=True) as new:
            recovery = await verified(new)
            async with teller(old, name="behind") as behind, teller(new, name="ahead") as ahead:
                for charge in (11, 12, 13):
                    await behind.spend(payer, charge)
                await flusher.drain()
                for charge in (21, 22, 23):
                    await ahead.spend(payer, charge)
                await new.flusher().drain()
                await behind.deliver()  # as a gateway does once it has been led to the new primary
                await recovery._rebuilder(new.pool).late()
                assert len(behind.told) == len(ahead.told) == 3
                await agree(new, behind.told | ahead.told)


async def test_a_promoted_replica_that_is_whole_goes_on_in_a_new_epoch_with_its_holds(
    ledger_database: str, pair: Pair
) -> None:
    async with stack_on(ledger_database, pair, promoted=False) as old:
        payer = await account(old, "payer")
        await verified(old)
        async with teller(old, name="behind") as behind:
            await behind.spend(payer, 70)
            held = await behind.hold(payer, 500)
            await promoted(pair)
            async with stack_on(ledger_database, pair, promoted=True) as new, teller(new, name="ahead") as ahead:
                with pytest.raises(LedgerFrozen):
                    await ahead.ledger.balance(payer)
                recovery = Recovery(new.redis, new.database_url, pool=new.pool)
                assert await recovery.recover() is None  # nothing was lost, so nothing is rebuilt
                assert recovery.fit()
                meta = SHARDS[payer.shard].meta
                assert await new.redis.call("HMGET", meta, "ep", "n", "was") == [b"2", b"0", None]
                ahead.live[held.ref.session] = held
                assert (await ahead.settle(held, 300)).entry == 1
                cursor = await new.pool.fetchrow("SELECT ep, n FROM shard_cursor WHERE shard = $1", payer.shard)
                assert tuple(cursor) == (2, 0)
                await agree(new, behind.told | ahead.told)


async def test_a_recovery_that_was_killed_between_both_epochs_ends_in_a_rebuild(
    ledger_database: str, pair: Pair
) -> None:
    async with stack_on(ledger_database, pair, promoted=False) as old:
        payer = await account(old, "payer")
        await verified(old)
        async with teller(old, name="behind") as behind:
            await behind.spend(payer, 70)
            await old.flusher().drain()
            await promoted(pair)
            async with stack_on(ledger_database, pair, promoted=True) as new:
                await new.pool.execute("UPDATE shard_cursor SET ep = 2, n = 0")
                done = await Recovery(new.redis, new.database_url, pool=new.pool).recover()
                assert done is not None
                assert payer.shard in done.shards

                async def open_again() -> bool:
                    return bool(await new.redis.call("HMGET", SHARDS[payer.shard].meta, "ep", "fz") == [b"3", None])

                await eventually(open_again)
                await agree(new, behind.told)


async def test_a_shard_that_postgres_has_passed_gets_no_new_epoch_and_stays_frozen(stack: Stack) -> None:
    payer, other = await account(stack, "payer"), await account(stack, "other")
    assert payer.shard != other.shard
    recovery = await verified(stack)
    await stack.drained()
    await stack.pool.execute("UPDATE shard_cursor SET n = n + 1 WHERE shard = $1", payer.shard)
    passed = await recovery._rebuilder(stack.pool).renew([payer.shard, other.shard])
    assert passed == [payer.shard]
    metas = [await stack.redis.call("HMGET", SHARDS[one.shard].meta, "ep", "n", "was") for one in (payer, other)]
    assert metas == [[b"-1", b"1", b"1"], [b"2", b"0", None]]
