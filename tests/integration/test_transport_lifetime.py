"""How an exchange ends: cancellation, abort, release, time limits, failed connections, and no socket left behind."""

from __future__ import annotations

import asyncio
import os
import socket
import sys

import pytest

from proxy.transport import ConnectFailed, ExchangeAborted, Origin, UpstreamTimeout
from tests.support.rawserver import (
    CHUNKED,
    OK,
    Peer,
    RawServer,
    answers,
    both_loops,
    collect,
    post,
    transport_with,
    until,
    whole,
)

BURST = 5_000
"""Requests of the leak test; the long version is `python -m tests.integration.test_transport_lifetime 100000`."""


@both_loops
async def test_cancellation_closes_the_connection_at_once_in_the_head_and_body_phase() -> None:
    for response in (b"", CHUNKED + b"2\r\nab\r\n"):
        async with RawServer(answers(response)) as server, transport_with() as transport:
            exchange = transport.open(server.origin, post(server.origin))
            if response:
                await exchange.head()
                assert await exchange.read() == b"ab"
            waiting = asyncio.create_task(exchange.read() if response else whole(exchange))
            await asyncio.sleep(0)
            await until(lambda server=server: bool(server.requests))  # type: ignore[misc]
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            await asyncio.wait_for(server.peers[0].gone.wait(), 15)
            assert isinstance(exchange.error, ExchangeAborted)
            assert exchange.error.sent
            await until(lambda transport=transport: transport.counts().connections == 0)  # type: ignore[misc]


@both_loops
async def test_cancellation_while_connecting_leaves_no_socket() -> None:
    with _full_backlog() as origin:
        before = _fds()
        async with transport_with() as transport:
            exchange = transport.open(origin, post(origin))
            waiting = asyncio.create_task(exchange.head())
            await until(lambda: _fds() > before)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            await until(lambda: transport.counts().connections == 0)
            assert isinstance(exchange.error, ExchangeAborted)
            assert not exchange.error.sent


@both_loops
async def test_abort_is_synchronous_idempotent_and_wakes_the_reader_with_its_reason() -> None:
    async with RawServer(answers(CHUNKED + b"2\r\nab\r\n")) as server, transport_with() as transport:
        exchange = transport.open(server.origin, post(server.origin))
        await exchange.head()
        assert await exchange.read() == b"ab"
        waiting = asyncio.create_task(exchange.read())
        await asyncio.sleep(0)
        exchange.abort(RuntimeError("first"))
        exchange.abort(RuntimeError("second"))
        with pytest.raises(RuntimeError, match="first"):
            await waiting
        with pytest.raises(RuntimeError, match="first"):
            await exchange.head()
        await asyncio.wait_for(server.peers[0].gone.wait(), 15)


@both_loops
async def test_release_before_the_end_closes_and_after_the_end_keeps_the_connection() -> None:
    async with RawServer(answers(OK, CHUNKED)) as server, transport_with() as transport:
        first = transport.open(server.origin, post(server.origin))
        await whole(first)
        first.release()
        assert transport.counts().idle == 1
        second = transport.open(server.origin, post(server.origin))
        await second.head()
        second.release()
        second.release()
        with pytest.raises(ExchangeAborted):
            await second.read()
        await asyncio.wait_for(server.peers[0].gone.wait(), 15)
        assert len(server.peers) == 1


@both_loops
async def test_an_ended_exchange_cannot_touch_the_next_request_of_its_connection() -> None:
    async with RawServer(answers(OK, OK)) as server, transport_with() as transport:
        old = transport.open(server.origin, post(server.origin))
        await whole(old)
        new = transport.open(server.origin, post(server.origin))
        old.abort()
        old.pause()
        old.release()
        assert await whole(new) == b"ok"
        assert len(server.peers) == 1


@both_loops
async def test_the_head_time_limit_counts_until_the_headers_are_complete() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        while not peer.writer.is_closing():
            await peer.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            await asyncio.sleep(0.02)

    async with RawServer(script) as server, transport_with(head_ms=200) as transport:
        exchange = transport.open(server.origin, post(server.origin))
        with pytest.raises(UpstreamTimeout) as caught:
            await exchange.head()
        assert (caught.value.bound, caught.value.phase, caught.value.sent) == ("head", "head", True)


@both_loops
async def test_the_idle_time_limit_counts_the_gap_between_body_bytes() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED)
        for _ in range(20):
            await peer.send(b"2\r\nab\r\n")
            await asyncio.sleep(0.05)
        await peer.send(b"2;never-")
        while True:
            await peer.send(b"ending")
            await asyncio.sleep(0.02)

    async with RawServer(script) as server, transport_with(idle_ms=400) as transport:
        exchange = transport.open(server.origin, post(server.origin))
        received: list[bytes] = []
        with pytest.raises(UpstreamTimeout) as caught:
            await collect(exchange, received)
        assert b"".join(received) == b"ab" * 20
        assert (caught.value.bound, caught.value.phase) == ("idle", "body")


@both_loops
async def test_the_total_time_limit_ends_a_lively_stream() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED)
        while True:
            await peer.send(b"2\r\nab\r\n")
            await asyncio.sleep(0.01)

    async with RawServer(script) as server, transport_with() as transport:
        exchange = transport.open(server.origin, post(server.origin), transport.deadlines_with(total_ms=300))
        with pytest.raises(UpstreamTimeout) as caught:
            await whole(exchange)
        assert caught.value.bound == "total"
        await until(lambda: transport.counts().connections == 0)


@both_loops
async def test_the_connect_time_limit_is_enforced() -> None:
    with _full_backlog() as origin:
        async with transport_with(connect_ms=200) as transport:
            exchange = transport.open(origin, post(origin))
            with pytest.raises(UpstreamTimeout) as caught:
                await exchange.head()
            assert (caught.value.bound, caught.value.phase, caught.value.sent) == ("connect", "connect", False)


@both_loops
async def test_a_refused_connection_and_an_unknown_host_are_connect_failures() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        refused = Origin("http", "127.0.0.1", free.getsockname()[1])
    async with transport_with() as transport:
        for origin in (refused, Origin("http", "no-such-host.invalid", 80)):
            with pytest.raises(ConnectFailed) as caught:
                await transport.open(origin, post(origin)).head()
            assert (caught.value.phase, caught.value.sent) == ("connect", False)


@both_loops
async def test_more_connections_than_allowed_are_refused_and_not_queued() -> None:
    async with RawServer(answers(CHUNKED)) as server, transport_with(connections_max=2) as transport:
        held = [transport.open(server.origin, post(server.origin)) for _ in range(2)]
        with pytest.raises(ConnectFailed):
            await transport.open(server.origin, post(server.origin)).head()
        for exchange in held:
            await exchange.head()
            exchange.release()
        await until(lambda: transport.counts().connections == 0)
        await transport.open(server.origin, post(server.origin)).head()


@both_loops
async def test_closing_the_transport_ends_every_exchange_and_refuses_new_ones() -> None:
    async with RawServer(answers(OK, CHUNKED)) as server, transport_with() as transport:
        await whole(transport.open(server.origin, post(server.origin)))
        exchange = transport.open(server.origin, post(server.origin))
        await exchange.head()
        waiting = asyncio.create_task(exchange.read())
        await asyncio.sleep(0)
        await transport.aclose()
        with pytest.raises(ExchangeAborted):
            await waiting
        with pytest.raises(ExchangeAborted):
            await transport.open(server.origin, post(server.origin)).head()


async def burst(requests: int) -> None:
    """That many requests, 50 at a time, every tenth closed by one side: as many open files after as before."""

    async def script(peer: Peer) -> None:
        while True:
            request = await peer.request()
            if b"abort" in request:
                await peer.send(CHUNKED)
                await peer.until_gone()
                return
            await peer.send(OK if b"close" not in request else OK.replace(b"OK\r\n", b"OK\r\nconnection: close\r\n"))

    async def one(number: int) -> None:
        async with gate:
            kind = (b"abort", b"close")[number // 10 % 2] if number % 10 == 0 else b"keep"
            exchange = transport.open(server.origin, post(server.origin, kind))
            await exchange.head()
            if kind == b"abort":
                exchange.release()
            else:
                assert await whole(exchange) == b"ok"

    gate = asyncio.Semaphore(50)
    async with RawServer(script) as server:
        before = _fds()
        async with transport_with() as transport:
            for start in range(0, requests, 5_000):
                await asyncio.gather(*map(one, range(start, min(start + 5_000, requests))))
            assert len(server.requests) == requests
            assert transport.counts().active == 0
            assert transport.counts().connections <= 50 + 1
        await until(lambda: all(peer.writer.is_closing() for peer in server.peers))
        await until(lambda: _fds() <= before)


@both_loops
async def test_a_burst_of_requests_leaks_no_socket() -> None:
    await burst(BURST)


class _full_backlog:  # noqa: N801
    """A listener that accepts nobody and whose queue is full: connecting to it hangs."""

    def __enter__(self) -> Origin:
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(0)
        self.fillers = []
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(self.listener.getsockname())
            self.fillers.append(filler)
        return Origin("http", "127.0.0.1", self.listener.getsockname()[1])

    def __exit__(self, *_: object) -> None:
        for each in (*self.fillers, self.listener):
            each.close()


def _fds() -> int:
    return len(os.listdir("/proc/self/fd"))


if __name__ == "__main__":
    asyncio.run(burst(int(sys.argv[1])))
