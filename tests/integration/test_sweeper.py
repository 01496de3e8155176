"""Sessions whose owner died are settled at what they last metered, once, by any number of sweepers."""

from __future__ import annotations

import asyncio

import pytest

from metering.keys import SHARDS
from metering.ledger import Gone, Progressed, Swept
from metering.reconcile import audit
from metering.sweeper import BATCH, Sweeper
from tests.support.stack import Stack, eventually


async def expire_leases(stack: Stack, shard: int) -> None:
    """Move every lease of the shard into the past."""
    members = await stack.redis.call("ZRANGE", SHARDS[shard].leases, "0", "-1")
    for member in members:
        await stack.redis.call("ZADD", SHARDS[shard].leases, "1", member)


async def test_an_abandoned_session_is_charged_what_it_metered_and_the_rest_returns(stack: Stack) -> None:
    account = await stack.account("alice")
    await stack.grant(account, "g1", 1_000)
    ref = await stack.hold(account, 100)
    assert isinstance(await stack.ledger.progress(ref, 1, 42, 100), Progressed)
    await expire_leases(stack, account.shard)
    seen: list[Swept] = []
    sweeper = Sweeper(stack.ledger, on_swept=seen.append)
    assert await sweeper.sweep_once() == 1
    assert [(one.session, one.account, one.charged) for one in seen] == [(ref.session, account, 42)]
    balance = await stack.ledger.balance(account)
    assert (balance.available, balance.held, balance.sessions) == (958, 0, 0)
    assert await stack.ledger.settle(ref, 90, "completed") == Gone("final", 42)
    await stack.drained()
    assert await stack.pool.fetchval("SELECT outcome FROM session WHERE sid = $1", ref.session) == "swept"
    assert (await audit(stack.pool, stack.ledger, stack.redis)).ok


async def test_a_session_with_a_running_lease_is_left_alone(stack: Stack) -> None:
    account = await stack.account("alice")
    await stack.grant(account, "g1", 1_000)
    await stack.hold(account, 100)
    members = await stack.redis.call("ZRANGE", SHARDS[account.shard].leases, "0", "-1")
    await stack.redis.call("ZADD", SHARDS[account.shard].leases, "99999999999999", members[0])
    assert await Sweeper(stack.ledger).sweep_once() == 0
    assert (await stack.ledger.balance(account)).held == 100


async def test_competing_sweepers_end_each_session_once(stack: Stack) -> None:
    account = await stack.account("alice")
    await stack.grant(account, "g1", 10**6)
    count = BATCH * 2 + 7
    await asyncio.gather(*(stack.hold(account, 10) for _ in range(count)))
    await expire_leases(stack, account.shard)
    sweepers = [Sweeper(stack.ledger) for _ in range(3)]

    async def empty() -> bool:
        await asyncio.gather(*(sweeper.sweep_once() for sweeper in sweepers))
        return (await stack.ledger.balance(account)).sessions == 0

    await eventually(empty)
    assert sum(sweeper.swept for sweeper in sweepers) == count
    await stack.drained()
    assert await stack.pool.fetchval("SELECT count(*) FROM session") == count
    assert (await audit(stack.pool, stack.ledger, stack.redis)).ok


async def test_one_pass_takes_more_than_one_batch(stack: Stack) -> None:
    account = await stack.account("alice")
    await stack.grant(account, "g1", 10**6)
    await asyncio.gather(*(stack.hold(account, 10) for _ in range(BATCH + 1)))
    await expire_leases(stack, account.shard)
    assert await Sweeper(stack.ledger).sweep_once() == BATCH + 1


async def test_the_loop_sweeps_and_survives_a_frozen_shard_and_lost_redis(stack: Stack) -> None:
    account = await stack.account("alice")
    await stack.grant(account, "g1", 1_000)
    frozen = (account.shard + 1) % 128
    await stack.redis.call("HSET", SHARDS[frozen].meta, "ep", "9")
    sweeper = Sweeper(stack.ledger, every_ms=10)
    running = asyncio.create_task(sweeper.run())
    await stack.hold(account, 100)

    async def swept() -> bool:
        return sweeper.swept == 1

    async def failed() -> bool:
        return sweeper.failures > 256

    await eventually(swept)
    stack.server.kill()
    await eventually(failed)
    stack.server.start()
    assert not running.done()
    running.cancel()
    await asyncio.wait([running])


async def test_trouble_of_many_shards_is_one_line_when_it_comes_and_one_when_it_goes(
    stack: Stack, caplog: pytest.LogCaptureFixture
) -> None:
    sweeper = Sweeper(stack.ledger)

    async def lines() -> list[str]:
        """What two passes say: the second one nothing, while all stays as it is."""
        caplog.clear()
        await sweeper.sweep_once()
        await sweeper.sweep_once()
        return [record.getMessage() for record in caplog.records if record.name == "metering.sweeper"]

    assert await lines() == []
    shards = [SHARDS[number] for number in (*range(100), 110)]
    for shard in shards:
        await stack.redis.call("HSET", shard.meta, "ep", "-1")
    (frozen,) = await lines()
    assert frozen.startswith("sweeper: 101 shards not swept: LedgerFrozen: ")
    for shard in shards[:-1]:
        await stack.redis.call("HSET", shard.meta, "ep", "1")
    assert await lines() == ["sweeper: 100 shards swept again"]
    await stack.redis.call("HSET", shards[-1].meta, "ep", "1")
    assert await lines() == ["sweeper: 1 shard (110) swept again"]
    stack.server.kill()
    (away,) = await lines()
    assert away.startswith("sweeper: 128 shards not swept: LedgerUnavailable: ")
    stack.server.start()

    async def connected() -> bool:
        return stack.redis.connected

    await eventually(connected)
    assert await lines() == ["sweeper: 128 shards swept again"]
