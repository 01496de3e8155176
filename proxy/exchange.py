"""One request and its response on one upstream connection: parsing, backpressure, deadlines, ending.

Must not: choose or pool connections (that is `transport`), know providers, or buffer more than its bound.

Ownership: a `Connection` serves one `Exchange` at a time and lets go of it the moment the response is complete, failed
or aborted. A caller who keeps an old `Exchange` can therefore never reach another request's bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from proxy.connection import Connection, Home
from proxy.http_parser import PARSE_ERRORS, ResponseReader, describe, starts_response
from proxy.transport_errors import (
    Bound,
    ExchangeAborted,
    Phase,
    TransportError,
    UpstreamClosed,
    UpstreamProtocolError,
    UpstreamTimeout,
)

if TYPE_CHECKING:
    from asyncio import Transport as Socket


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds: until connected, until the response's head, between body bytes, for everything; inf is none."""

    connect: float
    head: float
    idle: float
    total: float


def _closed(data: bytes) -> None:
    """Stands for the parser of an ended exchange: whatever still arrives is not read."""


class Exchange:
    """A request on its way. Made by `Transport.open`; end it with `release()` (or `abort()`), always.

    `status` (0 before the head) and `headers` (lower-cased names) are the final response's. `complete`: the whole body
    has arrived (part of it may wait in `chunks`). `error`: why it never will. Set `on_data` to be called instead of
    awaiting `read()`: after bytes, completion or an error; errors always come in a later turn of the loop. Take bytes
    with `take()`, not out of `chunks`: that is what lets a full buffer read on.
    """

    __slots__ = (
        "_aborted", "_buffer_max", "_buffered", "_clock", "_connection", "_deadlines", "_held", "_last", "_loop",
        "_parse", "_phase", "_quiet", "_reader", "_request", "_started", "_total_due", "_waiter", "chunks", "complete",
        "connecting", "due", "error", "headers", "home", "on_data", "sent", "status",
    )  # fmt: skip

    def __init__(self, home: Home, request: bytes, deadlines: Deadlines, loop: asyncio.AbstractEventLoop) -> None:
        self.home = home
        self._clock = home.clock
        self._loop = loop
        self._request = request
        self._deadlines = deadlines
        self._reader = reader = ResponseReader(home.head_bytes_max, head_only=request.startswith(b"HEAD "))
        self._parse: Callable[[bytes], None] = reader.parse
        self.chunks = reader.chunks
        self.headers = reader.headers
        self.status = 0
        self.complete = self.sent = self._aborted = self._held = self._started = False
        self.error: Exception | None = None
        self.on_data: Callable[[Exchange], None] | None = None
        self.connecting: asyncio.Task[None] | None = None
        self._connection: Connection | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._phase: Phase = "connect"
        self._buffer_max = home.buffer_max
        self._buffered = self._quiet = 0
        self._last = self._clock.now
        self._total_due = self._clock.now + deadlines.total
        self.due = min(self._clock.now + deadlines.connect, self._total_due)

    # -- reader side -------------------------------------------------------------------------------------------------

    async def head(self) -> None:
        """Wait for the final response's status and headers. Raises TransportError, or what abort() was given."""
        while not self.status or self._aborted:
            if self.error is not None:
                raise self.error
            await self._wait()

    async def read(self) -> bytes:
        """All body bytes that arrived since the last call; b"" at the end of a complete body.

        Raises TransportError (UpstreamClosed for a truncated body) after the bytes that came before the failure.
        """
        while not self.chunks:
            if self.error is not None:
                raise self.error
            if self.complete:
                return b""
            await self._wait()
        return self.take()

    def take(self) -> bytes:
        """The bytes at hand, joined (b"" when there are none), without waiting; a full buffer reads on."""
        chunks = self.chunks
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        chunks.clear()
        full = self._buffered > self._buffer_max
        self._buffered = 0
        if full and not self._held:
            self._read_on()
        return data

    def pause(self) -> None:
        """Stop reading from the upstream (its sends will block); a paused exchange is not idle."""
        self._held = True
        if self._connection is not None:
            self._connection.pause()

    def resume(self) -> None:
        """Undo pause()."""
        self._held = False
        if self._buffered <= self._buffer_max:
            self._read_on()

    def abort(self, error: Exception | None = None) -> None:
        """End it now, from anywhere: the socket is closed at once, a waiting head() or read() raises `error`."""
        if self._aborted:
            return
        self._aborted = True
        self.complete = False
        self.chunks.clear()
        if self.error is None:
            self.fail(error or self.because(ExchangeAborted, "the exchange was aborted"))

    def release(self) -> None:
        """The caller is done: an incomplete exchange is closed at once (a complete one gave its connection back)."""
        self.on_data = None
        if not self.complete:
            self.abort(
                None if self.error else self.because(ExchangeAborted, "the exchange was released before its end")
            )

    async def _wait(self) -> None:
        if self._waiter is not None:
            raise RuntimeError("one reader at a time")
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        except asyncio.CancelledError:
            self.abort()
            raise
        finally:
            self._waiter = None

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None:
            if not waiter.done():
                waiter.set_result(None)
        elif self.on_data is not None:
            self.on_data(self)

    def _read_on(self) -> None:
        if self._connection is not None and self._connection.paused:
            self._last = self._loop.time()
            self._connection.resume()

    # -- connection side ---------------------------------------------------------------------------------------------

    def begin(self, connection: Connection) -> None:
        """Write the request: the only time that happens."""
        self._connection = connection
        self.connecting = None  # its task may not have ended yet, and must not be cancelled any more
        connection.exchange = self
        self._phase = "head"
        self.due = min(self._clock.now + self._deadlines.head, self._total_due)
        transport: Socket = connection.transport  # type: ignore[assignment]  # it has just been made, or is fresh
        transport.write(self._request)
        self.sent = True
        self._request = b""
        if self._held:
            connection.pause()

    def feed(self, data: bytes) -> None:
        """Bytes from the upstream."""
        if not self._started and not self._start(data):
            return
        try:
            self._parse(data)
        except PARSE_ERRORS as error:
            if not self._reader.complete:
                self.fail(self.because(UpstreamProtocolError, describe(error)))
                return
            self._reader.clean = False  # the response was whole; what follows it is not ours to read
        if self._phase != "body" and self._reader.status:
            self._head_arrived()
        if self.chunks:
            self._quiet = 0
            self._last = self._clock.now
            self._buffered += len(data)
            if self._buffered > self._buffer_max and self._connection is not None:
                self._connection.pause()
        else:
            self._quiet += len(data)
            if self._quiet > self.home.head_bytes_max and not self._reader.complete:
                self.fail(self.because(UpstreamProtocolError, "too many bytes without a body"))
                return
        if self._reader.complete:
            self._finish()
        if self.status:
            self._wake()

    def lost(self, error: Exception | None, *, eof: bool) -> None:
        """The connection ended before the response was complete by a length or a last chunk."""
        self._connection = None
        ended = error is None and (eof or not self.home.tls)  # TLS: an end without close_notify may be an attacker's
        if self._reader.until_close and self.status and ended:
            self._finish()
            self._wake()
        else:
            text = f"the upstream closed the connection before the end of the response's {self._phase}"
            self.fail(self.because(UpstreamClosed, text))

    def fail(self, error: Exception) -> None:
        """Record the error, close the socket, tell the reader."""
        if self.complete or self.error is not None:
            return
        self.error = error
        self._leave()
        waiter = self._waiter
        if waiter is not None:
            if not waiter.done():
                waiter.set_result(None)
        elif self.on_data is not None:
            self._loop.call_soon(self._tell)

    def expire(self, now: float) -> None:
        """`due` has passed (loop time `now`): fail by the limit that was reached, or set the next `due`."""
        limits, phase = self._deadlines, self._phase
        if now >= self._total_due:
            self._time_out("total")
        elif phase == "connect":
            self._time_out("connect")
        elif phase == "head":
            self._time_out("head")
        elif self._connection is not None and self._connection.paused:
            self.due = min(now + limits.idle, self._total_due)
        elif now >= self._last + limits.idle:
            self._time_out("idle")
        else:
            self.due = min(self._last + limits.idle, self._total_due)

    def _start(self, data: bytes) -> bool:
        """The first bytes of the response."""
        self._started = True
        if starts_response(data):
            return True
        self.fail(self.because(UpstreamProtocolError, "this is not HTTP"))
        return False

    def _head_arrived(self) -> None:
        self._phase = "body"
        self.status = self._reader.status
        self._last = self._clock.now
        self.due = min(self._last + self._deadlines.idle, self._total_due)

    def _finish(self) -> None:
        """The response is whole: give the connection back when both sides left it clean, else close it."""
        reader, connection = self._reader, self._connection
        if reader.head_only and self.chunks:
            self.chunks.clear()
            reader.clean = False
        self.complete = True
        if connection is not None and reader.clean and reader.keep_alive and connection.drained():
            connection.exchange = self._connection = None
            connection.resume()
            self._leave()
            self.home.keep(connection)
        else:
            self._leave()

    def _leave(self) -> None:
        """Cut every tie to the connection and the parser (whose callbacks would make a reference cycle)."""
        connection, self._connection = self._connection, None
        self.home.ended(self)
        if connection is not None:
            connection.drop()
        elif self.connecting is not None:
            self.connecting.cancel()
        self.connecting = None
        self._request = b""
        self._reader.close()
        self._parse = _closed

    def _tell(self) -> None:
        if self.on_data is not None:
            self.on_data(self)

    def _time_out(self, bound: Bound) -> None:
        text = f"the upstream reached the {bound} time limit"
        self.fail(UpstreamTimeout(text, sent=self.sent, phase=self._phase, bound=bound))

    @property
    def connect_seconds(self) -> float:
        return self._deadlines.connect

    def because(self, kind: type[TransportError], message: str) -> TransportError:
        """An error of this exchange as it stands."""
        return kind(message, sent=self.sent, phase=self._phase)
