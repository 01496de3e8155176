"""Holds cover what is sent: limits that go upstream, prompts that are guarded, bodies that would stall a worker."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import httpx2
import pytest

from loadtests.simulated_provider.text import count
from tests.support.credit import held, never_sent, prompt, refused, send, upstream
from tests.support.gateway import Gateway, Key
from tests.support.raw_client import ask, post

DEFAULT_MOST = 16_384
HIDDEN_MOST = 1_000


async def sent(gateway: Gateway, reply: httpx2.Response) -> str:
    """The body that the provider got, to the byte."""
    served = await gateway.served(reply.headers["x-request-id"])
    return (await upstream(gateway, f"/__requests/{served['n']}/body")).content.decode()


async def charged(gateway: Gateway, reply: httpx2.Response) -> int:
    """What the call cost; nobody's credit was the reason of a limit, and the house paid nothing."""
    assert "x-tollgate-limited" not in reply.headers
    row = await gateway.session(reply.headers["x-tollgate-session"])
    assert (row["absorbed"], row["metadata"]["limited"]) == (0, False)
    return int(row["charged"])


# -- Output limits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"max_tokens": None}, {"n": 2}])
async def test_a_whole_call_without_a_limit_is_sent_with_the_one_that_was_held(
    gateway: Gateway, key: Key, fields: dict[str, Any]
) -> None:
    asked = ask("[[tokens=20]]Go on.", **fields)
    reply = await send(gateway, key, asked)
    assert reply.status_code == 200
    assert json.loads(await sent(gateway, reply)) == asked | {"max_tokens": DEFAULT_MOST}
    assert await charged(gateway, reply) == prompt(asked) + 20 * fields.get("n", 1)


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("streaming", [True, False])
async def test_a_limit_above_the_routes_is_lowered_to_it_where_nothing_is_metered_in_flight(
    gateway: Gateway, key: Key, field: str, streaming: bool
) -> None:
    asked = ask("[[tokens=3000]]Go on.", model="hidden", stream=streaming, **{field: 5_000})
    if streaming:
        asked["stream_options"] = {"include_usage": True}
    body = json.dumps(asked)
    reply = await send(gateway, key, body.encode())
    assert reply.status_code == 200
    assert await sent(gateway, reply) == body.replace('"hidden"', '"gpt-4o-mini"').replace("5000", str(HIDDEN_MOST))
    assert await charged(gateway, reply) == prompt(asked) + HIDDEN_MOST


async def test_a_stream_of_hidden_reasoning_without_a_limit_gets_the_one_that_was_held(
    gateway: Gateway, key: Key
) -> None:
    asked = ask("[[tokens=3000]]Go on.", model="hidden", stream=True)
    reply = await send(gateway, key, asked)
    assert json.loads(await sent(gateway, reply))["max_tokens"] == HIDDEN_MOST
    assert await charged(gateway, reply) == prompt(asked) + HIDDEN_MOST


@pytest.mark.parametrize("limits", [(50, 200), (200, 50)])
@pytest.mark.parametrize("streaming", [True, False])
async def test_of_two_limits_the_smaller_is_held_and_sent_in_both(
    gateway: Gateway, key: Key, limits: tuple[int, int], streaming: bool
) -> None:
    asked = ask("[[tokens=300]]Go on.", stream=streaming, max_tokens=limits[0], max_completion_tokens=limits[1])
    if streaming:
        asked["stream_options"] = {"include_usage": True}
    reply = await send(gateway, key, asked)
    assert await sent(gateway, reply) == json.dumps(asked | {"max_tokens": 50, "max_completion_tokens": 50})
    assert await charged(gateway, reply) == prompt(asked) + 50


@pytest.mark.parametrize("streaming", [True, False])
async def test_equal_limits_within_the_hold_pass_as_they_came(gateway: Gateway, key: Key, streaming: bool) -> None:
    asked = ask(stream=streaming, max_tokens=7, max_completion_tokens=7)
    if streaming:
        asked["stream_options"] = {"include_usage": True}
    body = json.dumps(asked, indent=1).encode()
    reply = await send(gateway, key, body)
    served = await gateway.served(reply.headers["x-request-id"])
    assert served["body_sha256"] == hashlib.sha256(body).hexdigest()


# -- Prompts ----------------------------------------------------------------------------------------------------------

LONG = "word " * 2_000


@pytest.mark.parametrize(
    "fields",
    [
        {"prediction": {"type": "content", "content": LONG}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"description": LONG}}}},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"description": LONG}}}]},
    ],
)
async def test_text_outside_of_the_messages_is_held_for(gateway: Gateway, fields: dict[str, Any]) -> None:
    asked = ask("[[tokens=60]][[interval_ms=20]]Go on.", stream=True, tool_choice="none", **fields)
    poor = await gateway.key(prompt(asked) + 1_000)
    reply = await send(gateway, poor, asked)
    refused(reply, "balance")
    assert await never_sent(gateway, reply)
    rich = await gateway.key()
    async with gateway.stores() as stores, post(gateway, rich, asked) as call:
        assert (await held(stores, rich)).held >= prompt(asked) + count(LONG)
        await call.head()
        call.leave()
    await gateway.idle(rich)


async def test_metadata_is_not_held_for(gateway: Gateway) -> None:
    asked = ask("Hello.", stream=True, max_tokens=5, metadata={"note": LONG})
    key = await gateway.key(prompt(asked) + 5)
    assert (await send(gateway, key, asked)).status_code == 200


@pytest.mark.parametrize("run", [" ", "\n", "a", "="])
async def test_a_prompt_of_one_run_of_a_megabyte_is_admitted(gateway: Gateway, key: Key, run: str) -> None:
    asked = ask(run * (1_000_000 // len(json.dumps(run)[1:-1])), stream=True, max_tokens=5)
    reply = await send(gateway, key, asked)
    # It was counted, held and sent: what a provider makes of such a prompt is its own affair.
    assert reply.headers["x-tollgate-session"], reply.text


# -- Bodies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ['"%d"', '"x"'])
async def test_more_root_members_than_the_bound_are_refused(gateway: Gateway, key: Key, name: str) -> None:
    many = ",".join((name % at if "%" in name else name) + ":1" for at in range(90_000))
    body = json.dumps(ask())[:-1] + "," + many + "}"
    reply = await send(gateway, key, body.encode())
    assert reply.status_code == 400
    assert "more than 1000 members" in reply.json()["error"]["message"]


async def test_doubled_members_that_are_not_read_pass_byte_for_byte(gateway: Gateway, key: Key) -> None:
    many = ",".join(f'"x":[{at},"]"]' for at in range(900))
    body = json.dumps(ask("[[tokens=5]]Go on.", max_tokens=9))[:-1] + "," + many + ',"x":"' + "y" * 10_000 + '"}'
    reply = await send(gateway, key, body.encode())
    assert reply.status_code == 200
    assert await sent(gateway, reply) == body
