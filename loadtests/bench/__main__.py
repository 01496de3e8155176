"""The command: `python -m loadtests.bench [SCENARIO ...] [--json FILE]`. See `--help`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loadtests.bench import stack
from loadtests.bench.figures import Figure, goals, table, verdict
from loadtests.bench.scenarios import ONLY_NAMED, SCENARIOS, Bench, Options


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description="Measure a real Tollgate beside a plain nginx.")
    names = ", ".join(f"{name} ({(work.__doc__ or '').split('.')[0]})" for name, work in SCENARIOS.items())
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"default: all but curve. {names}")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--seconds", type=float, default=20.0, help="window of paced streams (default 20)")
    parser.add_argument("--closed-seconds", type=float, default=8.0, help="window of closed loops (default 8)")
    parser.add_argument("--samples", type=int, default=1000, help="requests for the time to first token")
    parser.add_argument("--repeat", type=int, default=1, help="run each scenario so often and keep the middle one")
    parser.add_argument("--without-nginx", action="store_true", help="leave nginx out")
    parser.add_argument("--nice", type=int, default=0, help="priority of all that is started (below 0: root only)")
    chosen = parser.parse_args()
    unknown = sorted(set(chosen.scenarios) - set(SCENARIOS))
    if unknown:
        parser.error(f"no scenario {', '.join(unknown)}; there are {', '.join(SCENARIOS)}")
    chosen.scenarios = chosen.scenarios or [name for name in SCENARIOS if name not in ONLY_NAMED]
    return chosen


def machine() -> dict[str, Any]:
    """Where it ran: with the figures, because they mean little without."""
    model = ""
    with contextlib.suppress(OSError, IndexError):
        text = Path("/proc/cpuinfo").read_text()
        model = text.split("model name")[1].split("\n")[0].strip("\t :")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _middle(bench: Bench, name: str, repeat: int) -> list[Figure]:
    """The figures of one scenario, each the middle one of its repeats."""
    runs = [SCENARIOS[name](bench) for _ in range(repeat)]
    return [sorted(same, key=lambda figure: figure.value)[len(same) // 2] for same in zip(*runs, strict=True)]


def main() -> int:
    """0: measured (targets may be missed); 1: something could not be measured."""
    chosen = _arguments()
    if sys.platform != "linux":
        print("make bench: it reads CPU time and memory as Linux tells them, and runs there only", file=sys.stderr)
        return 1
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, hard), hard))
    os.nice(chosen.nice)
    options = Options(chosen.seconds, chosen.closed_seconds, samples=chosen.samples)
    wanted = goals()
    figures: list[Figure] = []
    failed: list[str] = []
    here = machine()
    try:
        with contextlib.ExitStack() as running:
            origin = running.enter_context(stack.upstream())
            plain = None if chosen.without_nginx else running.enter_context(stack.nginx(origin))
            bench = Bench(origin, plain, running.enter_context(stack.tollgate(origin)), options)
            if plain is None:
                print("nginx is not measured (not found, or left out)", flush=True)
            for name in chosen.scenarios:
                print(f"{name} ...", flush=True, file=sys.stderr)
                try:
                    figures += _middle(bench, name, chosen.repeat)
                except stack.BenchError as error:
                    failed.append(f"{name}: {error}")
                    bench.forget()
            honest = bench.check_ledger()
    except stack.BenchError as error:
        print(f"make bench: {error}", file=sys.stderr)
        return 1
    print(table(figures, wanted))
    print(f"\n{honest}\n{', '.join(f'{name} {value}' for name, value in here.items())}")
    if chosen.json:
        rows = [
            asdict(figure) | {"ratio": figure.ratio, "verdict": verdict(figure, wanted[figure.name])}
            for figure in figures
        ]
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps({"machine": here, "figures": rows}, indent=1) + "\n")
    for text in failed:
        print(f"make bench: not measured: {text}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
