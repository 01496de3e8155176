"""One load on an instance: Locust as a child process of its own virtual environment, then everything the check needs.

Must not: judge (reconcile does), or start the gateway (run_instance does).
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from loadtests import reconcile
from loadtests.run_instance import ROOT, SESSIONS_LISTED_MAX, Instance, wait_until

LOCUST_PYTHON = ROOT / ".venv-bench" / "bin" / "python"
SETTLE_S, LOG_S = 60.0, 10.0
STOP_TIMEOUT_S = 5
"""How long Locust waits for calls that run at the end; those that take longer leave in the middle."""


@dataclass(frozen=True)
class Load:
    """How much: users, seconds, and where Locust writes its report."""

    users: int
    seconds: int
    html: Path


def warm_up(instance: Instance) -> set[str]:
    """One call with every key, so that keys, limits and accounts have their place in Redis. The names of Redis' keys.

    Raises RuntimeError where a call is refused.
    """
    body = json.dumps({"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "[[tokens=1]]Hi"}]}).encode()
    for key in instance.keys.read_text().split():
        status = instance.fetch("POST", "/v1/chat/completions", body, authorization=f"Bearer {key}")
        if status != 200:
            raise RuntimeError(f"the warm-up call was answered with {status}")
    wait_until(lambda: idle(instance), SETTLE_S, "idle accounts after the warm-up")
    with instance.redis() as store:
        return set(key_lifetimes(store))


def run(instance: Instance, load: Load, each_second: Callable[[], None] = lambda: None) -> int:
    """Locust to its end; its exit code (0: no failures). `each_second` is called meanwhile."""
    command = [str(LOCUST_PYTHON), "-m", "locust", "-f", "loadtests/locustfile.py", "-H", instance.url, "--headless"]
    command += ["--users", str(load.users), "--spawn-rate", str(max(5, load.users // 5))]
    command += ["--run-time", f"{load.seconds}s", "--stop-timeout", str(STOP_TIMEOUT_S), "--only-summary"]
    command += ["--html", str(load.html), "--loglevel", "WARNING"]
    environ = {**os.environ, "LOADTEST_KEYS": str(instance.keys), "LOADTEST_CALLS": str(instance.calls)}
    environ["PYTHONPATH"] = str(ROOT)
    with (instance.folder / "locust.log").open("wb") as log:
        locust = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=log, stderr=log)
    try:
        while locust.poll() is None:
            each_second()
            with contextlib.suppress(subprocess.TimeoutExpired):
                locust.wait(1.0)
    finally:
        if locust.poll() is None:
            locust.terminate()
            locust.wait(30)
    return locust.returncode


def idle(instance: Instance) -> bool:
    """Whether no account has anything held."""
    shown = (instance.ask("credits", "show", name)["balance"] for name in instance.accounts)
    return all(balance["held_micros"] == balance["open_sessions"] == 0 for balance in shown)


def lines(path: Path) -> Iterator[Any]:
    """The JSON values of a log's lines."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def key_lifetimes(store: redis.Redis) -> dict[str, int]:
    """Every key of Redis with its time to live in ms (-1: none)."""
    names = [name.decode() for name in store.scan_iter(count=1000)]
    with store.pipeline(transaction=False) as pipeline:
        for name in names:
            pipeline.pttl(name)
        return dict(zip(names, pipeline.execute(), strict=True))


def check(instance: Instance, before: set[str]) -> reconcile.Verdict:
    """Wait until everything has settled, then compare it all. `before` are Redis' keys from before the load."""
    verdict = reconcile.Verdict()
    try:
        wait_until(lambda: idle(instance), SETTLE_S, "idle accounts after the load")
    except TimeoutError as late:
        verdict.findings.append(str(late))
    audit = instance.ask("audit", codes=(0, 1))
    verdict.checked["accounts audited"] += audit["accounts"]
    verdict.same("tollgate audit: differences", audit["differences"], [])
    sessions = []
    for name in instance.accounts:
        listed = instance.ask("sessions", "list", "--account", name, "--limit", str(SESSIONS_LISTED_MAX))["sessions"]
        verdict.expect(len(listed) < SESSIONS_LISTED_MAX, f"{name}: more sessions than can be listed")
        reconcile.check_account(name, instance.ask("credits", "show", name), listed, verdict)
        sessions += listed
    reconcile.check_sessions(sessions, _served(instance, sessions), lines(instance.calls), verdict)
    with instance.redis() as store:
        after = key_lifetimes(store)
        finished = len(sessions) - sum(name.startswith("s:") for name in before)
        reconcile.check_keys(before, after, finished, verdict)
        waiting = sum(store.xlen(name) for name in after if name.startswith("o:"))
    verdict.same("journal entries that wait in Redis", waiting, 0)
    return verdict


def _served(instance: Instance, sessions: list[Any]) -> list[Any]:
    """The provider's log, once it has a line for every session that came to something."""
    wanted = {one["metadata"]["request_id"] for one in sessions if one["state"] not in ("void", "running")}

    def complete() -> list[Any] | None:
        found = list(lines(instance.provider_log))
        return found if wanted <= {entry["request_id"] for entry in found} else None

    with contextlib.suppress(TimeoutError):
        found: list[Any] = wait_until(complete, LOG_S, "the provider's log")
        return found
    return list(lines(instance.provider_log))  # what is missing becomes a finding


def need_locust() -> None:
    """Exit with a hint where Locust is not installed."""
    if not LOCUST_PYTHON.exists():
        sys.exit("Locust is not installed: run `make loadtest` or `make soak`, which install it into .venv-bench.")
