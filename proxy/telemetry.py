"""The data plane's metrics and its one log line per request.

Must not: label by account, key, session or anything a client names freely (routes and providers come from the
configuration), or log a prompt, an answer, a key or a header's value.
"""

from __future__ import annotations

import structlog
from prometheus_client import Counter, Gauge, Histogram

from metering.ledger import Outcome

log = structlog.get_logger()

REQUESTS = Counter("tollgate_requests_total", "Requests answered, by status and error code.", ["status", "code"])
SESSIONS = Counter(
    "tollgate_sessions_total", "Sessions ended, by route, ending and outcome.", ["route", "ending", "outcome"]
)
TOKENS = Counter("tollgate_tokens_total", "Tokens charged, by route and class.", ["route", "class"])
CHARGED = Counter("tollgate_charged_micros_total", "Micros charged to accounts, by route.", ["route"])
ABSORBED = Counter("tollgate_absorbed_micros_total", "Micros that the house absorbed, by route.", ["route"])
REFUSED = Counter("tollgate_refused_total", "Holds refused, by the limit that refused.", ["limit"])
ATTEMPTS = Counter(
    "tollgate_attempts_total", "Attempts at providers, by provider and outcome.", ["provider", "outcome"]
)
USAGE_SOURCE = Counter(
    "tollgate_usage_source_total", "Sessions by where their token counts came from.", ["route", "source"]
)
USAGE_REFUSED = Counter(
    "tollgate_usage_refused_total", "Provider usage reports that were not believable.", ["provider"]
)
LIVE = Gauge("tollgate_live_sessions", "Sessions running now.", multiprocess_mode="livesum")
FIRST_CONTENT = Histogram(
    "tollgate_first_content_seconds",
    "From the request's arrival to the first content.",
    ["route"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120),
)
SETTLE_LATE = Counter("tollgate_settle_late_total", "Settlements whose reply came after the client's answer ended.")
SETTLE_RETRIED = Counter("tollgate_settle_retried_total", "Settlements tried again because the ledger did not answer.")
LEASES_LOST = Counter("tollgate_leases_lost_total", "Streams ended because their lease could not be renewed.")
LOOP_LAG = Gauge("tollgate_loop_lag_seconds", "How late the event loop's last tick was.", multiprocess_mode="livemax")


def session_ended(route: str, ending: str, outcome: Outcome, charged: int, absorbed: int) -> None:
    """Count one settled session. Amounts in micros."""
    SESSIONS.labels(route, ending, outcome).inc()
    if charged:
        CHARGED.labels(route).inc(charged)
    if absorbed:
        ABSORBED.labels(route).inc(absorbed)
