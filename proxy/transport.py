"""The upstream transport: HTTP/1.1 over pooled connections, one `Exchange` per request, one timer for all deadlines.

Must not: know providers, routes, litestar or httpx2; read proxy settings from the environment; follow redirects.

Reuse and repeat. Right before a request is written to an idle connection the kernel is asked (poll) for EOF, errors and
unexpected bytes; a dead connection is dropped and the next one, or a new one, is taken. That is the whole retry of
stale connections: it happens while nothing has been sent. A request that was written is never written again. If its
reused connection dies, even without one byte of response, the upstream may have processed it: the caller gets
UpstreamClosed with `sent` true and decides.

Deadlines. Every `TICK` seconds one sweep looks at the exchanges whose `due` had passed at the sweep before: a loop
that was blocked reads its sockets before it blames an upstream. A limit is thus noticed up to two ticks late.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import OrderedDict
from dataclasses import dataclass
from math import inf

from proxy.connection import Connection
from proxy.exchange import Deadlines, Exchange
from proxy.http_request import Origin, build_request
from proxy.transport_errors import (
    ConnectFailed,
    ExchangeAborted,
    TransportError,
    UpstreamClosed,
    UpstreamProtocolError,
    UpstreamTimeout,
)

__all__ = [
    "ConnectFailed",
    "Exchange",
    "ExchangeAborted",
    "Origin",
    "Transport",
    "TransportError",
    "TransportLimits",
    "UpstreamClosed",
    "UpstreamProtocolError",
    "UpstreamTimeout",
    "build_request",
]

TICK = 0.1
"""Seconds between two sweeps."""
CLOSE_SECONDS = 5.0
"""How long aclose() waits for the loop to report the sockets closed (it takes a few turns)."""


@dataclass(frozen=True, slots=True)
class TransportLimits:
    """Milliseconds, bytes and counts; None is no limit. `connections_max` and `idle_connections_max` are per origin.

    `head_ms` runs from the written request to the response's headers, `idle_ms` between two body bytes (not while the
    reader holds the upstream back), `total_ms` from open() to the end of the body. Reading from a connection pauses
    when more than `read_buffer_max` bytes wait for the reader.
    """

    connect_ms: int = 5_000
    head_ms: int = 300_000
    idle_ms: int = 120_000
    total_ms: int | None = 3_600_000
    read_buffer_max: int = 256 * 1024
    header_bytes_max: int = 64 * 1024
    idle_connections_max: int = 1_000
    keepalive_ms: int = 15_000
    connections_max: int | None = None


@dataclass(frozen=True, slots=True)
class Counts:
    """Exchanges that are not over; idle connections; all connections, open or in the making."""

    active: int
    idle: int
    connections: int


class Transport:
    """Opens exchanges. One per event loop; close with `aclose()`."""

    def __init__(self, limits: TransportLimits, *, ssl_context: ssl.SSLContext | None = None) -> None:
        """`ssl_context`: other trust, e.g. a private CA. Raises ValueError when it skips checks or allows TLS < 1.2."""
        if ssl_context is not None:
            _check_context(ssl_context)
        self.limits = limits
        self.now = 0.0
        self.deadlines = Deadlines(
            limits.connect_ms / 1000, limits.head_ms / 1000, limits.idle_ms / 1000, _seconds(limits.total_ms, inf)
        )
        self.active: set[Exchange] = set()
        self._context = ssl_context
        self._pools: dict[Origin, Pool] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._swept = 0.0
        self._closed = False
        self._empty: asyncio.Future[None] | None = None

    def open(
        self,
        origin: Origin,
        request: bytes,
        deadlines: Deadlines | None = None,
    ) -> Exchange:
        """Send a whole request (`build_request`): at once on an idle connection, else as soon as a new one is there.

        Never raises for the upstream's sake: every failure is the exchange's `error`. `deadlines` are used instead of
        the limits' own (`deadlines_with`).
        """
        loop = self._loop or self._bind()
        self.now = loop.time()
        pool = self._pools.get(origin) or self._pool(origin)
        exchange = Exchange(pool, request, deadlines or self.deadlines, loop)
        self.active.add(exchange)
        pool.start(exchange)
        if self._timer is None and not self._closed:
            self._swept = self.now
            self._timer = loop.call_later(TICK, self._sweep)
        return exchange

    def deadlines_with(
        self,
        *,
        connect_ms: int | None = None,
        head_ms: int | None = None,
        idle_ms: int | None = None,
        total_ms: int | None = None,
    ) -> Deadlines:
        """The limits' deadlines with these in place of theirs."""
        limits = self.deadlines
        return Deadlines(
            _seconds(connect_ms, limits.connect),
            _seconds(head_ms, limits.head),
            _seconds(idle_ms, limits.idle),
            _seconds(total_ms, limits.total),
        )

    def counts(self) -> Counts:
        """How much is in use now."""
        pools = self._pools.values()
        return Counts(len(self.active), sum(len(pool.idle) for pool in pools), sum(pool.size() for pool in pools))

    async def aclose(self) -> None:
        """Abort everything and wait until every socket is closed. Later exchanges fail at once."""
        self._closed = True
        for exchange in list(self.active):
            exchange.abort(exchange.because(ExchangeAborted, "the transport is closed"))
        for pool in list(self._pools.values()):
            pool.drop_all()
        if self._pools and self._loop is not None:
            self._empty = self._empty or self._loop.create_future()
            await asyncio.wait({self._empty}, timeout=CLOSE_SECONDS)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @property
    def closed(self) -> bool:
        return self._closed

    def context(self) -> ssl.SSLContext:
        """The TLS trust; the system's CA store is read at the first https connection."""
        if self._context is None:
            self._context = ssl.create_default_context()
            self._context.minimum_version = ssl.TLSVersion.TLSv1_2
            self._context.set_alpn_protocols(["http/1.1"])
        return self._context

    def forget(self, origin: Origin) -> None:
        """The origin's last connection is gone."""
        self._pools.pop(origin, None)
        if self._empty is not None and not self._pools and not self._empty.done():
            self._empty.set_result(None)

    def _bind(self) -> asyncio.AbstractEventLoop:
        self._loop = asyncio.get_running_loop()
        return self._loop

    def _pool(self, origin: Origin) -> Pool:
        pool = self._pools[origin] = Pool(self, origin)
        return pool

    def _sweep(self) -> None:
        """Expire what was due at the last sweep, and come back while there is something to watch."""
        assert self._loop is not None
        horizon, self.now = self._swept, self._loop.time()
        self._swept = self.now
        for exchange in [exchange for exchange in self.active if exchange.due <= horizon]:
            exchange.expire(horizon)
        for pool in list(self._pools.values()):
            pool.expire(horizon - self.limits.keepalive_ms / 1000)
        self._timer = self._loop.call_later(TICK, self._sweep) if self._pools or self.active else None


class Pool:
    """The connections to one origin. Idle ones are reused last in, first out; every step is O(1)."""

    def __init__(self, transport: Transport, origin: Origin) -> None:
        self.transport = self.clock = transport
        self.origin = origin
        self.tls = origin.scheme == "https"
        self.buffer_max = transport.limits.read_buffer_max
        self.head_bytes_max = transport.limits.header_bytes_max
        self.idle: OrderedDict[Connection, None] = OrderedDict()
        self._open: set[Connection] = set()
        self._making: set[Exchange] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def size(self) -> int:
        """Open connections, with those in the making."""
        return len(self._open) + len(self._making)

    def start(self, exchange: Exchange) -> None:
        """Write the request on the idle connection that was used last and is still alive, else on a new one."""
        idle = self.idle
        while idle:
            connection, _ = idle.popitem()
            if connection.fresh():
                exchange.begin(connection)
                return
            connection.drop()
        self._start_new(exchange)

    def _start_new(self, exchange: Exchange) -> None:
        """Write the request on a new connection, unless there are too many."""
        transport = self.transport
        most = transport.limits.connections_max
        if transport.closed:
            exchange.fail(ExchangeAborted("the transport is closed", sent=False, phase="connect"))
        elif most is not None and self.size() >= most:
            exchange.fail(ConnectFailed(f"{most} connections are open already", sent=False, phase="connect"))
        else:
            self._making.add(exchange)
            task = asyncio.get_running_loop().create_task(self._connect(exchange))
            exchange.connecting = task
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            task.add_done_callback(lambda _: self._made(exchange))
            return
        self._forget_if_empty()

    def ended(self, exchange: Exchange) -> None:
        self.transport.active.discard(exchange)

    def keep(self, connection: Connection) -> None:
        """Hold a free connection; beyond the bound the one that waited longest goes."""
        connection.idle_since = self.transport.now
        self.idle[connection] = None
        if len(self.idle) > self.transport.limits.idle_connections_max:
            self.idle.popitem(last=False)[0].drop()

    def opened(self, connection: Connection) -> None:
        self._open.add(connection)
        if connection.exchange is not None:
            self._making.discard(connection.exchange)

    def lost(self, connection: Connection) -> None:
        self.idle.pop(connection, None)
        self._open.discard(connection)
        self._forget_if_empty()

    def expire(self, horizon: float) -> None:
        """Close the connections that have waited since before `horizon` (loop time)."""
        while self.idle and (oldest := next(iter(self.idle))).idle_since <= horizon:
            del self.idle[oldest]
            oldest.drop()

    def drop_all(self) -> None:
        for connection in list(self._open):
            connection.drop()
        self._forget_if_empty()

    async def _connect(self, exchange: Exchange) -> None:
        """Make a connection; its first act is to write the request (`Connection.connection_made`)."""
        origin = self.origin
        try:
            await asyncio.get_running_loop().create_connection(
                lambda: Connection(self, exchange),
                origin.host,
                origin.port,
                ssl=self.transport.context() if self.tls else None,
                # our own deadline comes first
                ssl_handshake_timeout=min(exchange.connect_seconds, 3600.0) + 1 if self.tls else None,
            )
        except (OSError, UnicodeError) as error:
            exchange.connecting = None
            text = f"cannot connect to {origin.host}:{origin.port}: {_reason(error)}"
            failed = ConnectFailed(text, sent=False, phase="connect")
            failed.__cause__ = error
            exchange.fail(failed)

    def _made(self, exchange: Exchange) -> None:
        self._making.discard(exchange)
        self._forget_if_empty()

    def _forget_if_empty(self) -> None:
        if not (self._open or self._making or self._tasks):
            self.transport.forget(self.origin)


def _seconds(milliseconds: int | None, default: float) -> float:
    return default if milliseconds is None else milliseconds / 1000


def _reason(error: OSError | UnicodeError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate is not trusted: {error.verify_message}"
    return str(getattr(error, "strerror", None) or error) or type(error).__name__


def _check_context(context: ssl.SSLContext) -> None:
    if context.verify_mode != ssl.CERT_REQUIRED or not context.check_hostname:
        raise ValueError("the TLS context must verify certificates and host names")
    if context.minimum_version < ssl.TLSVersion.TLSv1_2:
        raise ValueError("the TLS context must set minimum_version to TLS 1.2 or later")
