"""The data plane's metrics and its one log line per request.

Must not: label by account, key, session or anything a client names freely (routes and providers come from the
configuration), or log a prompt, an answer, a key or a header's value.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

import structlog
from prometheus_client import Counter, Gauge, Histogram

from config.logs import lines

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
_FIRST_CONTENT_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
LIVE = Gauge("tollgate_live_sessions", "Sessions running now.", multiprocess_mode="livesum")
FIRST_CONTENT = Histogram(
    "tollgate_first_content_seconds",
    "From the request's arrival to the first content.",
    ["route"],
    buckets=_FIRST_CONTENT_BOUNDS,
)
SETTLE_LATE = Counter("tollgate_settle_late_total", "Settlements whose reply came after the client's answer ended.")
SETTLE_RETRIED = Counter("tollgate_settle_retried_total", "Settlements tried again because the ledger did not answer.")
SETTLE_FAILED = Counter(
    "tollgate_settle_failed_total", "Settlements that the ledger refused: their sessions stay open in Redis."
)
CORRECTIONS = Counter(
    "tollgate_corrections_total", "Swept sessions whose owner was alive and said what was really due.", ["result"]
)
CORRECTED_MICROS = Counter("tollgate_corrected_micros_total", "Charged by corrections, beyond what the sweeps charged.")
LOG_LOST = Counter("tollgate_log_writes_lost_total", "Writes of log lines that failed: a full disk, a reader gone.")
LEASES_LOST = Counter("tollgate_leases_lost_total", "Streams ended because their lease could not be renewed.")
BODY_BYTES = Gauge(
    "tollgate_request_body_bytes", "Bytes of request bodies being read or in use.", multiprocess_mode="livesum"
)
LOOP_LATE = Counter("tollgate_loop_late_total", "Ticks of an event loop that came 0.25 s late or more.")
LOOP_LAG = Gauge("tollgate_loop_lag_seconds", "How late the event loop's last tick was.", multiprocess_mode="livemax")


_tally: dict[tuple[Any, ...], float] = {}
_ended: dict[tuple[str, str, str, str], list[int]] = {}
_first_contents: dict[tuple[str, int], tuple[int, float]] = {}


def count(metric: Counter, amount: float, *labels: str) -> None:
    """Add to a counter at the next `publish()`: a metric shared between processes costs 3 us each time, this 0.2."""
    key = (metric, *labels)
    _tally[key] = _tally.get(key, 0) + amount


def session_ended(
    labels: tuple[str, str, str, str], charged: int, absorbed: int, tokens: tuple[int, int, int, int]
) -> None:
    """Count one settled session, for the next `publish()`: its route, ending, outcome and usage source; amounts in
    micros; prompt, cached, output and reasoning tokens."""
    row = _ended.get(labels)
    if row is None:
        row = _ended[labels] = [0] * 7
    row[0] += 1
    row[1] += charged
    row[2] += absorbed
    row[3] += tokens[0]
    row[4] += tokens[1]
    row[5] += tokens[2]
    row[6] += tokens[3]


def first_content(route: str, seconds: float) -> None:
    """Note the time to a first content, for the next `publish()`."""
    key = route, bisect_left(_FIRST_CONTENT_BOUNDS, seconds)
    number, total = _first_contents.get(key, (0, 0.0))
    _first_contents[key] = number + 1, total + seconds


def publish() -> None:
    """Bring what was counted into the metrics, and write the lines that wait. Called on every tick."""
    for (metric, *labels), amount in _tally.items():
        (metric.labels(*labels) if labels else metric).inc(amount)
    _tally.clear()
    for ended, row in _ended.items():
        _publish_ended(ended, row)
    _ended.clear()
    for (route, bucket), (number, total) in _first_contents.items():
        # The library has no way to observe many values at once, so its parts are written as `observe` does.
        histogram: Any = FIRST_CONTENT.labels(route)
        histogram._sum.inc(total)
        histogram._buckets[bucket].inc(number)
    _first_contents.clear()
    lines.flush()
    if lines.lost:
        LOG_LOST.inc(lines.lost)
        lines.lost = 0


def _publish_ended(labels: tuple[str, str, str, str], row: list[int]) -> None:
    route, ending, outcome, source = labels
    sessions, charged, absorbed, *tokens = row
    SESSIONS.labels(route, ending, outcome).inc(sessions)
    USAGE_SOURCE.labels(route, source).inc(sessions)
    if charged:
        CHARGED.labels(route).inc(charged)
    if absorbed:
        ABSORBED.labels(route).inc(absorbed)
    for name, number in zip(("prompt", "cached", "output", "reasoning"), tokens, strict=True):
        if number:
            TOKENS.labels(route, name).inc(number)
