"""Exchanges over HTTP/2, through a forward proxy, and both: the transport's behaviours, whatever carries the bytes."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy.exchange import Exchange
from proxy.http_request import Origin
from proxy.httpx_exchange import HttpxPool
from proxy.httpx_links import WINDOW
from proxy.transport import TransportLimits
from proxy.transport_errors import (
    ExchangeAborted,
    UpstreamClosed,
    UpstreamProtocolError,
    UpstreamTimeout,
)
from tests.support.certificates import Certificates, make
from tests.support.h2server import H2Server, H2Stream
from tests.support.rawserver import both_loops, collect, until, whole
from tests.support.ways import (
    AT_ONCE_S,
    WAYS,
    Provider,
    Served,
    echo,
    gone_at_once,
    provider,
    seconds,
    silent,
    stuck,
)

MIB = 1024 * 1024
H2_WAYS = [way for way in WAYS if way.startswith("h2")]
each_way = pytest.mark.parametrize("way", WAYS)


@pytest.fixture(scope="module")
def certificates() -> Iterator[Certificates]:
    folder = Path(tempfile.mkdtemp(prefix="tg-ca-"))
    yield make(folder)
    shutil.rmtree(folder)


@each_way
@both_loops
async def test_whole_answers_pass_through_and_share_a_connection(way: str, certificates: Certificates) -> None:
    async with provider(way, echo, certificates) as behind:
        for body in (b"{}", b"x" * 300_000, b'{"a":1}'):
            exchange = behind.open(body)
            await exchange.head()
            assert exchange.status == 200
            assert (b"content-type", b"text/event-stream") in exchange.headers
            assert await whole(exchange) == body
            assert exchange.complete
            assert exchange.sent
        assert behind.connections == 1


@each_way
@both_loops
async def test_the_provider_gets_our_headers_and_nothing_else(way: str, certificates: Certificates) -> None:
    seen: list[object] = []

    async def note(served: Served) -> None:
        seen.append(served)
        await echo(served)

    async with provider(way, note, certificates) as behind:
        await whole(behind.open(b"12345", own=((b"x-request-id", b"r1"),)))
        port = behind.server.port
        served = seen[0]
        if isinstance(served, H2Stream):
            names = {name: value for name, value in served.headers if not name.startswith(b":")}
            pseudo = dict(served.headers)
            names[b"host"] = pseudo[b":authority"]
            assert (pseudo[b":method"], pseudo[b":path"]) == (b"POST", b"/v1/x")
        else:
            lines = vars(served)["raw"].split(b"\r\n")
            assert lines[0] == b"POST /v1/x HTTP/1.1"
            names = dict(line.lower().split(b": ", 1) for line in lines[1:])
            names[b"authorization"] = names[b"authorization"].replace(b"bearer", b"Bearer")
        assert names == {
            b"host": b"127.0.0.1:%d" % port,
            b"accept-encoding": b"identity",
            b"authorization": b"Bearer k",
            b"x-request-id": b"r1",
            b"content-length": b"5",
        }
        if behind.proxy is not None:
            wanted = f"http://127.0.0.1:{port}/v1/x" if way == "forward" else f"127.0.0.1:{port}"
            assert behind.proxy.targets == [wanted]


@each_way
@both_loops
async def test_a_stream_arrives_part_by_part_in_the_callback(way: str, certificates: Certificates) -> None:
    go = asyncio.Event()

    async def slow(served: Served) -> None:
        await served.head()
        await served.data(b"one")
        await go.wait()
        await served.data(b"two")
        await served.end()

    async with provider(way, slow, certificates) as behind:
        exchange = behind.open()
        assert await exchange.read() == b"one"
        got: list[bytes] = []
        over = asyncio.Event()

        def arrived(each: Exchange) -> None:
            got.append(each.take())
            if each.complete:
                over.set()

        exchange.on_data = arrived
        go.set()
        await asyncio.wait_for(over.wait(), 15)
        assert b"".join(got) == b"two"
        exchange.release()


@each_way
@both_loops
async def test_leaving_while_waiting_for_the_head_closes_the_upstream_at_once(
    way: str, certificates: Certificates
) -> None:
    async with provider(way, silent, certificates) as behind:
        exchange = behind.open()
        waiting = asyncio.create_task(exchange.head())
        await until(lambda: exchange.sent and bool(behind.connections) and _requested(behind))
        exchange.abort()
        await gone_at_once(behind)
        with pytest.raises(ExchangeAborted) as caught:
            await waiting
        assert caught.value.sent


def _requested(behind: Provider) -> bool:
    server = behind.server
    return bool(server.streams if isinstance(server, H2Server) else server.requests)


@pytest.mark.parametrize("how", ["release", "cancel", "abort"])
@each_way
@both_loops
async def test_leaving_in_the_body_closes_the_upstream_at_once(way: str, how: str, certificates: Certificates) -> None:
    async with provider(way, stuck, certificates) as behind:
        exchange = behind.open()
        assert await exchange.read() == b"ab"
        if how == "cancel":
            waiting = asyncio.create_task(exchange.read())
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait({waiting})
            assert waiting.cancelled()
        elif how == "abort":
            exchange.abort(KeyError("ours"))
            with pytest.raises(KeyError):
                await exchange.read()
        exchange.release()
        await gone_at_once(behind)
        if isinstance(behind.server, H2Server):
            assert behind.server.streams[0].reset_code == 8  # CANCEL
            assert not behind.server.peers[0].gone.is_set()


@pytest.mark.parametrize("way", ["tunnel", "h2-tunnel", "forward"])
@both_loops
async def test_leaving_while_the_proxy_is_silent_closes_the_connection_at_once(
    way: str, certificates: Certificates
) -> None:
    async with provider(way, echo, certificates) as behind:
        assert behind.proxy is not None
        behind.proxy.silent = True
        exchange = behind.open()
        await until(lambda: bool(behind.proxy and behind.proxy.targets))
        exchange.release()
        began = asyncio.get_running_loop().time()
        await until(lambda: bool(behind.proxy and behind.proxy.open == 0))
        assert asyncio.get_running_loop().time() - began < AT_ONCE_S
        behind.proxy.silent = False
        assert await whole(behind.open(b"again")) == b"again"


@pytest.mark.parametrize("way", ["tunnel", "h2", "h2-tunnel"])
@both_loops
async def test_leaving_in_the_tls_handshake_closes_the_connection_at_once(way: str, certificates: Certificates) -> None:
    seen: list[asyncio.StreamReader] = []
    closed = asyncio.Event()

    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(reader)
        while await reader.read(65536):
            pass
        closed.set()
        writer.close()

    listener = await asyncio.start_server(mute, "127.0.0.1", 0)
    async with provider(way, echo, certificates) as behind:
        port = listener.sockets[0].getsockname()[1]
        behind.pool = HttpxPool(
            Origin("https", "127.0.0.1", port),
            TransportLimits(),
            http2=True,
            proxy=vars(behind.pool.links)["_way"].proxy,
            ssl_context=certificates.client(),
        )
        exchange = behind.open()
        await until(lambda: bool(seen))
        exchange.release()
        await asyncio.wait_for(closed.wait(), AT_ONCE_S)
        assert not exchange.sent
        await behind.pool.aclose()
    listener.close()


@each_way
@both_loops
async def test_time_limits_by_phase(way: str, certificates: Certificates) -> None:
    async with provider(way, silent, certificates, deadlines=seconds(head=0.2)) as behind:
        await _times_out(behind, "head", "head", sent=True)
    async with provider(way, stuck, certificates, deadlines=seconds(idle=0.2)) as behind:
        await _times_out(behind, "idle", "body", sent=True)
    async with provider(way, stuck, certificates, deadlines=seconds(total=0.3)) as behind:
        await _times_out(behind, "total", "body", sent=True)


@pytest.mark.parametrize("way", ["tunnel", "h2-tunnel"])
@both_loops
async def test_a_silent_proxy_reaches_the_connect_limit(way: str, certificates: Certificates) -> None:
    async with provider(way, echo, certificates, deadlines=seconds(connect=0.2)) as behind:
        assert behind.proxy is not None
        behind.proxy.silent = True
        await _times_out(behind, "connect", "connect", sent=False)


async def _times_out(behind: Provider, bound: str, phase: str, *, sent: bool) -> None:
    exchange = behind.open()
    with pytest.raises(UpstreamTimeout) as caught:
        await collect(exchange, [])
    assert (caught.value.bound, caught.value.phase, caught.value.sent) == (bound, phase, sent)
    exchange.release()


@each_way
@both_loops
async def test_a_truncated_stream_is_named_after_what_came_before_it(way: str, certificates: Certificates) -> None:
    async def cuts(served: Served) -> None:
        await served.head()
        await served.data(b"ab")
        await asyncio.sleep(0)
        await served.cut()

    async with provider(way, cuts, certificates) as behind:
        exchange = behind.open()
        assert await exchange.read() == b"ab"
        with pytest.raises(UpstreamClosed) as caught:
            await exchange.read()
        assert caught.value.sent
        assert caught.value.phase == "body"
        assert not exchange.complete
        exchange.release()


@each_way
@both_loops
async def test_what_is_not_http_is_a_protocol_error(way: str, certificates: Certificates) -> None:
    async def rubbish(served: Served) -> None:
        await served.garbage()
        await asyncio.Event().wait()

    async with provider(way, rubbish, certificates) as behind:
        exchange = behind.open()
        with pytest.raises(UpstreamProtocolError) as caught:
            await exchange.head()
        assert "rubbish" not in str(caught.value)
        exchange.release()


@each_way
@both_loops
async def test_a_slow_reader_stops_the_upstream_and_loses_nothing(way: str, certificates: Certificates) -> None:
    total, piece = (16 if way in H2_WAYS else 64) * MIB, b"x" * 65536  # the kernel holds much between two hops
    streams: list[Served] = []

    async def flood(served: Served) -> None:
        if served.body == b"small":
            await echo(served)
            return
        streams.append(served)
        await served.head()
        for _ in range(total // len(piece)):
            await served.data(piece)
        await served.end()

    async with provider(way, flood, certificates) as behind:
        exchange = behind.open()
        await exchange.head()
        sent, same = -1, 0
        while same < 10:
            await asyncio.sleep(0.02)
            same = same + 1 if streams[0].sent == sent else 0
            sent = streams[0].sent
        bound = TransportLimits().read_buffer_max
        assert sum(map(len, exchange.chunks)) <= 2 * bound
        assert sent < total // 2
        if way in H2_WAYS:
            assert sent <= 2 * bound + 2 * WINDOW
        assert await whole(behind.open(b"small")) == b"small"  # its neighbour is served meanwhile
        if way in H2_WAYS:
            assert behind.connections == 1
        assert len(await whole(exchange)) == total


@both_loops
async def test_requests_beyond_the_connections_wait_until_the_connect_limit(certificates: Certificates) -> None:
    limits = TransportLimits(connections_max=1)
    async with provider("tunnel", stuck, certificates, limits=limits, deadlines=seconds(connect=0.3)) as behind:
        first = behind.open()
        assert await first.read() == b"ab"
        await _times_out(behind, "connect", "connect", sent=False)
        first.release()
        second = behind.open()
        assert await second.read() == b"ab"
        second.release()


@each_way
@both_loops
async def test_closing_the_pool_ends_everything(way: str, certificates: Certificates) -> None:
    async with provider(way, stuck, certificates) as behind:
        running = behind.open()
        assert await running.read() == b"ab"
        await behind.pool.aclose()
        with pytest.raises(ExchangeAborted):
            await running.read()
        with pytest.raises(ExchangeAborted):
            await behind.open().head()
        assert behind.pool.links.connections == []
