"""Postgres away for longer than the outbox may wait: new calls are shed, what runs goes on, and then all is served."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai
import pytest
from openai import AsyncOpenAI

from storage.database import connect, dsn
from tests.support.gateway import LATE_S, Gateway, Key, Stores, config_text, running, until
from tests.support.outages import DONE, MODEL, Stream, ask, audited, bearer, held_session, readiness, ready

AGE_S = 1
TOKENS, INTERVAL_MS = 160, 10
"""Of each stream: it runs for more than a second."""
CLOSED, OPEN = "new calls are shed: the journal is over its bound", "new calls are admitted again"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway whose outbox may wait for a second."""
    config = config_text().replace("[metering]", f"[metering]\noutbox_age_s_max = {AGE_S}", 1)
    with running(tmp_path_factory.mktemp("shedding"), config) as gateway:
        yield gateway


@asynccontextmanager
async def postgres_away(gateway: Gateway) -> AsyncIterator[None]:
    """Postgres turns everybody away from the gateway's database, also who was in."""
    name = urlsplit(dsn(gateway.run.database_url)).path.removeprefix("/")
    beside = await connect(gateway.run.database_url.replace(f"/{name}?", "/postgres?", 1))
    inside = "FROM pg_stat_activity WHERE datname = $1"

    async def empty() -> bool:
        await beside.execute(f"SELECT pg_terminate_backend(pid) {inside}", name)
        return not await beside.fetchval(f"SELECT count(*) {inside}", name)

    try:
        await beside.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
        await until(empty)
        yield
    finally:
        await beside.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')
        await beside.close()


async def answered(http: httpx2.AsyncClient) -> bool:
    """Whether a call is served; what is not must be shed."""
    answer = await http.post("/v1/chat/completions", json=ask(5, stream=False))
    assert answer.status_code in (200, 503), answer.text
    return answer.status_code == 200


async def shed(gateway: Gateway, key: Key) -> None:
    """One call that is refused, as OpenAI's client sees it."""
    messages: Any = ask(5)["messages"]
    async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=key.text, max_retries=0) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            await client.chat.completions.create(model=MODEL, messages=messages, stream=True)
    error = caught.value
    assert (error.status_code, error.code, error.type) == (503, "overloaded", "server_error")
    assert error.response.headers["retry-after"] == "5"
    assert "x-tollgate-session" not in error.response.headers
    assert set(error.response.json()["error"]) == {"message", "type", "param", "code"}


def told(gateway: Gateway) -> list[dict[str, Any]]:
    """The lines of the log about shedding."""
    lines = [json.loads(line) for line in gateway.log.read_text().splitlines() if line.startswith("{")]
    return [line for line in lines if line.get("event") in (CLOSED, OPEN)]


async def shed_total(http: httpx2.AsyncClient) -> float:
    """How many calls were shed for the journal's age, by the metric."""
    text = (await http.get("/metrics")).text
    found = [line for line in text.splitlines() if line.startswith('tollgate_shed_total{reason="journal_age"}')]
    return float(found[0].split()[-1]) if found else 0.0


@pytest.fixture
async def stores(gateway: Gateway) -> AsyncIterator[Stores]:
    await ready(gateway)
    async with gateway.connected() as stores:
        yield stores


async def running_when_closed(gateway: Gateway, key: Key) -> Stream:
    """Start stream after stream until one is shed: the last that was let in, which is still running."""
    made: list[Stream] = []
    ends = time.monotonic() + LATE_S
    while time.monotonic() < ends:
        stream = Stream(gateway, key, ask(TOKENS, INTERVAL_MS))
        stream.task = asyncio.create_task(stream.read())
        await until(lambda stream=stream: stream.status)
        if stream.status == 503:
            break
        made.append(stream)
        await stream.flowing(20)
    else:
        raise AssertionError(f"not shed within {LATE_S} s")
    last = made[-1]
    assert last.task is not None
    assert not last.task.done()
    for each in made[:-1]:
        await each.ended()
        assert (each.whole, each.tokens) == (True, TOKENS)
    return last


async def test_new_calls_are_shed_while_the_journal_waits_and_what_runs_is_settled(
    gateway: Gateway, stores: Stores
) -> None:
    key = await stores.key(1_000_000)
    async with httpx2.AsyncClient(verify=False, base_url=gateway.url, headers=bearer(key), timeout=20) as http:
        async with postgres_away(gateway):
            stream = await running_when_closed(gateway, key)
            balance = await stores.ledger.balance(key.account)
            assert balance.sessions <= 1  # the stream's
            await stream.ended()
            assert (stream.whole, stream.error, stream.tokens) == (True, None, TOKENS)
            assert stream.data.endswith(DONE)
            assert (await held_session(stores, key, stream.session))["st"] == "T"
            await shed(gateway, key)
            balance = await stores.ledger.balance(key.account)
            assert (balance.held, balance.sessions) == (0, 0)
            status, parts = await readiness(gateway)
            assert (status, parts["journal"], parts["gateway"]) == (503, "over its bound", "ok")
        assert await shed_total(http) >= 2
        await until(lambda: answered(http), every=0.1)
    assert (await gateway.session(stream.session))["outcome"] == "completed"
    events = [line["event"] for line in told(gateway)]
    assert events[:2] == [CLOSED, OPEN]
    assert all(before != after for before, after in pairwise(events))  # a change each, not a call
    assert told(gateway)[0]["reason"] == "journal_age"
    assert told(gateway)[0]["oldest_age_s"] >= AGE_S
    audited(gateway)
