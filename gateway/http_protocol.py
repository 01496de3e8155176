"""uvicorn's HTTP protocol with what a gateway needs of it: bounds on the request head, and a way to drop a client.

Must not: change how requests are parsed or answered.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_BYTES_MAX = 64 * 1024
HEADERS_MAX = 200


def protocol(header_ms: int) -> type[HttpToolsProtocol]:
    """The protocol class for one worker; a client has `header_ms` to send a request's head."""

    class BoundedProtocol(HttpToolsProtocol):
        """A connection that is closed when its head is too slow or too large."""

        _timer: asyncio.TimerHandle | None = None
        _head_bytes = 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._await_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._head_bytes = 0
            self.scope["state"]["abort"] = self.transport.abort
            if self._timer is None:
                self._await_head()

        def on_url(self, url: bytes) -> None:
            self._grow(len(url))
            super().on_url(url)

        def on_header(self, name: bytes, value: bytes) -> None:
            self._grow(len(name) + len(value))
            super().on_header(name, value)

        def on_headers_complete(self) -> None:
            self._stop_timer()
            super().on_headers_complete()

        def _grow(self, size: int) -> None:
            self._head_bytes += size
            if self._head_bytes > HEAD_BYTES_MAX or len(self.headers) > HEADERS_MAX:
                self.transport.abort()

        def _await_head(self) -> None:
            self._timer = self.loop.call_later(header_ms / 1000, self._too_slow)

        def _stop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _too_slow(self) -> None:
            self._timer = None
            self.transport.close()

    return BoundedProtocol
