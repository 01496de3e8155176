"""The client's side of a stream: SSE frames out through ASGI, in order, once started.

Must not: know money or providers. Every write is whole frames, so that two writers cannot tear one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

Send = Callable[[dict[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

DONE = b"data: [DONE]\n\n"
COMMENT = b": tollgate\n\n"
_SSE = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache, no-transform"),
    (b"x-accel-buffering", b"no"),
]


class ClientConnection(Protocol):
    """What the server tells of and does to the connection of one request (`scope["state"]["connection"]`). What is sent
    by these methods is sent at once or not at all: False says that ASGI's `send` must wait for it."""

    disconnected: bool
    response_started: bool
    task: asyncio.Task[None] | None
    """What serves the request."""
    on_gone: Callable[[], None] | None

    def abort(self) -> None:
        """Drop the connection with all that waits in it."""

    def whole_body(self) -> bytes | None:
        """The request's body when it has come whole, else None."""

    def respond(self, status: int, headers: Headers, body: bytes) -> bool:
        """Send a whole response."""

    def begin(self, status: int, headers: Headers) -> bool:
        """Begin a response whose body comes in pieces."""

    def write(self, data: bytes, *, last: bool = False) -> bool:
        """Send a piece of the body, and its end with the last one."""


def _never() -> bool:
    return False


def _end(payloads: Sequence[bytes]) -> bytes:
    return b"".join([b"data: %b\n\n" % payload for payload in payloads]) + DONE


class ClientStream:
    """One SSE response. `last_write` and `writing_since` are monotonic seconds, read by the registry's tick."""

    __slots__ = (
        "_connection", "_headers", "_monotonic", "_send", "_waits", "ended", "last_write", "silenced", "started",
        "writing_since",
    )  # fmt: skip

    def __init__(
        self,
        send: Send,
        connection: ClientConnection,
        headers: Callable[[], Headers],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`headers` is asked once, when the response starts."""
        self._send = send
        self._monotonic = monotonic
        self._connection = connection
        self._headers = headers
        self.started = False
        self.ended = False
        self.last_write = self._monotonic()
        self.writing_since: float | None = None
        self.silenced: Callable[[], bool] = _never
        """Asked right before each comment: whether nothing may be written now. Payloads: their writer has asked."""
        self._waits: asyncio.Lock | None = None

    def written(self, payloads: Sequence[bytes]) -> bool:
        """Forward JSON payloads as one write of `data:` frames. False, with nothing sent, when that must wait."""
        if self.ended or not self._at_once(b"data: " + b"\n\ndata: ".join(payloads) + b"\n\n", last=False):
            return False
        self.last_write = self._monotonic()
        return True

    def finished(self, payloads: Sequence[bytes]) -> bool:
        """The last payloads, `[DONE]`, and the end of the body, in one write. False, with nothing sent, when that must
        wait."""
        if self.ended or not self._at_once(_end(payloads), last=True):
            return False
        self.ended = True
        return True

    def _at_once(self, data: bytes, *, last: bool) -> bool:
        if self.writing_since is not None:
            return False
        if not self.started:
            if not self._connection.begin(200, [*_SSE, *self._headers()]):
                return False
            self.started = True
        return self._connection.write(data, last=last)

    async def ready(self) -> bool:
        """Wait until the client takes bytes; False when it has left. Who has waited asks anew whether he may write."""
        async with self._alone():
            self.writing_since = self._monotonic()
            if self.started:
                await self._send({"type": "http.response.body", "body": b"", "more_body": True})
            else:
                await self._start()
            self.writing_since = None
        return not self._connection.disconnected

    async def commit(self) -> None:
        """Start the response before there is content, with a comment at once so that proxies see bytes."""
        if not self.started and not self.ended:
            await self._write(COMMENT)

    async def keepalive(self) -> None:
        """A comment between frames, unless a write is under way."""
        if self.started and not self.ended and self.writing_since is None:
            await self._write(COMMENT)

    async def _start(self) -> None:
        if not self.started:
            self.started = True
            headers = [*_SSE, *self._headers()]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def _write(self, data: bytes) -> None:
        async with self._alone():
            self.writing_since = self._monotonic()
            if not (self.ended or self.silenced()):
                await self._start()
            if not (self.ended or self.silenced()):  # the client may have kept the start waiting
                await self._send({"type": "http.response.body", "body": data, "more_body": True})
                self.last_write = self._monotonic()
            self.writing_since = None

    def _alone(self) -> asyncio.Lock:
        """Held by who may have to wait for the client, so that nobody overtakes the response's start."""
        if self._waits is None:
            self._waits = asyncio.Lock()
        return self._waits
