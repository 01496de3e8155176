"""An outbox full of settlements, for measuring what drains it.

Accounts and their grants are made as in production: written to Postgres, applied by the grant script. One session goes
through the real scripts; every further entry has that one's fields in that one's order, with other values, and is
appended in bulk. Must not: write a field that the scripts do not write.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from metering.journal_rows import pairs
from metering.keys import SHARDS
from metering.ledger import AccountRef
from storage.redis_connection import pack
from tests.support.stack import Stack, uuid7

GRANTED = 10**12
AT_ONCE = 500
ROUTES = (("gpt-large", "openai", "gpt-5"), ("gpt-small", "openai", "gpt-5-mini"), ("open", "vllm", "qwen3-32b"))
"""Public route, provider and model: an account's sessions spread over them."""


@dataclass(frozen=True, slots=True)
class Payer:
    """An account with two grants; its sessions spend from one of them, one in eight from both."""

    ref: AccountRef
    grants: tuple[str, str]


def metadata(rng: random.Random, route: tuple[str, str, str]) -> bytes:
    """What the gateway says of a session beside the money (proxy/settlement.py)."""
    name, provider, model = route
    prompt, output, duration = rng.randint(20, 4_000), rng.randint(5, 1_500), rng.randint(300, 30_000)
    attempt = {"provider": provider, "model": model, "status": 200, "outcome": "completed", "ms": duration - 2}
    said = {
        "request_id": f"req_{rng.getrandbits(96):024x}", "route": name, "stream": True, "provider": provider,
        "model": model, "attempts": [attempt], "prompt": prompt, "cached": prompt // 2, "cache_write": 0,
        "output": output, "reasoning": output // 4, "counted_prompt": prompt, "counted_output": output,
        "source": "provider", "ending": "completed", "first_content_ms": 212, "duration_ms": duration,
        "price_version": "3f9c1e0a7b2d4c55", "house_cost": prompt * 3, "limited": None,
    }  # fmt: skip
    return json.dumps(said, separators=(",", ":")).encode()


async def open_accounts(stack: Stack, count: int) -> list[Payer]:
    """Accounts over all shards, each with two grants that the journal has still to confirm."""
    gate = asyncio.Semaphore(16)

    async def one(number: int) -> Payer:
        async with gate:
            ref = await stack.account(f"acc_{number:06d}{random.getrandbits(64):016x}")
            payer = Payer(ref, (f"{ref.id}-1", f"{ref.id}-2"))
            for gid in payer.grants:
                await stack.grant(ref, gid, GRANTED)
            return payer

    return await asyncio.gather(*(one(number) for number in range(count)))


class Filler:
    """Appends settlements; each call of `fill` goes on from where the shards' journals stand."""

    def __init__(self, stack: Stack, payers: Sequence[Payer], seed: int = 1) -> None:
        self._stack = stack
        self._payers = payers
        self._rng = random.Random(seed)
        self._names: list[bytes] = []
        self._n: dict[int, int] = {}

    async def fill(self, count: int) -> int:
        """Append `count` settlements of sessions that end now; answers the bytes of their commands."""
        if not self._names:
            self._names = await self._names_of_a_real_entry()
        for shard in {payer.ref.shard for payer in self._payers}:
            self._n[shard] = int(await self._stack.redis.call("HGET", SHARDS[shard].meta, "n"))
        size = await asyncio.to_thread(self._send, self._commands(count))
        for shard, n in self._n.items():
            await self._stack.redis.call("HSET", SHARDS[shard].meta, "n", n)
        return size

    async def _names_of_a_real_entry(self) -> list[bytes]:
        payer = self._payers[0]
        await self._stack.spend(payer.ref, 500, 400, metadata(self._rng, ROUTES[0]))
        [(_, flat)] = await self._stack.redis.call("XREVRANGE", SHARDS[payer.ref.shard].outbox, "+", "-", "COUNT", 1)
        return list(pairs(flat))

    def _commands(self, count: int) -> Iterator[bytes]:
        now = time.time_ns() // 1_000_000
        for number in range(count):
            payer = self._payers[self._rng.randrange(len(self._payers))]
            shard = payer.ref.shard
            self._n[shard] += 1
            values = self._values(payer, now - (count - number) // 1_000)
            words: list[Any] = ["XADD", SHARDS[shard].outbox, f"1-{self._n[shard]}"]
            for name in self._names:
                words += (name, values[name])
            yield pack(tuple(words))

    def _values(self, payer: Payer, ended_ms: int) -> dict[bytes, str | bytes | int]:
        charge, parts = self._rng.randint(50, 90_000), payer.grants
        first = charge if self._rng.random() < 0.875 else charge // 3
        spent = [(parts[0], first), (parts[1], charge - first)] if first < charge else [(parts[0], charge)]
        began = ended_ms - self._rng.randint(300, 30_000)
        return {
            b"t": "settle", b"u": payer.ref.id, b"ts": ended_ms, b"s": uuid7(began), b"k": f"K{payer.ref.id[4:11]}",
            b"o": "completed", b"c": charge, b"ab": 0, b"d": 0, b"sl": ",".join(f"{gid}={part}" for gid, part in spent),
            b"br": "", b"st": began, b"pc": charge // 3, b"m": charge, b"pv": "3f9c1e0a7b2d4c55",
            b"mt": metadata(self._rng, ROUTES[self._rng.randrange(len(ROUTES))]),
        }  # fmt: skip

    def _send(self, commands: Iterator[bytes]) -> int:
        """Over a socket of its own, many commands in one write; every reply must be the entry's id."""
        size = 0
        with socket.socket(socket.AF_UNIX) as link:
            link.connect(str(self._stack.server.socket))
            while batch := list(islice(commands, AT_ONCE)):
                link.sendall(b"".join(batch))
                size += sum(map(len, batch))
                replies = b""
                while replies.count(b"\r\n") < 2 * len(batch):
                    replies += link.recv(1 << 16)
                if replies.count(b"$") != len(batch):
                    raise RuntimeError(f"an entry was refused: {replies[:200]!r}")
        return size
