"""One Redis socket on hiredis: its address, its errors, and the calls that wait for replies in order.

Must not: reconnect (that is `redis_client`), retry a command, decode replies (they are bytes), or print a password.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, cast
from urllib.parse import parse_qs, unquote, urlsplit

import hiredis

SWEEP_MIN_S, SWEEP_MAX_S = 0.005, 0.25
OVERDUE_FACTOR = 2
"""A connection is dropped when its oldest call has waited this many times `call_ms`."""

Word = str | bytes | int


class RedisError(Exception):
    """A Redis command did not succeed."""


class RedisUnavailable(RedisError):
    """Redis is unreachable, too slow or closed. With `sent` the outcome is unknown; without it, nothing was sent."""

    def __init__(self, message: str, *, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


class RedisUrlError(ValueError):
    """The Redis URL is not usable; the message never shows it."""


class RedisReplyError(RedisError):
    """The server answered with an error; `code` is its first word (NOSCRIPT, OOM, MISCONF, WRONGTYPE, ...)."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = message.split(" ", 1)[0]


@dataclass(frozen=True)
class Address:
    """Where the server is and who we are there. `str()` shows no credentials."""

    host: str | None
    port: int
    path: str | None
    tls: bool
    username: str | None = field(repr=False)
    password: str | None = field(repr=False)
    db: int = 0

    @classmethod
    def parse(cls, url: str) -> Address:
        """Read `redis://[user:pass@]host:port/db`, `rediss://...` or `unix://[user:pass@]/path.sock?db=0`.

        Raises RedisUrlError, without the URL in it: a URL may hold a password.
        """
        try:
            parts = urlsplit(url)
            port = parts.port or 6379
        except ValueError:
            raise RedisUrlError("REDIS_URL: the Redis URL is not readable: check its port and brackets") from None
        if parts.scheme not in ("redis", "rediss", "unix"):
            raise RedisUrlError("REDIS_URL: the Redis URL must start with redis://, rediss:// or unix://")
        unix = parts.scheme == "unix"
        if unix and not parts.path:
            raise RedisUrlError("REDIS_URL: the Redis URL unix:// needs the socket's path")
        named = parse_qs(parts.query).get("db", [""])[-1] or ("" if unix else parts.path.strip("/"))
        if named and not (named.isascii() and named.isdigit()):
            raise RedisUrlError("REDIS_URL: the Redis URL's database must be a number")
        return cls(
            host=None if unix else parts.hostname or "localhost",
            port=port,
            path=unquote(parts.path) if unix else None,
            tls=parts.scheme == "rediss",
            username=unquote(parts.username) if parts.username else None,
            password=unquote(parts.password) if parts.password else None,
            db=int(named or 0),
        )

    def __str__(self) -> str:
        return f"Redis at {self.path}" if self.path else f"Redis at {self.host}:{self.port}"

    def greeting(self) -> list[tuple[Word, ...]]:
        """The commands that open a connection; the PING proves that the server answers, not only accepts."""
        commands: list[tuple[Word, ...]] = []
        if self.password is not None:
            commands.append(("AUTH", self.username, self.password) if self.username else ("AUTH", self.password))
        if self.db:
            commands.append(("SELECT", self.db))
        return [*commands, ("PING",)]


def pack(words: tuple[Word, ...]) -> bytes:
    """One command in RESP. Raises TypeError for a word that is not str, bytes or int."""
    packed: bytes = hiredis.pack_command(words)  # type: ignore[arg-type]  # its stub knows 1-tuples only
    return packed


class Connection(asyncio.Protocol):
    """One socket's life: pending calls in the order of their replies. Never reused after it failed."""

    def __init__(
        self, address: Address, *, call_ms: int, pending_max: int, on_lost: Callable[[Connection], None]
    ) -> None:
        self._address = address
        self._call_s = call_ms / 1000
        self._sweep_s = min(max(self._call_s / 4, SWEEP_MIN_S), SWEEP_MAX_S)
        self._pending_max = pending_max
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._reader = hiredis.Reader(protocolError=hiredis.ProtocolError, replyError=RedisReplyError)
        self._pending: deque[tuple[asyncio.Future[Any], float]] = deque()
        self._expired = 0  # how many calls at the head of `_pending` were already failed by the sweep
        self._buffer: list[bytes] = []
        self._issued_at = 0.0  # of the commands in `_buffer`
        self._sweep: asyncio.TimerHandle | None = None
        self._forgave = False
        self._transport: asyncio.Transport | None = None
        self._gone: asyncio.Future[None] = self._loop.create_future()
        self.failed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports do not inherit from asyncio's

    def call(self, args: tuple[Word, ...]) -> asyncio.Future[Any]:
        """Queue one command; the future gets its reply."""
        packed = pack(args)
        future: asyncio.Future[Any] = self._loop.create_future()
        if len(self._pending) >= self._pending_max:
            future.set_exception(
                RedisUnavailable(f"{self._address}: {self._pending_max} calls are pending", sent=False)
            )
            return future
        if not self._buffer:
            self._issued_at = self._loop.time()
            self._loop.call_soon(self._flush)
            if self._sweep is None:
                self._schedule_sweep()
        self._buffer.append(packed)
        self._pending.append((future, self._issued_at))
        return future

    def _flush(self) -> None:
        if self._transport is None or not self._buffer:
            return
        self._transport.write(self._buffer[0] if len(self._buffer) == 1 else b"".join(self._buffer))
        self._buffer.clear()

    def data_received(self, data: bytes) -> None:
        """Hand each whole reply to the oldest pending call, or drop it when nobody waits any more."""
        reader, pending = self._reader, self._pending
        try:
            reader.feed(data)
            while (reply := reader.gets()) is not False:
                if not pending:
                    self.fail("a reply without a command")
                    return
                future = pending.popleft()[0]
                if self._expired:
                    self._expired -= 1
                if future.done():
                    continue
                if reply.__class__ is RedisReplyError:
                    future.set_exception(reply)
                else:
                    future.set_result(reply)
        except hiredis.ProtocolError:
            self.fail("an unreadable reply")

    def connection_lost(self, exc: Exception | None) -> None:
        self.fail("the connection was lost")
        if not self._gone.done():
            self._gone.set_result(None)

    def _schedule_sweep(self) -> None:
        self._sweep = self._loop.call_later(self._sweep_s, self._swept, self._loop.time() + self._sweep_s)

    def _swept(self, due: float) -> None:
        """Fail the calls that waited longer than `call_ms`: one timer for all of them, not one for each."""
        self._sweep = None
        now = self._loop.time()
        if now - due > self._sweep_s and not self._forgave:
            self._forgave = True  # the loop itself was late: read the replies that wait in the socket first
            self._schedule_sweep()
            return
        self._forgave = False
        pending = self._pending
        if pending and now - pending[0][1] > OVERDUE_FACTOR * self._call_s:
            self.fail(f"no reply for {OVERDUE_FACTOR * self._call_s:g} s")
            return
        for future, issued_at in islice(pending, self._expired, None):
            if now - issued_at <= self._call_s:
                break
            self._expired += 1
            if not future.done():
                future.set_exception(
                    RedisUnavailable(f"{self._address}: no reply within {self._call_s:g} s", sent=True)
                )
        if pending:
            self._schedule_sweep()

    def fail(self, reason: str) -> None:
        """End this connection now and every call on it; what was still in our buffer never left."""
        if self.failed:
            return
        self.failed = True
        if self._sweep is not None:
            self._sweep.cancel()
        unsent_from = len(self._pending) - len(self._buffer)
        for index, (future, _) in enumerate(self._pending):
            if not future.done():
                future.set_exception(RedisUnavailable(f"{self._address}: {reason}", sent=index < unsent_from))
        self._pending.clear()
        self._buffer.clear()
        if self._transport is None:
            self._gone.set_result(None)
        else:
            self._transport.abort()
        self._on_lost(self)

    async def gone(self) -> None:
        """Wait until the transport has let go of the socket."""
        await self._gone


async def open_connection(address: Address, factory: Callable[[], Connection]) -> Connection:
    """Connect a socket to a `Connection`. Raises OSError."""
    loop = asyncio.get_running_loop()
    if address.path is not None:
        return (await loop.create_unix_connection(factory, address.path))[1]
    host = address.host or "localhost"
    return (await loop.create_connection(factory, host, address.port, ssl=_tls(address)))[1]


async def open_streams(address: Address) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect plain streams, for a subscription. Raises OSError."""
    if address.path is not None:
        return await asyncio.open_unix_connection(address.path)
    return await asyncio.open_connection(address.host, address.port, ssl=_tls(address))


def _tls(address: Address) -> ssl.SSLContext | None:
    return ssl.create_default_context() if address.tls else None
