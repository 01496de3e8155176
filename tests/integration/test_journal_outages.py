"""The flusher under kill -9, and while Postgres or Redis are gone: nothing is lost and nothing comes twice."""

from __future__ import annotations

import asyncio
import functools
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import migrations
from metering.keys import SHARDS
from metering.ledger import AccountRef
from storage.database import connect
from storage.redis_client import RedisError
from tests.support.journal_entries import arrived, settle_fields, sums
from tests.support.postgres import (
    PostgresServer,
)
from tests.support.redis_server import RedisServer
from tests.support.stack import Stack, eventually, open_stack, uuid7

ROOT = Path(__file__).parents[2]
UNBALANCED = "SELECT count(*) FROM (SELECT 1 FROM posting GROUP BY shard, ep, n HAVING sum(amount) <> 0) AS uneven"


class Loop:
    """A flusher in its own process."""

    def __init__(self, stack: Stack) -> None:
        script = str(ROOT / "tests" / "support" / "flush_loop.py")
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"import runpy; runpy.run_path({script!r}, run_name='__main__')",
             stack.redis_url, stack.database_url],
            cwd=ROOT, stdout=subprocess.PIPE,
        )  # fmt: skip

    async def flushing(self) -> None:
        assert self._process.stdout is not None
        assert await asyncio.to_thread(self._process.stdout.readline) == b"flushing\n"

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


async def append_many(stack: Stack, charges: dict[int, list[int]], count: int) -> None:
    """Give each shard `count` more entries, with random charges that are noted in `charges`."""
    calls = []
    for shard, noted in charges.items():
        for _ in range(count):
            noted.append(random.randint(1, 10**9))
            fields = settle_fields("alice", uuid7(), noted[-1])
            calls.append(stack.redis.call("XADD", SHARDS[shard].outbox, f"1-{len(noted)}", *fields))
        calls.append(stack.redis.call("HSET", SHARDS[shard].meta, "n", len(noted)))
    await asyncio.gather(*calls)


async def kill_in_turn(stack: Stack, charges: dict[int, list[int]], loops: list[Loop]) -> tuple[int, int]:
    """Twelve times: new entries, and a kill while they are moved. How many entries there are, kills that hit work."""
    total = interrupted = 0
    for step in range(12):
        victim = step % 2
        await loops[victim].flushing()
        await append_many(stack, charges, 42)
        before, total = total, total + 42 * len(charges)
        goal = random.randrange(before, total)
        deadline = time.monotonic() + 30
        while not await arrived(stack, goal):  # without a pause, so that the kill hits the next transactions
            assert time.monotonic() < deadline, "the entries did not arrive"
        loops[victim].kill()
        interrupted += not await arrived(stack, total)
        loops[victim] = Loop(stack)
    return total, interrupted


async def test_flushers_killed_at_any_moment_neither_lose_nor_double_a_row(stack: Stack) -> None:
    charges: dict[int, list[int]] = {shard: [] for shard in range(0, 128, 16)}
    loops = [Loop(stack), Loop(stack)]
    try:
        total, interrupted = await kill_in_turn(stack, charges, loops)
        await eventually(functools.partial(arrived, stack, total), within_s=30)
    finally:
        for loop in loops:
            loop.kill()
    expected = sum(sum(each) for each in charges.values())
    assert interrupted >= 4, "the flushers were too fast to be killed at work"
    assert await sums(stack) == {
        "entries": total, "sessions": total, "balance": 0, "charged": expected, "earned": expected,
        "consumed": expected, "rolled_charged": expected, "rolled_sessions": total,
    }  # fmt: skip
    assert await stack.pool.fetchval(UNBALANCED) == 0
    cursors = await stack.pool.fetch("SELECT shard, n FROM shard_cursor WHERE n > 0 ORDER BY shard")
    assert [tuple(row) for row in cursors] == [(shard, total // len(charges)) for shard in charges]


async def test_nothing_is_lost_while_postgres_is_down(tmp_path: Path) -> None:
    postgres = await asyncio.to_thread(PostgresServer, durable=True)
    await asyncio.to_thread(postgres.start)
    redis = RedisServer(tmp_path)
    redis.start()
    try:
        await migrations.upgrade(postgres.url())
        stack = await open_stack(postgres.url(), redis)
        account = await stack.account("alice")
        await stack.grant(account, "g1", 10**6)
        running = asyncio.create_task(stack.flusher().run())
        await stack.spend(account, 10, 7)
        await eventually(lambda: arrived(stack, 2))
        for how in (signal.SIGQUIT, signal.SIGINT):
            await asyncio.to_thread(postgres.stop, how)
            for _ in range(20):
                await stack.spend(account, 10, 7)
            await asyncio.to_thread(postgres.start)
        await eventually(lambda: reached(postgres, 42))
        await eventually(lambda: emptied(stack))
        running.cancel()
        await asyncio.wait([running])
        await stack.close()
    finally:
        redis.kill()
        await asyncio.to_thread(postgres.remove)


async def emptied(stack: Stack) -> bool:
    return await stack.outbox_length() == 0


async def reached(postgres: PostgresServer, entries: int) -> bool:
    connection = await connect(postgres.url())
    try:
        found: Any = await connection.fetchval("SELECT count(*) FROM entry")
        return bool(found == entries)
    finally:
        await connection.close()


async def test_a_flusher_survives_losing_redis(stack: Stack) -> None:
    account: AccountRef = await stack.account("alice")
    await stack.grant(account, "g1", 1_000)
    running = asyncio.create_task(stack.flusher().run())
    await eventually(lambda: arrived(stack, 1))
    stack.server.kill()
    stack.server.start()
    await eventually(lambda: answers(stack))
    await stack.spend(account, 100, 70)
    await eventually(lambda: arrived(stack, 2))
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert stack.alarms == []


async def answers(stack: Stack) -> bool:
    try:
        return bool(await stack.redis.call("PING") == b"PONG")
    except RedisError:
        return False
