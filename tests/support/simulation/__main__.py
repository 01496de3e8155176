"""`python -m tests.support.simulation`: many schedules in several processes, and what they reached.

SIMULATE_SCHEDULES (100,000) and SEED (a random one) come from the environment; `--seed N` replays one schedule and
tells its acts. Exits 1 when a schedule fails, or when one of the endings was never reached.
"""

from __future__ import annotations

import argparse
import os
import random
import sys

from structlog.testing import capture_logs

from tests.support.simulation import schedule, world
from tests.support.simulation.runs import many


def replay(seed: int) -> int:
    """One schedule again. Returns the process's exit code."""
    world.prepare()
    with capture_logs() as logs:
        try:
            result = schedule.run(seed)
        except schedule.Failed as error:
            print(error)
            for line in logs:
                print(f"  log: {line}")
            return 1
    print(f"seed {seed}: {result.acts} acts, {result.endings}, {dict(result.paths)}")
    return 0


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.simulation")
    parser.add_argument("--seed", type=int, help="replay this one schedule")
    asked = parser.parse_args()
    if asked.seed is not None:
        return replay(asked.seed)
    count = int(os.environ.get("SIMULATE_SCHEDULES") or 100_000)
    first = int(os.environ.get("SEED") or random.randrange(10**12))
    return many(count, first, int(os.environ.get("SIMULATE_PROCESSES") or os.cpu_count() or 1))


if __name__ == "__main__":
    sys.exit(main())
