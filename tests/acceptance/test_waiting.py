"""Waiting on either side: a client that stops reading is let go, a client of a slow provider is kept with comments."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator

import psutil
import pytest

from loadtests.simulated_provider.text import count
from tests.support.credit import GRANTED, held, logged, prompt, settled_once, unique
from tests.support.gateway import LATE_S, Gateway, Key, until
from tests.support.raw_client import COMMENT, DONE, Lateness, ask, connected_from, post, request_bytes

LATE_EMPTY = "sim-slow-headers+empty:ms.1200"
MODELS = (LATE_EMPTY,)
UNREADABLE = 150_000
"""Tokens of a stream that the kernel's buffers cannot take off the gateway's hands: 46 MB on the wire, and Linux lets a
socket have 32 MB that nobody has read."""
PROVIDERS = """
[routes.late-fallback]
candidates = [{ provider = "sim", model = "sim-stall:after=0" }, { provider = "sim", model = "gpt-4o-mini" }]

[prices.late-fallback]
input = "1"
output = "1"
"""


@pytest.fixture
async def key(gateway: Gateway) -> AsyncIterator[Key]:
    """One slot, so that a leaked one shows."""
    async with gateway.connected():
        yield await gateway.key(GRANTED, parallel=1)


# -- Clients that stop reading ----------------------------------------------------------------------------------------


def resident(gateway: Gateway) -> int:
    """Bytes of memory of all this instance's Python processes but the simulated provider."""
    assert gateway.process is not None
    total = 0
    for process in psutil.Process(gateway.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # a server's own child may end while we look
            if "gateway" in " ".join(process.cmdline()):
                total += process.memory_info().rss
    return total


async def test_a_client_that_stops_reading_is_let_go_and_pays_for_what_was_read(gateway: Gateway, key: Key) -> None:
    fields = unique(f"[[tokens={UNREADABLE}]]")
    loop = asyncio.get_running_loop()
    before = resident(gateway)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        client.setblocking(False)
        await loop.sock_connect(client, ("127.0.0.1", gateway.port))
        began = time.monotonic()
        await loop.sock_sendall(client, request_bytes(gateway, key, json.dumps(fields).encode()))
        async with gateway.stores() as stores:
            await held(stores, key)
            grown = 0
            while (await stores.ledger.balance(key.account)).sessions:
                grown = max(grown, resident(gateway) - before)
                assert time.monotonic() - began < LATE_S
        lasted = time.monotonic() - began
        entry = await logged(gateway, fields, over=True)
        row = await settled_once(gateway, key)
        read = await _drained(client)
    assert 1.4 <= lasted <= 10
    assert grown < 16 * 1024 * 1024
    assert entry["aborted"]
    assert entry["served_tokens"] < UNREADABLE
    assert (row["outcome"], row["metadata"]["ending"]) == ("aborted", "client_stalled")
    delivered = count("".join(read))
    assert prompt(fields) + delivered <= row["charged"] <= prompt(fields) + entry["served_tokens"]


async def test_a_whole_answer_that_nobody_reads_does_not_stay_in_memory(gateway: Gateway) -> None:
    key = await gateway.key(4 * GRANTED, parallel=1)
    fields = ask("[[tokens=16384]]Go on.", n=72)  # 4.5 MB: more than the kernel's buffers take off the gateway's hands
    loop = asyncio.get_running_loop()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        client.setblocking(False)
        await loop.sock_connect(client, ("127.0.0.1", gateway.port))
        await loop.sock_sendall(client, request_bytes(gateway, key, json.dumps(fields).encode()))
        ours = client.getsockname()[1]
        await until(lambda: connected_from(gateway, ours))
        await gateway.sessions(key, 1)
        await until(lambda: not connected_from(gateway, ours), 10)


async def _drained(client: socket.socket) -> list[str]:
    """The content in what the kernel still has for this client."""
    loop, data = asyncio.get_running_loop(), b""
    while True:
        try:
            part = await loop.sock_recv(client, 1 << 16)
        except ConnectionError:
            break
        if not part:
            break
        data += part
    frames = [line for line in data.split(b"\n") if line.startswith(b"data: {") and line.endswith(b"}")]
    found = [json.loads(frame[6:]) for frame in frames]
    return [choice["delta"].get("content") or "" for frame in found for choice in frame["choices"]]


# -- Comments while a provider is slow --------------------------------------------------------------------------------

COMMIT_S, KEEPALIVE_S, TICK_S = 0.6, 0.4, 0.1


async def test_a_slow_provider_is_bridged_with_comments(gateway: Gateway, key: Key) -> None:
    fields = unique(model="sim-slow-headers")
    async with Lateness(gateway) as late:
        began = time.monotonic()
        async with post(gateway, key, fields) as call:
            await call.head()
            committed = time.monotonic() - began
            frames = await call.rest()
    slack = 2 * TICK_S + late.ms / 1000
    assert call.status == 200
    assert COMMIT_S - 0.01 <= committed <= COMMIT_S + slack
    # Who answers was not known when the headers went out.
    assert "x-tollgate-provider" not in call.headers
    assert call.headers["x-tollgate-session"]
    comments = [frame for frame in frames if frame.kind == COMMENT]
    assert frames[: len(comments)] == comments
    assert comments[0].at - began <= committed + slack
    assert len(comments) >= 3
    gaps = [later.at - sooner.at for sooner, later in zip(comments, frames[1:], strict=False)]
    assert max(gaps) <= KEEPALIVE_S + slack
    assert min(gaps[:-1]) >= KEEPALIVE_S - slack
    assert frames[-1].kind == DONE
    bill = frames[-2].data["x_tollgate"]
    assert (bill["provider"], bill["attempts"]) == ("sim", 1)
    row = await settled_once(gateway, key)
    assert row["charged"] == prompt(fields) + count(call.text)


async def test_pauses_between_chunks_are_bridged_too(gateway: Gateway, key: Key) -> None:
    fields = unique("[[tokens=3]][[interval_ms=1200]]")
    async with post(gateway, key, fields) as call:
        await call.head()
        frames = await call.rest()
    kinds = "".join("." if frame.kind == COMMENT else "c" if frame.content else "" for frame in frames)
    assert kinds.lstrip(".").startswith("c..c..c"), kinds
    assert (await settled_once(gateway, key))["charged"] == prompt(fields) + 3


@pytest.mark.parametrize(
    ("steer", "model", "code"),
    [
        ("[[ttft_ms=9000]]", "gpt-4o-mini", "upstream_timeout"),
        ("[[ttft_ms=1200]]", "sim-error-frame", None),
        ("[[ttft_ms=1200]]", "sim-500", None),
        ("", LATE_EMPTY, "upstream_truncated"),
    ],
)
async def test_a_failure_after_the_commit_is_told_in_the_stream(
    gateway: Gateway, key: Key, steer: str, model: str, code: str | None
) -> None:
    fields = unique(steer, model=model)
    async with post(gateway, key, fields) as call:
        await call.head()
        assert call.status == 200
        frames = await call.rest()
    assert frames[0].kind == COMMENT
    assert frames[-1].kind == DONE
    errors = [frame.data["error"] for frame in frames if "error" in frame.data]
    assert frames[-2].data == {"error": errors[0]}
    assert len(errors) == 1
    assert set(errors[0]) == {"message", "type", "param", "code"}
    assert (errors[0]["type"], errors[0]["code"]) == ("server_error", code)
    row = await settled_once(gateway, key)
    if call.text:
        assert row["charged"] == prompt(fields) + count(call.text)
    else:
        assert (row["charged"], row["outcome"]) == (0, "void")


async def test_after_the_commit_another_candidate_may_still_answer(gateway: Gateway, key: Key) -> None:
    fields = unique(model="late-fallback")
    async with post(gateway, key, fields) as call:
        await call.head()
        assert "x-tollgate-attempts" not in call.headers
        frames = await call.rest()
    assert frames[0].kind == COMMENT
    assert not any("error" in frame.data for frame in frames)
    assert frames[-2].data["x_tollgate"]["attempts"] == 2
    row = await settled_once(gateway, key)
    assert (row["charged"], row["outcome"]) == (prompt(fields) + count(call.text), "completed")
    assert [each["outcome"] for each in row["metadata"]["attempts"]] == ["stall", "completed"]
