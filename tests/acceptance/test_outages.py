"""Stores that stand still, die or come back: what goes on, what is refused and how, and that the books agree after."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import httpx2
import openai
import pytest
from openai import AsyncOpenAI

from storage.embedded import EmbeddedStores
from tests.support.gateway import Gateway, Key, running, until
from tests.support.outages import (
    DONE,
    MODEL,
    ask,
    audited,
    bearer,
    books_agree,
    frozen,
    leases,
    outage_config,
    readiness,
    ready,
    server_pid,
    server_pids,
    streams,
    terminal_entries,
)

LEASE_S = 5.0
MARGIN_S = 1.0
CALL_S = 0.5
SLACK_S = 2.5
"""For a machine that has other work too."""


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway whose stores may suffer."""
    config = outage_config(lease_ms=int(LEASE_S * 1000), margin_ms=int(MARGIN_S * 1000), call_ms=int(CALL_S * 1000))
    with running(tmp_path_factory.mktemp("outages"), config) as gateway:
        yield gateway


@pytest.fixture
async def key(gateway: Gateway) -> Key:
    """A key that the worker knows already; every test begins with everything running."""
    await ready(gateway)
    key = await gateway.key()
    await call(gateway, key)
    return key


async def call(gateway: Gateway, key: Key) -> tuple[str, int]:
    """One answered call: its session and what it cost."""
    async with httpx2.AsyncClient(verify=False, base_url=gateway.url, headers=bearer(key), timeout=20) as client:
        answer = await client.post("/v1/chat/completions", json=ask(5, stream=False))
    assert answer.status_code == 200, answer.text
    return answer.headers["x-tollgate-session"], int(Decimal(answer.headers["x-tollgate-charge"]) * 1_000_000)


async def refused(gateway: Gateway, key: Key) -> float:
    """One call that must be refused for want of the ledger, as OpenAI's client sees it; how long that took."""
    messages: Any = ask(5)["messages"]
    began = time.monotonic()
    async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=key.text, max_retries=0) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            await client.chat.completions.create(model=MODEL, messages=messages, stream=True)
    seconds = time.monotonic() - began
    assert caught.value.status_code == 503
    assert caught.value.code == "ledger_unavailable"
    assert caught.value.type == "server_error"
    assert int(caught.value.response.headers["retry-after"]) >= 1
    assert set(caught.value.response.json()["error"]) == {"message", "type", "param", "code"}
    return seconds


async def unreachable(gateway: Gateway) -> bool:
    """Whether readiness fails and names Redis."""
    status, parts = await readiness(gateway)
    return (status, parts.get("redis")) == (503, "unreachable")


async def test_requests_are_served_while_postgres_stands_still_and_arrive_afterwards(
    gateway: Gateway, key: Key
) -> None:
    charges = {}
    with frozen(await server_pids(gateway, "postgres")):
        for _ in range(10):
            session, micros = await call(gateway, key)
            charges[session] = micros

        async def degraded() -> bool:
            status, parts = await readiness(gateway)
            assert (status, parts["redis"], parts["gateway"]) == (200, "ok", "ok")
            return parts["postgres"].startswith("degraded")

        await until(degraded)
        session, micros = await call(gateway, key)
        charges[session] = micros
    rows = {row["sid"]: row["charged"] for row in await gateway.sessions(key, len(charges) + 1)}
    assert rows.items() >= charges.items()
    assert len(rows) == len(charges) + 1
    await ready(gateway)
    audited(gateway)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGQUIT], ids=lambda number: number.name)
async def test_a_postgres_that_was_killed_is_started_again_and_no_session_is_missing(
    gateway: Gateway, key: Key, number: signal.Signals
) -> None:
    before, *_ = await server_pids(gateway, "postgres")
    charges = dict([await call(gateway, key)])
    os.kill(before, number)

    async def back() -> bool:
        session, micros = await call(gateway, key)
        charges[session] = micros
        assert (await readiness(gateway))[0] == 200
        now = server_pid(gateway, "postgres")  # None while its record is being replaced
        return now not in (None, before) and EmbeddedStores.attach(gateway.data_dir) is not None

    await until(back, every=0.1)
    rows = {row["sid"]: row["charged"] for row in await gateway.sessions(key, len(charges) + 1)}
    assert rows.items() >= charges.items()
    assert len(rows) == len(charges) + 1
    audited(gateway)


async def test_while_redis_stands_still_new_calls_are_refused_and_running_streams_go_on(
    gateway: Gateway, key: Key
) -> None:
    async with streams(gateway, key, 3, tokens=500, interval_ms=10) as made:
        for stream in made:
            await stream.flowing(20)
        with frozen(await server_pids(gateway, "valkey")):
            stopped = time.monotonic()
            seen = until(lambda: unreachable(gateway), LEASE_S - MARGIN_S, every=0.1)
            seconds, _ = await asyncio.gather(refused(gateway, key), seen)
            assert seconds < CALL_S + SLACK_S
            for stream in made:
                count = len(stream.frames)
                await stream.flowing(count + 30)
            assert time.monotonic() - stopped < LEASE_S - MARGIN_S
        for stream in made:
            await stream.ended()
            assert stream.whole
            assert stream.data.endswith(DONE)
            assert stream.error is None
            assert stream.tokens == 500
    balance = await gateway.idle(key)
    rows = await gateway.sessions(key, 4)
    # The refused call's reserve may have run once Redis went on; it was given up, so all it may leave is a void.
    assert [row["charged"] for row in rows if row["outcome"] == "void"] in ([], [0])
    assert {row["outcome"] for row in rows} - {"void"} == {"completed"}
    assert sum(row["charged"] for row in rows) == 1_000_000 - balance.available
    await ready(gateway)
    audited(gateway)


async def test_streams_end_at_the_fence_when_redis_stands_still_for_longer_than_the_lease(
    gateway: Gateway, key: Key
) -> None:
    async with streams(gateway, key, 3, tokens=1_500, interval_ms=10) as made:
        for stream in made:
            await stream.flowing(20)
        with frozen(await server_pids(gateway, "valkey")):
            stopped = time.monotonic()
            for stream in made:
                await stream.ended()
            cut_s = time.monotonic() - stopped
            await until(lambda: time.monotonic() - stopped > LEASE_S + 0.5)
        woken = time.monotonic()
        for stream in made:
            assert stream.after(stopped + 1) != b""  # inside its slice it went on
            assert stream.after(stopped + LEASE_S - MARGIN_S / 2) == b""
            assert not stream.whole
    assert LEASE_S - MARGIN_S - 1 < cut_s < LEASE_S
    await gateway.idle(key)
    assert time.monotonic() - woken < LEASE_S + 5
    rows = {row["sid"]: row for row in await gateway.sessions(key, 4)}
    for stream in made:
        row, log = rows[stream.session], await gateway.served(stream.request)
        assert row["outcome"] in ("error", "swept")
        assert 0 < row["charged"] <= log["prompt_tokens"] + log["served_tokens"]
        if row["outcome"] == "error":
            assert row["charged"] >= log["prompt_tokens"] + stream.tokens
    async with gateway.stores() as stores:
        await until(lambda: books_agree(stores, key))  # what was swept is corrected when the worker says more
        assert {await terminal_entries(stores, stream.session) for stream in made} == {(1, 1)}
        assert await leases(stores, key) == []
    await ready(gateway)
    audited(gateway)


async def test_a_valkey_that_was_killed_comes_back_with_every_hold_and_balance(gateway: Gateway, key: Key) -> None:
    before, *_ = await server_pids(gateway, "valkey")
    async with streams(gateway, key, 2, tokens=600, interval_ms=10) as made:
        for stream in made:
            await stream.flowing(50)
        os.kill(before, signal.SIGKILL)
        for stream in made:
            await stream.ended()
            assert stream.whole
            assert stream.data.endswith(DONE)
            assert stream.tokens == 600
    await until(lambda: server_pid(gateway, "valkey") not in (None, before))
    balance = await gateway.idle(key)
    rows = await gateway.sessions(key, 3)
    assert {row["outcome"] for row in rows} == {"completed"}
    assert sum(row["charged"] for row in rows) == 1_000_000 - balance.available
    await call(gateway, key)
    await ready(gateway)
    audited(gateway)
