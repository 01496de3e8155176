"""The upstream transport against a scripted server: framings, reuse, backpressure, callbacks."""

from __future__ import annotations

import asyncio
import os
import socket

import pytest

from proxy.transport import Exchange, UpstreamClosed, build_request
from tests.support.rawserver import (
    CHUNKED,
    OK,
    Peer,
    RawServer,
    answers,
    both_loops,
    closes_after,
    post,
    transport_with,
    until,
    whole,
)

FRAMINGS = {
    "content-length": ([b"HTTP/1.1 200 OK\r\ncontent-length: 11\r\n\r\nhello", b" world"], b"hello world", False),
    "empty": ([b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"], b"", False),
    "chunked": ([CHUNKED + b"5\r\nhello\r\n6", b"\r\n world\r\n0\r\n", b"\r\n"], b"hello world", False),
    "chunk extension and trailer": ([CHUNKED + b"5;a=b\r\nhello\r\n0\r\nx-sum: 1\r\n\r\n"], b"hello", False),
    "close-delimited": ([b"HTTP/1.1 200 OK\r\n\r\nhello", b" world"], b"hello world", True),
    "close-delimited and empty": ([b"HTTP/1.1 200 OK\r\n\r\n"], b"", True),
    "http 1.0": ([b"HTTP/1.0 200 OK\r\n\r\nhello"], b"hello", True),
    "content-length and close": ([b"HTTP/1.1 200 OK\r\nConnection: close\r\ncontent-length: 2\r\n\r\nok"], b"ok", True),
    "204": ([b"HTTP/1.1 204 No Content\r\n\r\n"], b"", False),
    "304 with a length": ([b"HTTP/1.1 304 Not Modified\r\ncontent-length: 99\r\n\r\n"], b"", False),
    "1xx first": (
        [b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n", OK],
        b"ok",
        False,
    ),
    "byte by byte": ([bytes([byte]) for byte in CHUNKED + b"2\r\nok\r\n0\r\n\r\n"], b"ok", False),
}


@pytest.mark.parametrize("name", FRAMINGS)
@both_loops
async def test_every_body_framing_is_read_to_its_end(name: str) -> None:
    parts, expected, closes = FRAMINGS[name]

    async def script(peer: Peer) -> None:
        await peer.request()
        for part in parts:
            await peer.send(part)
            await asyncio.sleep(0)
        if not closes:
            await peer.until_gone()

    async with RawServer(script) as server, transport_with() as transport:
        exchange = transport.open(server.origin, post(server.origin))
        assert await whole(exchange) == expected
        assert exchange.complete
        assert b"link" not in dict(exchange.headers)
        await until(lambda: transport.counts().connections == (0 if closes else 1))
        assert transport.counts().idle == (0 if closes else 1)


@both_loops
async def test_the_answer_to_head_ends_with_its_headers_and_the_connection_is_reused() -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n"
    async with RawServer(answers(head, OK)) as server, transport_with() as transport:
        exchange = transport.open(server.origin, build_request(b"HEAD", b"/", server.origin, [], b""))
        assert await whole(exchange) == b""
        assert dict(exchange.headers)[b"content-length"] == b"500"
        assert await whole(transport.open(server.origin, post(server.origin))) == b"ok"
        assert len(server.peers) == 1


@both_loops
async def test_the_request_reaches_the_upstream_byte_for_byte() -> None:
    async with RawServer(answers(OK)) as server, transport_with() as transport:
        request = post(server.origin, b"x" * 3_000_000)
        assert await whole(transport.open(server.origin, request)) == b"ok"
        assert server.requests == [request]


@both_loops
async def test_header_names_come_in_lower_case_and_values_untouched() -> None:
    raw = (
        b"HTTP/1.1 429 Too Many\r\nRetry-After: 7\r\nX-Name: a  B\r\nset-cookie: 1\r\nset-cookie: 2\r\n"
        b"content-length: 0\r\n\r\n"
    )
    async with RawServer(answers(raw)) as server, transport_with() as transport:
        exchange = transport.open(server.origin, post(server.origin))
        await exchange.head()
        assert exchange.status == 429
        assert exchange.headers == [
            (b"retry-after", b"7"),
            (b"x-name", b"a  B"),
            (b"set-cookie", b"1"),
            (b"set-cookie", b"2"),
            (b"content-length", b"0"),
        ]


@both_loops
async def test_the_warmest_idle_connection_is_reused_and_the_oldest_dropped_beyond_the_bound() -> None:
    async with RawServer(answers(OK, OK, OK)) as server, transport_with(idle_connections_max=2) as transport:
        exchanges = [transport.open(server.origin, post(server.origin)) for _ in range(3)]
        for exchange in exchanges:
            assert await whole(exchange) == b"ok"
        await until(lambda: transport.counts().connections == 2)
        assert transport.counts().idle == 2
        for _ in range(2):
            assert await whole(transport.open(server.origin, post(server.origin))) == b"ok"
        assert len(server.peers) == 3
        await until(lambda: sum(peer.gone.is_set() for peer in server.peers) == 1)


@both_loops
async def test_an_idle_connection_is_closed_after_its_keep_alive_time() -> None:
    async with RawServer(answers(OK)) as server, transport_with(keepalive_ms=150) as transport:
        assert await whole(transport.open(server.origin, post(server.origin))) == b"ok"
        assert transport.counts().idle == 1
        await until(lambda: transport.counts().connections == 0)
        await asyncio.wait_for(server.peers[0].gone.wait(), 15)


@both_loops
async def test_connection_close_is_respected() -> None:
    closing = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok"
    async with RawServer(answers(closing)) as server, transport_with() as transport:
        for _ in range(2):
            assert await whole(transport.open(server.origin, post(server.origin))) == b"ok"
        assert len(server.peers) == 2


@both_loops
async def test_a_slow_reader_stops_the_upstream_and_loses_nothing() -> None:
    total, piece = 64 * 1024 * 1024, b"x" * 65536

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % total)
        for _ in range(total // len(piece)):
            await peer.send(piece)
        await peer.until_gone()

    async with RawServer(script) as server, transport_with(idle_ms=200) as transport:
        exchange = transport.open(server.origin, post(server.origin))
        await exchange.head()
        sent, same = -1, 0
        while same < 50:  # longer than the idle time: a reader that holds back is not an idle upstream
            await asyncio.sleep(0.01)
            same = same + 1 if server.peers[0].sent == sent else 0
            sent = server.peers[0].sent
        assert sent < total // 2
        waiting = sum(map(len, exchange.chunks))
        assert 256 * 1024 < waiting <= 2 * 256 * 1024 + 65536
        read = 0
        while data := await exchange.read():
            read += len(data)
        assert read == total
        exchange.release()
        assert transport.counts().idle == 1


@both_loops
async def test_a_connection_that_was_held_back_at_the_end_reads_again_when_reused() -> None:
    long = b"HTTP/1.1 200 OK\r\ncontent-length: 8000\r\n\r\n" + b"x" * 8000
    async with RawServer(answers(long, OK)) as server, transport_with(read_buffer_max=1024) as transport:
        exchange = transport.open(server.origin, post(server.origin))
        await exchange.head()
        assert await whole(exchange) == b"x" * 8000
        assert await whole(transport.open(server.origin, post(server.origin))) == b"ok"
        assert len(server.peers) == 1


@both_loops
async def test_pause_stops_the_upstream_and_resume_goes_on() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED + b"2\r\nab\r\n")
        await peer.reader.read(1)

    async with RawServer(script) as server, transport_with(idle_ms=250) as transport:
        exchange = transport.open(server.origin, post(server.origin))
        await exchange.head()
        assert await exchange.read() == b"ab"
        exchange.pause()
        server.peers[0].writer.write(b"2\r\ncd\r\n0\r\n\r\n")
        await server.peers[0].writer.drain()
        for _ in range(50):
            await asyncio.sleep(0.01)
            assert not exchange.chunks
            assert exchange.error is None
        exchange.resume()
        assert await exchange.read() == b"cd"
        assert await exchange.read() == b""


@both_loops
async def test_a_callback_takes_bytes_completion_and_errors_instead_of_a_reader() -> None:
    async with (
        RawServer(closes_after(CHUNKED, b"2\r\nab\r\n", b"2\r\ncd\r\n")) as server,
        transport_with() as transport,
    ):
        exchange = transport.open(server.origin, post(server.origin))
        await exchange.head()
        seen: list[bytes | Exception] = []

        def on_data(which: Exchange) -> None:
            seen.append(which.take())
            if which.error is not None:
                seen.append(which.error)

        exchange.on_data = on_data
        on_data(exchange)
        await until(lambda: exchange.error is not None and seen[-1] is exchange.error)
        assert b"".join(part for part in seen if isinstance(part, bytes)) == b"abcd"
        assert isinstance(seen[-1], UpstreamClosed)


@both_loops
async def test_a_callback_learns_of_an_abort_in_a_later_turn() -> None:
    async with RawServer(answers(CHUNKED)) as server, transport_with() as transport:
        exchange = transport.open(server.origin, post(server.origin))
        await exchange.head()
        seen: list[Exception | None] = []
        exchange.on_data = lambda which: seen.append(which.error)
        reason = RuntimeError("the lease is lost")
        exchange.abort(reason)
        assert seen == []
        await until(lambda: bool(seen))
        assert seen == [reason]
        exchange.release()


@both_loops
async def test_nagle_is_off() -> None:
    async with RawServer(answers(CHUNKED)) as server, transport_with() as transport:
        exchange = transport.open(server.origin, post(server.origin))
        await exchange.head()
        found = [number for number in _sockets_to(server.port) if _option(number)]
        assert len(found) == 1


def _sockets_to(port: int) -> list[int]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            copy = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue
        with copy:
            try:
                if copy.family == socket.AF_INET and copy.getpeername()[1] == port:
                    found.append(int(name))
            except OSError:
                continue
    return found


def _option(number: int) -> int:
    with socket.socket(fileno=os.dup(number)) as copy:
        return copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
