"""Many schedules, in this process or in several, and what they reached.

Must not: read the environment or the command line.
"""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from structlog.testing import capture_logs

from proxy.session import Ending
from tests.support.simulation import schedule, world

BATCH = 500
FAILURES_SHOWN = 5
Reached = Counter[tuple[str, str, bool]]

ENDINGS = frozenset(Ending) - {Ending.CACHED}
"""Those of calls at a provider: a kept answer meets none."""


def batch(first: int, count: int) -> tuple[Reached, int, list[str]]:
    """Schedules `first` to `first + count - 1`: what they reached, their acts, and the texts of those that failed."""
    world.prepare()
    reached: Reached = Counter()
    acts, failed = 0, []
    with capture_logs():
        for seed in range(first, first + count):
            try:
                result = schedule.run(seed)
            except schedule.Failed as error:
                failed.append(str(error))
            else:
                reached.update(result.endings)
                acts += result.acts
    return reached, acts, failed


def _batch(job: tuple[int, int]) -> tuple[Reached, int, list[str]]:
    return batch(*job)


def never_reached(reached: Reached) -> list[str]:
    """Endings that no schedule had."""
    return sorted({ending.value for ending in ENDINGS} - {ending for ending, _, _ in reached})


def table(reached: Reached) -> str:
    """How often each ending was reached, by phase."""
    lines = [f"{'ending':<16} {'phase':<9} {'stream':>9} {'whole':>9}"]
    for ending, phase in sorted({(ending, phase) for ending, phase, _ in reached}):
        lines.append(f"{ending:<16} {phase:<9} {reached[ending, phase, True]:>9} {reached[ending, phase, False]:>9}")
    return "\n".join(lines)


def many(count: int, first: int, processes: int) -> int:
    """Run `count` schedules from seed `first`. Returns the process's exit code."""
    jobs = [(first + at, min(BATCH, count - at)) for at in range(0, count, BATCH)]
    began, reached, acts = time.monotonic(), Counter[tuple[str, str, bool]](), 0
    failed: list[str] = []
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        for found, done, texts in pool.map(_batch, jobs):
            reached.update(found)
            acts += done
            failed += texts
    seconds = time.monotonic() - began
    print(table(reached))
    print(
        f"{count} schedules, seeds {first} to {first + count - 1}, {acts} acts, {reached.total()} sessions settled: "
        f"{seconds:.0f} s in {processes} processes, {count / seconds:.0f} schedules/s"
    )
    for text in failed[:FAILURES_SHOWN]:
        print(f"FAILED {text}\n  again: make simulate REPLAY={text.split(':', 1)[0].removeprefix('seed ')}")
    missing = never_reached(reached)
    if missing:
        print(f"never reached: {', '.join(missing)}")
    print(f"{len(failed)} failed")
    return 1 if failed or missing else 0
