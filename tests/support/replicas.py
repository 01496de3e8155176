"""A Valkey with a replica that follows it, for tests of what a settlement waits for."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.redis_client import RedisClient
from storage.redis_replicated import MARK
from tests.support.ports import free_port
from tests.support.redis_server import RedisServer


@dataclass(frozen=True)
class Pair:
    """The two servers."""

    primary: RedisServer
    replica: RedisServer

    async def following(self) -> None:
        """Until the replica has what the primary has and says so."""
        async with connected(self.primary) as client:
            deadline = time.monotonic() + 20
            await client.call(*MARK)  # WAIT waits for the last write of its own connection, so there must be one
            while await client.call("WAIT", 1, 100) != 1:
                assert time.monotonic() < deadline, "the replica does not follow"

    @contextlib.contextmanager
    def replica_frozen(self) -> Iterator[None]:
        """The replica stands still inside the block."""
        self.replica.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.replica.signal(signal.SIGCONT)


@contextlib.contextmanager
def replicated() -> Iterator[Pair]:
    """A primary and its replica in temporary folders, killed at the end. The link may still be coming up."""
    with (
        tempfile.TemporaryDirectory(prefix="tg-", dir="/tmp") as first,
        tempfile.TemporaryDirectory(prefix="tg-", dir="/tmp") as second,
    ):
        port = free_port()
        pair = Pair(RedisServer(Path(first), port=port, appendonly=True), RedisServer(Path(second), primary=port))
        try:
            pair.primary.start()
            pair.replica.start()
            yield pair
        finally:
            pair.replica.kill()
            pair.primary.kill()


@contextlib.asynccontextmanager
async def connected(server: RedisServer) -> AsyncIterator[RedisClient]:
    """A plain client of one server."""
    client = RedisClient(server.url, call_ms=10_000, connect_ms=2_000, pending_max=1_000)
    await client.start()
    try:
        yield client
    finally:
        await client.aclose()


async def waits(client: RedisClient) -> int:
    """How many WAITs the server has served since it started, or since CONFIG RESETSTAT."""
    info = await client.call("INFO", "commandstats")
    rows = [row for row in info.split(b"\r\n") if row.startswith(b"cmdstat_wait:")]
    return int(rows[0].split(b"calls=")[1].split(b",")[0]) if rows else 0


async def one_blocked(client: RedisClient) -> None:
    """Until one connection of the server is blocked, as in WAIT."""
    deadline = time.monotonic() + 10
    while await figure(client, "clients", "blocked_clients") != 1:
        assert time.monotonic() < deadline, "no connection is blocked"
        await asyncio.sleep(0)


async def figure(client: RedisClient, section: str, name: str) -> int:
    """One number of INFO."""
    info: Any = (await client.call("INFO", section)).decode()
    return int(info.split(f"{name}:")[1].split("\r\n")[0])
