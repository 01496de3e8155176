"""What a run left in the stores and in the providers' logs, read past every link; and whether it has drained.

Must not: judge what it reads (`check` does), or wait longer than it was told to.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Sequence
from typing import Any

import asyncpg  # type: ignore[import-untyped]
import redis.asyncio
from redis.exceptions import RedisError

from loadtests.chaos.check import AccountState, GrantState, metadata_of
from loadtests.chaos.servers import ChaosError
from loadtests.chaos.world import Account, World, until
from metering.keys import SHARDS

DRAIN_S = 30.0
LOG_S = 10.0
OUT_OF_ORDER = (OSError, TimeoutError, RedisError, asyncpg.PostgresError, asyncpg.InterfaceError)
_SESSIONS = """SELECT s.sid, s.account_id, s.outcome, s.source, s.metadata, c.sid IS NOT NULL AS corrected,
    s.charged + coalesce(c.charged, 0) AS charged, s.absorbed + coalesce(c.absorbed, 0) AS absorbed,
    extract(epoch FROM s.ended_at)::float8 AS ended_s FROM session s LEFT JOIN correction c ON c.sid = s.sid
    WHERE s.account_id = ANY($1::text[]) AND s.started_at >= to_timestamp($2::float8)"""
_CHARGED = """SELECT coalesce(sum(charged), 0)::bigint AS charged FROM (
    SELECT charged FROM session WHERE account_id = $1
    UNION ALL SELECT charged FROM correction WHERE account_id = $1) AS every"""
_EXPIRED = """SELECT coalesce(sum(breakage), 0)::bigint AS expired FROM consumption
    WHERE grant_id IN (SELECT id FROM grant_ WHERE account_id = $1)"""
_GRANTS = """SELECT g.id, g.amount, coalesce(g.expires_at <= now(), false) AS over, coalesce(c.consumed, 0) AS consumed,
    coalesce(c.expired, 0) AS expired, coalesce(c.voided, 0) AS voided FROM grant_ g LEFT JOIN (
        SELECT grant_id, sum(amount)::bigint AS consumed, sum(breakage)::bigint AS expired,
            sum(voided)::bigint AS voided FROM consumption GROUP BY grant_id
    ) c ON c.grant_id = g.id WHERE g.account_id = $1"""
_ISSUED = "SELECT coalesce(sum(amount), 0)::bigint AS issued FROM grant_ WHERE account_id = $1"


async def waiting(world: World) -> dict[str, int]:
    """What has not come to rest: leases, and entries that Postgres has not got. Empty: drained."""
    store = world.redis()
    async with contextlib.aclosing(store), store.pipeline(transaction=False) as pipeline:
        for shard in SHARDS:
            pipeline.zcard(shard.leases)
            pipeline.xlen(shard.outbox)
        found = await pipeline.execute()
    counted = {"leases": sum(found[::2]), "outbox entries": sum(found[1::2])}
    return {what: number for what, number in counted.items() if number}


async def drained(world: World, seconds: float = DRAIN_S) -> tuple[float, str]:
    """Wait until nothing waits: how long that took, and what still waits ('' when nothing does)."""
    began, left = time.monotonic(), "the stores do not answer"
    while time.monotonic() - began < seconds:
        with contextlib.suppress(*OUT_OF_ORDER):
            rest = await waiting(world)
            left = ", ".join(f"{number} {what}" for what, number in rest.items())
            if not left:
                break
        await asyncio.sleep(0.1)
    return time.monotonic() - began, left


async def sessions(world: World, accounts: Sequence[Account], since: float) -> list[dict[str, Any]]:
    """The accounts' finished sessions that began at `since` (epoch seconds) or later."""
    return await world.fetch(_SESSIONS, [account.id for account in accounts], since)


async def served(world: World, rows: Sequence[dict[str, Any]], since: float) -> list[dict[str, Any]]:
    """The providers' log lines since then, once every session that cost something has one."""
    wanted = {metadata_of(row).get("request_id") for row in rows if row["charged"]}

    def read() -> list[dict[str, Any]]:
        found = []
        for provider in world.providers:
            with provider.log.open(encoding="utf-8") as file:
                entries = (json.loads(line) for line in file if line.endswith("\n"))
                found += [entry for entry in entries if entry["started_ms"] >= since * 1000]
        return found

    async def complete() -> bool:
        entries = await asyncio.to_thread(read)
        return wanted <= {entry["request_id"] for entry in entries}

    with contextlib.suppress(ChaosError):  # what is missing becomes a finding
        await until(complete, LOG_S, "the providers' logs")
    return [entry for entry in await asyncio.to_thread(read) if entry["method"] == "POST"]


async def account_states(world: World, accounts: Sequence[Account]) -> list[AccountState]:
    """Every account as both stores have it."""
    store = world.redis()
    async with contextlib.aclosing(store):
        return [await _state(world, store, account) for account in accounts]


def _word(given: str | bytes) -> str:
    return given.decode() if isinstance(given, bytes) else given


async def _state(world: World, store: redis.asyncio.Redis, account: Account) -> AccountState:
    names = ("av", "hd", "ns", "db", "tc")
    values = await store.hmget(account.shard.account + account.id, list(names))
    number = dict(zip(names, (int(value or 0) for value in values), strict=True))
    grants = await store.hgetall(account.shard.grants + account.id)
    consumed = sum(int(value) for name, value in grants.items() if _word(name).endswith(":c"))
    (issued,), (charged,) = await world.fetch(_ISSUED, account.id), await world.fetch(_CHARGED, account.id)
    (expired,) = await world.fetch(_EXPIRED, account.id)
    return AccountState(
        name=account.name,
        issued=issued["issued"],
        available=number["av"],
        held=number["hd"],
        open_sessions=number["ns"],
        debt=number["db"],
        charged=number["tc"],
        consumed=consumed,
        charged_rows=charged["charged"],
        expired_rows=expired["expired"],
    )


async def grant_states(world: World, accounts: Sequence[Account]) -> list[GrantState]:
    """Every grant of the accounts as both stores have it."""
    store = world.redis()
    found = []
    async with contextlib.aclosing(store):
        for account in accounts:
            flat = await store.hgetall(account.shard.grants + account.id)
            fields = {_word(name): int(value) for name, value in flat.items()}
            rows = await world.fetch(_GRANTS, account.id)
            found += [_grant_state(row, fields) for row in rows]
    return found


def _grant_state(row: dict[str, Any], fields: dict[str, int]) -> GrantState:
    issued, available, held, consumed, expired, voided = (fields.get(f"{row['id']}:{name}", 0) for name in "iahcxv")
    return GrantState(
        row["id"], issued, available, held, consumed, expired, voided, row["amount"], row["consumed"], row["expired"],
        row["voided"], row["over"],
    )  # fmt: skip
