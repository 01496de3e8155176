"""Whether Redis still has what it answered for, and what is done when it has not. One recovery at a time, by a lock.

A shard is looked at when the server is another one than was verified (a restart, a failover), when its meta key is
gone, when somebody froze it, when its epoch or number is not the journal's, or when the flusher stopped it. What is
whole goes on at once; the rest is frozen and rebuilt. Must not: rebuild what it could not compare, or let anybody use a
server whose contents nobody has compared.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import uuid4

from metering import receipts
from metering.keys import SHARDS
from metering.ledger import LedgerError
from metering.ledger_calls import FROZEN, answered
from metering.rebuild import BATCH, Rebuilder, Rebuilt
from metering.receipts import ASKED_KEY, HELD, Receipt
from metering.redis_ledger import RedisLedger
from metering.server_check import VERIFIED_KEY, run_id
from storage.database import FAILED, Connection, Pool, connect_pool
from storage.redis_client import RedisError
from storage.redis_open import Redis

log = logging.getLogger(__name__)

LOOK_S: Final = 0.5
DELIVERY_S: Final = 2.0
"""How long gateways that live are waited for; what comes later is taken up later."""
DELIVERY_POLL_S: Final = 0.02
LATE_S: Final = 1.0
_RETRIED: Final[tuple[type[Exception], ...]] = (*FAILED, RedisError, LedgerError)
LOCK: Final = 7_310_994_826_014_771_201
"""The advisory lock's number: any, but always this one."""
NAMED_MAX: Final = 8


@dataclass(frozen=True, slots=True)
class Look:
    """How things stand: the server's run id, whether it is the verified one, and what is wrong with which shards.

    `lost` must be rebuilt; `doubtful` are frozen, or of a server that is not verified, and are compared first."""

    run: bytes
    verified: bool
    lost: Mapping[int, str] = field(default_factory=dict)
    doubtful: frozenset[int] = frozenset()
    metas: Mapping[int, tuple[int | None, int]] = field(default_factory=dict)
    """Epoch (the former one of a frozen shard, None without) and n of each shard."""
    frozen: frozenset[int] = frozenset()
    promoted: bool = False
    """The server was somebody's replica, and whoever it followed may go on."""

    @property
    def well(self) -> bool:
        """Nothing is to be done."""
        return self.verified and not self.lost and not self.doubtful


class Recovery:
    """Watches and recovers. `frozen` counts the shards that nobody can use, as last seen. Without a `pool` one is
    opened when it is needed; give it back with `aclose`, as `run` does."""

    def __init__(
        self,
        redis: Redis,
        database_url: str,
        *,
        lease_ms: int = 15_000,
        pool: Pool | None = None,
        on_rebuilt: Callable[[Rebuilt], None] = lambda rebuilt: None,
        on_step: Callable[[str], None] = lambda step: None,
    ) -> None:
        self._redis = redis
        self._url = database_url
        self._lease_ms = lease_ms
        self.stopped: Callable[[], Mapping[int, tuple[int, str]]] = dict
        """The flusher's stopped shards: shard -> (epoch, reason)."""
        self.frozen = 0
        self._on_rebuilt = on_rebuilt
        self._on_step = on_step
        self._ledger = RedisLedger(redis, lease_ms=lease_ms)
        self._pool = pool
        self._lent = pool is not None
        self._made: Rebuilder | None = None
        self._fit = False
        redis.on_lost(self._lost)

    def fit(self) -> bool:
        """Whether the server that we are connected to is known to be the verified one."""
        return self._fit

    def _lost(self) -> None:
        self._fit = False

    async def run(self) -> None:
        """Watch until cancelled. What fails is tried again; shards stay frozen meanwhile."""
        told, looked_late = "", 0.0
        try:
            while True:
                try:
                    look = await self.look()
                    if not look.well:
                        await self.recover()
                    elif time.monotonic() - looked_late >= LATE_S:
                        await self._late()
                        looked_late = time.monotonic()
                    told = ""
                except _RETRIED as error:
                    problem = f"{type(error).__name__}: {error}"
                    if problem != told:
                        log.warning("recovery: %s; trying again", problem)
                    told = problem
                await asyncio.sleep(LOOK_S)
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        """Give the connections back."""
        if self._pool is not None and not self._lent:
            self._pool.terminate()
            self._pool = self._made = None

    async def _connected(self) -> Pool:
        if self._pool is None:
            self._pool = await connect_pool(self._url, size_max=4, application_name="tollgate recovery")
        return self._pool

    async def _late(self) -> None:
        pool = await self._connected()
        if await pool.fetchval("SELECT EXISTS (SELECT FROM receipt) OR EXISTS (SELECT FROM gateway)"):
            taken = await self._rebuilder(pool).late()
            if taken:
                log.warning("recovery: %d sessions of late receipts were taken up", taken)

    def _rebuilder(self, pool: Pool) -> Rebuilder:
        if self._made is None:
            self._made = Rebuilder(self._redis, pool, self._url, lease_ms=self._lease_ms, on_step=self._on_step)
        return self._made

    # --- looking

    async def look(self) -> Look:
        """Ask the server and, where there is anything to compare, Postgres. Raises LedgerError and FAILED."""
        asked = [self._redis.call("INFO", "server"), self._redis.call("INFO", "replication")]
        asked += (
            self._redis.call("GET", VERIFIED_KEY),
            *(self._redis.call("HMGET", shard.meta, "ep", "n", "was", "fz") for shard in SHARDS),
        )
        info, replication, known, *rows = await answered(asyncio.gather(*asked))
        run = run_id(info)
        frozen = {v for v, row in enumerate(rows) if row[0] in (None, FROZEN) or row[3] is not None}
        metas = {v: (_epoch(row), int(row[1] or 0)) for v, row in enumerate(rows)}
        cursors = await self._cursors()
        lost = {}
        for shard, cursor in cursors.items():
            reason = _why(rows[shard], metas[shard], cursor, self.stopped().get(shard))
            if reason:
                lost[shard] = reason
        doubtful = frozenset(cursors) if known != run else frozenset(v for v in frozen if v in cursors)
        self._fit = known == run
        self.frozen = len(frozen & cursors.keys()) if self._fit else len(SHARDS)
        return Look(run, known == run, lost, doubtful - lost.keys(), metas, frozenset(frozen), _promoted(replication))

    async def _cursors(self) -> dict[int, tuple[int, int]]:
        rows = await (await self._connected()).fetch("SELECT shard, ep, n FROM shard_cursor")
        return {row["shard"]: (row["ep"], row["n"]) for row in rows}

    # --- doing

    async def recover(self, shards: Sequence[int] = (), *, rebuild: bool = True) -> Rebuilt | None:
        """Compare what is doubtful, and rebuild what is lost and the `shards` named; None when nothing was rebuilt, or
        somebody else is at it. Without `rebuild` what is lost stays frozen.

        Raises LedgerError, RedisError and FAILED."""
        pool = await self._connected()
        async with pool.acquire() as lock:
            if not await lock.fetchval("SELECT pg_try_advisory_lock($1)", LOCK):
                return None
            try:
                return await self._recover(pool, lock, shards, rebuild=rebuild)
            finally:
                if not lock.is_closed():
                    await lock.fetchval("SELECT pg_advisory_unlock($1)", LOCK)

    async def _recover(
        self, pool: Pool, connection: Connection, shards: Sequence[int], *, rebuild: bool
    ) -> Rebuilt | None:
        look = await self.look()
        if look.well and not shards:
            return None
        await self._ask(connection)
        lost = {**dict.fromkeys(shards, "asked for"), **look.lost}
        lost |= await self._compare(connection, look)
        for shard in lost:
            await self._ledger.freeze(shard)
        whole = [shard for shard in look.doubtful if shard not in lost]
        if look.promoted and not look.verified:
            passed = await self._rebuilder(pool).renew(whole)
            lost |= dict.fromkeys(passed, "Postgres has what it never had")
            whole = [shard for shard in whole if shard not in lost]
        else:
            await self._thaw([shard for shard in whole if shard in look.frozen], look)
        # From here on the server may be used: what is lost answers EPOCH by itself.
        await answered(self._redis.call("SET", VERIFIED_KEY, look.run))
        self._fit = True
        self.frozen = len(lost)
        if whole:
            log.info("recovery: %s found whole; they go on", _named(whole))
        if not lost or not rebuild:
            return None
        return await self._rebuild(pool, lost)

    async def _rebuild(self, pool: Pool, lost: Mapping[int, str]) -> Rebuilt:
        for reason in sorted(set(lost.values())):
            log.error("recovery: %s: %s", _named([v for v in lost if lost[v] == reason]), reason)
        done = await self._rebuilder(pool).rebuild(sorted(lost))
        self.frozen = 0
        self._on_rebuilt(done)
        log.warning(
            "recovery: %s rebuilt in %.2f s: %d accounts, %d sessions settled and %d held again, %d refused, "
            "%d micros of lost holds returned",
            _named(done.shards), done.seconds, done.accounts, done.settled, done.held, done.failed, done.voided,
        )  # fmt: skip
        return done

    async def _ask(self, connection: Connection) -> None:
        """Ask every gateway for its receipts, and wait for those that live."""
        name = uuid4().hex
        await answered(self._redis.call("SET", ASKED_KEY, name, "EX", 3_600))
        ends = time.monotonic() + DELIVERY_S
        while not await receipts.all_delivered(connection, name):
            if time.monotonic() >= ends:
                log.warning("recovery: not every gateway has delivered its receipts in %g s", DELIVERY_S)
                return
            await asyncio.sleep(DELIVERY_POLL_S)

    async def _compare(self, connection: Connection, look: Look) -> dict[int, str]:
        """Doubtful shards that do not have what a gateway was told."""
        found: dict[int, str] = {}
        pairs = await receipts.unarrived(connection, sorted(look.doubtful))
        open_ones = [one for one, _ in pairs]
        for at in range(0, len(open_ones), BATCH):
            page = open_ones[at : at + BATCH]
            names = [SHARDS[one.shard].session + one.session for one in page]
            states = await answered(asyncio.gather(*(self._redis.call("EXISTS", name) for name in names)))
            for one, exists in zip(page, states, strict=True):
                reason = _missing(one, look.metas[one.shard], bool(exists))
                if reason:
                    found[one.shard] = reason
        return found

    async def _thaw(self, shards: Sequence[int], look: Look) -> None:
        """Give shards that are whole the epoch back that they had."""
        for shard in shards:
            epoch = look.metas[shard][0]
            assert epoch is not None, "a shard without an epoch is lost"
            await answered(self._redis.call("HSET", SHARDS[shard].meta, "ep", epoch))
            await answered(self._redis.call("HDEL", SHARDS[shard].meta, "was"))


def _epoch(row: Sequence[Any]) -> int | None:
    raw = row[2] if row[0] == FROZEN else row[0]
    return int(raw) if raw else None


def _promoted(info: bytes) -> bool:
    """Whether its INFO tells of a primary that was a replica before, since it started: it has a second history. Of a
    cluster's texts behind each other any one that does."""
    seconds = [line[15:].strip() for line in info.splitlines() if line.startswith(b"master_replid2:")]
    return any(second.strip(b"0") for second in seconds)


def _why(
    row: Sequence[Any], meta: tuple[int | None, int], cursor: tuple[int, int], stopped: tuple[int, str] | None
) -> str:
    """Why a shard is lost, as far as Redis and Postgres can tell; '' when they agree."""
    epoch, n = meta
    if epoch is None:
        return "Redis has no state of it"
    if row[3] is not None:
        return "its rebuild was not finished"
    if epoch != cursor[0]:
        return f"Redis is in epoch {epoch}, Postgres in {cursor[0]}"
    if n < cursor[1]:
        return f"Redis is behind Postgres: entry {n} of {cursor[1]}"
    if stopped is not None and stopped[0] == epoch:
        return stopped[1]
    return ""


def _missing(receipt: Receipt, meta: tuple[int | None, int], exists: bool) -> str:
    """What Redis lacks of a receipt whose session Postgres does not have."""
    epoch, n = meta
    if receipt.kind != receipts.SETTLED or not receipt.epoch:
        kind = "hold" if receipt.kind == HELD else "session"
        return "" if exists else f"a gateway's {kind} is missing"
    if exists or (receipt.epoch == epoch and receipt.entry <= n):
        return ""
    return "an acknowledged settlement is missing"


def _named(shards: Sequence[int]) -> str:
    few = "" if len(shards) > NAMED_MAX else f" ({', '.join(str(shard) for shard in sorted(shards))})"
    return f"{len(shards)} shard{'s' if len(shards) != 1 else ''}{few}"
