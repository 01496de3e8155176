"""Grants whose time ends: to the millisecond, under load, in the middle of holds and of a rebuild. Row 22.

Must not: leave anything spoilt behind when `strike` has returned, or keep a rule of the ledger but that a grant can be
held from before its time and not at it.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

import redis.asyncio

from loadtests.chaos import scripts
from loadtests.chaos.check import ChaosVerdict, Evidence
from loadtests.chaos.load import Door, Load
from loadtests.chaos.loss_faults import Lost
from loadtests.chaos.stage import Stage
from loadtests.chaos.store_faults import session_id
from loadtests.chaos.world import Account, World, until

Words = dict[str, str | int]
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_GIVE = "INSERT INTO grant_ (id, account_id, amount, expires_at) VALUES ($1, $2, $3, $4)"
_WAITING = "SELECT count(*) AS n FROM grant_ WHERE account_id = ANY($1::text[]) AND applied_n IS NULL"
_ARRIVED = "SELECT count(*) AS n FROM session WHERE sid = ANY($1::text[])"
_PAID_FROM = """SELECT e.sid, c.grant_id FROM entry e JOIN consumption c USING (shard, ep, n)
    WHERE e.account_id = $1 AND e.sid IS NOT NULL AND c.amount > 0"""
_EXPIRED = """SELECT g.id, e.at, g.expires_at FROM entry e JOIN consumption c USING (shard, ep, n)
    JOIN grant_ g ON g.id = c.grant_id WHERE c.breakage > 0"""


@dataclass(frozen=True)
class Given:
    """A grant of the fault. `expiry` in epoch ms, 0 for never."""

    id: str
    expiry: int


@dataclass(frozen=True)
class Held:
    """A session made by hand: its hold's moment in epoch ms, and what it is charged."""

    sid: str
    moment: int
    charge: int


def payer(given: list[Given], moment: int) -> str:
    """The grant that a hold of this moment takes from: of those whose time is not over the one that ends first. A grant
    is over at the very millisecond at which it expires."""
    open_ones = [one for one in given if not one.expiry or one.expiry > moment]
    return min(open_ones, key=lambda one: (not one.expiry, one.expiry)).id


def distances(given: list[Given], moments: list[int]) -> Counter[str]:
    """How many of these moments were 1 ms before an expiry, at it, and 1 ms after it."""
    ends = {one.expiry for one in given if one.expiry}
    names = {-1: "1 ms before an expiry", 0: "at the millisecond of an expiry", 1: "1 ms after an expiry"}
    return Counter(name for moment in moments for off, name in names.items() if moment - off in ends)


class GrantExpiry(Lost):
    """Row 22. On one account holds are made by hand around each expiry, on two others streams burn grants that end
    under them; then Valkey is wiped, and the last grants end while it is made anew."""

    number, name, title = 22, "grant-expiry", "grants expire to the millisecond, under holds and during a rebuild"
    GRANTS: ClassVar[int] = 30
    EDGES: ClassVar[int] = 12
    BATCH: ClassVar[int] = 6
    FIRST_S: ClassVar[float] = 3.0
    EVERY_S: ClassVar[float] = 0.25
    EDGE_MS: ClassVar[int] = 4
    CLIENTS: ClassVar[int] = 6

    def __init__(self) -> None:
        super().__init__()
        self._edge: Account | None = None
        self._given: list[Given] = []
        self._held: list[Held] = []
        self._ends: list[int] = []
        self._lost = 0.0

    async def strike(self, stage: Stage) -> None:
        world = stage.world
        edge, *spent = [await world.account("0.5") for _ in range(3)]
        self._edge = edge
        ports = [gateway.front.port for gateway in world.gateways]
        door = Door(ports, ports, [account.key for account in spent])
        load = Load(door, self.CLIENTS, f"{stage.random.random()}", self.mix)
        await self._give(stage, edge, spent)
        load.start()
        try:
            await self._probe(stage, edge)
            await super().strike(stage)
            await asyncio.sleep(max(0.0, self._ends[-1] / 1000 - time.time()) + 2.5)  # the expirer looks once a second
        finally:
            load.stop()
            await asyncio.to_thread(load.join)
            stage.extra_calls += load.calls

    async def _give(self, stage: Stage, edge: Account, spent: list[Account]) -> None:
        """Grants that end one after the other, in Postgres first; the gateways' ledger processes apply them."""
        world, now = stage.world, time.time() + self.FIRST_S
        base = await world.fetch("SELECT id FROM grant_ WHERE account_id = $1", edge.id)
        self._given = [Given(row["id"], 0) for row in base]
        rows: list[tuple[Any, ...]] = []
        for number in range(self.EDGES):
            expiry = round((now + number * self.EVERY_S) * 1000)
            self._given.append(Given(f"edge-{secrets.token_hex(6)}", expiry))
            rows.append((self._given[-1].id, edge.id, 10_000, _EPOCH + timedelta(milliseconds=expiry)))
        for account in spent:
            for number in range(self.GRANTS):
                self._ends.append(round((now + number * self.EVERY_S) * 1000))
                ends = _EPOCH + timedelta(milliseconds=self._ends[-1])
                rows.append((f"ends-{secrets.token_hex(6)}", account.id, stage.random.randrange(100, 4_000), ends))
        connection = await world.postgres_connection()
        try:
            await connection.executemany(_GIVE, rows)
        finally:
            await connection.close()
        stage.counts["grants that expire"] += len(rows)
        await until(lambda: _none(world, _WAITING, [edge.id, *(one.id for one in spent)]), 20, "the grants are applied")

    async def _probe(self, stage: Stage, edge: Account) -> None:
        """Holds of a few micros, batch after batch, from some ms before each expiry until some ms after it, and tries
        to let the grant expire. Half of the holds are settled once the grant is over, the others later."""
        store = stage.world.redis()
        async with contextlib.aclosing(store):
            shas = {name: await store.script_load(scripts.script_of(name).text) for name in ("reserve", "expire")}
            common = await self._common(store, edge)
            held: list[tuple[str, int]] = []
            for grant in [one for one in self._given if one.expiry]:
                await asyncio.sleep(max(0.0, (grant.expiry - self.EDGE_MS) / 1000 - time.time()))
                while time.time() * 1000 < grant.expiry + self.EDGE_MS:
                    held += await self._batch(stage, store, edge, shas, {**common, "gid": grant.id})
                now, held = held[::2], held[1::2]
                for sid, moment in now:
                    await self._settle(stage, store, edge, sid, moment)
            for sid, moment in held:
                await self._settle(stage, store, edge, sid, moment)
        sids = [one.sid for one in self._held]
        # A wipe may take what Postgres has not got: no gateway has receipts of these.
        await until(lambda: _all(stage.world, sids), 20, "the sessions made by hand are in Postgres")
        stage.counts += distances(self._given, [one.moment for one in self._held])

    async def _batch(
        self, stage: Stage, store: redis.asyncio.Redis, edge: Account, shas: dict[str, str], words: Words
    ) -> list[tuple[str, int]]:
        """Some holds in one round trip, the expiry in their middle: sessions and moments."""
        sids = [session_id() for _ in range(self.BATCH)]
        names = ["reserve"] * self.BATCH
        names.insert(self.BATCH // 2, "expire")
        pipeline = store.pipeline(transaction=False)
        left = iter(sids)
        for name in names:
            sid = next(left) if name == "reserve" else ""
            pipeline.execute_command("EVALSHA", shas[name], *scripts.placed(name, edge, sid, {**words, "sid": sid}))
        replies = await pipeline.execute()
        stage.counts[f"expire answered {replies.pop(self.BATCH // 2)[0].decode()}"] += 1
        refused = [reply[0].decode() for reply in replies if reply[0] != b"HELD"]
        stage.counts["holds refused"] += len(refused)
        return [(sid, int(reply[3])) for sid, reply in zip(sids, replies, strict=True) if reply[0] == b"HELD"]

    async def _common(self, store: redis.asyncio.Redis, account: Account) -> Words:
        return {
            "ep": await scripts.epoch(store, account), "uid": account.id, "kid": account.key_id,
            "metadata": "{}", "owner": "edge", "body": "b", "price": "p", "want": 10, "minimum": 1, "prompt": 1,
            "lease": 15_000, "rpm": "", "parallel": "", "past": "",
        }  # fmt: skip

    async def _settle(self, stage: Stage, store: redis.asyncio.Redis, account: Account, sid: str, moment: int) -> None:
        charge = stage.random.randrange(1, 10)
        words = {**await self._common(store, account), "sid": sid, "fence": moment, "charge": charge}
        await scripts.run(store, "settle", account, sid, {**words, "outcome": "completed"})
        self._held.append(Held(sid, moment, charge))
        stage.by_hand[sid] = charge

    async def lose(self, stage: Stage) -> None:
        self._lost = time.time()
        store = stage.world.redis()
        async with contextlib.aclosing(store):
            await store.flushall()

    async def judge(self, stage: Stage, evidence: Evidence, verdict: ChaosVerdict) -> None:
        await super().judge(stage, evidence, verdict)
        assert self._edge is not None
        paid = {row["sid"]: row["grant_id"] for row in await stage.world.fetch(_PAID_FROM, self._edge.id)}
        wrong = [one for one in self._held if paid.get(one.sid) != payer(self._given, one.moment)]
        verdict.same("holds that took from the wrong grant", [f"{one.sid} at {one.moment}" for one in wrong[:3]], [])
        early = [row["id"] for row in await stage.world.fetch(_EXPIRED) if row["at"] < row["expires_at"]]
        verdict.same("grants that broke before their time", early[:3], [])
        until_ms = (self._lost + (stage.rebuilt_s or 0.0)) * 1000
        during = sum(self._lost * 1000 <= end <= until_ms for end in self._ends)
        stage.counts["grants that ended while Valkey was made anew"] = during
        verdict.expect(during > 0, "no grant ended while Valkey was made anew")
        verdict.same("holds refused", stage.counts["holds refused"], 0)
        for name in ("1 ms before an expiry", "at the millisecond of an expiry", "1 ms after an expiry"):
            verdict.expect(stage.counts[name] > 0, f"no hold was made {name}")


async def _none(world: World, query: str, accounts: list[str]) -> bool:
    return bool((await world.fetch(query, accounts))[0]["n"] == 0)


async def _all(world: World, sids: list[str]) -> bool:
    return bool((await world.fetch(_ARRIVED, sids))[0]["n"] == len(sids))


FAULTS: tuple[type[Lost], ...] = (GrantExpiry,)
