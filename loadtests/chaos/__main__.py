"""`make chaos`: faults in a seeded order until the time is over, each run checked to the micro. Exit code 1: a finding.

Must not: judge anything itself, or leave a process behind.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from loadtests.chaos import runner
from loadtests.chaos.runner import Result
from loadtests.chaos.servers import ChaosError
from loadtests.chaos.world import world

SHOWN_MAX = 12
HEAD = f"{'fault':<20}{'sessions':>9}{'charged':>9}{'off':>5}{'serving':>9}{'drained':>9}{'unbilled':>9}  verdict"


@dataclass
class Plan:
    """What is asked for. Times in seconds; `once`: every fault once, however long that takes."""

    seed: str
    minutes: float
    faults: list[str]
    gateways: int = 2
    clients: int = 16
    seconds: float = 12.0
    lease_s: float = 15.0
    once: bool = False
    results: list[Result] = field(default_factory=list)


def _plan(arguments: list[str]) -> Plan:
    parser = argparse.ArgumentParser(prog="python -m loadtests.chaos", description=__doc__)
    environ = os.environ.get
    parser.add_argument("faults", nargs="*", help=f"of: {', '.join(runner.FAULTS)} (default: all)")
    parser.add_argument("--minutes", type=float, default=float(environ("CHAOS_MINUTES") or 10))
    parser.add_argument("--seed", default=environ("CHAOS_SEED") or secrets.token_hex(4))
    parser.add_argument("--gateways", type=int, default=int(environ("CHAOS_GATEWAYS") or 2))
    parser.add_argument("--clients", type=int, default=int(environ("CHAOS_CLIENTS") or 16))
    parser.add_argument("--seconds", type=float, default=float(environ("CHAOS_SECONDS") or 12), help="load of one run")
    parser.add_argument("--lease", type=float, default=15.0, help="seconds that gateways ask for")
    parser.add_argument("--once", action="store_true", help="every fault once, then end")
    parser.add_argument("--json", type=Path, default=environ("CHAOS_JSON") or None, help="write the results here")
    given = parser.parse_args(arguments)
    names = given.faults or (environ("CHAOS_FAULTS") or "").split()
    plan = Plan(
        given.seed, given.minutes, runner.chosen(names), given.gateways, given.clients, given.seconds, given.lease,
        given.once,
    )  # fmt: skip
    print(f"seed {plan.seed}: {', '.join(plan.faults)}", flush=True)
    plan.results = []
    asyncio.run(_all(plan, given.json))
    return plan


def _order(plan: Plan) -> Iterator[tuple[str, str]]:
    """Names and seeds of runs: each round has every fault once, in a drawn order."""
    random, round_ = Random(plan.seed), 0
    while True:
        names = random.sample(plan.faults, len(plan.faults))
        for name in names:
            yield name, f"{plan.seed}-{round_}-{name}"
        round_ += 1
        if plan.once:
            return


async def _all(plan: Plan, path: Path | None) -> None:
    """Runs until the time is over; a world in which something was found is not used again."""
    runner.use_threads()
    me = asyncio.current_task()
    assert me is not None
    for number in (signal.SIGTERM, signal.SIGINT):  # whoever ends it ends everything that it started
        asyncio.get_running_loop().add_signal_handler(number, me.cancel)
    ends = time.monotonic() + plan.minutes * 60
    order = _order(plan)
    print(HEAD, flush=True)
    following = next(order, None)
    while following is not None and (plan.once or time.monotonic() < ends):
        async with world(plan.gateways, lease_s=plan.lease_s) as made:
            sound = True
            while sound and following is not None and (plan.once or time.monotonic() < ends):
                name, seed = following
                result = await runner.run(made, runner.FAULTS[name](), seed, seconds=plan.seconds, clients=plan.clients)
                plan.results.append(result)
                _show(result)
                _write(plan, path)
                sound = result.ok
                following = next(order, None)


def _show(result: Result) -> None:
    word = "ok" if result.ok else f"{len(result.findings)} FINDINGS (seed {result.seed})"
    times = f"{result.serving_s:>8.1f}s{result.drained_s:>8.1f}s"
    money = f"{result.sessions:>9}{result.charged_micros:>9}{result.micros:>5}"
    print(f"{result.fault:<20}{money}{times}{result.unbilled_max:>9}  {word}", flush=True)
    for finding in result.findings[:SHOWN_MAX]:
        print(f"    {finding}", flush=True)
    if len(result.findings) > SHOWN_MAX:
        print(f"    ... and {len(result.findings) - SHOWN_MAX} more", flush=True)


def _write(plan: Plan, path: Path | None) -> None:
    if path is None:
        return
    about = {"seed": plan.seed, "gateways": plan.gateways, "clients": plan.clients, "seconds": plan.seconds}
    about |= {"lease_s": plan.lease_s, "runs": [result.document() for result in plan.results]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n")


def main(arguments: list[str]) -> int:
    """The exit code: 0 without a finding, 1 with one, 2 where nothing could be run."""
    try:
        plan = _plan(arguments)
    except ChaosError as trouble:
        print(f"chaos: {trouble}", file=sys.stderr)
        return 2
    except asyncio.CancelledError:
        print("chaos: ended before its time", file=sys.stderr)
        return 2
    wrong = [result.seed for result in plan.results if not result.ok]
    off = sum(result.micros for result in plan.results)
    print(f"seed {plan.seed}: {len(plan.results)} runs, {off} micros lost or created, {len(wrong)} runs with findings")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
