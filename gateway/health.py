"""Liveness, readiness and metrics. Readiness names each part; only what makes serving wrong makes it 503.

Must not: expose an address, a version or an account. Checks are bounded and remembered for a second, so that probes
cannot load the stores.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from config.settings import Metering
from metering.status import STATUS_KEY, JournalReport, decode_report
from proxy.live_sessions import LiveSessions
from storage.database import FAILED, connect
from storage.redis_client import RedisClient, RedisError

CHECK_S = 2.0
UNUSABLE = ("unreachable", "frozen")
REMEMBER_S = 1.0


@dataclass(frozen=True, slots=True)
class Readiness:
    """Each part's word, and whether traffic should come here."""

    ready: bool
    parts: dict[str, str]


class Health:
    """The health of one worker."""

    def __init__(self, redis: RedisClient, database_url: str, live: LiveSessions, metering: Metering) -> None:
        self._redis = redis
        self._database_url = database_url
        self._live = live
        self._metering = metering
        self.old_server: str | None = None
        """The Redis server's version when it is older than supported; it serves, degraded."""
        self._remembered: tuple[float, dict[str, str]] | None = None
        self._checking = asyncio.Lock()

    async def readiness(self) -> Readiness:
        """Draining, Redis unreachable or frozen, or an outbox past its bound: not ready. Postgres down: degraded."""
        parts = dict(await self._parts())
        if self._live.draining:
            parts["gateway"] = "draining"
        bad = parts["gateway"] == "draining" or parts["redis"] in UNUSABLE or parts["journal"] == "over its bound"
        return Readiness(not bad, parts)

    async def _parts(self) -> dict[str, str]:
        async with self._checking:
            now = time.monotonic()
            if self._remembered is None or now - self._remembered[0] > REMEMBER_S:
                redis, journal = await self._check_redis()
                postgres = await self._check_postgres()
                parts = {"gateway": "ok", "redis": redis, "postgres": postgres, "journal": journal}
                self._remembered = time.monotonic(), parts
            return self._remembered[1]

    async def _check_redis(self) -> tuple[str, str]:
        try:
            epoch = await self._redis.call("HGET", "m:{v000}", "ep")
            raw = await self._redis.call("GET", STATUS_KEY)
        except RedisError:
            return "unreachable", "unknown"
        report = decode_report(raw)
        fit = "ok" if self.old_server is None else f"degraded: {self.old_server} is too old"
        return fit if epoch is not None else "frozen", self._journal_word(report)

    def _journal_word(self, report: JournalReport | None) -> str:
        if report is None:
            return "no flusher running"
        over_age = report.oldest_age_ms > self._metering.outbox_age_s_max * 1000
        if over_age or report.memory_percent >= self._metering.outbox_memory_percent_max:
            return "over its bound"
        if report.stopped_shards:
            return f"{report.stopped_shards} shards stopped"
        return f"{report.entries_behind} entries behind" if report.entries_behind else "ok"

    async def _check_postgres(self) -> str:
        try:
            async with asyncio.timeout(CHECK_S):
                connection = await connect(self._database_url, application_name="tollgate-health", command_s=CHECK_S)
                await connection.close(timeout=CHECK_S)
        except FAILED:
            return "degraded: unreachable"
        return "ok"


def metrics_text() -> tuple[bytes, str]:
    """Metrics of all processes of this instance, and their content type."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry), CONTENT_TYPE_LATEST


def encoded(readiness: Readiness) -> bytes:
    """The readiness answer's JSON."""
    status: dict[str, Any] = {"status": "ok" if readiness.ready else "unavailable", "parts": readiness.parts}
    if readiness.ready and any(word != "ok" for word in readiness.parts.values()):
        words = readiness.parts["postgres"], readiness.parts["redis"]
        status["status"] = "degraded" if words != ("ok", "ok") else "ok"
    return msgspec.json.encode(status)
