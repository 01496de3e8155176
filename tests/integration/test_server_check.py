"""A Redis server that would lose credit is named for what it lacks."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from metering.server_check import inspect, old_version
from storage.redis_client import RedisClient
from tests.support.redis_server import RedisServer


@pytest.fixture
async def redis(tmp_path: Path) -> AsyncIterator[RedisClient]:
    server = RedisServer(tmp_path, appendonly=True)
    server.start()
    client = RedisClient(server.url, call_ms=2000, connect_ms=2000, pending_max=100)
    await client.start()
    yield client
    await client.aclose()
    server.kill()


async def test_a_fit_server_has_no_faults(redis: RedisClient) -> None:
    report = await inspect(redis)
    assert (report.faults, report.old) == ((), None)


async def test_eviction_is_a_fault(redis: RedisClient) -> None:
    await redis.call("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    (fault,) = (await inspect(redis)).faults
    assert "maxmemory-policy is allkeys-lru" in fault


async def test_a_missing_append_only_file_is_a_fault(redis: RedisClient) -> None:
    await redis.call("CONFIG", "SET", "appendonly", "no")
    (fault,) = (await inspect(redis)).faults
    assert "appendonly yes" in fault


@pytest.mark.parametrize(
    ("rule", "lacking"),
    [
        (["-PEXPIRE"], "PEXPIRE s:{v000}:x:"),
        (["-@stream"], "XADD o:{v000}:"),
        (["resetkeys", "%R~*", "%W~[^b]:*"], "HSET b:{v000}:x:"),
    ],
)
async def test_a_user_who_may_not_write_what_the_scripts_write_is_a_fault(
    redis: RedisClient, rule: list[str], lacking: str
) -> None:
    await redis.call("ACL", "SETUSER", "default", *rule)
    (fault,) = (await inspect(redis)).faults
    assert f"this user run {lacking}" in fault


@pytest.mark.parametrize(
    ("fields", "old"),
    [
        ({"valkey_version": "9.1.2", "redis_version": "7.2.4"}, None),
        ({"valkey_version": "8.0.0", "redis_version": "7.2.4"}, None),
        ({"valkey_version": "7.2.9", "redis_version": "7.2.4"}, "Valkey 7.2.9"),
        ({"redis_version": "8.6.3"}, None),
        ({"redis_version": "8.6.2"}, "Redis 8.6.2"),
        ({"redis_version": "7.0.15"}, "Redis 7.0.15"),
        ({}, "Redis 0"),
    ],
)
def test_versions_below_the_least_are_old(fields: dict[str, str], old: str | None) -> None:
    assert old_version(fields) == old
