"""A request and its response through httpx2's engine (httpcore2): for providers with HTTP/2 or a proxy.

Must not: be imported before a provider needs it; choose a provider; write a request twice.

It is an `Exchange` to its readers. What the loop does there in callbacks a task does here: it asks the pool, reads part
after part, and stops reading while more than the bound waits for the reader. Ending the exchange cancels the task,
which closes the connection (HTTP/1.1) or resets the stream (HTTP/2).
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, cast

import h2.events
import h2.exceptions
import httpcore2

from config.proxy_url import ProxyAddress
from providers.codec import UpstreamRequest
from proxy.connection import Home
from proxy.exchange import Deadlines, Exchange
from proxy.http_request import Origin
from proxy.httpx_links import LinkPool, Way
from proxy.httpx_wire import Wire
from proxy.transport import TICK, TransportLimits
from proxy.transport_errors import (
    ConnectFailed,
    ExchangeAborted,
    TransportError,
    UpstreamClosed,
    UpstreamProtocolError,
)

_FAULTS = (
    httpcore2.ProtocolError,
    httpcore2.NetworkError,
    httpcore2.ProxyError,
    httpcore2.ConnectionNotAvailable,
    h2.exceptions.ProtocolError,
    ValueError,  # a status that is no number
)
_LOST = (httpcore2.NetworkError, httpcore2.LocalProtocolError)
"""The last: the upstream ended the stream while we were writing to it."""
_SENDING = frozenset(("http11.send_request_headers.started", "http2.send_request_headers.started"))
CLOSE_SECONDS = 5.0
"""How long aclose() waits for the tasks to end (it takes a few turns)."""


@dataclass(slots=True)
class _Clock:
    now: float = 0.0


class HttpxPool:
    """The connections to one provider. Opens exchanges; one per event loop; close with `aclose()`."""

    def __init__(
        self,
        origin: Origin,
        limits: TransportLimits,
        *,
        http2: bool = False,
        proxy: ProxyAddress | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        """`ssl_context`: other trust than the system's; its protocols (ALPN) are set here."""
        context = ssl_context or _context()
        context.set_alpn_protocols(["h2", "http/1.1"] if http2 else ["http/1.1"])
        way = Way(http2, proxy, context, limits.keepalive_ms / 1000, limits.read_buffer_max)
        self.clock = _Clock()
        self.tls = origin.scheme == "https"
        self.buffer_max = limits.read_buffer_max
        self.head_bytes_max = limits.header_bytes_max
        self.active: set[HttpxExchange] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self.closed = False
        self.links = LinkPool(way, limits.connections_max, limits.idle_connections_max)
        self.way_text = f"{origin.host}:{origin.port}" + (" through the proxy" if proxy is not None else "")
        self._origin = origin
        self._host = origin.host.encode("ascii")
        self._scheme = origin.scheme.encode("ascii")

    def open(self, out: UpstreamRequest, deadlines: Deadlines) -> Exchange:
        """Send a request. Never raises for the upstream's sake: every failure is the exchange's `error`."""
        headers = [(b"host", self._origin.authority), *out.headers, *out.own]
        if out.body or out.method == b"POST":
            headers.append((b"content-length", b"%d" % len(out.body)))
        url = httpcore2.URL(scheme=self._scheme, host=self._host, port=self._origin.port, target=out.target)
        message = httpcore2.Request(out.method, url, headers=headers, content=out.body)
        return HttpxExchange(self, message, deadlines, asyncio.get_running_loop())

    def ended(self, exchange: Exchange) -> None:
        """No deadline of this exchange counts any more."""
        self.active.discard(cast(HttpxExchange, exchange))

    async def aclose(self) -> None:
        """Abort everything and close every socket. Later exchanges fail at once."""
        self.closed = True
        for exchange in list(self.active):
            exchange.abort(exchange.because(ExchangeAborted, "the transport is closed"))
        if self.tasks:
            await asyncio.wait(set(self.tasks), timeout=CLOSE_SECONDS)
        await self.links.aclose()


class HttpxExchange(Exchange):
    """See `Exchange`. Made by `HttpxPool.open`; end it with `release()` (or `abort()`), always."""

    __slots__ = ("_message", "_pool", "_room", "_timer")

    def __init__(
        self, pool: HttpxPool, message: httpcore2.Request, deadlines: Deadlines, loop: asyncio.AbstractEventLoop
    ) -> None:
        pool.clock.now = loop.time()
        # Of a pool an exchange without a socket of its own uses the bounds, the clock and `ended`.
        super().__init__(cast(Home, pool), b"", deadlines, loop)
        self._pool = pool
        self._message = message
        self._room: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        message.extensions["trace"] = self._trace
        if pool.closed:
            self.fail(self.because(ExchangeAborted, "the transport is closed"))
            return
        pool.active.add(self)
        self._watch()
        self.connecting = task = loop.create_task(self._serve())
        pool.tasks.add(task)
        task.add_done_callback(self._done)

    def expire(self, now: float) -> None:
        """As for every exchange; one that waits for its reader is not idle."""
        if self._room is not None and now < self._total_due:
            self.due = min(now + self._deadlines.idle, self._total_due)
        else:
            super().expire(now)

    # -- the task ----------------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        try:
            response = await self._pool.links.handle_async_request(self._message)
            try:
                self._begun(response)
                await self._read_all(response)
            finally:
                await response.aclose()
        except _FAULTS as error:
            self.connecting = None  # it is this task, and over
            self.fail(self._named(error))
        else:
            if self.error is None:
                self.connecting = None
                self.complete = True
                self._leave()
                self._wake()

    async def _trace(self, event: str, info: dict[str, Any]) -> None:
        """The engine tells what it does; from here on bytes of the request may reach the upstream."""
        if event in _SENDING and not self.sent:
            self.sent = True
            self._phase = "head"
            self.due = min(self._loop.time() + self._deadlines.head, self._total_due)
            self._watch()

    def _begun(self, response: httpcore2.Response) -> None:
        if not 200 <= response.status <= 599:
            raise httpcore2.RemoteProtocolError("the status is out of range")
        if self.error is not None:
            return
        self._phase = "body"
        self.headers = [(name.lower(), value) for name, value in response.headers]
        self.status = response.status
        self._last = self._loop.time()
        self.due = min(self._last + self._deadlines.idle, self._total_due)
        self._watch()
        self._wake()

    async def _read_all(self, response: httpcore2.Response) -> None:
        parts = cast(AsyncGenerator[bytes], aiter(cast(Any, response.stream)))
        async with contextlib.aclosing(parts):
            await self._until_room()
            async for part in parts:
                if self.error is not None:
                    return
                if part:
                    self._last = self._loop.time()
                    self.chunks.append(part)
                    self._buffered += len(part)
                    self._wake()
                    await self._until_room()

    async def _until_room(self) -> None:
        while self._held or self._buffered > self._buffer_max:
            self._room = self._loop.create_future()
            try:
                await self._room
            finally:
                self._room = None
                self._last = self._loop.time()

    def _read_on(self) -> None:
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    def _leave(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        super()._leave()

    def _done(self, task: asyncio.Task[None]) -> None:
        self._pool.tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:  # the reader's callback failed: a fault of ours
            self._loop.call_exception_handler({"message": "the reader of an exchange failed", "exception": error})
            self.connecting = None
            self.fail(self.because(ExchangeAborted, "the reader of the exchange failed"))

    # -- time --------------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """`due` is new."""
        if self._timer is not None:
            self._timer.cancel()
        wait = self.due - self._loop.time()
        self._timer = self._loop.call_later(min(wait, 86_400.0), self._look, False)

    def _look(self, again: bool) -> None:
        """Looks twice, `TICK` apart: a loop that was blocked reads its sockets before it blames an upstream."""
        now = self._loop.time()
        if now >= self.due and not again:
            self._timer = self._loop.call_later(TICK, self._look, True)
            return
        if now >= self.due:
            self._timer = None
            self.expire(now)
        if self.error is None and not self.complete:
            self._watch()

    # -- faults ------------------------------------------------------------------------------------------------------

    def _named(self, error: Exception) -> TransportError:
        """The fault by our names, without a word of the upstream's bytes."""
        if isinstance(error, httpcore2.ProxyError):
            self.sent, self._phase = False, "connect"  # the proxy passed nothing on
        if not self.sent:
            where = self._pool.way_text
            text = str(error) if isinstance(error, httpcore2.ProxyError | httpcore2.ConnectError) else "no connection"
            failed = self.because(ConnectFailed, f"cannot connect to {where}: {text}")
        elif isinstance(error, _LOST) or self._ended() or _reset(error):
            text = f"the upstream closed the connection before the end of the response's {self._phase}"
            failed = self.because(UpstreamClosed, text)
        else:
            failed = self.because(UpstreamProtocolError, "the upstream's bytes are not a valid response")
        failed.__cause__ = error
        return failed

    def _ended(self) -> bool:
        wire = self._message.extensions.get("wire")
        return isinstance(wire, Wire) and wire.told


def _reset(error: Exception) -> bool:
    return bool(error.args) and isinstance(error.args[0], h2.events.StreamReset)


def _context() -> ssl.SSLContext:
    """Trust in what the system trusts, as for every provider."""
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
