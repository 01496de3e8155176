"""One worker's watch over the outbox: once a second the ledger process's report, or, without one, the outbox itself.

A report is missing when no ledger process runs. Nobody drains the outbox then, but its oldest entry and its size can be
read by anyone: the same two bounds hold, and a worker does not serve for ever into a Redis that nobody empties.
Must not: be asked by a request (`over` is memory), trim or write anything, or judge (`metering.status` does).
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from typing import Any

from config.settings import Metering
from metering.keys import SHARDS
from metering.status import STATUS_KEY, JournalReport, Outbox, Over, decode_report, fills_bound, over_bound
from storage.redis_client import RedisError, RedisReplyError
from storage.redis_cluster import ClusterClient
from storage.redis_open import Redis, Server, servers
from storage.steady_task import SteadyTask

log = logging.getLogger(__name__)

EVERY_S = 1.0
MEASURE_EVERY_S = 5.0
"""The worker's own look at 128 outboxes costs more than reading a report, and the bounds are hours and megabytes."""

_OUTBOXES = [shard.outbox for shard in SHARDS]
_ELSEWHERE = ("MOVED", "ASK")


class OutboxWatch:
    """`over`: the bound that the outbox is over, or None. `report`: the last one read, None where there is none.
    `readable`: whether the last look got an answer; without one `over` stays what it was, and admission fails at Redis
    anyway. `on_change` is called whenever `over` changes, and must not raise."""

    def __init__(
        self,
        redis: Redis,
        limits: Metering,
        on_change: Callable[[Over | None, Outbox], None],
        *,
        every_s: float = EVERY_S,
        measure_every_s: float = MEASURE_EVERY_S,
    ) -> None:
        self._redis = redis
        self._limits = limits
        self._on_change = on_change
        self._measured = Outbox(0, 0)
        self._every_s = every_s
        self._measure_every_s = measure_every_s
        self._measured_at = -math.inf
        self._task = SteadyTask(self._run, "outbox: the watch")
        self.over: Over | None = None
        self.report: JournalReport | None = None
        self.readable = False

    async def start(self) -> None:
        """Look once, at most for the time of a Redis call or two, then every second until `aclose`."""
        await self.look()
        self._task.start()

    async def aclose(self) -> None:
        """Stop looking."""
        await self._task.aclose()

    async def look(self) -> None:
        """Look now and decide."""
        try:
            report = decode_report(await self._redis.call("GET", STATUS_KEY))
            seen = await self._outbox(report)
        except RedisError:
            self.readable = False
            return
        self.readable, self.report = True, report
        over = over_bound(self._limits, seen, already=self.over is not None)
        if over != self.over:
            self.over = over
            self._on_change(over, seen)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            await self.look()

    async def _outbox(self, report: JournalReport | None) -> Outbox:
        """By the report where that suffices: all memory in use bounds the outbox's. Raises RedisError."""
        already = self.over is not None
        if report is not None and not fills_bound(self._limits, report.memory_percent, already=already):
            return Outbox(report.oldest_age_ms, report.memory_percent)
        now = time.monotonic()
        if now >= self._measured_at + self._measure_every_s:
            age_ms = await oldest_age_ms(self._redis) if report is None else 0
            self._measured = Outbox(age_ms, await self._memory_percent())
            self._measured_at = now
        return self._measured if report is None else self._measured._replace(oldest_age_ms=report.oldest_age_ms)

    async def _memory_percent(self) -> int:
        """Of several servers the fullest outbox counts."""
        return max(await asyncio.gather(*(self._percent_at(server) for server in servers(self._redis))))

    async def _percent_at(self, server: Server) -> int:
        """The outbox's share of a server's maxmemory, 0 where none is set. What is in use in all, where that is below
        the bound: the outbox is asked for only when it could matter."""
        used, most = await _memory(server)
        percent = _percent(used, most)
        if not fills_bound(self._limits, percent, already=True):
            return percent
        return _percent(min(used, await _bytes_at(server, used)), most)


async def memory_percent(redis: Redis) -> int:
    """All memory in use, in percent of maxmemory; 0 where no maximum is set. Of several servers the fullest counts.
    Raises RedisError."""
    return max(_percent(*pair) for pair in await asyncio.gather(*(_memory(server) for server in servers(redis))))


async def _memory(server: Server) -> tuple[int, int]:
    """Bytes that the server uses, and its maximum, 0 for none."""
    info = await server.call("INFO", "memory")
    fields = dict(line.split(b":", 1) for line in info.splitlines() if b":" in line)
    return int(fields[b"used_memory"]), int(fields.get(b"maxmemory", b"0"))


def _percent(used: int, most: int) -> int:
    return used * 100 // most if most else 0


async def _bytes_at(server: Server, used: int) -> int:
    """Bytes of all outboxes that the server has; `used`, all that it uses, where it may not be asked. Raises
    RedisUnavailable."""
    asked = (server.call("MEMORY", "USAGE", key) for key in _OUTBOXES)
    total = 0
    for size in await asyncio.gather(*asked, return_exceptions=True):
        if isinstance(size, RedisReplyError):
            total += 0 if size.code in _ELSEWHERE else used
        elif isinstance(size, BaseException):
            raise size
        else:
            total += size or 0
    return total


async def oldest_age_ms(redis: Redis) -> int:
    """Age of the oldest entry in any outbox, by Redis' clock; 0 where there is none. What is in Postgres has been
    trimmed. Raises RedisError."""
    moments = [moment for stream in await _firsts(redis) for moment in [_moment(stream)] if moment is not None]
    if not moments:
        return 0
    seconds, micros = await redis.call("TIME")
    return max(0, int(seconds) * 1000 + int(micros) // 1000 - min(moments))


async def _firsts(redis: Redis) -> list[Any]:
    """Each outbox that is not empty with its first entry: one command, in a cluster one for each shard's slot."""
    if isinstance(redis, ClusterClient):
        calls = (redis.call("XREAD", "COUNT", 1, "STREAMS", key, "0-0") for key in _OUTBOXES)
        return [stream for reply in await asyncio.gather(*calls) for stream in reply or ()]
    return await redis.call("XREAD", "COUNT", 1, "STREAMS", *_OUTBOXES, *["0-0"] * len(_OUTBOXES)) or []


def _moment(stream: Any) -> int | None:
    """When the first entry of a stream was made, in ms; None where it does not say."""
    flat = stream[1][0][1]
    said = dict(zip(flat[::2], flat[1::2], strict=True)).get(b"ts", b"")
    return int(said) if said.isdigit() else None
