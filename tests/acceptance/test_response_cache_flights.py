"""Identical calls at once, over a running gateway with the official client: one reaches the provider, whoever dies or
leaves, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from tests.support import cached_calls
from tests.support.cached_calls import ask, asked, fresh, stored
from tests.support.gateway import Gateway, Key

PROVIDERS = cached_calls.PROVIDERS


@pytest.mark.parametrize("stream", [False, True])
async def test_of_identical_calls_at_once_one_reaches_the_provider_and_each_has_a_session(
    gateway: Gateway, key: Key, client: AsyncOpenAI, stream: bool
) -> None:
    messages = fresh("[[tokens=30]][[ttft_ms=300]]")
    calls = await asyncio.gather(*(ask(client, "kept", messages, stream=stream) for _ in range(12)))
    assert Counter(call.cache for call in calls) == {"miss": 1, "hit": 11}
    assert len({call.text() for call in calls}) == 1
    assert len(await asked(gateway, calls)) == 1
    assert len({call.session for call in calls}) == 12
    rows = await gateway.sessions(key, 12)
    assert sorted(row["charged"] > 0 for row in rows) == [False] * 11 + [True]


async def test_a_first_caller_who_leaves_makes_way_for_the_next(
    gateway: Gateway, key: Key, client: AsyncOpenAI
) -> None:
    messages = fresh("[[tokens=40]][[interval_ms=20]]")
    fields: Any = {"model": "kept", "messages": messages, "stream": True}
    leader = await client.chat.completions.create(**fields, stream_options={"include_usage": True})
    others = [asyncio.create_task(ask(client, "kept", messages, stream=True)) for _ in range(4)]
    said = 0
    async for chunk in leader:  # for half of its 0.8 s, so that the others have come to wait for it
        said += bool(chunk.choices and chunk.choices[0].delta.content)
        if said == 20:
            break
    assert not any(task.done() for task in others)
    await leader.close()
    calls = await asyncio.gather(*others)
    assert Counter(call.cache for call in calls) == {"miss": 1, "hit": 3}
    assert len(await asked(gateway, calls)) == 1


async def test_a_dead_callers_claim_keeps_nobody_waiting_for_longer_than_it_lasts(
    gateway: Gateway, client: AsyncOpenAI
) -> None:
    """A worker that was killed while it fetched the answer leaves its claim, and nothing that renews it."""
    messages = fresh()
    async with gateway.stores() as stores:
        before = set(await stores.redis.call("KEYS", "c:*"))
        await ask(client, "kept", messages)
        await stored(gateway)
        (answer,) = [key for key in await stores.redis.call("KEYS", "c:*") if key not in before]
        assert messages[0]["content"].encode() not in answer
        await stores.redis.call("DEL", answer)
        await stores.redis.call("SET", b"cl" + answer[1:], "of the dead", "PX", 1_200)
    began = time.monotonic()
    calls = await asyncio.gather(*(ask(client, "kept", messages) for _ in range(3)))
    assert 1.0 < time.monotonic() - began < 10
    assert Counter(call.cache for call in calls) == {"miss": 1, "hit": 2}
    assert len(await asked(gateway, calls)) == 1


async def test_who_has_waited_long_enough_goes_his_own_way(gateway: Gateway, client: AsyncOpenAI) -> None:
    messages = fresh("[[ttft_ms=1500]]")
    calls = await asyncio.gather(*(ask(client, "kept-impatient", messages) for _ in range(3)))
    assert [call.cache for call in calls] == ["miss"] * 3
    assert len(await asked(gateway, calls)) == 3


async def test_a_failing_provider_is_asked_by_each_and_each_is_told(gateway: Gateway, client: AsyncOpenAI) -> None:
    messages = fresh()
    fields: Any = {"model": "kept-cut", "messages": messages, "stream": True}
    done = await asyncio.gather(*(ask(client, **fields) for _ in range(4)), return_exceptions=True)
    assert all(isinstance(each, openai.APIError) for each in done)
