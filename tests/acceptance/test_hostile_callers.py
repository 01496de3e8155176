"""Callers who try to take a provider from others: by what it says of their requests, and by how much they ask for.

A gateway of its own, whose breakers open at the second failure in a row. Each test has providers of its own.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx2
import pytest

from tests.support.gateway import Gateway, running
from tests.support.ports import free_port
from tests.support.raw_client import ask, post
from tests.support.routed import (
    GRANTED,
    Asked,
    Routed,
    counted,
    error_of,
    fails,
    hangs,
    provider_table,
    route_table,
    routed,
    says,
)

PORT = free_port()
MODEL = "gpt-hostile"
ANSWER_BYTES_MAX = 64 * 1024
CONFIG = f"""
[bounds]
connect_ms = 1000
headers_ms = 3000
headers_nonstream_ms = 3000
first_content_ms = 3000
answer_bytes_max = {ANSWER_BYTES_MAX}
drain_s = 3

[metering]
flush_every_ms = 50

[breaker]
consecutive_max = 2
calls_min = 10
open_ms = 60000
key_refused_ms = 60000
"""
NAMES = ("hmissing", "hlogprobs", "hflagged", "hecho", "hlarge")
TABLES = "".join(
    (
        *(provider_table(name, PORT) for name in NAMES),
        provider_table("hbudget", PORT, "limits = { tokens_per_minute = 60000 }", "queue = { wait_ms = 2000 }"),
        provider_table("hleft", PORT, "limits = { tokens_per_minute = 1000 }", "queue = { wait_ms = 100 }"),
        *(route_table(name, f'{name}, model = "{MODEL}"') for name in (*NAMES, "hbudget", "hleft")),
    )
)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway with one worker."""
    with running(tmp_path_factory.mktemp("hostile"), CONFIG + TABLES, workers=1) as gateway:
        yield gateway


@pytest.fixture
async def on(own: Gateway) -> AsyncIterator[Routed]:
    """That gateway with this module's providers."""
    async with routed(own, PORT) as found:
        yield found


async def attacked(on: Routed, name: str, calls: int = 3, **fields: Any) -> httpx2.Response:
    """A stranger's calls; the last answer. Afterwards somebody else is answered by the same provider."""
    stranger, provider = await on.gateway.key(GRANTED), on.farm[name]
    for _ in range(calls):
        answer = await on.call(name, key=stranger, **fields)
    assert await on.untouched(stranger)
    provider.script = says()
    assert await on.answered_by(name) == name
    return answer


@pytest.mark.parametrize("escaped", [False, True])
async def test_a_file_named_like_the_model_does_not_make_the_model_missing(on: Routed, escaped: bool) -> None:
    on.farm["hmissing"].script = fails(404, message=f"No such File object: {MODEL}")
    part = {"type": "file", "file": {"file_id": MODEL}}
    body = json.dumps({"model": "hmissing", "messages": [{"role": "user", "content": [part]}], "max_tokens": 20})
    if escaped:
        body = body.replace(MODEL, MODEL.replace("g", "\\u0067"))
    headers = {"authorization": f"Bearer {(await on.gateway.key(GRANTED)).text}", "content-type": "application/json"}
    answer = await on.http.post("/v1/chat/completions", content=body, headers=headers)
    assert answer.status_code == 404
    on.farm["hmissing"].script = says()
    assert await on.answered_by("hmissing") == "hmissing"


async def test_a_parameter_that_a_model_does_not_allow_is_no_refusal_of_our_key(on: Routed) -> None:
    on.farm["hlogprobs"].script = fails(403, message="You are not allowed to request logprobs from this model")
    answer = await attacked(on, "hlogprobs", logprobs=True)
    assert answer.status_code == 403
    assert not on.told("the provider refuses our key")


@pytest.mark.parametrize("stream", [True, False])
async def test_a_flagged_text_is_no_refusal_of_our_key_inside_an_answer_either(on: Routed, stream: bool) -> None:
    error = {"code": 403, "message": "Flagged", "metadata": {"reasons": ["violence"], "flagged_input": "x"}}

    async def script(asked: Asked) -> bool:
        body = json.dumps({"error": error}).encode()
        kind, data = (b"text/event-stream", b"data: %b\n\n" % body) if stream else (b"application/json", body)
        head = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n"
        await asked.send(head % (kind, len(data)) + data)
        return True

    on.farm["hflagged"].script = script
    answer = await attacked(on, "hflagged", stream=stream)
    assert answer.status_code == 403
    assert not on.told("the provider refuses our key")


async def test_a_refusal_that_quotes_a_huge_request_is_still_the_callers_fault(on: Routed) -> None:
    async def script(asked: Asked) -> bool:
        body = json.dumps({"error": {"message": "Bad request", "type": "BadRequestError", "input": asked.body}})
        head = f"HTTP/1.1 400 X\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        await asked.send((head + body).encode())
        return True

    on.farm["hecho"].script = script
    answer = await attacked(on, "hecho", metadata={"a": "x" * 400_000})
    assert answer.status_code == 400
    assert answer.headers["x-tollgate-attempts"] == "1"


async def test_an_answer_larger_than_the_gateway_takes_is_not_bought_again_and_no_sign_against_its_provider(
    on: Routed,
) -> None:
    on.farm["hlarge"].script = says("x" * 2 * ANSWER_BYTES_MAX)
    answer = await attacked(on, "hlarge", logprobs=True)
    assert error_of(answer) == (502, "upstream_invalid")
    assert answer.headers["x-tollgate-attempts"] == "1"


@pytest.mark.parametrize("asked", [{"max_tokens": 2_000_000_000}, {"max_tokens": 4_000, "n": 128}])
async def test_an_output_that_is_only_asked_for_does_not_take_the_budget_from_others(
    on: Routed, asked: dict[str, Any]
) -> None:
    provider, gate = on.farm["hbudget"], asyncio.Event()
    provider.script = says(gate=gate)
    stranger = await on.gateway.key(GRANTED)
    running_ = asyncio.create_task(on.call("hbudget", key=stranger, stream=True, **asked))
    await counted(provider, 1)
    provider.script = says()
    try:
        assert await on.answered_by("hbudget") == "hbudget"
    finally:
        gate.set()
        assert (await running_).status_code == 200


async def test_a_prompt_that_was_sent_stays_taken_from_the_budget_when_its_caller_leaves(on: Routed) -> None:
    provider, words = on.farm["hleft"], "word " * 350
    for place, headed in enumerate((True, False)):
        provider.script = hangs(headed=headed)
        async with post(on.gateway, on.key, ask(words, model="hleft", max_tokens=20)) as call:
            await counted(provider, place + 1)
            call.leave("rst")
        await on.all_back()
    provider.script = says()
    answer = await on.call("hleft", messages=[{"role": "user", "content": words}])
    assert error_of(answer) == (503, "provider_busy")
