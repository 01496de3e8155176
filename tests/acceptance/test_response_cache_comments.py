"""Streams that wait for another call's answer, over a running gateway: comments, then whatever comes."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

from tests.support import cached_calls
from tests.support.cached_calls import fresh
from tests.support.gateway import Gateway, Key
from tests.support.raw_client import COMMENT, DONE, Frame, RawCall, post

PROVIDERS = cached_calls.PROVIDERS
SLOW = "[[tokens=30]][[interval_ms=60]]"
"""1.8 s, where the first comment comes after 0.6 s and each further one after 0.4 s."""


@contextlib.asynccontextmanager
async def waiting(gateway: Gateway, leader: Key, follower: Key, model: str) -> AsyncIterator[tuple[RawCall, RawCall]]:
    """A call whose stream has begun, and an identical one that has waited for it until it was sent a comment."""
    fields = {"model": model, "messages": fresh(SLOW), "stream": True, "stream_options": {"include_usage": True}}
    body = json.dumps(fields).encode()
    async with post(gateway, leader, body) as first:
        await first.head()
        await first.until_content()
        async with post(gateway, follower, body) as second:
            await second.head()
            async for frame in second.events():
                assert frame.kind == COMMENT
                break
            yield first, second


def told(call: RawCall) -> list[Frame]:
    return [frame for frame in call.frames if frame.kind != COMMENT]


async def test_a_stream_that_waits_hears_comments_and_then_the_answer(gateway: Gateway, key: Key) -> None:
    async with waiting(gateway, key, key, "kept") as (first, second):
        await asyncio.gather(first.rest(), second.rest())
    assert second.status == 200
    assert second.headers["x-tollgate-cache"] == "wait"
    assert second.headers["x-request-id"]
    assert sum(frame.kind == COMMENT for frame in second.frames) >= 2
    given, answer = told(second), told(first)
    assert [frame.content for frame in given] == [frame.content for frame in answer]
    assert given[-1].kind == DONE
    bill = given[-2].data["x_tollgate"]
    assert (bill["cache"], bill["attempts"], bill["charge"]) == ("hit", 0, 0)
    await gateway.sessions(key, 2)


async def test_who_has_waited_and_cannot_pay_is_told_in_the_stream(gateway: Gateway, key: Key) -> None:
    poor = await gateway.key(micros=1)
    async with waiting(gateway, key, poor, "kept-shared") as (first, second):
        await asyncio.gather(first.rest(), second.rest())
    error, done = told(second)
    assert (error.data["error"]["code"], done.kind) == ("insufficient_quota", DONE)
    assert (await gateway.idle(poor)).available == 1


async def test_who_has_waited_for_a_call_that_broke_off_asks_the_provider_in_the_same_stream(
    gateway: Gateway, key: Key
) -> None:
    async with waiting(gateway, key, key, "kept") as (first, second):
        first.writer.transport.abort()
        await second.rest()
    given = told(second)
    assert any(frame.content for frame in given)
    assert [end for frame in given for end in frame.finishes] == [(0, "stop")]
    bill = given[-2].data["x_tollgate"]
    assert (bill["provider"], bill["attempts"]) == ("sim", 1)
    assert bill["charge"] > 0
    assert given[-1].kind == DONE
