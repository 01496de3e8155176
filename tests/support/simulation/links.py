"""Both ends that the core has to the outside: scripted sockets to providers, and a scripted client's connection.

The client notes every byte that reaches it and asks `may_write` before. Must not: decide when anything happens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from proxy.client_stream import Headers
from tests.support.simulation.loop import VirtualLoop
from tests.support.simulation.provider import Kind, Script


class Socket(asyncio.Transport):
    """The gateway's end of one connection to a provider. `given` counts the script's bytes that have come."""

    def __init__(self, loop: VirtualLoop, script: Script) -> None:
        super().__init__()
        self._loop = loop
        self._protocol: asyncio.BaseProtocol | None = None
        self.script = script
        self.asked = False
        """Whether the request was written."""
        self.given = 0
        self.closed = False
        self.over = False
        """Whether the script's end has come."""
        self.paused = False

    def join(self, protocol: asyncio.Protocol) -> None:
        """The connection is made."""
        self._protocol = protocol
        protocol.connection_made(self)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.asked = True

    def is_closing(self) -> bool:
        return self.closed

    def get_write_buffer_size(self) -> int:
        return 0

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def abort(self) -> None:
        if not self.closed:
            self.closed = True
            self._loop.call_soon(self._lost, None)

    close = abort

    def _lost(self, error: Exception | None) -> None:
        if isinstance(self._protocol, asyncio.Protocol):
            self._protocol.connection_lost(error)

    # -- what is true of it ----------------------------------------------------------------------------------------

    @property
    def made(self) -> bool:
        """Whether the connection came about."""
        return self._protocol is not None

    @property
    def answered(self) -> bool:
        """Whether a whole 2xx head has come."""
        return self.script.success and self.given >= self.script.head_at > 0

    @property
    def shown(self) -> bool:
        """Whether content has come."""
        return any(mark.shows and mark.at <= self.given for mark in self.script.marks)

    @property
    def whole(self) -> bool:
        """Whether all of it has come."""
        return self.given == len(self.script.raw) and (self.over or self.script.end == "keep")

    def texts(self) -> dict[Kind, str]:
        """All text in the frames that have come."""
        return self.script.texts(self.given)

    # -- acts of the schedule ----------------------------------------------------------------------------------------

    @property
    def has_more(self) -> bool:
        """Whether the schedule can move it on."""
        if self._protocol is None or self.closed or self.over or self.paused:
            return False
        return self.given < len(self.script.raw) or self.script.end in ("eof", "reset")

    def give(self, size: int) -> None:
        """The next bytes, or the end, arrive."""
        protocol = self._protocol
        assert isinstance(protocol, asyncio.Protocol)
        if self.given < len(self.script.raw):
            data = self.script.raw[self.given : self.given + size]
            self.given += len(data)
            protocol.data_received(data)
            return
        self.over = self.closed = True
        if self.script.end == "eof":
            protocol.eof_received()
            self._loop.call_soon(self._lost, None)
        else:
            self._loop.call_soon(self._lost, ConnectionResetError("reset by peer"))


class Client:
    """A client's connection, with the methods of `proxy.client_stream.ClientConnection` and ASGI's `send`."""

    def __init__(self, loop: VirtualLoop, may_write: Callable[[bytes, bool], None], patience_s: float) -> None:
        self._loop = loop
        self._may_write = may_write
        self.disconnected = False
        self.response_started = False
        self.complete = False
        self.task: asyncio.Task[None] | None = None
        self.on_gone: Callable[[], None] | None = None
        self.paused = False
        self._pauses = 0
        self._patience_s = patience_s
        self._aborted = False
        self._drained: asyncio.Future[None] | None = None
        self.status = 0
        self.headers: Headers = []
        self.body = bytearray()

    # -- what the core calls -------------------------------------------------------------------------------------------

    def abort(self) -> None:
        """Drop the connection."""
        if not self._aborted:
            self._aborted = True
            self._loop.call_soon(self.leave)

    def whole_body(self) -> bytes | None:
        """The request is read elsewhere."""
        return None

    def begin(self, status: int, headers: Headers) -> bool:
        """Begin a response, unless that can no longer be."""
        if self.disconnected or self.response_started:
            return False
        self._start(status, headers)
        return True

    def write(self, data: bytes, *, last: bool = False) -> bool:
        """Send a piece, unless that must wait."""
        if self.paused or self.disconnected or self.complete or not self.response_started:
            return False
        self._emit(data, last)
        return True

    def respond(self, status: int, headers: Headers, body: bytes) -> bool:
        """Send a whole response, unless that must wait."""
        if self.paused or self.disconnected or self.response_started:
            return False
        self._start(status, headers)
        self._emit(body, True)
        return True

    async def send(self, message: dict[str, Any]) -> None:
        """As ASGI says. Waits while the client does not read."""
        if self.paused and not self.disconnected:
            if self._drained is None:
                self._drained = self._loop.create_future()
            await asyncio.shield(self._drained)
        if self.disconnected:
            return
        if message["type"] == "http.response.start":
            assert not self.response_started, "a response began twice"
            self._start(message["status"], message["headers"])
        else:
            assert self.response_started, "a body without a response"
            assert not self.complete, "a body after its end"
            self._emit(message.get("body", b""), not message.get("more_body", False))

    def _start(self, status: int, headers: Headers) -> None:
        self.response_started = True
        self.status, self.headers = status, headers

    def _emit(self, data: bytes, last: bool) -> None:
        if not self._aborted and (data or last):  # a dropped connection takes bytes and sends none
            self._may_write(data, last)
            self.body += data
        self.complete = last

    # -- acts of the schedule ------------------------------------------------------------------------------------------

    def leave(self) -> None:
        """The connection is lost."""
        if self.disconnected:
            return
        self.disconnected = True
        self._wake()
        on_gone, self.on_gone = self.on_gone, None
        if on_gone is not None and not self.complete:
            on_gone()

    def pause(self) -> None:
        """The client stops reading, and what may wait for it is full."""
        self.paused = True
        self._pauses += 1
        self._loop.call_later(self._patience_s, self._given_up, self._pauses)

    def _given_up(self, pause: int) -> None:
        """As the gateway's connection does with a client that takes nothing for too long."""
        if self.paused and pause == self._pauses:
            self.abort()

    def resume(self) -> None:
        """It reads again."""
        self.paused = False
        self._wake()

    def _wake(self) -> None:
        drained, self._drained = self._drained, None
        if drained is not None and not drained.done():
            drained.set_result(None)
