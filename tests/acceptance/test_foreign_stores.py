"""A whole life on a Valkey and a Postgres that somebody else runs: none of ours is started, none of theirs ends."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from storage.database import connect
from storage.redis_client import RedisClient
from tests.support.foreign_stores import PASSWORD, ForeignStores, foreign_stores
from tests.support.gateway import Gateway, config_text, running
from tests.support.outages import MODEL, ask, audited, instance_pids, names, server_pid

SECRET = "a-secret-of-enough-characters-0001"
OTHER_SECRET = "a-secret-of-enough-characters-0002"


@pytest.fixture(scope="module")
def stores() -> Iterator[ForeignStores]:
    """Stores without anything of Tollgate in them."""
    with foreign_stores() as stores:
        yield stores


async def schema_exists(stores: ForeignStores) -> bool:
    """Whether Tollgate's tables are in their Postgres; it answers, in any case."""
    connection = await connect(stores.postgres.url)
    try:
        return await connection.fetchval("SELECT to_regclass('alembic_version')") is not None
    finally:
        await connection.close()


async def redis_answers(stores: ForeignStores) -> bool:
    """Whether their Valkey lets us in."""
    client = RedisClient(stores.redis_url, call_ms=5_000, connect_ms=5_000, pending_max=9)
    await client.start()
    try:
        return bool(await client.call("PING") == b"PONG")
    finally:
        await client.aclose()


def tollgate(gateway: Gateway, *arguments: str) -> Any:
    """A command's JSON answer."""
    done = gateway.tollgate(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def nothing_of_ours(gateway: Gateway) -> None:
    """No store was started, or only prepared, in the data folder."""
    assert not names(instance_pids(gateway)) & {"valkey-server", "postgres"}
    assert [server_pid(gateway, name) for name in ("valkey", "postgres")] == [None, None]
    assert not {entry.name for entry in gateway.data_dir.iterdir()} & {"valkey", "postgres", "sockets", "secret"}
    assert list((gateway.data_dir / "servers").iterdir()) == []


async def two_calls(gateway: Gateway, key: str) -> None:
    """A stream and a whole answer, by the official client."""
    messages: Any = ask(5)["messages"]
    async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0) as client:
        chunks = [chunk async for chunk in await client.chat.completions.create(
            model=MODEL, messages=messages, stream=True, stream_options={"include_usage": True}
        )]  # fmt: skip
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 5
        whole = await client.chat.completions.create(model=MODEL, messages=messages)
        assert whole.choices[0].message.content
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 5


async def test_a_gateway_lives_on_stores_of_somebody_else_and_leaves_them_running(
    stores: ForeignStores, tmp_path: Path
) -> None:
    assert not await schema_exists(stores)
    with running(tmp_path, config_text(), environ=stores.environ(SECRET)) as gateway:
        assert await schema_exists(stores)
        tollgate(gateway, "accounts", "create", "acme")
        tollgate(gateway, "credits", "grant", "acme", "1")
        made = tollgate(gateway, "keys", "create", "--account", "acme", "--name", "laptop")
        await two_calls(gateway, made["key"])
        listed = tollgate(gateway, "sessions", "list", "--account", "acme")["sessions"]
        assert {(one["state"], one["output_tokens"]) for one in listed} == {("completed", 5)}
        assert len(listed) == 2
        charged = sum(one["charged_micros"] for one in listed)
        assert audited(gateway)["ok"]
        nothing_of_ours(gateway)

        assert gateway.stop() == 0
        assert stores.postgres.alive
        assert await redis_answers(stores)
        assert await schema_exists(stores)

        said = len(gateway.log.read_text())
        gateway.environ["TOLLGATE_SECRET"] = OTHER_SECRET
        gateway.start()
        assert re.search(
            r"warning: 1 keys were made with another secret and are all invalid now", gateway.log.read_text()[said:]
        )
        with pytest.raises(openai.AuthenticationError):
            await two_calls(gateway, made["key"])
        shown = tollgate(gateway, "accounts", "show", "acme")
        assert shown["balance"]["available_micros"] == 1_000_000 - charged > 0
        assert gateway.stop() == 0
        nothing_of_ours(gateway)
        assert instance_pids(gateway) == set()
        assert PASSWORD not in gateway.log.read_text()
        assert stores.redis_url not in gateway.log.read_text()
    assert stores.postgres.alive
    assert await redis_answers(stores)
