"""The client's side of a stream: SSE frames out through ASGI, in order, once started.

Must not: know money or providers. Every write is whole frames, so that two writers cannot tear one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from time import monotonic
from typing import Any

Send = Callable[[dict[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

DONE = b"data: [DONE]\n\n"
COMMENT = b": tollgate\n\n"
_SSE = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache, no-transform"),
    (b"x-accel-buffering", b"no"),
]


class ClientStream:
    """One SSE response. `last_write` and `writing_since` are monotonic seconds, read by the registry's tick."""

    __slots__ = ("_headers", "_send", "_write_now", "ended", "last_write", "started", "writing_since")

    def __init__(self, send: Send, write_now: Callable[[bytes], bool], headers: Callable[[], Headers]) -> None:
        """`write_now` sends a piece of the body at once, or answers False; `headers` is asked once, when the response
        starts."""
        self._send = send
        self._write_now = write_now
        self._headers = headers
        self.started = False
        self.ended = False
        self.last_write = monotonic()
        self.writing_since: float | None = None

    async def payloads(self, payloads: Sequence[bytes]) -> None:
        """Forward JSON payloads as one write of `data:` frames."""
        await self._write(b"data: " + b"\n\ndata: ".join(payloads) + b"\n\n")

    def written(self, payloads: Sequence[bytes]) -> bool:
        """`payloads` without a coroutine. False, with nothing sent, when that must wait or nothing was sent before."""
        if not self.started or self.writing_since is not None or self.ended:
            return False
        if not self._write_now(b"data: " + b"\n\ndata: ".join(payloads) + b"\n\n"):
            return False
        self.last_write = monotonic()
        return True

    async def commit(self) -> None:
        """Start the response before there is content, with a comment at once so that proxies see bytes."""
        if not self.started and not self.ended:
            await self._write(COMMENT)

    async def keepalive(self) -> None:
        """A comment between frames, unless a write is under way."""
        if self.started and not self.ended and self.writing_since is None:
            await self._write(COMMENT)

    async def finish(self, payloads: Sequence[bytes]) -> None:
        """The last payloads, `[DONE]`, and the end of the body, in one write."""
        if self.ended:
            return
        self.ended = True
        data = b"".join([b"data: %b\n\n" % payload for payload in payloads]) + DONE
        await self._start()
        await self._send({"type": "http.response.body", "body": data, "more_body": False})

    async def _start(self) -> None:
        if not self.started:
            self.started = True
            headers = [*_SSE, *self._headers()]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def _write(self, data: bytes) -> None:
        self.writing_since = monotonic()
        await self._start()
        await self._send({"type": "http.response.body", "body": data, "more_body": True})
        self.last_write = monotonic()
        self.writing_since = None
