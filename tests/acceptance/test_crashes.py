"""Processes that are killed or frozen under load: what they held returns, what they served is charged once.

Two data workers, so that the death of one is not the death of all.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx2
import pytest
from openai import AsyncOpenAI

from tests.support.cached_calls import PROVIDERS, fresh
from tests.support.gateway import LATE_S, Gateway, Key, Stores, running, until
from tests.support.outages import (
    DONE,
    MODEL,
    Stream,
    alive,
    ask,
    audited,
    bearer,
    books_agree,
    frozen,
    held_session,
    instance_pids,
    leases,
    names,
    nothing_left,
    outage_config,
    owner_pid,
    readiness,
    ready,
    server_pid,
    server_pids,
    streams,
    terminal_entries,
)
from tests.support.raw_client import RawCall, connected_to, post

LEASE_S = 3.0
MARGIN_S = 1.0
SWEEP_S = 0.2
SLACK_S = 7.0
"""For a machine that has other work too."""
UNBILLED_TOKENS = 256
"""The published bound on what a killed gateway gives away per stream."""
WORKER, LEDGER, PROVIDER = "gateway.worker", "gateway.ledger_process", "loadtests.simulated_provider"
CONFIG = outage_config(lease_ms=int(LEASE_S * 1000), margin_ms=int(MARGIN_S * 1000)) + PROVIDERS
CONFIG = CONFIG.replace("[bounds]\n", "[bounds]\ncache_claim_ms = 1000\n")


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway of its own with two workers."""
    with running(tmp_path_factory.mktemp("crashes"), CONFIG, workers=2) as gateway:
        yield gateway


@pytest.fixture(autouse=True)
async def whole(gateway: Gateway) -> None:
    """Every test begins with everything running."""
    await until(lambda: len(gateway.children(WORKER)) == 2 and len(gateway.children(LEDGER)) == 1)
    await ready(gateway)


async def of_one_worker(gateway: Gateway, key: Key, made: list[Stream]) -> tuple[int, list[Stream]]:
    """The worker with most of these streams, and those."""
    async with gateway.stores() as stores:
        owners = [await owner_pid(stores, key, stream.session) for stream in made]
    pid = max(owners, key=owners.count)
    return pid, [stream for stream, owner in zip(made, owners, strict=True) if owner == pid]


async def test_streams_of_a_killed_worker_are_swept_once_for_what_was_last_metered(gateway: Gateway) -> None:
    key = await gateway.key()
    async with streams(gateway, key, 6, tokens=1_000, interval_ms=4) as made:
        for stream in made:
            await stream.flowing(300)
        pid, victims = await of_one_worker(gateway, key, made)
        assert len(victims) >= 3
        async with gateway.stores() as stores:
            metered = {one.session: int((await held_session(stores, key, one.session))["m"]) for one in victims}
        os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        for stream in made:
            await stream.ended()
    rows = {one.session: await gateway.session(one.session) for one in made}
    swept_s = time.monotonic() - killed
    for one in victims:
        row, log = rows[one.session], await gateway.served(one.request)
        assert not one.whole
        assert row["outcome"] == "swept"
        assert 0 < metered[one.session] <= row["charged"] <= log["prompt_tokens"] + log["served_tokens"]
        assert log["prompt_tokens"] + one.tokens - row["charged"] <= UNBILLED_TOKENS
    for one in made:
        if one not in victims:
            assert one.data.endswith(DONE)
            assert rows[one.session]["outcome"] == "completed"
    assert swept_s < LEASE_S + SWEEP_S + SLACK_S
    balance = await gateway.balance(key)
    assert (balance.held, balance.sessions) == (0, 0)
    assert balance.available == 1_000_000 - sum(row["charged"] for row in rows.values())
    async with gateway.stores() as stores:
        assert await leases(stores, key) == []
        assert {await terminal_entries(stores, one.session) for one in made} == {(1, 1)}
    audited(gateway)


async def test_when_the_worker_dies_that_fetches_an_answer_for_many_another_fetches_it(gateway: Gateway) -> None:
    key = await gateway.key()
    messages = fresh("[[tokens=300]][[interval_ms=10]]")
    body = json.dumps({"model": "kept", "messages": messages, "stream": True}).encode()
    async with contextlib.AsyncExitStack() as stack, gateway.stores() as stores:
        leader = await stack.enter_async_context(post(gateway, key, body))
        await leader.head()
        pid = await owner_pid(stores, key, leader.headers["x-tollgate-session"])
        elsewhere: list[RawCall] = []
        for _ in range(100):
            call = await stack.enter_async_context(post(gateway, key, body))
            port = call.writer.get_extra_info("sockname")[1]
            if await until(lambda port=port: connected_to(gateway, port)) != pid:
                elsewhere.append(call)
            if len(elsewhere) == 2:
                break
        os.kill(pid, signal.SIGKILL)
        for call in elsewhere:
            await call.head()
            assert (await call.rest())[-1].kind == "[DONE]"
    assert elsewhere[0].text == elsewhere[1].text
    rows = await gateway.sessions(key, 3)
    assert sorted((row["outcome"], row["source"]) for row in rows if row["outcome"] != "swept") == [
        ("completed", "cache"),
        ("completed", "provider"),
    ]
    await gateway.idle(key)
    audited(gateway)


async def test_a_killed_worker_is_started_again_and_the_other_serves_meanwhile(gateway: Gateway) -> None:
    key = await gateway.key()
    before = gateway.children(WORKER)
    async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=key.text, max_retries=0) as client:
        os.kill(before[0], signal.SIGKILL)
        messages: Any = ask(5)["messages"]
        answer = await client.chat.completions.create(model=MODEL, messages=messages)
        assert answer.choices[0].message.content
        await until(lambda: len(gateway.children(WORKER)) == 2)
        assert before[0] not in gateway.children(WORKER)
        await client.chat.completions.create(model=MODEL, messages=messages)
    assert len(await gateway.sessions(key, 2)) == 2


async def test_a_ledger_process_killed_again_and_again_loses_and_doubles_nothing(gateway: Gateway) -> None:
    key = await gateway.key()
    charges: dict[str, int] = {}
    over = asyncio.Event()

    async def customer() -> None:
        async with httpx2.AsyncClient(verify=False, base_url=gateway.url, headers=bearer(key), timeout=20) as client:
            while not over.is_set():
                answer = await client.post("/v1/chat/completions", json=ask(5, stream=False))
                assert answer.status_code == 200, answer.text
                micros = Decimal(answer.headers["x-tollgate-charge"]) * 1_000_000
                charges[answer.headers["x-tollgate-session"]] = int(micros)

    customers = [asyncio.create_task(customer()) for _ in range(4)]
    for death in range(1, 5):
        await gateway.sessions(key, death * 20)  # it delivers, so it is killed at work
        (pid,) = gateway.children(LEDGER)
        os.kill(pid, signal.SIGKILL)
        await until(lambda pid=pid: gateway.children(LEDGER) not in ([], [pid]))
    over.set()
    await asyncio.gather(*customers)
    balance = await gateway.idle(key)
    rows = await gateway.sessions(key, len(charges))
    assert {row["sid"]: row["charged"] for row in rows} == charges
    assert len(rows) == len(charges)
    assert sum(charges.values()) == 1_000_000 - balance.available
    audited(gateway)


async def test_a_worker_that_wakes_after_its_lease_forwards_nothing_more(gateway: Gateway) -> None:
    key = await gateway.key()
    async with streams(gateway, key, 4, tokens=2_000, interval_ms=10) as made:
        for stream in made:
            await stream.flowing(40)
        pid, victims = await of_one_worker(gateway, key, made)
        with frozen([pid]):
            stopped = time.monotonic()
            rows = [await gateway.session(one.session) for one in victims]  # the sweeper ended them
        woken = time.monotonic()
        assert woken - stopped > LEASE_S - 1
        for one in victims:
            await one.ended()
            assert one.after(woken) == b""
            assert one.after(stopped + LEASE_S - MARGIN_S) == b""
            assert not one.whole
            assert one.tokens > 0
    assert {row["outcome"] for row in rows} == {"swept"}
    assert (await gateway.idle(key)).available < 1_000_000
    async with gateway.stores() as stores:
        assert {await terminal_entries(stores, one.session) for one in made if one in victims} == {(1, 1)}
        query = "SELECT sid, charged FROM correction WHERE account_id = $1"
        corrections = await until(lambda: stores.pool.fetch(query, key.account.id))
        await until(lambda: books_agree(stores, key))
    more = {each["sid"]: each["charged"] for each in corrections}
    assert len(more) == len(corrections)
    for one, row in zip(victims, rows, strict=True):
        log = await gateway.served(one.request)
        charged = row["charged"] + more.get(one.session, 0)
        assert charged <= log["prompt_tokens"] + log["served_tokens"]
        if one.session in more:
            assert charged >= log["prompt_tokens"] + one.tokens  # what the client got is paid for after all
        assert await gateway.session(one.session) == row  # the sweep's own row stays
    audited(gateway)


async def test_a_worker_that_wakes_after_its_lease_gives_no_whole_answer_away(gateway: Gateway) -> None:
    key = await gateway.key()
    fields = ask(60, 20) | {"stream": False}
    async with httpx2.AsyncClient(verify=False, base_url=gateway.url, headers=bearer(key), timeout=40) as client:
        asked = asyncio.create_task(client.post("/v1/chat/completions", json=fields))
        async with gateway.stores() as stores:
            ((session, pid),) = await until(lambda: _owners(stores, key))
        with frozen([pid]):
            row = await gateway.session(session)  # the sweeper ended it, while the provider went on
        answer = await asked
    assert (row["outcome"], row["charged"]) == ("swept", 0)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "lease_lost")
    assert "choices" not in answer.json()
    audited(gateway)


async def _owners(stores: Stores, key: Key) -> list[tuple[str, int]]:
    """The sessions that the key's account has open, with the process that each belongs to."""
    found = (await stores.ledger.snapshot(key.account)).sessions
    return [(session, await owner_pid(stores, key, session)) for session in found]


@contextlib.asynccontextmanager
async def one_connection_each(gateway: Gateway, key: Key) -> AsyncIterator[dict[int, httpx2.AsyncClient]]:
    """For each worker a client whose one connection ends there."""
    found: dict[int, httpx2.AsyncClient] = {}
    async with contextlib.AsyncExitStack() as stack, gateway.stores() as stores:

        async def connect() -> tuple[int, httpx2.AsyncClient]:
            limits = httpx2.Limits(max_connections=1)
            client = httpx2.AsyncClient(
                verify=False, base_url=gateway.url, headers=bearer(key), timeout=20, limits=limits
            )
            await stack.enter_async_context(client)
            async with client.stream("POST", "/v1/chat/completions", json=ask(20, 20)) as answer:
                assert answer.status_code == 200
                pid = await owner_pid(stores, key, answer.headers["x-tollgate-session"])
                await answer.aread()
            return pid, client

        async def both() -> bool:
            found.update(await asyncio.gather(*(connect() for _ in range(6))))
            return len(found) == 2

        await until(both)
        yield found


async def test_two_workers_share_the_port_and_one_answer_has_the_metrics_of_all(gateway: Gateway) -> None:
    key = await gateway.key()

    async def metric(client: httpx2.AsyncClient, name: str) -> float:
        lines = (await client.get("/metrics")).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    async with one_connection_each(gateway, key) as clients:
        assert sorted(clients) == sorted(gateway.children(WORKER))
        first, second = clients.values()
        # Counts are published a moment after the answer; this one nothing else of this module moves.
        answered = 'tollgate_requests_total{code="model_not_found",status="404"}'
        before = await metric(first, answered)
        for client in clients.values():
            unknown = ask(3, stream=False) | {"model": "no-such-model"}
            assert (await client.post("/v1/chat/completions", json=unknown)).status_code == 404

        async def both() -> bool:
            return await metric(first, answered) == await metric(second, answered) == before + 2

        await until(both)
        assert await metric(first, "tollgate_journal_entries_total") > 0  # the ledger process counts here too


async def test_a_revoked_key_is_refused_by_every_worker_within_five_seconds(gateway: Gateway) -> None:
    key = await gateway.key()
    async with one_connection_each(gateway, key) as clients:
        done = await asyncio.to_thread(gateway.tollgate, "keys", "revoke", key.id)
        assert done.returncode == 0, done.stderr
        revoked = time.monotonic()
        for client in clients.values():

            async def refused(client: httpx2.AsyncClient = client) -> bool:
                answer = await client.post("/v1/chat/completions", json=ask(3, stream=False))
                assert answer.status_code in (200, 401)
                return answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"

            await until(refused, 5)
        assert time.monotonic() - revoked < 5


async def test_after_the_supervisor_is_killed_everything_is_taken_over_by_the_next_start(tmp_path: Path) -> None:
    with running(tmp_path, CONFIG) as gateway, nothing_left(gateway):
        key = await gateway.key()
        process = gateway.process
        assert process is not None
        servers = [(await server_pids(gateway, name))[0] for name in ("valkey", "postgres")]
        children = [pid for name in (WORKER, LEDGER, PROVIDER) for pid in gateway.children(name)]
        assert len(children) == 3
        async with streams(gateway, key, 2, tokens=3_000, interval_ms=5) as made:
            for stream in made:
                await stream.flowing(50)
            process.kill()
            process.wait(LATE_S)
            for stream in made:
                await stream.ended()
        await until(lambda: not any(alive(pid) for pid in children))
        assert all(alive(pid) for pid in servers)
        assert names(instance_pids(gateway)) <= {"valkey-server", "postgres"}

        await asyncio.to_thread(gateway.start)
        assert [server_pid(gateway, name) for name in ("valkey", "postgres")] == servers
        balance = await gateway.idle(key)
        rows = {row["sid"]: row for row in await gateway.sessions(key, 2)}
        assert set(rows) == {one.session for one in made}
        for one in made:  # an orphaned worker settles and tells its clients; the simulated provider may leave first
            assert one.whole
            assert one.error is not None
            assert one.error["code"] in ("shutting_down", "upstream_truncated")
            assert rows[one.session]["outcome"] == "error"
            assert rows[one.session]["charged"] >= one.tokens > 0
        assert balance.available == 1_000_000 - sum(row["charged"] for row in rows.values())
        async with httpx2.AsyncClient(verify=False, base_url=gateway.url, headers=bearer(key), timeout=20) as client:
            assert (await client.post("/v1/chat/completions", json=ask(3, stream=False))).status_code == 200
        assert (await readiness(gateway))[0] == 200
        audited(gateway)
