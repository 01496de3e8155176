"""What becomes of grants when Redis is lost and made anew: revoked and expired ones whose credit sessions held, and the
marks by which a repeated change is known."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from metering import policies
from metering.expirer import Expirer
from metering.grant_changes import NewAdjustment, NewRevocation, adjust, revoke
from metering.grants import NewGrant, issue
from metering.keys import SHARDS
from metering.ledger import AccountRef, GrantState
from metering.lost_holds import KEY
from metering.rebuild import Rebuilt
from metering.recovery import Recovery
from tests.support.recovering import Teller, agree, teller, verified
from tests.support.stack import Stack, eventually

LOST_AND_KNOWN = [([60, 30], []), ([30], [60]), ([], [60, 30])]


async def rebuilt(stack: Stack, gateway: Teller, recovery: Recovery) -> Rebuilt:
    """Postgres has everything, Redis loses everything, and the gateway delivers what it knows."""
    await stack.drained()
    await stack.redis.call("FLUSHALL")
    await gateway.deliver()
    done = await recovery.recover()
    assert done is not None
    assert done.failed == 0
    return done


async def grant_of(stack: Stack, account: AccountRef, gid: str = "g1") -> GrantState:
    return (await stack.ledger.snapshot(account)).grants[gid]


async def held_grant(stack: Stack, gateway: Teller, lost: list[int], known: list[int]) -> AccountRef:
    """Of a grant of 100 (and another of 1,000) sessions hold these amounts; the gateways of the lost ones are gone."""
    account = await stack.account("alice")
    await issue(stack.pool, stack.ledger, NewGrant("g1", "alice", 100, 10))
    await stack.grant(account, "g2", 1_000)
    for want in lost:
        del gateway.live[(await gateway.hold(account, want)).ref.session]
    for want in known:
        await gateway.hold(account, want)
    return account


@pytest.mark.parametrize(("lost", "known"), LOST_AND_KNOWN)
async def test_what_lost_holds_had_of_a_revoked_grant_is_voided_and_what_is_held_again_is_not(
    stack: Stack, lost: list[int], known: list[int]
) -> None:
    recovery = await verified(stack)
    async with teller(stack) as gateway:
        account = await held_grant(stack, gateway, lost, known)
        await revoke(stack.pool, stack.ledger, NewRevocation("r1", "g1"))
        done = await rebuilt(stack, gateway, recovery)
        assert (done.held, done.voided) == (len(known), sum(lost))
        grant = await grant_of(stack, account)
        assert (grant.available, grant.held, grant.voided, grant.revoked) == (0, sum(known), 100 - sum(known), True)
        balance = await stack.ledger.balance(account)
        assert (balance.available, balance.held, balance.sessions) == (1_000, sum(known), len(known))
        await agree(stack, gateway.told)
        for held in list(gateway.live.values()):
            await gateway.settle(held, 25)
        spent = 25 * len(known)
        grant = await grant_of(stack, account)
        assert (grant.held, grant.consumed, grant.voided) == (0, spent, 100 - spent)
        assert (await stack.ledger.balance(account)).available == 1_000
        await agree(stack, gateway.told)
    issuance = await stack.pool.fetchval("SELECT sum(amount) FROM posting WHERE ledger = 'issuance'")
    assert issuance == -1_100 + 100 - spent
    stand_ins = await stack.pool.fetch("SELECT outcome, charged FROM session WHERE key_id = $1", KEY)
    assert [tuple(row) for row in stand_ins] == [("void", 0)] * bool(lost)


async def expire(stack: Stack, account: AccountRef, moment_ms: int) -> None:
    """The grant's end was at this moment all along, in both stores; its time comes."""
    keys = SHARDS[account.shard]
    await stack.redis.call("HSET", keys.grants + account.id, "g1:e", moment_ms)
    await stack.redis.call("ZADD", keys.expiries, moment_ms, f"{account.id}|g1")
    moment = datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=moment_ms)
    await stack.pool.execute("UPDATE grant_ SET expires_at = $1 WHERE id = 'g1'", moment)

    async def expired() -> bool:
        return await Expirer(stack.ledger).expire_once() == 1

    await eventually(expired)


@pytest.mark.parametrize("step", ["void", "open"])
async def test_a_rebuild_that_dies_about_its_voids_voids_once(stack: Stack, step: str) -> None:
    recovery = await verified(stack)
    async with teller(stack) as gateway:
        account = await held_grant(stack, gateway, [60], [])
        await revoke(stack.pool, stack.ledger, NewRevocation("r1", "g1"))

        def die(now: str) -> None:
            if now == step:
                raise InterruptedError

        dying = Recovery(stack.redis, stack.database_url, pool=stack.pool, on_step=die)
        with pytest.raises(InterruptedError):
            await rebuilt(stack, gateway, dying)
        done = await recovery.recover()
        assert done is not None
        assert (done.held, done.voided) == (0, 60 if step == "void" else 0)
        assert (await grant_of(stack, account)).voided == 100
        await agree(stack, gateway.told)


async def test_who_stands_in_for_lost_holds_is_not_held_again(stack: Stack) -> None:
    """The rebuild before died between its hold and its void."""
    recovery = await verified(stack)
    async with teller(stack) as gateway:
        account = await held_grant(stack, gateway, [60], [])
        await revoke(stack.pool, stack.ledger, NewRevocation("r1", "g1"))
        await stack.drained()
        keys = SHARDS[account.shard]
        (name,) = await stack.redis.call("KEYS", f"{keys.session}*")
        await stack.redis.call("HSET", name, "k", KEY)
        done = await recovery.recover([account.shard])
        assert done is not None
        assert (done.held, done.voided) == (0, 60)
        await agree(stack, gateway.told)


@pytest.mark.parametrize(("lost", "known"), LOST_AND_KNOWN)
async def test_what_lost_holds_had_of_an_expired_grant_breaks(stack: Stack, lost: list[int], known: list[int]) -> None:
    recovery = await verified(stack)
    async with teller(stack) as gateway:
        account = await held_grant(stack, gateway, lost, known)
        now = await stack.redis.call("HGET", SHARDS[account.shard].meta, "clk")
        await expire(stack, account, int(now) + 1)
        assert (await grant_of(stack, account)).expired == 10
        done = await rebuilt(stack, gateway, recovery)
        assert (done.held, done.voided) == (len(known), 0)
        assert await Expirer(stack.ledger).expire_once() == bool(lost)
        grant = await grant_of(stack, account)
        assert (grant.available, grant.held, grant.expired) == (0, sum(known), 100 - sum(known))
        await agree(stack, gateway.told)
        for held in list(gateway.live.values()):
            await gateway.settle(held, 25)
        spent = 25 * len(known)
        grant = await grant_of(stack, account)
        assert (grant.held, grant.consumed, grant.expired) == (0, spent, 100 - spent)
        assert (await stack.ledger.balance(account)).available == 1_000
        await agree(stack, gateway.told)


async def test_changes_that_were_applied_are_known_again_and_not_repeated(stack: Stack) -> None:
    recovery = await verified(stack)
    async with teller(stack) as gateway:
        owners = [await stack.account(name) for name in ("alice", "bob", "carol")]
        for owner in owners:
            for number in (1, 2):
                await stack.grant(owner, f"{owner.id}-{number}", 100)
        changes = NewRevocation("r1", "alice-1"), NewAdjustment("j1", "alice", 30)
        before = await revoke(stack.pool, stack.ledger, changes[0]), await adjust(stack.pool, stack.ledger, changes[1])
        await policies.change(stack.pool, stack.ledger, "bob", "postpaid", 500)
        await gateway.spend(owners[1], 250)
        seen = [await stack.ledger.snapshot(owner) for owner in owners]
        done = await rebuilt(stack, gateway, recovery)
        assert (done.accounts, done.voided) == (3, 0)
        again = [await stack.ledger.snapshot(owner) for owner in owners]
        assert [one.grants for one in again] == [one.grants for one in seen]
        assert [one.balance for one in again] == [one.balance for one in seen]
        assert [[gid for gid in one.burn_order if one.grants[gid].available] for one in again] == [
            ["alice-2"], [], ["carol-1", "carol-2"],
        ]  # fmt: skip
        repeats = revoke(stack.pool, stack.ledger, changes[0]), adjust(stack.pool, stack.ledger, changes[1])
        assert [(one.state, one.amount) for one in await asyncio.gather(*repeats)] == [
            (one.state, one.amount) for one in before
        ]
        assert (await stack.ledger.balance(owners[0])).available == 70
        await agree(stack, gateway.told)


async def test_what_lost_holds_had_of_a_debtors_grants_repays_the_debt(stack: Stack) -> None:
    recovery = await verified(stack)
    async with teller(stack) as gateway:
        account = await stack.account("alice")
        await issue(stack.pool, stack.ledger, NewGrant("g1", "alice", 100, 10))
        await policies.change(stack.pool, stack.ledger, "alice", "postpaid", 50)
        lost = await gateway.hold(account, 100)  # all of the grant; its gateway dies with Redis
        del gateway.live[lost.ref.session]
        await gateway.settle(await gateway.hold(account, 50), 50)  # on the line
        await rebuilt(stack, gateway, recovery)
        now = await stack.ledger.balance(account)
        assert (now.available, now.debt) == (50, 0)
        await agree(stack, gateway.told)
        await gateway.settle(await gateway.hold(account, 1), 1)
