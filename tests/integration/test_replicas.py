"""A gateway that counts on a replica: what its answers wait for, and what readiness and metrics say without one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from metering.keys import SHARDS
from metering.server_check import replicas_word
from storage.redis_client import RedisClient
from tests.support.gateway import Gateway, Key, config_text, running, until
from tests.support.replicas import Pair, connected, figure, replicated, waits

QUESTION = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello there [[tokens=3]]"}]}


@pytest.fixture
def pair() -> Iterator[Pair]:
    with replicated() as running_pair:
        yield running_pair


@pytest.fixture
async def redis(pair: Pair) -> AsyncIterator[RedisClient]:
    async with connected(pair.primary) as client:
        await pair.following()
        yield client


async def test_each_thing_that_keeps_a_settlement_from_a_replica_has_its_word(pair: Pair, redis: RedisClient) -> None:
    assert await replicas_word(redis, 1) == "degraded: min-replicas-to-write is not in force"
    await redis.call("CONFIG", "SET", "min-replicas-to-write", 1)
    assert await replicas_word(redis, 1) == "ok"
    assert await replicas_word(redis, 2) == "degraded: 1 of 2 replicas follow"
    async with connected(pair.replica) as replica:
        assert await replicas_word(replica, 1) == "degraded: the server's role is slave"
    await redis.call("CONFIG", "SET", "min-replicas-max-lag", 1)
    with pair.replica_frozen():

        async def late() -> bool:
            return await replicas_word(redis, 1) == "degraded: 0 of 1 replicas follow"

        await until(late, 10)
        assert await figure(redis, "replication", "connected_slaves") == 1, "a replica that stands still is connected"


async def test_a_server_that_tells_nothing_leaves_the_replicas_unknown(pair: Pair, redis: RedisClient) -> None:
    await redis.call("ACL", "SETUSER", "app", "on", ">secret", "~*", "&*", "+@all", "-info")
    client = RedisClient(f"unix://app:secret@{pair.primary.socket}", call_ms=2_000, connect_ms=2_000, pending_max=9)
    await client.start()
    assert await replicas_word(client, 1) == "unknown"
    await client.aclose()


@pytest.fixture
def gateway(pair: Pair, ledger_database: str, tmp_path: Path) -> Iterator[Gateway]:
    """A gateway on the pair."""
    environ = {"REDIS_URL": pair.primary.url, "DATABASE_URL": ledger_database, "TOLLGATE_SECRET": "s" * 32}
    with running(tmp_path / "gateway", config_text() + "\n[redis]\nreplicas = 1\n", environ=environ) as gateway:
        yield gateway


async def ask(gateway: Gateway, key: Key) -> httpx2.Response:
    headers = {"authorization": f"Bearer {key.text}"}
    async with httpx2.AsyncClient(base_url=gateway.url, headers=headers, timeout=20) as client:
        answer = await client.post("/v1/chat/completions", json=QUESTION)
    assert answer.status_code == 200, answer.text
    return answer


async def readiness(gateway: Gateway) -> tuple[int, str, dict[str, str]]:
    async with httpx2.AsyncClient(timeout=20) as client:
        answer = await client.get(f"{gateway.url}/health/ready")
    return answer.status_code, answer.json()["status"], answer.json()["parts"]


async def unconfirmed(gateway: Gateway) -> float:
    async with httpx2.AsyncClient(timeout=20) as client:
        text = (await client.get(f"{gateway.url}/metrics")).text
    rows = [row for row in text.splitlines() if row.startswith("tollgate_settle_unconfirmed_total ")]
    return float(rows[0].split()[1])


async def said(gateway: Gateway, status: str, word: str) -> None:
    """Until readiness is 200 and says so of the whole and of the replicas."""

    async def told() -> Any:
        code, whole, parts = await readiness(gateway)
        assert code == 200
        return (whole, parts["replicas"]) == (status, word)

    await until(told, 10)


async def test_a_gateway_with_a_replica_serves_with_and_without_it(
    pair: Pair, redis: RedisClient, gateway: Gateway
) -> None:
    key = await gateway.key()
    await said(gateway, "degraded", "degraded: min-replicas-to-write is not in force")
    before = await waits(redis)
    answer = await ask(gateway, key)
    async with connected(pair.replica) as replica:
        session = SHARDS[key.account.shard].session + answer.headers["x-tollgate-session"]
        assert await replica.call("HGET", session, "st") == b"T"
    assert await waits(redis) == before + 1
    assert await unconfirmed(gateway) == 0
    with pair.replica_frozen():
        await ask(gateway, key)

        async def counted() -> bool:
            return await unconfirmed(gateway) == 1

        await until(counted, 10)
        assert "settlements stand without a replica's confirmation" in gateway.log.read_text()
    await redis.call("CONFIG", "SET", "min-replicas-to-write", 1)
    await said(gateway, "ok", "ok")
    pair.replica.kill()
    await said(gateway, "degraded", "degraded: 0 of 1 replicas follow")
    await redis.call("CONFIG", "SET", "min-replicas-to-write", 0)
    await gateway.idle(key)
    assert len(await gateway.sessions(key, 2)) == 2
