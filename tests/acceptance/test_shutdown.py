"""The end of `tollgate serve`: what a SIGTERM stops, in which order, and that nothing and nobody is left behind."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from openai import AsyncOpenAI

from tests.support.gateway import ROOT, Gateway, Key, running, until
from tests.support.outages import (
    DONE,
    MODEL,
    Stream,
    ask,
    audited,
    bearer,
    instance_pids,
    nothing_left,
    outage_config,
    readiness,
    ready,
    streams,
)

DRAIN_S = 4
SLACK_S = 10.0
"""For a machine that has other work too."""
CONFIG = outage_config(lease_ms=3_000, margin_ms=1_000, drain_s=DRAIN_S)


@dataclass
class Ending:
    """What one SIGTERM did, written down while it happened."""

    gateway: Gateway
    key: Key
    words: list[tuple[int, str]] = field(default_factory=list)
    refusal: openai.APIStatusError | None = None
    short: Stream | None = None
    long: Stream | None = None
    short_was_running: bool = False
    code: int | None = None
    seconds: float = 0.0
    left: set[int] = field(default_factory=set)
    sessions: dict[str, dict[str, Any]] = field(default_factory=dict)


async def refusal(gateway: Gateway, key: Key) -> openai.APIStatusError:
    """How a new call is refused."""
    messages: Any = ask(5)["messages"]
    async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=key.text, max_retries=0) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            await client.chat.completions.create(model=MODEL, messages=messages)
    return caught.value


async def end(gateway: Gateway) -> Ending:
    """SIGTERM while a stream runs that will be done in time, and one that will not."""
    await ready(gateway)
    seen = Ending(gateway, await gateway.key())
    process = gateway.process
    assert process is not None
    async with streams(gateway, seen.key, 1, 250, 10) as (short,), streams(gateway, seen.key, 1, 3_000, 10) as (long,):
        await short.flowing(20)
        await long.flowing(20)
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()

        async def draining() -> bool:
            status, parts = await readiness(gateway)
            seen.words.append((status, parts.get("gateway", "")))
            return status == 503

        await until(draining)
        seen.refusal = await refusal(gateway, seen.key)
        seen.short_was_running = not short.whole
        seen.short, seen.long = short, long
        await short.ended()
        await long.ended()
        seen.code = await asyncio.to_thread(process.wait, 60)
        seen.seconds = time.monotonic() - began
        seen.left = instance_pids(gateway)
    listed = await asyncio.to_thread(gateway.tollgate, "sessions", "list", "--account", seen.key.account.id, "--json")
    assert listed.returncode == 0, listed.stderr
    seen.sessions = {one["id"]: one for one in json.loads(listed.stdout)["sessions"]}
    return seen


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ending]:
    """A gateway that was asked to stop while it served, and its record."""
    with running(tmp_path_factory.mktemp("shutdown"), CONFIG) as gateway, nothing_left(gateway):
        yield asyncio.run(end(gateway))


def test_readiness_fails_first_and_says_that_it_drains(ended: Ending) -> None:
    assert ended.words[-1] == (503, "draining")
    assert set(ended.words[:-1]) <= {(200, "ok")}
    assert ended.short_was_running


def test_new_calls_are_refused_while_running_streams_drain(ended: Ending) -> None:
    refused = ended.refusal
    assert refused is not None
    assert (refused.status_code, refused.code, refused.type) == (503, "shutting_down", "server_error")
    assert int(refused.response.headers["retry-after"]) >= 1


def test_a_stream_that_ends_within_the_drain_is_complete(ended: Ending) -> None:
    short = ended.short
    assert short is not None
    assert short.whole
    assert short.error is None
    assert short.data.endswith(DONE)
    assert short.tokens == 250
    assert ended.sessions[short.session]["state"] == "completed"


def test_a_stream_longer_than_the_drain_is_ended_in_band_and_settled_for_what_it_delivered(ended: Ending) -> None:
    long = ended.long
    assert long is not None
    assert long.whole
    assert long.data.endswith(DONE)
    assert long.error is not None
    assert (long.error["code"], long.error["type"]) == ("shutting_down", "server_error")
    row = ended.sessions[long.session]
    assert row["state"] == "error"
    assert row["prompt_tokens"] > 0
    assert long.tokens <= row["output_tokens"] <= long.tokens + 8  # the last chunks may have been on their way


def test_the_exit_code_is_zero_within_the_drain_and_no_process_is_left(ended: Ending) -> None:
    assert ended.code == 0
    assert DRAIN_S <= ended.seconds < DRAIN_S + SLACK_S
    assert ended.left == set()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", ended.gateway.port), 2).close()


def test_the_books_agree_after_the_end(ended: Ending) -> None:
    assert len(ended.sessions) == 2
    audited(ended.gateway)  # by servers started for the command's own duration
    assert instance_pids(ended.gateway) == set()


async def test_a_second_signal_ends_the_drain_at_once_and_still_settles(tmp_path: Path) -> None:
    with (
        running(tmp_path, outage_config(lease_ms=3_000, margin_ms=1_000, drain_s=60)) as gateway,
        nothing_left(gateway),
    ):
        key, process = await gateway.key(), gateway.process
        assert process is not None
        async with streams(gateway, key, 1, 3_000, 10) as (stream,):
            await stream.flowing(20)
            process.send_signal(signal.SIGTERM)
            await until(lambda: b'"stopping"' in gateway.log.read_bytes())
            process.send_signal(signal.SIGTERM)
            began = time.monotonic()
            assert await asyncio.to_thread(process.wait, 60) == 0
            assert time.monotonic() - began < 20  # the drain would take a minute, the stream half of it
            await stream.ended()
        assert instance_pids(gateway) == set()
        gateway.start()
        balance = await gateway.idle(key)
        (row,) = await gateway.sessions(key, 1)
        assert 0 < row["charged"] == 1_000_000 - balance.available
        async with httpx2.AsyncClient(verify=False, base_url=gateway.url, headers=bearer(key), timeout=20) as client:
            assert (await client.post("/v1/chat/completions", json=ask(3, stream=False))).status_code == 200
        audited(gateway)


def test_a_port_that_somebody_else_has_is_one_readable_line_and_an_exit_code(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "gateway.cli", "serve", "--port", str(port), "--data-dir", str(tmp_path / "d")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode not in (0, 70)
    (line,) = (done.stdout + done.stderr).strip().splitlines()
    assert str(port) in line
    assert "in use" in line
    assert not (tmp_path / "d").exists()
