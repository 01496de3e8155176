"""What becomes of swept sessions when Redis is lost and made anew: their owners, alive after all, are still due one
correction, within an hour of the sweep, and one that had arrived is not made twice."""

from __future__ import annotations

import msgspec
import pytest

from metering.keys import SHARDS
from metering.ledger import Corrected, Gone, NotCorrected, SessionRef
from metering.recovery import Recovery
from tests.support.recovering import LiveHold, Teller, agree, go_back, snapshot, teller, verified
from tests.support.stack import Stack

CREDIT = 100
HOUR_MS = 3_600_000


async def open_hold(stack: Stack, gateway: Teller) -> LiveHold:
    """A session of an account with 100 micros that holds 50 and has metered 20."""
    account = await stack.account("alice")
    await stack.grant(account, "g1", CREDIT)
    held = await gateway.hold(account, 50)
    await gateway.progress(held, 20)
    return held


async def sweep(stack: Stack, ref: SessionRef) -> None:
    """Its lease is over and a sweeper comes; its owner does not know yet."""
    await stack.redis.call("ZADD", SHARDS[ref.account.shard].leases, 1, f"{ref.account.id}|{ref.session}")
    (one,) = await stack.ledger.sweep_due(ref.account.shard, 5)
    assert (one.session, one.charged) == (ref.session, 20)


async def swept(stack: Stack, gateway: Teller) -> LiveHold:
    """Such a session, swept."""
    held = await open_hold(stack, gateway)
    await sweep(stack, held.ref)
    return held


async def lose_all(stack: Stack, gateway: Teller) -> None:
    """Postgres has everything, Redis loses everything, the gateway delivers what it knows, and Redis is made anew."""
    await stack.drained()
    recovery = await verified(stack)
    await stack.redis.call("FLUSHALL")
    await gateway.deliver()
    done = await recovery.recover()
    assert done is not None
    assert (done.held, done.settled, done.failed) == (0, 0, 0)


async def fields(stack: Stack, ref: SessionRef) -> dict[bytes, bytes]:
    """What Redis has of a session."""
    flat = await stack.redis.call("HGETALL", SHARDS[ref.account.shard].session + ref.session)
    return dict(zip(flat[::2], flat[1::2], strict=True))


async def consumed(stack: Stack) -> int:
    """Micros of the grant that Postgres says are spent."""
    return int(await stack.pool.fetchval("SELECT sum(amount) FROM consumption WHERE grant_id = 'g1'"))


async def test_a_session_swept_before_a_loss_is_corrected_after_it_once(stack: Stack) -> None:
    async with teller(stack) as gateway:
        ref = (await swept(stack, gateway)).ref
        await lose_all(stack, gateway)
        assert await gateway.ledger.settle(ref, 70, "completed") == Gone("final", 20)
        first = await gateway.ledger.correct(ref, 70, b"{}")
        assert first == Corrected(50, 0, CREDIT - 70, 1)
        assert await gateway.ledger.correct(ref, 90, b"{}") == msgspec.structs.replace(first, repeated=True)
        assert await gateway.ledger.settle(ref, 70, "completed") == Gone("final", 70)
        await agree(stack, {})
        assert await consumed(stack) == 70


async def test_a_correction_that_arrived_before_a_loss_is_answered_again_and_not_charged_again(stack: Stack) -> None:
    async with teller(stack) as gateway:
        ref = (await swept(stack, gateway)).ref
        first = await gateway.ledger.correct(ref, 130, b"{}")
        assert isinstance(first, Corrected)
        assert (first.charged, first.absorbed, first.available) == (80, 30, 0)
        before = await fields(stack, ref)
        await lose_all(stack, gateway)
        assert await fields(stack, ref) == before
        for charge in (130, 131, 900):
            again = await gateway.ledger.correct(ref, charge, b"{}")
            assert again == msgspec.structs.replace(first, repeated=True)
        assert await gateway.ledger.settle(ref, 130, "completed") == Gone("final", 100)
        await agree(stack, {})
        assert await consumed(stack) == CREDIT


@pytest.mark.parametrize("had", ["held", "swept"])
async def test_a_correction_that_only_postgres_still_has_is_not_charged_again(stack: Stack, had: str) -> None:
    """The server that goes on was a replica that is behind; the owner asks again, since its answer was lost."""
    async with teller(stack) as gateway:
        held = await open_hold(stack, gateway)
        past = await snapshot(stack.redis)
        await sweep(stack, held.ref)
        await stack.drained()
        past = past if had == "held" else await snapshot(stack.redis)
        first = await gateway.ledger.correct(held.ref, 70, b"{}")
        assert first == Corrected(50, 0, CREDIT - 70, 3)
        await stack.drained()
        await go_back(stack.redis, past)
        done = await Recovery(stack.redis, stack.database_url, pool=stack.pool).recover()
        assert done is not None
        assert await gateway.ledger.correct(held.ref, 70, b"{}") == msgspec.structs.replace(first, repeated=True)
        await agree(stack, {})
        assert await consumed(stack) == 70


async def test_a_swept_session_that_survived_is_corrected_after_its_shard_was_rebuilt(stack: Stack) -> None:
    """Its owner was told of the sweep, so no receipt of it is left; only Redis knows its fence."""
    async with teller(stack) as gateway:
        ref = (await swept(stack, gateway)).ref
        gateway.live.clear()
        await stack.drained()
        recovery = await verified(stack)
        assert await recovery.recover([ref.account.shard]) is not None
        assert await gateway.ledger.correct(ref, 70, b"{}") == Corrected(50, 0, CREDIT - 70, 1)
        await agree(stack, {})


async def test_the_hour_of_a_correction_begins_with_the_sweep_and_not_with_the_rebuild(stack: Stack) -> None:
    async with teller(stack) as gateway:
        ref = (await swept(stack, gateway)).ref
        keys = SHARDS[ref.account.shard]
        ended_ms = int(await stack.redis.call("HGET", keys.session + ref.session, "te"))
        await lose_all(stack, gateway)
        await stack.redis.call("HSET", keys.meta, "clk", ended_ms + HOUR_MS + 1)
        assert await gateway.ledger.correct(ref, 70, b"{}") == NotCorrected("late")
        await stack.redis.call("HSET", keys.meta, "clk", ended_ms + HOUR_MS)
        assert await gateway.ledger.correct(ref, 70, b"{}") == Corrected(50, 0, CREDIT - 70, 1)
        await agree(stack, {})
