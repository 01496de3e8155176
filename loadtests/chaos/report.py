"""Writes the table of docs/reliability.md out of result files: `python -m loadtests.chaos.report DOC RESULT.json...`.

What stands between the two marks of the document is replaced; nothing else of it is touched. Must not: leave out a run,
or put in a figure that no run has measured.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loadtests.chaos.runner import FAULTS

BEGIN, END = "<!-- runs: begin -->", "<!-- runs: end -->"
HEAD = (
    "| row | fault | runs | sessions | credits charged | lost or created "
    "| serving again | holds freed | drained | unbilled, worst |",
    "|---|---|---|---|---|---|---|---|---|---|",
)
MICROS = 1_000_000
Run = Mapping[str, Any]


def credits_of(micros: int) -> str:
    """Micros as credits: exact, without needless zeros."""
    whole, rest = divmod(micros, MICROS)
    return f"{whole}.{rest:06d}".rstrip("0").rstrip(".")


def table(runs: Iterable[Run]) -> list[str]:
    """One line per fault that was run, in the order of their rows, and a line of sums."""
    by_fault: dict[str, list[Run]] = {}
    for run in runs:
        by_fault.setdefault(run["fault"], []).append(run)
    lines = [_line(by_fault[name]) for name in FAULTS if name in by_fault]
    every = [run for group in by_fault.values() for run in group]
    return [*HEAD, *lines, _sum(every)] if every else []


def _line(runs: Sequence[Run]) -> str:
    first = runs[0]
    cells = [str(first["number"]), f"`{first['fault']}`: {FAULTS[first['fault']].title}", *_money(runs)]
    return _joined([*cells, *_times(runs)])


def _sum(runs: Sequence[Run]) -> str:
    return _joined(["", "all", *_money(runs), *_times(runs)])


def _joined(cells: Sequence[str]) -> str:
    return "".join(f"| {cell} " if cell else "| " for cell in cells) + "|"


def _money(runs: Sequence[Run]) -> list[str]:
    failed = sum(not run["ok"] for run in runs)
    many = f"{len(runs)}" + (f" ({failed} failed)" if failed else "")
    sessions, charged = sum(run["sessions"] for run in runs), sum(run["charged_micros"] for run in runs)
    return [many, f"{sessions:,}", credits_of(charged), credits_of(sum(run["micros"] for run in runs))]


def _times(runs: Sequence[Run]) -> list[str]:
    """The worst of each; nothing where it was not measured."""
    worst = [_seconds(runs, name) for name in ("serving_s", "freed_s", "drained_s")]
    return [*worst, str(max(run["unbilled_max"] for run in runs))]


def _seconds(runs: Sequence[Run], name: str) -> str:
    measured = [run[name] for run in runs if run[name] is not None]
    return f"{max(measured):.1f} s" if measured else ""


def about(files: Sequence[Mapping[str, Any]]) -> str:
    """How the runs were made, in one line for each file."""
    return "\n".join(
        f"- seed `{one['seed']}`: {len(one['runs'])} runs, {one['gateways']} gateways, {one['clients']} clients, "
        f"{one['seconds']:g} s of load or more in each, leases of {one['lease_s']:g} s"
        for one in files
    )


def written(document: str, files: Sequence[Mapping[str, Any]]) -> str:
    """The document with the files' runs. Raises ValueError for a document without the marks."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the document has no {BEGIN} ... {END}")
    runs = [run for one in files for run in one["runs"]]
    return f"{before}{BEGIN}\n" + "\n".join([*table(runs), "", about(files)]) + f"\n{END}{after}"


def main(arguments: Sequence[str]) -> int:
    """The exit code."""
    if len(arguments) < 2:
        print("usage: python -m loadtests.chaos.report DOCUMENT RESULT.json...", file=sys.stderr)
        return 2
    document = Path(arguments[0])
    files = [json.loads(Path(name).read_text(encoding="utf-8")) for name in arguments[1:]]
    document.write_text(written(document.read_text(encoding="utf-8"), files), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
