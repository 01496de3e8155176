"""A scripted HTTP/2 server over TLS or plain TCP, on the h2 library. A script is called once per stream."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Self

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings

Script = Callable[["H2Stream"], Awaitable[None]]


class H2Stream:
    """The server's side of one request. `sent` counts body bytes that left; `gone` is set when the client left."""

    def __init__(self, peer: H2Peer, number: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.peer, self.number = peer, number
        self.headers = headers
        self.target = dict(headers)[b":path"]
        self.body = b""
        self.sent = 0
        self.arrived = asyncio.Event()
        self.gone = asyncio.Event()
        self.reset_code: int | None = None
        self.window = asyncio.Event()

    async def head(self, status: int = 200, kind: bytes = b"text/event-stream") -> None:
        headers = [(b":status", str(status).encode()), (b"content-type", kind)]
        self._do(lambda state: state.send_headers(self.number, headers))

    async def data(self, data: bytes) -> None:
        """Send as the client's window allows."""
        state = self.peer.state
        while data:
            if self.gone.is_set():
                raise ConnectionResetError
            self.window.clear()
            room = min(state.local_flow_control_window(self.number), state.max_outbound_frame_size)
            if room <= 0:
                await self.window.wait()
                continue
            part, data = data[:room], data[room:]
            state.send_data(self.number, part)
            self.peer.flush()
            self.sent += len(part)
            await asyncio.sleep(0)

    async def end(self) -> None:
        self._do(lambda state: state.end_stream(self.number))

    async def cut(self) -> None:
        self._do(lambda state: state.reset_stream(self.number, h2.errors.ErrorCodes.INTERNAL_ERROR))

    async def garbage(self) -> None:
        """A DATA frame on the stream 0, which no peer may send."""
        self.peer.write(b"\0\0\1\0\0\0\0\0\0x")

    def _do(self, act: Callable[[h2.connection.H2Connection], None]) -> None:
        if self.gone.is_set():
            raise ConnectionResetError
        act(self.peer.state)
        self.peer.flush()


class H2Peer(asyncio.Protocol):
    """The server's side of one connection."""

    def __init__(self, server: H2Server) -> None:
        self.server = server
        self.streams: dict[int, H2Stream] = {}
        self.state = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding=None))
        self.gone = asyncio.Event()
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.server.peers.append(self)
        self.state.local_settings = h2.settings.Settings(
            client=False,
            initial_values={h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: self.server.streams_max},
        )
        self.state.initiate_connection()
        self.flush()

    def data_received(self, data: bytes) -> None:
        for event in self.state.receive_data(data):
            self._event(event)
        self.flush()

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self.gone.set()
        for stream in self.streams.values():
            stream.gone.set()
            stream.window.set()

    def _event(self, event: Any) -> None:
        if isinstance(event, h2.events.RequestReceived):
            stream = self.streams[event.stream_id] = H2Stream(self, event.stream_id, list(event.headers or []))
            self.server.streams.append(stream)
            self.server.begin(stream)
        elif isinstance(event, h2.events.DataReceived):
            self.streams[event.stream_id].body += event.data or b""
            self.state.acknowledge_received_data(event.flow_controlled_length or 0, event.stream_id)
        elif isinstance(event, h2.events.StreamEnded):
            self.streams[event.stream_id].arrived.set()
        elif isinstance(event, h2.events.StreamReset):
            stream = self.streams[event.stream_id]
            stream.reset_code = int(event.error_code or 0)
            stream.gone.set()
            stream.window.set()
        elif isinstance(event, h2.events.WindowUpdated | h2.events.RemoteSettingsChanged):
            for stream in self.streams.values():
                stream.window.set()

    def flush(self) -> None:
        self.write(self.state.data_to_send())

    def write(self, data: bytes) -> None:
        if self.transport is not None and data:
            self.transport.write(data)

    def goaway(self, last: int, *, close: bool = False) -> None:
        """Say which stream is the last one served; `close` drops the connection after it. (h2's own would stop it.)"""
        self.write(b"\0\0\x08\x07\0\0\0\0\0" + last.to_bytes(4, "big") + b"\0\0\0\0")
        if close and self.transport is not None:
            self.transport.close()


class H2Server:
    """`async with H2Server(script) as server`: `port`, `peers` (connections so far), `streams` (requests so far)."""

    def __init__(
        self, script: Script, *, tls: ssl.SSLContext | None = None, streams_max: int = 100, port: int = 0
    ) -> None:
        self.port = port
        self.script, self.tls, self.streams_max = script, tls, streams_max
        self.peers: list[H2Peer] = []
        self.streams: list[H2Stream] = []
        self.failures: list[BaseException] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: H2Peer(self), "127.0.0.1", self.port, ssl=self.tls, backlog=1024
        )
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for peer in self.peers:
            if peer.transport is not None:
                peer.transport.abort()
        if error is None and self.failures:
            raise self.failures[0]

    def begin(self, stream: H2Stream) -> None:
        task = asyncio.get_running_loop().create_task(self._run(stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, stream: H2Stream) -> None:
        try:
            await stream.arrived.wait()
            await self.script(stream)
        except (ConnectionError, h2.exceptions.StreamClosedError):
            pass
        except AssertionError as failure:
            self.failures.append(failure)
