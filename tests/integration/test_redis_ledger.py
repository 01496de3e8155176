"""The typed ledger over a real connection: crowds, lost answers, a dead server, a lost epoch."""

from __future__ import annotations

import asyncio
import signal
import time
from typing import Any

import pytest

from metering.keys import SHARDS
from metering.ledger import (
    AccountRef,
    Balance,
    Gone,
    GrantRefused,
    GrantRequest,
    Held,
    KeyLimits,
    LedgerError,
    LedgerFrozen,
    LedgerUnavailable,
    Refused,
    SessionRef,
    Settled,
)
from metering.redis_ledger import RedisLedger
from metering.scripts import Word
from metering.server_check import VERIFIED_KEY
from storage.redis_client import RedisClient
from tests.support.redis_server import RedisServer
from tests.support.valkey import SHARD, WALL, Stand, stand_on, valkey


class Counting:
    """A client that passes everything on and knows how many scripts it was asked to run."""

    def __init__(self, client: RedisClient) -> None:
        self.client = client
        self.runs = 0

    def call(self, *args: Word) -> asyncio.Future[Any]:
        if args[0] == "EVALSHA":
            self.runs += 1
        return self.client.call(*args)

    async def reached(self, runs: int) -> None:
        deadline = time.monotonic() + 10
        while self.runs < runs:
            assert time.monotonic() < deadline, "the ledger did not call often enough in time"
            await asyncio.sleep(0.005)


async def test_a_thousand_parallel_calls_on_a_balance_for_ten_admit_ten(stand: Stand) -> None:
    await stand.grant("g", 1_000)
    answers = await asyncio.gather(*(stand.ledger.reserve(stand.request(f"s{n}", 100)) for n in range(1_000)))
    held = [n for n, answer in enumerate(answers) if isinstance(answer, Held)]
    assert len(held) == 10
    assert {a.reason for a in answers if isinstance(a, Refused)} == {"in_flight"}
    refs = [SessionRef(f"s{n}", stand.account, "key", WALL) for n in held]
    ended = await asyncio.gather(*(stand.ledger.settle(ref, 130, "completed") for ref in refs))
    assert sum(end.charged for end in ended) == 1_000
    assert await stand.ledger.balance(stand.account) == Balance(0, 0, 0, 1_000, 0)


async def test_fifty_concurrent_settlements_make_one_entry(stand: Stand) -> None:
    await stand.grant("g", 1_000)
    ref = await stand.hold("s1", 100)
    ended = await asyncio.gather(*(stand.ledger.settle(ref, 60 + n, "completed") for n in range(50)))
    assert sorted(end.repeated for end in ended if isinstance(end, Settled)) == [False] + [True] * 49
    assert len({end.charged for end in ended}) == 1
    assert [fields["t"] for _, fields in await stand.entries()] == ["grant", "settle"]


async def test_journal_numbers_have_no_gap_under_concurrency(stand: Stand) -> None:
    await stand.grant("g", 10_000)

    async def live(number: int) -> None:
        ref = await stand.hold(f"s{number}", 10, limits=KeyLimits(None, 1_000))
        await stand.ledger.progress(ref, 1, 3, 20)
        if number % 3:
            await stand.ledger.settle(ref, number % 25, "completed")
        else:
            await stand.ledger.void(ref)

    await asyncio.gather(*(live(number) for number in range(300)))
    assert [name for name, _ in await stand.entries()] == [f"1-{n}" for n in range(1, 302)]
    seen = await stand.ledger.snapshot(stand.account)
    spent = sum(number % 25 for number in range(300) if number % 3)
    assert seen.balance == Balance(10_000 - spent, 0, 0, spent, 0)
    assert await stand.client.call("HGET", stand.at.limits + "key", "p") == b"0"


async def test_a_settlement_whose_answers_are_lost_is_repeated_until_one_comes(server: RedisServer) -> None:
    async with stand_on(server) as stand:
        await stand.grant("g", 100)
        ref = await stand.hold("s1", 50)
        client = RedisClient(server.url, call_ms=150, connect_ms=2_000, pending_max=1_000)
        await client.start()
        counting = Counting(client)
        ledger = RedisLedger(counting, tries=50, budget_ms=20_000, loaded=stand.scripts)
        try:
            await ledger.start()
            server.signal(signal.SIGSTOP)
            try:
                owed = asyncio.create_task(ledger.settle(ref, 20, "completed"))
                await counting.reached(2)
            finally:
                server.signal(signal.SIGCONT)
            assert await owed == Settled(20, 0, 80, 2, repeated=True)
            assert len(await stand.entries()) == 2
        finally:
            await client.aclose()


async def test_a_settlement_gives_up_inside_its_budget_and_says_that_it_is_owed(server: RedisServer) -> None:
    async with stand_on(server) as stand:
        await stand.grant("g", 100)
        ref = await stand.hold("s1", 50)
        client = RedisClient(server.url, call_ms=50, connect_ms=100, pending_max=1_000)
        await client.start()
        counting = Counting(client)
        ledger = RedisLedger(counting, tries=3, budget_ms=5_000, loaded=stand.scripts)
        hasty = RedisLedger(counting, tries=100, budget_ms=300, loaded=stand.scripts)
        try:
            await ledger.start()
            await hasty.start()
            server.signal(signal.SIGSTOP)
            try:
                with pytest.raises(LedgerUnavailable):
                    await ledger.settle(ref, 20, "completed")
                assert counting.runs == 3
                started = time.monotonic()
                with pytest.raises(LedgerUnavailable):
                    await hasty.settle(ref, 20, "completed")
                assert time.monotonic() - started < 2
                runs = counting.runs
                with pytest.raises(LedgerUnavailable):
                    await ledger.reserve(stand.request("s2", 10))
                assert counting.runs == runs + 1  # whether to try again is the caller's decision
            finally:
                server.signal(signal.SIGCONT)
        finally:
            await client.aclose()


async def test_a_reserve_whose_answer_was_lost_leaves_nothing_after_its_void(stand: Stand) -> None:
    await stand.grant("g", 100)
    lost = asyncio.ensure_future(stand.ledger.reserve(stand.request("s1", 60)))
    await asyncio.sleep(0)
    lost.cancel()  # written, but nobody reads the answer
    assert await stand.ledger.void(SessionRef("s1", stand.account, "key", 0)) == Settled(0, 0, 100, 2)
    assert await stand.ledger.balance(stand.account) == Balance(100, 0, 0, 0, 0)


async def test_a_lost_or_foreign_epoch_freezes_every_verb(stand: Stand) -> None:
    await stand.grant("g", 100)
    ref = await stand.hold("s1", 50)
    await stand.client.call("DEL", stand.at.meta)
    for call in (
        stand.ledger.reserve(stand.request("s2", 1)),
        stand.ledger.progress(ref, 1, 1, 1),
        stand.ledger.settle(ref, 1, "completed"),
        stand.ledger.void(ref),
        stand.ledger.grant(GrantRequest("h", stand.account, 1)),
        stand.ledger.balance(stand.account),
        stand.ledger.snapshot(stand.account),
        stand.ledger.sweep_due(SHARD, 10),
    ):
        with pytest.raises(LedgerFrozen):
            await call


async def test_a_shard_that_was_never_made_is_frozen_until_it_is_made(stand: Stand) -> None:
    elsewhere = AccountRef("acc", 9)
    with pytest.raises(LedgerFrozen, match="shard 9"):
        await stand.ledger.grant(GrantRequest("g", elsewhere, 5))
    await stand.client.call("HSET", SHARDS[9].meta, "wall", WALL)
    maker = RedisLedger(stand.client, loaded=stand.scripts)
    await maker.init_shards([9])
    await stand.ledger.grant(GrantRequest("g", elsewhere, 5))
    assert (await stand.ledger.balance(elsewhere)).available == 5


@pytest.mark.parametrize("closed", ["frozen", "not open", "not verified"])
async def test_a_rebuilt_shard_is_used_in_its_new_epoch_once_it_is_open(stand: Stand, closed: str) -> None:
    shut, opened = {
        "frozen": (("HSET", stand.at.meta, "ep", -1), ("HSET", stand.at.meta, "ep", 2)),
        "not open": (("HSET", stand.at.meta, "ep", 2, "fz", 1), ("HDEL", stand.at.meta, "fz")),
        "not verified": (("SET", VERIFIED_KEY, "another"), ("DEL", VERIFIED_KEY)),
    }[closed]
    await stand.client.call("HSET", stand.at.meta, "ep", 2)
    await stand.client.call(*shut)
    with pytest.raises(LedgerFrozen):
        await stand.ledger.reserve(stand.request("s1", 0))
    with pytest.raises(LedgerFrozen):
        await stand.ledger.balance(stand.account)
    await stand.client.call(*opened)
    ref = await stand.hold("s1", 0)
    await stand.ledger.settle(ref, 0, "completed")
    assert [name for name, _ in await stand.entries()] == ["2-1"]


async def test_out_of_bounds_requests_are_typed_or_errors_and_never_guessed(stand: Stand) -> None:
    await stand.grant("g", 100)
    ref = await stand.hold("s1", 50)
    assert await stand.ledger.reserve(stand.request("s2", -1)) == Refused("bounds", 0, 0)
    assert await stand.ledger.grant(GrantRequest("h", stand.account, 0)) == GrantRefused("bounds")
    for call in (
        stand.ledger.settle(ref, -1, "completed"),
        stand.ledger.settle(ref, 1, "swept"),
        stand.ledger.progress(ref, 1, 2**53, 1),
        stand.ledger.settle(SessionRef("s1", AccountRef("other", SHARD), "key", ref.fence), 1, "completed"),
        stand.ledger.init_shards([3], epoch=0),
    ):
        with pytest.raises(LedgerError, match="refused"):
            await call


async def test_the_sweeper_settles_what_is_overdue_and_leaves_what_was_renewed(stand: Stand) -> None:
    await stand.grant("g", 1_000)
    refs = [await stand.hold(f"s{n}", 10, key=f"key{n % 2}") for n in range(5)]
    await stand.tick(10_000)
    await stand.ledger.progress(refs[0], 1, 4, 10)
    await stand.tick(5_000)
    first = await stand.ledger.sweep_due(SHARD, 3)
    second = await stand.ledger.sweep_due(SHARD, 3)
    assert [one.session for one in first + second] == ["s1", "s2", "s3", "s4"]
    assert await stand.ledger.sweep_due(SHARD, 3) == []
    assert await stand.ledger.settle(refs[1], 7, "completed") == Gone("final", 0)
    assert await stand.ledger.settle(refs[0], 7, "completed") == Settled(7, 0, 993, 6)
    assert await stand.client.call("HGET", stand.at.limits + "key1", "p") == b"0"


async def test_two_sweepers_at_once_settle_each_session_once(stand: Stand) -> None:
    await stand.grant("g", 1_000)
    for number in range(20):
        await stand.hold(f"s{number}", 10)
    await stand.tick(15_000)
    both = await asyncio.gather(stand.ledger.sweep_due(SHARD, 50), stand.ledger.sweep_due(SHARD, 50))
    assert sorted(one.session for part in both for one in part) == sorted(f"s{n}" for n in range(20))
    assert (await stand.ledger.balance(stand.account)).available == 1_000


async def test_a_dead_server_is_unavailable_not_a_refusal() -> None:
    with valkey() as server:
        async with stand_on(server) as stand:
            server.kill()
            with pytest.raises(LedgerUnavailable):
                await stand.ledger.reserve(stand.request("s1", 1))
            with pytest.raises(LedgerUnavailable):
                await stand.ledger.balance(stand.account)
            with pytest.raises(LedgerUnavailable):
                await stand.ledger.start()


async def test_a_damaged_session_does_not_stop_the_sweep_of_the_others(stand: Stand) -> None:
    await stand.grant("g", 1_000)
    for number in range(4):
        await stand.hold(f"s{number}", 10)
    await stand.client.call("HSET", stand.at.session + "s1", "h", "x")
    await stand.tick(15_000)
    with pytest.raises(LedgerError, match="BROKEN"):
        await stand.ledger.sweep_due(SHARD, 10)
    assert (await stand.ledger.balance(stand.account)).sessions == 1
    assert [fields["s"] for _, fields in (await stand.entries())[1:]] == ["s0", "s2", "s3"]
