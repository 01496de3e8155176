"""A grant is written first and applied once, however often it is tried and whatever fails in between."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from metering.grants import Applied, GrantError, Issued, NewGrant, apply_pending, issue, to_ms
from metering.ledger import AccountRef
from metering.reconcile import audit
from storage.redis_client import RedisError
from tests.support.stack import Stack, eventually


async def available(stack: Stack, account: AccountRef) -> int:
    return (await stack.ledger.balance(account)).available


async def clean(stack: Stack) -> bool:
    await stack.drained()
    report = await audit(stack.pool, stack.ledger, stack.redis, wait_s=1)
    return report.ok and report.pending_grants == ()


async def test_a_grant_is_usable_at_once_and_confirmed_by_the_journal(stack: Stack) -> None:
    account = await stack.account("alice")
    assert await issue(stack.pool, stack.ledger, NewGrant("g1", "alice", 100)) == Issued("g1", "applied", available=100)
    assert await stack.pool.fetchval("SELECT applied_n FROM grant_") is None
    assert await clean(stack)
    assert tuple(await stack.pool.fetchrow("SELECT applied_epoch, applied_n FROM grant_")) == (1, 1)
    assert await available(stack, account) == 100


async def test_repeating_a_grant_gives_nothing_more(stack: Stack) -> None:
    account = await stack.account("alice")
    grant = NewGrant("g1", "alice", 100, expires_at=datetime(2100, 1, 1, 0, 0, 0, 123_456, tzinfo=UTC))
    answers = await asyncio.gather(*(issue(stack.pool, stack.ledger, grant) for _ in range(6)))
    assert {answer.state for answer in answers} == {"applied"}
    assert await available(stack, account) == 100
    assert await clean(stack)


@pytest.mark.parametrize(
    "other",
    [
        NewGrant("g1", "alice", 101), NewGrant("g1", "bob", 100), NewGrant("g1", "alice", 100, priority=1),
        NewGrant("g1", "alice", 100, expires_at=datetime(2100, 1, 1, tzinfo=UTC)),
    ],
)  # fmt: skip
async def test_an_id_stands_for_one_grant_only(stack: Stack, other: NewGrant) -> None:
    account, _ = await stack.account("alice"), await stack.account("bob")
    await issue(stack.pool, stack.ledger, NewGrant("g1", "alice", 100))
    with pytest.raises(GrantError, match="other values"):
        await issue(stack.pool, stack.ledger, other)
    assert await available(stack, account) == 100


@pytest.mark.parametrize(
    ("grant", "words"),
    [
        (NewGrant("g1", "nobody", 100), "there is none"),
        (NewGrant("g1", "alice", 0), "amount"),
        (NewGrant("g1", "alice", 2**53), "amount"),
        (NewGrant("g1", "alice", 1, priority=100), "priority"),
        (NewGrant("g|1", "alice", 1), "id"),
        (NewGrant("g1", "alice", 1, expires_at=datetime(2020, 1, 1, tzinfo=UTC)), "expires_at"),
        (NewGrant("g1", "alice", 1, expires_at=datetime(2100, 1, 1)), "time zone"),
    ],
)
async def test_a_bad_grant_is_not_written(stack: Stack, grant: NewGrant, words: str) -> None:
    await stack.account("alice")
    with pytest.raises(GrantError, match=words):
        await issue(stack.pool, stack.ledger, grant)
    assert await stack.pool.fetchval("SELECT count(*) FROM grant_") == 0


async def test_a_grant_made_while_redis_is_away_is_applied_later(stack: Stack) -> None:
    account = await stack.account("alice")
    stack.server.kill()
    issued = await issue(stack.pool, stack.ledger, NewGrant("g1", "alice", 100))
    assert (issued.id, issued.state) == ("g1", "waiting")
    stack.server.start()

    async def back() -> bool:
        try:
            return bool(await stack.redis.call("PING"))
        except RedisError:
            return False

    await eventually(back)
    assert await apply_pending(stack.pool, stack.ledger) == Applied(1)
    assert await apply_pending(stack.pool, stack.ledger) == Applied(1)
    assert await available(stack, account) == 100
    assert await clean(stack)
    assert await apply_pending(stack.pool, stack.ledger) == Applied(0)


async def test_a_grant_enters_redis_when_it_becomes_effective(stack: Stack) -> None:
    account = await stack.account("alice")
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    issued = await issue(stack.pool, stack.ledger, NewGrant("g1", "alice", 100, effective_at=tomorrow))
    assert (issued.state, issued.reason) == ("waiting", "not yet effective")
    assert await apply_pending(stack.pool, stack.ledger) == Applied(0)
    assert await available(stack, account) == 0
    await stack.pool.execute("UPDATE grant_ SET effective_at = now()")
    assert await apply_pending(stack.pool, stack.ledger) == Applied(1)
    assert await available(stack, account) == 100


async def test_the_sixty_fifth_open_grant_waits_until_one_is_spent(stack: Stack) -> None:
    account = await stack.account("alice")
    for number in range(64):
        await stack.grant(account, f"g{number:02d}", 10)
    issued = await issue(stack.pool, stack.ledger, NewGrant("late", "alice", 10))
    assert (issued.state, issued.reason) == ("waiting", "64 grants are open")
    await stack.drained()
    assert await apply_pending(stack.pool, stack.ledger) == Applied(0, {"late": "64 grants are open"})
    await stack.spend(account, 10, 10)
    assert await apply_pending(stack.pool, stack.ledger) == Applied(1)
    assert await available(stack, account) == 640
    assert await clean(stack)


async def test_appliers_at_the_same_time_give_each_grant_once(stack: Stack) -> None:
    account = await stack.account("alice")
    for number in range(40):
        await stack.pool.execute("INSERT INTO grant_ (id, account_id, amount) VALUES ($1, 'alice', 5)", f"g{number}")
    await asyncio.gather(*(apply_pending(stack.pool, stack.ledger) for _ in range(3)))
    assert await available(stack, account) == 200
    assert await clean(stack)


def test_times_are_counted_in_whole_milliseconds() -> None:
    assert to_ms(datetime(1970, 1, 1, 0, 0, 1, 999, tzinfo=UTC)) == 1000
    assert to_ms(datetime(2026, 11, 20, tzinfo=UTC)) == 1_795_132_800_000
