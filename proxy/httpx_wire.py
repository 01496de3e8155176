"""A socket to a provider or its proxy as httpx2's engine (httpcore2) reads and writes it.

Must not: be imported before a provider needs it; parse, pool or time anything.

Two things differ from the engine's own: a write is handed to the socket before anything is awaited, so that cancelling
one request never tears a frame of another on a shared connection; and an end of TLS without close_notify is no end.
"""

from __future__ import annotations

import asyncio
import select
import ssl
from collections import deque
from typing import Any

import httpcore2

HANDSHAKE_SECONDS = 3600.0
"""Nobody waits so long: the exchange's own deadline comes first."""
_DIRTY = select.POLLIN | getattr(select, "POLLRDHUP", 0)


class Wire(httpcore2.AsyncNetworkStream, asyncio.Protocol):
    """One connection. `ended`: the socket is gone; `told`: and its reader has learned so."""

    def __init__(self, buffer_max: int) -> None:
        """`buffer_max` in bytes: with more waiting for the reader, the socket is not read."""
        self.ended = self.told = False
        self._buffer_max = buffer_max
        self._chunks: deque[bytes] = deque()
        self._buffered = 0
        self._clean = self._paused = False
        self._reader: asyncio.Future[None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._transport: asyncio.Transport | None = None

    async def connect(self, host: str, port: int, context: ssl.SSLContext | None) -> None:
        """Raises OSError or UnicodeError."""
        await asyncio.get_running_loop().create_connection(
            lambda: self, host, port, ssl=context, ssl_handshake_timeout=HANDSHAKE_SECONDS if context else None
        )

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> Wire:
        """TLS from here on. Raises OSError."""
        if self._transport is None:
            raise ConnectionError("the connection was closed")
        self._transport = await asyncio.get_running_loop().start_tls(
            self._transport,
            self,
            ssl_context,
            server_hostname=server_hostname,
            ssl_handshake_timeout=HANDSHAKE_SECONDS,
        )
        if self._transport is None:
            raise ConnectionError("the connection was closed in the TLS handshake")
        return self

    # -- the engine's side -------------------------------------------------------------------------------------------

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Bytes as they came, b"" at the end. Raises ReadError."""
        while not self._chunks:
            if self.ended:
                self.told = True
                if self._clean:
                    return b""
                raise httpcore2.ReadError("the connection was lost")
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        data = self._chunks.popleft()
        if len(data) > max_bytes:
            self._chunks.appendleft(data[max_bytes:])
            data = data[:max_bytes]
        self._buffered -= len(data)
        if self._paused and self._buffered <= self._buffer_max and self._transport is not None:
            self._paused = False
            if not self._transport.is_closing():
                self._transport.resume_reading()
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Raises WriteError."""
        if not buffer:
            return
        self.send(buffer)
        await self._writable.wait()
        if self.ended:
            raise httpcore2.WriteError("the connection was lost")

    def send(self, data: bytes) -> None:
        """Write without waiting; on a lost connection nothing happens."""
        if data and self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    async def aclose(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()

    def get_extra_info(self, info: str) -> Any:
        """`is_readable`: whether an idle connection is of no use any more."""
        if info == "is_readable":
            return not self.fresh()
        return self._transport.get_extra_info(info) if self._transport is not None else None

    @property
    def pending(self) -> bool:
        """Whether there are bytes that nobody has read."""
        return bool(self._chunks)

    @property
    def protocol(self) -> str | None:
        """What TLS agreed on, "h2" or "http/1.1"."""
        tls = self.get_extra_info("ssl_object")
        return tls.selected_alpn_protocol() if tls is not None else None

    def fresh(self) -> bool:
        """Asks the kernel whether the idle socket has seen EOF, an error or bytes since the loop last read it."""
        transport = self._transport
        if transport is None or self._chunks or transport.is_closing():
            return False
        socket = transport.get_extra_info("socket")
        if socket is None:
            return False
        poll = select.poll()
        poll.register(socket.fileno(), _DIRTY)
        return not poll.poll(0)

    # -- the loop's side ---------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # a stream's

    def data_received(self, data: bytes) -> None:
        self._chunks.append(data)
        self._buffered += len(data)
        if self._buffered > self._buffer_max and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> None:
        tls = self.get_extra_info("ssl_object")
        self._clean = tls is None or _notified(tls)

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended = True
        self._transport = None
        self._writable.set()
        self._wake()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


def _notified(tls: ssl.SSLObject) -> bool:
    """Whether the peer's close_notify was read."""
    try:
        return tls.read(1) == b""
    except ssl.SSLZeroReturnError:
        return True
    except ssl.SSLError:
        return False
