"""A gateway's money path without HTTP, for tests of recoveries: it spends, remembers what it was told, and delivers.

And the ways in which a Redis loses something: snapshots that are put back, a log whose end is cut off.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from metering import receipts, reconcile
from metering.ledger import AccountRef, Gone, Held, HoldRequest, LedgerUnavailable, Progressed, SessionRef, Settled
from metering.receipts import HELD, Keeper, Receipt, Receipts
from metering.recovery import Recovery
from metering.redis_ledger import RedisLedger
from metering.server_check import VERIFIED_KEY
from storage.redis_client import RedisClient
from tests.support.stack import Stack, eventually, uuid7

PAUSE_S = 0.01
Snapshot = dict[bytes, tuple[bytes, int]]


@dataclass
class LiveHold:
    """A hold that goes on: its reference, micros held and metered, and the number of its last checkpoint."""

    ref: SessionRef
    held: int
    metered: int = 0
    seq: int = 0


@dataclass
class Teller:
    """`told` is what was acknowledged (session -> micros), `live` what still runs."""

    stack: Stack
    redis: RedisClient
    ledger: RedisLedger
    receipts: Receipts
    told: dict[str, int] = field(default_factory=dict)
    live: dict[str, LiveHold] = field(default_factory=dict)

    def holds(self) -> list[Receipt]:
        """The receipts of what runs."""
        return [
            Receipt(
                each.ref.session, each.ref.account.id, each.ref.account.shard, each.ref.key, each.ref.fence, HELD,
                held=each.held, metered=each.metered, seq=each.seq,
            )
            for each in self.live.values()
        ]  # fmt: skip

    async def hold(self, account: AccountRef, want: int) -> LiveHold:
        """Reserve, as long as it takes."""
        request = HoldRequest(
            uuid7(),
            account,
            "KEYabc12",
            want,
            1,
            1,
            "hash",
            "owner",
            "pv1",
            b'{"route":"r","provider":"p","model":"m"}',
        )
        while True:
            try:
                answer = await self.ledger.reserve(request)
                break
            except LedgerUnavailable:
                await asyncio.sleep(PAUSE_S)
        assert isinstance(answer, Held), answer
        ref = SessionRef(request.session, account, request.key, answer.fence)
        made = self.live[ref.session] = LiveHold(ref, answer.held)
        return made

    async def progress(self, hold: LiveHold, metered: int) -> None:
        """A checkpoint that must count."""
        answer = await self.ledger.progress(hold.ref, hold.seq + 1, metered, hold.held)
        assert isinstance(answer, Progressed), answer
        hold.seq, hold.metered, hold.held = hold.seq + 1, metered, answer.held

    async def settle(self, hold: LiveHold, charge: int) -> Settled:
        """Settle, as long as it takes, and remember what was told."""
        ref = hold.ref
        self.receipts.owed(ref, charge, "completed", b"{}")
        del self.live[ref.session]
        while True:
            try:
                answer = await self.ledger.settle(ref, charge, "completed", b"{}")
            except LedgerUnavailable:
                await asyncio.sleep(PAUSE_S)
                continue
            if not isinstance(answer, Gone) or not self.ledger.awaited(ref):
                break
            await asyncio.sleep(PAUSE_S)
        assert isinstance(answer, Settled), answer
        epoch = self.ledger.epoch_of(ref.account.shard)
        self.receipts.acknowledged(ref.session, epoch, answer.entry, answer.charged, repeated=answer.repeated)
        self.told[ref.session] = answer.charged
        return answer

    async def spend(self, account: AccountRef, charge: int) -> None:
        """One whole session."""
        await self.settle(await self.hold(account, charge + 5), charge)

    async def deliver(self) -> None:
        """Write all receipts, as the keeper does when it is asked."""
        async with self.stack.pool.acquire() as connection:
            await receipts.save(connection, [*self.holds(), *self.receipts.all()])


@asynccontextmanager
async def teller(stack: Stack, *, keeping: bool = False, name: str = "gateway-1") -> AsyncIterator[Teller]:
    """A gateway on the stack's stores; `keeping`: with a keeper that delivers when it is asked."""
    redis = RedisClient(stack.redis_url, call_ms=2_000, connect_ms=2_000, pending_max=50_000)
    await redis.start()
    ledger = RedisLedger(redis)
    await ledger.start()
    made = Teller(stack, redis, ledger, Receipts("pv1", ledger.suspect))
    keeper = Keeper(redis, stack.database_url, made.receipts, made.holds, name)
    if keeping:
        keeper.start()
        await eventually(lambda: stack.pool.fetchval("SELECT EXISTS (SELECT FROM gateway WHERE id = $1)", name))
    try:
        yield made
    finally:
        await keeper.aclose()
        await redis.aclose()


async def verified(stack: Stack) -> Recovery:
    """The stack's server is compared and marked, as at the start of an instance."""
    recovery = Recovery(stack.redis, stack.database_url, pool=stack.pool)
    await recovery.recover()
    assert recovery.fit()
    return recovery


async def snapshot(redis: RedisClient) -> Snapshot:
    """Everything the server holds."""
    names = await redis.call("KEYS", "*")
    return {name: (await redis.call("DUMP", name), max(0, await redis.call("PTTL", name))) for name in names}


async def go_back(redis: RedisClient, past: Snapshot) -> None:
    """The server holds what it held then, and shows that it is another one (as a restart or a failover does)."""
    await redis.call("FLUSHALL")
    for name, (value, ttl) in past.items():
        await redis.call("RESTORE", name, ttl, value)
    await redis.call("SET", VERIFIED_KEY, "another")


async def agree(stack: Stack, told: dict[str, int]) -> None:
    """Everything that was told is in Postgres, once and to the micro, and the books balance to the last one."""
    await stack.drained()
    rows = {row["sid"]: row["charged"] for row in await stack.pool.fetch("SELECT sid, charged FROM session")}
    assert {sid: rows.get(sid) for sid in told} == told
    ledger = RedisLedger(stack.redis)
    await ledger.start()
    report = await reconcile.audit(stack.pool, ledger, stack.redis, wait_s=5)
    assert report.ok, report.differences[:5]


def log_end(folder: Path) -> tuple[Path, int]:
    """The append-only file that the server writes to now, and its size."""
    newest = max(folder.glob("appendonlydir/*.incr.aof"), key=lambda path: path.stat().st_mtime_ns)
    return newest, newest.stat().st_size
