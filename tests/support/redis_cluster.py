"""A Valkey cluster for tests: three primaries and a replica of the last, on loopback, that can be moved about."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from metering.keys import SHARDS
from storage.redis_client import RedisClient
from storage.redis_slots import slot_of
from tests.support.ports import free_port
from tests.support.redis_server import RedisServer
from tests.support.replicas import connected

PRIMARIES = 3
STARTS = (0, 5_461, 10_923, 16_384)
"""Where each primary's slots begin, as made."""


class Node:
    """One server with its port and its id in the cluster."""

    def __init__(self, folder: Path, password: str | None = None) -> None:
        self.port, self.bus = free_port(), free_port()
        options = ["--cluster-enabled", "yes", "--cluster-port", str(self.bus), "--cluster-node-timeout", "2000"]
        options += ["--cluster-require-full-coverage", "no", "--cluster-allow-replica-migration", "no"]
        self.server = RedisServer(folder, port=self.port, password=password, options=options)
        self.id = ""

    async def ask(self, *words: str | int) -> Any:
        """One command on a connection of its own."""
        async with connected(self.server) as client:
            return await client.call(*words)

    async def erred(self, code: str) -> int:
        """How many replies of the server were this error since CONFIG RESETSTAT."""
        info = (await self.ask("INFO", "errorstats")).decode()
        return int(info.split(f"errorstat_{code}:count=")[1].split("\r\n")[0]) if f"errorstat_{code}:" in info else 0


class Cluster:
    """`nodes` are the primaries as made; `replica` follows the last."""

    def __init__(self, folders: list[Path]) -> None:
        *self.nodes, self.replica = [Node(folder) for folder in folders]
        self.all = [*self.nodes, self.replica]

    @property
    def url(self) -> str:
        """The URL of the second primary, which no test kills."""
        return f"redis://127.0.0.1:{self.nodes[1].port}/0"

    async def form(self) -> None:
        """Make the cluster of started servers, and wait until it serves."""
        for node in self.all:
            node.id = (await node.ask("CLUSTER", "MYID")).decode()
        for number, node in enumerate(self.nodes):
            await node.ask("CLUSTER", "ADDSLOTSRANGE", STARTS[number], STARTS[number + 1] - 1)
            await node.ask("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for node in self.all[1:]:
            await self.nodes[0].ask("CLUSTER", "MEET", "127.0.0.1", node.port, node.bus)
        await until(self._known)
        await self.replica.ask("CLUSTER", "REPLICATE", self.nodes[2].id)
        await until(self._serves)

    async def _known(self) -> bool:
        known = [(await node.ask("CLUSTER", "NODES")).decode() for node in self.all]
        return all(text.count("connected") >= 4 and "handshake" not in text for text in known)

    async def _serves(self) -> bool:
        states = [b"cluster_state:ok" in await node.ask("CLUSTER", "INFO") for node in self.all]
        return all(states) and b"master_link_status:up" in await self.replica.ask("INFO", "replication")

    async def owner(self, slot: int, asked: Node) -> int:
        """The port of the slot's primary, as one node sees it."""
        rows = await asked.ask("CLUSTER", "SLOTS")
        return next((main[1] for first, last, main, *_ in rows if first <= slot <= last), 0)

    def home(self, slot: int) -> Node:
        """The primary that has the slot in a cluster as it was made."""
        return next(node for number, node in enumerate(self.nodes) if slot < STARTS[number + 1])

    async def move(self, first: int, last: int, source: Node, target: Node) -> None:
        """Move slots as Valkey 9 does it, at once and whole, until every node knows."""
        await source.ask("CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", first, last, "NODE", target.id)

        async def moved() -> bool:
            return all([await self.owner(slot, node) == target.port for slot in (first, last) for node in self.all])

        await until(moved)


def shards_at(cluster: Cluster, node: Node) -> list[int]:
    """The virtual shards that a primary has in a cluster as it was made."""
    return [shard.number for shard in SHARDS if cluster.home(slot_of(shard.meta)) is node]


async def until(holds: Any, seconds: float = 20) -> None:
    """Poll an async condition."""
    deadline = time.monotonic() + seconds
    while not await holds():
        assert time.monotonic() < deadline, "the cluster did not come to it in time"
        await asyncio.sleep(0.01)


@contextlib.contextmanager
def clustered() -> Iterator[Cluster]:
    """A cluster in temporary folders, killed at the end."""
    with contextlib.ExitStack() as stack:
        folders = [
            Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tg-", dir="/tmp")))
            for _ in range(PRIMARIES + 1)
        ]
        cluster = Cluster(folders)
        for node in cluster.all:
            stack.callback(node.server.kill)
            node.server.start()
        asyncio.run(cluster.form())
        yield cluster


@contextlib.asynccontextmanager
async def to_one(node: Node) -> AsyncIterator[RedisClient]:
    """A plain client of one node."""
    async with connected(node.server) as client:
        yield client
