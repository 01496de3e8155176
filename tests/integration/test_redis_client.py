"""The hot Redis connection against a real server: order, cancellation, time-outs, kills, freezes, log-in."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import uvloop

from storage.redis_client import RedisClient, RedisReplyError, RedisUnavailable
from storage.redis_connection import Address
from tests.support.loops import ClosingLoop
from tests.support.ports import free_port
from tests.support.redis_server import RedisServer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tg-", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
def server(folder: Path) -> Iterator[RedisServer]:
    running = RedisServer(folder, appendonly=True)
    running.start()
    yield running
    running.kill()


@contextlib.asynccontextmanager
async def connected(
    url: str, *, call_ms: int = 2_000, connect_ms: int = 2_000, pending_max: int = 10_000
) -> AsyncIterator[RedisClient]:
    client = RedisClient(url, call_ms=call_ms, connect_ms=connect_ms, pending_max=pending_max)
    await client.start()
    try:
        yield client
    finally:
        await client.aclose()


async def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.005)


async def test_replies_match_their_calls(server: RedisServer) -> None:
    async with connected(server.url) as client:
        values = await asyncio.gather(*(client.call("ECHO", f"v{i}") for i in range(2_000)))
        assert values == [f"v{i}".encode() for i in range(2_000)]
        assert await client.call("SET", b"\x00k", 7) == b"OK"
        assert await client.call("INCRBY", b"\x00k", 5) == 12
        assert await client.call("GET", "missing") is None
        assert await client.call("MGET", b"\x00k", "missing") == [b"12", None]


async def test_commands_of_one_turn_leave_in_one_write(server: RedisServer) -> None:
    async with connected(server.url) as client:
        before = await _reads_processed(client)
        await asyncio.gather(*(client.call("PING") for _ in range(200)))
        assert await _reads_processed(client) - before <= 6


async def _reads_processed(client: RedisClient) -> int:
    info = await client.call("INFO", "stats")
    return int(info.split(b"total_reads_processed:")[1].split(b"\r\n")[0])


async def test_an_error_reply_reaches_only_its_caller(server: RedisServer) -> None:
    async with connected(server.url) as client:
        await client.call("SET", "text", "x")
        answers = await asyncio.gather(
            client.call("GET", "text"), client.call("LPUSH", "text", "y"), client.call("EVALSHA", "0" * 40, 0),
            client.call("GET", "text"), return_exceptions=True,
        )  # fmt: skip
        assert answers[0] == answers[3] == b"x"
        assert isinstance(answers[1], RedisReplyError)
        assert answers[1].code == "WRONGTYPE"
        assert isinstance(answers[2], RedisReplyError)
        assert answers[2].code == "NOSCRIPT"


async def test_a_thousand_cancelled_calls_cross_no_reply(server: RedisServer) -> None:
    async with connected(server.url) as client:

        async def echo(number: int) -> bytes:
            return bytes(await client.call("ECHO", f"tag-{number}"))

        tasks = [asyncio.create_task(echo(i)) for i in range(2_000)]
        for index, task in enumerate(tasks):
            if index % 40 == 0:
                await asyncio.sleep(0)  # so that some are cancelled unsent, some in flight, some answered
            if index % 2:
                task.cancel()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        survivors = {i: answer for i, answer in enumerate(answers) if not isinstance(answer, asyncio.CancelledError)}
        assert len(survivors) >= 1_000
        assert survivors == {i: f"tag-{i}".encode() for i in survivors}
        assert await client.call("ECHO", "after") == b"after"


async def test_late_replies_after_a_time_out_go_to_nobody(server: RedisServer) -> None:
    async with connected(server.url, call_ms=300) as client:
        server.signal(signal.SIGSTOP)
        started = time.monotonic()
        late = await asyncio.gather(*(client.call("ECHO", f"late-{i}") for i in range(50)), return_exceptions=True)
        waited = time.monotonic() - started
        server.signal(signal.SIGCONT)
        assert all(isinstance(answer, RedisUnavailable) and answer.sent for answer in late)
        assert 0.3 <= waited < 0.55
        assert client.connected, "a freeze shorter than the bound keeps the connection"
        values = await asyncio.gather(*(client.call("ECHO", f"fresh-{i}") for i in range(50)))
        assert values == [f"fresh-{i}".encode() for i in range(50)]
        server.signal(signal.SIGSTOP)
        again = await asyncio.gather(*(client.call("ECHO", i) for i in range(9)), return_exceptions=True)
        server.signal(signal.SIGCONT)
        assert all("within 0.3 s" in str(answer) for answer in again), "the second freeze is timed like the first"
        assert client.connected


async def test_a_server_that_accepts_and_stays_silent_does_not_count_as_connected(server: RedisServer) -> None:
    server.signal(signal.SIGSTOP)
    client = RedisClient(server.url, call_ms=2_000, connect_ms=200, pending_max=9)
    with pytest.raises(RedisUnavailable, match="no answer"):
        await client.start()
    server.signal(signal.SIGCONT)


async def test_a_frozen_server_is_dropped_and_found_again(server: RedisServer) -> None:
    async with connected(server.url, call_ms=100, connect_ms=200) as client:
        server.signal(signal.SIGSTOP)
        with pytest.raises(RedisUnavailable):
            await client.call("PING")
        await until(lambda: not client.connected)
        with pytest.raises(RedisUnavailable) as refused:
            await client.call("PING")
        assert not refused.value.sent, "the greeting's PING keeps a frozen server from counting as connected"
        server.signal(signal.SIGCONT)
        await until(lambda: client.connected)
        assert await client.call("ECHO", "again") == b"again"


async def test_a_killed_server_fails_calls_at_once_and_is_found_after_its_restart(server: RedisServer) -> None:
    async with connected(server.url, call_ms=5_000) as client:
        await client.call("SET", "kept", "1")
        await client.call("WAITAOF", 1, 0, 5_000)
        server.signal(signal.SIGSTOP)
        pending = [asyncio.ensure_future(client.call("ECHO", f"lost-{i}")) for i in range(20)]
        await asyncio.sleep(0)
        server.kill()
        lost = await asyncio.gather(*pending, return_exceptions=True)
        assert all(isinstance(answer, RedisUnavailable) and answer.sent for answer in lost)
        with pytest.raises(RedisUnavailable) as refused:
            await client.call("PING")
        assert not refused.value.sent
        server.start()
        await until(lambda: client.connected)
        assert await client.call("GET", "kept") == b"1"


async def test_pending_calls_are_bounded(server: RedisServer) -> None:
    async with connected(server.url, pending_max=10) as client:
        answers = await asyncio.gather(*(client.call("ECHO", i) for i in range(15)), return_exceptions=True)
        assert answers[:10] == [str(i).encode() for i in range(10)]
        assert all(isinstance(answer, RedisUnavailable) and not answer.sent for answer in answers[10:])
        assert await client.call("ECHO", "free") == b"free"


def test_a_blocked_loop_does_not_turn_received_replies_into_time_outs(server: RedisServer) -> None:
    """Under uvloop, which runs due timers after a slow socket callback and before it reads the other sockets."""

    async def scenario() -> bytes:
        ours, theirs = socket.socketpair()
        async with connected(server.url, call_ms=100) as client:
            loop = asyncio.get_running_loop()

            def be_slow() -> None:
                ours.recv(1)
                time.sleep(0.15)

            loop.add_reader(ours, be_slow)
            await client.call("CLIENT", "PAUSE", 30, "ALL")
            call = asyncio.ensure_future(client.call("ECHO", "patient"))
            theirs.send(b"x")
            try:
                return bytes(await call)
            finally:
                loop.remove_reader(ours)
                ours.close()
                theirs.close()

    assert uvloop.run(scenario(), loop_factory=ClosingLoop) == b"patient"


LEFT_OPEN = """
import sys
import uvloop
from storage.redis_client import RedisClient
from tests.support.loops import ClosingLoop

async def scenario():
    client = RedisClient(sys.argv[1], call_ms=500, connect_ms=500, pending_max=9)
    await client.start()
    await client.subscribe("news", print)
    raise ValueError("before aclose")

uvloop.run(scenario(), loop_factory=ClosingLoop)
"""


@pytest.mark.parametrize("warnings", ["error", "ignore"])
def test_a_client_that_an_error_left_open_does_not_keep_the_loop_from_closing(
    server: RedisServer, warnings: str
) -> None:
    command = [sys.executable, "-W", f"{warnings}::ResourceWarning", "-c", LEFT_OPEN, server.url]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=20)
    assert ended.returncode == 1
    assert "ValueError: before aclose" in ended.stderr
    assert ("ResourceWarning: unclosed resource <UnixTransport" in ended.stderr) == (warnings == "error")


async def test_closing_ends_every_pending_call(server: RedisServer) -> None:
    async with connected(server.url) as client:
        server.signal(signal.SIGSTOP)
        pending = [asyncio.ensure_future(client.call("PING")) for _ in range(3)]
        await asyncio.sleep(0)
        await client.aclose()
        server.signal(signal.SIGCONT)
        assert all(isinstance(x, RedisUnavailable) for x in await asyncio.gather(*pending, return_exceptions=True))
        with pytest.raises(RedisUnavailable, match="closed"):
            await client.call("PING")


async def test_password_user_and_database_come_from_the_url(folder: Path) -> None:
    port = free_port()
    server = RedisServer(folder, port=port, password="pa:ss@1")
    server.start()
    try:
        async with connected(f"redis://:pa%3Ass%401@127.0.0.1:{port}/3") as client:
            await client.call("SET", "where", "three")
            await client.call("ACL", "SETUSER", "app", "on", ">secret", "~*", "&*", "+@all")
        async with connected(f"unix://app:secret@{server.socket}?db=3") as client:
            assert await client.call("GET", "where") == b"three"
            assert await client.call("ACL", "WHOAMI") == b"app"
        async with connected(f"redis://app:secret@127.0.0.1:{port}") as client:
            assert await client.call("GET", "where") is None
        wrong = RedisClient(f"redis://:no@127.0.0.1:{port}/0", call_ms=500, connect_ms=500, pending_max=9)
        with pytest.raises(RedisReplyError) as refused:
            await wrong.start()
        assert refused.value.code == "WRONGPASS"
    finally:
        server.kill()


async def test_a_start_without_a_server_says_where_it_looked_and_not_the_password() -> None:
    client = RedisClient(f"redis://:hush@127.0.0.1:{free_port()}/0", call_ms=500, connect_ms=500, pending_max=9)
    with pytest.raises(RedisUnavailable, match=r"127\.0\.0\.1") as refused:
        await client.start()
    assert not refused.value.sent
    assert "hush" not in str(refused.value)


@pytest.mark.parametrize(
    "url", ["http://h", "redis://h:99999/0", "redis://h/zero", "unix://?db=1", "redis://[::1/0", "", "redis://:pw@h/-1"]
)
def test_an_unreadable_url_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(ValueError, match="Redis URL") as refused:
        Address.parse(url)
    assert "pw" not in str(refused.value)


async def test_a_subscription_receives_and_reconnects_and_reports_the_gap(server: RedisServer) -> None:
    async with connected(server.url) as client:
        messages: list[bytes] = []
        gaps: list[None] = []
        subscription = await client.subscribe("news", messages.append, lambda: gaps.append(None))
        assert subscription.active
        await client.call("PUBLISH", "news", "one")
        await until(lambda: messages == [b"one"])
        server.kill()
        await until(lambda: not subscription.active)
        server.start()
        await until(lambda: subscription.active and client.connected)
        await client.call("PUBLISH", "news", "two")
        await until(lambda: messages == [b"one", b"two"])
        assert len(gaps) == 2
