"""`make soak`: half an hour of mixed load with clients that leave, and a look every ten seconds at what could grow.

SOAK_MINUTES (30), SOAK_USERS (30) and SOAK_WORKERS (1) override. Writes soak.csv and soak.html to loadtests/report. On
top of the load test's check: resident memory of every gateway process must not rise over the second half, and Redis
must hold nothing more than one record per finished session, of bounded size. Must not: judge memory by a run that is
too short to have warmed up.
"""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loadtests.reconcile import Verdict
from loadtests.run_instance import Instance
from loadtests.run_load import Load
from loadtests.run_loadtest import REPORT, measured, note, whole_number

EVERY_S = 10.0
MIB = 1024 * 1024
SLOPE_MIB_PER_HOUR_MAX = 6.0
"""What resident memory may rise by: 1.5 MiB over the fifteen minutes that are fitted, about what late caches fill."""

RECORD_BYTES_MAX = 2_048
"""What Redis may keep of one finished session, for its 24 hours."""

JUDGED_FROM_MINUTES = 10
"""In a shorter run caches still fill in the second half: its slope is shown and not judged."""

Row = dict[str, float]


@dataclass(frozen=True)
class Fit:
    """A straight line through points: rise per hour, and the standard error of that."""

    per_hour: float
    error: float


def fit(points: Sequence[tuple[float, float]]) -> Fit:
    """Least squares over (seconds, value). Fewer than three points, or all at one moment: an endless error."""
    n = len(points)
    if n < 3:
        return Fit(0.0, float("inf"))
    middle_x, middle_y = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    spread = sum((x - middle_x) ** 2 for x, _ in points)
    if spread == 0:
        return Fit(0.0, float("inf"))
    slope = sum((x - middle_x) * (y - middle_y) for x, y in points) / spread
    rest = sum((y - middle_y - slope * (x - middle_x)) ** 2 for x, y in points)
    return Fit(slope * 3600, (rest / (n - 2) / spread) ** 0.5 * 3600)


def second_half(rows: Sequence[Row], name: str) -> list[tuple[float, float]]:
    """(seconds, value) of a column in the second half of the time."""
    middle = (rows[0]["seconds"] + rows[-1]["seconds"]) / 2
    return [(row["seconds"], row[name]) for row in rows if row["seconds"] >= middle]


def judge(rows: Sequence[Row], users: int, minutes: int, verdict: Verdict) -> list[str]:
    """Memory and keys over the run; lines for people. A rise counts when even two standard errors less is too much."""
    shown = []
    for name in [name for name in rows[0] if name.endswith("_mib") and name != "redis_mib"]:
        line = fit(second_half(rows, name))
        shown.append(
            f"{name:>16}: {rows[0][name]:.1f} at first, {rows[-1][name]:.1f} at last; "
            f"second half {line.per_hour:+.2f} +- {2 * line.error:.2f} MiB/h (at most {SLOPE_MIB_PER_HOUR_MAX})"
        )
        if minutes < JUDGED_FROM_MINUTES:
            shown[-1] += f", not judged below {JUDGED_FROM_MINUTES} minutes"
        elif line.per_hour - 2 * line.error > SLOPE_MIB_PER_HOUR_MAX:
            verdict.findings.append(f"memory rises: {shown[-1].strip()}")
    verdict.checked["memory samples"] += len(rows)
    lasting = max(row["redis_lasting_keys"] for row in rows)
    bound = (
        rows[0]["redis_lasting_keys"] + 2 * users
    )  # a call that runs is one key, and one more while it is being left
    shown.append(
        f"{'lasting keys':>16}: {rows[0]['redis_lasting_keys']:.0f} at first, {lasting:.0f} at most ({bound:.0f})"
    )
    verdict.expect(lasting <= bound, f"keys without an end in Redis: {lasting:.0f}, at most {bound:.0f}")
    records = rows[-1]["redis_keys"] - rows[0]["redis_keys"]
    if records > 0:
        each = (rows[-1]["redis_mib"] - rows[0]["redis_mib"]) * MIB / records
        shown.append(f"{'redis':>16}: {records:.0f} keys more, {each:.0f} bytes each (at most {RECORD_BYTES_MAX})")
        if minutes >= JUDGED_FROM_MINUTES:
            verdict.expect(each <= RECORD_BYTES_MAX, f"Redis keeps {each:.0f} bytes for each finished session")
    return shown


def taken(instance: Instance, seconds: float) -> Row:
    """One sample. Raises psutil.Error, redis.RedisError when a process or the store is gone."""
    row: Row = {"seconds": round(seconds, 1)}
    for name, process in instance.processes().items():
        row[f"{name}_mib"] = round(process.memory_info().rss / MIB, 3)
    with instance.redis() as store:
        keyspace: Any = store.info("keyspace")
        memory: Any = store.info("memory")
    database = keyspace.get("db0", {"keys": 0, "expires": 0})
    row["redis_keys"] = database["keys"]
    row["redis_lasting_keys"] = database["keys"] - database["expires"]
    row["redis_mib"] = round(memory["used_memory"] / MIB, 3)
    return row


@dataclass
class Samples:
    """Takes a sample whenever one is due."""

    rows: list[Row] = field(default_factory=list)
    pids: set[int] = field(default_factory=set)
    _started: float = field(default_factory=time.monotonic)
    _due: float = 0.0

    def __call__(self, instance: Instance) -> None:
        elapsed = time.monotonic() - self._started
        if elapsed < self._due:
            return
        self._due = elapsed + EVERY_S
        self.pids |= {process.pid for process in instance.processes().values()}
        self.rows.append(taken(instance, elapsed))
        if len(self.rows) % 6 == 0:
            note(", ".join(f"{name} {value:g}" for name, value in self.rows[-1].items()))


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """The samples, a line each."""
    rows = list(rows)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else ["seconds"])
        writer.writeheader()
        writer.writerows(rows)


def main() -> int:
    """Run it; the exit code."""
    minutes, users = whole_number("SOAK_MINUTES", 30), whole_number("SOAK_USERS", 30)
    load = Load(users, minutes * 60, REPORT / "soak.html")
    samples, shown = Samples(), list[str]()

    def judged(instance: Instance, verdict: Verdict) -> None:
        write_csv(REPORT / "soak.csv", samples.rows)
        verdict.same("gateway processes that were started", len(samples.pids), len(instance.processes()))
        shown.extend(judge(samples.rows, users, minutes, verdict))

    verdict = measured(load, whole_number("SOAK_WORKERS", 1), judged, samples)
    print("\n".join(shown))
    return 0 if verdict.ok else 1


if __name__ == "__main__":
    sys.exit(main())
