"""Writes the table of docs/reliability.md out of result files: `python -m loadtests.chaos.report DOC RESULT.json...`.

What stands between the two marks of the document is replaced; nothing else of it is touched. Faults that none of the
files has keep the row that they had there. Must not: leave out a run, or put in a figure that no run has measured.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from loadtests.chaos.runner import FAULTS

BEGIN, END = "<!-- runs: begin -->", "<!-- runs: end -->"
TIMES = {"serving again": "serving_s", "rebuilt": "rebuilt_s", "holds freed": "freed_s", "drained": "drained_s"}
COLUMNS = (
    "row", "fault", "runs", "sessions", "credits charged", "lost or created", *TIMES, "unbilled, worst",
)  # fmt: skip
MICROS = 1_000_000
Run = Mapping[str, Any]
Row = Mapping[str, str]
"""A line of the table: column -> what is shown."""

_NAME = re.compile(r"`([a-z-]+)`")
_RUNS = re.compile(r"([0-9]+)(?: \(([0-9]+) failed\))?")
_SEED = re.compile(r"- seed `([^`]*)`: ")


def credits_of(micros: int) -> str:
    """Micros as credits: exact, without needless zeros."""
    whole, rest = divmod(micros, MICROS)
    return f"{whole}.{rest:06d}".rstrip("0").rstrip(".")


def table(runs: Iterable[Run], kept: Iterable[Row] = ()) -> list[str]:
    """One line per fault that was run, in the order of their rows, and a line of sums. `kept` are lines of before."""
    by_fault: dict[str, list[Run]] = {}
    for run in runs:
        by_fault.setdefault(run["fault"], []).append(run)
    rows = [*(_row(group) for group in by_fault.values()), *(row for row in kept if name_of(row) not in by_fault)]
    order = {name: place for place, name in enumerate(FAULTS)}
    rows.sort(key=lambda row: order.get(name_of(row), len(order)))
    rule = "|---" * len(COLUMNS) + "|"
    return ["| " + " | ".join(COLUMNS) + " |", rule, *map(_joined, rows), _joined(_sum(rows))] if rows else []


def name_of(row: Row) -> str:
    """The fault that a line is about; '' for the sums."""
    found = _NAME.search(row.get("fault", ""))
    return found[1] if found else ""


def rows_of(lines: Iterable[str]) -> list[Row]:
    """The faults' lines of a table as it was written, whatever columns it had."""
    names: list[str] = []
    rows = []
    for line in lines:
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("| row "):
            names = cells
        elif line.startswith("| ") and len(cells) == len(names):
            rows.append(dict(zip(names, cells, strict=True)))
    return [row for row in rows if name_of(row)]


def _row(runs: Sequence[Run]) -> Row:
    first = runs[0]
    failed = sum(not run["ok"] for run in runs)
    cells = {"row": str(first["number"]), "fault": f"`{first['fault']}`: {FAULTS[first['fault']].title}"}
    cells |= {"runs": _runs(len(runs), failed), "sessions": f"{sum(run['sessions'] for run in runs):,}"}
    cells |= {"credits charged": credits_of(sum(run["charged_micros"] for run in runs))}
    cells |= {"lost or created": credits_of(sum(run["micros"] for run in runs))}
    cells |= {column: _worst(run.get(name) for run in runs) for column, name in TIMES.items()}
    return cells | {"unbilled, worst": str(max(run["unbilled_max"] for run in runs))}


def _sum(rows: Sequence[Row]) -> Row:
    counts = [_RUNS.fullmatch(row["runs"]) for row in rows]
    runs, failed = (sum(int(found[at] or 0) for found in counts if found) for at in (1, 2))
    sessions = sum(int(row["sessions"].replace(",", "")) for row in rows)
    cells = {"row": "", "fault": "all", "runs": _runs(runs, failed), "sessions": f"{sessions:,}"}
    for column in ("credits charged", "lost or created"):
        cells[column] = credits_of(int(sum(Decimal(row[column]) for row in rows) * MICROS))
    for column in TIMES:
        shown = [row[column].removesuffix(" s") for row in rows if row.get(column)]
        cells[column] = _worst(map(float, shown))
    return cells | {"unbilled, worst": str(max(int(row["unbilled, worst"]) for row in rows))}


def _runs(many: int, failed: int) -> str:
    return f"{many}" + (f" ({failed} failed)" if failed else "")


def _worst(seconds: Iterable[float | None]) -> str:
    """The longest; nothing where it was not measured."""
    measured = [one for one in seconds if one is not None]
    return f"{max(measured):.1f} s" if measured else ""


def _joined(row: Row) -> str:
    return "".join(f"| {cell} " if cell else "| " for cell in (row.get(column, "") for column in COLUMNS)) + "|"


def about(files: Sequence[Mapping[str, Any]]) -> list[str]:
    """How the runs were made, in one line for each file."""
    return [
        f"- seed `{one['seed']}`: {len(one['runs'])} runs, {one['gateways']} gateways, {one['clients']} clients, "
        f"{one['seconds']:g} s of load or more in each, leases of {one['lease_s']:g} s"
        for one in files
    ]


def written(document: str, files: Sequence[Mapping[str, Any]]) -> str:
    """The document with the files' runs. Raises ValueError for a document without the marks."""
    before, begin, rest = document.partition(BEGIN)
    old, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the document has no {BEGIN} ... {END}")
    runs = [run for one in files for run in one["runs"]]
    measured, seeds = {run["fault"] for run in runs}, {one["seed"] for one in files}
    kept = [row for row in rows_of(old.splitlines()) if name_of(row) not in measured]
    found = ((line, _SEED.match(line)) for line in old.splitlines())
    notes = [line for line, seed in found if kept and seed and seed[1] not in seeds]
    return f"{before}{BEGIN}\n" + "\n".join([*table(runs, kept), "", *notes, *about(files)]) + f"\n{END}{after}"


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
