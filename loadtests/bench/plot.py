"""The picture of `make bench-plot`: CPU per chunk against the number of streams.

It runs in .venv-bench, which has matplotlib. Must not: measure, or be imported by what runs without matplotlib.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

LINES = {"tollgate": ("#0b6e4f", "Tollgate (everything on)"), "nginx": ("#888888", "nginx (plain proxy)")}


def draw(result: dict[str, Any], files: list[Path]) -> None:
    """Draw the `curve` of a `make bench --json` file into each of `files`; their names say the format."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    (curve,) = (figure for figure in result["figures"] if figure["name"] == "curve")
    picture, axes = pyplot.subplots(figsize=(7, 4), dpi=150)
    for target, points in curve["details"]["points"].items():
        color, label = LINES[target]
        axes.plot(*zip(*points, strict=True), marker="o", color=color, label=label)
    axes.set_xscale("log")
    axes.set_xticks([point[0] for point in points], [str(point[0]) for point in points])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("streams at once, 50 chunks a second each")
    axes.set_ylabel("CPU per chunk, microseconds")
    axes.set_title("Cost of a streamed chunk")
    axes.grid(alpha=0.3)
    axes.legend()
    machine = result["machine"]
    picture.text(0.99, 0.01, f"{machine['cpu']}, Python {machine['python']}", ha="right", fontsize=6, color="#888888")
    picture.tight_layout()
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.savefig(file)
        print(file)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), [Path(name) for name in sys.argv[2:]])
