"""The ledger process audits a running gateway: one micro becomes a metric and a log line by itself, and goes again.

And what a frozen ledger shows: readiness, metrics, refusals, until recovery finds it whole.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from metering.keys import SHARDS
from metering.recovery import LOCK
from tests.support.gateway import Gateway, Key, Stores, until
from tests.support.outages import ask, bearer, readiness, ready


@pytest.fixture
async def stores(gateway: Gateway) -> AsyncIterator[Stores]:
    """The gateway's stores, for the whole test."""
    async with gateway.connected() as stores:
        yield stores


async def metric(gateway: Gateway, name: str, **labels: str) -> float:
    """One sample of /metrics; 0 before it exists."""
    async with httpx2.AsyncClient(verify=False, base_url=gateway.url, timeout=20) as client:
        page = (await client.get("/metrics")).text
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if (sample.name, sample.labels) == (name, labels):
                return sample.value
    return 0.0


async def shows(gateway: Gateway, value: float, name: str) -> bool:
    """Whether /metrics has the sample with this value."""
    return await metric(gateway, name) == value


async def ready_as(gateway: Gateway, status: int, word: str) -> bool:
    """Whether readiness answers so, with this word about Redis."""
    found, parts = await readiness(gateway)
    return (found, parts.get("redis")) == (status, word)


async def call(gateway: Gateway, key: Key) -> httpx2.Response:
    """One call without streaming."""
    async with httpx2.AsyncClient(verify=False, base_url=gateway.url, headers=bearer(key), timeout=20) as client:
        return await client.post("/v1/chat/completions", json=ask(5, stream=False))


def told(gateway: Gateway, key: Key, event: str) -> list[dict[str, Any]]:
    """The online audit's lines about the account."""
    lines = [json.loads(line) for line in gateway.log.read_text().splitlines() if f'"{event}"' in line]
    return [line for line in lines if line["event"] == event and line.get("account") == key.account.id]


async def test_one_micro_becomes_a_metric_and_a_log_line_and_goes_when_it_is_mended(
    gateway: Gateway, stores: Stores
) -> None:
    key = await gateway.key()
    figures = SHARDS[key.account.shard].account + key.account.id
    assert (await call(gateway, key)).status_code == 200
    audits = await metric(gateway, "tollgate_audited_accounts_total")
    before = await metric(gateway, "tollgate_audit_differences_total")
    await stores.redis.call("HINCRBY", figures, "tc", 1)

    async def found() -> list[dict[str, Any]]:
        assert (await call(gateway, key)).status_code == 200  # who just paid is looked at first
        return told(gateway, key, "audit difference")

    try:
        lines = await until(found, every=0.2)
        await until(lambda: metric(gateway, "tollgate_audit_differing_accounts"))
    finally:
        await stores.redis.call("HINCRBY", figures, "tc", -1)
    assert {line["what"] for line in lines} == {"I5 charged is consumption and debt", "charged", "charged (sessions)"}
    for line in lines:
        assert (line["level"], line["process"], line["difference_micros"]) == ("error", "ledger", 1)
        assert line["found"] - line["expected"] == 1
    assert await metric(gateway, "tollgate_audit_differences_total") >= before + len(lines)
    assert await metric(gateway, "tollgate_audited_accounts_total") > audits
    await until(lambda: told(gateway, key, "audit difference is gone"))
    assert await metric(gateway, "tollgate_audit_age_seconds") < 10
    assert gateway.tollgate("audit", "--account", key.account.id).returncode == 0


@contextlib.asynccontextmanager
async def nobody_recovers(stores: Stores) -> AsyncIterator[None]:
    """Recoveries wait inside the block, as they do while another instance is at one."""
    async with stores.pool.acquire() as connection:
        await connection.fetchval("SELECT pg_advisory_lock($1)", LOCK)
        try:
            yield
        finally:
            await connection.fetchval("SELECT pg_advisory_unlock($1)", LOCK)


async def test_one_frozen_shard_is_told_and_the_others_serve(gateway: Gateway, stores: Stores) -> None:
    await ready(gateway)
    keys = [await gateway.key() for _ in range(4)]
    frozen = next(key for key in keys if key.account.shard != 0)  # readiness looks at the first one by itself
    other = next(key for key in keys if key.account.shard != frozen.account.shard)
    async with nobody_recovers(stores):
        await stores.ledger.freeze(frozen.account.shard)
        await until(lambda: ready_as(gateway, 200, "degraded: 1 shards frozen"))
        await until(lambda: shows(gateway, 1, "tollgate_frozen_shards"))
        refused = await call(gateway, frozen)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "ledger_unavailable")
        assert (await call(gateway, other)).status_code == 200
    await ready(gateway)
    await until(lambda: shows(gateway, 0, "tollgate_frozen_shards"))
    assert (await call(gateway, frozen)).status_code == 200


async def test_all_shards_frozen_make_it_unready_until_they_are_found_whole(gateway: Gateway, stores: Stores) -> None:
    await ready(gateway)
    key = await gateway.key()
    rebuilds = await metric(gateway, "tollgate_rebuilds_total")
    skipped = await metric(gateway, "tollgate_audit_skipped_total", reason="frozen")

    async def not_audited() -> bool:
        return await metric(gateway, "tollgate_audit_skipped_total", reason="frozen") > skipped

    async with nobody_recovers(stores):
        for shard in range(len(SHARDS)):
            await stores.ledger.freeze(shard)
        await until(lambda: ready_as(gateway, 503, "frozen"))
        await until(lambda: shows(gateway, len(SHARDS), "tollgate_frozen_shards"))
        await until(not_audited)
        assert (await call(gateway, key)).status_code == 503
    await ready(gateway)
    await until(lambda: shows(gateway, 0, "tollgate_frozen_shards"))
    assert (await call(gateway, key)).status_code == 200
    assert await metric(gateway, "tollgate_rebuilds_total") == rebuilds  # nothing was lost: compared, and thawed
    assert gateway.tollgate("audit", "--account", key.account.id).returncode == 0
