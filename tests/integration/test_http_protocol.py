"""What the server does to clients that take nothing, on a real socket with the shortest of times."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import uvicorn

from gateway.http_protocol import BoundedProtocol, protocol
from tests.support.gateway import until

PIECE = 20_000


class Server(uvicorn.Server):
    """uvicorn in this process, without its signal handlers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def piece(scope: Any, receive: Any, send: Any) -> None:
    """Answer with some bytes."""
    headers = [(b"content-length", b"%d" % PIECE)]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"x" * PIECE})


@pytest.fixture
async def listening() -> AsyncIterator[tuple[socket.socket, list[BoundedProtocol]]]:
    """The server's socket and its connections: 0.3 s for a head, 0.5 s to take what waits, 1 s to ask again."""
    made: list[BoundedProtocol] = []

    class Watched(protocol(300, 500, 1.0)):  # type: ignore[misc]
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            made.append(self)

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        options: Any = {"http": Watched, "ws": "none", "lifespan": "off", "log_config": None, "access_log": False}
        server = Server(uvicorn.Config(piece, **options))
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        await until(lambda: server.started)
        yield listening, made
        server.should_exit = True
        await serving


async def test_an_idle_client_that_never_takes_its_answer_is_dropped(
    listening: tuple[socket.socket, list[BoundedProtocol]],
) -> None:
    server, made = listening
    loop = asyncio.get_running_loop()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2_048)
        client.setblocking(False)
        await loop.sock_connect(client, server.getsockname())
        waiting = 0
        while not waiting:  # until the kernel takes no more; far less than what pauses a writer
            answered = made[0].server_state.total_requests if made else 0
            await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            await until(lambda known=answered: made and made[0].server_state.total_requests > known, every=0.001)
            waiting = made[0].transport.get_write_buffer_size()
        assert waiting <= PIECE + 1_000
        assert not made[0].flow.write_paused
        await until(lambda: made[0] not in made[0].connections)


async def test_an_idle_client_is_let_go_after_its_time(
    listening: tuple[socket.socket, list[BoundedProtocol]],
) -> None:
    reader, writer = await asyncio.open_connection(*listening[0].getsockname())
    loop = asyncio.get_running_loop()
    writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    await reader.readexactly(PIECE)
    answered = loop.time()
    await asyncio.wait_for(reader.read(), 10)
    assert loop.time() - answered > 0.9  # not the time for a head: none had begun
    writer.close()
    await writer.wait_closed()
