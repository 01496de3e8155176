"""The settling connection against a Valkey with a real replica: what its answers promise, and what they cost others."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from metering.ledger import Gone, Held, LedgerUnavailable, Settled
from metering.redis_ledger import RedisLedger
from storage.redis_client import RedisClient, RedisReplyError, RedisUnavailable
from storage.redis_replicated import BATCH_MAX, ReplicatedClient
from tests.support.redis_server import RedisServer
from tests.support.replicas import Pair, connected, figure, one_blocked, replicated, waits
from tests.support.valkey import SHARD, Stand, stand_on

SLACK_S = 0.5
"""For a machine that has other work too."""


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with replicated() as running:
        yield running


@dataclass
class Desk:
    """A stand whose ledger settles through `settling`. `unconfirmed` has what no replica confirmed."""

    stand: Stand
    ledger: RedisLedger
    settling: ReplicatedClient
    replica: RedisClient
    unconfirmed: list[int] = field(default_factory=list)

    async def on_replica(self, sid: str) -> dict[str, str]:
        """The session as the replica has it now."""
        flat = await self.replica.call("HGETALL", self.stand.at.session + sid)
        return {flat[i].decode(): flat[i + 1].decode() for i in range(0, len(flat), 2)}


@contextlib.asynccontextmanager
async def settling_on(
    server: RedisServer,
    unconfirmed: list[int],
    *,
    call_ms: int = 20_000,
    wait_ms: int = 10_000,
    pending_max: int = 5_000,
) -> AsyncIterator[ReplicatedClient]:
    client = ReplicatedClient(
        server.url,
        call_ms=call_ms,
        connect_ms=2_000,
        pending_max=pending_max,
        on_unconfirmed=unconfirmed.append,
        wait_ms=wait_ms,
    )
    await client.start()
    try:
        yield client
    finally:
        await client.aclose()


@contextlib.asynccontextmanager
async def desk_on(pair: Pair, **bounds: int) -> AsyncIterator[Desk]:
    unconfirmed: list[int] = []
    async with (
        stand_on(pair.primary) as stand,
        settling_on(pair.primary, unconfirmed, **bounds) as settling,
        connected(pair.replica) as replica,
    ):
        await stand.grant("g", 100_000)
        await pair.following()
        ledger = RedisLedger(stand.client, loaded=stand.scripts, settling=settling)
        await ledger.start()
        await stand.client.call("CONFIG", "RESETSTAT")
        yield Desk(stand, ledger, settling, replica, unconfirmed)


@pytest.fixture
async def desk(pair: Pair) -> AsyncIterator[Desk]:
    """A desk whose WAITs last as long as a test does."""
    async with desk_on(pair) as ready:
        yield ready


async def test_a_settlement_is_answered_only_when_the_replica_has_it(pair: Pair, desk: Desk) -> None:
    ref = await desk.stand.hold("s1", 50)
    with pair.replica_frozen():
        settle = asyncio.create_task(desk.ledger.settle(ref, 30, "completed"))
        await one_blocked(desk.stand.client)
        assert await desk.stand.client.call("HGET", desk.stand.at.session + "s1", "st") == b"T"
        assert not settle.done()
    assert await settle == Settled(30, 0, 99_970, 2)
    assert (await desk.on_replica("s1"))["st"] == "T"
    assert desk.unconfirmed == []


async def test_every_answer_is_on_the_replica_at_once(desk: Desk) -> None:
    for number in range(50):
        ref = await desk.stand.hold(f"s{number}", 10)
        await desk.ledger.settle(ref, 5, "completed")
        assert (await desk.on_replica(f"s{number}"))["st"] == "T"


async def test_voids_and_sweeps_wait_too_and_nothing_else_does(desk: Desk) -> None:
    voided, swept = await desk.stand.hold("s1", 10), await desk.stand.hold("s2", 10)
    await desk.ledger.progress(swept, 1, 4, 10)
    assert await waits(desk.stand.client) == 0
    await desk.ledger.void(voided)
    assert await waits(desk.stand.client) == 1
    await desk.stand.tick(15_000)
    assert [one.session for one in await desk.ledger.sweep_due(SHARD, 10)] == ["s2"]
    assert await waits(desk.stand.client) == 2


async def test_a_frozen_replica_delays_settlements_by_one_wait_and_reserves_by_nothing(pair: Pair) -> None:
    async with desk_on(pair, wait_ms=250, call_ms=2_000) as desk:
        ref = await desk.stand.hold("s0", 10)
        with pair.replica_frozen():
            began = time.monotonic()
            settle = asyncio.create_task(desk.ledger.settle(ref, 7, "completed"))
            await one_blocked(desk.stand.client)
            slowest, reserves = 0.0, 0
            while not settle.done():
                at = time.monotonic()
                assert isinstance(await desk.ledger.reserve(desk.stand.request(f"r{reserves}", 1)), Held)
                reserves += 1
                slowest = max(slowest, time.monotonic() - at)
            assert (await settle).charged == 7
            assert 0.25 <= time.monotonic() - began < 0.25 + SLACK_S
        assert reserves > 20
        assert slowest < 0.2
        assert desk.unconfirmed == [1]


async def test_a_hundred_concurrent_settlements_share_their_waits(desk: Desk) -> None:
    refs = [await desk.stand.hold(f"s{n}", 10) for n in range(100)]
    ended = await asyncio.gather(*(desk.ledger.settle(ref, 5, "completed") for ref in refs))
    assert sum(end.charged for end in ended if isinstance(end, Settled)) == 500
    assert await waits(desk.stand.client) <= 2
    assert (await desk.stand.ledger.balance(desk.stand.account)).held == 0


async def test_a_crowd_is_written_in_bounded_batches_and_each_gets_its_own_reply(desk: Desk) -> None:
    words = [f"w{n}" for n in range(3 * BATCH_MAX + 1)]
    assert await asyncio.gather(*(desk.settling.call("ECHO", word) for word in words)) == [w.encode() for w in words]
    assert await waits(desk.stand.client) == 4


async def test_what_is_asked_for_during_a_batch_makes_the_next(pair: Pair, desk: Desk) -> None:
    with pair.replica_frozen():
        first = asyncio.ensure_future(desk.settling.call("INCR", "count"))
        await one_blocked(desk.stand.client)
        rest = asyncio.gather(*(desk.settling.call("INCR", "count") for _ in range(30)))
        assert await desk.stand.client.call("GET", "count") == b"1"
    assert [await first, *await rest] == list(range(1, 32))
    assert await waits(desk.stand.client) == 2


async def test_a_lost_connection_leaves_the_settlement_owed_and_the_repeat_makes_it_once(
    pair: Pair, desk: Desk
) -> None:
    ref = await desk.stand.hold("s1", 50)
    with pair.replica_frozen():
        settle = asyncio.create_task(desk.ledger.settle(ref, 30, "completed"))
        await one_blocked(desk.stand.client)
        await desk.stand.client.call("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        await one_blocked(desk.stand.client)
        assert not settle.done(), "the repeat waits for the replica as the first did"
    answer = await settle
    assert isinstance(answer, Settled)
    assert (answer.charged, answer.repeated) == (30, True)
    assert len(await desk.stand.entries()) == 2


async def test_a_lost_connection_fails_what_was_written_and_what_waited_behind_it(pair: Pair, desk: Desk) -> None:
    with pair.replica_frozen():
        written = asyncio.ensure_future(desk.settling.call("SET", "a", "1"))
        await one_blocked(desk.stand.client)
        behind = asyncio.ensure_future(desk.settling.call("SET", "b", "1"))
        await asyncio.sleep(0)
        await desk.stand.client.call("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        lost: Any = await asyncio.gather(written, behind, return_exceptions=True)
    assert [(type(error), error.sent) for error in lost] == [(RedisUnavailable, True), (RedisUnavailable, False)]
    assert await desk.stand.client.call("MGET", "a", "b") == [b"1", None]


async def test_a_silent_server_fails_everyone_within_one_bound(pair: Pair) -> None:
    async with settling_on(pair.primary, [], call_ms=600, wait_ms=100) as client:
        pair.primary.signal(signal.SIGSTOP)
        began = time.monotonic()
        first = asyncio.ensure_future(client.call("PING"))
        await asyncio.sleep(0.05)
        behind = asyncio.ensure_future(client.call("PING"))
        late: Any = await asyncio.gather(first, behind, return_exceptions=True)
        seconds = time.monotonic() - began
        pair.primary.signal(signal.SIGCONT)
        assert [(type(error), error.sent) for error in late] == [(RedisUnavailable, True), (RedisUnavailable, False)]
        assert 0.6 <= seconds < 0.6 + SLACK_S
        assert await client.call("ECHO", "again") == b"again"


async def test_pending_calls_are_bounded(pair: Pair) -> None:
    async with settling_on(pair.primary, [], pending_max=10) as client:
        answers = await asyncio.gather(*(client.call("ECHO", n) for n in range(15)), return_exceptions=True)
        assert answers[:10] == [str(n).encode() for n in range(10)]
        assert all(isinstance(answer, RedisUnavailable) and not answer.sent for answer in answers[10:])
        assert await client.call("ECHO", "free") == b"free"


async def test_one_callers_error_is_not_its_neighbours(desk: Desk) -> None:
    bad: Any = None
    answers = await asyncio.gather(
        desk.settling.call("SET", "text", "x"),
        desk.settling.call("LPUSH", "text", "y"),
        desk.settling.call("SET", "text", bad),
        desk.settling.call("GET", "text"),
        return_exceptions=True,
    )
    assert isinstance(answers[1], RedisReplyError)
    assert answers[1].code == "WRONGTYPE"
    assert isinstance(answers[2], TypeError)
    assert (answers[0], answers[3]) == (b"OK", b"x")


async def test_a_forgotten_script_is_sent_again(desk: Desk) -> None:
    ref = await desk.stand.hold("s1", 10)
    await desk.stand.client.call("SCRIPT", "FLUSH")
    ended = await desk.ledger.settle(ref, 5, "completed")
    assert isinstance(ended, Settled)
    assert (ended.charged, ended.repeated) == (5, False)


async def test_a_server_that_forbids_wait_settles_without_confirmation(pair: Pair) -> None:
    async with desk_on(pair) as desk:
        await desk.stand.client.call("ACL", "SETUSER", "app", "on", ">secret", "~*", "&*", "+@all", "-wait")
        unconfirmed: list[int] = []
        client = ReplicatedClient(
            f"unix://app:secret@{pair.primary.socket}",
            call_ms=2_000,
            connect_ms=2_000,
            pending_max=9,
            on_unconfirmed=unconfirmed.append,
        )
        await client.start()
        assert await client.call("SET", "x", "1") == b"OK"
        assert unconfirmed == [1]
        await client.aclose()
        await desk.stand.client.call("ACL", "DELUSER", "app")


async def test_a_demoted_primarys_answer_is_unknown(pair: Pair, desk: Desk) -> None:
    with pair.replica_frozen():
        written = asyncio.ensure_future(desk.settling.call("SET", "a", "1"))
        await one_blocked(desk.stand.client)
        await desk.stand.client.call("REPLICAOF", "127.0.0.1", 1)
        try:
            with pytest.raises(RedisUnavailable) as caught:
                await written
        finally:
            await desk.stand.client.call("REPLICAOF", "NO", "ONE")
        assert caught.value.sent


async def test_cancelled_callers_cross_no_reply(desk: Desk) -> None:
    async def echo(number: int) -> bytes:
        return bytes(await desk.settling.call("ECHO", f"tag-{number}"))

    tasks = [asyncio.create_task(echo(n)) for n in range(600)]
    for number, task in enumerate(tasks):
        if number % 40 == 0:
            await asyncio.sleep(0)
        if number % 2:
            task.cancel()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    survivors = {n: answer for n, answer in enumerate(answers) if not isinstance(answer, asyncio.CancelledError)}
    assert len(survivors) >= 300
    assert survivors == {n: f"tag-{n}".encode() for n in survivors}


async def test_closing_ends_every_pending_call(pair: Pair, desk: Desk) -> None:
    async with settling_on(pair.primary, []) as client:
        with pair.replica_frozen():
            written = asyncio.ensure_future(client.call("SET", "a", "1"))
            await one_blocked(desk.stand.client)
            behind = asyncio.ensure_future(client.call("SET", "b", "1"))
            await client.aclose()
        ended = await asyncio.gather(written, behind, return_exceptions=True)
        assert all(isinstance(error, RedisUnavailable) for error in ended)
        with pytest.raises(RedisUnavailable, match="closed"):
            await client.call("PING")


def test_a_bound_that_no_wait_fits_into_is_refused() -> None:
    with pytest.raises(ValueError, match="call_ms is 250"):
        ReplicatedClient("redis://h", call_ms=250, connect_ms=1, pending_max=1)


async def test_without_a_settling_client_settlements_do_not_wait(pair: Pair, desk: Desk) -> None:
    with pair.replica_frozen():
        ref = await desk.stand.hold("s1", 10)
        assert not isinstance(await desk.stand.ledger.settle(ref, 5, "completed"), Gone)
        assert await figure(desk.stand.client, "clients", "blocked_clients") == 0
    assert await waits(desk.stand.client) == 0


async def test_a_ledger_that_gives_up_says_that_the_outcome_is_unknown(pair: Pair, desk: Desk) -> None:
    ref = await desk.stand.hold("s1", 10)
    hasty = RedisLedger(desk.stand.client, loaded=desk.stand.scripts, settling=desk.settling, tries=1)
    await hasty.start()
    with pair.replica_frozen():
        settle = asyncio.create_task(hasty.settle(ref, 5, "completed"))
        await one_blocked(desk.stand.client)
        await desk.stand.client.call("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        with pytest.raises(LedgerUnavailable):
            await settle
