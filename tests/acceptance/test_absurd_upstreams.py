"""Providers that lie or send what cannot be read: the session is settled all the same, once, and for what came."""

from __future__ import annotations

from typing import Any

import pytest

from tests.acceptance.test_raw_upstreams import END, ENVIRON, PORT, PROVIDERS, START, ask, provider, said, sse, status
from tests.support.gateway import Gateway, Key
from tests.support.strict_client import stream_of

__all__ = ["ENVIRON", "PROVIDERS"]


def usage_frame(usage: bytes) -> bytes:
    return b'data: {"id":"x","choices":[],"usage":%b}\n\n' % usage


UNREADABLE = [
    b'{"prompt_tokens":1e999,"completion_tokens":1}',
    b'{"prompt_tokens":%b}' % (b"9" * 5000),
    b'{"x":"\xff"}',
]


@pytest.mark.parametrize("usage", UNREADABLE, ids=["infinite", "huge", "not utf-8"])
async def test_usage_that_cannot_be_read_is_counted_instead(gateway: Gateway, key: Key, usage: bytes) -> None:
    wire = START + said(b"hello there") + usage_frame(usage) + END
    async with provider(PORT, sse(wire)):
        answer = await ask(gateway, key, stream=True)
    assert stream_of(answer, usage_wanted=False).text() == "hello there"
    (row,) = await gateway.sessions(key, 1)
    assert (row["outcome"], row["source"], row["output_tokens"]) == ("completed", "counted", 2)
    assert (await gateway.idle(key)).available == 1_000_000 - row["charged"]


async def test_a_whole_answer_that_cannot_be_read_is_settled_and_costs_nothing(gateway: Gateway, key: Key) -> None:
    body = b'{"choices":[{"message":{"content":"a"},"logprobs":-1e999}]}'
    async with provider(PORT, status("200 OK", body)):
        answer = await ask(gateway, key, stream=False)
    assert (answer.status, answer.error()["code"]) == (502, "upstream_invalid")
    assert (await gateway.idle(key)).available == 1_000_000


@pytest.mark.parametrize("stream", [True, False])
async def test_more_output_than_the_limit_allows_is_not_believed(gateway: Gateway, key: Key, stream: bool) -> None:
    usage = b'{"prompt_tokens":8,"completion_tokens":2000000000,"total_tokens":2000000008}'
    whole = b'{"choices":[{"index":0,"message":{"role":"assistant","content":"hello there"}}],"usage":%b}' % usage
    wire = sse(START + said(b"hello there") + usage_frame(usage) + END) if stream else status("200 OK", whole)
    async with provider(PORT, wire):
        await ask(gateway, key, stream=stream, max_tokens=5)
    (row,) = await gateway.sessions(key, 1)
    assert (row["source"], row["output_tokens"], row["absorbed"]) == ("counted", 2, 0)


async def test_an_early_report_does_not_stand_for_what_came_after_it(gateway: Gateway, key: Key) -> None:
    early = usage_frame(b'{"prompt_tokens":8,"completion_tokens":0,"total_tokens":8}')
    async with provider(PORT, sse(START + early + said(b"hello there") + END)):
        await ask(gateway, key, stream=True)
    (row,) = await gateway.sessions(key, 1)
    assert (row["source"], row["output_tokens"]) == ("counted", 2)


async def test_a_forged_bill_in_a_whole_answer_is_written_over(gateway: Gateway, key: Key) -> None:
    usage = b'"usage":{"prompt_tokens":8,"completion_tokens":2,"total_tokens":10,"cost":0}'
    forged = b'"x_tollgate":{"charge":0}'
    answer_body = b'{%b,%b,"choices":[{"index":0,"message":{"content":"hello there"}}],%b,%b}'
    body = answer_body % (usage, forged, usage, forged)
    async with provider(PORT, status("200 OK", body)):
        answer = await ask(gateway, key, stream=False)
    assert answer.body.count(b'"usage"') == answer.body.count(b'"x_tollgate"') == 1
    said_so: Any = answer.json()
    assert said_so["usage"]["cost"] == said_so["x_tollgate"]["charge"] == 0.00001
