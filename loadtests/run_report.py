"""The page of a load test: the check's verdict and charts over time, put before Locust's own report in one HTML file.

Runs in .venv-bench (`python -m loadtests.run_report CALLS VERDICT LOCUST_HTML PAGE`), where matplotlib is. Must not:
judge, import the gateway, or need the network to be looked at.
"""

from __future__ import annotations

import html
import io
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

STEP_S = 2
"""Calls are gathered into steps of so many seconds of the run."""

Series = dict[str, list[tuple[float, float]]]


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile of values that are not empty; `share` is from 0 to 1."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))]


def over_time(samples: Iterable[tuple[float, float]], measures: dict[str, Callable[[list[float]], float]]) -> Series:
    """(seconds, value) samples as one line per measure, a point for each step that has samples."""
    steps: dict[int, list[float]] = defaultdict(list)
    for at, value in samples:
        steps[int(at // STEP_S)].append(value)
    return {
        name: [(step * STEP_S, measure(values)) for step, values in sorted(steps.items())]
        for name, measure in measures.items()
    }


def percentiles() -> dict[str, Callable[[list[float]], float]]:
    """p50, p95 and p99."""
    return {
        f"p{share * 100:.0f}": lambda values, share=share: percentile(values, share)  # type: ignore[misc]
        for share in (0.5, 0.95, 0.99)
    }


def per_second(values: list[float]) -> float:
    """The sum of a step's values, per second."""
    return sum(values) / STEP_S


def charts(calls: list[dict[str, Any]]) -> dict[str, Series]:
    """The charts by title. Slow readers are left out where their own slowness would show."""
    start = min(call["at"] for call in calls)
    paced = [call for call in calls if call["who"] != "slow reader"]
    ended = [(call["at"] - start + call["total_ms"] / 1000, call) for call in calls]
    first = [(call["at"] - start, call["ttft_ms"]) for call in calls if call["ttft_ms"] is not None]
    gaps = [(call["at"] - start + call["total_ms"] / 1000, gap) for call in paced for gap in call["gaps_ms"]]
    speed = [
        (call["at"] - start, len(call["gaps_ms"]) * 1000 / sum(call["gaps_ms"]))
        for call in paced
        if call["ending"] == "completed" and sum(call["gaps_ms"])
    ]
    endings: Series = {}
    moments = [(at, 0.0) for at, _ in ended]  # so that a step without a failure is a zero, not a hole
    for ending in sorted({call["ending"] for call in calls}):
        counted = [(at, 1.0) for at, call in ended if call["ending"] == ending]
        endings |= over_time(counted + moments, {ending: per_second})
    tokens = over_time([(at, float(call["chunks"])) for at, call in ended], {"all users": per_second})
    return {
        "time to first token, ms": over_time(first, percentiles()),
        "inter-token gap, ms": over_time(gaps, percentiles()),
        "tokens a second of one answer": over_time(speed, percentiles()),
        "tokens a second of all answers": tokens,
        "calls a second, by ending": endings,
    }


def svg(drawn: dict[str, Series]) -> str:
    """The charts as one inline SVG."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, places = pyplot.subplots(len(drawn), 1, figsize=(11, 2.6 * len(drawn)), sharex=True, layout="constrained")
    for place, (title, series) in zip(places, drawn.items(), strict=True):
        for name, points in series.items():
            place.plot([at for at, _ in points], [value for _, value in points], label=name, linewidth=1.4)
        place.set_title(title, loc="left", fontsize=10)
        place.set_ylim(bottom=0)
        place.grid(alpha=0.3)
        if series:
            place.legend(loc="upper right", fontsize=8)
    places[-1].set_xlabel("seconds of the run")
    out = io.StringIO()
    figure.savefig(out, format="svg")
    return out.getvalue().partition("<svg")[2]


def page(locust: str, verdict: dict[str, Any], drawing: str) -> str:
    """Locust's report with our section before it."""
    rows = "".join(f"<tr><td>{number:,}</td><td>{html.escape(what)}</td></tr>" for what, number in verdict["checked"])
    wrong = "".join(f"<li>{html.escape(finding)}</li>" for finding in verdict["findings"])
    said = "The check passed" if verdict["ok"] else "The check FAILED"
    section = (
        f'<section style="font-family:sans-serif;max-width:1100px;margin:24px auto">'
        f"<h1>Tollgate load test</h1><h2>{said}</h2><ul>{wrong}</ul><table>{rows}</table>"
        f"<pre>{html.escape(verdict['summary'])}</pre><svg{drawing}</section>"
    )
    before, mark, after = locust.partition("<body>")
    return f"{before}{mark}{section}{after}" if mark else section + locust


def main(arguments: list[str]) -> int:
    """Write the page."""
    calls_path, verdict_path, locust_path, page_path = map(Path, arguments)
    with calls_path.open(encoding="utf-8") as file:
        calls = [json.loads(line) for line in file]
    drawing = svg(charts(calls)) if calls else ">"
    locust = locust_path.read_text(encoding="utf-8") if locust_path.exists() else ""
    page_path.write_text(page(locust, json.loads(verdict_path.read_text()), drawing), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
