"""One scripted provider behind every way that httpx2's engine serves: HTTP/2, a forward proxy, and both."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from config.proxy_url import parse
from providers.codec import UpstreamRequest
from proxy.exchange import Deadlines, Exchange
from proxy.http_request import Origin
from proxy.httpx_exchange import HttpxPool
from proxy.transport import TransportLimits
from tests.support.certificates import Certificates
from tests.support.forward_proxy import ForwardProxy
from tests.support.h2server import H2Server
from tests.support.rawserver import Peer, RawServer, until

AT_ONCE_S = 0.25
"""How soon an upstream must see that we left."""
WAYS = ("forward", "tunnel", "h2", "h2-tunnel", "h2c")


class Served(Protocol):
    """The provider's side of one request, whatever its HTTP. Sending raises ConnectionError once the client left."""

    sent: int
    body: bytes
    target: bytes

    async def head(self, status: int = 200, kind: bytes = b"text/event-stream") -> None: ...
    async def data(self, data: bytes) -> None: ...
    async def end(self) -> None: ...
    async def cut(self) -> None:
        """End it in the middle."""

    async def garbage(self) -> None:
        """Send what no HTTP has."""


class H1Served:
    """A request on an HTTP/1.1 connection."""

    def __init__(self, peer: Peer, request: bytes) -> None:
        self.peer = peer
        self.raw, _, self.body = request.partition(b"\r\n\r\n")
        self.target = request.split(b" ")[1]
        self.sent = 0

    async def head(self, status: int = 200, kind: bytes = b"text/event-stream") -> None:
        head = b"HTTP/1.1 %d X\r\ncontent-type: %b\r\ntransfer-encoding: chunked\r\n\r\n" % (status, kind)
        await self.peer.send(head)

    async def data(self, data: bytes) -> None:
        await self.peer.send(b"%x\r\n%b\r\n" % (len(data), data))
        self.sent += len(data)

    async def end(self) -> None:
        await self.peer.send(b"0\r\n\r\n")

    async def cut(self) -> None:
        self.peer.abort()

    async def garbage(self) -> None:
        await self.peer.send(b"HTTP/1.1 rubbish\r\n\r\n")


@dataclass
class Provider:
    """A provider, and the gateway's pool before it."""

    pool: HttpxPool
    server: RawServer | H2Server
    proxy: ForwardProxy | None
    deadlines: Deadlines

    def open(self, body: bytes = b"{}", *, own: tuple[tuple[bytes, bytes], ...] = ()) -> Exchange:
        headers = ((b"accept-encoding", b"identity"), (b"authorization", b"Bearer k"))
        return self.pool.open(UpstreamRequest(b"POST", b"/v1/x", headers, own, body), self.deadlines)

    @property
    def connections(self) -> int:
        """How many the provider has seen."""
        return len(self.server.peers)

    @property
    def over(self) -> bool:
        """Whether the provider knows that every client has left every request."""
        if isinstance(self.server, H2Server):
            return all(stream.gone.is_set() for stream in self.server.streams)
        return all(peer.gone.is_set() for peer in self.server.peers)


def seconds(connect: float = 20, head: float = 20, idle: float = 20, total: float = 40) -> Deadlines:
    return Deadlines(connect, head, idle, total)


@contextlib.asynccontextmanager
async def provider(
    way: str,
    script: Callable[[Served], Awaitable[None]],
    certificates: Certificates,
    *,
    deadlines: Deadlines | None = None,
    streams_max: int = 100,
    limits: TransportLimits | None = None,
    url: str | None = None,
) -> AsyncIterator[Provider]:
    """A provider reached by `way`; `url` is another proxy URL than the right one."""
    http2 = way.startswith("h2")
    tls = certificates.server("h2" if http2 else "http/1.1") if way != "forward" and way != "h2c" else None

    async def requests(peer: Peer) -> None:
        while True:
            served = H1Served(peer, await peer.request())
            await script(served)

    server: RawServer | H2Server
    server = H2Server(script, tls=tls, streams_max=streams_max) if http2 else RawServer(requests, tls=tls)
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(server)
        proxied = way in ("forward", "tunnel", "h2-tunnel")
        proxy = await stack.enter_async_context(ForwardProxy()) if proxied else None
        address = parse(url.replace("PORT", str(proxy.port)) if url else proxy.url) if proxy else None
        pool = HttpxPool(
            Origin("https" if tls else "http", "127.0.0.1", server.port),
            limits or TransportLimits(),
            http2=http2,
            proxy=address,
            ssl_context=certificates.client(),
        )
        stack.push_async_callback(pool.aclose)
        yield Provider(pool, server, proxy, deadlines or seconds())
        assert not pool.active
    assert not pool.tasks


async def echo(served: Served) -> None:
    await served.head()
    await served.data(served.body)
    await served.end()


async def stuck(served: Served) -> None:
    """A head, two bytes and then nothing."""
    await served.head()
    await served.data(b"ab")
    await asyncio.Event().wait()


async def silent(served: Served) -> None:
    await asyncio.Event().wait()


async def gone_at_once(behind: Provider) -> None:
    """The provider sees the client leave within the bound."""
    began = asyncio.get_running_loop().time()
    if isinstance(behind.server, H2Server):
        await until(lambda: behind.over)
    else:  # a script that waits does not read: look at the sockets
        peers = behind.server.peers
        await until(lambda: all(peer.reader.at_eof() or peer.reader.exception() for peer in peers))
    assert asyncio.get_running_loop().time() - began < AT_ONCE_S
