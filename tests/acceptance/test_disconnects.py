"""Clients that leave, at every point of a call: one settlement, a fair charge, and the provider let go."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from loadtests.simulated_provider.text import count
from proxy.ids import session_id
from tests.support.credit import GRANTED, logged, prompt, settled_once, unique
from tests.support.gateway import Gateway, Key, until
from tests.support.ports import free_port
from tests.support.raw_client import COMMENT, Lateness, RawCall, ask, connected_from, post
from tests.support.simulated_provider import Simulated

CANCEL_MS = 250
DRIP = "sim-slow-drip:ms.1"
REPORTING = "sim-usage-everywhere+chars:size.1"
MODELS = (DRIP, REPORTING)
PATIENT = f"http://127.0.0.1:{free_port()}"
PROVIDERS = f"""
[providers.patient]
kind = "openai"
base_url = "{PATIENT}/v1"
on_disconnect = "finish"

[routes."gpt-4o"]
candidates = [{{ provider = "patient", model = "gpt-4o" }}]

[prices."gpt-4o"]
input = "1"
output = "1"

[routes."sim-slow-drip:ms.2"]
candidates = [{{ provider = "sim", model = "sim-slow-drip:ms.2" }}, {{ provider = "patient", model = "gpt-4o" }}]

[prices."sim-slow-drip:ms.2"]
input = "1"
output = "1"
"""


@pytest.fixture(scope="module")
def patient() -> Iterator[Simulated]:
    """A provider whose answers are wanted though the client has left."""
    with Simulated.start("--port", PATIENT.rpartition(":")[2]) as provider:
        yield provider


@pytest.fixture
async def key(gateway: Gateway) -> AsyncIterator[Key]:
    """One slot, so that a leaked one shows."""
    async with gateway.connected():
        yield await gateway.key(GRANTED, parallel=1)


async def left(
    gateway: Gateway, key: Key, fields: dict[str, Any], call: RawCall, how: str, at: str = ""
) -> tuple[Any, dict[str, Any]]:
    """Leave now; the provider's entry and the session's row, after the provider was let go within the bound."""
    async with Lateness(gateway) as late:
        at_ms = call.leave(how)
        entry = await logged(gateway, fields, over=True, at=at)
    assert entry["ended_ms"] - at_ms <= CANCEL_MS + late.ms
    return entry, await settled_once(gateway, key)


def fair(call: RawCall, entry: dict[str, Any], row: dict[str, Any]) -> None:
    """delivered <= charged <= what the provider logged."""
    delivered = entry["prompt_tokens"] + count(call.text)
    assert delivered <= row["charged"] <= entry["prompt_tokens"] + entry["served_tokens"]


HOW = pytest.mark.parametrize("how", ["fin", "rst"])


# -- Five points of a stream ------------------------------------------------------------------------------------------


@HOW
@pytest.mark.parametrize("committed", [False, True])
async def test_leaving_before_the_providers_headers_costs_nothing(
    gateway: Gateway, key: Key, how: str, committed: bool
) -> None:
    fields = unique(model="sim-slow-headers")
    async with post(gateway, key, fields) as call:
        await logged(gateway, fields)
        if committed:
            await call.head()
        entry, row = await left(gateway, key, fields, call, how)
    assert entry["aborted"]
    assert entry["status"] is None
    assert (row["charged"], row["outcome"], row["metadata"]["ending"]) == (0, "void", "client_gone")


@HOW
async def test_leaving_between_headers_and_content_costs_the_prompt(gateway: Gateway, key: Key, how: str) -> None:
    fields = unique(model="sim-slow-first")
    async with post(gateway, key, fields) as call:
        await logged(gateway, fields, answered=True)
        await call.head()
        async for frame in call.events():
            assert frame.kind == COMMENT
            break
        entry, row = await left(gateway, key, fields, call, how)
    assert entry["aborted"]
    assert row["charged"] == prompt(fields) == entry["prompt_tokens"]
    assert (row["outcome"], row["source"], row["output_tokens"]) == ("aborted", "counted", 0)


@HOW
@pytest.mark.parametrize("chunks", [1, 25])
async def test_leaving_mid_stream_costs_the_prompt_and_what_had_come(
    gateway: Gateway, key: Key, how: str, chunks: int
) -> None:
    fields = unique("[[tokens=300]][[interval_ms=15]]")
    async with post(gateway, key, fields) as call:
        await call.head()
        await call.until_content(chunks)
        entry, row = await left(gateway, key, fields, call, how)
    assert entry["aborted"]
    fair(call, entry, row)
    assert row["charged"] < prompt(fields) + 300
    assert (row["outcome"], row["source"], row["metadata"]["ending"]) == ("aborted", "counted", "client_gone")


@HOW
async def test_leaving_a_stream_of_two_choices_counts_both(gateway: Gateway, key: Key, how: str) -> None:
    fields = unique("[[tokens=300]][[interval_ms=20]]", n=2)
    async with post(gateway, key, fields) as call:
        await call.head()
        await call.until_content(30)
        entry, row = await left(gateway, key, fields, call, how)
    texts = [choice["content"] for choice in entry["choices"]]
    assert all(texts)
    assert prompt(fields) + 30 <= row["charged"] <= prompt(fields) + sum(count(text) for text in texts)


@HOW
async def test_leaving_at_the_last_chunk_costs_the_whole_answer(gateway: Gateway, key: Key, how: str) -> None:
    fields = unique("[[tokens=30]][[interval_ms=5]]")
    async with post(gateway, key, fields) as call:
        await call.head()
        async for frame in call.events():
            if frame.finishes:
                break
        entry, row = await left(gateway, key, fields, call, how)
    fair(call, entry, row)
    assert row["charged"] == prompt(fields) + 30
    assert row["outcome"] in ("aborted", "completed")


@HOW
async def test_leaving_during_usage_costs_the_whole_answer(gateway: Gateway, key: Key, how: str) -> None:
    fields = unique("[[tokens=2]]", model=DRIP)
    # The provider drips a byte a millisecond: usage is under way for a tenth of a second after the finish chunk.
    async with post(gateway, key, fields) as call:
        await call.head()
        async for frame in call.events():
            if frame.finishes:
                break
        entry, row = await left(gateway, key, fields, call, how)
    assert entry["aborted"]
    fair(call, entry, row)
    assert row["charged"] == prompt(fields) + 2
    assert (row["outcome"], row["source"], row["metadata"]["ending"]) == ("aborted", "counted", "client_gone")


@HOW
@pytest.mark.parametrize("model", ["sim-usage-everywhere", REPORTING])
async def test_leaving_costs_our_count_though_the_provider_reported_as_it_went(
    gateway: Gateway, key: Key, how: str, model: str
) -> None:
    fields = unique("[[tokens=300]][[interval_ms=10]]", model=model)
    async with post(gateway, key, fields) as call:
        await call.head()
        await call.until_content(40)
        entry, row = await left(gateway, key, fields, call, how)
    fair(call, entry, row)
    assert (row["outcome"], row["source"]) == ("aborted", "counted")


async def test_many_that_leave_at_once_all_settle(gateway: Gateway) -> None:
    key = await gateway.key(GRANTED)
    calls = 40

    async def leave_after(chunks: int) -> None:
        async with post(gateway, key, ask("[[tokens=300]][[interval_ms=10]]Go on.", stream=True)) as call:
            await call.head()
            await call.until_content(chunks)
            call.leave("rst" if chunks % 2 else "fin")

    await asyncio.gather(*(leave_after(1 + number) for number in range(calls)))
    balance = await gateway.idle(key)
    rows = await gateway.sessions(key, calls)
    assert len(rows) == calls
    assert sum(row["charged"] for row in rows) == GRANTED - balance.available
    assert {row["outcome"] for row in rows} == {"aborted"}
    for row in rows:
        served = await gateway.served(json.loads(row["metadata"])["request_id"])
        assert served["aborted"]
        assert served["prompt_tokens"] < row["charged"] <= served["prompt_tokens"] + served["served_tokens"]


# -- Calls answered whole ---------------------------------------------------------------------------------------------


@HOW
async def test_leaving_a_call_without_streaming_costs_its_prompt(gateway: Gateway, key: Key, how: str) -> None:
    # With a limit of its own, so that the body goes on as it is and the provider's log knows it.
    fields = ask(f"[[tokens=100]][[interval_ms=20]]Answer {session_id()}.", max_tokens=100)
    async with post(gateway, key, fields) as call:
        await logged(gateway, fields)
        entry, row = await left(gateway, key, fields, call, how)
    assert entry["aborted"]
    assert row["charged"] == prompt(fields)
    assert (row["outcome"], row["source"], row["stream"]) == ("aborted", "counted", False)


# -- A provider with on_disconnect = "finish" -------------------------------------------------------------------------


@HOW
@pytest.mark.usefixtures("patient")
async def test_a_call_that_is_to_finish_is_completed_without_its_client_and_charged_by_its_usage(
    gateway: Gateway, key: Key, how: str
) -> None:
    fields = ask(f"[[tokens=60]][[interval_ms=20]]Answer {session_id()}.", model="gpt-4o", max_tokens=100)
    async with post(gateway, key, fields) as call:
        await logged(gateway, fields, at=PATIENT)
        ours = call.writer.get_extra_info("sockname")[1]
        left_ms = call.leave(how)
        await until(lambda: not connected_from(gateway, ours))
        running = await logged(gateway, fields, at=PATIENT)
        entry = await logged(gateway, fields, over=True, at=PATIENT)
        row = await settled_once(gateway, key)
    assert running["running"]  # the client's connection is not kept for as long as the provider takes
    assert entry["ended_ms"] - left_ms > CANCEL_MS
    assert (entry["completed"], entry["aborted"], entry["served_tokens"]) == (True, False, 60)
    assert row["charged"] == entry["prompt_tokens"] + 60
    assert (row["outcome"], row["source"], row["stream"], row["output_tokens"]) == ("completed", "provider", False, 60)
    assert row["metadata"]["ending"] == "completed"


@pytest.mark.usefixtures("patient")
async def test_a_call_that_is_to_finish_is_not_waited_for_beyond_the_providers_bounds(
    gateway: Gateway, key: Key
) -> None:
    fields = ask(f"[[tokens=400]][[interval_ms=20]]Answer {session_id()}.", model="gpt-4o", max_tokens=400)
    async with post(gateway, key, fields) as call:
        began_ms = (await logged(gateway, fields, at=PATIENT))["started_ms"]
        call.leave()
        entry = await logged(gateway, fields, over=True, at=PATIENT)
        row = await settled_once(gateway, key)
    assert entry["aborted"]
    assert entry["ended_ms"] - began_ms < 400 * 20
    assert (row["outcome"], row["charged"]) == ("void", 0)
    assert row["metadata"]["attempts"][-1]["outcome"] == "head_timeout"


@HOW
@pytest.mark.usefixtures("patient")
async def test_a_stream_of_the_same_provider_is_cancelled_all_the_same(gateway: Gateway, key: Key, how: str) -> None:
    fields = unique("[[tokens=300]][[interval_ms=15]]", model="gpt-4o")
    async with post(gateway, key, fields) as call:
        await call.head()
        await call.until_content(10)
        entry, row = await left(gateway, key, fields, call, how, at=PATIENT)
    assert entry["aborted"]
    fair(call, entry, row)
    assert row["charged"] < prompt(fields) + 300
    assert (row["outcome"], row["source"], row["metadata"]["ending"]) == ("aborted", "counted", "client_gone")


async def test_only_the_provider_that_runs_decides_whether_a_call_is_finished(gateway: Gateway, key: Key) -> None:
    fields = ask(f"[[tokens=100]][[interval_ms=20]]Answer {session_id()}.", model="sim-slow-drip:ms.2", max_tokens=100)
    async with post(gateway, key, fields) as call:
        await logged(gateway, fields)
        entry, row = await left(gateway, key, fields, call, "fin")
    assert entry["aborted"]
    assert (row["outcome"], row["charged"]) == ("aborted", prompt(fields))
