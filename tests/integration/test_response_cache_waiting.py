"""Clients of the response cache that no session watches, on a real socket: comments while they wait, and an end to
those that take what was kept for them too slowly."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from fractions import Fraction
from typing import Any, cast

import pytest
import uvicorn

from config.response_cache import ResponseCache as Policy
from config.settings import Bounds
from gateway.errors import sse_payload
from gateway.http_protocol import protocol
from metering.pricing import TokenUsage
from proxy.client_stream import COMMENT, DONE
from proxy.errors import OutOfCredit
from proxy.request import read_chat
from proxy.response_cache import CachedRoute, ResponseCache, Turn
from proxy.response_cache_entry import Kept
from proxy.response_cache_flights import Told
from proxy.response_cache_relay import CachedRelay
from proxy.response_cache_waiting import Unwatched
from proxy.threads import Threads
from storage.response_store import ResponseStore
from tests.support.gateway import LATE_S, until
from tests.support.redis_server import RedisServer
from tests.support.replicas import connected

BOUNDS = Bounds(commit_after_ms=200, keepalive_ms=100, client_write_ms=700, total_ms=60_000)
FRAME = b"x" * 1_000
FRAMES = 600
KEPT = Kept([b"{}"], b"", b"", TokenUsage(1, 1, 0, 1, 0), 0, 1)
App = Callable[[Any, Any, Any], Awaitable[None]]


class Server(uvicorn.Server):
    """uvicorn in this process, without its signal handlers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def serving(app: App) -> AsyncIterator[Any]:
    """The address of a server with the gateway's own protocol, whose kernel holds little for its clients."""
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8_192)
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        http = protocol(15_000, BOUNDS.client_write_ms, 15.0)
        options: Any = {"http": http, "ws": "none", "lifespan": "off", "log_config": None, "access_log": False}
        server = Server(uvicorn.Config(app, **options))
        task = asyncio.create_task(server.serve(sockets=[listening]))
        await until(lambda: server.started)
        try:
            yield listening.getsockname()
        finally:
            server.should_exit = True
            await task


@contextlib.asynccontextmanager
async def client(address: Any) -> AsyncIterator[socket.socket]:
    """A connected client that has asked, and holds little itself."""
    loop = asyncio.get_running_loop()
    with socket.socket() as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8_192)
        made.setblocking(False)
        await loop.sock_connect(made, address)
        await loop.sock_sendall(made, b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        yield made


async def read_to_the_end(made: socket.socket) -> bytes:
    data = b""
    async with asyncio.timeout(LATE_S):
        while part := await asyncio.get_running_loop().sock_recv(made, 65_536):
            data += part
    return data


class Replay:
    """An application that gives every client the same long stream, as a kept answer is given."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.given: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        connection = scope["state"]["connection"]
        stream = Unwatched(send, connection, list, self.bounds)
        for _ in range(FRAMES):
            while not stream.written([FRAME]):
                if not await stream.ready():
                    self.given.set_result("dropped" if connection.transport.is_closing() else "left")
                    return
        while not stream.finished([]) and await stream.ready():
            pass
        self.given.set_result("all")


async def dripped(app: Replay, size: int) -> int:
    """What a client has got that takes `size` bytes every 20 ms, when it was dropped or has all."""
    got = 0
    async with serving(app) as address, client(address) as made, asyncio.timeout(LATE_S):
        with contextlib.suppress(ConnectionError):
            while part := await asyncio.get_running_loop().sock_recv(made, size):
                got += len(part)
                await asyncio.sleep(0.02)  # the client's pace
    return got


async def test_who_takes_a_kept_answer_drop_by_drop_is_let_go_as_in_a_live_stream() -> None:
    app = Replay(BOUNDS)
    assert await dripped(app, 500) < FRAMES * len(FRAME) // 4  # 25 kB/s, where 48 kB must go within 0.7 s
    assert await app.given == "dropped"


async def test_a_client_that_takes_enough_in_time_is_given_all_of_a_kept_answer() -> None:
    app = Replay(BOUNDS)
    assert await dripped(app, 65_536) > FRAMES * len(FRAME)
    assert await app.given == "all"


async def test_a_kept_answer_is_not_given_for_longer_than_an_attempt_may_take() -> None:
    app = Replay(Bounds(client_write_ms=30_000, total_ms=300))
    assert await dripped(app, 8_192) < FRAMES * len(FRAME)
    assert await app.given == "dropped"


class Live:
    """What of the registry of live sessions a turn needs until it has a session."""

    def __init__(self) -> None:
        self.tasks: set[asyncio.Task[Any]] = set()

    def detach(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        return task


class Calls:
    """An application whose identical calls take turns: the first one holds its turn, the others wait for it."""

    def __init__(self, cache: ResponseCache, *, stream: bool = True) -> None:
        self.cache = cache
        self.first: Turn | None = None
        self.done = asyncio.Event()
        body = b'{"model":"kept","stream":%b,"messages":[{"role":"user","content":"Hi"}]}'
        self.request = read_chat(body % (b"true" if stream else b"false"), BOUNDS)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        turn = await self.cache.turn([], self.request, "a", None, (send, "req-1"))
        assert turn is not None
        connection = scope["state"]["connection"]
        await turn.begin(connection)
        if self.first is None:
            self.first = turn
            await self.done.wait()
            return
        error = OutOfCredit(metadata={"limit": "balance"})
        if not await turn.told(error):
            connection.respond(402, [(b"content-length", b"5")], b"alone")
        turn.close()

    def over(self, told: Told) -> None:
        """The first one's turn is over."""
        assert self.first is not None
        flight, self.first._flight = self.first._flight, None
        assert flight is not None
        self.cache.flights.over(flight, told)
        self.done.set()


@pytest.fixture
async def cache(server: RedisServer) -> AsyncIterator[ResponseCache]:
    live, threads = Live(), Threads()
    async with connected(server) as redis:
        await redis.call("FLUSHALL")
        routes = {"kept": CachedRoute("kept", Policy(), Fraction(0), b"s")}
        relays: Any = (None, None, CachedRelay(cast(Any, None), sse_payload))
        store = ResponseStore(redis, 64 * 1024 * 1024)
        yield ResponseCache(store, cast(Any, live), threads, routes, BOUNDS, relays)
        for task in live.tasks:
            task.cancel()
        await asyncio.gather(*live.tasks, return_exceptions=True)
    await threads.aclose()


@contextlib.asynccontextmanager
async def waiting(app: Calls) -> AsyncIterator[socket.socket]:
    """A client that waits for another one's answer."""
    async with serving(app) as address, client(address):
        await until(lambda: app.first is not None)
        try:
            async with client(address) as made:
                await until(lambda: app.cache.flights.waiting == 1)
                yield made
        finally:
            app.done.set()


async def test_a_stream_that_waits_for_anothers_answer_begins_and_hears_comments_in_time(cache: ResponseCache) -> None:
    app, loop = Calls(cache), asyncio.get_running_loop()
    async with waiting(app) as made:
        began = loop.time()
        data = b""
        while data.count(COMMENT) < 3:
            data += await asyncio.wait_for(loop.sock_recv(made, 65_536), LATE_S)
        assert loop.time() - began > 0.3  # 0.2 s to the first, and 0.1 s to each further one
        app.over(Told.ALONE)
        data += await read_to_the_end(made)
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0].startswith(b"HTTP/1.1 200")
    for line in (b"x-request-id: req-1", b"x-tollgate-cache: wait", b"x-tollgate-route: kept"):
        assert line in lines
    assert any(line.startswith(b"content-type: text/event-stream") for line in lines)
    assert DONE in body
    frame = body[body.index(b"data: ") + 6 : body.index(b"\n\ndata: [DONE]")]
    assert json.loads(frame)["error"]["code"] == "insufficient_quota"


@pytest.mark.parametrize("stream", [False, True])
async def test_who_need_not_wait_long_hears_no_comment_and_gets_a_status(cache: ResponseCache, stream: bool) -> None:
    app, loop = Calls(cache, stream=stream), asyncio.get_running_loop()
    async with waiting(app) as made:
        began = loop.time()
        if not stream:  # it never hears one, however long it waits
            await until(lambda: loop.time() > began + 0.4)
        app.over(Told.ALONE)
        data = await read_to_the_end(made)
    assert data.startswith(b"HTTP/1.1 402")
    assert data.endswith(b"\r\n\r\nalone")
    assert COMMENT not in data
