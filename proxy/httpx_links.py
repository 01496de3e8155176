"""Connections of httpx2's engine (httpcore2) to a provider: over HTTP/2, through a proxy, or both; and their pool.

Must not: be imported before a provider needs it; know routes or deadlines; write a request twice.

What the engine lacks for long paid streams is added here, in few places, each held by a test that fails when the engine
changes under it: a stream that is left is reset and its unread bytes returned to the connection's window; a stream may
not have more than `WINDOW` bytes on their way to a slow reader, so that it never starves its neighbours; a GOAWAY ends
only streams that the server will not serve; a full connection refers further requests to another; and what was
cancelled while connecting is closed.
"""

from __future__ import annotations

import asyncio
import base64
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
import httpcore2

from config.proxy_url import ProxyAddress
from proxy.httpx_wire import Wire

STREAMS_MAX = 100
"""Requests on one HTTP/2 connection (the server may allow fewer): the engine's own bound."""
WINDOW = 128 * 1024
"""Bytes of one HTTP/2 stream that may be under way; 100 such streams fit into the connection's 16 MiB."""
_H2_WINDOW = 65_535
"""What a stream begins with (RFC 9113 6.9.2)."""


@dataclass(frozen=True, slots=True)
class Way:
    """How a provider is reached. `context` has its ALPN set; `keepalive` in seconds, `buffer_max` in bytes."""

    http2: bool
    proxy: ProxyAddress | None
    context: ssl.SSLContext
    keepalive: float
    buffer_max: int


class LinkPool(httpcore2.AsyncConnectionPool):
    """The engine's pool over our connections."""

    def __init__(self, way: Way, connections_max: int | None, idle_max: int) -> None:
        super().__init__(
            max_connections=connections_max, max_keepalive_connections=idle_max, keepalive_expiry=way.keepalive
        )
        self._way = way

    def create_connection(self, origin: httpcore2.Origin) -> httpcore2.AsyncConnectionInterface:
        return Link(origin, self._way)


class Link(httpcore2.AsyncConnectionInterface):
    """A connection that is made by its first request; the others that may share it wait for that."""

    def __init__(self, origin: httpcore2.Origin, way: Way) -> None:
        self._origin = origin
        self._way = way
        self._tls = origin.scheme == b"https"
        self._inner: Http2 | httpcore2.AsyncHTTP11Connection | None = None
        self._wire: Wire | None = None
        self._failed = False
        self._waiting = 0
        self._lock = asyncio.Lock()

    async def handle_async_request(self, request: httpcore2.Request) -> httpcore2.Response:
        inner = self._inner or await self._connected()
        request.extensions["wire"] = self._wire
        if self._way.proxy is not None and not self._tls:
            return await self._forwarded(inner, _through(self._way.proxy, request))
        return await inner.handle_async_request(request)

    async def _forwarded(
        self, inner: Http2 | httpcore2.AsyncHTTP11Connection, request: httpcore2.Request
    ) -> httpcore2.Response:
        response = await inner.handle_async_request(request)
        if response.status == 407:  # the proxy's own, not the provider's
            await response.aclose()
            raise httpcore2.ProxyError("the proxy answered 407")
        return response

    async def _connected(self) -> Http2 | httpcore2.AsyncHTTP11Connection:
        self._waiting += 1
        try:
            async with self._lock:
                if self._failed:
                    raise httpcore2.ConnectionNotAvailable
                if self._inner is None:
                    try:
                        self._inner = await self._connect()
                    except BaseException:
                        self._failed = True
                        raise
                return self._inner
        finally:
            self._waiting -= 1

    async def _connect(self) -> Http2 | httpcore2.AsyncHTTP11Connection:
        way, origin = self._way, self._origin
        self._wire = wire = Wire(way.buffer_max)
        host = origin.host.decode("ascii")
        try:
            if way.proxy is None:
                await wire.connect(host, origin.port, way.context if self._tls else None)
            else:
                await wire.connect(way.proxy.host, way.proxy.port, None)
                if self._tls:
                    await _tunnel(wire, way.proxy, origin)
                    await wire.start_tls(way.context, host)
        except BaseException as error:
            await wire.aclose()
            if isinstance(error, OSError | UnicodeError):
                raise httpcore2.ConnectError(_reason(error)) from error
            raise
        if wire.protocol == "h2" or (way.http2 and not self._tls):
            return Http2(origin, wire, way.keepalive)
        if way.proxy is not None and not self._tls:
            origin = _proxy_url(way.proxy, b"/").origin
        return httpcore2.AsyncHTTP11Connection(origin, wire, keepalive_expiry=way.keepalive)

    async def aclose(self) -> None:
        if self._inner is not None:
            await self._inner.aclose()

    def info(self) -> str:
        return "connecting" if self._inner is None else self._inner.info()

    def can_handle_request(self, origin: httpcore2.Origin) -> bool:
        return origin == self._origin

    def is_connected(self) -> bool:
        return self._inner is not None and not self._inner.is_closed()

    def is_available(self) -> bool:
        if self._inner is None:
            return self._way.http2 and not self._failed and self._waiting < STREAMS_MAX
        return self._inner.is_available()

    def has_expired(self) -> bool:
        return self._failed if self._inner is None else self._inner.has_expired()

    def is_idle(self) -> bool:
        return self._failed if self._inner is None else self._inner.is_idle()

    def is_closed(self) -> bool:
        return self._failed if self._inner is None else self._inner.is_closed()

    def can_multiplex(self) -> bool:
        return self._inner is not None and self._inner.can_multiplex()


class Windows(h2.connection.H2Connection):
    """HTTP/2's state with a small window for each stream, and a GOAWAY that lets the streams before it run on."""

    def __init__(self, farewell: Callable[[int], list[Any]], config: h2.config.H2Configuration) -> None:
        """`farewell` is given the last stream that the server will serve; its events are passed on."""
        super().__init__(config=config)
        self._farewell = farewell

    def increment_flow_control_window(self, increment: int, stream_id: int | None = None) -> None:
        if stream_id is not None:
            increment = WINDOW - _H2_WINDOW
        super().increment_flow_control_window(increment, stream_id)

    def _receive_goaway_frame(self, frame: Any) -> tuple[list[Any], list[Any]]:
        return [], self._farewell(frame.last_stream_id)


class Http2(httpcore2.AsyncHTTP2Connection):
    """The engine's HTTP/2 connection, with the additions named above."""

    def __init__(self, origin: httpcore2.Origin, wire: Wire, keepalive: float) -> None:
        super().__init__(origin=origin, stream=wire, keepalive_expiry=keepalive)
        self._wire = wire
        self._h2_state = Windows(self._goes_away, self.CONFIG)
        self._entering = 0
        self._open: set[int] = set()
        self._settled = asyncio.Event()
        """The server's settings are known, or the first request is not waiting for them any more."""
        self._last: int | None = None
        """The last stream that the server serves, once it has said so."""

    async def handle_async_request(self, request: httpcore2.Request) -> httpcore2.Response:
        await self._admit(request)
        self._entering += 1
        try:
            response = await super().handle_async_request(request)
            self._open.add(response.extensions["stream_id"])
        finally:
            self._entering -= 1
            self._settled.set()
        return response

    async def _admit(self, request: httpcore2.Request) -> None:
        """Before anything is sent: raises ConnectionNotAvailable, and the pool takes another connection."""
        if self._entering and not self._settled.is_set():
            await self._settled.wait()
        try:
            # What came while nobody was here to read.
            while self._sent_connection_init and self.is_idle() and self._wire.pending:
                async with self._read_lock:
                    if self._wire.pending:
                        await self._receive_events(request)
                await self._write_outgoing_data(request)
        except (httpcore2.ProtocolError, httpcore2.NetworkError):
            self._connection_error = True
        if not self.is_available():
            await self._close_when_done()
            raise httpcore2.ConnectionNotAvailable

    def is_available(self) -> bool:
        if self._last is not None or self._wire.ended or not super().is_available():
            return False
        most = min(self._h2_state.remote_settings.max_concurrent_streams, STREAMS_MAX)
        return self._entering + len(self._open) < most

    def has_expired(self) -> bool:
        return self._wire.ended or super().has_expired()

    async def _receive_remote_settings_change(self, event: h2.events.RemoteSettingsChanged) -> None:
        await super()._receive_remote_settings_change(event)
        self._settled.set()

    async def _receive_events(self, request: httpcore2.Request, stream_id: int | None = None) -> None:
        try:
            await super()._receive_events(request, stream_id)
        except h2.exceptions.ProtocolError as error:
            self._connection_error = True
            self._read_exception = failed = httpcore2.RemoteProtocolError(type(error).__name__)
            self._wire.send(self._h2_state.data_to_send())
            raise failed from error

    async def _response_closed(self, stream_id: int) -> None:
        self._open.discard(stream_id)
        self._give_back(stream_id)
        await super()._response_closed(stream_id)
        await self._close_when_done()

    def _give_back(self, stream_id: int) -> None:
        """Reset a stream that is not over; what it brought and nobody read goes back to the connection's window."""
        state = self._h2_state
        unread = [event for event in self._events.get(stream_id, ()) if isinstance(event, h2.events.DataReceived)]
        stream = state.streams.get(stream_id)
        try:
            if unread:
                state.acknowledge_received_data(sum(event.flow_controlled_length or 0 for event in unread), stream_id)
            if stream is not None and not stream.closed:
                state.reset_stream(stream_id, h2.errors.ErrorCodes.CANCEL)
        except h2.exceptions.ProtocolError:
            return  # the whole connection is closed
        self._wire.send(state.data_to_send())

    async def _close_when_done(self) -> None:
        """A connection that takes no more requests ends with its last stream."""
        over = self._last is not None or self._wire.ended or self._connection_error
        if over and not self._events and not self.is_closed():
            await self.aclose()

    def _goes_away(self, last: int) -> list[h2.events.StreamReset]:
        self._last = last
        self._settled.set()
        refused = h2.errors.ErrorCodes.REFUSED_STREAM
        return [h2.events.StreamReset(stream_id=each, error_code=refused) for each in self._events if each > last]


async def _tunnel(wire: Wire, proxy: ProxyAddress, origin: httpcore2.Origin) -> None:
    """CONNECT. Raises ProxyError, NetworkError or ProtocolError."""
    host = b"[%b]" % origin.host if b":" in origin.host else origin.host
    target = b"%b:%d" % (host, origin.port)
    url = _proxy_url(proxy, target)
    request = httpcore2.Request(b"CONNECT", url, headers=[(b"host", target), *_authorization(proxy)])
    response = await httpcore2.AsyncHTTP11Connection(url.origin, wire).handle_async_request(request)
    if not 200 <= response.status < 300:
        raise httpcore2.ProxyError(f"the proxy answered {response.status}")
    if wire.pending:
        raise httpcore2.ProxyError("the proxy sent bytes of its own into the tunnel")


def _through(proxy: ProxyAddress, request: httpcore2.Request) -> httpcore2.Request:
    """The request in the form that a proxy passes on: the whole URL as its target."""
    authority = next(value for name, value in request.headers if name == b"host")
    url = _proxy_url(proxy, b"http://%b%b" % (authority, request.url.target))
    headers = [*request.headers, *_authorization(proxy)]
    return httpcore2.Request(
        request.method, url, headers=headers, content=request.stream, extensions=request.extensions
    )


def _proxy_url(proxy: ProxyAddress, target: bytes) -> httpcore2.URL:
    return httpcore2.URL(scheme=b"http", host=proxy.host.encode("ascii"), port=proxy.port, target=target)


def _authorization(proxy: ProxyAddress) -> list[tuple[bytes, bytes]]:
    if proxy.user_password is None:
        return []
    return [(b"proxy-authorization", b"Basic " + base64.b64encode(proxy.user_password))]


def _reason(error: OSError | UnicodeError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate is not trusted: {error.verify_message}"
    return str(getattr(error, "strerror", None) or error) or type(error).__name__
