"""The official OpenAI client and nothing else: stream and not, sync and async, and what the bill looks like there."""

from __future__ import annotations

import asyncio
import json
import uuid
from decimal import Decimal
from typing import Any

import httpx2
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.support.gateway import Gateway, Key

any_provider = pytest.mark.any_provider
ASK: Any = [{"role": "user", "content": "Say something short."}]


def sync_client(gateway: Gateway, key: Key) -> OpenAI:
    return OpenAI(base_url=f"{gateway.url}/v1", api_key=key.text, max_retries=0)


@any_provider
async def test_a_stream_arrives_in_pieces_and_ends(client: AsyncOpenAI, model: str) -> None:
    stream = await client.chat.completions.create(model=model, messages=ASK, stream=True, max_tokens=40)
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    assert all(chunk.usage is None for chunk in chunks)


@any_provider
async def test_usage_comes_once_with_cost_and_bill_when_it_is_asked_for(
    client: AsyncOpenAI, model: str, gateway: Gateway
) -> None:
    stream = await client.chat.completions.create(
        model=model, messages=ASK, stream=True, max_tokens=40, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    billed = [chunk for chunk in chunks if chunk.usage is not None]
    assert billed == chunks[-1:]
    last: Any = billed[0]
    assert last.choices == []
    assert last.usage.prompt_tokens > 0
    assert last.usage.completion_tokens > 0
    bill = last.x_tollgate
    assert last.usage.cost == bill["charge"] > 0
    assert bill["attempts"] == 1
    row = await gateway.session(bill["session"])
    assert row["charged"] == round(Decimal(str(bill["charge"])) * 1_000_000)
    assert row["outcome"] == "completed"
    assert (row["prompt_tokens"], row["output_tokens"]) == (last.usage.prompt_tokens, last.usage.completion_tokens)


@any_provider
async def test_a_whole_answer_carries_its_bill_in_body_and_headers(client: AsyncOpenAI, model: str) -> None:
    raw = await client.chat.completions.with_raw_response.create(model=model, messages=ASK, max_tokens=40)
    answer: Any = raw.parse()
    assert answer.choices[0].message.content
    bill = answer.x_tollgate
    assert raw.headers["x-tollgate-session"] == bill["session"]
    assert Decimal(raw.headers["x-tollgate-charge"]) == Decimal(str(answer.usage.cost)) == Decimal(str(bill["charge"]))
    assert Decimal(raw.headers["x-tollgate-balance"]) == Decimal(str(bill["balance"])) < 1
    assert raw.headers["x-tollgate-provider"] == bill["provider"]
    assert raw.headers["x-tollgate-attempts"] == "1"
    assert raw.headers["x-tollgate-route"] == model
    assert uuid.UUID(raw.headers["x-request-id"])


@any_provider
def test_the_sync_client_streams(gateway: Gateway, model: str) -> None:
    key = asyncio.run(gateway.key())
    with sync_client(gateway, key) as client:
        stream = client.chat.completions.create(model=model, messages=ASK, stream=True, max_tokens=40)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        whole = client.chat.completions.create(model=model, messages=ASK, max_tokens=40)
        assert whole.choices[0].message.content


@any_provider
async def test_models_are_listed_and_found(client: AsyncOpenAI, model: str) -> None:
    listed = [each.id async for each in client.models.list()]
    assert model in listed
    assert (await client.models.retrieve(model)).id == model
    with pytest.raises(openai.NotFoundError) as caught:
        await client.models.retrieve("no-such-model")
    assert caught.value.code == "model_not_found"


@any_provider
async def test_an_unknown_model_is_not_found(client: AsyncOpenAI, gateway: Gateway, key: Key) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(model="no-such-model", messages=ASK)
    assert caught.value.code == "model_not_found"
    assert (await gateway.idle(key)).available == 1_000_000


@any_provider
async def test_a_wrong_key_is_refused_as_openai_refuses_it(gateway: Gateway, key: Key, model: str) -> None:
    wrong = key.text[:-8] + ("a" if key.text[-8] != "a" else "b") + key.text[-7:]
    async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=wrong, max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            await client.chat.completions.create(model=model, messages=ASK)
    assert caught.value.code == "invalid_api_key"


@any_provider
async def test_a_client_that_leaves_mid_stream_pays_for_what_came(
    client: AsyncOpenAI, gateway: Gateway, key: Key, model: str
) -> None:
    stream = await client.chat.completions.create(model=model, messages=ASK, stream=True, max_tokens=400)
    async for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            break
    await stream.close()
    balance = await gateway.idle(key)
    (row,) = await gateway.sessions(key, 1)
    assert row["outcome"] in ("aborted", "completed")
    assert 0 < row["charged"] == 1_000_000 - balance.available


async def test_tool_calls_stream_and_parse(client: AsyncOpenAI) -> None:
    tools: Any = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
    async with client.chat.completions.stream(model="gpt-4o-mini", messages=ASK, tools=tools) as stream:
        completion = await stream.get_final_completion()
    calls = completion.choices[0].message.tool_calls
    assert calls is not None
    assert calls[0].function.name == "get_weather"
    json.loads(calls[0].function.arguments)


async def test_several_choices_stream_side_by_side(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model="gpt-4o-mini", messages=ASK, stream=True, n=3)
    finished = [chunk.choices[0].index async for chunk in stream if chunk.choices[0].finish_reason]
    assert sorted(finished) == [0, 1, 2]


async def test_a_renamed_route_shows_its_own_name(client: AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(model="real-name", messages=ASK)
    assert whole.model == "real-name"
    stream = await client.chat.completions.create(model="real-name", messages=ASK, stream=True)
    assert {chunk.model async for chunk in stream} == {"real-name"}


async def test_unknown_fields_pass_both_ways(client: AsyncOpenAI, gateway: Gateway) -> None:
    raw = await client.chat.completions.with_raw_response.create(
        model="sim-extra-fields",
        messages=ASK,
        extra_body={"zz_new": {"a": [1, 2.5, None]}, "metadata": {"api_base": "x"}},
    )
    answer: Any = raw.parse()
    entry = await gateway.served(raw.headers["x-request-id"])
    async with httpx2.AsyncClient(verify=False) as provider:
        seen = (await provider.get(f"{gateway.provider}/__requests/{entry['n']}/body")).json()
    assert seen["zz_new"] == {"a": [1, 2.5, None]}
    assert seen["metadata"] == {"api_base": "x"}
    assert answer.model_extra


@pytest.mark.parametrize("stream", [True, False])
async def test_an_error_after_the_hold_carries_the_bill_in_its_headers(client: AsyncOpenAI, stream: bool) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        await client.chat.completions.create(model="sim-500", messages=ASK, stream=stream)
    headers = caught.value.response.headers
    assert uuid.UUID(headers["x-tollgate-session"])
    assert (headers["x-tollgate-charge"], headers["x-tollgate-balance"]) == ("0", "1")
    assert (headers["x-tollgate-attempts"], headers["x-tollgate-provider"]) == ("1", "sim")
    assert headers["x-tollgate-route"] == "sim-500"
