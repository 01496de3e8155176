"""The upstream transport against upstreams that break the rules: bad bytes, early ends, dying idle connections."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from proxy.transport import Origin, Transport, UpstreamClosed, UpstreamProtocolError, build_request
from tests.support.rawserver import (
    CHUNKED,
    OK,
    Peer,
    RawServer,
    answers,
    both_loops,
    closes_after,
    collect,
    post,
    transport_with,
    until,
    whole,
)

START = b"HTTP/1.1 200 OK\r\n"


MALFORMED = {
    "not http": b"<html>502</html>\r\n\r\n",
    "another protocol": b"RTSP/1.0 200 OK\r\n\r\n",
    "ssh banner": b"SSH-2.0-OpenSSH_9.6\r\n",
    "a request": b"GET / HTTP/1.1\r\n\r\n",
    "http 0.9": b"HTTP/0.9 200 OK\r\ncontent-length: 0\r\n\r\n",
    "http 2": b"HTTP/2.0 200 OK\r\ncontent-length: 0\r\n\r\n",
    "unknown version": b"HTTP/1.7 200 OK\r\ncontent-length: 0\r\n\r\n",
    "status of two digits": b"HTTP/1.1 99 Odd\r\ncontent-length: 0\r\n\r\n",
    "status below 100": b"HTTP/1.1 042 Odd\r\ncontent-length: 0\r\n\r\n",
    "status above 599": b"HTTP/1.1 799 Odd\r\ncontent-length: 0\r\n\r\n",
    "status of letters": b"HTTP/1.1 OK 200\r\ncontent-length: 0\r\n\r\n",
    "upgrade": b"HTTP/1.1 101 Switching\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
    "upgrade without headers": b"HTTP/1.1 101 Switching\r\n\r\n",
    "bare line feeds": b"HTTP/1.1 200 OK\ncontent-length: 0\n\n",
    "folded header": START + b"x: a\r\n b\r\ncontent-length: 0\r\n\r\n",
    "space before colon": START + b"content-length : 0\r\n\r\n",
    "empty header name": START + b": x\r\ncontent-length: 0\r\n\r\n",
    "nul in a value": START + b"x: a\0b\r\ncontent-length: 0\r\n\r\n",
    "return in a value": START + b"x: a\rb\r\ncontent-length: 0\r\n\r\n",
    "two lengths": START + b"content-length: 2\r\ncontent-length: 3\r\n\r\nok",
    "list of lengths": START + b"content-length: 2, 2\r\n\r\nok",
    "signed length": START + b"content-length: +2\r\n\r\nok",
    "huge length": START + b"content-length: 99999999999999999999999\r\n\r\n",
    "length and chunked": START + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked and length": START + b"transfer-encoding: chunked\r\ncontent-length: 2\r\n\r\n0\r\n\r\n",
    "chunked twice": START + b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "compressed transfer": START + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "unknown transfer": START + b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunked in http 1.0": b"HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunk size of letters": CHUNKED + b"xyz\r\nok\r\n0\r\n\r\n",
    "negative chunk size": CHUNKED + b"-2\r\nok\r\n0\r\n\r\n",
    "chunk size overflow": CHUNKED + b"F" * 17 + b"\r\nok",
    "chunk longer than its size": CHUNKED + b"2\r\nokay\r\n0\r\n\r\n",
    "chunk size with a bare line feed": CHUNKED + b"2\nok\r\n0\r\n\r\n",
    "space after the chunk size": CHUNKED + b"2 \r\nok\r\n0\r\n\r\n",
    "one header too large": START + b"x: " + b"a" * 70_000 + b"\r\ncontent-length: 0\r\n\r\n",
    "many headers too large": START + b"x-name: value\r\n" * 5_000 + b"content-length: 0\r\n\r\n",
    "endless headers": START + b"x-name: value\r\n" * 20_000,
    "endless header": START + b"x: " + b"a" * 300_000,
    "endless informational answers": b"HTTP/1.1 103 Hints\r\nlink: </x>\r\n\r\n" * 5_000,
    "endless blank lines": b"\r\n" * 100_000,
    "trailers too large": CHUNKED + b"0\r\n" + b"x-name: value\r\n" * 5_000 + b"\r\n",
    "endless chunk extension": CHUNKED + b"2;" + b"a" * 300_000,
}


@pytest.mark.parametrize("at_once", [True, False], ids=["one write", "pieces"])
@pytest.mark.parametrize("name", MALFORMED)
@both_loops
async def test_a_malformed_response_is_a_protocol_error_and_closes_the_connection(name: str, at_once: bool) -> None:
    data = MALFORMED[name]
    size = len(data) if at_once else max(1, len(data) // 40)

    async def script(peer: Peer) -> None:
        await peer.request()
        for at in range(0, len(data), size):
            await peer.send(data[at : at + size])
            await asyncio.sleep(0)
        await peer.until_gone()

    async with RawServer(script) as server, transport_with(head_ms=5_000, idle_ms=5_000) as transport:
        exchange = transport.open(server.origin, post(server.origin))
        with pytest.raises(UpstreamProtocolError) as caught:
            await whole(exchange)
        assert caught.value.sent
        assert not exchange.complete
        await asyncio.wait_for(server.peers[0].gone.wait(), 15)


TRUNCATED = {
    "no byte": ([], b"", "head"),
    "half a status line": ([b"HTTP/1."], b"", "head"),
    "half a head": ([START + b"content-le"], b"", "head"),
    "only an informational answer": ([b"HTTP/1.1 100 Continue\r\n\r\n"], b"", "head"),
    "half a content-length body": ([START + b"content-length: 10\r\n\r\nhello"], b"hello", "body"),
    "half a chunk": ([CHUNKED + b"a\r\nhello"], b"hello", "body"),
    "no last chunk": ([CHUNKED, b"5\r\nhello\r\n"], b"hello", "body"),
    "half a last chunk": ([CHUNKED, b"5\r\nhello\r\n", b"0\r\n"], b"hello", "body"),
}


@pytest.mark.parametrize("name", TRUNCATED)
@both_loops
async def test_a_truncated_response_gives_its_bytes_and_then_fails(name: str) -> None:
    parts, expected, phase = TRUNCATED[name]
    async with RawServer(closes_after(*parts)) as server, transport_with() as transport:
        exchange = transport.open(server.origin, post(server.origin))
        received: list[bytes] = []
        with pytest.raises(UpstreamClosed) as caught:
            await collect(exchange, received)
        assert (b"".join(received), caught.value.phase, caught.value.sent) == (expected, phase, True)
        assert not exchange.complete


@both_loops
async def test_a_reset_truncates_even_a_close_delimited_body() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(START + b"\r\nhello")
        await peer.reader.read(1)

    async with RawServer(script) as server, transport_with() as transport:
        exchange = transport.open(server.origin, post(server.origin))
        assert await exchange.read() == b"hello"
        server.peers[0].reset()
        with pytest.raises(UpstreamClosed):
            await exchange.read()


@pytest.mark.parametrize("extra", [b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil", b"HT", b"garbage"])
@both_loops
async def test_bytes_after_a_response_never_become_the_next_one(extra: bytes) -> None:
    async with RawServer(answers(OK + extra, OK)) as server, transport_with() as transport:
        for _ in range(2):
            assert await whole(transport.open(server.origin, post(server.origin))) == b"ok"
        assert len(server.peers) == 2


@both_loops
async def test_a_body_after_the_answer_to_head_is_not_read_and_the_connection_not_reused() -> None:
    async with RawServer(answers(OK)) as server, transport_with() as transport:
        exchange = transport.open(server.origin, build_request(b"HEAD", b"/", server.origin, [], b""))
        assert await whole(exchange) == b""
        assert transport.counts().idle == 0


@both_loops
async def test_unexpected_bytes_on_an_idle_connection_close_it() -> None:
    async with RawServer(answers(OK)) as server, transport_with() as transport:
        await whole(transport.open(server.origin, post(server.origin)))
        await server.peers[0].send(OK)
        await until(lambda: transport.counts().connections == 0)
        await asyncio.wait_for(server.peers[0].gone.wait(), 15)


@both_loops
async def test_an_idle_connection_that_the_upstream_closes_leaves_the_pool() -> None:
    async with RawServer(answers(OK)) as server, transport_with() as transport:
        await whole(transport.open(server.origin, post(server.origin)))
        server.peers[0].close()
        await until(lambda: transport.counts().connections == 0)
        assert transport.counts().idle == 0


@both_loops
async def test_an_answer_before_the_request_is_written_is_read_but_the_connection_not_reused() -> None:
    async def script(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        await peer.send(b"HTTP/1.1 413 Too Large\r\ncontent-length: 3\r\n\r\nbig")
        await peer.reader.read(1)
        await asyncio.Event().wait()

    async with RawServer(script) as server, transport_with() as transport:
        exchange = transport.open(server.origin, post(server.origin, b"x" * 32 * 1024 * 1024))
        assert await whole(exchange) == b"big"
        assert exchange.status == 413
        assert transport.counts().idle == 0


class _BlockingUpstream:
    """A plain listening socket driven synchronously, so that nothing of the client's loop runs between two acts."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.listener.settimeout(20)
        self.origin = Origin("http", "127.0.0.1", self.listener.getsockname()[1])
        self.peers: list[socket.socket] = []

    def serve_one(self) -> None:
        """Accept a connection, or use the newest, read one small request and answer it."""
        peer, _ = self.listener.accept()
        self.peers.append(peer)
        self.answer(peer)

    def answer(self, peer: socket.socket) -> None:
        received = b""
        while not received.endswith(b"\r\n\r\n{}"):
            received += peer.recv(65536)
        peer.sendall(OK)


@contextmanager
def blocking_upstream() -> Iterator[_BlockingUpstream]:
    upstream = _BlockingUpstream()
    try:
        yield upstream
    finally:
        for each in (upstream.listener, *upstream.peers):
            each.close()


async def _first(upstream: _BlockingUpstream, transport: Transport) -> None:
    """One answered exchange; its connection is idle now."""
    serving = threading.Thread(target=upstream.serve_one, daemon=True)
    serving.start()
    assert await whole(transport.open(upstream.origin, post(upstream.origin))) == b"ok"
    serving.join()
    assert transport.counts().idle == 1


def _end(peer: socket.socket, how: str) -> None:
    if how == "unexpected bytes":
        peer.sendall(b"x")
        return
    if how == "reset":
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


@pytest.mark.parametrize("end", ["closed", "reset", "unexpected bytes"])
@both_loops
async def test_a_connection_that_died_before_the_request_is_written_is_replaced(end: str) -> None:
    """The loop has not seen the end yet: no await stands between it and the next open()."""
    with blocking_upstream() as upstream:
        async with transport_with() as transport:
            await _first(upstream, transport)
            peer = upstream.peers[0]
            _end(peer, end)
            serving = threading.Thread(target=upstream.serve_one, daemon=True)
            exchange = transport.open(upstream.origin, post(upstream.origin))
            assert not exchange.sent
            serving.start()
            assert await whole(exchange) == b"ok"
            serving.join()


@both_loops
async def test_a_reused_connection_that_dies_after_the_request_was_written_is_not_repeated() -> None:
    """The upstream may have processed it: a completion is never bought twice in silence."""
    with blocking_upstream() as upstream:
        async with transport_with() as transport:
            await _first(upstream, transport)
            exchange = transport.open(upstream.origin, post(upstream.origin))
            waiting = asyncio.create_task(exchange.head())
            received = await asyncio.to_thread(upstream.peers[0].recv, 65536)
            assert received.endswith(b"{}")
            upstream.peers[0].close()
            with pytest.raises(UpstreamClosed) as caught:
                await waiting
            assert (caught.value.sent, caught.value.phase) == (True, "head")
            upstream.listener.setblocking(False)
            with pytest.raises(BlockingIOError):
                upstream.listener.accept()


@both_loops
async def test_an_answer_that_is_faster_than_the_loop_keeps_its_new_connection() -> None:
    """The response can be whole before the task that made the connection has run on: that must not close it."""
    with blocking_upstream() as upstream:
        async with transport_with() as transport:
            exchange = transport.open(upstream.origin, post(upstream.origin))
            upstream.listener.setblocking(False)
            while not upstream.peers:
                await asyncio.sleep(0)
                with suppress(BlockingIOError):
                    upstream.peers.append(upstream.listener.accept()[0])
            upstream.peers[0].sendall(OK)
            assert await whole(exchange) == b"ok"
            for _ in range(20):
                await asyncio.sleep(0)
            assert transport.counts().idle == 1
            exchange = transport.open(upstream.origin, post(upstream.origin))
            upstream.peers[0].sendall(OK)
            assert await whole(exchange) == b"ok"
            assert len(upstream.peers) == 1


@both_loops
async def test_a_keep_alive_race_never_sends_a_request_twice_nor_loses_an_answer() -> None:
    """The upstream closes idle connections at random moments while requests go on."""
    seen: dict[bytes, int] = {}

    async def script(peer: Peer) -> None:
        for served in range(1, 1_000):
            request = await peer.request()
            seen[request] = seen.get(request, 0) + 1
            await peer.send(OK)
            if (served + peer.number) % 3 == 0:
                return

    async with RawServer(script) as server, transport_with() as transport:
        answered = closed = 0
        for number in range(300):
            try:
                assert await whole(transport.open(server.origin, post(server.origin, b"%d" % number))) == b"ok"
                answered += 1
            except UpstreamClosed as error:
                closed += error.sent and error.phase == "head"
        assert answered + closed == 300
        assert answered >= 250
        assert len(seen) >= answered
        assert set(seen.values()) == {1}


@both_loops
async def test_a_thousand_cancelled_exchanges_never_mix_answers() -> None:
    async def script(peer: Peer) -> None:
        while True:
            tag = (await peer.request()).rpartition(b"\r\n\r\n")[2]
            await peer.send(START + b"content-length: %d\r\n\r\n%b" % (len(tag) * 2, tag))
            await asyncio.sleep(0)
            await peer.send(tag)

    async with RawServer(script) as server, transport_with() as transport:

        async def one(number: int) -> None:
            tag = b"<%d>" % number
            exchange = transport.open(server.origin, post(server.origin, tag))
            task = asyncio.create_task(whole(exchange))
            for _ in range(number % 7):
                await asyncio.sleep(0)
            if number % 2:
                task.cancel()
            try:
                assert await task == tag * 2
            except asyncio.CancelledError:
                assert number % 2
            finally:
                exchange.release()

        for batch in range(0, 1_000, 100):
            await asyncio.gather(*map(one, range(batch, batch + 100)))
        assert transport.counts().active == 0
