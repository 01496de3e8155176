"""The hot Redis connection: one multiplexed hiredis socket per process, reconnecting by itself.

Commands issued in one turn of the event loop leave in one write; replies are matched in order, so every command that
was written keeps its place until its reply came, whoever still waits for it. Must not: retry a command (its outcome may
be unknown), decode replies (they are bytes), know what any command means, or print a password.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import Callable
from typing import Any

import hiredis

from storage.redis_connection import (
    Address,
    Connection,
    RedisError,
    RedisReplyError,
    RedisUnavailable,
    RedisUrlError,
    Word,
    open_connection,
    open_streams,
    pack,
)

__all__ = ["RedisClient", "RedisError", "RedisReplyError", "RedisUnavailable", "RedisUrlError", "Subscription"]

log = logging.getLogger(__name__)

BACKOFF_FIRST_S = 0.05
BACKOFF_MAX_S = 2.0
SUBSCRIPTION_IDLE_S = 10.0
"""A silent subscription is pinged after this long, and dropped after twice as long."""

_NOT_YET = frozenset({"LOADING", "BUSY", "MASTERDOWN"})


class Subscription:
    """One channel on its own connection, kept open until `aclose`. `active` while the server has confirmed it."""

    def __init__(
        self, address: Address, channel: str, on_message: Callable[[bytes], None], on_gap: Callable[[], None]
    ) -> None:
        self._address = address
        self._channel = channel
        self._on_message = on_message
        self._on_gap = on_gap
        self._confirmed = asyncio.Event()
        self._task = asyncio.create_task(self._keep(), name=f"redis subscription {channel}")

    @property
    def active(self) -> bool:
        """Whether messages published now will arrive."""
        return self._confirmed.is_set()

    async def wait_active(self, timeout_s: float) -> bool:
        """Wait for the server's confirmation at most `timeout_s`; answers `active`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._confirmed.wait()
        except TimeoutError:
            return False
        return True

    async def _keep(self) -> None:
        delay_s = BACKOFF_FIRST_S
        while True:
            try:
                await self._listen()
            except (OSError, TimeoutError, hiredis.ProtocolError, RedisReplyError) as error:
                log.debug("subscription to %s on %s ended: %s", self._channel, self._address, error)
            delay_s = BACKOFF_FIRST_S if self.active else min(delay_s * 2, BACKOFF_MAX_S)
            self._confirmed.clear()
            await asyncio.sleep(_jittered(delay_s))

    async def _listen(self) -> None:
        reader = hiredis.Reader(protocolError=hiredis.ProtocolError, replyError=RedisReplyError)
        async with asyncio.timeout(SUBSCRIPTION_IDLE_S):
            source, sink = await open_streams(self._address)
        try:
            for command in (*self._address.greeting()[:-1], ("SUBSCRIBE", self._channel)):
                sink.write(pack(command))
            pinged = False
            while True:
                try:
                    async with asyncio.timeout(SUBSCRIPTION_IDLE_S):
                        data = await source.read(65_536)
                except TimeoutError:
                    if pinged:
                        raise
                    pinged = True
                    sink.write(pack(("PING",)))
                    continue
                if not data:
                    raise ConnectionResetError("closed by the server")
                pinged = False
                reader.feed(data)
                while (reply := reader.gets()) is not False:
                    self._received(reply)
        finally:
            sink.transport.abort()

    def _received(self, reply: Any) -> None:
        if isinstance(reply, RedisReplyError):
            raise reply
        if not isinstance(reply, list):
            return  # +OK to AUTH and SELECT
        if reply[0] == b"subscribe":
            self._on_gap()  # what was published while nobody listened is lost
            self._confirmed.set()
        elif reply[0] == b"message":
            self._on_message(reply[2])

    async def aclose(self) -> None:
        """Stop listening."""
        self._confirmed.clear()
        self._task.cancel()
        await asyncio.wait([self._task])


class RedisClient:
    """The process's connection to one Redis. All methods belong to the loop that called `start`.

    `call_ms` bounds the wait for one reply, `connect_ms` one attempt to connect, `pending_max` the unanswered calls.
    """

    def __init__(self, url: str, *, call_ms: int, connect_ms: int, pending_max: int) -> None:
        """Raises RedisUrlError for a URL that cannot be read."""
        self._address = Address.parse(url)
        self._call_ms = call_ms
        self._connect_s = connect_ms / 1000
        self._pending_max = pending_max
        self._connection: Connection | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._reconnecting: asyncio.Task[None] | None = None
        self._subscriptions: list[Subscription] = []
        self._on_lost: list[Callable[[], None]] = []
        self._closed = False

    def on_lost(self, callback: Callable[[], None]) -> None:
        """Call `callback` (it must not raise) whenever the connection is lost, before any call on the next one: what
        comes back may be another server, or the same one without its last writes."""
        self._on_lost.append(callback)

    @property
    def connected(self) -> bool:
        """Whether a call made now would be written."""
        return self._connection is not None

    async def start(self) -> None:
        """Connect once. Raises RedisUnavailable, or RedisReplyError when the server refuses us (password, database)."""
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._connection = await self._connect()

    def call(self, *args: Word) -> asyncio.Future[Any]:
        """Send one command. The awaited result is the reply: bytes, int, None or a list of these.

        Raises (when awaited) RedisReplyError or RedisUnavailable. Cancelling does not unsend the command.
        """
        connection = self._connection
        if connection is not None:
            return connection.call(args)
        assert self._loop is not None, "start() comes first"
        future: asyncio.Future[Any] = self._loop.create_future()
        state = "closed" if self._closed else "not connected"
        future.set_exception(RedisUnavailable(f"{self._address}: {state}", sent=False))
        return future

    async def subscribe(
        self, channel: str, on_message: Callable[[bytes], None], on_gap: Callable[[], None] = lambda: None
    ) -> Subscription:
        """Listen to a channel on its own, reconnecting connection; returns when confirmed or after `connect_ms`.

        `on_gap` is called at each (re)subscription, because earlier messages may be lost. Neither callback may raise.
        """
        subscription = Subscription(self._address, channel, on_message, on_gap)
        self._subscriptions.append(subscription)
        await subscription.wait_active(self._connect_s)
        return subscription

    async def aclose(self) -> None:
        """Close the connection and all subscriptions; pending calls get RedisUnavailable."""
        self._closed = True
        if self._reconnecting is not None:
            self._reconnecting.cancel()
            await asyncio.wait([self._reconnecting])
        for subscription in self._subscriptions:
            await subscription.aclose()
        self._subscriptions.clear()
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.fail("closed")
            await connection.gone()

    async def _connect(self) -> Connection:
        connection: Connection | None = None
        try:
            async with asyncio.timeout(self._connect_s):
                connection = await open_connection(self._address, self._new_connection)
                await asyncio.gather(*(connection.call(command) for command in self._address.greeting()))
        except (OSError, TimeoutError) as error:
            reason = "no answer" if isinstance(error, TimeoutError) else _system_reason(error)
            raise RedisUnavailable(f"{self._address}: cannot connect: {reason}", sent=False) from None
        except RedisUnavailable as error:
            raise RedisUnavailable(str(error), sent=False) from None
        except RedisReplyError as error:
            if error.code in _NOT_YET:
                raise RedisUnavailable(f"{self._address}: not ready: {error}", sent=False) from None
            raise
        else:
            if connection.failed:
                raise RedisUnavailable(f"{self._address}: the connection was lost", sent=False)
            opened, connection = connection, None
            return opened
        finally:
            if connection is not None:
                connection.fail("cannot connect")

    def _new_connection(self) -> Connection:
        return Connection(self._address, call_ms=self._call_ms, pending_max=self._pending_max, on_lost=self._lost)

    def _lost(self, connection: Connection) -> None:
        if connection is not self._connection:
            return
        self._connection = None
        for callback in self._on_lost:
            callback()
        if not self._closed:
            log.warning("%s: connection lost, reconnecting", self._address)
            self._reconnecting = asyncio.create_task(self._reconnect(), name="redis reconnect")

    async def _reconnect(self) -> None:
        delay_s = BACKOFF_FIRST_S
        while True:
            try:
                self._connection = await self._connect()
            except RedisError as error:
                log.debug("reconnect: %s", error)
                await asyncio.sleep(_jittered(delay_s))
                delay_s = min(delay_s * 2, BACKOFF_MAX_S)
            else:
                log.warning("%s: connected again", self._address)
                return


def _system_reason(error: OSError) -> str:
    """The system's words: asyncio's repeat the address."""
    return os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or type(error).__name__


def _jittered(delay_s: float) -> float:
    """Between half and the whole delay, so that the workers of a host do not come back in one instant."""
    return delay_s * random.uniform(0.5, 1.0)  # noqa: S311  (no secret)
