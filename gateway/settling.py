"""The connection that settlements use where Redis has a replica, and what is said when no replica confirms them.

Must not: be opened without `[redis] replicas`, or undo a settlement: what the primary has applied stands.
"""

from __future__ import annotations

import time

import structlog
from prometheus_client import Counter

from config.settings import Redis
from metering.keys import mark_beside
from storage.redis_cluster import ClusterClient
from storage.redis_open import open_replicated
from storage.redis_replicated import ReplicatedClient

log = structlog.get_logger()

UNCONFIRMED = Counter(
    "tollgate_settle_unconfirmed_total", "Settlements that the primary applied and no replica confirmed in time."
)
WARN_EVERY_S = 10.0


class Unconfirmed:
    """Counts each, and warns at most once in `WARN_EVERY_S`, with the number since the last warning."""

    def __init__(self) -> None:
        self._untold = 0
        self._next_at = 0.0

    def __call__(self, count: int) -> None:
        UNCONFIRMED.inc(count)
        self._untold += count
        now = time.monotonic()
        if now >= self._next_at:
            log.warning("settlements stand without a replica's confirmation", settlements=self._untold)
            self._untold = 0
            self._next_at = now + WARN_EVERY_S


async def open_settling(url: str, redis: Redis) -> ReplicatedClient | ClusterClient | None:
    """The connected client; None where the configuration names no replica. Raises RedisUnavailable, RedisReplyError."""
    if not redis.replicas:
        return None
    return await open_replicated(
        url,
        call_ms=redis.call_ms,
        connect_ms=redis.connect_ms,
        pending_max=redis.pending_max,
        on_unconfirmed=Unconfirmed(),
        mark_beside=mark_beside,
    )
