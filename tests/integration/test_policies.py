"""A policy is written first and applied by revision; debts and corrections arrive in Postgres and the audit agrees."""

from __future__ import annotations

import asyncio

import pytest

from metering.keys import SHARDS
from metering.ledger import Balance, Corrected, Held, HoldRequest, Policy, SessionRef
from metering.policies import PolicyError, Written, apply_pending, change
from metering.reconcile import audit
from storage.redis_client import RedisError
from tests.support.stack import Stack, eventually, uuid7


async def clean(stack: Stack) -> bool:
    await stack.drained()
    report = await audit(stack.pool, stack.ledger, stack.redis, wait_s=1)
    assert report.differences == ()
    return stack.alarms == []


async def written(stack: Stack) -> tuple[str, int, int, int]:
    row = await stack.pool.fetchrow("SELECT policy, credit_limit, policy_revision, policy_applied FROM account")
    return tuple(row)


async def reconnected(stack: Stack) -> None:
    async def back() -> bool:
        try:
            return bool(await stack.redis.call("PING"))
        except RedisError:
            return False

    await eventually(back)


async def test_a_policy_is_in_force_at_once_and_confirmed_by_the_journal(stack: Stack) -> None:
    account = await stack.account("alice")
    assert await change(stack.pool, stack.ledger, "alice", "grace", 70) == Written("grace", 70, 1, "applied")
    assert await stack.ledger.balance(account) == Balance(0, 0, 0, 0, 0, 0, 70, "grace")
    assert await written(stack) == ("grace", 70, 1, 0)
    assert await clean(stack)
    assert await written(stack) == ("grace", 70, 1, 1)


@pytest.mark.parametrize(("policy", "limit"), [("cutoff", 0), ("grace", 1_000_000), ("postpaid", 100_000_000)])
async def test_each_policy_has_a_limit_of_its_own(stack: Stack, policy: Policy, limit: int) -> None:
    await stack.account("alice")
    assert (await change(stack.pool, stack.ledger, "alice", policy)).limit == limit


async def test_the_same_change_again_is_no_new_revision(stack: Stack) -> None:
    await stack.account("alice")
    answers = await asyncio.gather(*(change(stack.pool, stack.ledger, "alice", "grace", 70) for _ in range(6)))
    assert {answer.state for answer in answers} == {"applied"}
    assert await clean(stack)
    assert await written(stack) == ("grace", 70, 1, 1)
    assert await stack.pool.fetchval("SELECT count(*) FROM entry WHERE type = 'policy'") == 1


@pytest.mark.parametrize(
    ("account", "policy", "limit", "words"),
    [
        ("nobody", "grace", 1, "there is none"),
        ("alice", "cutoff", 1, "cutoff"),
        ("alice", "grace", -1, "between"),
        ("alice", "postpaid", 2**53, "between"),
    ],
)
async def test_a_bad_policy_is_not_written(stack: Stack, account: str, policy: Policy, limit: int, words: str) -> None:
    await stack.account("alice")
    with pytest.raises(PolicyError, match=words):
        await change(stack.pool, stack.ledger, account, policy, limit)
    assert await written(stack) == ("cutoff", 0, 0, 0)


async def test_a_policy_set_while_redis_is_away_is_applied_later(stack: Stack) -> None:
    account = await stack.account("alice")
    stack.server.kill()
    waiting = await change(stack.pool, stack.ledger, "alice", "postpaid", 70)
    assert (waiting.state, waiting.reason[:5]) == ("waiting", "Redis")
    assert list(await apply_pending(stack.pool, stack.ledger)) == ["alice"]
    stack.server.start()
    await reconnected(stack)
    assert await apply_pending(stack.pool, stack.ledger) == {}
    assert (await stack.ledger.balance(account)).limit == 70
    assert await clean(stack)
    assert await apply_pending(stack.pool, stack.ledger) == {}
    assert await stack.pool.fetchval("SELECT count(*) FROM entry WHERE type = 'policy'") == 1


async def test_a_revision_that_redis_has_with_another_limit_is_a_clear_error(stack: Stack) -> None:
    account = await stack.account("alice")
    await change(stack.pool, stack.ledger, "alice", "grace", 70)
    assert await clean(stack)
    await stack.pool.execute("UPDATE account SET policy = 'cutoff', credit_limit = 0, policy_revision = 0")  # a backup
    with pytest.raises(PolicyError, match="alice: revision 1 has another policy or limit in Redis"):
        await change(stack.pool, stack.ledger, "alice", "grace", 90)
    with pytest.raises(PolicyError, match="another policy"):
        await change(stack.pool, stack.ledger, "alice", "grace", 90)
    await stack.pool.execute("UPDATE account SET policy_applied = 0")
    assert "another policy" in (await apply_pending(stack.pool, stack.ledger))["alice"]
    assert (await stack.ledger.balance(account)).limit == 70
    assert (await change(stack.pool, stack.ledger, "alice", "grace", 80)).state == "applied"
    assert (await change(stack.pool, stack.ledger, "alice", "grace", 90)).state == "applied"
    assert (await stack.ledger.balance(account)).limit == 90


async def test_debt_and_its_repayment_are_the_same_in_both_stores(stack: Stack) -> None:
    account = await stack.account("alice")
    await stack.grant(account, "g1", 100)
    await change(stack.pool, stack.ledger, "alice", "grace", 500)
    ref = await stack.spend(account, 400, 330)
    assert (await stack.ledger.balance(account)).debt == 230
    assert await clean(stack)
    row = await stack.pool.fetchrow("SELECT charged, absorbed, debt FROM session WHERE sid = $1", ref.session)
    assert tuple(row) == (330, 0, 230)
    await stack.hold(account, 200)  # open on the line while it is audited
    assert await clean(stack)
    await stack.grant(account, "g2", 100)
    assert await clean(stack)
    await stack.grant(account, "g3", 1_000)
    assert await clean(stack)
    balance = await stack.ledger.balance(account)
    assert (balance.debt, balance.available, balance.line) == (0, 870, 200)


async def swept(stack: Stack, metered: int) -> SessionRef:
    """A session of alice, with 100 of credit and a line of 50, that the sweeper ended at `metered`."""
    account = await stack.account("alice")
    await stack.grant(account, "g1", 100)
    await change(stack.pool, stack.ledger, "alice", "grace", 50)
    request = HoldRequest(uuid7(), account, "KEYabc12", 60, 1, 1, "hash", "owner", "pv1", b'{"route":"r"}')
    held = await stack.ledger.reserve(request)
    assert isinstance(held, Held)
    ref = SessionRef(request.session, account, request.key, held.fence)
    await stack.ledger.progress(ref, 1, metered, 0)

    async def done() -> bool:
        return bool(await stack.ledger.sweep_due(account.shard, 5))

    await eventually(done)
    return ref


METADATA = b'{"route":"r","provider":"p","model":"m","output":9}'


async def test_a_correction_has_its_own_row_and_counts_in_the_usage(stack: Stack) -> None:
    ref = await swept(stack, 40)
    assert await stack.ledger.correct(ref, 170, METADATA) == Corrected(110, 20, 0, 4)
    assert await clean(stack)
    row = await stack.pool.fetchrow("SELECT sid, charged, absorbed, debt, provider, output_tokens FROM correction")
    assert tuple(row) == (ref.session, 110, 20, 50, "p", 9)
    session = await stack.pool.fetchrow("SELECT outcome, charged FROM session WHERE sid = $1", ref.session)
    assert tuple(session) == ("swept", 40)
    usage = await stack.pool.fetch("SELECT provider, sessions, charged, output_tokens FROM usage_rollup ORDER BY 1")
    assert [tuple(each) for each in usage] == [("", 1, 40, 0), ("p", 0, 110, 9)]


async def test_a_correction_delivered_twice_counts_once(stack: Stack) -> None:
    ref = await swept(stack, 40)
    await stack.ledger.correct(ref, 60, METADATA)
    await stack.drained()
    await stack.pool.execute("UPDATE shard_cursor SET n = n - 1 WHERE shard = $1", ref.account.shard)
    outbox = SHARDS[ref.account.shard].outbox
    await stack.redis.call("DEL", outbox)
    await stack.redis.call("XADD", outbox, "1-4", *await _entry(stack, ref))
    assert await clean(stack)
    assert await stack.pool.fetchval("SELECT sum(charged) FROM usage_rollup") == 60


async def _entry(stack: Stack, ref: SessionRef) -> list[str | int]:
    """The correction as the script wrote it, from its rows."""
    row = await stack.pool.fetchrow("SELECT *, extract(epoch FROM at) * 1000 AS ms FROM correction")
    return [
        "t", "correct", "u", "alice", "ts", int(row["ms"]), "s", ref.session, "k", ref.key, "c", row["charged"],
        "ab", row["absorbed"], "d", row["debt"], "sl", f"g1={row['charged'] - row['debt']}", "mt", METADATA.decode(),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("UPDATE correction SET charged = charged + 1", "charge is what its entry earned"),
        ("UPDATE correction SET absorbed = absorbed + 1", "charge is what its entry earned"),
        ("DELETE FROM correction", "a correction's entry has its row"),
        ("UPDATE correction SET sid = 'other'", "a correction's entry has its row"),
        ("UPDATE session SET outcome = 'completed'", "that is of a swept session"),
        ("UPDATE entry SET type = 'settle' WHERE type = 'correct'", "a session has one terminal entry"),
        ("UPDATE usage_rollup SET charged = charged + 1 WHERE provider = 'p'", "usage sums equal the sessions"),
    ],
)
async def test_a_damaged_correction_is_a_difference(stack: Stack, statement: str, words: str) -> None:
    ref = await swept(stack, 40)
    await stack.ledger.correct(ref, 60, METADATA)
    assert await clean(stack)
    async with stack.pool.acquire() as connection, connection.transaction():
        await connection.execute("SET LOCAL session_replication_role = replica")
        assert await connection.execute(statement) in ("UPDATE 1", "DELETE 1")
    report = await audit(stack.pool, stack.ledger, stack.redis, wait_s=1)
    assert any(words in one.what for one in report.differences), report.differences
