"""The budgets that need only Python (loadtests/budgets.toml): counts of one real data worker and of the pure core."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from loadtests.bench import check, figures, scenarios, wire
from metering.ranks import encoding

ROOT = Path(__file__).resolve().parents[2]
BUDGETS: dict[str, Any] = tomllib.loads((ROOT / "loadtests" / "budgets.toml").read_text())


def python(*arguments: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def counts() -> dict[str, Any]:
    """The counts, taken once."""
    found: dict[str, Any] = json.loads(python("-m", "tests.support.budgets"))
    return found


@pytest.mark.parametrize("name", BUDGETS["python"])
def test_a_count_stays_within_its_budget(name: str, counts: dict[str, Any]) -> None:
    budget = BUDGETS["python"][name]
    text = f"{budget['what']}: {counts[name]:.2f}; called most: {json.dumps(counts['most'], indent=1)}"
    assert counts[name] <= budget["most"] * budget["margin"], text


def test_every_count_has_a_budget(counts: dict[str, Any]) -> None:
    assert set(counts) - {"most"} == set(BUDGETS["python"])


def test_a_data_worker_loads_nothing_that_it_must_not_and_little_else() -> None:
    budget = BUDGETS["imports"]
    loaded = python("-c", "import sys, gateway.worker; print(*sys.modules)").split()
    assert sorted(set(budget["forbidden"]) & {name.partition(".")[0] for name in loaded}) == []
    assert len(loaded) <= budget["modules_most"]


def test_the_application_imports_in_its_time() -> None:
    # CPU time, and the least of some: a wait for a busy machine is none of the import's.
    code = "import time; began = time.process_time(); import gateway.app; print(time.process_time() - began)"
    budget = BUDGETS["imports"]
    assert any(float(python("-c", code)) <= budget["app_cpu_s"] * budget["margin"] for _ in range(3))


def test_every_check_has_a_budget_and_every_figure_a_goal() -> None:
    assert set(check.CHECKS) == set(check.budgets())
    assert set(scenarios.SCENARIOS) >= set(scenarios.ONLY_NAMED)
    assert all(goal.what and goal.unit for goal in figures.goals().values())


def test_a_chunk_of_the_bench_is_one_token_in_about_311_bytes() -> None:
    o200k = encoding("o200k_base")
    assert all(len(o200k.encode_ordinary(f" {word}")) == 1 for word in wire.WORDS)
    sizes = [len(chunk.split(b"\r\n")[1]) + 2 for chunk in wire.CHUNKS]
    assert all(abs(size - 311) <= 15 for size in sizes), sizes


def test_a_figure_is_missed_above_its_bound_or_its_ratio_and_says_nothing_when_overloaded() -> None:
    goal = figures.Goal("x", "us", required=25, aim=20, ratio=2.6)
    assert figures.verdict(figures.Figure("x", 19.0, nginx=10.0), goal) == "ok"
    assert figures.verdict(figures.Figure("x", 24.0, nginx=10.0), goal) == "required"
    assert figures.verdict(figures.Figure("x", 26.0, nginx=20.0), goal) == "MISSED"
    assert figures.verdict(figures.Figure("x", 19.0, nginx=7.0), goal) == "MISSED"
    assert figures.verdict(figures.Figure("x", 19.0, nginx=10.0, overloaded=True), goal) == "overloaded"
