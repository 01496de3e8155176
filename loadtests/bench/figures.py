"""Figures with their targets, and the table of them. Must not: measure."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BUDGETS = Path(__file__).resolve().parents[1] / "budgets.toml"


@dataclass(frozen=True)
class Figure:
    """One measured number. `value` is what the target is for (the data workers' share); `tree` is the whole gateway
    without its stores, `nginx` the same of nginx; `details` are figures that explain it."""

    name: str
    value: float
    tree: float | None = None
    nginx: float | None = None
    notes: tuple[str, ...] = ()
    overloaded: bool = False
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """How many times nginx's."""
        return self.value / self.nginx if self.nginx else None


@dataclass(frozen=True)
class Goal:
    """What a figure must reach (`required`) and should reach (`aim`), from budgets.toml; both are upper bounds."""

    what: str
    unit: str
    required: float | None = None
    aim: float | None = None
    ratio: float | None = None
    """The most times nginx's figure."""


def goals(path: Path = BUDGETS) -> dict[str, Goal]:
    """The targets by figure, in the order of the file."""
    return {name: Goal(**table) for name, table in tomllib.loads(path.read_text())["bench"].items()}


def verdict(figure: Figure, goal: Goal) -> str:
    """`ok`, `required` (reached, but not what is aimed at), `MISSED`, `overloaded` (work is then done in larger
    portions, and the figure says little), or nothing where there is no goal."""
    if goal.required is None:
        return ""
    if figure.overloaded:
        return "overloaded"
    if figure.value > goal.required or (goal.ratio and figure.ratio and figure.ratio > goal.ratio):
        return "MISSED"
    return "ok" if goal.aim is None or figure.value <= goal.aim else "required"


def table(figures: Iterable[Figure], wanted: dict[str, Goal]) -> str:
    """A plain table, one line for each figure, and the notes below it."""
    head = ("figure", "workers", "gateway", "nginx", "x nginx", "target", "aim", "")
    rows: list[Sequence[str]] = [head]
    notes = []
    for figure in figures:
        goal = wanted[figure.name]
        rows.append(
            (
                f"{goal.what} [{goal.unit}]",
                *(_number(each) for each in (figure.value, figure.tree, figure.nginx, figure.ratio)),
                _bound(goal.required) + (f", {goal.ratio}x" if goal.ratio else ""),
                _bound(goal.aim),
                verdict(figure, goal),
            )
        )
        notes += [f"  {goal.what}: {note}" for note in figure.notes]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [
        "  ".join(
            cell.rjust(width) if 0 < at < 7 else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*lines, *(["", *notes] if notes else [])])


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _bound(value: float | None) -> str:
    return "-" if value is None else f"<= {value:g}"
