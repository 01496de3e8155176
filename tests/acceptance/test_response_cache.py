"""The response cache over a running gateway, with the official client: what is replayed, to whom, for how long, and
what it costs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import zlib
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import openai
import pytest
from openai import AsyncOpenAI

from accounts.preference_admin import prefer_key
from tests.support import cached_calls
from tests.support.cached_calls import HEADER, Call, ask, asked, fresh, stored
from tests.support.gateway import LATE_S, Gateway, Key, until
from tests.support.outages import audited
from tests.support.raw_client import connected_from, post, request_bytes

PROVIDERS = cached_calls.PROVIDERS
LARGE = 20_000
"""Tokens of 6 MB: more than the kernel's buffers take off the gateway's hands."""


@pytest.fixture
async def other(gateway: Gateway, key: Key) -> AsyncIterator[AsyncOpenAI]:
    """A client of another account."""
    another = await gateway.key()
    async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=another.text, max_retries=0) as client:
        yield client


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        ("kept", {}),
        ("kept", {"stream": True}),
        ("kept", {"stream": True, "n": 2, "temperature": 0.3}),
        ("kept", {"stream": True, "stream_options": None}),
        ("kept-tools", {"stream": True, "tools": [{"type": "function", "function": {"name": "look"}}]}),
        ("kept-worst", {"stream": True}),
    ],
)
async def test_a_repeat_gets_the_same_answer_without_the_provider_and_costs_nothing(
    gateway: Gateway, key: Key, client: AsyncOpenAI, model: str, fields: dict[str, Any]
) -> None:
    messages = fresh()
    usage_wanted = fields.get("stream_options", 1) is not None
    if not usage_wanted:
        fields = {**fields, "stream_options": openai.NOT_GIVEN}
    first = await ask(client, model, messages, **fields)
    await stored(gateway)
    before = await gateway.idle(key)
    second = await ask(client, model, messages, user="somebody", metadata={"a": "b"}, **fields)
    assert (first.cache, second.cache) == ("miss", "hit")
    assert "age" not in first.headers
    assert 0 <= int(second.headers["age"]) < 30
    assert second.content() == first.content()
    assert len(second.chunks) == len(first.chunks)
    assert await asked(gateway, [first, second]) == [first.request_id]
    assert second.headers["x-tollgate-charge"] == "0"
    assert second.headers["x-tollgate-attempts"] == "0"
    assert "x-tollgate-provider" not in second.headers
    assert second.session != first.session
    if usage_wanted:
        usage = first.last.usage
        assert (
            second.last.usage.prompt_tokens
            == usage.prompt_tokens
            == second.last.usage.prompt_tokens_details.cached_tokens
        )
        assert (second.last.usage.completion_tokens, second.last.usage.cost) == (usage.completion_tokens, 0)
        assert usage.cost > 0
        assert second.bill["cache"] == "hit"
        assert (second.bill["session"], second.bill["charge"]) == (second.session, 0)
    assert (await gateway.idle(key)).available == before.available


async def test_a_kept_answer_is_a_session_of_its_own_that_the_accountant_sees(
    gateway: Gateway, key: Key, client: AsyncOpenAI
) -> None:
    messages = fresh()
    calls = [await ask(client, "kept", messages, stream=True)]
    await stored(gateway)
    calls.append(await ask(client, "kept", messages, stream=True))
    await gateway.sessions(key, 2)
    first, second = [await gateway.session(call.session) for call in calls]
    assert first["charged"] == first["prompt_tokens"] + first["output_tokens"] > 0
    assert (second["charged"], second["absorbed"], second["outcome"]) == (0, 0, "completed")
    assert (second["source"], second["provider"], second["route"]) == ("cache", None, "kept")
    assert second["prompt_tokens"] == second["cached_tokens"] == first["prompt_tokens"]
    assert second["output_tokens"] == first["output_tokens"]
    assert (second["metadata"]["ending"], second["metadata"]["house_cost"]) == ("cached", 0)
    assert second["metadata"]["attempts"] == []

    def told() -> list[str]:
        return [line for line in gateway.log.read_text().splitlines() if calls[1].request_id in line]

    (line,) = await until(told)
    assert json.loads(line)["cache"] == "hit"


async def test_an_answer_may_have_a_price_and_be_shared_where_the_route_says_so(
    gateway: Gateway, key: Key, client: AsyncOpenAI, other: AsyncOpenAI
) -> None:
    messages = fresh()
    first = await ask(client, "kept-shared", messages)
    await stored(gateway)
    second = await ask(other, "kept-shared", messages)
    assert (first.cache, second.cache, second.text()) == ("miss", "hit", first.text())
    rows = [await gateway.session(call.session) for call in (first, second)]
    assert rows[1]["charged"] == -(-rows[0]["charged"] * 3 // 10) > 0
    assert second.last.usage.cost * 1_000_000 == pytest.approx(rows[1]["charged"])
    assert first.bill["session"] not in json.dumps(second.last.model_dump())
    poor = await gateway.key(micros=rows[1]["charged"] - 1)
    async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=poor.text, max_retries=0) as client:
        with pytest.raises(openai.APIStatusError) as refused:
            await ask(client, "kept-shared", messages)
    assert (refused.value.status_code, refused.value.code) == (402, "insufficient_quota")


async def test_answers_never_go_to_another_account(gateway: Gateway, client: AsyncOpenAI, other: AsyncOpenAI) -> None:
    messages = fresh()
    first = await ask(client, "kept", messages)
    await stored(gateway)
    second = await ask(other, "kept", messages)
    assert (first.cache, second.cache) == ("miss", "miss")
    assert len(await asked(gateway, [first, second])) == 2


@pytest.mark.parametrize(
    ("hints", "shared"),
    [
        (("providers=sim", "providers=sim"), True),
        (("providers=sim,gone", "providers = gone, sim"), True),
        (("providers=sim", "prefer=sim"), False),
        (("exclude=gone", ""), False),
    ],
)
async def test_requests_that_name_other_providers_share_no_answer(
    gateway: Gateway, client: AsyncOpenAI, hints: tuple[str, str], shared: bool
) -> None:
    messages, calls = fresh(), []
    for hint in hints:
        calls.append(await ask(client, "kept", messages, {"x-tollgate-route": hint}))
        await stored(gateway)
    assert [call.cache for call in calls] == ["miss", "hit" if shared else "miss"]


async def test_keys_that_prefer_other_providers_share_no_answer_also_where_accounts_do(
    gateway: Gateway, key: Key, client: AsyncOpenAI
) -> None:
    messages = fresh()
    keys = [await gateway.key() for _ in range(3)]
    async with gateway.stores() as stores:
        for made, words in zip(
            keys, ({"excluded": ["gone"]}, {"excluded": ["keyed"]}, {"excluded": ["gone"]}), strict=True
        ):
            await prefer_key(stores.pool, stores.redis, made.id, words)
    calls = [await ask(client, "kept-shared", messages)]
    for made in keys:
        await stored(gateway)
        async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=made.text, max_retries=0) as another:
            calls.append(await ask(another, "kept-shared", messages))
    assert [call.cache for call in calls] == ["miss", "miss", "miss", "hit"]


async def test_an_answer_that_another_provider_continued_is_given_but_not_kept(
    gateway: Gateway, client: AsyncOpenAI
) -> None:
    messages, calls = fresh(), []
    for _ in range(2):
        calls.append(await ask(client, "kept-continued", messages, stream=True))
        await stored(gateway)
    assert [call.cache for call in calls] == ["miss", "miss"]
    assert [call.bill["attempts"] for call in calls] == [2, 2]
    assert len(await asked(gateway, calls)) == 2


async def test_whoever_says_no_store_leaves_nothing_and_takes_nothing(gateway: Gateway, client: AsyncOpenAI) -> None:
    messages = fresh()
    no_store = {"cache-control": "max-age=0, No-Store"}
    calls = [await ask(client, "kept", messages, no_store), await ask(client, "kept", messages, {HEADER: "off"})]
    calls.append(await ask(client, "kept", messages, store=True))
    calls.append(await ask(client, "kept", messages))
    await stored(gateway)
    calls.append(await ask(client, "kept", messages, no_store))
    assert [call.cache for call in calls] == ["bypass", "bypass", "bypass", "miss", "bypass"]
    assert len(await asked(gateway, calls)) == 5


async def test_a_refresh_asks_the_provider_and_replaces_what_was_kept(gateway: Gateway, client: AsyncOpenAI) -> None:
    messages = fresh()
    calls = []
    for headers in ({}, {HEADER: "refresh"}, {"cache-control": "no-cache"}, {}):
        calls.append(await ask(client, "kept", messages, headers))
        if calls[-1].cache == "miss":
            await until_stored_since(gateway, calls[-1])
    assert [call.cache for call in calls] == ["miss", "miss", "miss", "hit"]
    assert len(await asked(gateway, calls)) == 3
    assert calls[3].last.id == calls[2].last.id != calls[1].last.id


async def until_stored_since(gateway: Gateway, call: Call) -> None:
    """Until an answer with this call's id is kept: replacing one is not claimed."""
    async with gateway.stores() as stores:

        async def there() -> bool:
            for name in await stores.redis.call("KEYS", "c:*"):
                value = await stores.redis.call("GET", name)
                if value is not None and call.last.id.encode() in zlib.decompress(value[4:]):
                    return True
            return False

        await until(there)


async def test_a_route_that_only_allows_it_keeps_what_it_is_asked_to(gateway: Gateway, client: AsyncOpenAI) -> None:
    messages = fresh()
    silent = await ask(client, "kept-asked", messages)
    first = await ask(client, "kept-asked", messages, {HEADER: "on"})
    await stored(gateway)
    second = await ask(client, "kept-asked", messages, {HEADER: "on"})
    third = await ask(client, "kept-asked", messages)
    assert [call.cache for call in (silent, first, second, third)] == [None, "miss", "hit", None]
    elsewhere = await ask(client, "gpt-4o-mini", messages, {HEADER: "on"})
    assert elsewhere.cache is None
    with pytest.raises(openai.BadRequestError) as refused:
        await ask(client, "kept", messages, {HEADER: "perhaps"})
    assert (refused.value.code, refused.value.param) == ("invalid_value", HEADER)


async def test_an_answer_is_gone_after_its_time(gateway: Gateway, client: AsyncOpenAI) -> None:
    messages = fresh()
    await ask(client, "kept-second", messages)
    await stored(gateway)
    assert (await ask(client, "kept-second", messages)).cache == "hit"

    async def missed() -> bool:
        return (await ask(client, "kept-second", messages)).cache == "miss"

    await until(missed, every=0.2)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_larger_than_the_routes_bound_is_not_kept(
    gateway: Gateway, client: AsyncOpenAI, stream: bool
) -> None:
    small, large = fresh("[[tokens=2]]"), fresh("[[tokens=900]]")
    calls = []
    for messages in (small, small, large, large):
        calls.append(await ask(client, "kept-small", messages, stream=stream))
        await stored(gateway)
    assert [call.cache for call in calls] == ["miss", "hit", "miss", "miss"]


async def test_only_whole_answers_are_kept(gateway: Gateway, key: Key, client: AsyncOpenAI) -> None:
    messages = fresh()
    for _ in range(2):  # the provider breaks off
        with pytest.raises(openai.APIError):
            await ask(client, "kept-cut", messages, stream=True)
    left = fresh("[[tokens=300]][[interval_ms=10]]")
    stream = await client.chat.completions.create(model="kept", messages=left, stream=True)
    async for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            break
    await stream.close()
    await gateway.idle(key)
    assert (await ask(client, "kept", left, stream=True, stream_options=openai.NOT_GIVEN)).cache == "miss"


async def test_an_answer_that_credit_limited_is_not_kept(gateway: Gateway, key: Key) -> None:
    messages = fresh("[[tokens=5]]")
    poor = await gateway.key(micros=200)
    async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=poor.text, max_retries=0) as client:
        calls = []
        for _ in range(2):
            calls.append(await ask(client, "kept-worst", messages))
            await stored(gateway)
            await gateway.idle(poor)
    assert [(call.cache, call.headers["x-tollgate-limited"]) for call in calls] == [("miss", "credit")] * 2


async def unread(gateway: Gateway, key: Key, body: bytes, stack: contextlib.ExitStack) -> socket.socket:
    """A client that has asked and reads nothing."""
    client = stack.enter_context(socket.socket())
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    client.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(client, ("127.0.0.1", gateway.port))
    await loop.sock_sendall(client, request_bytes(gateway, key, body))
    return client


async def test_a_replay_goes_as_fast_as_its_client_reads_and_one_that_reads_nothing_is_let_go(
    gateway: Gateway, key: Key
) -> None:
    fields = {"model": "kept-large", "messages": fresh(f"[[tokens={LARGE}]]"), "stream": True}
    body = json.dumps(fields).encode()
    async with post(gateway, key, body) as call:
        await call.head()
        first = await call.rest()
    await stored(gateway)
    loop = asyncio.get_running_loop()
    with contextlib.ExitStack() as stack:
        slow, lost = [await unread(gateway, key, body, stack) for _ in range(2)]
        rows = await gateway.sessions(key, 3)  # both are settled before they are given
        assert sorted(row["source"] for row in rows) == ["cache", "cache", "provider"]
        data = bytearray()
        while not data.endswith(b"\r\n0\r\n\r\n"):
            data += await asyncio.wait_for(loop.sock_recv(slow, 1 << 20), LATE_S)
        assert data.count(b"data: ") == len(first) > LARGE // 2
        ours = lost.getsockname()[1]
        await until(lambda: not connected_from(gateway, ours), 10)


async def test_kept_answers_count_in_the_metrics_and_the_books_agree(
    gateway: Gateway, key: Key, client: AsyncOpenAI, http: httpx2.AsyncClient
) -> None:
    messages = fresh()
    await ask(client, "kept", messages)
    await stored(gateway)
    assert (await ask(client, "kept", messages)).cache == "hit"
    text = (await http.get("/metrics")).text
    for name in ('tollgate_cache_total{result="hit",route="kept"}', 'tollgate_cache_stored_bytes_total{route="kept"}'):
        assert f"\n{name} " in text
    await gateway.sessions(key, 2)
    audited(gateway)
