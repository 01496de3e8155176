"""Faults of Valkey and of the way to it. Row numbers are in each class.

Must not: leave anything spoilt behind when `strike` has returned.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from typing import ClassVar

import redis.asyncio

from loadtests.chaos import scripts
from loadtests.chaos.check import ChaosVerdict, Evidence
from loadtests.chaos.collect import OUT_OF_ORDER
from loadtests.chaos.proxy import Toxic
from loadtests.chaos.servers import MAXMEMORY, ChaosError
from loadtests.chaos.stage import Fault, Stage
from loadtests.chaos.world import Account, until
from metering.keys import SHARDS

STORM = 50
_STEP = """#!lua
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local clk = tonumber(redis.call('HGET', KEYS[1], 'clk') or '0')
redis.call('HSET', KEYS[1], 'clk', string.format('%.0f', math.max(clk, now) + ARGV[1]))
if ARGV[2] == 'with' then
  local leases = redis.call('ZRANGE', KEYS[2], '0', '-1')
  for i = 1, #leases do redis.call('ZINCRBY', KEYS[2], ARGV[1], leases[i]) end
end
return 0"""

_APPEND = """#!lua
local n = string.format('%.0f', redis.call('HGET', KEYS[1], 'n') + 1)
redis.call('XADD', KEYS[2], string.format('%s-%s', redis.call('HGET', KEYS[1], 'ep'), n), unpack(ARGV))
redis.call('HSET', KEYS[1], 'n', n)
return 0"""


def session_id() -> str:
    """A UUIDv7, as gateways mint them."""
    number = (int(time.time() * 1000) << 80) | (0x7 << 76) | (secrets.randbits(12) << 64)
    number |= (0b10 << 62) | secrets.randbits(62)
    text = f"{number:032x}"
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


class DuplicateFinalize(Fault):
    """Row 7. Sessions of a client of the scripts themselves, settled from many connections with different charges."""

    number, name, title = 7, "duplicate-finalize", f"{STORM} settlements of one session at the same moment"
    SESSIONS: ClassVar[int] = 20

    async def strike(self, stage: Stage) -> None:
        account = stage.world.customers[-1]
        links = [port.port for port in stage.world.links("valkey")]
        stores = [
            redis.asyncio.Redis.from_url(stage.world.valkey.url(links[number % len(links)]), socket_timeout=10)
            for number in range(STORM)
        ]
        try:
            for _ in range(self.SESSIONS):
                await self._storm(stage, stores, account)
        finally:
            await asyncio.gather(*(store.aclose() for store in stores))

    async def _storm(self, stage: Stage, stores: list[redis.asyncio.Redis], account: Account) -> None:
        sid = session_id()
        epoch = await scripts.epoch(stores[0], account)
        common: dict[str, str | int] = {
            "ep": epoch,
            "uid": account.id,
            "sid": sid,
            "kid": account.key_id,
            "metadata": "{}",
        }
        held = await scripts.run(stores[0], "reserve", account, sid, {
            **common, "owner": "storm", "body": "b", "price": "p", "want": 600, "minimum": 1, "prompt": 1,
            "lease": 15_000, "rpm": "", "parallel": "", "past": "",
        })  # fmt: skip
        if held[0] != b"HELD":
            raise ChaosError(f"the storm's session was not admitted: {held!r}")
        charges = [stage.random.randrange(1, 600) for _ in stores]
        answers = await asyncio.gather(*(
            scripts.run(store, "settle", account, sid, {
                **common, "fence": int(held[3]), "charge": charge, "outcome": "completed",
            })
            for store, charge in zip(stores, charges, strict=True)
        ))  # fmt: skip
        first = [int(one[1]) for one in answers if one[0] == b"SETTLED"]
        later = {int(one[1]) for one in answers if one[0] == b"FINAL"}
        stage.counts["settled once"] += len(first) == 1 and later == set(first) and len(answers) == STORM
        stage.counts["storms"] += 1
        stage.by_hand[sid] = first[0] if first else -1

    async def judge(self, stage: Stage, evidence: Evidence, verdict: ChaosVerdict) -> None:
        verdict.same(
            "storms in which one won and all were told its charge", stage.counts["settled once"], self.SESSIONS
        )


class RepliesLost(Fault):
    """Row 8. Every script may have run without its caller hearing of it."""

    number, name, title = 8, "replies-lost", "Valkey's replies are lost after the scripts have run"

    async def strike(self, stage: Stage) -> None:
        for _ in range(4):
            await stage.rest(0.5, 1.0)
            link = stage.random.choice(stage.world.links("valkey"))
            before = link.counts["replies lost"]
            link.spoil(Toxic(lose_replies=True))
            await stage.rest(0.5, 2.0)
            link.calm()
            stage.counts["replies lost"] += link.counts["replies lost"] - before


class ReserveDelayed(Fault):
    """Row 9. What was sent on the old connections arrives 3 s later, when its caller has long given up and voided."""

    number, name, title = 9, "reserve-delayed", "requests to Valkey arrive 3 s late, after their caller's void"
    DELAY_S: ClassVar[float] = 3.0

    def __init__(self) -> None:
        self._before = 0

    async def strike(self, stage: Stage) -> None:
        self._before = await self._tombstones(stage)
        for _ in range(3):
            await stage.rest(0.5, 1.0)
            link = stage.random.choice(stage.world.links("valkey"))
            stage.counts["connections delayed"] += link.spoil_open(Toxic(up_s=self.DELAY_S))
            await asyncio.sleep(self.DELAY_S + 0.5)
            link.cut(reset=True)
            link.calm()

    async def judge(self, stage: Stage, evidence: Evidence, verdict: ChaosVerdict) -> None:
        stage.counts["sessions swept"] += sum(row["outcome"] == "swept" for row in evidence.sessions)
        stage.counts["tombstones"] = await self._tombstones(stage) - self._before
        verdict.expect(stage.counts["tombstones"] > 0, "no void came before its reserve")

    async def _tombstones(self, stage: Stage) -> int:
        """Sessions that were void before they were known: a reserve that arrives later is refused."""
        store = stage.world.redis()
        async with contextlib.aclosing(store):
            names = [key async for key in store.scan_iter(match="s:*", count=1_000)]
            async with store.pipeline(transaction=False) as pipeline:
                for name in names:
                    pipeline.hget(name, "st")
                return sum(state == b"V" for state in await pipeline.execute())


class ValkeyKilled(Fault):
    """Row 10."""

    number, name, title = 10, "valkey-kill", "Valkey is killed with kill -9 and started again from its append-only file"

    async def strike(self, stage: Stage) -> None:
        await stage.rest(1.5, 3.0)
        await asyncio.to_thread(stage.world.valkey.kill)
        stage.counts["servers killed"] += 1
        await stage.rest(0.5, 2.0)
        await asyncio.to_thread(stage.world.valkey.start)


class ValkeySlow(Fault):
    """Row 16. Latency for everybody, a stall of 2 s, and a link on which nothing moves any more."""

    number, name, title = 16, "valkey-slow", "Valkey 200 ms away, standing still for 2 s, and behind a black hole"

    async def strike(self, stage: Stage) -> None:
        links = stage.world.links("valkey")
        for link in links:
            link.spoil(Toxic(up_s=0.1, down_s=0.1))
        await stage.rest(2.0, 3.0)
        stage.world.calm()
        await stage.rest(0.5, 1.0)
        for link in [*links, stage.world.replication]:
            link.spoil(Toxic(stalled=True))
        await asyncio.sleep(2.0)
        stage.world.calm()
        await stage.rest(0.5, 1.0)
        hole = stage.random.choice(links)
        hole.spoil(Toxic(stalled=True))
        await stage.rest(3.0, 5.0)
        hole.cut(reset=True)
        hole.calm()
        for link in links:
            stage.counts["times something waited"] += link.counts["stalled"] + link.counts["delayed"]


class MemoryFull(Fault):
    """Row 17, memory. Reserves are refused whole; settlements go on."""

    number, name, title = 17, "memory-full", "Valkey's memory is full (maxmemory below what it uses)"

    def __init__(self) -> None:
        self._full = self._free = 0.0

    async def strike(self, stage: Stage) -> None:
        store = stage.world.redis()
        async with contextlib.aclosing(store):
            await stage.rest(1.0, 2.0)
            try:
                await store.config_set("maxmemory", "1mb")
                self._full = time.time()
                await stage.rest(3.0, 5.0)
                refused = (await store.info("stats"))["total_error_replies"]
                stage.counts["error replies of Valkey"] = int(refused)
            finally:
                self._free = time.time()
                await store.config_set("maxmemory", MAXMEMORY)

    async def judge(self, stage: Stage, evidence: Evidence, verdict: ChaosVerdict) -> None:
        settled = sum(self._full < row["ended_s"] < self._free for row in evidence.sessions)
        stage.counts["sessions settled while memory was full"] = settled
        verdict.expect(settled > 0, "no session was settled while memory was full")


class DiskFull(Fault):
    """Row 17, disk. Nothing can be appended: writes are refused until there is room again."""

    number, name, title = 17, "disk-full", "Valkey's disk is full"

    async def strike(self, stage: Stage) -> None:
        valkey, world = stage.world.valkey, stage.world
        await stage.rest(1.0, 2.0)
        try:
            stage.counts[f"by {await asyncio.to_thread(valkey.fill_disk)}"] += 1
            await stage.rest(4.0, 6.0)
            store = world.redis()
            async with contextlib.aclosing(store):
                persistence = await store.info("persistence")
            stage.counts[f"append-only file: {persistence['aof_last_write_status']}"] += 1
        finally:
            await asyncio.to_thread(valkey.free_disk)

    async def judge(self, stage: Stage, evidence: Evidence, verdict: ChaosVerdict) -> None:
        verdict.expect(stage.counts["append-only file: err"] == 1, "the disk was never too full to write")


class ClockSteps(Fault):
    """Row 21, the shards' clocks. Gateways' own clocks cannot be moved without libfaketime, and are not.

    Forward: every shard's clock jumps past all leases. Back: the server's time falls behind what the shards have seen,
    which is done by moving the shards, with their leases, ahead of the server.
    """

    number, name, title = 21, "clock-steps", "the shards' clocks jump forward past every lease, and stand still for 8 s"
    BACK_S: ClassVar[float] = 8.0

    async def strike(self, stage: Stage) -> None:
        world = stage.world
        store = world.redis()
        async with contextlib.aclosing(store):
            await stage.rest(1.0, 2.0)
            before = await self._clocks(store)
            await self._step(store, world.lease_s + 1.0, "without")
            await asyncio.sleep(world.lease_s / 4)
            await self._step(store, self.BACK_S, "with")
            await stage.rest(2.0, 3.0)
            after = await self._clocks(store)
        stage.counts["clocks that went back"] = sum(new < old for new, old in zip(after, before, strict=True))
        # The server's clock has to catch up before a lease can run out again.
        await asyncio.sleep(world.lease_s + 1.0 - world.lease_s / 4 + self.BACK_S)

    async def _step(self, store: redis.asyncio.Redis, seconds: float, leases: str) -> None:
        for shard in SHARDS:
            ms = str(int(seconds * 1000))
            await store.eval(_STEP, 2, shard.meta, shard.leases, ms, leases)

    async def _clocks(self, store: redis.asyncio.Redis) -> list[int]:
        return [int(await store.hget(shard.meta, "clk") or 0) for shard in SHARDS]

    async def judge(self, stage: Stage, evidence: Evidence, verdict: ChaosVerdict) -> None:
        verdict.same("shards whose clock went back", stage.counts["clocks that went back"], 0)
        stage.counts["sessions swept"] += sum(row["outcome"] == "swept" for row in evidence.sessions)
        stage.counts["sessions corrected"] += sum(row["corrected"] for row in evidence.sessions)


class Poison(Fault):
    """Row 20. Entries that cannot become rows are set aside; the audit says so until a person has repaired them."""

    number, name, title = 20, "poison", "entries in the outbox that no row can be made of"
    ENTRIES: ClassVar[int] = 3

    def __init__(self) -> None:
        self._shard = SHARDS[0]

    async def strike(self, stage: Stage) -> None:
        world = stage.world
        self._shard = stage.random.choice(world.customers).shard
        store = world.redis()
        async with contextlib.aclosing(store):
            for number in range(self.ENTRIES):
                await stage.rest(0.3, 0.8)
                await self._bury(store, b"\x00\xff"[number % 2 :] * 100)
        await until(lambda: self._buried(stage), 20, "the poison is set aside")

    async def _bury(self, store: redis.asyncio.Redis, rubbish: bytes) -> None:
        words = ("t", "settle", "c", "many", "mt", rubbish)
        await store.eval(_APPEND, 2, self._shard.meta, self._shard.outbox, *words)

    async def _buried(self, stage: Stage) -> bool:
        with contextlib.suppress(*OUT_OF_ORDER):
            rows = await stage.world.fetch("SELECT count(*) AS n FROM outbox_dead WHERE shard = $1", self._shard.number)
            return bool(rows[0]["n"] >= self.ENTRIES)
        return False

    async def judge(self, stage: Stage, evidence: Evidence, verdict: ChaosVerdict) -> None:
        report = await stage.world.tollgate("audit", codes=(0, 1))
        told = [one for one in report["differences"] if one["what"].startswith("no entry is dead")]
        stage.counts["dead entries that the audit named"] = len(told)
        verdict.same("dead entries that the audit named", len(told), self.ENTRIES)
        await self._repair(stage)

    async def _repair(self, stage: Stage) -> None:
        """What a person does: an entry without any money takes the place of each dead one."""
        connection = await stage.world.postgres_connection()
        try:
            async with connection.transaction():
                await connection.execute(
                    "INSERT INTO entry (shard, ep, n, type, account_id, at) "
                    "SELECT shard, ep, n, 'repaired', (SELECT id FROM account WHERE shard = $1 LIMIT 1), at "
                    "FROM outbox_dead WHERE shard = $1", self._shard.number,
                )  # fmt: skip
                await connection.execute("DELETE FROM outbox_dead WHERE shard = $1", self._shard.number)
        finally:
            await connection.close()


FAULTS: tuple[type[Fault], ...] = (
    DuplicateFinalize, RepliesLost, ReserveDelayed, ValkeyKilled, ValkeySlow, MemoryFull, DiskFull, Poison, ClockSteps,
)  # fmt: skip
