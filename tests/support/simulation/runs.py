"""Many schedules, in this process or in several, and what they reached.

Must not: read the environment or the command line.
"""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context

from structlog.testing import capture_logs

from proxy.session import Ending
from tests.support.simulation import schedule, world
from tests.support.simulation.paths import PATHS, RARE

BATCH = 500
MANY = 10_000
"""So many schedules reach everything."""
FAILURES_SHOWN = 5
Reached = Counter[tuple[str, str, bool]]

ENDINGS = frozenset(Ending) - {Ending.CACHED}
"""Those of calls at a provider: a kept answer meets none."""


@dataclass
class Found:
    """Of `count` schedules: the endings and the other paths that they reached, their acts, and the texts of those that
    failed."""

    count: int = 0
    reached: Reached = field(default_factory=Counter)
    paths: Counter[str] = field(default_factory=Counter)
    acts: int = 0
    failed: list[str] = field(default_factory=list)

    def missing(self) -> list[str]:
        """Endings and paths that no schedule had. Of fewer than `MANY` not the rare ones."""
        wanted = PATHS if self.count >= MANY else PATHS - RARE
        return never_reached(self.reached, self.paths, wanted)


def batch(first: int, count: int) -> Found:
    """Schedules `first` to `first + count - 1`."""
    world.prepare()
    found = Found(count)
    with capture_logs():
        for seed in range(first, first + count):
            try:
                result = schedule.run(seed)
            except schedule.Failed as error:
                found.failed.append(str(error))
            else:
                found.reached.update(result.endings)
                found.paths.update(result.paths)
                found.acts += result.acts
    return found


def _batch(job: tuple[int, int]) -> Found:
    return batch(*job)


def never_reached(reached: Reached, paths: Counter[str], wanted: frozenset[str]) -> list[str]:
    """Endings, and of `wanted` paths those that no schedule had."""
    endings = {ending.value for ending in ENDINGS} - {ending for ending, _, _ in reached}
    return sorted(endings) + sorted(wanted - {path for path, times in paths.items() if times})


def table(reached: Reached) -> str:
    """How often each ending was reached, by phase."""
    lines = [f"{'ending':<16} {'phase':<9} {'stream':>9} {'whole':>9}"]
    for ending, phase in sorted({(ending, phase) for ending, phase, _ in reached}):
        lines.append(f"{ending:<16} {phase:<9} {reached[ending, phase, True]:>9} {reached[ending, phase, False]:>9}")
    return "\n".join(lines)


def many(count: int, first: int, processes: int) -> int:
    """Run `count` schedules from seed `first`. Returns the process's exit code."""
    jobs = [(first + at, min(BATCH, count - at)) for at in range(0, count, BATCH)]
    began, found = time.monotonic(), Found(count)
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        for each in pool.map(_batch, jobs):
            found.reached.update(each.reached)
            found.paths.update(each.paths)
            found.acts += each.acts
            found.failed += each.failed
    seconds = time.monotonic() - began
    print(table(found.reached))
    print(", ".join(f"{path} {times}" for path, times in sorted(found.paths.items())))
    print(
        f"{count} schedules, seeds {first} to {first + count - 1}, {found.acts} acts, {found.reached.total()} sessions "
        f"settled: {seconds:.0f} s in {processes} processes, {count / seconds:.0f} schedules/s"
    )
    for text in found.failed[:FAILURES_SHOWN]:
        print(f"FAILED {text}\n  again: make simulate REPLAY={text.split(':', 1)[0].removeprefix('seed ')}")
    missing = found.missing()
    if missing:
        print(f"never reached: {', '.join(missing)}")
    print(f"{len(found.failed)} failed")
    return 1 if found.failed or missing else 0
