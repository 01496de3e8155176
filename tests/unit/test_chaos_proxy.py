"""The fault proxy on loopback: every byte passes in order, and each way of spoiling a link does what it says."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import pytest

from loadtests.chaos.proxy import Link, Toxic

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
WITHIN_S = 5.0


class Echo:
    """A server that says back what it hears, and remembers it."""

    def __init__(self) -> None:
        self.heard = b""
        self.ended = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                self.heard += data
                writer.write(data)
                await writer.drain()
        self.ended.set()
        writer.close()


@contextlib.asynccontextmanager
async def linked() -> AsyncIterator[tuple[Echo, Link]]:
    """An echo behind a link."""
    echo = Echo()
    server = await asyncio.start_server(echo.serve, "127.0.0.1", 0)
    link = Link("test", server.sockets[0].getsockname()[1])
    await link.start()
    try:
        yield echo, link
    finally:
        await link.aclose()
        server.close()
        await server.wait_closed()


@contextlib.asynccontextmanager
async def client(link: Link) -> AsyncIterator[Streams]:
    """A connection through it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def said(streams: Streams, data: bytes) -> bytes:
    """What comes back, as long as it is what was sent."""
    streams[1].write(data)
    async with asyncio.timeout(WITHIN_S):
        return await streams[0].readexactly(len(data))


async def ended(streams: Streams) -> bytes:
    """What comes until the connection ends, by FIN or RST."""
    async with asyncio.timeout(WITHIN_S):
        try:
            return await streams[0].read(-1)
        except ConnectionResetError:
            return b"reset"


async def test_a_sound_link_passes_every_byte_in_order_and_both_ends() -> None:
    async with linked() as (echo, link), client(link) as streams:
        data = bytes(range(256)) * 4_000
        streams[1].write(data)
        streams[1].write_eof()
        assert await ended(streams) == data == echo.heard
        assert echo.ended.is_set()


async def test_latency_holds_each_direction_back() -> None:
    async with linked() as (_, link), client(link) as streams:
        link.spoil(Toxic(up_s=0.1, down_s=0.1))
        began = time.monotonic()
        assert await said(streams, b"hello") == b"hello"
        assert time.monotonic() - began >= 0.198  # the loop's timers are of a millisecond
        assert link.counts["delayed"] == 2


async def test_a_stalled_link_moves_nothing_until_it_is_calm() -> None:
    async with linked() as (echo, link), client(link) as streams:
        assert await said(streams, b"one") == b"one"
        link.spoil(Toxic(stalled=True))
        answer = asyncio.create_task(said(streams, b"two"))
        async with asyncio.timeout(WITHIN_S):
            while not link.counts["stalled"]:
                await asyncio.sleep(0)
        assert echo.heard == b"one"
        link.calm()
        assert await answer == b"two"


async def test_lost_replies_are_lost_after_the_server_has_heard_and_the_connection_does_not_survive_it() -> None:
    async with linked() as (echo, link), client(link) as streams:
        link.spoil(Toxic(lose_replies=True))
        streams[1].write(b"charge")
        async with asyncio.timeout(WITHIN_S):
            while not link.counts["replies lost"]:
                await asyncio.sleep(0)
        assert echo.heard == b"charge"
        link.calm()
        assert await ended(streams) == b"reset"
        async with client(link) as again:
            assert await said(again, b"again") == b"again"


@pytest.mark.parametrize(("reset", "seen"), [(False, b""), (True, b"reset")])
async def test_open_connections_are_cut_by_fin_or_rst(reset: bool, seen: bytes) -> None:
    async with linked() as (echo, link), client(link) as streams:
        assert await said(streams, b"hello") == b"hello"
        assert link.cut(reset=reset) == 1
        assert await ended(streams) == seen
        async with asyncio.timeout(WITHIN_S):
            await echo.ended.wait()


async def test_a_half_close_lets_the_answer_come() -> None:
    async with linked() as (echo, link), client(link) as streams:
        assert await said(streams, b"hello") == b"hello"
        assert link.half_close("server") == 1
        async with asyncio.timeout(WITHIN_S):
            await echo.ended.wait()
        assert await ended(streams) == b""


async def test_a_drip_brings_everything_slowly() -> None:
    async with linked() as (_, link), client(link) as streams:
        link.spoil(Toxic(drip_bytes=10, drip_s=0.005))
        began = time.monotonic()
        assert await said(streams, b"x" * 200) == b"x" * 200
        assert time.monotonic() - began >= 0.048


async def test_a_refusing_link_resets_new_connections() -> None:
    async with linked() as (_, link):
        link.spoil(Toxic(refuse=True))
        async with client(link) as streams:
            assert await ended(streams) == b"reset"
        assert link.counts["refused"] == 1


async def test_what_was_sent_before_its_sender_left_is_still_delivered() -> None:
    async with linked() as (echo, link):
        async with client(link) as streams:
            assert await said(streams, b"hello ") == b"hello "
            assert link.spoil_open(Toxic(up_s=0.3)) == 1
            streams[1].write(b"reserve")
            async with asyncio.timeout(WITHIN_S):
                while not link.counts["delayed"]:
                    await asyncio.sleep(0)
            streams[1].transport.abort()
        assert echo.heard == b"hello "
        async with asyncio.timeout(WITHIN_S):
            await echo.ended.wait()
        assert echo.heard == b"hello reserve"


async def test_a_link_to_nobody_resets() -> None:
    link = Link("nobody", 1)
    await link.start()
    try:
        async with client(link) as streams:
            assert await ended(streams) == b"reset"
    finally:
        await link.aclose()
