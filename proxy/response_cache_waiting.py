"""A client of the response cache while no session watches over it: while it waits for an answer that another call
fetches, and while it is given one that was kept.

The registry of live sessions does both for a session of its own; here the same bounds are kept without one.
Must not: decide whether a call waits, or what it is given.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from config.settings import Bounds
from proxy.client_stream import COMMENT, ClientConnection, ClientStream, Headers, Send


class Unwatched(ClientStream):
    """A stream that no session ends: a client that takes too long over what waits for it (`client_write_ms`), or over
    all of it (`total_ms`), is dropped with that."""

    __slots__ = ("_ends", "_write_s")

    def __init__(
        self, send: Send, connection: ClientConnection, headers: Callable[[], Headers], bounds: Bounds
    ) -> None:
        """`total_ms` runs from now."""
        super().__init__(send, connection, headers)
        self._write_s = bounds.client_write_ms / 1000
        self._ends = asyncio.get_running_loop().time() + bounds.total_ms / 1000

    async def ready(self) -> bool:
        """Wait, within the bounds, until the client takes bytes; False when it has left or was dropped."""
        left_s = self._ends - asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(max(0.0, min(self._write_s, left_s))):
                return await super().ready()
        except TimeoutError:
            self._connection.abort()
            return False

    def comment(self) -> None:
        """A comment, if the client takes it at once. The first one begins the response."""
        self._at_once(COMMENT, last=False)


class Wait:
    """How long a call waits for another one's answer, and the comments that keep its client's connection from being
    taken for dead meanwhile: the first after `commit_after_ms`, then one every `keepalive_ms`."""

    __slots__ = ("_client", "_comments_s", "_every_s", "_timer", "client", "connection", "deadline")

    def __init__(
        self,
        connection: ClientConnection,
        seconds: float,
        client: Callable[[], Unwatched] | None = None,
        bounds: Bounds | None = None,
    ) -> None:
        """`client` makes the stream that is sent comments, once there are any; None: its answer is no stream."""
        now = asyncio.get_running_loop().time()
        self.connection = connection
        self.deadline = now + seconds
        """On the loop's clock."""
        self.client: Unwatched | None = None
        """There once the response may have begun."""
        self._client = client
        self._timer: asyncio.TimerHandle | None = None
        self._comments_s = now if bounds is None else now + bounds.commit_after_ms / 1000
        self._every_s = 0.0 if bounds is None else bounds.keepalive_ms / 1000

    def left_s(self) -> float:
        """How much longer it may last."""
        return max(0.0, self.deadline - asyncio.get_running_loop().time())

    def begin(self) -> None:
        """The call does not go on at once; said more than once, it counts once."""
        if self._client is not None and self._timer is None:
            self._timer = asyncio.get_running_loop().call_at(self._comments_s, self._comment, self._client)

    def end(self) -> None:
        """The call goes on."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _comment(self, client: Callable[[], Unwatched]) -> None:
        if self.client is None:
            self.client = client()
        self.client.comment()
        self._timer = asyncio.get_running_loop().call_later(self._every_s, self._comment, client)
