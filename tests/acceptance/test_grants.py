"""Credit runs out by itself and is taken back while calls run, in a running gateway, from end to end."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from metering import grants
from metering.keys import SHARDS
from tests.support.credit import held, prompt
from tests.support.gateway import Gateway, Key, Stores, until
from tests.support.raw_client import ask, post

CONSUMED = """SELECT sum(amount)::bigint AS used, sum(breakage)::bigint AS expired, sum(voided)::bigint AS voided
    FROM consumption WHERE grant_id = $1"""


async def give(stores: Stores, key: Key, gid: str, micros: int, lives_ms: int | None = None) -> None:
    """A grant that is in force at once, and for so long."""
    ends = None if lives_ms is None else datetime.now(UTC) + timedelta(milliseconds=lives_ms)
    new = grants.NewGrant(gid, key.account.id, micros, priority=1, expires_at=ends)
    assert (await grants.issue(stores.pool, stores.ledger, new)).state == "applied"


async def consumed(stores: Stores, gid: str, total: int) -> tuple[int, int, int]:
    """Used, expired and voided micros of a grant in Postgres, once they add up to `total`."""

    async def whole() -> Any:
        row = await stores.pool.fetchrow(CONSUMED, gid)
        return row if sum(part or 0 for part in row) >= total else None

    row = await until(whole)
    return row["used"], row["expired"], row["voided"]


def clean(gateway: Gateway, key: Key) -> bool:
    done = gateway.tollgate("audit", "--account", key.account.id, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    return True


async def expired_micros(gateway: Gateway) -> float:
    async with httpx2.AsyncClient(verify=False) as client:
        page = (await client.get(f"{gateway.url}/metrics")).text
    families = text_string_to_metric_families(page)
    return sum(
        one.value for family in families for one in family.samples if one.name == "tollgate_expired_micros_total"
    )


async def test_unused_credit_becomes_breakage_when_its_time_is_over(gateway: Gateway) -> None:
    key = await gateway.key(1_000)
    before = await expired_micros(gateway)
    async with gateway.stores() as stores:
        gid = f"short_{key.id}"
        await give(stores, key, gid, 777, lives_ms=300)
        assert await consumed(stores, gid, 777) == (0, 777, 0)
    assert (await gateway.balance(key)).available == 1_000
    assert await until(lambda: _at_least(gateway, before + 777))
    assert clean(gateway, key)


async def _at_least(gateway: Gateway, micros: float) -> bool:
    return await expired_micros(gateway) >= micros


async def end_now(stores: Stores, key: Key, gid: str) -> None:
    """Move the end of a grant into the past, in both stores, as if its time had come."""
    at, past = SHARDS[key.account.shard], 1_700_000_000_000
    moment = datetime.fromtimestamp(past / 1_000, UTC)
    await stores.pool.execute("UPDATE grant_ SET expires_at = $2 WHERE id = $1", gid, moment)
    await stores.redis.call("HSET", at.grants + key.account.id, f"{gid}:e", past)
    await stores.redis.call("ZADD", at.expiries, past, f"{key.account.id}|{gid}")


@pytest.mark.parametrize("end", ["expiry", "revocation"])
async def test_a_stream_may_spend_what_it_holds_of_a_grant_that_ends_and_the_rest_is_gone(
    gateway: Gateway, end: str
) -> None:
    fields = ask("[[tokens=60]][[interval_ms=20]]Go on.", stream=True, max_tokens=100)
    key = await gateway.key(10_000)
    cost, gid = prompt(fields) + 60, f"ends_{key.id}"
    async with gateway.stores() as stores:
        await give(stores, key, gid, 300, lives_ms=600_000)
        async with post(gateway, key, fields) as call:
            await held(stores, key)
            if end == "revocation":
                assert gateway.tollgate("grants", "revoke", gid).returncode == 0
            else:
                await end_now(stores, key, gid)
            await call.head()
            await call.rest()
        await gateway.idle(key)
        lost = (300 - cost, 0) if end == "expiry" else (0, 300 - cost)
        assert await consumed(stores, gid, 300) == (cost, *lost)
        (row,) = await gateway.sessions(key, 1)
        assert (row["charged"], row["absorbed"]) == (cost, 0)
        assert (await gateway.balance(key)).available == 10_000
    assert clean(gateway, key)
