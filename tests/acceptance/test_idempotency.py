"""Idempotency-Key with the official client: a request runs once, and a repeat is told what became of the first."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any

import httpx2
import openai
import pytest
from openai import AsyncOpenAI

from metering.keys import SHARDS
from proxy.ids import session_id
from tests.support.gateway import Gateway, Key

GRANTED = 1_000_000
ASK: Any = [{"role": "user", "content": "Say something short."}]
SLOW: Any = [{"role": "user", "content": "[[tokens=400]][[interval_ms=20]]Go on."}]


@pytest.fixture
async def client(gateway: Gateway, key: Key) -> AsyncIterator[AsyncOpenAI]:
    """The official client as it comes: it repeats what it may repeat."""
    async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=key.text, max_retries=2) as client:
        yield client


async def chat(client: AsyncOpenAI, name: str, *, stream: bool = False, **fields: Any) -> str:
    """One whole call under an idempotency key; its session's id."""
    asked = {"model": "gpt-4o-mini", "messages": ASK, **fields}
    raw = await client.chat.completions.with_raw_response.create(
        **asked, stream=stream, extra_headers={"Idempotency-Key": name}
    )
    answer: Any = raw.parse()
    if stream:
        assert [chunk async for chunk in answer]
    session: str = raw.headers["x-tollgate-session"]
    return session


async def repeated(client: AsyncOpenAI, name: str, **fields: Any) -> dict[str, Any]:
    """The error of a repeat, which the client did not try again; numbers as exact decimals."""
    with pytest.raises((openai.ConflictError, openai.UnprocessableEntityError)) as caught:
        await chat(client, name, **fields)
    response = caught.value.response
    assert response.headers["x-should-retry"] == "false"
    assert response.request.headers["x-stainless-retry-count"] == "0"
    error: dict[str, Any] = json.loads(response.text, parse_float=Decimal)["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", None)
    assert response.status_code == (422 if error["code"] == "idempotency_conflict" else 409)
    return error


@pytest.mark.parametrize("stream", [False, True])
async def test_a_repeat_of_a_finished_call_is_told_its_session_and_charge_and_costs_nothing(
    gateway: Gateway, key: Key, client: AsyncOpenAI, stream: bool
) -> None:
    session = await chat(client, "once", stream=stream)
    row = await gateway.session(session)
    for _ in range(2):
        error = await repeated(client, "once", stream=stream)
        assert error["code"] == "idempotency_finished"
        assert set(error["metadata"]) == {"session", "charge"}
        assert error["metadata"]["session"] == session
        assert error["metadata"]["charge"] * 1_000_000 == row["charged"] > 0
    balance = await gateway.idle(key)
    assert balance.available == GRANTED - row["charged"]
    assert len(await gateway.sessions(key, 1)) == 1


async def test_a_repeat_of_a_running_call_is_told_so_and_of_one_that_was_left_what_it_cost(
    gateway: Gateway, client: AsyncOpenAI, key: Key
) -> None:
    headers = {"Idempotency-Key": "running"}
    fields: Any = {"model": "gpt-4o-mini", "messages": SLOW, "stream": True}
    stream = await client.chat.completions.create(**fields, extra_headers=headers)
    async for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    session = stream.response.headers["x-tollgate-session"]
    error = await repeated(client, "running", messages=SLOW, stream=True)
    assert (error["code"], error["metadata"]) == ("idempotency_in_flight", {"session": session})
    async with gateway.stores() as stores:  # what a sweeper would write into the journal
        held = await stores.redis.call("HGET", SHARDS[key.account.shard].session + session, "mt")
    assert json.loads(held)["idempotency"] == hashlib.sha256(b"running").hexdigest()
    await stream.close()
    await gateway.idle(key)
    row = await gateway.session(session)
    error = await repeated(client, "running", messages=SLOW, stream=True)
    assert (error["code"], row["outcome"]) == ("idempotency_finished", "aborted")
    assert error["metadata"] == {"session": session, "charge": Decimal(row["charged"]) / 1_000_000}


async def test_of_equal_calls_at_once_one_runs(gateway: Gateway, client: AsyncOpenAI, key: Key) -> None:
    answers = await asyncio.gather(*(chat(client, "same") for _ in range(8)), return_exceptions=True)
    (session,) = [answer for answer in answers if isinstance(answer, str)]
    refused = [answer for answer in answers if isinstance(answer, openai.ConflictError)]
    assert len(refused) == 7
    assert {error.response.json()["error"]["metadata"]["session"] for error in refused} == {session}
    await gateway.idle(key)
    assert len(await gateway.sessions(key, 1)) == 1


@pytest.mark.parametrize("fields", [{"max_tokens": 7}, {"messages": SLOW}, {"stream": True}])
async def test_the_same_key_with_another_body_is_refused(client: AsyncOpenAI, fields: dict[str, Any]) -> None:
    await chat(client, "bound")
    error = await repeated(client, "bound", **fields)
    assert error["code"] == "idempotency_conflict"
    assert "metadata" not in error


async def test_another_accounts_equal_key_is_unrelated(gateway: Gateway, client: AsyncOpenAI) -> None:
    first = await chat(client, "shared")
    other = await gateway.key()
    async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=other.text, max_retries=0) as another:
        assert await chat(another, "shared", max_tokens=7) != first
        assert (await repeated(another, "shared"))["code"] == "idempotency_conflict"


async def test_calls_without_the_header_or_with_an_empty_one_run_each_time(client: AsyncOpenAI) -> None:
    assert len({await chat(client, "") for _ in range(2)}) == 2
    assert await chat(client, "one") != await chat(client, "two")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_that_cost_nothing_frees_its_key(
    gateway: Gateway, key: Key, client: AsyncOpenAI, stream: bool
) -> None:
    """Both voids (the first, and the one that took its key over), and only with the body that they had."""
    once = client.with_options(max_retries=0)
    sessions = []
    for _ in range(3):
        with pytest.raises(openai.InternalServerError) as caught:
            await chat(once, "freed", model="unreachable", stream=stream)
        assert caught.value.code == "upstream_unreachable"
        sessions.append(caught.value.response.headers["x-tollgate-session"])
    assert len(set(sessions)) == 3
    assert {(await gateway.session(each))["outcome"] for each in sessions} == {"void"}
    assert (await repeated(client, "freed", stream=stream))["code"] == "idempotency_conflict"
    assert (await gateway.idle(key)).available == GRANTED


async def test_a_client_that_repeats_a_failed_call_by_itself_gets_its_answer_under_the_same_key(
    gateway: Gateway, client: AsyncOpenAI
) -> None:
    async with httpx2.AsyncClient() as provider:
        await provider.delete(f"{gateway.provider}/__log")  # its tally of failures begins anew
    session = await chat(client, "retried", model="sim-fail-times")
    assert (await gateway.session(session))["outcome"] == "completed"
    error = await repeated(client, "retried", model="sim-fail-times")
    assert (error["code"], error["metadata"]["session"]) == ("idempotency_finished", session)


@pytest.mark.parametrize("limit", ["balance", "requests"])
async def test_a_call_that_was_not_admitted_leaves_its_key_free(gateway: Gateway, limit: str) -> None:
    key = await gateway.key(1 if limit == "balance" else GRANTED, rpm=1)
    async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=key.text, max_retries=0) as client:
        if limit == "requests":
            await chat(client, "")
        with pytest.raises(openai.APIStatusError) as caught:
            await chat(client, "later")
    assert caught.value.response.json()["error"]["metadata"] == {"limit": limit}
    async with gateway.stores() as stores:
        assert [name async for name in _idempotency_keys(stores.redis, key)] == []


@pytest.mark.parametrize("sent", [["x" * 256], ["a b"], ["é"], ["one", "two"], ["one", "one"]])
async def test_a_header_that_is_no_key_is_refused_by_its_name(
    gateway: Gateway, key: Key, http: httpx2.AsyncClient, sent: list[str]
) -> None:
    headers = [(b"Idempotency-Key", value.encode()) for value in sent]
    reply = await http.post("/v1/chat/completions", json={"model": "gpt-4o-mini", "messages": ASK}, headers=headers)
    error = reply.json()["error"]
    assert reply.status_code == 400
    assert (error["type"], error["param"]) == ("invalid_request_error", "Idempotency-Key")
    assert (await gateway.balance(key)).available == GRANTED


async def test_the_session_row_has_the_keys_hash_and_nothing_has_the_key(
    gateway: Gateway, key: Key, client: AsyncOpenAI
) -> None:
    secret = f"order-{session_id()}"
    digest = hashlib.sha256(secret.encode()).hexdigest()
    session = await chat(client, secret)
    row = await gateway.session(session)
    assert row["metadata"]["idempotency"] == digest
    plain = await gateway.session(await chat(client, ""))
    assert "idempotency" not in plain["metadata"]
    async with gateway.stores() as stores:
        names = [name async for name in _idempotency_keys(stores.redis, key)]
        (value,) = [await stores.redis.call("GET", name) for name in names]
    assert names[0].decode().endswith(f":{key.account.id}:{digest}")
    assert value.split()[0] == session.encode()
    listed = gateway.tollgate("sessions", "list", "--account", key.account.id, "--json")
    assert digest in listed.stdout
    assert secret not in listed.stdout + gateway.log.read_text()


async def _idempotency_keys(redis: Any, key: Key) -> AsyncIterator[bytes]:
    """The account's idempotency keys in Redis."""
    cursor = b"0"
    while True:
        cursor, names = await redis.call("SCAN", cursor, "MATCH", f"i:*:{key.account.id}:*", "COUNT", 1_000)
        for name in names:
            yield name
        if cursor == b"0":
            return
