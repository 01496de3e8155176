"""Liveness, readiness and metrics. Readiness names each part; only what makes serving wrong makes it 503.

Must not: expose an address, a version or an account, or ask a store while a probe waits: the stores are asked once a
second beside the probes, which are answered from memory.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from metering.keys import SHARD_COUNT, SHARDS
from metering.ledger_calls import FROZEN
from metering.outbox_watch import OutboxWatch
from metering.server_check import replicas_word, verified
from proxy.live_sessions import LiveSessions
from storage.database import FAILED, Connection, connect
from storage.redis_client import RedisError
from storage.redis_open import Redis

CHECK_S = 2.0
EVERY_S = 1.0
FIRST_S = 1.0
"""How long the first probe waits for the first check."""

UNUSABLE = ("unreachable", "frozen")
BEHIND = " entries behind"


@dataclass(frozen=True, slots=True)
class Readiness:
    """Each part's word, and whether traffic should come here."""

    ready: bool
    parts: dict[str, str]


class Health:
    """The health of one worker."""

    def __init__(self, redis: Redis, database_url: str, live: LiveSessions, outbox: OutboxWatch) -> None:
        self._redis = redis
        self._database_url = database_url
        self._live = live
        self._outbox = outbox
        self.old_server: str | None = None
        """The Redis server's version when it is older than supported; it serves, degraded."""
        self.replicas = 0
        """Replicas that settlements count on; with 0 the server is not asked for any."""
        self._parts = {"redis": "unreachable", "postgres": "degraded: unreachable"}
        self._connection: Connection | None = None
        self._jobs: dict[str, asyncio.Task[None]] = {}
        self._checked: set[str] = set()
        self._all_checked = asyncio.Event()

    async def readiness(self) -> Readiness:
        """Draining, Redis unreachable or frozen, or an outbox past its bound: not ready. Postgres down: degraded."""
        await self._watch()
        gateway = "draining" if self._live.draining else "ok"
        parts = {"gateway": gateway, **self._parts, "journal": self._journal_word()}
        bad = self._live.draining or parts["redis"] in UNUSABLE or self._outbox.over is not None
        return Readiness(not bad, parts)

    async def _watch(self) -> None:
        """Check from the first probe on, until the process ends; a check that ended by a defect is begun again."""
        for check in (self._check_redis, self._check_postgres):
            job = self._jobs.get(check.__name__)
            if job is None or job.done():
                self._jobs[check.__name__] = asyncio.create_task(self._repeat(check))
        if len(self._checked) < len(self._jobs):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._all_checked.wait(), FIRST_S)

    async def _repeat(self, check: Callable[[], Awaitable[None]]) -> None:
        try:
            while True:
                await check()
                self._checked.add(check.__name__)
                if len(self._checked) == len(self._jobs):
                    self._all_checked.set()
                await asyncio.sleep(EVERY_S)
        finally:
            self._drop()

    def _journal_word(self) -> str:
        """The watch's state, which also closes admission: never a second look at the same figures."""
        report = self._outbox.report
        if self._outbox.over is not None:
            return "over its bound"
        if not self._outbox.readable:
            return "unknown"
        if report is None:
            return "no flusher running"
        if report.stopped_shards:
            return f"{report.stopped_shards} shards stopped"
        return f"{report.entries_behind}{BEHIND}" if report.entries_behind else "ok"

    async def _check_redis(self) -> None:
        try:
            epoch, closed = await self._redis.call("HMGET", SHARDS[0].meta, "ep", "fz")
            usable = epoch not in (None, FROZEN) and closed is None and await verified(self._redis)
            if self.replicas:
                self._parts["replicas"] = await replicas_word(self._redis, self.replicas)
        except RedisError:
            self._parts |= {"redis": "unreachable"} | ({"replicas": "unknown"} if self.replicas else {})
            return
        fit = "ok" if self.old_server is None else f"degraded: {self.old_server} is too old"
        fit = fit if self._redis.connected else "degraded: a primary is not connected"
        report = self._outbox.report
        frozen = report.frozen_shards if report is not None else 0
        if 0 < frozen < SHARD_COUNT:
            fit = f"degraded: {frozen} shards frozen"
        self._parts |= {"redis": fit if usable else "frozen"}

    async def _check_postgres(self) -> None:
        """One query, on a connection that is kept: a new one a second would be work for the server."""
        try:
            async with asyncio.timeout(CHECK_S):
                if self._connection is None:
                    name = "tollgate-health"
                    self._connection = await connect(self._database_url, application_name=name, command_s=CHECK_S)
                await self._connection.fetchval("SELECT 1")
        except FAILED:
            self._drop()
            self._parts["postgres"] = "degraded: unreachable"
        else:
            self._parts["postgres"] = "ok"

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None


def metrics_text() -> tuple[bytes, str]:
    """Metrics of all processes of this instance, and their content type."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry), CONTENT_TYPE_LATEST


def encoded(readiness: Readiness) -> bytes:
    """The readiness answer's JSON."""
    status: dict[str, Any] = {"status": "ok" if readiness.ready else "unavailable", "parts": readiness.parts}
    if readiness.ready and not all(map(_well, readiness.parts.values())):
        status["status"] = "degraded"
    return msgspec.json.encode(status)


def _well(word: str) -> bool:
    """Whether a part's word is that of ordinary work: a few journal entries are behind at any moment."""
    return word == "ok" or word.endswith(BEHIND)
