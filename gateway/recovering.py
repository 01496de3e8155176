"""The watch over Redis' state in the ledger process, with its metrics.

Must not: decide anything: `metering.recovery` does.
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge

from metering.rebuild import Rebuilt
from metering.recovery import Recovery
from storage.redis_open import Redis

FROZEN = Gauge(
    "tollgate_frozen_shards", "Shards that are frozen because Redis lost state.", multiprocess_mode="mostrecent"
)
REBUILDS = Counter("tollgate_rebuilds_total", "Rebuilds of Redis' state from Postgres and receipts.")
SHARDS_REBUILT = Counter("tollgate_rebuilt_shards_total", "Shards rebuilt.")
SECONDS = Counter("tollgate_rebuild_seconds_total", "Seconds that rebuilds took.")
REFUSED = Counter("tollgate_rebuild_refused_total", "Receipts that a rebuild could not apply: someone must look.")


def watch(redis: Redis, database_url: str, lease_ms: int) -> Recovery:
    """The recovery of this instance, ready to run."""
    return Recovery(redis, database_url, lease_ms=lease_ms, on_rebuilt=_rebuilt)


def _rebuilt(done: Rebuilt) -> None:
    REBUILDS.inc()
    SHARDS_REBUILT.inc(len(done.shards))
    SECONDS.inc(done.seconds)
    REFUSED.inc(done.failed)
