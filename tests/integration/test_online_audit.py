"""The online audit names one micro in either store within a round, and nothing else, whatever goes on meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from config import settings
from gateway import auditing
from metering import reconcile
from metering.expirer import Expirer
from metering.keys import SHARDS
from metering.online_audit import JUST_MOVED, LEASES_MAX, PICKS, Look, OnlineAudit
from storage.database import connect
from tests.integration.test_reconcile import busy_account, tamper
from tests.support.busy_accounts import busy, in_debt
from tests.support.online_audit import Racing, trouble
from tests.support.stack import Stack, eventually

Make = Callable[..., OnlineAudit]


@pytest.fixture
async def online(stack: Stack) -> AsyncIterator[Make]:
    """Makes online audits of the stack."""
    made: list[OnlineAudit] = []

    def make(**fields: Any) -> OnlineAudit:
        made.append(OnlineAudit(stack.redis, stack.ledger, stack.database_url, **{"every_ms": 5, **fields}))
        return made[-1]

    yield make
    for each in made:
        await each.aclose()


def said(looks: list[Look]) -> list[tuple[str, str | None, bool]]:
    """Of each account: its id, why it was skipped, and whether it differs."""
    return sorted((look.account.id, look.skipped, look.differs) for look in looks)


CLEAN = ("alice", None, False)
DIFFERS = ("alice", None, True)


async def test_an_untouched_account_is_clean_round_after_round(stack: Stack, online: Make) -> None:
    await busy_account(stack)
    audit = online()
    for _ in range(3):
        assert said(await audit.round()) == [CLEAN]
    assert audit.differing == 0
    assert audit.age_s < 1


@pytest.mark.parametrize("field", ["av", "hd", "tc", "db", "hc", "ns"])
async def test_one_micro_in_redis_is_told_once_and_watched_until_it_is_mended(
    stack: Stack, online: Make, field: str
) -> None:
    account = await busy_account(stack)
    key = SHARDS[account.shard].account + account.id
    audit = online()
    await stack.redis.call("HINCRBY", key, field, 1)
    (look,) = await audit.round()
    assert (look.account, look.differs, audit.differing) == (account, True, 1)
    assert {one.account for one in look.fresh} == {"alice"}
    assert {one.micros for one in look.fresh} == {1}
    assert {abs(int(one.found or 0) - int(one.expected or 0)) for one in look.fresh} == {1}
    (look,) = await audit.round()
    assert (look.fresh, look.differs) == ((), True)
    await stack.redis.call("HINCRBY", key, field, 1)
    (look,) = await audit.round()
    assert {one.micros for one in look.fresh} == {2}
    await stack.redis.call("HINCRBY", key, field, -2)
    (look,) = await audit.round()
    assert (look.healed, look.differs, look.fresh, audit.differing) == (True, False, (), 0)
    (look,) = await audit.round()
    assert not look.healed


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE posting SET amount = amount {} 1 WHERE ledger = 'earned' AND n = 3",
        "UPDATE posting SET amount = amount {} 1 WHERE ledger = 'user:avail:g1' AND n = 1",
        "UPDATE consumption SET amount = amount {} 1 WHERE n = 3",
        "UPDATE session SET charged = charged {} 1 WHERE n = 3",
        "UPDATE session SET absorbed = absorbed {} 1 WHERE n = 3",
        "UPDATE grant_ SET amount = amount {} 1 WHERE id = 'g1'",
    ],
)
async def test_one_micro_in_postgres_is_told(stack: Stack, online: Make, statement: str) -> None:
    await busy_account(stack)
    audit = online()
    await tamper(stack, statement.format("+"))
    (look,) = await audit.round()
    assert {one.micros for one in look.fresh} == {1}
    await tamper(stack, statement.format("-"))
    assert said(await audit.round()) == [CLEAN]


async def test_accounts_under_load_are_compared_and_never_differ(stack: Stack, online: Make) -> None:
    names = ("alice", "bob", "carol", "dora")
    looks: list[Look] = []
    enough = asyncio.Event()

    async def rounds() -> None:
        audit = online()
        while not enough.is_set():  # without the rests of `run`
            looks.extend(await audit.round())

    serving = [asyncio.create_task(job) for job in (stack.flusher().run(), Expirer(stack.ledger, every_ms=20).run())]
    working = [asyncio.create_task(job) for job in (rounds(), in_debt(stack, enough))]
    for name in names:
        account = await stack.account(name)
        await stack.grant(account, f"{name}-first", 10**7)
        working.append(asyncio.create_task(busy(stack, account, enough)))
    ends = asyncio.get_running_loop().time() + 1.5

    async def seen() -> bool:
        assert not any(job.done() for job in (*serving, *working))
        compared = [look.account.id for look in looks if look.skipped is None]
        often = all(compared.count(name) >= 6 for name in (*names, "postpaid"))
        return often and len(compared) >= 50 and asyncio.get_running_loop().time() > ends

    try:
        await eventually(seen)
    finally:
        enough.set()
        await asyncio.wait(working)
        for job in serving:
            job.cancel()
        await asyncio.wait(serving)
    assert [(look.account.id, one) for look in looks for one in look.fresh] == []
    assert {look.skipped for look in looks} <= {None, "busy"}
    await stack.drained()
    assert (await reconcile.audit(stack.pool, stack.ledger, stack.redis)).ok


async def test_a_grant_that_comes_between_snapshot_and_comparison_is_no_difference(stack: Stack) -> None:
    account = await busy_account(stack)
    taken = await reconcile.take(stack.ledger, stack.redis, account)
    assert isinstance(taken, reconcile.Taken)
    await stack.grant(account, "late", 77)
    await stack.spend(account, 10, 10)
    await stack.drained()
    async with stack.pool.acquire() as connection:
        assert await reconcile.compare(connection, taken) == []
    await tamper(stack, "UPDATE grant_ SET applied_n = applied_n + 9 WHERE id = 'g1'")
    async with stack.pool.acquire() as connection:
        assert [one.what for one in await reconcile.compare(connection, taken)] == ["grant g1: confirmed"]


async def test_what_has_not_arrived_is_waited_for_and_is_no_difference(stack: Stack, online: Make) -> None:
    account = await busy_account(stack)
    audit = online()
    await audit.round()
    await stack.spend(account, 10, 7)
    round_ = asyncio.create_task(audit.round())
    await asyncio.wait([round_], timeout=0.05)
    assert not round_.done()
    await stack.drained()
    assert said(await round_) == [CLEAN]


async def test_the_wait_for_the_journal_is_bounded_and_a_stopped_one_is_not_waited_for(
    stack: Stack, online: Make
) -> None:
    account = await busy_account(stack)
    other = await stack.account("bob")
    await stack.grant(other, "b1", 10)
    await stack.spend(account, 10, 7)
    audit = online(wait_s=0.1)
    await stack.redis.call("HINCRBY", SHARDS[other.shard].account + "bob", "av", 1)
    (look,) = [look for look in await audit.round() if look.account == other]
    assert (look.skipped, {one.what[:2] for one in look.fresh}) == ("behind", {"I2"})  # what Redis says of itself
    await stack.redis.call("HINCRBY", SHARDS[other.shard].account + "bob", "av", -1)
    began = asyncio.get_running_loop().time()
    assert said(await audit.round()) == [("alice", "behind", False), ("bob", "behind", True)]  # not clean
    assert asyncio.get_running_loop().time() - began >= 0.1
    assert audit.age_s > 0.1
    stopped = online(stopped=lambda: {account.shard})
    skipping = asyncio.create_task(stopped.round())
    await stack.drained()
    assert said(await skipping) == [("alice", "stopped", False), ("bob", None, False)]
    assert said(await audit.round()) == [CLEAN, ("bob", None, False)]


async def test_a_frozen_shard_is_skipped_and_what_differed_there_is_not_forgotten(stack: Stack, online: Make) -> None:
    account = await busy_account(stack)
    shard = SHARDS[account.shard]
    await stack.redis.call("HINCRBY", shard.account + account.id, "av", 1)
    audit = online()
    assert said(await audit.round()) == [DIFFERS]
    await stack.ledger.freeze(account.shard)
    assert said(await audit.round()) == [("alice", "frozen", True)]
    assert audit.differing == 1
    await stack.redis.call("HSET", shard.meta, "ep", 1)
    (look,) = await audit.round()
    assert (look.differs, look.fresh) == (True, ())


async def test_a_shard_that_is_made_anew_while_the_journal_is_waited_for_is_skipped(stack: Stack, online: Make) -> None:
    account = await busy_account(stack)
    await stack.spend(account, 10, 7)
    audit = online()
    round_ = asyncio.create_task(audit.round())
    await asyncio.wait([round_], timeout=0.05)
    await stack.pool.execute("UPDATE shard_cursor SET ep = 2, n = 0 WHERE shard = $1", account.shard)
    assert said(await round_) == [("alice", "rebuilt", False)]


async def test_what_differs_in_a_shard_that_was_frozen_meanwhile_is_looked_at_again(stack: Stack, online: Make) -> None:
    account = await busy_account(stack)
    shard = SHARDS[account.shard]
    await stack.redis.call("HINCRBY", shard.account + account.id, "av", 1)
    await stack.spend(account, 10, 7)
    audit = online()
    round_ = asyncio.create_task(audit.round())
    await asyncio.wait([round_], timeout=0.05)
    await stack.ledger.freeze(account.shard)
    await stack.drained()
    assert said(await round_) == [("alice", "rebuilt", False)]
    await stack.redis.call("HSET", shard.meta, "ep", 1)
    for name in range(20):
        await stack.account(f"z{name:02d}")
    assert DIFFERS in said(await audit.round())


async def test_every_account_has_its_turn_and_one_that_just_paid_does_not_wait_for_it(
    stack: Stack, online: Make
) -> None:
    accounts = [await stack.account(f"user-{number:02d}") for number in range(23)]
    for account in accounts:
        await stack.grant(account, f"g-{account.id}", 1_000)
    flusher = stack.flusher()
    await flusher.drain()
    audit = online()
    seen: list[str] = []
    for number in (21, 3, 14, 3, 9):
        await stack.spend(accounts[number], 10, 5)
        await flusher.drain()
        looks = await audit.round()
        assert len(looks) <= PICKS
        assert not any(look.differs for look in looks)
        assert not seen or accounts[number] in [look.account for look in looks]
        seen += [look.account.id for look in looks]
    for _ in range(-(-len(accounts) // (PICKS - JUST_MOVED))):
        seen += [look.account.id for look in await audit.round()]
    assert set(seen) == {account.id for account in accounts}


async def test_processes_that_are_restarted_do_not_all_begin_with_the_same_account(stack: Stack, online: Make) -> None:
    for number in range(40):
        await stack.account(f"acct_{number:02d}")
    first = {(await online().round())[0].account.id for _ in range(12)}
    assert len(first) > 1


async def test_an_entry_of_an_account_that_postgres_lacks_is_told(stack: Stack, online: Make) -> None:
    account = await busy_account(stack)
    audit = online()
    await audit.round()
    await tamper(stack, "DELETE FROM account")
    await stack.spend(account, 10, 7)
    await stack.drained()
    (look,) = await audit.round()
    assert [one.what for one in look.fresh] == ["the account is in Postgres"]
    (look,) = await audit.round()
    assert (look.differs, look.fresh) == (True, ())


@pytest.mark.parametrize("damage", [
    ("HSET", "grants", "g2:a", "many"),
    ("ZADD", "order", "0", "rubbish"),
    ("SET", "order", "text"),
])  # fmt: skip
async def test_a_damaged_account_is_told_and_stops_no_other(
    stack: Stack, online: Make, damage: tuple[str, ...]
) -> None:
    account = await busy_account(stack)
    await stack.account("bob")
    verb, key, *words = damage
    await stack.redis.call(verb, getattr(SHARDS[account.shard], key) + account.id, *words)
    audit = online()
    looks = {look.account.id: look for look in await audit.round()}
    assert [one.what for one in looks["alice"].fresh] == ["the account can be read"]
    assert (looks["bob"].differs, looks["bob"].skipped) == (False, None)


async def test_a_lost_session_is_told_also_while_others_come_and_go(stack: Stack, online: Make) -> None:
    account = await stack.account("alice")
    await stack.grant(account, "g1", 10**6)
    lost = await stack.hold(account, 50)
    audit, enough = online(), asyncio.Event()
    flushing = asyncio.create_task(stack.flusher().run())

    async def traffic() -> None:
        while not enough.is_set():
            await stack.spend(account, 10, 5)
            await asyncio.wait([asyncio.create_task(enough.wait())], timeout=0.02)

    working = asyncio.create_task(traffic())
    await stack.redis.call("ZREM", SHARDS[account.shard].leases, f"alice|{lost.session}")
    told: list[str] = []

    async def found() -> bool:
        told.extend(one.what for look in await audit.round() for one in look.fresh)
        return "I4 sessions are counted" in told

    await eventually(found)
    enough.set()
    await working
    flushing.cancel()
    await asyncio.wait([flushing])


async def test_sessions_that_open_faster_than_they_can_be_read_are_no_difference(stack: Stack) -> None:
    account = await busy_account(stack)
    for _ in range(4):
        await stack.hold(account, 10)
    audit = OnlineAudit(stack.redis, Racing(stack), stack.database_url)
    try:
        assert said(await audit.round()) == [("alice", "busy", False)]
        report = await reconcile.audit(stack.pool, Racing(stack), stack.redis)
        assert [one.what.partition(":")[0] for one in report.differences] == ["its sessions can be read"]
        await stack.redis.call("HINCRBY", SHARDS[account.shard].account + account.id, "tc", 1)
        (look,) = await audit.round()
    finally:
        await audit.aclose()
    assert (look.skipped, {one.micros for one in look.fresh}) == ("busy", {1})


async def test_a_shard_with_too_many_sessions_is_not_held_up(stack: Stack, online: Make) -> None:
    account = await busy_account(stack)
    members = [word for i in range(LEASES_MAX) for word in ("99999999999999", f"bob|{i}")]
    await stack.redis.call("ZADD", SHARDS[account.shard].leases, *members)
    assert said(await online().round()) == [("alice", "sessions", False)]


async def test_a_history_that_takes_too_long_is_left_alone_for_a_while(stack: Stack, online: Make) -> None:
    await busy_account(stack)
    audit = online(statement_s=0.2)
    async with stack.pool.acquire() as connection, connection.transaction():
        await connection.execute("LOCK TABLE posting IN ACCESS EXCLUSIVE MODE")
        assert said(await audit.round()) == [("alice", "slow", False)]
    assert said(await audit.round()) == [("alice", "slow", False)]
    assert said(await online().round()) == [CLEAN]


async def test_zero_turns_it_off_and_less_is_refused(stack: Stack, tmp_path: Path) -> None:
    file = tmp_path / "tollgate.toml"
    file.write_text("[metering]\naudit_every_ms = 0\n")
    every_ms = settings.load(file).metering.audit_every_ms
    assert auditing.watch(stack.redis, stack.ledger, stack.database_url, every_ms, stopped=tuple) is None
    file.write_text("[metering]\naudit_every_ms = -1\n")
    with pytest.raises(settings.ConfigError, match=r"metering.audit_every_ms: -1 is below 0"):
        settings.load(file)


async def test_a_redis_that_is_away_is_told_once_and_the_audit_goes_on(
    stack: Stack, caplog: pytest.LogCaptureFixture
) -> None:
    await busy_account(stack)
    first, last = await trouble(
        stack, caplog, lambda: asyncio.to_thread(stack.server.kill), lambda: asyncio.to_thread(stack.server.start)
    )
    assert first.startswith("online audit: Redis: LedgerUnavailable")
    assert last == "online audit: goes on"


async def test_a_postgres_that_takes_no_connection_is_told_once_and_the_audit_goes_on(
    stack: Stack, caplog: pytest.LogCaptureFixture
) -> None:
    await busy_account(stack)

    name = await stack.pool.fetchval("SELECT current_database()")
    beside = await connect(stack.database_url.replace(name, "postgres"))
    ours = f"application_name = 'tollgate audit' AND datname = '{name}'"

    async def cut() -> None:
        await beside.execute(f"ALTER DATABASE {name} WITH ALLOW_CONNECTIONS false")
        await beside.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {ours}")

    try:
        allow = f"ALTER DATABASE {name} WITH ALLOW_CONNECTIONS true"
        first, last = await trouble(stack, caplog, cut, lambda: beside.execute(allow))
    finally:
        await beside.close()
    assert "not currently accepting connections" in first
    assert last == "online audit: goes on"
