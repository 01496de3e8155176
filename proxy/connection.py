"""A socket to an upstream as the event loop drives it: who is served, paused, still alive.

Must not: parse, pool or time anything.
"""

from __future__ import annotations

import asyncio
import select
import ssl
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from asyncio import Transport as Socket

    from proxy.exchange import Exchange

_DIRTY = select.POLLIN | getattr(select, "POLLRDHUP", 0)


class Clock(Protocol):
    """A coarse clock: loop time in seconds, moved on by the sweep, so that a chunk costs no system call for it."""

    now: float


class Home(Protocol):
    """What an exchange needs of its pool."""

    @property
    def clock(self) -> Clock: ...

    tls: bool
    buffer_max: int
    head_bytes_max: int

    def ended(self, exchange: Exchange) -> None:
        """No deadline of this exchange counts any more."""

    def keep(self, connection: Connection) -> None:
        """The connection is free and clean: hold it for the next request."""

    def opened(self, connection: Connection) -> None: ...

    def lost(self, connection: Connection) -> None: ...


class Connection(asyncio.Protocol):
    """A socket (plain or TLS) to an origin."""

    __slots__ = ("_poll", "eof", "exchange", "home", "idle_since", "paused", "transport")

    def __init__(self, home: Home, exchange: Exchange) -> None:
        self.home = home
        self.exchange: Exchange | None = exchange
        self.transport: Socket | None = None
        self.idle_since = 0.0
        self.eof = self.paused = False
        self._poll: select.poll | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        socket: Socket = transport  # type: ignore[assignment]  # a stream's, and no cast: this is on the way of calls
        exchange = self.exchange
        if exchange is None or exchange.error is not None:
            # Given up while connecting. Not counted as open: when the connecting task is cancelled as well, uvloop
            # closes the socket without ever calling connection_lost.
            self.exchange = None
            socket.abort()
            return
        self.transport = socket
        self.home.opened(self)
        exchange.begin(self)

    def data_received(self, data: bytes) -> None:
        exchange = self.exchange
        if exchange is not None:
            exchange.feed(data)
        else:
            self.drop()

    def eof_received(self) -> None:
        """The upstream ended its side; over TLS only a close_notify counts (asyncio reports a bare TCP end too)."""
        tls = self.transport.get_extra_info("ssl_object") if self.transport is not None else None
        self.eof = tls is None or _notified(tls)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.transport is None:
            return
        self.transport = None
        exchange, self.exchange = self.exchange, None
        self.home.lost(self)
        if exchange is not None:
            exchange.lost(exc, eof=self.eof)

    def drop(self) -> None:
        """Close the socket at once; what is unsent or unread is lost."""
        self.exchange = None
        if self.transport is not None:
            self.transport.abort()

    def pause(self) -> None:
        if not self.paused and self.transport is not None and not self.transport.is_closing():
            self.paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        if self.paused and self.transport is not None and not self.transport.is_closing():
            self.paused = False
            self.transport.resume_reading()

    def fresh(self) -> bool:
        """Asks the kernel whether the idle socket has seen EOF, an error or bytes since the loop last read it."""
        transport = self.transport
        if transport is None or self.eof or transport.is_closing():
            return False
        poll = self._poll
        if poll is None:
            socket = transport.get_extra_info("socket")
            if socket is None:  # uvloop has closed it behind our back
                return False
            poll = self._poll = select.poll()
            poll.register(socket.fileno(), _DIRTY)
        return not poll.poll(0)

    def drained(self) -> bool:
        """Whether the request has left us whole (an upstream may answer before it has read everything)."""
        transport = self.transport
        return transport is not None and not transport.is_closing() and transport.get_write_buffer_size() == 0


def _notified(tls: ssl.SSLObject) -> bool:
    """Whether the peer's close_notify was read: then there is an end to read, else OpenSSL would wait for more."""
    try:
        return tls.read(1) == b""
    except ssl.SSLZeroReturnError:
        return True
    except ssl.SSLError:
        return False
