"""One request and its answer on a client's connection, as uvicorn runs it, with fewer writes and two things that a
relay needs: bytes out without a coroutine, and a call when the client is gone.

Must not: know a path, a status' meaning or a session.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from gateway import errors
from proxy.errors import InternalError

if TYPE_CHECKING:
    from gateway.http_protocol import BoundedProtocol


class Cycle(RequestResponseCycle):
    """ASGI's `receive` and `send`. The head waits for the first piece of the body, so that both are one write."""

    disconnected = response_started = response_complete = False
    more_body = True
    chunked_encoding: bool | None = None
    until_close = False
    expected_content_length = 0
    task: asyncio.Task[None] | None = None
    on_gone: Callable[[], None] | None = None
    """Called once when the connection is lost while this request is not answered."""
    _head = b""
    news = False
    """Whether something has come that `receive` has not told."""
    waiting: asyncio.Future[None] | None = None

    @property
    def message_event(self) -> Any:  # type: ignore[override]
        """Itself: see `set`."""
        return self

    def __init__(self, connection: BoundedProtocol, *, keep_alive: bool) -> None:
        """For the request whose head `connection` has just read. (All that the class above sets and this does not, it
        would use for access lines, which are not its work here.)"""
        self.scope = connection.scope
        self.transport = connection.transport
        self.flow = connection.flow
        self.logger = connection.logger
        self.default_headers = connection.server_state.default_headers
        self.on_response = connection.on_response_complete
        self.close = connection.close
        self.keep_alive = keep_alive
        self.waiting_for_100_continue = connection.expect_100_continue
        self.body = bytearray()

    async def send(self, message: Any) -> None:
        """As ASGI says. Raises RuntimeError for messages out of order or a body that is not its announced length."""
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            return
        kind = message["type"]
        if not self.response_started and kind == "http.response.start":
            self._start(message["status"], message.get("headers", ()))
        elif self.response_started and not self.response_complete and kind == "http.response.body":
            self._body(message.get("body", b""), message.get("more_body", False))
        else:
            raise RuntimeError(f"ASGI message '{kind}' is out of order.")

    def begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> bool:
        """Begin a response; its head goes out with the first piece of the body. False when that can no longer be."""
        if self.disconnected or self.response_started:
            return False
        self._start(status, headers)
        return True

    def write(self, data: bytes, *, last: bool = False) -> bool:
        """Send a piece of a chunked body at once. False, with nothing sent, when that must wait (or will never be)."""
        if self.flow.write_paused or self.disconnected or self.response_complete or not self.response_started:
            return False
        if self.chunked_encoding and not last:  # what `_body` would do, without its questions
            self.transport.write(b"%b%x\r\n%b\r\n" % (self._head, len(data), data))
            self._head = b""
        else:
            self._body(data, not last)
        return True

    def respond(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> bool:
        """Send a whole response at once. False, with nothing sent, when that must wait (or will never be)."""
        if self.flow.write_paused or self.disconnected or self.response_started:
            return False
        self._start(status, headers)
        self._body(body, False)
        return True

    async def receive(self) -> Any:
        """As ASGI says. Reading goes on behind the body: that is how the client's end is seen."""
        if self.waiting_for_100_continue and not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.waiting_for_100_continue = False
        self.flow.resume_reading()
        while not (self.disconnected or self.response_complete or self.news):
            self.waiting = asyncio.get_running_loop().create_future()
            await self.waiting
        self.news = False
        if self.disconnected or self.response_complete:
            return {"type": "http.disconnect"}
        body, self.body = bytes(self.body), bytearray()
        self.flow.resume_reading()
        return {"type": "http.request", "body": body, "more_body": self.more_body}

    def set(self) -> None:
        """Something has come: more of the body, its end, the client's end. (uvicorn's name for it: its connection calls
        it as the event that `receive` waits for. There is none, because nearly no request waits.)"""
        self.news = True
        waiting = self.waiting
        if waiting is not None and not waiting.done():
            waiting.set_result(None)

    def whole_body(self) -> bytes | None:
        """The request's body when it has come whole, else None."""
        if self.more_body or self.disconnected:
            return None
        self.flow.resume_reading()
        self.news = False
        body, self.body = bytes(self.body), bytearray()
        return body

    def abort(self) -> None:
        """Drop the connection with all that waits in it."""
        self.transport.abort()

    async def send_500_response(self) -> None:
        """What uvicorn sends when the application failed, in the form of all errors."""
        await errors.answer(self.scope, self.send, InternalError())

    def gone(self) -> None:
        """The connection is lost."""
        on_gone, self.on_gone = self.on_gone, None
        if on_gone is not None:
            on_gone()

    def _start(self, status: int, headers: Any) -> None:
        self.response_started = True
        self.waiting_for_100_continue = False
        closes = False
        for name, value in headers:
            if len(name) == 14 and name.lower() == b"content-length":
                self.expected_content_length = int(value)
                self.chunked_encoding = False
            elif len(name) == 10 and name.lower() == b"connection" and b"close" in value.lower():
                self.keep_alive = False
                closes = True
        lines = [b"%b: %b\r\n" % field for field in (*self.default_headers, *headers)]
        if (not self.keep_alive or self.more_body) and not closes:  # who is answered early should not send more
            lines.append(b"connection: close\r\n")
        if self.chunked_encoding is None and self.scope["http_version"] != "1.1":
            self.until_close = True  # RFC 9112, 6.1: no transfer coding for an older client
        elif self.chunked_encoding is None and self.scope["method"] != "HEAD" and status not in (204, 304):
            self.chunked_encoding = True
            lines.append(b"transfer-encoding: chunked\r\n")
        head = b"".join(lines)
        if head.count(b"\n") != len(lines) or head.count(b"\r") != len(lines) or b"\0" in head:
            raise RuntimeError("A response header has a line end in it.")
        self._head = b"%b%b\r\n" % (STATUS_LINE[status], head)

    def _body(self, body: bytes, more: bool) -> None:
        head, self._head = self._head, b""
        if self.scope["method"] == "HEAD":
            self.expected_content_length = 0
            data = head
        elif self.until_close:
            data = head + body
        elif self.chunked_encoding:
            if body:
                data = b"%b%x\r\n%b%b" % (head, len(body), body, b"\r\n" if more else b"\r\n0\r\n\r\n")
            else:
                data = head if more else head + b"0\r\n\r\n"
        else:
            if len(body) > self.expected_content_length:
                raise RuntimeError("Response content longer than Content-Length")
            self.expected_content_length -= len(body)
            data = head + body
        if data:
            self.transport.write(data)
        if not more:
            self._complete()

    def _complete(self) -> None:
        if self.expected_content_length != 0:
            raise RuntimeError("Response content shorter than Content-Length")
        self.response_complete = True
        self.part()
        if self.waiting is not None:
            self.set()
        if not self.keep_alive:
            self.close()
        self.on_response()

    def part(self) -> None:
        """Break the circle of the request and its scope: a collection may be far away."""
        self.scope["state"].pop("connection", None)
