"""Requests behind a running one on the same connection: they wait, within bounds, and hide nothing."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator

import psutil
import pytest

from proxy.ids import session_id
from tests.acceptance.test_raw_sockets import SMUGGLED
from tests.support.credit import logged, prompt, settled_once
from tests.support.gateway import Gateway, Key
from tests.support.raw_client import Lateness, ask, post, request_bytes
from tests.support.strict_client import connected

CANCEL_MS = 250
HEAD_S = 1.5  # client_header_ms of the acceptance configuration


@pytest.fixture
async def key(gateway: Gateway) -> AsyncIterator[Key]:
    """One slot, so that a leaked one shows."""
    async with gateway.connected():
        yield await gateway.key(parallel=1)


@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_a_request_behind_does_not_hide_that_the_client_left(gateway: Gateway, key: Key, how: str) -> None:
    fields = ask(f"[[tokens=100]][[interval_ms=30]]Answer {session_id()}.", max_tokens=100)
    async with post(gateway, key, fields) as call:
        await logged(gateway, fields)
        call.writer.write(SMUGGLED)
        await call.writer.drain()
        async with Lateness(gateway) as late:
            at_ms = call.leave(how)
            entry = await logged(gateway, fields, over=True)
        row = await settled_once(gateway, key)
    assert entry["aborted"]
    assert entry["ended_ms"] - at_ms <= CANCEL_MS + late.ms
    assert (row["outcome"], row["charged"]) == ("aborted", prompt(fields))


async def test_the_first_bytes_of_the_next_request_do_not_end_the_running_one(gateway: Gateway, key: Key) -> None:
    seconds = HEAD_S + 1.5
    fields = ask(f"[[tokens=60]][[interval_ms={int(seconds * 1000 / 60)}]]Answer {session_id()}.", stream=True)
    async with post(gateway, key, fields) as call:
        await call.head()
        await call.until_content(1)
        began = time.monotonic()
        call.writer.write(SMUGGLED[:5])
        frames = await call.rest()
        assert time.monotonic() - began > HEAD_S
        assert frames[-1].kind == "[DONE]"
        call.writer.write(SMUGGLED[5:])
        await call.head()
        assert (call.status, await call.body()) == (200, b'{"status":"ok"}')


async def test_endless_requests_without_a_key_take_no_memory(gateway: Gateway) -> None:
    (worker,) = gateway.children("gateway.worker")
    before = psutil.Process(worker).memory_info().rss
    flood = b"GET /v1/none HTTP/1.1\r\n\r\n" * 10_000
    sent, most = 0, 0
    for _ in range(8):
        with socket.create_connection(("127.0.0.1", gateway.port)) as client:
            client.settimeout(0.3)
            try:
                for _ in range(20):
                    sent += client.send(flood)
                    await asyncio.sleep(0)
            except OSError:
                pass
        most = max(most, psutil.Process(worker).memory_info().rss - before)
    assert sent > 1_000_000
    assert most < 24 * 1024 * 1024
    async with connected(gateway.port) as client:
        assert (await client.request("GET", "/health/live")).json() == {"status": "ok"}


async def test_a_few_requests_at_once_are_answered_in_order(gateway: Gateway) -> None:
    async with connected(gateway.port) as client:
        paths = ["/health/live", "/v1/none", "/health/live", "/v1/none", "/health/live"]
        await client.send(b"".join(b"GET %b HTTP/1.1\r\nhost: x\r\n\r\n" % path.encode() for path in paths))
        assert [(await client.answer()).status for _ in paths] == [200, 404, 200, 404, 200]


async def test_an_older_client_gets_a_stream_without_chunk_sizes(gateway: Gateway, key: Key) -> None:
    fields = ask("[[tokens=5]]Go on.", stream=True)
    raw = request_bytes(gateway, key, json.dumps(fields).encode()).replace(b"HTTP/1.1", b"HTTP/1.0", 1)
    async with connected(gateway.port) as client:
        await client.send(raw)
        head, _, body = (await client.rest()).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head
    assert b"connection: close" in head
    assert body.startswith(b"data: {")
    assert body.endswith(b"data: [DONE]\n\n")
