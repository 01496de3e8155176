"""`make bench-peers`: CPU per request and per chunk of LiteLLM and Portkey over Tollgate's: one upstream, one run.

Each peer gets a load that one core of it can carry, and Tollgate the very same load right after it: a chunk costs more
when few come at once, so only equal loads compare. What a peer costs is its whole process tree; Tollgate's figure is
all its processes but the stores: with its supervisor, not the data worker alone.
A peer that cannot be installed is named and left out.
Must not: let a figure of broken answers into the table.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import resource
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from loadtests.bench import stack
from loadtests.bench.__main__ import machine
from loadtests.bench.peer_processes import LITELLM, PORTKEY, Missing, Peer, started
from loadtests.bench.scenarios import CONNECTIONS, Bench, Options, cost, pace_note
from loadtests.bench.stack import BenchError, Target


@dataclass(frozen=True)
class Pair:
    """Two numbers of one kind: for a request without streaming, and for a chunk."""

    request: float
    chunk: float


def over(theirs: Pair, ours: Pair) -> Pair:
    """How many times ours theirs is."""
    return Pair(theirs.request / ours.request, theirs.chunk / ours.chunk)


@dataclass(frozen=True)
class Load:
    """`connections` that ask again when answered, and `streams` at once of `rate` chunks a second each."""

    connections: int
    streams: int
    rate: int

    def __str__(self) -> str:
        return f"{self.connections} connections, {self.streams} streams x {self.rate}/s"


@dataclass(frozen=True)
class Result:
    """CPU in microseconds: `theirs` of the peer, `ours` of Tollgate at the same load, `workers` the share of its data
    workers. `least`: how many times Tollgate's cost the peer's should be. `notes` warn of an overload."""

    peer: str
    version: str
    load: Load
    theirs: Pair
    ours: Pair
    workers: Pair
    least: Pair
    notes: tuple[str, ...] = ()

    @property
    def ratio(self) -> Pair:
        """How many times Tollgate's cost the peer's is."""
        return over(self.theirs, self.ours)


PEERS: tuple[tuple[Peer, Load, Pair], ...] = (
    # About 35 streams of 50 chunks a second are all that a core of LiteLLM can carry.
    (LITELLM, Load(CONNECTIONS, 25, 50), Pair(request=40, chunk=20)),
    (PORTKEY, Load(CONNECTIONS, 200, 50), Pair(request=5, chunk=2)),
)
GROUPS = ("tree", "worker")
WARM_S = 3.0
"""Longer than for nginx: Node compiles what runs often."""


def verdict(ratio: float, least: float, notes: Sequence[str] = ()) -> str:
    """`ok`, `MISSED`, or `overloaded`: the work was then done in larger portions, and the ratio says little."""
    if notes:
        return "overloaded"
    return "ok" if ratio >= least else "MISSED"


HEAD = ("peer", "version", "load", "us/request", "us/chunk", "x request", "target", "", "x chunk", "target", "")
TO_THE_RIGHT = (3, 4, 5, 6, 8, 9)
BASIS = "x: over all of Tollgate's processes but the stores, at the same load; on the data worker's line over it alone."


def table(results: Iterable[Result], own_version: str) -> str:
    """Three lines for each peer (its own, Tollgate's and its data worker's at the same load), and the notes."""
    rows: list[Sequence[str]] = [HEAD]
    notes = [BASIS]
    for each in results:
        ratio, least = each.ratio, each.least
        asked = (_times(ratio.request), f">= {least.request:g}x", verdict(ratio.request, least.request))
        streamed = (_times(ratio.chunk), f">= {least.chunk:g}x", verdict(ratio.chunk, least.chunk, each.notes))
        alone = over(each.theirs, each.workers)
        rows += [
            (each.peer, each.version, str(each.load), *_both(each.theirs), *asked, *streamed),
            ("Tollgate", own_version, "the same", *_both(each.ours), *[""] * 6),
            ("  data worker", "", "", *_both(each.workers), _times(alone.request), "", "", _times(alone.chunk), "", ""),
        ]
        notes += each.notes
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    lines = [
        "  ".join(
            cell.rjust(width) if at in TO_THE_RIGHT else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*lines, "", *(f"  {note}" for note in notes)])


def _times(ratio: float) -> str:
    return f"{ratio:.1f}x"


def _both(pair: Pair) -> tuple[str, str]:
    return f"{pair.request:.0f}", f"{pair.chunk:.1f}"


def left_out(peer: Peer, why: Exception) -> str:
    """What is said of a peer that is not measured."""
    return f"{peer.title} is not measured: {why}"


def as_json(results: Iterable[Result], missing: Mapping[str, str], here: Mapping[str, object]) -> str:
    """What `--json` keeps."""
    rows = []
    for each in results:
        verdicts = {
            "request": verdict(each.ratio.request, each.least.request),
            "chunk": verdict(each.ratio.chunk, each.least.chunk, each.notes),
        }
        rows.append(asdict(each) | {"ratio": asdict(each.ratio), "verdict": verdicts})
    return json.dumps({"machine": here, "peers": rows, "left_out": missing}, indent=1) + "\n"


def _costs(bench: Bench, target: Target, load: Load) -> tuple[Pair, Pair, tuple[str, ...]]:
    """CPU of the whole tree and of its workers at this load, and what to know of the pace. Raises BenchError."""
    # `exact`: every answer must have as many events as its usage says, of the peers too.
    asked = bench.closed(target, connections=load.connections, exact=True)
    streamed = bench.streams(target, load.streams, load.rate, exact=True)
    tree, workers = (Pair(cost(asked, "requests", group), cost(streamed, "events", group)) for group in GROUPS)
    return tree, workers, pace_note(target.name, streamed, load.streams, load.rate)


def measure(bench: Bench, peer: Peer, version: str, load: Load, least: Pair) -> Result:
    """Start a peer, load it, load Tollgate the same way. Raises BenchError."""
    print(f"{peer.title} {version}: {load} ...", file=sys.stderr, flush=True)
    with started(peer, bench.origin) as target:
        theirs, _, notes = _costs(bench, target, load)
    ours, workers, more = _costs(bench, bench.tollgate.target, load)
    return Result(peer.title, version, load, theirs, ours, workers, least, notes + more)


def _arguments() -> argparse.Namespace:
    names = [peer.name for peer, _, _ in PEERS]
    parser = argparse.ArgumentParser(
        prog="make bench-peers", description="Measure LiteLLM and Portkey beside Tollgate."
    )
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"default: all of {', '.join(names)}")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--seconds", type=float, default=20.0, help="window of paced streams (default 20)")
    parser.add_argument("--closed-seconds", type=float, default=8.0, help="window of closed loops (default 8)")
    chosen = parser.parse_args()
    unknown = sorted(set(chosen.peers) - set(names))
    if unknown:
        parser.error(f"no peer {', '.join(unknown)}; there are {', '.join(names)}")
    chosen.peers = chosen.peers or names
    return chosen


def _leave(number: int, _: FrameType | None) -> None:
    """A signal ends the run as an exception does, so that all that was started is stopped."""
    sys.exit(128 + number)


def _measured(found: Sequence[tuple[Peer, str, Load, Pair]], options: Options) -> tuple[list[Result], list[str], str]:
    """The results, what could not be measured, and what the ledger says. Raises BenchError."""
    results: list[Result] = []
    failed: list[str] = []
    with contextlib.ExitStack() as running:
        origin = running.enter_context(stack.upstream())
        bench = Bench(origin, None, running.enter_context(stack.tollgate(origin)), options)
        for each in found:
            try:
                results.append(measure(bench, *each))
            except BenchError as error:
                failed.append(f"{each[0].title}: {error}")
                bench.forget()
        return results, failed, bench.check_ledger()


def main() -> int:
    """0: measured, or left out because it cannot be had (ratios may be missed); 1: something broke."""
    chosen = _arguments()
    if sys.platform != "linux":
        print("make bench-peers: it reads CPU time as Linux tells it, and runs there only", file=sys.stderr)
        return 1
    for each in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, _leave)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, hard), hard))
    found: list[tuple[Peer, str, Load, Pair]] = []
    missing: dict[str, str] = {}
    for peer, load, least in PEERS:
        if peer.name in chosen.peers:
            try:
                found.append((peer, peer.install(), load, least))
            except Missing as why:
                missing[peer.name] = str(why)
                print(left_out(peer, why), flush=True)
    here = machine()
    results: list[Result] = []
    failed: list[str] = []
    honest = ""
    try:
        if found:
            results, failed, honest = _measured(found, Options(chosen.seconds, chosen.closed_seconds, WARM_S))
    except BenchError as error:
        print(f"make bench-peers: {error}", file=sys.stderr)
        return 1
    if results:
        print(table(results, importlib.metadata.version("tollgate")))
        print(f"\n{honest}\n{', '.join(f'{name} {value}' for name, value in here.items())}")
    if chosen.json:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(as_json(results, missing, here))
    for text in failed:
        print(f"make bench-peers: not measured: {text}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
