"""Many exchanges on one HTTP/2 connection: sharing, leaving, filling it, and its GOAWAY."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy.httpx_links import STREAMS_MAX, WINDOW
from proxy.transport_errors import (
    UpstreamClosed,
)
from tests.support.certificates import Certificates, make
from tests.support.h2server import H2Server
from tests.support.rawserver import both_loops, until, whole
from tests.support.ways import Provider, Served, echo, gone_at_once, provider, silent, stuck

MIB = 1024 * 1024
each_h2_way = pytest.mark.parametrize("way", ["h2", "h2-tunnel"])


@pytest.fixture(scope="module")
def certificates() -> Iterator[Certificates]:
    folder = Path(tempfile.mkdtemp(prefix="tg-ca-"))
    yield make(folder)
    shutil.rmtree(folder)


@each_h2_way
@both_loops
async def test_requests_at_once_share_one_connection(way: str, certificates: Certificates) -> None:
    async with provider(way, echo, certificates) as behind:
        bodies = [b"%d" % number * 1000 for number in range(40)]
        assert await asyncio.gather(*(whole(behind.open(body)) for body in bodies)) == bodies
        assert behind.connections == 1


@each_h2_way
@both_loops
async def test_a_full_connection_refers_requests_to_another(way: str, certificates: Certificates) -> None:
    async with provider(way, stuck, certificates, streams_max=2) as behind:
        exchanges = [behind.open() for _ in range(5)]
        assert [await exchange.read() for exchange in exchanges] == [b"ab"] * 5
        assert behind.connections == 3
        for exchange in exchanges:
            exchange.release()
        await gone_at_once(behind)


@each_h2_way
@both_loops
async def test_streams_left_with_unread_bytes_cost_the_connection_nothing(way: str, certificates: Certificates) -> None:
    """More than the connection's window of 16 MiB is thrown away, on more streams than it has at once."""

    async def much(served: Served) -> None:
        await served.head()
        if served.body == b"small":
            await served.data(b"small")
            await served.end()
        else:
            await served.data(b"x" * WINDOW * 2)

    async with provider(way, much, certificates) as behind:
        rounds = 17 * MIB // WINDOW
        keeper = behind.open()
        assert await keeper.read()
        for begin in range(0, rounds, 50):
            exchanges = [behind.open() for _ in range(min(50, rounds - begin))]
            for exchange in exchanges:
                exchange.pause()
                await exchange.head()
            await _have_sent(behind, begin + len(exchanges))
            assert await whole(behind.open(b"small")) == b"small"  # it has read all that came before it
            for exchange in exchanges:
                exchange.release()
        assert rounds > STREAMS_MAX
        assert await whole(behind.open(b"small")) == b"small"
        assert behind.connections == 1
        keeper.release()


async def _have_sent(behind: Provider, count: int) -> None:
    """Until so many streams have sent as much as they may."""
    assert isinstance(behind.server, H2Server)
    streams = behind.server.streams
    await until(lambda: sum(stream.sent >= WINDOW for stream in streams) >= count)


@each_h2_way
@both_loops
async def test_cancelling_while_requests_are_written_harms_no_neighbour(way: str, certificates: Certificates) -> None:
    async with provider(way, echo, certificates) as behind:
        for turn in range(5):
            exchanges = [behind.open(b"%d" % number * 60_000) for number in range(20)]
            for number, exchange in enumerate(exchanges):
                if number % 3 == 1:
                    for _ in range(turn * number):
                        await asyncio.sleep(0)
                    exchange.abort()
            rest = [number for number in range(20) if number % 3 != 1]
            answers = await asyncio.gather(*(whole(exchanges[number]) for number in rest))
            assert answers == [b"%d" % number * 60_000 for number in rest]
        assert behind.connections == 1


@pytest.mark.parametrize("close", [False, True])
@each_h2_way
@both_loops
async def test_a_goaway_before_the_request_costs_only_another_connection(
    way: str, close: bool, certificates: Certificates
) -> None:
    async with provider(way, echo, certificates) as behind:
        assert isinstance(behind.server, H2Server)
        assert await whole(behind.open(b"one")) == b"one"
        behind.server.peers[0].goaway(1, close=close)
        inner = behind.pool.links.connections[0]
        await until(lambda: vars(inner)["_wire"].pending or vars(inner)["_wire"].ended)
        assert await whole(behind.open(b"two")) == b"two"
        assert [stream.body for stream in behind.server.streams] == [b"one", b"two"]
        assert behind.connections == 2


@each_h2_way
@both_loops
async def test_a_goaway_after_the_request_fails_it_and_nothing_is_sent_twice(
    way: str, certificates: Certificates
) -> None:
    async with provider(way, silent, certificates) as behind:
        assert isinstance(behind.server, H2Server)
        server = behind.server
        exchange = behind.open()
        await until(lambda: bool(server.streams) and server.streams[0].arrived.is_set())
        server.peers[0].goaway(0)
        with pytest.raises(UpstreamClosed) as caught:
            await exchange.head()
        assert caught.value.sent
        exchange.release()
        assert len(server.streams) == 1
        assert behind.connections == 1


@each_h2_way
@both_loops
async def test_a_goaway_lets_the_streams_before_it_end(way: str, certificates: Certificates) -> None:
    go = asyncio.Event()

    async def slow(served: Served) -> None:
        await served.head()
        await served.data(b"a")
        await go.wait()
        await served.data(b"b")
        await served.end()

    async with provider(way, slow, certificates) as behind:
        assert isinstance(behind.server, H2Server)
        exchange = behind.open()
        assert await exchange.read() == b"a"
        behind.server.peers[0].goaway(1)
        go.set()
        assert await whole(exchange) == b"b"
        await asyncio.wait_for(behind.server.peers[0].gone.wait(), 15)
        assert await whole(behind.open()) == b"ab"
        assert behind.connections == 2
