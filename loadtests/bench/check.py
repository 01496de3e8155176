"""`make bench-check`: the budgets of budgets.toml that need nginx, valgrind or strace.

Prints which tools are missing; what needs them is not held then. Exits 1 when a budget is exceeded by more than its
margin, 2 when something could not be measured.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from loadtests.bench import stack
from loadtests.bench.figures import BUDGETS
from loadtests.bench.scenarios import Bench, Options, cost
from loadtests.bench.stack import BenchError

CORE_CHUNKS = (500, 3500)
WINDOWS_S = (3.0, 9.0)
ROUNDS = 3
ATTACH_S = 20.0
_COLLECTED = re.compile(r"Collected : (\d+)")
_TOTAL = re.compile(r"^\s*[\d.]+\s+[\d.]+\s+(?:[\d.]+\s+)?(\d+)(?:\s+\d+)?\s+total$", re.MULTILINE)


@dataclass(frozen=True)
class Budget:
    """One bound: fails above `most` x `margin`."""

    what: str
    needs: str
    most: float
    margin: float


def budgets(path: Path = BUDGETS) -> dict[str, Budget]:
    """The [check] part of the file."""
    return {name: Budget(**each) for name, each in tomllib.loads(path.read_text())["check"].items()}


def tool(name: str) -> str | None:
    """Where a program is, also where only root usually looks."""
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


def instructions(_: Callable[[], Bench]) -> float:
    """Instructions of more chunks less those of fewer, per chunk: start and imports cancel out."""
    few, many = (_collected(count) for count in CORE_CHUNKS)
    return (many - few) / (CORE_CHUNKS[1] - CORE_CHUNKS[0])


def _collected(chunks: int) -> int:
    command = [str(tool("valgrind")), "--tool=callgrind", "--callgrind-out-file=/dev/null", sys.executable]
    command += ["-m", "tests.support.budgets", "core", str(chunks)]
    environ = {**os.environ, "PYTHONHASHSEED": "0"}
    done = subprocess.run(
        command, cwd=stack.ROOT, env=environ, capture_output=True, text=True, timeout=600, check=False
    )
    found = _COLLECTED.search(done.stderr)
    if done.returncode != 0 or found is None:
        raise BenchError(f"valgrind: {done.stderr[-500:]}")
    return int(found[1])


def syscalls(running: Callable[[], Bench]) -> float:
    """System calls of a longer run less those of a shorter, per chunk."""
    bench = running()
    (worker,) = bench.tollgate.target.groups["worker"]
    seen: list[tuple[int, int]] = []
    for window in WINDOWS_S:
        with tempfile.TemporaryDirectory(prefix="tg-", dir="/tmp") as folder:
            out = Path(folder, "strace")
            with _attached(worker, out):
                events = bench.streams(bench.tollgate.target, 50, 20, window_s=window)["events"]
            found = _TOTAL.search(out.read_text())
            if found is None:
                raise BenchError(f"strace said: {out.read_text()[-500:]}")
            seen.append((int(found[1]), events))
    (few_calls, few_events), (calls, events) = seen
    return (calls - few_calls) / (events - few_events)


@contextlib.contextmanager
def _attached(pid: int, out: Path) -> Iterator[None]:
    """strace counts the system calls of the process and its threads inside the block."""
    command = [str(tool("strace")), "-c", "-f", "-o", str(out), "-p", str(pid)]
    tracing = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + ATTACH_S
        while "TracerPid:\t0\n" in Path(f"/proc/{pid}/status").read_text():
            if tracing.poll() is not None:
                raise BenchError(f"strace: {tracing.stderr.read() if tracing.stderr else ''}")
            if time.monotonic() > deadline:
                raise BenchError(f"strace did not attach within {ATTACH_S:.0f} s")
            time.sleep(0.02)
        yield
    finally:
        if tracing.poll() is None:
            tracing.send_signal(signal.SIGINT)
        tracing.communicate(timeout=ATTACH_S)


def chunk_over_nginx(running: Callable[[], Bench]) -> float:
    """The ratio of CPU per chunk, each the least of some rounds in turn: other load only ever adds."""
    bench = running()
    assert bench.nginx is not None
    targets = (bench.tollgate.target, bench.nginx)
    rounds = [[cost(bench.streams(target, 100, 50), "events") for target in targets] for _ in range(ROUNDS)]
    ours, plain = (min(each) for each in zip(*rounds, strict=True))
    return float(ours / plain)


CHECKS: dict[str, Callable[[Callable[[], Bench]], float]] = {
    "instructions_per_chunk": instructions,
    "syscalls_per_chunk": syscalls,
    "chunk_over_nginx": chunk_over_nginx,
}


class Lazy:
    """The targets, started when a check first asks for them."""

    def __init__(self, stack_: contextlib.ExitStack) -> None:
        self._stack = stack_
        self._bench: Bench | None = None

    def __call__(self) -> Bench:
        if self._bench is None:
            origin = self._stack.enter_context(stack.upstream())
            plain = self._stack.enter_context(stack.nginx(origin))
            gateway = self._stack.enter_context(stack.tollgate(origin))
            self._bench = Bench(origin, plain, gateway, Options(paced=5.0, warm=1.0))
        return self._bench

    def finish(self) -> None:
        """What ran must be in the ledger. Raises BenchError."""
        if self._bench is not None:
            print(self._bench.check_ledger())


def main() -> int:
    """Run the checks whose tools are here."""
    parser = argparse.ArgumentParser(prog="make bench-check", description=__doc__)
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"default: all of {', '.join(CHECKS)}")
    chosen = parser.parse_args().checks or list(CHECKS)
    bounds = budgets()
    missing = sorted({bounds[name].needs for name in chosen if tool(bounds[name].needs) is None})
    print(f"missing tools: {', '.join(missing) or 'none'}", flush=True)
    exceeded = False
    try:
        with contextlib.ExitStack() as running:
            bench = Lazy(running)
            for name in chosen:
                bound = bounds[name]
                if bound.needs in missing:
                    print(f"  not held  {bound.what}: needs {bound.needs}", flush=True)
                    continue
                value = CHECKS[name](bench)
                over = value > bound.most * bound.margin
                exceeded = exceeded or over
                word = "EXCEEDED" if over else "within the margin" if value > bound.most else "ok"
                print(f"  {word}  {bound.what}: {value:.4g}, budget {bound.most:g} x {bound.margin:g}", flush=True)
            bench.finish()
    except BenchError as error:
        print(f"make bench-check: {error}", file=sys.stderr)
        return 2
    return 1 if exceeded else 0


if __name__ == "__main__":
    sys.exit(main())
