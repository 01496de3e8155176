"""`make loadtest`: a fresh gateway, Locust against it, the check, a summary, and a page with charts.

LOADTEST_USERS (50), LOADTEST_SECONDS (60) and LOADTEST_WORKERS (1) override. Exit code 1 when the check finds anything,
or a client met an error that it had not asked for. Must not: judge by speed, which the benchmarks do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from loadtests import run_load
from loadtests.reconcile import Verdict
from loadtests.run_instance import ROOT, Instance, running
from loadtests.run_report import percentile

REPORT = ROOT / "loadtests" / "report"


def note(message: str) -> None:
    """A line about what goes on."""
    print(f"[{time.strftime('%H:%M:%S')}] {message}", file=sys.stderr, flush=True)


def whole_number(name: str, default: int) -> int:
    """A whole number from the environment. Exits with a hint for anything else."""
    text = os.environ.get(name) or str(default)
    if not text.isdecimal() or not int(text):
        sys.exit(f"{name}: '{text}' is not a whole number above 0.")
    return int(text)


def summary(calls: Iterable[Any]) -> str:
    """What the clients saw, as a table: endings, then percentiles of times and speeds."""
    calls = list(calls)
    endings = Counter((call["who"], call["ending"]) for call in calls)
    out = [f"{'calls':>8}  user, ending", *(f"{n:>8}  {who}, {how}" for (who, how), n in sorted(endings.items()))]
    paced = [call for call in calls if call["who"] != "slow reader"]
    values: dict[str, list[float]] = {
        "TTFT, ms": [call["ttft_ms"] for call in calls if call["ttft_ms"] is not None],
        "gap, ms": [gap for call in paced for gap in call["gaps_ms"]],
        "tokens/s": [
            len(call["gaps_ms"]) * 1000 / sum(call["gaps_ms"])
            for call in paced
            if call["ending"] == "completed" and sum(call["gaps_ms"])
        ],
    }
    out.append(f"{'':>10}{'p50':>10}{'p95':>10}{'p99':>10}{'max':>10}{'count':>10}")
    for name, found in values.items():
        if found:
            shown = "".join(f"{percentile(found, share):>10.1f}" for share in (0.5, 0.95, 0.99, 1.0))
            out.append(f"{name:>10}{shown}{len(found):>10}")
    return "\n".join(out)


def check_clients(instance: Instance, exit_code: int, verdict: Verdict) -> None:
    """No client met an error that it had not asked for, and Locust itself was content."""
    for call in run_load.lines(instance.calls):
        verdict.checked["calls"] += 1
        verdict.expect(call["ending"] not in ("failed", "refused"), f"{call['who']}: {call['ending']}: {call['error']}")
    verdict.expect(verdict.checked["calls"] > 0, "no call was made")
    told = (instance.folder / "locust.log").read_text()[-1500:]
    verdict.expect(exit_code == 0, f"Locust ended with {exit_code}: {told}")


def write_page(instance: Instance, html: Path, verdict: Verdict, shown: str) -> None:
    """The report, drawn where matplotlib is."""
    facts = {"ok": verdict.ok, "checked": list(verdict.checked.items()), "findings": verdict.findings, "summary": shown}
    written = instance.folder / "verdict.json"
    written.write_text(json.dumps(facts))
    drawn = html.with_suffix(".part")
    command = [str(run_load.LOCUST_PYTHON), "-m", "loadtests.run_report", str(instance.calls), str(written)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "MPLCONFIGDIR": str(instance.folder)}
    subprocess.run([*command, str(html), str(drawn)], cwd=ROOT, env=environ, check=True)
    drawn.replace(html)


def measured(
    load: run_load.Load,
    workers: int,
    judged: Callable[[Instance, Verdict], None],
    each_second: Callable[[Instance], None],
) -> Verdict:
    """One load on a fresh gateway, checked and shown. `judged` adds findings of its own before the stores are gone."""
    run_load.need_locust()
    load.html.parent.mkdir(exist_ok=True)
    load.html.unlink(missing_ok=True)
    note("starting a gateway and a simulated provider")
    with running(workers) as instance:
        before = run_load.warm_up(instance)
        note(f"{load.users} users for {load.seconds} s against {instance.url}, {workers} worker(s)")
        exit_code = run_load.run(instance, load, lambda: each_second(instance))
        note("checking charges, provider's log and ledger")
        verdict = run_load.check(instance, before)
        check_clients(instance, exit_code, verdict)
        judged(instance, verdict)
        shown = summary(run_load.lines(instance.calls))
        write_page(instance, load.html, verdict, shown)
    print(f"\n{shown}\n\nThe check of charges, provider's log and ledger:\n{verdict.shown()}")
    print(f"\n{'PASSED' if verdict.ok else 'FAILED'}. Report: {load.html.relative_to(ROOT)}")
    return verdict


def main() -> int:
    """Run it; the exit code."""
    load = run_load.Load(
        whole_number("LOADTEST_USERS", 50), whole_number("LOADTEST_SECONDS", 60), REPORT / "loadtest.html"
    )
    workers = whole_number("LOADTEST_WORKERS", 1)
    verdict = measured(load, workers, lambda instance, verdict: None, lambda instance: None)
    return 0 if verdict.ok else 1


if __name__ == "__main__":
    sys.exit(main())
