"""uvicorn's HTTP protocol with what a gateway needs of it: bounds on the request head, one answer for each request, and
a way to drop a client.

Must not: know a path or a key. Requests are parsed as httptools parses them, but for two things: an offer to change the
protocol is ignored (RFC 9110, 7.8), and fields behind a chunked body are not taken for the request's headers (6.5.1).
"""

from __future__ import annotations

import asyncio
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

import httptools
import msgspec
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.errors import error_object
from gateway.http_cycle import Cycle
from proxy import telemetry
from proxy.errors import InvalidBody
from proxy.ids import request_id

HEAD_BYTES_MAX = 64 * 1024
HEADERS_MAX = 200
WRITE_GRACE_S = 0.5
SWEEP_S = 1.0
PIPELINE_MAX = 16
"""Requests of a connection that may wait behind the one that runs, of those that one read brought."""
BEHIND_BYTES_MAX = 64 * 1024
"""Bytes behind a running request above which the connection is not read, until it is answered."""


USUAL_BYTES_MAX = 128
"""Request targets up to this length are read once for all requests."""
_ASGI: Any = {"version": "3.0", "spec_version": "2.3"}


class HeadTooLarge(Exception):
    """A request's head is above the bound."""


class TooManyWaiting(Exception):
    """More requests were sent behind one that runs than may wait."""


class Tunnel(Exception):
    """CONNECT: what follows it would be no HTTP."""


class BoundedProtocol(HttpToolsProtocol):
    """A connection that is closed when its head is too slow or too large, and after a request that was answered
    before its body had come: what still comes of it is thrown away, for `header_ms` at most."""

    header_ms = 15_000
    write_ms = 60_000
    _write_timer: asyncio.TimerHandle | None = None
    _timer: asyncio.TimerHandle | None = None
    cycle: Cycle  # None before the first request
    _running: Cycle | None = None
    _behind: bytearray
    """What came behind a running request and is not parsed."""
    _head_bytes = 0
    _head_due = True
    """Whether fields belong to a request's head, and not to what follows its body."""
    _head_open = False
    """Whether a head has begun and not ended."""
    _idle: IdleConnections
    _unread_bytes = 0
    """Received since the parser last told anything."""

    def data_received(self, data: bytes) -> None:
        if self._busy():
            self._behind += data
            if len(self._behind) > BEHIND_BYTES_MAX:
                self.flow.pause_reading()
        else:
            self._receive(data)

    def _busy(self) -> bool:
        """Whether a request runs that has come whole: what comes then is the next one's and waits as bytes. Reading
        goes on, within a bound, because the client's end must be seen."""
        running = self._running
        return (
            running is not None
            and not running.response_complete
            and (running is not self.cycle or not running.more_body)
        )

    def _receive(self, data: bytes) -> None:
        self._idle.discard(self)
        if self._unread_bytes > HEAD_BYTES_MAX:  # an endless field, chunk extension or trailer: the parser gathers it
            self.send_400_response("")
            return
        self._unread_bytes += len(data)
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self.send_400_response("")
        if self._timer is None and not self._busy() and (self._head_open or self._between()):
            self._close_later()  # also when no request began with these bytes: line ends may come before one

    def _feed(self, data: bytes | memoryview) -> None:
        """Parse. The parser drops the body of a request that offers to change the protocol, so the head of such a
        request goes through a fresh parser without its Upgrade fields; body and all checks are then as always."""
        while True:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as stop:
                head, data = self._head_without_upgrade(), memoryview(data)[stop.args[0] :]
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            self.parser.feed_data(head)

    def _head_without_upgrade(self) -> bytes:
        version = self.parser.get_http_version().encode()
        fields = (b"%b: %b\r\n" % field for field in self.headers if field[0] != b"upgrade")
        return b"%b %b HTTP/%b\r\n%b\r\n" % (self.parser.get_method(), self.url, version, b"".join(fields))

    def _between(self) -> bool:
        """Whether a request was answered and nothing of the next one has come."""
        cycle = self.cycle
        return cycle is not None and cycle.response_complete and not cycle.more_body

    def connection_made(self, transport: Any) -> None:
        self._behind = bytearray()
        super().connection_made(transport)
        self._close_later()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_write_timer()
        super().connection_lost(exc)
        self._idle.discard(self)
        self._behind.clear()
        for waiting, _ in self.pipeline:
            waiting.part()  # type: ignore[attr-defined]  # all are ours
        self.pipeline.clear()
        running = self._running
        if running is not None and not running.response_complete:
            running.disconnected = True  # the one above it knows only the newest, which may wait behind this one
            running.set()
            running.gone()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writes()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():  # else the rest must go out in time too
            self._stop_write_timer()

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= PIPELINE_MAX:
            raise TooManyWaiting
        self.url = b""
        self.expect_100_continue = False
        self.headers = []
        self._head_bytes = self._unread_bytes = 0
        self._head_due = self._head_open = True

    def on_url(self, url: bytes) -> None:
        self._head_bytes += len(url)
        self._unread_bytes = 0
        if self._head_bytes > HEAD_BYTES_MAX:
            raise HeadTooLarge
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value)
        self._unread_bytes = 0
        if self._head_bytes > HEAD_BYTES_MAX or len(self.headers) > HEADERS_MAX:
            raise HeadTooLarge  # the parser stops here; an aborted transport would let it go on to the handler
        if self._head_due:
            name = name.lower()
            if name == b"expect" and value.lower() == b"100-continue":
                self.expect_100_continue = True
            self.headers.append((name, value))

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._running = cycle
        cycle.task = task = self.loop.create_task(cycle.run_asgi(app))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def on_body(self, body: bytes) -> None:
        """As in uvicorn, which asks for an upgrade each time."""
        self._unread_bytes = 0
        cycle = self.cycle
        if cycle.response_complete:
            return
        cycle.body += body
        if len(cycle.body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        cycle.news = True
        if cycle.waiting is not None:
            cycle.set()

    def on_chunk_header(self) -> None:
        self._unread_bytes = 0

    def on_headers_complete(self) -> None:
        self._unread_bytes = 0
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise Tunnel
            return  # comes again, see _feed
        self._stop_timer()
        self._head_due = self._head_open = False
        if not self.transport.is_closing():  # else a request behind the one that ended the connection
            self._begin()

    def _begin(self) -> None:
        """A request's head is whole: as in uvicorn, but with a cycle of ours."""
        parser, before = self.parser, self.cycle
        version = parser.get_http_version()
        path, raw_path, query = (_usual_target if len(self.url) <= USUAL_BYTES_MAX else _target)(self.url)
        state = self.app_state.copy()
        self.scope = {
            "type": "http",
            "asgi": _ASGI,
            "http_version": version,
            "method": parser.get_method().decode("ascii"),
            "server": self.server,
            "client": self.client,
            "scheme": self.scheme,  # type: ignore[typeddict-item]
            "root_path": self.root_path,
            "path": path,
            "raw_path": raw_path,
            "query_string": query,
            "headers": self.headers,
            "state": state,
        }
        self.cycle = cycle = Cycle(self, keep_alive=version != "1.0" and parser.should_keep_alive())
        state["connection"] = cycle
        if before is None or before.response_complete:
            self._start_asgi_task(cycle, self.app)
        else:
            self.pipeline.appendleft((cycle, self.app))

    def on_message_complete(self) -> None:
        self._unread_bytes = 0
        if self.parser.should_upgrade():
            return
        cycle = self.cycle
        if cycle.response_complete:
            if cycle.more_body:  # answered early
                self.close()
            return
        cycle.more_body = False
        cycle.news = True
        if cycle.waiting is not None:
            cycle.set()

    def on_response_complete(self) -> None:
        """As in uvicorn, but an idle connection costs no timer of its own."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        else:
            self._idle.add(self)
        if self._behind and not self._busy():
            behind, self._behind = bytes(self._behind), bytearray()
            self._receive(behind)
        if self._timer is None and (self._answered_early() or (self._head_open and not self._busy())):
            self._close_later()

    def close(self) -> None:
        """Close when what waits has gone out, which the client must let happen in time."""
        if self._write_timer is None and self.transport.get_write_buffer_size():
            self._watch_writes()
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Bytes that are no HTTP are answered in the form of all errors, and never into or after another answer."""
        if self.transport.is_closing():
            return
        cycle = self.cycle
        between = cycle is None or (cycle.response_complete and not cycle.more_body)
        if between or (cycle.more_body and not cycle.response_started and not self.pipeline):
            self.transport.write(_refusal())
        self.close()

    def _answered_early(self) -> bool:
        return self.cycle.response_complete and self.cycle.more_body

    def _close_later(self) -> None:
        self._timer = self.loop.call_later(self.header_ms / 1000, self._too_slow)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _watch_writes(self) -> None:
        """A client that reads nothing of what waits for it is dropped: also after the last write of an answer, when no
        session is left that could notice. A little later than the session's own bound, which names the ending."""
        waiting = self.transport.get_write_buffer_size()
        self._write_timer = self.loop.call_later(self.write_ms / 1000 + WRITE_GRACE_S, self._read_nothing, waiting)

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _read_nothing(self, waiting: int) -> None:
        if self.transport.get_write_buffer_size() >= waiting:
            self.transport.abort()
        else:
            self._watch_writes()

    def _too_slow(self) -> None:
        self._timer = None
        self.close()


class IdleConnections:
    """Connections that wait for their next request, the longest first; one timer closes those that wait too long."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._since: dict[BoundedProtocol, float] = {}
        self._sweeping = False

    def add(self, connection: BoundedProtocol) -> None:
        """An answer is complete; the connection may be closed after the time, to the second."""
        self._since[connection] = connection.loop.time()
        if not self._sweeping:
            self._sweeping = True
            connection.loop.call_later(SWEEP_S, self._sweep, connection.loop)

    def discard(self, connection: BoundedProtocol) -> None:
        """Something has come, or the connection is lost."""
        self._since.pop(connection, None)

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        horizon = loop.time() - self._seconds
        while self._since:
            connection, since = next(iter(self._since.items()))
            if since > horizon:
                break
            del self._since[connection]
            connection.close()
        self._sweeping = bool(self._since)
        if self._sweeping:
            loop.call_later(SWEEP_S, self._sweep, loop)


def _target(url: bytes) -> tuple[str, bytes, bytes]:
    """The path, the path as sent and the query of a request's target. Raises httptools.HttpParserInvalidURLError."""
    parsed = httptools.parse_url(url)
    path = parsed.path.decode("ascii")
    return unquote(path) if "%" in path else path, parsed.path, parsed.query or b""


_usual_target = lru_cache(maxsize=256)(_target)


def protocol(header_ms: int, write_ms: int, keep_alive_s: float) -> type[BoundedProtocol]:
    """The protocol class for one worker; a client has `header_ms` to send a request's head, `write_ms` to take
    something of what waits for it, and `keep_alive_s` to begin the next request."""
    bounds = {"header_ms": header_ms, "write_ms": write_ms, "_idle": IdleConnections(keep_alive_s)}
    return type("WorkerProtocol", (BoundedProtocol,), bounds)


def _refusal() -> bytes:
    """The answer to what is no HTTP, whole."""
    telemetry.REQUESTS.labels(400, "").inc()
    body = msgspec.json.encode({"error": error_object(InvalidBody("The request is not valid HTTP/1.1."))})
    return (
        b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n"
        b"content-length: %d\r\nx-request-id: %b\r\n\r\n%b" % (len(body), request_id().encode(), body)
    )
