"""The report of chaos runs: sums and worst cases of what was measured, and nothing that was not."""

from __future__ import annotations

from typing import Any

import pytest

from loadtests.chaos.report import BEGIN, COLUMNS, END, credits_of, rows_of, table, written
from loadtests.chaos.runner import FAULTS, chosen
from loadtests.chaos.servers import ChaosError


def run(fault: str, **changes: Any) -> dict[str, Any]:
    """One run as its JSON has it."""
    known = FAULTS[fault]
    fields = {"fault": fault, "number": known.number, "title": known.title, "sessions": 1_200, "ok": True}
    fields |= {
        "charged_micros": 1_500_000,
        "micros": 0,
        "serving_s": 0.5,
        "drained_s": 2.0,
        "freed_s": None,
        "rebuilt_s": None,
        "unbilled_max": 3,
    }
    return fields | changes


def test_runs_of_a_fault_are_summed_and_the_worst_is_shown() -> None:
    runs = [
        run("valkey-kill", rebuilt_s=0.9),
        run("gateway-kill", freed_s=9.0),
        run("gateway-kill", serving_s=1.25, freed_s=16.0, unbilled_max=90),
    ]
    head, rule, first, second, every = table(runs)
    assert head.count("|") == rule.count("|") == first.count("|") == every.count("|") == len(COLUMNS) + 1
    assert first.startswith("| 1 | `gateway-kill`: ")
    assert first.endswith("| 2 | 2,400 | 3 | 0 | 1.2 s | | 16.0 s | 2.0 s | 90 |")
    assert second.startswith("| 10 | `valkey-kill`: ")
    assert second.endswith("| 0.5 s | 0.9 s | | 2.0 s | 3 |")
    assert every.endswith("| 3 | 3,600 | 4.5 | 0 | 1.2 s | 0.9 s | 16.0 s | 2.0 s | 90 |")


def test_a_failed_run_and_a_lost_micro_are_not_hidden() -> None:
    line = table([run("poison", ok=False, micros=1), run("poison")])[2]
    assert "| 2 (1 failed) |" in line
    assert "| 0.000001 |" in line


def test_only_what_stands_between_the_marks_is_replaced() -> None:
    one = {"seed": "s", "gateways": 2, "clients": 16, "seconds": 12.0, "lease_s": 15.0, "runs": [run("poison")]}
    document = f"before\n{BEGIN}\nOUTDATED\n{END}\nafter\n"
    first = written(document, [one])
    assert first.startswith(f"before\n{BEGIN}\n| row | fault ")
    assert first.endswith(f"{END}\nafter\n")
    assert "OUTDATED" not in first
    assert "- seed `s`: 1 runs, 2 gateways" in first
    assert written(first, [one]) == first
    with pytest.raises(ValueError, match="runs: begin"):
        written("no marks", [one])


OLD = f"""| {" | ".join(column for column in COLUMNS if column not in ("rebuilt", "holds freed"))} |
|---|---|---|---|---|---|---|---|---|
| 20 | `poison`: an older title | 2 (1 failed) | 1,528 | 0.061821 | 0.000001 | 0.1 s | 4.5 s | 7 |
| 1 | `gateway-kill`: as it was | 4 | 10 | 1.5 | 0 | 9.9 s | 9.9 s | 9 |
| | all | 6 | 1,538 | 1.561821 | 0.000001 | 9.9 s | 9.9 s | 9 |

- seed `old`: 6 runs, 2 gateways, 16 clients, 12 s of load or more in each, leases of 15 s"""


def test_a_fault_that_was_not_run_again_keeps_its_row_and_counts_in_the_sums() -> None:
    again = {"seed": "s", "gateways": 2, "clients": 16, "seconds": 12.0, "lease_s": 15.0, "runs": [run("gateway-kill")]}
    made = written(f"{BEGIN}\n{OLD}\n{END}", [again])
    lines = made.splitlines()
    assert lines[3].endswith("| 1 | 1,200 | 1.5 | 0 | 0.5 s | | | 2.0 s | 3 |")
    assert lines[4] == (
        "| 20 | `poison`: an older title | 2 (1 failed) | 1,528 | 0.061821 | 0.000001 | 0.1 s | | | 4.5 s | 7 |"
    )
    assert lines[5] == "| | all | 3 (1 failed) | 2,728 | 1.561821 | 0.000001 | 0.5 s | | | 4.5 s | 7 |"
    assert [line[:14] for line in lines[7:9]] == ["- seed `old`: ", "- seed `s`: 1 "]
    assert written(made, [again]) == made
    assert [row["fault"] for row in rows_of(OLD.splitlines())] == [
        "`poison`: an older title",
        "`gateway-kill`: as it was",
    ]


@pytest.mark.parametrize(("micros", "shown"), [(0, "0"), (1, "0.000001"), (1_500_000, "1.5"), (20_000_000, "20")])
def test_micros_are_shown_as_credits(micros: int, shown: str) -> None:
    assert credits_of(micros) == shown


def test_faults_are_chosen_by_name_and_all_by_default() -> None:
    assert chosen([]) == list(FAULTS)
    assert chosen(["poison"]) == ["poison"]
    with pytest.raises(ChaosError, match="no such fault: plague"):
        chosen(["plague", "poison"])


def test_every_fault_says_which_row_it_is_and_what_happens() -> None:
    assert {fault.number for fault in FAULTS.values()} == {*range(1, 15), *range(16, 25)}
    assert len({fault.title for fault in FAULTS.values()}) == len(FAULTS)
