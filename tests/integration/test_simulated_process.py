"""The simulated provider's log tells what was served, and its process ends when and how it should."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from metering.ranks import encoding
from tests.support.simulated_provider import DEADLINE_S, Simulated, chat_body, read_until


@pytest.fixture(scope="module")
def provider() -> Iterator[Simulated]:
    with Simulated.start() as running:
        yield running
        assert running.stop() == 0


def count(said: str) -> int:
    return len(encoding("o200k_base").encode_ordinary(said))


# -- the log --------------------------------------------------------------------------------------------------------


def test_the_log_names_request_key_and_body(provider: Simulated) -> None:
    body = chat_body("gpt-4o", "[[say=logged]]")
    provider.request("POST", "/v1/chat/completions", body, authorization="Bearer sk-secret", x_request_id="req-7")
    logged = provider.last()
    hashed = hashlib.sha256(b"Bearer sk-secret").hexdigest()
    assert (logged["request_id"], logged["model"], logged["stream"], logged["status"]) == ("req-7", "gpt-4o", True, 200)
    assert logged["authorization_sha256"] == hashed
    assert logged["body_sha256"] == hashlib.sha256(body).hexdigest()
    assert provider.request("GET", f"/__requests/{logged['n']}/body").body == body
    headers = provider.request("GET", f"/__requests/{logged['n']}/headers").json()
    assert ["x-request-id", "req-7"] in headers
    assert ["authorization", f"sha256:{hashed}"] in headers
    assert provider.log(since=logged["n"]) == []


def test_an_abort_is_noticed_and_logged_with_what_was_served(provider: Simulated) -> None:
    with provider.connect(chat_body("gpt-4o", "Hi [[tokens=500]][[interval_ms=5]]", usage=True)) as raw:
        got = read_until(raw, b'"content":" think"')
        running = provider.last()
        assert running["running"]
        assert running["ended_ms"] is None
    logged = provider.wait_for(lambda e: not e["running"])
    assert (logged["completed"], logged["aborted"], logged["usage_sent"]) == (False, True, None)
    assert got.count(b'"content":"') - 1 <= logged["served_tokens"] < 500
    assert logged["served_tokens"] == count(logged["text"])
    assert 0 < logged["abort_after_ms"] <= logged["ended_ms"] - logged["started_ms"] + 2


def test_an_abort_before_the_status_line_has_no_status(provider: Simulated) -> None:
    with provider.connect(chat_body("sim-slow-headers:ms=60000")):
        provider.wait_for(lambda e: e["running"])
    logged = provider.wait_for(lambda e: not e["running"])
    assert (logged["status"], logged["served_tokens"], logged["aborted"]) == (None, 0, True)


def test_a_reset_forgets_what_ended_and_goes_on_counting(provider: Simulated) -> None:
    provider.chat("gpt-4o")
    before = provider.last()["n"]
    assert provider.request("DELETE", "/__log").json() == []
    assert provider.log() == []
    provider.chat("gpt-4o")
    assert [entry["n"] for entry in provider.log()] == [before + 1]


# -- the process ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_process_with_0_and_the_log_has_every_line(tmp_path: Path, number: int) -> None:
    file = tmp_path / "served.jsonl"
    with Simulated.start("--log", str(file), "--interval-ms", "1") as running:
        running.chat("gpt-4o")
        stalled = running.connect(chat_body("sim-stall"))
        running.wait_for(lambda e: e["running"] and e["served_tokens"] == 3)
        assert running.stop(number) == 0
        stalled.close()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(e["completed"], e["aborted"], e["running"]) for e in lines] == [
        (True, False, False),
        (False, False, False),
    ]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_the_process_ends_with_its_parent() -> None:
    reading, writing = os.pipe()
    with Simulated.start(env={"TOLLGATE_PARENT_FD": str(reading)}, pass_fds=(reading,)) as running:
        os.close(reading)
        assert running.chat("gpt-4o").status == 200
        os.close(writing)
        assert running.ended() == 0


def test_only_loopback_is_listened_on() -> None:
    command = [sys.executable, "-m", "loadtests.simulated_provider", "--host", "0.0.0.0"]
    ended = subprocess.run(command, capture_output=True, timeout=DEADLINE_S, check=False)
    assert (ended.returncode, ended.stdout) == (2, b"")
    assert b"--allow-any-host" in ended.stderr


def test_a_port_that_is_taken_is_said_in_one_line(provider: Simulated) -> None:
    command = [sys.executable, "-m", "loadtests.simulated_provider", "--port", str(provider.port)]
    ended = subprocess.run(command, capture_output=True, timeout=DEADLINE_S, check=False)
    assert (ended.returncode, ended.stdout) == (1, b"")
    assert ended.stderr.startswith(b"simulate: ")
    assert ended.stderr.count(b"\n") == 1


def test_stdout_has_nothing_but_the_port() -> None:
    with Simulated.start() as running:
        running.chat("gpt-4o")
        running.process.terminate()
        assert running.process.stdout is not None
        assert running.process.stdout.read() == b""
        assert running.ended() == 0
