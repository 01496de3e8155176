"""A Valkey, a migrated database, the ledger and a flusher, ready for one test of the money path."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from metering import journal_store
from metering.grants import Issued, NewGrant, issue
from metering.journal import Alarm, Flusher
from metering.keys import shard_of
from metering.ledger import AccountRef, Held, HoldRequest, SessionRef
from metering.redis_ledger import RedisLedger
from storage.database import Pool, connect_pool
from storage.redis_client import RedisClient
from tests.support.redis_server import RedisServer


def uuid7(moment_ms: int | None = None) -> str:
    """A UUIDv7 as text."""
    ms = time.time_ns() // 1_000_000 if moment_ms is None else moment_ms
    tail = secrets.randbits(76)
    digits = f"{ms & (2**48 - 1):012x}7{tail >> 64:03x}{8 | (tail >> 60) & 3:x}{tail & (2**60 - 1):015x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


@dataclass
class Stack:
    """The parts; `alarms` collects what the flushers made by `flusher` reported."""

    database_url: str
    redis_url: str
    pool: Pool
    redis: RedisClient
    ledger: RedisLedger
    server: RedisServer
    alarms: list[Alarm] = field(default_factory=list)
    _flushers: list[Flusher] = field(default_factory=list)

    def flusher(self, batch_max: int = 2_000) -> Flusher:
        made = Flusher(self.redis, self.database_url, batch_max=batch_max, every_ms=10, on_alarm=self.alarms.append)
        self._flushers.append(made)
        return made

    async def drained(self) -> int:
        """Bring the journal to Postgres with a flusher that then gives its connections back; entries that arrived."""
        flusher = self.flusher()
        try:
            return await flusher.drain()
        finally:
            await flusher.aclose()

    async def account(self, name: str) -> AccountRef:
        ref = AccountRef(name, shard_of(name))
        await self.pool.execute("INSERT INTO account (id, name, shard) VALUES ($1, $1, $2)", ref.id, ref.shard)
        return ref

    async def grant(self, account: AccountRef, gid: str, amount: int) -> Issued:
        issued = await issue(self.pool, self.ledger, NewGrant(gid, account.id, amount))
        assert issued.state == "applied"
        return issued

    async def hold(self, account: AccountRef, want: int, metadata: bytes = b"{}") -> SessionRef:
        request = HoldRequest(
            session=uuid7(),
            account=account,
            key="KEYabc12",
            want=want,
            minimum=1,
            prompt_cost=1,
            body_hash="hash",
            owner="owner",
            price_version="pv1",
            metadata=metadata,
        )
        held = await self.ledger.reserve(request)
        assert isinstance(held, Held), held
        return SessionRef(request.session, account, request.key, held.fence)

    async def spend(self, account: AccountRef, want: int, charge: int, metadata: bytes = b"{}") -> SessionRef:
        """One whole session."""
        ref = await self.hold(account, want)
        await self.ledger.settle(ref, charge, "completed", metadata)
        return ref

    async def outbox_length(self) -> int:
        total = 0
        for shard in range(128):
            total += await self.redis.call("XLEN", f"o:{{v{shard:03d}}}")
        return total

    async def close(self) -> None:
        for flusher in self._flushers:
            await flusher.aclose()
        await self.pool.close()
        await self.redis.aclose()


async def eventually(holds: Callable[[], Awaitable[bool]], within_s: float = 30.0) -> None:
    """Poll until it holds."""
    deadline = time.monotonic() + within_s
    while not await holds():
        assert time.monotonic() < deadline, f"did not happen within {within_s} s"
        await asyncio.sleep(0.01)


async def open_stack(database_url: str, server: RedisServer, lease_ms: int = 15_000) -> Stack:
    redis = RedisClient(server.url, call_ms=2_000, connect_ms=2_000, pending_max=50_000)
    await redis.start()
    pool = await connect_pool(database_url, size_max=6)
    ledger = RedisLedger(redis, lease_ms=lease_ms)
    epochs = await journal_store.shards_without_journal(pool)
    await ledger.start()
    await ledger.init_shards(epochs)
    await journal_store.open_cursors(pool, epochs)
    return Stack(database_url, server.url, pool, redis, ledger, server)


@pytest.fixture(name="stack")
async def stack_fixture(ledger_database: str, tmp_path: Path) -> AsyncIterator[Stack]:
    """A stack with short leases (300 ms)."""
    server = RedisServer(tmp_path, appendonly=True)
    server.start()
    stack = await open_stack(ledger_database, server, lease_ms=300)
    try:
        yield stack
    finally:
        await stack.close()
        server.kill()
