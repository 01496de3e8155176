"""A ledger on a real Valkey for tests: one throwaway server, its shards made, its clock in the test's hands.

`Stand.state()` is everything the server holds, byte for byte, so that a test can say "nothing changed".
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from metering import scripts
from metering.keys import SHARDS
from metering.ledger import (
    AccountRef,
    Granted,
    GrantRequest,
    Held,
    HoldRequest,
    KeyLimits,
    SessionRef,
)
from metering.redis_ledger import RedisLedger
from metering.scripts import Script, Word
from storage.redis_client import RedisClient
from tests.support.redis_server import RedisServer

SHARD = 7
WALL = 1_700_000_000_000
TEST_CLOCK = "wall_ms = function() return tonumber(call('HGET', KEYS[1], 'wall')) end"
"""Lua after the prelude: the clock is a field of the shard's meta hash, which every script has as KEYS[1]."""


@contextmanager
def valkey() -> Iterator[RedisServer]:
    """A server in a short temporary folder, killed at the end."""
    with tempfile.TemporaryDirectory(prefix="tg-", dir="/tmp") as name:
        server = RedisServer(Path(name))
        server.start()
        try:
            yield server
        finally:
            server.kill()


class Stand:
    """A client, a ledger with the injected clock, and short ways to call scripts by name."""

    def __init__(self, client: RedisClient, ledger: RedisLedger, loaded: dict[str, Script]) -> None:
        self.client = client
        self.ledger = ledger
        self.scripts = loaded
        self.at = SHARDS[SHARD]
        self.account = AccountRef("acc", SHARD)
        self.now = WALL

    async def wall(self, ms: int) -> None:
        """Set the server clock that scripts read."""
        self.now = ms
        await self.client.call("HSET", self.at.meta, "wall", ms)

    async def tick(self, ms: int) -> None:
        """Move the clock."""
        await self.wall(self.now + ms)

    async def grant(self, gid: str, amount: int, priority: int = 50, expires_ms: int = 0, uid: str = "acc") -> Granted:
        """Issue a grant that must succeed."""
        answer = await self.ledger.grant(
            GrantRequest(gid, AccountRef(uid, SHARD), amount, priority, expires_ms, created_ms=1)
        )
        assert isinstance(answer, Granted), answer
        return answer

    def request(self, sid: str, want: int, minimum: int | None = None, **changes: Any) -> HoldRequest:
        """A reserve of the test account; `changes` are fields of HoldRequest."""
        fields: dict[str, Any] = {
            "key": "key",
            "prompt_cost": 1,
            "body_hash": "hash",
            "owner": "owner",
            "price_version": "price",
            "metadata": b'{"at":"reserve"}',
            "limits": KeyLimits(),
            "account": self.account,
        }
        fields.update(changes)
        return HoldRequest(session=sid, want=want, minimum=want if minimum is None else minimum, **fields)

    async def hold(self, sid: str, want: int, minimum: int | None = None, **changes: Any) -> SessionRef:
        """A reserve that must succeed."""
        request = self.request(sid, want, minimum, **changes)
        answer = await self.ledger.reserve(request)
        assert isinstance(answer, Held), answer
        return SessionRef(sid, request.account, request.key, answer.fence)

    def keys(self, script: str, sid: str = "s1", uid: str = "acc", kid: str = "key") -> dict[str, Word | list[Word]]:
        """The KEYS of a script by name."""
        at = self.at
        every: dict[str, Word | list[Word]] = {
            "meta": at.meta,
            "account": at.account + uid,
            "order": at.order + uid,
            "grants": at.grants + uid,
            "session": at.session + sid,
            "sessions": [at.session + sid],
            "leases": at.leases,
            "limits": at.limits + kid,
            "idempotency": f"{at.idempotency}{uid}:{'0' * 64}",
            "outbox": at.outbox,
            "expiries": at.expiries,
        }
        names = [name.removesuffix("...") for name in self.scripts[script].keys]
        return {name: every[name] for name in names}

    def args(self, script: str, **changes: Word) -> dict[str, Word | list[Word]]:
        """Valid ARGV of a script by name, with `changes`."""
        every: dict[str, Word | list[Word]] = {
            "ep": "1",
            "uid": "acc",
            "sid": "s1",
            "sids": ["s1"],
            "kid": "key",
            "owner": "owner",
            "body": "hash",
            "price": "price",
            "metadata": "{}",
            "want": "100",
            "minimum": "10",
            "prompt": "1",
            "lease": "15000",
            "rpm": "",
            "parallel": "",
            "past": "",
            "fence": str(WALL),
            "q": "1",
            "metered": "5",
            "charge": "40",
            "outcome": "completed",
            "limit": "10",
            "gid": "g1",
            "credit": "1000",
            "priority": "50",
            "expiry": "0",
            "created": "1",
            "change": "j1",
            "policy": "grace",
            "revision": "1",
            "debit": "700",
            "whole": "1",
        }
        every.update(changes)
        names = [name.removesuffix("...") for name in self.scripts[script].args]
        return {name: every[name] for name in names}

    async def run(self, script: str, sid: str = "s1", **changes: Word) -> Any:
        """Run a script with valid arguments and `changes`; keys stay those of the valid arguments."""
        chosen = self.scripts[script]
        words = chosen.place(self.keys(script, sid=sid), self.args(script, sid=sid, **changes))
        return await scripts.run(self.client, chosen, words)

    async def state(self) -> dict[bytes, tuple[bytes, int]]:
        """Every key with its serialised value and its deadline."""
        names = sorted(await self.client.call("KEYS", "*"))
        return {
            name: (await self.client.call("DUMP", name), await self.client.call("PEXPIRETIME", name)) for name in names
        }

    async def hash(self, key: str) -> dict[str, str]:
        """A hash, decoded."""
        flat = await self.client.call("HGETALL", key)
        return {flat[i].decode(): flat[i + 1].decode() for i in range(0, len(flat), 2)}

    async def entries(self) -> list[tuple[str, dict[str, str]]]:
        """The outbox, decoded: (id, fields)."""
        found = []
        for name, flat in await self.client.call("XRANGE", self.at.outbox, "-", "+"):
            fields = {flat[i].decode(): flat[i + 1].decode() for i in range(0, len(flat), 2)}
            found.append((name.decode(), fields))
        return found


@asynccontextmanager
async def stand_on(server: RedisServer) -> AsyncIterator[Stand]:
    """An empty server with one shard, a connected client and a started ledger."""
    client = RedisClient(server.url, call_ms=5_000, connect_ms=2_000, pending_max=50_000)
    await client.start()
    try:
        await client.call("FLUSHALL")
        loaded = scripts.load(TEST_CLOCK)
        ledger = RedisLedger(client, loaded=loaded)
        stand = Stand(client, ledger, loaded)
        await stand.wall(WALL)
        await ledger.init_shards([SHARD])
        await ledger.start()
        yield stand
    finally:
        await client.aclose()
