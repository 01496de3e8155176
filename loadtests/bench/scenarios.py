"""The scenarios: each puts loads on the targets and turns their windows into figures.

CPU per unit is CPU time of the window over units of the window. Answers that were not whole, and sessions or charges
that the ledger does not have, stop the bench: a figure of broken work is none.
Must not: start a process but load and what a scenario itself compares.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loadtests.bench import stack, wire
from loadtests.bench.figures import Figure
from loadtests.bench.stack import BenchError, Target, Tollgate

CONNECTIONS = 32
PACE_MIN = 0.97
MERGED_MAX = 1.2
LEDGER_S = 30.0
LONG = 20_000
"""Chunks of a long answer."""
FURTHER = 1000
"""Streams beside the first 500, for the memory of one."""
JOB_S = 600.0


@dataclass
class Options:
    """Seconds of the windows: `paced` for streams of a fixed pace, `closed` for loops. `samples` of a latency."""

    paced: float = 20.0
    closed: float = 8.0
    warm: float = 2.0
    samples: int = 1000


class Bench:
    """The running targets, and the sum of what was asked of Tollgate."""

    def __init__(self, origin: Target, nginx: Target | None, tollgate: Tollgate, options: Options) -> None:
        self.origin, self.nginx, self.tollgate, self.options = origin, nginx, tollgate, options
        self._sessions = self._tokens = 0

    def closed(self, target: Target, **load: Any) -> dict[str, Any]:
        """Requests in a closed loop, or at a fixed rate of them all."""
        load = {"connections": CONNECTIONS, "stream": False, "chunks": 0, "window_s": self.options.closed} | load
        return self._job(target, kind="closed", **load)

    def streams(self, target: Target, streams: int, rate: int, **load: Any) -> dict[str, Any]:
        """So many streams at once, each at `rate` chunks a second."""
        load = {"ramp_s": max(0.5, streams / 400), "window_s": self.options.paced} | load
        return self._job(target, kind="streams", streams=streams, rate=rate, **load)

    def latency(self) -> dict[str, list[float]]:
        """Milliseconds to first content by target, one request at a time."""
        targets = [self.origin, self.tollgate.target, *([self.nginx] if self.nginx else [])]
        ports = {target.name: target.port for target in targets}
        count, warm = self.options.samples, 50
        done = _run({"kind": "latency", "key": self.tollgate.target.key, "ports": ports, "count": count, "warm": warm})
        for name, totals in done["totals"].items():
            if totals["errors"] or totals["finished"] != count + warm:
                raise BenchError(f"{name}: {totals['finished']} whole answers, errors {totals['errors']}")
        self._sessions += count + warm
        self._tokens += done["totals"]["tollgate"]["tokens"]
        found: dict[str, list[float]] = {name: sorted(taken) for name, taken in done["ms"].items()}
        return found

    def _job(self, target: Target, **spec: Any) -> dict[str, Any]:
        ours = target.name == "tollgate"
        spec = {
            "port": target.port,
            "key": target.key,
            "warm_s": self.options.warm,
            "exact": ours,
            "origin": self.origin.port,
            "model": wire.MODEL,
        } | spec
        done = _run(spec | {"groups": target.groups})
        if done["errors"] or done["finished"] != done["sent"]:
            raise BenchError(
                f"{target.name}: {done['finished']} of {done['sent']} answers whole, errors {done['errors']}"
            )
        if ours:
            self._sessions += done["finished"]
            self._tokens += done["tokens"]
        return done

    def forget(self) -> None:
        """After work that failed: what the ledger has once it holds still is what is compared from now on."""
        found = None
        while found != (found := self.tollgate.ledger()):
            time.sleep(2.0)
        self._sessions, self._tokens = found

    def check_ledger(self) -> str:
        """Every request is a session of the ledger and every token is charged. Raises BenchError."""
        deadline = time.monotonic() + LEDGER_S
        while (found := self.tollgate.ledger()) != (self._sessions, self._tokens):
            if time.monotonic() > deadline:
                raise BenchError(
                    f"the ledger has {found[0]} sessions and {found[1]} micros charged, "
                    f"the load saw {self._sessions} answers and {self._tokens} tokens at one micro each"
                )
            time.sleep(0.2)
        return f"ledger: {found[0]} sessions and {found[1]} micros, equal to the answers and tokens of the load"


def _run(spec: dict[str, Any]) -> dict[str, Any]:
    """One job in a load process of its own."""
    command = [sys.executable, "-m", "loadtests.bench.jobs"]
    done = subprocess.run(
        command,
        cwd=stack.ROOT,
        input=json.dumps(spec) + "\n",
        capture_output=True,
        text=True,
        timeout=JOB_S,
        check=False,
    )
    if done.returncode != 0:
        raise BenchError(f"the load process failed: {done.stderr[-1000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def cost(done: dict[str, Any], unit: str, group: str = "worker") -> float:
    """Microseconds of CPU per unit (`requests` or `events`) in the window."""
    window = done["window"]
    seconds: float = window["cpu"][group]
    return seconds / max(1, int(window[unit])) * 1e6


def per_unit(name: str, unit: str, done: dict[str, Any], plain: dict[str, Any] | None, **more: Any) -> Figure:
    """A figure of CPU per unit with nginx's beside it."""
    window = done["window"]
    busy = {group: round(seconds / window["seconds"], 2) for group, seconds in window["cpu"].items()}
    details = {"busy_cores": busy, "per_second": round(window[unit] / window["seconds"], 1)}
    nginx = cost(plain, unit) if plain else None
    return Figure(name, cost(done, unit), cost(done, unit, "tree"), nginx, details=details, **more)


def pace_note(who: str, done: dict[str, Any], streams: int, rate: int) -> tuple[str, ...]:
    """A warning when the chunks did not come one by one at their pace: then several are handled at once, which is
    cheaper than what is to be measured."""
    window = done["window"]
    pace = window["events"] / window["seconds"] / (streams * rate)
    merged = window["events"] / max(1, window["reads"])
    if pace >= PACE_MIN and merged <= MERGED_MAX:
        return ()
    busy = ", ".join(f"{name} {seconds / window['seconds']:.2f}" for name, seconds in window["cpu"].items())
    load = f"{who} overloaded with {streams} x {rate}/s"
    return (f"{load}: {pace:.0%} of the pace, {merged:.1f} chunks a read; cores: {busy}",)


def requests(bench: Bench) -> list[Figure]:
    """CPU per request without streaming."""
    done = bench.closed(bench.tollgate.target)
    return [per_unit("request_us", "requests", done, bench.closed(bench.nginx) if bench.nginx else None)]


def streams(bench: Bench) -> list[Figure]:
    """CPU per short stream, and what of it does not depend on the number of chunks."""
    few, many = 2, 50

    def pair(target: Target) -> tuple[dict[str, Any], float]:
        short = bench.closed(target, stream=True, chunks=few)
        long = bench.closed(target, stream=True, chunks=many)
        slope = (cost(long, "requests") - cost(short, "requests")) / (many - few)
        return short, cost(short, "requests") - few * slope

    short, fixed = pair(bench.tollgate.target)
    plain = pair(bench.nginx) if bench.nginx else None
    return [
        per_unit("stream_us", "requests", short, plain[0] if plain else None),
        Figure("stream_fixed_us", fixed, nginx=plain[1] if plain else None),
    ]


def _chunks(bench: Bench, count: int, rate: int, name: str) -> list[Figure]:
    done = bench.streams(bench.tollgate.target, count, rate)
    plain = bench.streams(bench.nginx, count, rate) if bench.nginx else None
    notes = pace_note("tollgate", done, count, rate)
    overloaded = bool(notes)
    if plain:
        notes += pace_note("nginx", plain, count, rate)
    figure = per_unit(name, "events", done, plain, notes=notes, overloaded=overloaded)
    figure.details["rss_mib"] = done["window"]["rss"]["worker"]
    return [figure]


def chunks500(bench: Bench) -> list[Figure]:
    """CPU per chunk of 500 streams at 50 chunks a second."""
    return _chunks(bench, 500, 50, "chunk_us_500")


def chunks50(bench: Bench) -> list[Figure]:
    """CPU per chunk of 50 streams at 50 chunks a second."""
    return _chunks(bench, 50, 50, "chunk_us_50")


def tls(bench: Bench) -> list[Figure]:
    """CPU per chunk of 500 streams at 50 chunks a second, and memory per further stream, with TLS to the upstream."""
    if not bench.origin.tls_port:
        print("tls is not measured: openssl is missing, or could not make a certificate", flush=True)
        return []
    target, count, rate = bench.tollgate.target, 500, 50
    done = bench.streams(target, count, rate, model=wire.TLS_MODEL)
    notes = pace_note("tollgate", done, count, rate)
    few, many = _resident(bench, wire.TLS_MODEL)
    return [
        per_unit("chunk_us_500_tls", "events", done, None, notes=notes, overloaded=bool(notes)),
        Figure("rss_kib_further_tls", (many - few) * 1024 / FURTHER, details={"rss_mib": [few, many]}),
    ]


def spread(bench: Bench) -> list[Figure]:
    """2,000 slow streams against 200 fast ones with as many chunks."""

    def ratio(target: Target) -> tuple[float, float, tuple[str, ...]]:
        slow, fast = bench.streams(target, 2000, 10), bench.streams(target, 200, 100)
        notes = pace_note(target.name, slow, 2000, 10) + pace_note(target.name, fast, 200, 100)
        return cost(slow, "events"), cost(fast, "events"), notes

    slow, fast, notes = ratio(bench.tollgate.target)
    plain = ratio(bench.nginx) if bench.nginx else None
    details = {"slow_us": slow, "fast_us": fast}
    nginx = plain[0] / plain[1] if plain else None
    more = plain[2] if plain else ()
    return [Figure("spread_ratio", slow / fast, None, nginx, notes + more, bool(notes), details)]


def ttft(bench: Bench) -> list[Figure]:
    """Added time to first token, one request at a time: through the gateway less straight to the upstream."""
    taken = bench.latency()
    figures = []
    for name, share in (("ttft_ms_p50", 0.50), ("ttft_ms_p99", 0.99)):
        at = {target: values[int(share * (len(values) - 1))] for target, values in taken.items()}
        direct = at.pop("direct")
        plain = at["nginx"] - direct if "nginx" in at else None
        figures.append(Figure(name, at["tollgate"] - direct, None, plain, details={"direct_ms": direct}))
    return figures


def memory(bench: Bench) -> list[Figure]:
    """Resident memory of fresh workers: at 500 streams, for each further one, and after long answers."""
    few, many = _resident(bench, wire.MODEL)
    plain = None
    with stack.nginx(bench.origin) as fresh:
        if fresh is not None and bench.nginx is not None:
            plain = bench.streams(fresh, 500, 5, window_s=2.0)["window"]["rss"]["worker"]
    with stack.tollgate(bench.origin, beside=bench.tollgate) as other:
        short = {"stream": True, "connections": 10, "window_s": 1.0}
        before = bench.closed(other.target, chunks=2, **short)["window"]["rss"]["worker"]
        long = bench.closed(other.target, chunks=LONG, **short)
        grown = bench.closed(other.target, chunks=2, **short)["window"]["rss"]["worker"] - before
        bench.check_ledger()
    return [
        Figure("rss_mib_500", few, nginx=plain),
        Figure("rss_kib_further", (many - few) * 1024 / FURTHER, details={"rss_mib": [few, many]}),
        Figure("rss_mib_long", grown, details={"chunks_per_answer": LONG, "answers": long["finished"]}),
    ]


def _resident(bench: Bench, model: str) -> tuple[float, float]:
    """MiB of a fresh worker at 500 streams, and with FURTHER ones."""
    with stack.tollgate(bench.origin, beside=bench.tollgate) as other:
        few, many = (
            bench.streams(other.target, count, 5, model=model, window_s=2.0)["window"]["rss"]["worker"]
            for count in (500, 500 + FURTHER)
        )
        bench.check_ledger()
    return few, many


def start(bench: Bench) -> list[Figure]:
    """From the start of `serve` with external stores to its first healthy answer, and the import of the application."""
    taken = []
    for _ in range(3):
        with stack.tollgate(bench.origin, beside=bench.tollgate) as other:
            taken.append(other.ready_s)
    code = "import time; began = time.perf_counter(); import gateway.app; print(time.perf_counter() - began)"
    command = [sys.executable, "-c", code]
    imports = [float(subprocess.check_output(command, cwd=stack.ROOT, text=True)) for _ in range(5)]
    return [Figure("ready_s", sorted(taken)[1]), Figure("import_s", sorted(imports)[2])]


def workers2(bench: Bench) -> list[Figure]:
    """Two workers against one at the same load, which one of them can bear."""
    rate, count, pace = 1000, 200, 50

    def pair(target: Target) -> tuple[float, float, tuple[str, ...]]:
        whole = bench.closed(target, rate=rate)
        parts = bench.streams(target, count, pace)
        return cost(whole, "requests"), cost(parts, "events"), pace_note(target.name, parts, count, pace)

    one = pair(bench.tollgate.target)
    with stack.tollgate(bench.origin, workers=2, beside=bench.tollgate) as other:
        two = pair(other.target)
        bench.check_ledger()
    return [
        Figure("workers2_request", two[0] / one[0], details={"one_us": one[0], "two_us": two[0]}),
        Figure(
            "workers2_chunk",
            two[1] / one[1],
            notes=one[2] + two[2],
            overloaded=bool(one[2] + two[2]),
            details={"one_us": one[1], "two_us": two[1]},
        ),
    ]


CURVE = (10, 25, 50, 100, 200, 350, 500)


def curve(bench: Bench) -> list[Figure]:
    """CPU per chunk against the number of streams, for the picture."""
    window = {"window_s": min(8.0, bench.options.paced)}
    points: dict[str, list[list[float]]] = {}
    for target in (bench.tollgate.target, *([bench.nginx] if bench.nginx else [])):
        for count in CURVE:
            done = bench.streams(target, count, 50, **window)
            points.setdefault(target.name, []).append([count, cost(done, "events")])
    last = points["tollgate"][-1][1]
    return [Figure("curve", last, nginx=points["nginx"][-1][1] if bench.nginx else None, details={"points": points})]


SCENARIOS: dict[str, Callable[[Bench], list[Figure]]] = {
    each.__name__: each
    for each in (requests, streams, chunks500, chunks50, tls, spread, ttft, memory, start, workers2, curve)
}
ONLY_NAMED = ("curve",)
"""Not among those that run when none is named."""
