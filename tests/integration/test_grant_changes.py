"""Revocations and adjustments are written first and applied once, expiry needs nobody, the audit agrees to a micro."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from metering import grant_changes, grants
from metering.expirer import BATCH, Expirer
from metering.grant_changes import NO_CREDIT, Changed, NewAdjustment, NewRevocation, adjust, revoke
from metering.grants import Applied, GrantError, Issued, NewGrant, issue
from metering.keys import SHARDS
from metering.ledger import AccountRef, Expired, GrantRequest
from metering.reconcile import audit
from storage.redis_client import RedisError
from tests.support.stack import Stack, eventually

CONSUMED = "SELECT grant_id, amount, breakage, voided FROM consumption ORDER BY n, grant_id"


async def available(stack: Stack, account: AccountRef) -> int:
    return (await stack.ledger.balance(account)).available


async def differences(stack: Stack) -> list[tuple[str, object, object]]:
    await stack.drained()
    report = await audit(stack.pool, stack.ledger, stack.redis, wait_s=0.2)
    return [(one.what, one.redis, one.postgres) for one in report.differences]


async def clean(stack: Stack) -> bool:
    """Nothing differs, nothing is pending, nothing is dead."""
    await stack.drained()
    report = await audit(stack.pool, stack.ledger, stack.redis, wait_s=1)
    return report.ok and report.pending_grants == () and report.pending_changes == ()


async def without_redis(stack: Stack, work: object) -> Changed:
    """Await a change while Redis is away; it is back afterwards."""
    stack.server.kill()
    changed = await work  # type: ignore[misc]
    stack.server.start()

    async def back() -> bool:
        try:
            return bool(await stack.redis.call("PING"))
        except RedisError:
            return False

    await eventually(back)
    assert isinstance(changed, Changed)
    return changed


async def expire_leftovers(stack: Stack, account: AccountRef, gid: str) -> None:
    """Move the end of a grant into the past, in both stores, as if its time had come."""
    key, past = SHARDS[account.shard], 1_700_000_000_000
    await stack.redis.call("HSET", key.grants + account.id, f"{gid}:e", past)
    await stack.redis.call("ZADD", key.expiries, past, f"{account.id}|{gid}")
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=past)
    await stack.pool.execute("UPDATE grant_ SET expires_at = $2 WHERE id = $1", gid, moment)


# --- revocations


async def test_a_revoked_grant_ends_at_once_and_a_held_part_with_its_session(stack: Stack) -> None:
    account = await stack.account("alice")
    await stack.grant(account, "g1", 100)
    await stack.grant(account, "g2", 30)
    ref = await stack.hold(account, 60)
    done = await revoke(stack.pool, stack.ledger, NewRevocation("r1", "g1", "returned"))
    assert done == Changed("r1", "applied", "", 40, 30)
    await stack.ledger.settle(ref, 25, "completed")
    assert await clean(stack)
    assert [tuple(row) for row in await stack.pool.fetch(CONSUMED)] == [("g1", 0, 0, 40), ("g1", 25, 0, 35)]
    assert tuple(await stack.pool.fetchrow("SELECT notes, applied_epoch, applied_n FROM revocation")) == (
        "returned", 1, 3,
    )  # fmt: skip
    issuance = await stack.pool.fetchval("SELECT sum(amount) FROM posting WHERE ledger = 'issuance'")
    assert issuance == -130 + 75


async def test_repeating_a_revocation_changes_nothing_more(stack: Stack) -> None:
    account = await stack.account("alice")
    await stack.grant(account, "g1", 100)
    new = NewRevocation("r1", "g1")
    answers = await asyncio.gather(*(revoke(stack.pool, stack.ledger, new) for _ in range(6)))
    assert set(answers) == {Changed("r1", "applied", "", 100, 0)}
    assert await clean(stack)
    assert await revoke(stack.pool, stack.ledger, new) == answers[0]


@pytest.mark.parametrize(
    ("new", "words"),
    [
        (NewRevocation("r2", "g1"), "revoked already, by r1"),
        (NewRevocation("r1", "g2"), "another grant"),
        (NewRevocation("r3", "nothing"), "there is none"),
        (NewRevocation("r|3", "g2"), "id"),
    ],
)
async def test_a_revocation_that_cannot_be_is_not_written(stack: Stack, new: NewRevocation, words: str) -> None:
    account = await stack.account("alice")
    await stack.grant(account, "g1", 100)
    await stack.grant(account, "g2", 100)
    await revoke(stack.pool, stack.ledger, NewRevocation("r1", "g1"))
    with pytest.raises(GrantError, match=words):
        await revoke(stack.pool, stack.ledger, new)
    assert await stack.pool.fetchval("SELECT count(*) FROM revocation") == 1
    assert await available(stack, account) == 100


async def test_a_revocation_made_while_redis_is_away_is_applied_later(stack: Stack) -> None:
    account = await stack.account("alice")
    await stack.grant(account, "g1", 100)
    done = await without_redis(stack, revoke(stack.pool, stack.ledger, NewRevocation("r1", "g1")))
    assert (done.state, done.amount) == ("waiting", None)
    await stack.drained()
    report = await audit(stack.pool, stack.ledger, stack.redis)
    assert (report.ok, report.pending_changes) == (True, ("r1",))
    assert await grant_changes.apply_pending(stack.pool, stack.ledger) == Applied(1)
    assert await available(stack, account) == 0
    assert await clean(stack)
    assert await grant_changes.apply_pending(stack.pool, stack.ledger) == Applied(0)


async def test_a_grant_that_is_revoked_before_its_time_never_comes(stack: Stack) -> None:
    account = await stack.account("alice")
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    await issue(stack.pool, stack.ledger, NewGrant("g1", "alice", 100, effective_at=tomorrow))
    assert (await revoke(stack.pool, stack.ledger, NewRevocation("r1", "g1"))).amount == 0
    await stack.pool.execute("UPDATE grant_ SET effective_at = now()")
    assert await grants.apply_pending(stack.pool, stack.ledger) == Applied(0)
    assert await issue(stack.pool, stack.ledger, NewGrant("g1", "alice", 100)) == Issued(
        "g1", "revoked", "it was revoked before it came"
    )
    assert await available(stack, account) == 0
    assert await clean(stack)


# --- adjustments


async def test_an_adjustment_takes_what_is_available_in_burn_order(stack: Stack) -> None:
    account = await stack.account("alice")
    await stack.grant(account, "g1", 100)
    await stack.grant(account, "g2", 30)
    await stack.hold(account, 90)
    new = NewAdjustment("j1", "alice", 25, notes="paid twice")
    answers = await asyncio.gather(*(adjust(stack.pool, stack.ledger, new) for _ in range(6)))
    assert set(answers) == {Changed("j1", "applied", "", 25, 15)}
    assert await clean(stack)
    assert [tuple(row) for row in await stack.pool.fetch(CONSUMED)] == [("g1", 0, 0, 10), ("g2", 0, 0, 15)]
    assert tuple(await stack.pool.fetchrow("SELECT amount, whole, applied_n FROM adjustment")) == (25, True, 3)


@pytest.mark.parametrize(
    ("whole", "expected"),
    [(True, Changed("j1", "refused", NO_CREDIT, 0, 100)), (False, Changed("j1", "applied", "", 100, 0))],
)
async def test_more_than_there_is_is_refused_for_good_or_taken_in_part(
    stack: Stack, whole: bool, expected: Changed
) -> None:
    account = await stack.account("alice")
    await stack.grant(account, "g1", 100)
    assert await adjust(stack.pool, stack.ledger, NewAdjustment("j1", "alice", 101, whole)) == expected
    assert await clean(stack)
    await stack.grant(account, "g2", 500)
    assert await grant_changes.apply_pending(stack.pool, stack.ledger) == Applied(0)
    assert (await adjust(stack.pool, stack.ledger, NewAdjustment("j1", "alice", 101, whole))).state == expected.state
    assert await available(stack, account) == (600 if whole else 500)
    assert await clean(stack)


@pytest.mark.parametrize(
    ("new", "words"),
    [
        (NewAdjustment("j1", "alice", 11), "other values"),
        (NewAdjustment("j1", "bob", 10), "other values"),
        (NewAdjustment("j1", "alice", 10, whole=False), "other values"),
        (NewAdjustment("j2", "nobody", 10), "there is none"),
        (NewAdjustment("j2", "alice", 0), "amount"),
        (NewAdjustment("j2", "alice", -5), "amount"),
        (NewAdjustment("j2", "alice", 2**53), "amount"),
        (NewAdjustment("", "alice", 5), "id"),
    ],
)
async def test_an_adjustment_that_cannot_be_is_not_written(stack: Stack, new: NewAdjustment, words: str) -> None:
    account, _ = await stack.account("alice"), await stack.account("bob")
    await stack.grant(account, "g1", 100)
    await adjust(stack.pool, stack.ledger, NewAdjustment("j1", "alice", 10))
    with pytest.raises(GrantError, match=words):
        await adjust(stack.pool, stack.ledger, new)
    assert await stack.pool.fetchval("SELECT count(*) FROM adjustment") == 1
    assert await available(stack, account) == 90


async def test_an_adjustment_made_while_redis_is_away_is_applied_once_by_many(stack: Stack) -> None:
    account = await stack.account("alice")
    await stack.grant(account, "g1", 100)
    done = await without_redis(stack, adjust(stack.pool, stack.ledger, NewAdjustment("j1", "alice", 30)))
    assert done.state == "waiting"
    await asyncio.gather(*(grant_changes.apply_pending(stack.pool, stack.ledger) for _ in range(3)))
    assert await available(stack, account) == 70
    assert await clean(stack)


# --- expiry


async def test_expired_credit_is_breakage_in_postgres_and_the_audit_agrees(stack: Stack) -> None:
    account = await stack.account("alice")
    await stack.grant(account, "g1", 100)
    await stack.grant(account, "g2", 30)
    await stack.spend(account, 20, 15)
    ref = await stack.hold(account, 25)
    await expire_leftovers(stack, account, "g1")
    seen: list[Expired] = []
    expirer = Expirer(stack.ledger, on_expired=seen.append)
    assert await expirer.expire_once() == 1
    assert seen == [Expired("g1", account, 60, 4)]
    assert await expirer.expire_once() == 0
    assert await available(stack, account) == 30
    assert await clean(stack), "with credit of the grant still held"
    await stack.ledger.settle(ref, 5, "completed")
    assert await clean(stack)
    assert await stack.pool.fetchval("SELECT sum(amount) FROM posting WHERE ledger = 'breakage'") == 80


async def test_one_pass_expires_more_than_a_batch_of_several_shards_and_many_may_run(stack: Stack) -> None:
    accounts = [await stack.account(name) for name in ("alice", "bob")]
    count = BATCH + 5
    past = 1_700_000_000_000
    for account in accounts:
        users = [AccountRef(f"{account.id}{number}", account.shard) for number in range(count)]
        asked = (GrantRequest("g", user, 7, expires_ms=past) for user in users)
        await asyncio.gather(*(stack.ledger.grant(one) for one in asked))
    expirers = [Expirer(stack.ledger) for _ in range(3)]
    assert sum(await asyncio.gather(*(expirer.expire_once() for expirer in expirers))) == 2 * count
    for account in accounts:
        assert await stack.redis.call("EXISTS", SHARDS[account.shard].expiries) == 0


async def test_the_loop_expires_and_survives_a_frozen_shard_and_lost_redis(
    stack: Stack, caplog: pytest.LogCaptureFixture
) -> None:
    account = await stack.account("alice")
    await stack.redis.call("HSET", SHARDS[(account.shard + 1) % 128].meta, "ep", "-1")
    seen: list[Expired] = []
    expirer = Expirer(stack.ledger, every_ms=10, on_expired=seen.append)
    running = asyncio.create_task(expirer.run())
    await stack.grant(account, "g1", 100)
    await expire_leftovers(stack, account, "g1")

    async def expired() -> bool:
        return len(seen) == 1

    async def failed() -> bool:
        return expirer.failures > 256

    await eventually(expired)
    stack.server.kill()
    await eventually(failed)
    stack.server.start()
    assert not running.done()
    running.cancel()
    await asyncio.wait([running])
    lines = [record.getMessage() for record in caplog.records if record.name == "metering.expirer"]
    assert lines[0].startswith("expirer: 1 shards failed, first")
    assert len(lines) < 20, "one line per kind of trouble, not one per pass"


# --- the audit


async def changed_account(stack: Stack) -> AccountRef:
    """A grant of each fate: in use, revoked, expired, adjusted; everything flushed."""
    account = await stack.account("alice")
    for gid in ("g1", "g2", "g3"):
        await stack.grant(account, gid, 100)
    await revoke(stack.pool, stack.ledger, NewRevocation("r1", "g1"))
    await adjust(stack.pool, stack.ledger, NewAdjustment("j1", "alice", 10))
    await expire_leftovers(stack, account, "g2")
    await Expirer(stack.ledger).expire_once()
    await stack.spend(account, 20, 15)
    assert await clean(stack)
    return account


async def test_one_micro_in_a_changed_grant_is_seen_and_so_is_a_forgotten_revocation(stack: Stack) -> None:
    account = await changed_account(stack)
    key = SHARDS[account.shard].grants + account.id
    for part in ("g1:v", "g2:x", "g2:v", "g3:a", "g3:v"):
        await stack.redis.call("HINCRBY", key, part, 1)
        assert [what for what, _, _ in await differences(stack) if part[:2] in what], part
        await stack.redis.call("HINCRBY", key, part, -1)
    await stack.redis.call("HINCRBY", key, "g2:v", -1)
    await stack.redis.call("HINCRBY", key, "g2:x", 1)
    assert await differences(stack) == [("grant g2: expired", 91, 90), ("grant g2: voided", 9, 10)]
    await stack.redis.call("HINCRBY", key, "g2:v", 1)
    await stack.redis.call("HINCRBY", key, "g2:x", -1)
    await stack.redis.call("HDEL", key, "g1:z")
    assert await differences(stack) == [("grant g1: revoked", None, "revoked")]


TAMPERING = (
    "UPDATE consumption SET voided = voided + 1 WHERE n = 4",
    "UPDATE consumption SET breakage = breakage + 1, voided = voided - 1 WHERE n = 4",
    "UPDATE posting SET amount = amount + sign(amount) WHERE n = 4",
    "DELETE FROM revocation",
    "DELETE FROM adjustment",
    "UPDATE revocation SET grant_id = 'g3'",
    "UPDATE revocation SET applied_n = applied_n + 1",
    "UPDATE adjustment SET applied_n = applied_n + 1",
    "UPDATE adjustment SET amount = amount - 1",
    "UPDATE adjustment SET amount = amount + 1",
    "UPDATE entry SET type = 'adjust' WHERE type = 'expire'",
)


async def tamper(stack: Stack, *statements: str) -> None:
    """Change the rows as somebody with the database's owner rights can."""
    async with stack.pool.acquire() as connection, connection.transaction():
        await connection.execute("SET LOCAL session_replication_role = replica")
        for statement in statements:
            await connection.execute(statement)


async def test_a_change_of_the_rows_is_seen(stack: Stack) -> None:
    await changed_account(stack)
    tables = ("consumption", "posting", "revocation", "adjustment", "entry")
    await tamper(stack, *(f"CREATE TABLE kept_{name} AS TABLE {name}" for name in tables))
    for statement in TAMPERING:
        await tamper(stack, statement)
        assert await differences(stack), statement
        emptied = (f"DELETE FROM {name}" for name in tables)
        await tamper(stack, *emptied, *(f"INSERT INTO {name} SELECT * FROM kept_{name}" for name in tables))
    assert await clean(stack)


async def test_all_grants_of_an_account_are_listed_the_newest_first(stack: Stack) -> None:
    await changed_account(stack)
    days = "timestamptz '2026-01-01' + right(id, 1)::int * interval '1 day'"
    await stack.pool.execute(f"UPDATE grant_ SET created_at = {days}")
    seen = await grants.listed(stack.pool, "alice")
    assert [(one.id, one.amount, one.revoked_at is not None) for one in seen] == [
        ("g3", 100, False), ("g2", 100, False), ("g1", 100, True),
    ]  # fmt: skip
