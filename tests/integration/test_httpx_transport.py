"""The same transport through httpx2's client: answers, errors and time limits as httpx2 names them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx2
import pytest

from proxy.httpx_transport import PooledTransport
from proxy.transport import Transport, TransportLimits
from tests.support.rawserver import Peer, RawServer, answers, both_loops, closes_after, until

OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 11\r\n\r\n" + b'{"ok":true}'
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


@asynccontextmanager
async def client_over(**limits: int) -> AsyncIterator[tuple[httpx2.AsyncClient, Transport]]:
    transport = Transport(TransportLimits(**limits))
    async with httpx2.AsyncClient(transport=PooledTransport(transport)) as client:
        yield client, transport
    assert transport.counts().connections == 0


@both_loops
async def test_requests_and_answers_pass_through_and_share_a_connection() -> None:
    async with RawServer(answers(OK, OK, OK)) as server, client_over() as (client, transport):
        answer = await client.post(f"{server.url}/v1/x?a=1", json={"b": 2}, headers={"authorization": "Bearer k"})
        assert (answer.status_code, answer.json()) == (200, {"ok": True})
        assert (await client.get(server.url)).json() == {"ok": True}

        async def parts() -> AsyncIterator[bytes]:
            yield b"one"
            yield b"two"

        await client.post(server.url, content=parts())
        first, second, third = server.requests
        assert first.startswith(b"POST /v1/x?a=1 HTTP/1.1\r\n")
        assert first.endswith(b'\r\n\r\n{"b":2}')
        assert first.lower().count(b"\r\nhost:") == 1
        assert second.startswith(b"GET / HTTP/1.1\r\n")
        assert b"content-length: 6\r\n\r\nonetwo" in third
        assert b"transfer-encoding" not in third.lower()
        assert len(server.peers) == 1
        assert transport.counts().idle == 1


@both_loops
async def test_a_stream_left_early_closes_its_connection() -> None:
    async with RawServer(answers(CHUNKED + b"2\r\nab\r\n")) as server, client_over() as (client, _):
        async with client.stream("POST", server.url) as answer:
            async for part in answer.aiter_raw():
                assert part == b"ab"
                break
        await asyncio.wait_for(server.peers[0].gone.wait(), 15)


@both_loops
async def test_failures_have_httpx_names() -> None:
    async with client_over() as (client, _):
        async with RawServer(closes_after()) as server:
            refused = server.url
            with pytest.raises(httpx2.RemoteProtocolError):
                await client.get(server.url)
        with pytest.raises(httpx2.ConnectError):
            await client.get(refused)
        async with RawServer(closes_after(b"rubbish\r\n")) as server:
            with pytest.raises(httpx2.RemoteProtocolError):
                await client.get(server.url)
        async with RawServer(closes_after(CHUNKED + b"2\r\nab\r\n")) as server:
            with pytest.raises(httpx2.RemoteProtocolError) as caught:
                await client.get(server.url)
            assert caught.value.request.method == "GET"
        with pytest.raises(httpx2.UnsupportedProtocol):
            await client.get("ftp://127.0.0.1/")
        with pytest.raises(httpx2.LocalProtocolError):
            await client.get("http://127.0.0.1:1/", headers={"x": "a\r\nevil: 1"})


@both_loops
async def test_the_requests_own_read_timeout_is_honoured() -> None:
    async with RawServer(answers(b"")) as server, client_over() as (client, _):
        with pytest.raises(httpx2.ReadTimeout):
            await client.get(server.url, timeout=0.2)
    async with RawServer(answers(CHUNKED + b"2\r\nab\r\n")) as server, client_over() as (client, _):
        with pytest.raises(httpx2.ReadTimeout):
            await client.get(server.url, timeout=httpx2.Timeout(None, read=0.2))


@both_loops
async def test_cancelling_a_request_closes_its_connection() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.until_gone()

    async with RawServer(script) as server, client_over() as (client, transport):
        waiting = asyncio.create_task(client.get(server.url))
        await until(lambda: bool(server.requests))
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await asyncio.wait_for(server.peers[0].gone.wait(), 15)
        assert transport.counts().active == 0


@both_loops
async def test_proxy_settings_of_the_environment_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "")
    async with RawServer(answers(OK)) as server:
        transport = PooledTransport(Transport(TransportLimits()))
        async with httpx2.AsyncClient(transport=transport, trust_env=False) as client:
            assert (await client.get(server.url)).status_code == 200
