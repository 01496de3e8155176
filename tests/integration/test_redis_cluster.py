"""The ledger on a real Valkey cluster: slots that move under load, primaries that die, nodes that forget scripts."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest

from metering import journal_store
from metering.keys import SHARDS, mark_beside
from metering.ledger import (
    AccountRef,
    GrantRequest,
    Held,
    HoldRequest,
    LedgerUnavailable,
    Progressed,
    SessionRef,
    Settled,
)
from metering.reconcile import audit
from metering.redis_ledger import RedisLedger
from metering.server_check import inspect, replicas_word, run_id
from storage.database import connect_pool
from storage.redis_client import RedisClient, RedisReplyError, RedisUnavailable
from storage.redis_cluster import ClusterClient
from storage.redis_open import open_redis, open_replicated, servers
from storage.redis_slots import slot_of
from tests.support.redis_cluster import Cluster, Node, clustered, shards_at, until
from tests.support.redis_server import RedisServer
from tests.support.stack import Stack, uuid7

CREDIT = 1_000_000


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with clustered() as running:
        yield running


@dataclass
class Desk:
    """A client of the cluster and a ledger on it, with one account for each shard that a test asks for."""

    client: ClusterClient
    ledger: RedisLedger
    accounts: dict[int, AccountRef] = field(default_factory=dict)

    async def account(self, shard: int) -> AccountRef:
        ref = self.accounts[shard] = AccountRef(f"acc-{uuid7()}", shard)
        await self.ledger.grant(GrantRequest(f"g-{ref.id}", ref, CREDIT, 50, 0, created_ms=1))
        return ref

    async def hold(self, account: AccountRef, want: int = 100) -> SessionRef:
        sid = uuid7()
        request = HoldRequest(
            session=sid, account=account, key="key", want=want, minimum=want, prompt_cost=1, body_hash="hash",
            owner="owner", price_version="price", metadata=b"{}",
        )  # fmt: skip
        held = await self.ledger.reserve(request)
        assert isinstance(held, Held), held
        return SessionRef(sid, account, "key", held.fence)

    async def session(self, account: AccountRef, charge: int = 7) -> None:
        """One whole session whose every answer is checked."""
        ref = await self.hold(account)
        assert isinstance(await self.ledger.progress(ref, 1, 3, 100), Progressed)
        settled = await self.ledger.settle(ref, charge, "completed")
        assert isinstance(settled, Settled)
        assert (settled.charged, settled.repeated) == (charge, False)

    async def progressed(self, ref: SessionRef, seq: int) -> bool:
        """Whether a checkpoint is taken; a call that is not answered counts as no."""
        with contextlib.suppress(LedgerUnavailable):
            return isinstance(await self.ledger.progress(ref, seq, 5, 100), Progressed)
        return False

    async def charged(self, account: AccountRef) -> int:
        """What the account has paid: nothing is held, and what it paid is gone from what it has."""
        balance = (await self.ledger.snapshot(account)).balance
        assert (balance.held, balance.available) == (0, CREDIT - balance.charged)
        return balance.charged


@contextlib.asynccontextmanager
async def desk_on(cluster: Cluster, *, call_ms: int = 5_000) -> AsyncIterator[Desk]:
    client = await open_redis(cluster.url, call_ms=call_ms, connect_ms=2_000, pending_max=10_000)
    try:
        assert isinstance(client, ClusterClient)
        ledger = RedisLedger(client)
        await ledger.init_shards(range(128))
        await ledger.start()
        yield Desk(client, ledger)
    finally:
        await client.aclose()


@pytest.fixture
async def desk(cluster: Cluster) -> AsyncIterator[Desk]:
    for node in cluster.nodes:
        await node.ask("FLUSHALL")
        await node.ask("CONFIG", "RESETSTAT")
    async with desk_on(cluster) as ready:
        yield ready


async def test_every_verb_works_in_every_shard_on_its_own_primary(cluster: Cluster, desk: Desk) -> None:
    accounts = await asyncio.gather(*(desk.account(shard) for shard in range(128)))
    await asyncio.gather(*(desk.session(account) for account in accounts))
    voided = await desk.hold(accounts[5])
    await desk.ledger.void(voided)
    assert await asyncio.gather(*(desk.charged(account) for account in accounts)) == [7] * 128
    for node in cluster.nodes:
        assert await node.erred("MOVED") == 0
        keys = await node.ask("KEYS", "a:*")
        assert sorted(key[4:7] for key in keys) == [b"%03d" % shard for shard in shards_at(cluster, node)]


async def test_a_server_that_is_no_cluster_gets_the_plain_client(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    server.start()
    try:
        client = await open_redis(server.url, call_ms=2_000, connect_ms=2_000, pending_max=9)
        assert type(client) is RedisClient
        assert servers(client) == [client]
        await client.aclose()
    finally:
        server.kill()


async def test_what_has_no_key_goes_to_any_server_or_to_all(cluster: Cluster, desk: Desk) -> None:
    client = desk.client
    assert await client.call("PING") == b"PONG"
    assert await client.call("EVAL", "return 7", 0) == 7
    sha = await client.call("SCRIPT", "LOAD", "return 8")
    assert [await node.ask("SCRIPT", "EXISTS", sha) for node in cluster.nodes] == [[1]] * 3
    info = await client.call("INFO", "server")
    assert info.count(b"tcp_port:") == 3
    assert run_id(info) == run_id(await client.call("INFO", "server"))
    assert run_id(info) not in [run_id(await node.ask("INFO", "server")) for node in cluster.nodes]
    with pytest.raises(ValueError, match="SCAN is for one server"):
        client.call("SCAN", "0")
    assert len(servers(client)) == 3
    assert (await inspect(client)).faults == (
        "its append-only file is off, so a restart would lose holds: set appendonly yes",
    )
    assert await replicas_word(client, 1) in (
        "degraded: 0 of 1 replicas follow", "degraded: min-replicas-to-write is not in force",
    )  # fmt: skip


async def test_replies_and_errors_reach_their_callers(desk: Desk) -> None:
    keys = [f"key-{number}" for number in range(600)]
    await asyncio.gather(*(desk.client.call("SET", key, key) for key in keys))
    assert await asyncio.gather(*(desk.client.call("GET", key) for key in keys)) == [key.encode() for key in keys]
    with pytest.raises(RedisReplyError, match="WRONGTYPE"):
        await desk.client.call("LPUSH", keys[0], "x")
    with pytest.raises(TypeError):
        desk.client.call("SET", "key", [1])  # type: ignore[arg-type]


async def test_slots_move_under_load_and_every_call_is_answered_right(cluster: Cluster, desk: Desk) -> None:
    source, target = cluster.nodes[0], cluster.nodes[1]
    shards = shards_at(cluster, source)[:12]
    accounts = [await desk.account(shard) for shard in shards]
    done, stop = dict.fromkeys(shards, 0), asyncio.Event()

    async def serve(account: AccountRef) -> None:
        while not stop.is_set():
            await desk.session(account)
            done[account.shard] += 1

    async def more() -> None:
        """Until every account has been served again."""
        before = dict(done)

        async def served() -> bool:
            return all(done[shard] >= before[shard] + 2 for shard in shards)

        await until(served)

    serving = [asyncio.create_task(serve(account)) for account in accounts for _ in range(2)]
    await more()
    await cluster.move(0, 5_460, source, target)
    await more()
    await cluster.move(0, 5_460, target, source)
    await more()
    stop.set()
    await asyncio.gather(*serving)  # none was refused or failed
    assert [await desk.charged(account) for account in accounts] == [7 * done[shard] for shard in shards]
    assert await source.erred("MOVED") > 0
    assert await target.erred("MOVED") > 0


async def test_a_primary_that_had_no_slots_is_found_by_the_first_call_sent_there(cluster: Cluster) -> None:
    empty, other = cluster.nodes[2], cluster.nodes[1]
    await cluster.move(10_923, 16_383, empty, other)
    async with desk_on(cluster) as desk:
        assert len(desk.client.primaries()) == 2
        shards = shards_at(cluster, empty)[:8]
        accounts = [await desk.account(shard) for shard in shards]
        await cluster.move(10_923, 16_383, other, empty)
        async with asyncio.timeout(20):
            await asyncio.gather(*(desk.session(account) for account in accounts))
        assert len(desk.client.primaries()) == 3
        assert [await desk.charged(account) for account in accounts] == [7] * 8


async def test_a_slot_that_is_moved_key_by_key_answers_from_where_the_key_is_or_not_at_all(
    cluster: Cluster, desk: Desk
) -> None:
    source, target = cluster.nodes[0], cluster.nodes[1]
    account = await desk.account(shards_at(cluster, source)[0])
    at, slot = SHARDS[account.shard], slot_of(SHARDS[account.shard].meta)
    ref = await desk.hold(account)
    await target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", source.id)
    await source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", target.id)
    await _migrate(source, target, at.meta)
    assert await desk.client.call("HGET", at.meta, "ep") == b"1"  # asked for, it is already there
    assert await desk.client.call("HGET", at.account + account.id, "hd") == b"100"
    with pytest.raises(LedgerUnavailable, match="TRYAGAIN"):
        await desk.ledger.progress(ref, 1, 3, 100)
    for key in await source.ask("CLUSTER", "GETKEYSINSLOT", slot, 1_000):
        await _migrate(source, target, key)
    await asyncio.gather(*(desk.ledger.progress(ref, seq, 3 + seq, 100) for seq in range(1, 50)))
    assert await target.erred("MOVED") == 0
    assert await source.erred("ASK") >= 50
    for node in (target, source):
        await node.ask("CLUSTER", "SETSLOT", slot, "NODE", target.id)
    settled = await desk.ledger.settle(ref, 60, "completed")
    assert (isinstance(settled, Settled), await desk.charged(account)) == (True, 60)
    await cluster.move(slot, slot, target, source)


async def _migrate(source: Node, target: Node, key: str | bytes) -> None:
    await source.ask("MIGRATE", "127.0.0.1", target.port, key.decode() if isinstance(key, bytes) else key, 0, 5_000)


async def test_scripts_that_one_node_forgot_are_loaded_again(cluster: Cluster, desk: Desk) -> None:
    accounts = [await desk.account(shards_at(cluster, node)[0]) for node in cluster.nodes]
    await cluster.nodes[1].ask("SCRIPT", "FLUSH")
    await asyncio.gather(*(desk.session(account) for account in accounts))
    assert await cluster.nodes[1].erred("NOSCRIPT") > 0
    assert [await desk.charged(account) for account in accounts] == [7, 7, 7]


async def test_the_journal_of_all_shards_arrives_and_the_audit_finds_nothing(
    cluster: Cluster, desk: Desk, ledger_database: str
) -> None:
    pool = await connect_pool(ledger_database, size_max=6)
    await journal_store.open_cursors(pool, await journal_store.shards_without_journal(pool))
    redis = cast(RedisClient, desk.client)  # the stack needs what both have
    stack = Stack(ledger_database, cluster.url, pool, redis, desk.ledger, cluster.nodes[1].server)
    try:
        accounts = [await stack.account(f"account-{number}") for number in range(40)]
        await asyncio.gather(*(stack.grant(each, f"g-{each.id}", 1_000) for each in accounts))
        await asyncio.gather(*(stack.spend(each, 50, 30) for each in accounts for _ in range(3)))
        flusher = stack.flusher()
        status = await flusher.inspect()
        assert status.entries_behind == 4 * 40
        assert 0 <= status.oldest_age_ms < 60_000
        assert await flusher.drain() == 4 * 40
        assert (await flusher.inspect()).entries_behind == 0
        assert await stack.outbox_length() == 0
        assert await pool.fetchval("SELECT sum(charged) FROM session") == 40 * 90
        assert (await audit(pool, desk.ledger, desk.client)).differences == ()
        stray = await desk.account(shards_at(cluster, cluster.nodes[2])[0])
        await flusher.drain()
        assert {each.account for each in (await audit(pool, desk.ledger, desk.client)).differences} == {stray.id}
        assert stack.alarms == []
    finally:
        await stack.close()


async def test_a_settlement_waits_for_the_replica_of_its_own_primary(cluster: Cluster, desk: Desk) -> None:
    unconfirmed: list[int] = []
    settling = await open_replicated(
        cluster.url, call_ms=5_000, connect_ms=2_000, pending_max=100,
        on_unconfirmed=unconfirmed.append, mark_beside=mark_beside,
    )  # fmt: skip
    try:
        ledger = RedisLedger(desk.client, settling=settling)
        await ledger.start()
        with_replica, without = [
            await desk.account(shards_at(cluster, node)[0]) for node in (cluster.nodes[2], cluster.nodes[1])
        ]
        ref = await desk.hold(with_replica)
        assert isinstance(await ledger.settle(ref, 5, "completed"), Settled)
        assert unconfirmed == []
        cluster.replica.server.signal(signal.SIGSTOP)
        try:
            again = await ledger.settle(ref, 5, "completed")  # it writes nothing, and waits all the same
            assert isinstance(again, Settled)
            assert (again.repeated, unconfirmed) == (True, [1])
        finally:
            cluster.replica.server.signal(signal.SIGCONT)
        assert isinstance(await ledger.settle(await desk.hold(without), 5, "completed"), Settled)
        assert unconfirmed == [1, 1]
    finally:
        await settling.aclose()


async def test_without_a_server_a_start_and_a_call_fail_unsent(cluster: Cluster, desk: Desk) -> None:
    key = "{" + SHARDS[shards_at(cluster, cluster.nodes[0])[0]].meta[3:7] + "}"
    cluster.nodes[0].server.kill()

    async def gone() -> bool:
        return not desk.client.connected

    await until(gone)
    started = time.monotonic()
    with pytest.raises(RedisUnavailable) as refused:
        await desk.client.call("GET", key)
    assert not refused.value.sent
    assert time.monotonic() - started < 1
    with pytest.raises(RedisUnavailable):
        await open_redis(cluster.url, call_ms=500, connect_ms=500, pending_max=9)
    cluster.nodes[0].server.start()

    async def back() -> bool:
        with contextlib.suppress(RedisUnavailable, RedisReplyError):  # CLUSTERDOWN for the first two seconds
            return bool(await desk.client.call("SET", key, "1") == b"OK")
        return False

    await until(back)
    assert desk.client.connected


async def test_a_planned_failover_is_followed_and_told(cluster: Cluster, desk: Desk) -> None:
    lost: list[None] = []
    desk.client.on_lost(lambda: lost.append(None))
    account = await desk.account(shards_at(cluster, cluster.nodes[2])[0])
    ref, slot = await desk.hold(account), slot_of(SHARDS[account.shard].meta)
    for seq, elected in enumerate((cluster.replica, cluster.nodes[2]), start=1):
        told, before = len(lost), run_id(await desk.client.call("INFO", "server"))
        await elected.ask("CLUSTER", "FAILOVER")

        async def reigns(port: int = elected.port) -> bool:
            return all([await cluster.owner(slot, node) == port for node in cluster.all])

        await until(reigns)
        await until(lambda number=seq: desk.progressed(ref, number))
        assert len(lost) > told
        assert run_id(await desk.client.call("INFO", "server")) != before
    assert isinstance(await desk.ledger.settle(ref, 9, "completed"), Settled)
    assert await desk.charged(account) == 9


async def test_a_killed_primary_costs_its_calls_until_its_replica_serves(cluster: Cluster, desk: Desk) -> None:
    lost, messages, gaps = [0], list[bytes](), list[None]()
    desk.client.on_lost(lambda: lost.__setitem__(0, lost[0] + 1))
    mine, theirs = [await desk.account(shards_at(cluster, node)[0]) for node in (cluster.nodes[2], cluster.nodes[1])]
    ref = await desk.hold(mine)
    subscriptions = []
    while (await cluster.nodes[2].ask("PUBSUB", "NUMSUB", "news"))[1] == 0:
        subscriptions.append(await desk.client.subscribe("news", messages.append, lambda: gaps.append(None)))
        assert len(subscriptions) < 100, "none of them chose the primary that is killed"
    assert await cluster.nodes[2].ask("WAIT", 1, 5_000) >= 0
    before = run_id(await desk.client.call("INFO", "server"))
    cluster.nodes[2].server.kill()
    with pytest.raises(LedgerUnavailable):
        await desk.ledger.progress(ref, 1, 3, 100)
    await desk.session(theirs)
    assert run_id(await desk.client.call("INFO", "server")) == before
    assert not desk.client.connected
    await cluster.replica.ask("CLUSTER", "FAILOVER", "FORCE")
    await until(lambda: desk.progressed(ref, 2))
    assert await cluster.replica.erred("NOSCRIPT") > 0
    settled = await desk.ledger.settle(ref, 60, "completed")
    assert isinstance(settled, Settled)
    assert (await desk.charged(mine), await desk.charged(theirs)) == (60, 7)
    assert (desk.client.connected, lost[0] >= 2) == (True, True)
    assert run_id(await desk.client.call("INFO", "server")) != before

    async def heard() -> bool:
        messages.clear()
        await desk.client.call("PUBLISH", "news", "one")
        await asyncio.sleep(0.02)  # for those that listen at other servers
        return len(messages) == len(subscriptions)

    await until(heard)
    assert len(gaps) > len(subscriptions)
