"""Redis loses its state, or some of it: noticed, frozen, made anew, and nothing that was acknowledged is missing."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable

import pytest

from metering.keys import SHARDS
from metering.ledger import AccountRef, Gone, LedgerFrozen, Settled
from metering.rebuild import STEPS
from metering.recovery import Recovery
from metering.server_check import VERIFIED_KEY
from tests.support.recovering import Teller, agree, go_back, log_end, snapshot, teller, verified
from tests.support.stack import Stack, eventually

CREDIT = 10**9


async def accounts(stack: Stack, count: int = 4) -> list[AccountRef]:
    """Accounts with credit."""
    made = [await stack.account(f"account-{number}") for number in range(count)]
    for account in made:
        await stack.grant(account, f"g-{account.id}", CREDIT)
    return made


async def test_a_restart_with_its_log_intact_goes_on_without_a_rebuild(stack: Stack) -> None:
    (account, *_) = await accounts(stack)
    recovery = await verified(stack)
    async with teller(stack, keeping=True) as gateway:
        await gateway.spend(account, 70)
        held = await gateway.hold(account, 50)
        await killed(stack, gateway)
        stack.server.start()
        await eventually(_connected(stack, gateway, True))
        with pytest.raises(LedgerFrozen):
            await gateway.ledger.balance(account)
        assert not recovery.fit()
        began = time.monotonic()
        assert await recovery.recover() is None
        assert time.monotonic() - began < 2
        assert (await gateway.settle(held, 30)).entry == 3
        assert await stack.redis.call("HGET", SHARDS[account.shard].meta, "ep") == b"1"
        await agree(stack, gateway.told)


async def killed(stack: Stack, gateway: Teller) -> None:
    """The server is gone, and both connections know."""
    stack.server.kill()
    await eventually(_connected(stack, gateway, False))


def _connected(stack: Stack, gateway: Teller, so: bool) -> Callable[[], Awaitable[bool]]:
    async def both() -> bool:
        return stack.redis.connected == gateway.redis.connected == so

    return both


async def test_everything_wiped_under_load_comes_back_and_nothing_acknowledged_is_missing(stack: Stack) -> None:
    owners = await accounts(stack)
    recovery = await verified(stack)
    flusher = stack.flusher()
    recovery.stopped = flusher.stopped
    watching = [asyncio.create_task(recovery.run()), asyncio.create_task(flusher.run())]
    try:
        async with teller(stack, keeping=True) as gateway:
            held = await gateway.hold(owners[0], 500)
            await gateway.progress(held, 100)

            async def spend(account: AccountRef) -> None:
                for _ in range(60):
                    await gateway.spend(account, random.randint(1, 1_000))

            load = [asyncio.create_task(spend(account)) for account in owners for _ in range(2)]
            await eventually(lambda: _told(gateway, 100))
            await stack.redis.call("FLUSHALL")
            began = time.monotonic()
            await asyncio.gather(*load)
            assert time.monotonic() - began < 10
            await gateway.progress(held, 200)
            assert (await gateway.settle(held, 300)).charged == 300
            assert len(gateway.told) == 8 * 60 + 1
    finally:
        for task in watching:
            task.cancel()
        await asyncio.wait(watching)
    again = Recovery(stack.redis, stack.database_url)
    assert (await again.look()).well
    await again.aclose()
    await agree(stack, gateway.told)


async def _told(gateway: Teller, count: int) -> bool:
    return len(gateway.told) >= count


async def test_a_log_whose_end_is_cut_off_is_noticed_and_its_settlements_come_back(stack: Stack) -> None:
    (account, *_) = await accounts(stack)
    recovery = await verified(stack)
    async with teller(stack, keeping=True) as gateway:
        await stack.redis.call("CONFIG", "SET", "appendfsync", "always")
        await gateway.spend(account, 70)
        file, size = log_end(stack.server.socket.parent)
        held = await gateway.hold(account, 50)
        for _ in range(5):
            await gateway.spend(account, 11)
        await killed(stack, gateway)
        with file.open("r+b") as log:
            log.truncate(size)
        stack.server.start()
        await eventually(_connected(stack, gateway, True))
        done = await recovery.recover()
        assert done is not None
        assert (done.shards, done.settled, done.held, done.failed) == ((account.shard,), 5, 1, 0)
        assert (await gateway.settle(held, 30)).charged == 30
        await agree(stack, gateway.told)


async def test_a_fork_that_reuses_numbers_gives_up_no_session_of_either_history(stack: Stack) -> None:
    """Postgres has entries that the promoted server lacks; meanwhile that one has made others of the same numbers."""
    (account, *_) = await accounts(stack)
    await verified(stack)
    async with teller(stack) as old, teller(stack, name="gateway-2") as new:
        await old.spend(account, 10)
        past = await snapshot(stack.redis)
        for _ in range(3):
            await old.spend(account, 20)
        await stack.drained()
        await old.spend(account, 40)  # acknowledged, neither in Postgres nor on the replica
        await go_back(stack.redis, past)
        await stack.redis.call("DEL", VERIFIED_KEY)
        for _ in range(6):
            await new.spend(account, 3)
        await old.deliver()
        done = await Recovery(stack.redis, stack.database_url, pool=stack.pool).recover([account.shard])
        assert done is not None
        assert done.failed == 0
        await agree(stack, old.told | new.told)
        assert (await new.ledger.balance(account)).available == CREDIT - 10 - 3 * 20 - 40 - 6 * 3


class Killed(Exception):
    """The process ends here."""


@pytest.mark.parametrize("step", STEPS)
async def test_a_rebuild_that_is_killed_at_any_step_is_gone_on_with(stack: Stack, step: str) -> None:
    (account, other, *_) = await accounts(stack)
    await verified(stack)
    async with teller(stack) as gateway:
        await gateway.spend(account, 10)
        await stack.drained()
        for each in (account, other):
            await gateway.spend(each, 20)
        held = await gateway.hold(account, 100)
        await gateway.progress(held, 60)
        survivor = await gateway.hold(other, 100)
        del gateway.live[survivor.ref.session]  # its gateway is gone: only Redis knows of it
        await stack.redis.call("HSET", SHARDS[account.shard].meta, "n", 1)
        await gateway.deliver()

        def die(now: str) -> None:
            if now == step:
                raise Killed

        shards = [account.shard, other.shard]
        with pytest.raises(Killed):
            await Recovery(stack.redis, stack.database_url, pool=stack.pool, on_step=die).recover(shards)
        with pytest.raises(LedgerFrozen):
            await gateway.ledger.balance(account)
        done = await Recovery(stack.redis, stack.database_url, pool=stack.pool).recover()
        assert done is not None
        assert {account.shard} <= set(done.shards) <= set(shards)
        assert (await gateway.settle(held, 90)).charged == 90
        assert isinstance(await gateway.ledger.settle(survivor.ref, 1, "completed"), Settled)
        await agree(stack, gateway.told)


async def test_fifty_random_losses_with_receipts_lose_nothing_and_change_nothing(stack: Stack) -> None:
    owners = await accounts(stack, 3)
    await verified(stack)
    async with teller(stack) as gateway:
        dice, rebuilt = random.Random(20_260), 0
        for trial in range(50):
            await _lose(stack, gateway, owners, dice)
            await gateway.deliver()
            recovery = Recovery(stack.redis, stack.database_url, pool=stack.pool)
            rebuilt += await recovery.recover() is not None
            while len(gateway.live) > 2:
                held = gateway.live[next(iter(gateway.live))]
                charge = dice.randint(held.metered, held.held)
                assert (await gateway.settle(held, charge)).charged == charge, trial
            if trial % 10 == 9:
                await agree(stack, gateway.told)
        assert rebuilt >= 25, "the losses were too small to be any"
        for held in list(gateway.live.values()):
            await gateway.settle(held, held.metered)
        await agree(stack, gateway.told)
        balances = [await gateway.ledger.balance(account) for account in owners]
        assert sum(CREDIT - each.available for each in balances) == sum(gateway.told.values())
        assert [(each.held, each.sessions, each.debt) for each in balances] == [(0, 0, 0)] * 3


async def _lose(stack: Stack, gateway: Teller, owners: list[AccountRef], dice: random.Random) -> None:
    """Some work, a snapshot somewhere in it, a flush of a part somewhere else, and back to the snapshot or nothing."""
    steps = dice.randint(4, 10)
    taken, flushed = dice.randrange(steps), dice.randrange(steps + 3)
    past = await snapshot(stack.redis)
    flusher = stack.flusher(batch_max=dice.choice((1, 2, 2_000)))
    for step in range(steps):
        if step == taken:
            past = await snapshot(stack.redis)
        if step == flushed:
            await flusher.round()
        account = dice.choice(owners)
        kind = dice.random()
        if kind < 0.55:
            await gateway.spend(account, dice.randint(0, 500))
        elif kind < 0.8 or not gateway.live:
            await gateway.hold(account, dice.randint(1, 500))
        else:
            held = dice.choice(list(gateway.live.values()))
            await gateway.progress(held, dice.randint(held.metered, held.held))
    await flusher.aclose()
    if dice.random() < 0.2:
        await stack.redis.call("FLUSHALL")
    else:
        await go_back(stack.redis, past)


async def test_receipts_that_come_after_the_shard_was_opened_are_taken_up(stack: Stack) -> None:
    (account, *_) = await accounts(stack)
    recovery = await verified(stack)
    async with teller(stack) as late:
        await late.spend(account, 70)
        held = await late.hold(account, 100)
        await stack.redis.call("FLUSHALL")
        done = await recovery.recover()
        assert done is not None
        assert (done.settled, done.held) == (0, 0)
        assert isinstance(await late.ledger.settle(held.ref, 1, "completed"), Gone)
        await late.deliver()
        assert await recovery._rebuilder(stack.pool).late() == 2
        assert (await late.settle(held, 30)).charged == 30
        await agree(stack, late.told)


async def test_a_repeat_of_a_settlement_that_arrived_before_the_loss_is_answered_once(stack: Stack) -> None:
    (account, *_) = await accounts(stack)
    recovery = await verified(stack)
    async with teller(stack) as gateway:
        held = await gateway.hold(account, 100)
        gateway.receipts.owed(held.ref, 60, "completed", b"{}")
        await gateway.ledger.settle(held.ref, 60, "completed")  # its answer is lost on the way
        await stack.drained()
        await stack.redis.call("FLUSHALL")
        await gateway.deliver()
        await recovery.recover()
        again = await gateway.settle(held, 60)
        assert (again.charged, again.repeated) == (60, True)
        await agree(stack, gateway.told)


async def test_a_hold_that_its_shard_has_forgotten_freezes_the_shard_until_it_is_rebuilt(stack: Stack) -> None:
    (account, *_) = await accounts(stack)
    recovery = await verified(stack)
    async with teller(stack, keeping=True) as gateway:
        held = await gateway.hold(account, 100)
        shard = SHARDS[account.shard]
        await stack.redis.call("DEL", shard.session + held.ref.session)
        settling = asyncio.create_task(gateway.settle(held, 60))

        async def frozen() -> bool:
            return bool(await stack.redis.call("HGET", shard.meta, "ep") == b"-1")

        await eventually(frozen)
        done = await recovery.recover()
        assert done is not None
        assert done.shards == (account.shard,)
        assert (await settling).charged == 60
        await agree(stack, gateway.told)


async def test_an_entry_number_that_goes_back_freezes_the_shard(stack: Stack) -> None:
    (account, *_) = await accounts(stack)
    recovery = await verified(stack)
    async with teller(stack, keeping=True) as gateway:
        past = await snapshot(stack.redis)
        for _ in range(3):
            await gateway.spend(account, 10)
        await go_back(stack.redis, past)
        await stack.redis.call("DEL", VERIFIED_KEY)  # nobody noticed that it is another server
        await gateway.spend(account, 5)

        async def frozen() -> bool:
            return bool(await stack.redis.call("HGET", SHARDS[account.shard].meta, "ep") == b"-1")

        await eventually(frozen)
        done = await recovery.recover()
        assert done is not None
        assert account.shard in done.shards
        await agree(stack, gateway.told)
