"""`tollgate audit`: silent while the books agree, and loud about a single micro in either store, naming the account.

Every change made here is taken back, and the audit is silent again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from metering.keys import SHARDS
from tests.support.gateway import Gateway, Key, running
from tests.support.outages import ask, audited, bearer, outage_config, streams


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway whose books may be tampered with."""
    with running(tmp_path_factory.mktemp("audit"), outage_config(lease_ms=6_000, margin_ms=2_000)) as gateway:
        yield gateway


@pytest.fixture
async def key(gateway: Gateway) -> Key:
    """A key with two finished sessions, which have arrived in Postgres."""
    key = await gateway.key()
    async with httpx2.AsyncClient(verify=False, base_url=gateway.url, headers=bearer(key), timeout=20) as client:
        for _ in range(2):
            assert (await client.post("/v1/chat/completions", json=ask(10, stream=False))).status_code == 200
    await gateway.sessions(key, 2)
    return key


def differences(gateway: Gateway) -> list[dict[str, Any]]:
    """What the audit says is wrong; fails when it finds nothing."""
    done = gateway.audit()
    assert done.returncode == 1, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] is False
    found: list[dict[str, Any]] = report["differences"]
    return found


async def change_postgres(gateway: Gateway, statement: str, account: str) -> None:
    """Run one statement as superuser, past the triggers that protect the journal; it must change one row."""
    async with gateway.stores() as stores, stores.pool.acquire() as connection, connection.transaction():
        await connection.execute("SET LOCAL session_replication_role = replica")
        assert await connection.execute(statement, account) == "UPDATE 1", statement


FIRST = "(SELECT {} FROM entry WHERE account_id = $1 AND sid IS NOT NULL ORDER BY n LIMIT 1)"
MICRO = "UPDATE {} SET {} = {} {} 1 WHERE {}"
IN_POSTGRES = {
    "a posting": ("posting", "amount", f"(shard, ep, n) = {FIRST.format('shard, ep, n')} AND leg = 0"),
    "a session's charge": ("session", "charged", f"account_id = $1 AND sid = {FIRST.format('sid')}"),
    "a session's absorbed part": ("session", "absorbed", f"account_id = $1 AND sid = {FIRST.format('sid')}"),
    "a consumption": ("consumption", "amount", f"(shard, ep, n) = {FIRST.format('shard, ep, n')}"),
    "a grant": ("grant_", "amount", "account_id = $1"),
    "a usage sum": ("usage_rollup", "charged", "account_id = $1"),
}
IN_REDIS = ("av", "hd", "db", "tc", "ns")


@pytest.mark.parametrize("where", IN_POSTGRES)
async def test_one_micro_changed_in_postgres_is_found_and_named(gateway: Gateway, key: Key, where: str) -> None:
    table, column, rows = IN_POSTGRES[where]
    audited(gateway)
    await change_postgres(gateway, MICRO.format(table, column, column, "+", rows), key.account.id)
    try:
        found = differences(gateway)
    finally:
        await change_postgres(gateway, MICRO.format(table, column, column, "-", rows), key.account.id)
    assert {one["account"] for one in found} == {key.account.id}
    audited(gateway)


@pytest.mark.parametrize("column", IN_REDIS)
async def test_one_micro_changed_in_redis_is_found_and_named(gateway: Gateway, key: Key, column: str) -> None:
    account = SHARDS[key.account.shard].account + key.account.id
    audited(gateway)
    async with gateway.stores() as stores:
        await stores.redis.call("HINCRBY", account, column, 1)
        try:
            found = differences(gateway)
        finally:
            await stores.redis.call("HINCRBY", account, column, -1)
    assert {one["account"] for one in found} == {key.account.id}
    audited(gateway)


async def test_one_micro_moved_between_two_accounts_is_found_at_both(gateway: Gateway, key: Key) -> None:
    other = await gateway.key()
    moves = [(SHARDS[one.account.shard].account + one.account.id, sign) for one, sign in ((key, 1), (other, -1))]
    async with gateway.stores() as stores:
        for account, sign in moves:
            await stores.redis.call("HINCRBY", account, "av", sign)
        try:
            found = differences(gateway)
        finally:
            for account, sign in moves:
                await stores.redis.call("HINCRBY", account, "av", -sign)
    assert {one["account"] for one in found} == {key.account.id, other.account.id}
    assert {one["micros"] for one in found} == {1}
    audited(gateway)


async def test_the_audit_of_a_named_account_finds_its_difference_and_prints_it_for_people(
    gateway: Gateway, key: Key
) -> None:
    account = SHARDS[key.account.shard].account + key.account.id
    async with gateway.stores() as stores:
        await stores.redis.call("HINCRBY", account, "tc", 1)
        try:
            done = gateway.tollgate("audit", "--account", key.account.id)
        finally:
            await stores.redis.call("HINCRBY", account, "tc", -1)
    assert done.returncode == 1
    assert key.account.id in done.stdout.replace("\n", "")
    assert "Traceback" not in done.stdout + done.stderr


async def test_the_audit_agrees_while_streams_run_and_credit_is_held(gateway: Gateway, key: Key) -> None:
    async with streams(gateway, key, 3, tokens=400, interval_ms=5) as made:
        for stream in made:
            await stream.flowing(20)
        assert (await gateway.balance(key)).held > 0
        audited(gateway)
        for stream in made:
            await stream.ended()
            assert stream.whole
    await gateway.sessions(key, 5)
    audited(gateway)
