"""The online audit in the ledger process, with its metrics and log lines.

Must not: decide what a difference is: `metering.reconcile` does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import structlog
from prometheus_client import Counter, Gauge

from metering.online_audit import Look, OnlineAudit
from metering.reconcile import AuditedLedger
from storage.redis_open import Redis

log = structlog.get_logger()

LINES_MAX = 20
"""Lines for one account's differences: a lost account differs in each of its grants."""

AUDITED = Counter("tollgate_audited_accounts_total", "Accounts that the online audit compared with Postgres.")
SKIPPED = Counter("tollgate_audit_skipped_total", "Accounts that it could not compare, by reason.", ["reason"])
DIFFERENCES = Counter("tollgate_audit_differences_total", "Differences between Redis and Postgres, each counted once.")
DIFFERING = Gauge(
    "tollgate_audit_differing_accounts", "Accounts that differ, as last compared.", multiprocess_mode="mostrecent"
)
AGE = Gauge(
    "tollgate_audit_age_seconds",
    "Time since the online audit last compared an account.",
    multiprocess_mode="mostrecent",
)


def watch(
    redis: Redis, ledger: AuditedLedger, database_url: str, every_ms: int, stopped: Callable[[], Collection[int]]
) -> OnlineAudit | None:
    """The online audit of this instance, ready to run; None where the configuration turns it off."""
    if every_ms == 0:
        return None
    return OnlineAudit(redis, ledger, database_url, every_ms=every_ms, stopped=stopped, on_look=_looked)


def publish(audit: OnlineAudit | None) -> None:
    """Bring the gauges up to date."""
    if audit is not None:
        DIFFERING.set(audit.differing)
        AGE.set(audit.age_s)


def _looked(look: Look) -> None:
    if look.skipped is None:
        AUDITED.inc()
    else:
        SKIPPED.labels(look.skipped).inc()
    DIFFERENCES.inc(len(look.fresh))
    for one in look.fresh[:LINES_MAX]:
        log.error(
            "audit difference",
            account=look.account.id,
            what=one.what,
            expected=one.expected,
            found=one.found,
            difference_micros=one.micros,
        )
    if len(look.fresh) > LINES_MAX:
        log.error("audit difference", account=look.account.id, what=f"{len(look.fresh) - LINES_MAX} more")
    if look.healed:
        log.warning("audit difference is gone", account=look.account.id)
