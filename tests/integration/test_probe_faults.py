"""Probes of providers that have no list, are slow, send too much or are away; and probes that end in the middle."""

from __future__ import annotations

import asyncio

import pytest

from providers.breaker import State
from providers.breaker_record import Reason
from proxy import probes
from proxy.http_request import Origin
from tests.support.ports import free_port
from tests.support.probing import POLICY, World, listed, once, probing, reply
from tests.support.rawserver import Peer, RawServer, answers, both_loops, until

SAYS_NOTHING = {
    "a key without the scope": reply(b'{"error":{"message":"Missing scopes: api.model.read"}}', "401 Unauthorized"),
    "forbidden from the start": reply(b"", "403 Forbidden"),
    "not found": reply(b"", "404 Not Found"),
    "no such method": reply(b"", "405 Method Not Allowed"),
    "not implemented": reply(b"", "501 Not Implemented"),
    "a redirect": reply(b"", "302 Found", "location: /elsewhere"),
    "a page": reply(b"<html>welcome</html>", "200 OK", "content-type: text/html"),
    "an error": reply(b'{"error":{"message":"no"}}'),
    "no content": b"HTTP/1.1 204 No Content\r\n\r\n",
    "compressed": reply(b"\x1f\x8b\x08\x00\x00", "200 OK", "content-encoding: gzip"),
}


@pytest.mark.parametrize("name", SAYS_NOTHING)
@both_loops
async def test_a_provider_without_a_list_is_left_as_it_is(name: str) -> None:
    world = World("a")
    server = await once(world, answers(SAYS_NOTHING[name]), "no_list")
    assert len(server.requests) == 1  # no redirect is followed: it would carry our key away
    assert (world.live.breaker.state, world.live.missing_until, world.changes) == (State.CLOSED, 0, [])


@both_loops
async def test_a_provider_without_a_list_is_asked_a_tenth_as_often() -> None:
    world, other = World("a"), World("a")
    missing = reply(b"", "404 Not Found")
    async with (
        RawServer(answers(*[missing] * 1000)) as server,
        RawServer(answers(*[listed("a")] * 1000)) as lists,
        probing(world, world.target(server.origin, every_s=0.05), other.target(lists.origin, every_s=0.05)),
    ):
        await until(lambda: world.counted("no_list") >= 2)
        assert len(lists.requests) >= 4


@both_loops
async def test_a_list_that_never_ends_is_dropped_at_the_bound() -> None:
    world = World("a")
    sent: list[Peer] = []

    async def script(peer: Peer) -> None:
        sent.append(peer)
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\n\r\n{")
        while True:
            await peer.send(b'"x":1,' * 100_000)

    await once(world, script, "no_list")
    assert sent[0].sent < 2 * probes.LIST_BYTES_MAX + 8 * 1024 * 1024  # what the kernel holds comes on top
    assert world.changes == []


@both_loops
async def test_failures_count_once_a_list_has_come_and_open_the_breaker() -> None:
    world = World("a")
    down = reply(b"{}", "500 Oops")
    async with (
        RawServer(answers(listed("a"), down, down)) as server,
        probing(world, world.target(server.origin, every_s=0.02)),
    ):
        await until(lambda: bool(world.changes))
    assert [change.reason for _, change in world.changes] == [Reason.CONSECUTIVE]


@both_loops
async def test_a_list_that_never_worked_cannot_open_a_breaker() -> None:
    world = World("a")
    async with (
        RawServer(answers(*[reply(b"{}", "500 Oops")] * 1000)) as server,
        probing(world, world.target(server.origin, every_s=0.02)),
    ):
        await until(lambda: world.counted("failed") >= 2 * POLICY.consecutive_max)
    assert (world.live.breaker.state, world.changes) == (State.CLOSED, [])


@both_loops
async def test_a_rate_limit_says_nothing() -> None:
    world = World("a")
    limited = reply(b"{}", "429 Too Many", "retry-after: 100")
    async with (
        RawServer(answers(listed("a"), *[limited] * 1000)) as server,
        probing(world, world.target(server.origin, every_s=0.02)),
    ):
        await until(lambda: world.counted("failed") >= 2 * POLICY.consecutive_max)
    assert world.changes == []


@both_loops
async def test_a_provider_that_refuses_connections_opens_its_breaker() -> None:
    world = World("a")
    async with probing(world, world.target(Origin("http", "127.0.0.1", free_port()), every_s=0.02)):
        await until(lambda: bool(world.changes))
    assert world.live.breaker.state is State.OPEN


@both_loops
async def test_a_failed_probe_keeps_a_half_open_breaker_open() -> None:
    world = World("a")
    world.open_breaker()
    async with probing(world, world.target(Origin("http", "127.0.0.1", free_port()))):
        await until(lambda: bool(world.changes))
    assert [(change.state, change.reason) for _, change in world.changes] == [(State.OPEN, Reason.PROBE)]


@both_loops
async def test_no_connection_because_of_our_own_bound_is_not_the_providers_fault() -> None:
    world = World("a")
    async with (
        RawServer(answers(listed("a"))) as server,
        probing(world, world.target(server.origin, every_s=0.02), connections_max=0),
    ):
        await until(lambda: world.counted("failed") >= 2 * POLICY.consecutive_max)
    assert world.changes == []


SLOW = {"no head": b"", "half a body": b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{"}


@pytest.mark.parametrize("name", SLOW)
@both_loops
async def test_a_slow_list_is_given_up_at_its_timeout(name: str) -> None:
    world = World("a")
    world.open_breaker()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(SLOW[name])
        await peer.until_gone()

    async with RawServer(script) as server, probing(world, world.target(server.origin, timeout_s=0.1)):
        await until(lambda: world.counted("failed") == 1)
        await until(lambda: server.peers[0].gone.is_set())
    assert world.changes == []


@both_loops
async def test_a_drip_does_not_prolong_the_timeout() -> None:
    world = World("a")

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\n\r\n[")
        while True:
            await peer.send(b" ")
            await asyncio.sleep(0.01)

    async with RawServer(script) as server, probing(world, world.target(server.origin, timeout_s=0.2)):
        await until(lambda: world.counted("failed") == 1)


@both_loops
async def test_garbage_instead_of_http_is_a_failure() -> None:
    world = World("a")
    world.open_breaker()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"\x00\x01\x02 what is this\r\n\r\n")
        await peer.until_gone()

    await once(world, script, "failed")
    assert world.changes == []


@both_loops
async def test_ending_while_a_probe_is_under_way_leaves_nothing() -> None:
    world = World("a")

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.until_gone()

    async with RawServer(script) as server:
        async with probing(world, world.target(server.origin)):
            await until(lambda: len(server.requests) == 1)
        await until(lambda: server.peers[0].gone.is_set())
    assert world.changes == []
    assert not any(world.counted(result) for result in ("ok", "refused", "failed", "no_list"))


@both_loops
async def test_a_key_that_no_header_may_have_does_not_end_the_probes() -> None:
    world = World("a", key="k\r\nx: y")
    async with RawServer(answers(listed("a"))) as server, probing(world, world.target(server.origin, every_s=0.002)):
        await until(lambda: world.counted("no_list") >= 2)
        assert server.peers == []
