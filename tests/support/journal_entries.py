"""Outbox entries by hand, and what arrived of them in Postgres."""

from __future__ import annotations

from metering.keys import SHARDS
from tests.support.stack import Stack

COUNTS = """SELECT (SELECT count(*) FROM entry) AS entries, (SELECT count(*) FROM session) AS sessions,
    (SELECT coalesce(sum(amount), 0) FROM posting) AS balance,
    (SELECT coalesce(sum(charged), 0) FROM session) AS charged,
    (SELECT coalesce(sum(amount), 0) FROM posting WHERE ledger = 'earned') AS earned,
    (SELECT coalesce(sum(amount), 0) FROM consumption) AS consumed,
    (SELECT coalesce(sum(charged), 0) FROM usage_rollup) AS rolled_charged,
    (SELECT coalesce(sum(sessions), 0) FROM usage_rollup) AS rolled_sessions"""


def settle_fields(account: str, sid: str, charged: int) -> list[str]:
    """An outbox entry as the settle script writes it, by hand."""
    return (
        f"t settle u {account} ts 1795000000000 s {sid} k KEY o completed c {charged} ab 0 d 0 sl g1={charged} br  "
        "st 1795000000000 pc 1 m 1 pv v1 mt {}"
    ).split(" ")


async def append(stack: Stack, shard: int, n: int, fields: list[str]) -> None:
    """Put an entry into the outbox by hand, as if a script had."""
    await stack.redis.call("XADD", SHARDS[shard].outbox, f"1-{n}", *fields)
    await stack.redis.call("HSET", SHARDS[shard].meta, "n", n)


async def sums(stack: Stack) -> dict[str, int]:
    row = await stack.pool.fetchrow(COUNTS)
    return {name: int(value) for name, value in row.items()}


async def arrived(stack: Stack, entries: int) -> bool:
    return bool(await stack.pool.fetchval("SELECT count(*) FROM entry") >= entries)
