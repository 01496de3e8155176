"""A scripted TCP (or TLS) server for transport tests, and what runs such a test on both event loops.

A script is `async def script(peer)`, called once per connection; it says exactly which bytes go out, and when.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import re
import socket
import ssl
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from types import TracebackType
from typing import Any, Self

import pytest

from proxy.transport import Exchange, Origin, Transport, TransportLimits, build_request
from tests.support.loops import ClosingLoop

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
Script = Callable[["Peer"], Awaitable[None]]
_LENGTH = re.compile(rb"\r\ncontent-length: (\d+)\r\n")
TEST_SECONDS = 60


class Peer:
    """The server's side of one connection."""

    def __init__(self, server: RawServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.server, self.reader, self.writer = server, reader, writer
        self.number = len(server.peers)
        self.sent = 0
        self.gone = asyncio.Event()

    async def request(self) -> bytes:
        """Read one whole request. Raises IncompleteReadError when the client closes instead."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = _LENGTH.search(head)
        body = await self.reader.readexactly(int(length[1])) if length else b""
        self.server.requests.append(head + body)
        return head + body

    async def send(self, data: bytes) -> None:
        """Write and wait until the kernel has taken (nearly) all of it; `sent` counts what was accepted."""
        self.writer.write(data)
        await self.writer.drain()
        self.sent += len(data)

    async def until_gone(self) -> None:
        """Wait until the client has closed the connection."""
        try:
            while await self.reader.read(65536):
                pass
        except ConnectionError:
            pass
        self.gone.set()

    def close(self) -> None:
        """Close, once: Python 3.11's TLS transport forgets its protocol at a second close and cannot abort then."""
        if not self.writer.is_closing():
            self.writer.close()

    def reset(self) -> None:
        """Close with a TCP reset."""
        raw = self.writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.abort()

    def abort(self) -> None:
        """Drop the connection without a word; on one that is gone already nothing happens."""
        with contextlib.suppress(AttributeError):  # Python 3.11: asyncio itself may have closed it a second time
            self.writer.transport.abort()


class RawServer:
    """`async with RawServer(script) as server`: `origin`, `requests` (all bytes read), `peers` (connections so far)."""

    def __init__(self, script: Script, *, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1") -> None:
        self.script, self.tls, self.host = script, tls, host
        self.requests: list[bytes] = []
        self.peers: list[Peer] = []
        self.failures: list[AssertionError] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, self.host, 0, ssl=self.tls, backlog=1024)
        self.port: int = self._server.sockets[0].getsockname()[1]
        self.origin = Origin("https" if self.tls else "http", self.host, self.port)
        self.url = f"{self.origin.scheme}://{self.host}:{self.port}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for peer in self.peers:
            peer.abort()
        if error is None and self.failures:
            raise self.failures[0]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(self, reader, writer)
        self.peers.append(peer)
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self.script(peer)
        except (ConnectionError, asyncio.IncompleteReadError):
            peer.gone.set()
        except asyncio.CancelledError:
            pass  # the test is over
        except AssertionError as failure:
            self.failures.append(failure)
        finally:
            self._tasks.discard(task)
            peer.close()


def answers(*responses: bytes) -> Script:
    """A script that answers the requests of a connection in order, then waits for the client to close."""

    async def script(peer: Peer) -> None:
        for response in responses:
            await peer.request()
            await peer.send(response)
        await peer.until_gone()

    return script


def closes_after(*parts: bytes) -> Script:
    """A script that reads one request, sends the parts and closes."""

    async def script(peer: Peer) -> None:
        await peer.request()
        for part in parts:
            await peer.send(part)

    return script


async def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Poll until the condition holds; AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def transport_with(context: ssl.SSLContext | None = None, **limits: int | None) -> AsyncIterator[Transport]:
    """A transport with these limits; at the end it is closed and has to have let go of everything."""
    transport = Transport(TransportLimits(**limits), ssl_context=context)  # type: ignore[arg-type]
    try:
        yield transport
    finally:
        await transport.aclose()
        counts = transport.counts()
        assert (counts.active, counts.idle, counts.connections) == (0, 0, 0)


def post(origin: Origin, body: bytes = b"{}") -> bytes:
    """A POST with a body."""
    return build_request(b"POST", b"/v1/x", origin, [(b"authorization", b"Bearer k")], body)


async def collect(exchange: Exchange, into: list[bytes]) -> None:
    """Wait for the head, then read the body to its end; the parts land in `into` even when it fails half-way."""
    await exchange.head()
    while data := await exchange.read():
        into.append(data)


async def whole(exchange: Exchange) -> bytes:
    """The whole body; the exchange is released."""
    parts: list[bytes] = []
    await collect(exchange, parts)
    exchange.release()
    return b"".join(parts)


def both_loops(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test on asyncio's own loop and on uvloop."""

    @functools.wraps(test)
    def run(loop_name: str, **fixtures: Any) -> None:
        factory = ClosingLoop if loop_name == "uvloop" else asyncio.new_event_loop

        async def bounded() -> None:
            async with asyncio.timeout(TEST_SECONDS):
                await test(**fixtures)

        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(bounded())

    signature = inspect.signature(test)
    extra = inspect.Parameter("loop_name", inspect.Parameter.KEYWORD_ONLY)
    vars(run)["__signature__"] = signature.replace(parameters=[*signature.parameters.values(), extra])
    del vars(run)["__wrapped__"]
    mark: Callable[[Callable[..., None]], Callable[..., None]] = pytest.mark.parametrize(
        "loop_name", ["asyncio", "uvloop"]
    )
    return mark(run)
