"""The upstream transport behind httpx2's API, for everything that is not on the hot path.

Must not: follow redirects, decode, keep cookies or read proxy settings (that is the client's part), or be used where
HTTP/2 or a proxy is configured: httpx2's own transport serves those.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx2

from proxy.exchange import Exchange
from proxy.http_request import Origin, build_request
from proxy.transport import Transport
from proxy.transport_errors import (
    ConnectFailed,
    TransportError,
    UpstreamClosed,
    UpstreamProtocolError,
    UpstreamTimeout,
)

_OURS = frozenset((b"host", b"content-length", b"transfer-encoding"))
"""Written from the URL and the body; a differing Host of the caller's is not passed on."""


class PooledTransport(httpx2.AsyncBaseTransport):
    """`httpx2.AsyncClient(transport=PooledTransport(transport))`. The request's body is read whole before it is sent.

    `request.extensions["timeout"]` (seconds): `connect`, and `read` for the response's head and for the gap between
    body bytes; None or absent keeps the transport's own limits, `pool` and `write` have no meaning here. The exchange
    itself is `response.extensions["exchange"]`.
    """

    def __init__(self, transport: Transport) -> None:
        """The transport is closed with the client."""
        self._transport = transport

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Raises httpx2's transport exceptions."""
        origin = _origin(request)
        headers = [pair for pair in request.headers.raw if pair[0].lower() not in _OURS]
        try:
            raw = build_request(
                request.method.encode("ascii"), request.url.raw_path, origin, (), await request.aread(), headers
            )
        except ValueError as error:
            raise httpx2.LocalProtocolError(str(error), request=request) from error
        timeout: Mapping[str, float | None] = request.extensions.get("timeout", {})
        read = _milliseconds(timeout.get("read"))
        connect = _milliseconds(timeout.get("connect"))
        deadlines = self._transport.deadlines_with(connect_ms=connect, head_ms=read, idle_ms=read)
        exchange = self._transport.open(origin, raw, deadlines)
        try:
            await exchange.head()
        except TransportError as error:
            raise _mapped(error, request) from error
        extensions: dict[str, Any] = {"exchange": exchange, "http_version": b"HTTP/1.1"}
        body = ExchangeStream(exchange, request)
        return httpx2.Response(exchange.status, headers=exchange.headers, stream=body, extensions=extensions)

    async def aclose(self) -> None:
        await self._transport.aclose()


class ExchangeStream(httpx2.AsyncByteStream):
    """A response's body; closing it early closes the connection."""

    def __init__(self, exchange: Exchange, request: httpx2.Request) -> None:
        self._exchange = exchange
        self._request = request

    async def __aiter__(self) -> AsyncIterator[bytes]:
        read = self._exchange.read
        try:
            while data := await read():
                yield data
        except TransportError as error:
            raise _mapped(error, self._request) from error

    async def aclose(self) -> None:
        self._exchange.release()


def _origin(request: httpx2.Request) -> Origin:
    url = request.url
    if url.scheme not in ("http", "https"):
        raise httpx2.UnsupportedProtocol(f"the scheme '{url.scheme}' is not http or https", request=request)
    try:
        return Origin(url.scheme, url.raw_host.decode("ascii").strip("[]"), url.port or (443, 80)[url.scheme == "http"])
    except ValueError as error:
        raise httpx2.LocalProtocolError(str(error), request=request) from error


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else max(1, round(seconds * 1000))


def _mapped(error: TransportError, request: httpx2.Request) -> httpx2.TransportError:
    kind: type[httpx2.TransportError]
    if isinstance(error, ConnectFailed):
        kind = httpx2.ConnectError
    elif isinstance(error, UpstreamTimeout):
        kind = httpx2.ConnectTimeout if error.bound == "connect" else httpx2.ReadTimeout
    elif isinstance(error, UpstreamClosed | UpstreamProtocolError):
        kind = httpx2.RemoteProtocolError
    else:
        kind = httpx2.ReadError
    return kind(str(error), request=request)
