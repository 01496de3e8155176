"""The audit passes while the system works, and sees a single micro that someone moved, in either store."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from metering.grants import NewGrant, issue, to_ms
from metering.keys import SHARDS
from metering.ledger import AccountRef
from metering.reconcile import AuditReport, audit
from tests.support.stack import Stack, eventually


async def audited(stack: Stack, wait_s: float = 5.0, only: list[str] | None = None) -> AuditReport:
    return await audit(stack.pool, stack.ledger, stack.redis, wait_s=wait_s, only=only)


async def busy_account(stack: Stack) -> AccountRef:
    """Two grants, two finished sessions, one open one; everything flushed."""
    account = await stack.account("alice")
    await stack.grant(account, "g1", 100)
    await stack.grant(account, "g2", 1_000)
    await stack.spend(account, 80, 70)
    await stack.spend(account, 80, 60)
    await stack.hold(account, 50)
    await stack.drained()
    return account


async def tamper(stack: Stack, statement: str) -> None:
    """Change the append-only rows as somebody with the database's owner rights can."""
    async with stack.pool.acquire() as connection, connection.transaction():
        await connection.execute("SET LOCAL session_replication_role = replica")
        await connection.execute(statement)


async def test_an_untouched_ledger_has_no_difference(stack: Stack) -> None:
    await busy_account(stack)
    await stack.account("idle")
    report = await audited(stack)
    assert report == AuditReport(2, (), ())
    assert report.ok


async def test_the_audit_passes_while_sessions_run_and_the_flusher_works(stack: Stack) -> None:
    accounts = [await stack.account(name) for name in ("alice", "bob", "carol")]
    for account in accounts:
        await stack.grant(account, f"{account.id}-1", 500)
        await stack.grant(account, f"{account.id}-2", 10**6)
    flusher = stack.flusher()
    running = asyncio.create_task(flusher.run())

    enough = asyncio.Event()

    async def work(account: AccountRef) -> int:
        done = 0
        while not enough.is_set():
            await stack.spend(account, 40, done % 60)
            done += 1
        return done

    working = [asyncio.create_task(work(account)) for account in accounts]
    reports = [await audited(stack) for _ in range(6)]
    enough.set()
    done = sum(await asyncio.gather(*working))
    reports.append(await audited(stack))
    running.cancel()
    await asyncio.wait([running])
    assert [report.differences for report in reports if not report.ok] == []
    assert flusher.delivered == done + 6
    assert done > 60


@pytest.mark.parametrize("field", ["av", "hd", "tc", "db", "hc"])
async def test_one_micro_in_a_redis_account_is_seen(stack: Stack, field: str) -> None:
    account = await busy_account(stack)
    key = SHARDS[account.shard].account + account.id
    await stack.redis.call("HINCRBY", key, field, 1)
    report = await audited(stack)
    assert not report.ok
    assert {difference.account for difference in report.differences} == {"alice"}
    inside = [difference for difference in report.differences if difference.what.startswith("I")]
    across = [difference for difference in report.differences if not difference.what.startswith("I")]
    assert {1} == {difference.micros for difference in inside} == {difference.micros for difference in across}
    await stack.redis.call("HINCRBY", key, field, -1)
    assert (await audited(stack)).ok


@pytest.mark.parametrize("part", ["i", "a", "h", "c", "x", "v"])
async def test_one_micro_in_a_redis_grant_is_seen(stack: Stack, part: str) -> None:
    account = await busy_account(stack)
    await stack.redis.call("HINCRBY", SHARDS[account.shard].grants + account.id, f"g2:{part}", 1)
    report = await audited(stack)
    assert [difference.micros for difference in report.differences if "g2" in difference.what]


async def test_two_micros_that_cancel_out_inside_redis_are_seen_against_postgres(stack: Stack) -> None:
    account = await busy_account(stack)
    shard = SHARDS[account.shard]
    await stack.redis.call("HINCRBY", shard.grants + account.id, "g2:a", 1)
    await stack.redis.call("HINCRBY", shard.grants + account.id, "g2:c", -1)
    await stack.redis.call("HINCRBY", shard.account + account.id, "av", 1)
    await stack.redis.call("HINCRBY", shard.account + account.id, "tc", -1)
    report = await audited(stack)
    assert {(one.what, one.micros) for one in report.differences} == {
        ("charged", 1),
        ("charged (sessions)", 1),
        ("grant g2: available and held", 1),
        ("grant g2: consumed", 1),
        ("available and held", 1),
    }


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE posting SET amount = amount + 1 WHERE ledger = 'earned' AND n = 3",
        "UPDATE posting SET amount = amount - 1 WHERE ledger = 'issuance' AND n = 1",
        "UPDATE posting SET amount = amount + CASE ledger WHEN 'earned' THEN 1 ELSE -1 END WHERE n = 3 AND leg < 2",
        "UPDATE consumption SET amount = amount + 1 WHERE n = 3",
        "UPDATE session SET charged = charged + 1 WHERE n = 3",
        "UPDATE session SET absorbed = absorbed + 1 WHERE n = 3",
        "UPDATE grant_ SET amount = amount + 1 WHERE id = 'g1'",
        "UPDATE usage_rollup SET charged = charged + 1",
        "DELETE FROM posting WHERE n = 3",
        "DELETE FROM session WHERE n = 3",
        "DELETE FROM entry WHERE n = 3",
        "DELETE FROM grant_ WHERE id = 'g1'",
        "UPDATE grant_ SET applied_epoch = NULL, applied_n = NULL WHERE id = 'g1'",
        "UPDATE grant_ SET applied_n = 3 WHERE id = 'g1'",
        "UPDATE grant_ SET expires_at = '2100-01-01' WHERE id = 'g1'",
        "UPDATE entry SET account_id = 'mallory' WHERE n = 3",
        "UPDATE shard_cursor SET n = n + 1 WHERE n > 0",
        "UPDATE account SET shard = (shard + 1) % 128",
    ],
)
async def test_a_change_in_postgres_is_seen(stack: Stack, statement: str) -> None:
    await busy_account(stack)
    assert (await audited(stack)).ok
    await tamper(stack, statement)
    report = await audited(stack, wait_s=0.1)
    assert not report.ok


async def test_an_account_that_only_redis_knows_is_audited_and_named(stack: Stack) -> None:
    account = await busy_account(stack)
    await tamper(stack, "DELETE FROM account")
    report = await audited(stack)
    assert (account.id, "the account is in Postgres") in {(one.account, one.what) for one in report.differences}


async def test_a_journal_that_does_not_arrive_is_a_difference_after_the_wait(stack: Stack) -> None:
    account = await busy_account(stack)
    await stack.spend(account, 10, 7)
    report = await audited(stack, wait_s=0.05)
    assert [(one.what, one.redis, one.postgres) for one in report.differences] == [
        ("the journal arrives", "1-5", "1-4")
    ]
    await stack.drained()
    assert (await audited(stack)).ok


async def test_a_difference_says_what_had_to_be_there_what_is_there_and_in_which_store(stack: Stack) -> None:
    account = await busy_account(stack)
    await stack.redis.call("HINCRBY", SHARDS[account.shard].account + account.id, "av", -1)
    await tamper(stack, "UPDATE session SET charged = charged + 1 WHERE n = 3")
    found = {one.what.split(":")[0]: one for one in (await audited(stack)).differences}
    left, charged = (await stack.ledger.balance(account)).available, found["charged (sessions)"].found
    rule = found["I2 available is the sum of the grants"]
    assert (rule.found, rule.expected, rule.redis, rule.postgres) == (left, left + 1, left, f"expected {left + 1}")
    rule = found["a session's charge is what its entry earned"]
    assert isinstance(rule.expected, int)
    shown = (f"expected {rule.expected}", rule.expected - 1)
    assert (rule.found, rule.redis, rule.postgres) == (rule.expected - 1, *shown)
    across = found["charged (sessions)"]
    assert isinstance(charged, int)
    assert (across.found, across.expected, across.redis, across.postgres) == (charged, charged + 1) * 2


async def test_a_dead_entry_is_a_difference(stack: Stack) -> None:
    await busy_account(stack)
    await stack.redis.call("XADD", SHARDS[0].outbox, "1-1", "t", "nonsense")
    await stack.redis.call("HSET", SHARDS[0].meta, "n", 1)
    await stack.drained()
    report = await audited(stack)
    assert [one.what for one in report.differences] == ["no entry is dead: 0:1-1"]


async def test_a_hold_without_a_lease_and_one_that_expires_are_seen(stack: Stack) -> None:
    account = await busy_account(stack)
    ref = await stack.hold(account, 50)
    shard = SHARDS[account.shard]
    await stack.redis.call("PEXPIRE", shard.session + ref.session, 60_000)
    assert any(one.what.startswith("I7") for one in (await audited(stack)).differences)
    await stack.redis.call("PERSIST", shard.session + ref.session)
    await stack.redis.call("ZREM", shard.leases, f"{account.id}|{ref.session}")
    assert any(one.what.startswith("I4") for one in (await audited(stack)).differences)


async def test_redis_behind_postgres_is_seen(stack: Stack) -> None:
    account = await busy_account(stack)
    await stack.redis.call("HINCRBY", SHARDS[account.shard].meta, "n", -1)
    assert any("behind" in one.what for one in (await audited(stack)).differences)


async def test_a_pending_grant_is_named_and_is_no_difference(stack: Stack) -> None:
    await busy_account(stack)
    await stack.pool.execute("INSERT INTO grant_ (id, account_id, amount) VALUES ('late', 'alice', 5)")
    report = await audited(stack)
    assert (report.ok, report.pending_grants) == (True, ("late",))


async def test_named_accounts_are_audited_alone(stack: Stack) -> None:
    account = await busy_account(stack)
    await stack.account("bob")
    assert await audited(stack, only=["bob"]) == AuditReport(1, (), ())
    await stack.redis.call("HINCRBY", SHARDS[account.shard].account + account.id, "av", 1)
    assert (await audited(stack, only=["bob"])).ok
    assert not (await audited(stack, only=["alice"])).ok
    assert [one.account for one in (await audited(stack, only=["nobody"])).differences] == ["nobody"]


async def test_damaged_numbers_in_redis_are_a_difference_and_no_crash(stack: Stack) -> None:
    account = await busy_account(stack)
    await stack.redis.call("HSET", SHARDS[account.shard].grants + account.id, "g2:a", "many")
    report = await audited(stack)
    assert [one.what for one in report.differences] == ["the account can be read"]


async def test_what_the_house_absorbs_is_projected(stack: Stack) -> None:
    account = await stack.account("alice")
    await stack.grant(account, "g1", 100)
    ref = await stack.spend(account, 100, 130)
    await stack.drained()
    row = await stack.pool.fetchrow("SELECT charged, absorbed FROM session WHERE sid = $1", ref.session)
    assert tuple(row) == (100, 30)
    assert (await audited(stack)).ok


async def test_what_expires_while_it_is_held_becomes_breakage(stack: Stack) -> None:
    account = await stack.account("alice")
    ends = datetime.now(UTC) + timedelta(milliseconds=400)
    assert (await issue(stack.pool, stack.ledger, NewGrant("g1", "alice", 100, expires_at=ends))).state == "applied"
    ref = await stack.hold(account, 100)

    async def expired() -> bool:
        seconds, micros = await stack.redis.call("TIME")
        return int(seconds) * 1000 + int(micros) // 1000 > to_ms(ends)

    await eventually(expired)
    await stack.ledger.settle(ref, 30, "completed")
    await stack.drained()
    assert tuple(await stack.pool.fetchrow("SELECT amount, breakage FROM consumption")) == (30, 70)
    assert (await audited(stack)).ok
