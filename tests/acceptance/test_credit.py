"""Credit as clients meet it: refusals, slice holds, the clean cut, lowered limits, 1,000 calls on a balance for ten."""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import Any

import httpx2
import pytest

from loadtests.simulated_provider.text import count, pieces
from metering import grants
from tests.support.credit import held, limited, never_sent, prompt, refused, send, upstream
from tests.support.gateway import Gateway, Key
from tests.support.raw_client import DONE, RawCall, ask, post

SLICE = 512
FLOOR = 16


def stream(say: str = "Say something short.", **fields: Any) -> dict[str, Any]:
    return ask(say, stream=True, **fields)


# -- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micros", [0, 5])
@pytest.mark.parametrize("streaming", [True, False])
async def test_without_credit_a_call_is_refused_and_nothing_is_sent(
    gateway: Gateway, micros: int, streaming: bool
) -> None:
    key = await gateway.key(micros)
    reply = await send(gateway, key, ask(stream=streaming))
    refused(reply, "balance")
    assert await never_sent(gateway, reply)
    balance = await gateway.balance(key)
    assert (balance.available, balance.held, balance.charged, balance.sessions) == (micros, 0, 0, 0)


async def test_credit_that_other_calls_hold_is_worth_a_retry(gateway: Gateway) -> None:
    fields = stream("[[tokens=100]][[interval_ms=20]]Go on.", max_tokens=100)
    key = await gateway.key(prompt(fields) + 100)
    async with gateway.stores() as stores, post(gateway, key, fields) as call:
        assert (await held(stores, key)).available == 0
        for streaming in (True, False):
            reply = await send(gateway, key, ask(stream=streaming, max_tokens=FLOOR))
            refused(reply, "in_flight")
            assert await never_sent(gateway, reply)
        too_much = await send(gateway, key, ask("long " * 300, stream=True))
        refused(too_much, "balance")
        await call.head()
        await call.rest()
    assert (await gateway.idle(key)).available == 0


async def test_a_retry_after_the_others_ended_is_admitted(gateway: Gateway) -> None:
    fields = stream("[[tokens=400]][[interval_ms=20]]Go on.")
    key = await gateway.key(prompt(fields) + SLICE)
    async with gateway.stores() as stores, post(gateway, key, fields) as call:
        await held(stores, key)
        refused(await send(gateway, key, ask(max_tokens=20)), "in_flight")
        call.leave()
        await gateway.idle(key)
        assert (await send(gateway, key, ask(max_tokens=20))).status_code == 200


# -- Slices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "output"), [(None, SLICE), (100, 100), (513, SLICE)])
async def test_a_stream_holds_its_prompt_and_one_slice(
    gateway: Gateway, key: Key, limit: int | None, output: int
) -> None:
    fields = stream("[[tokens=60]][[interval_ms=20]]Go on.", **({} if limit is None else {"max_tokens": limit}))
    async with gateway.stores() as stores, post(gateway, key, fields) as call:
        balance = await held(stores, key)
        assert (balance.held, balance.sessions) == (prompt(fields) + output, 1)
        assert balance.available == 1_000_000 - balance.held
        await call.head()
        await call.rest()


async def test_a_hold_grows_slice_by_slice_while_the_stream_runs(gateway: Gateway, key: Key) -> None:
    fields = stream("[[tokens=1500]][[interval_ms=1]]Go on.")
    seen = set()
    async with gateway.stores() as stores, post(gateway, key, fields) as call:
        await held(stores, key)
        await call.head()
        reading = asyncio.create_task(call.rest())
        while not reading.done():
            so_far = prompt(fields) + count(call.text)
            balance = await stores.ledger.balance(key.account)
            if balance.held:
                seen.add(balance.held - prompt(fields))
                assert balance.held <= so_far + 2 * SLICE + 256
        await reading
    assert seen >= {SLICE, 2 * SLICE, 3 * SLICE}
    assert all(amount % SLICE == 0 for amount in seen)
    (row,) = await gateway.sessions(key, 1)
    assert row["charged"] == prompt(fields) + 1500 == 1_000_000 - (await gateway.idle(key)).available


# -- The clean cut ----------------------------------------------------------------------------------------------------


def whole_chunks(delivered: str, served: str, room: int) -> None:
    """The text is made of whole chunks of the provider's, and the next one would not have fitted."""
    assert served.startswith(delivered)
    assert count(delivered) <= room
    text = ""
    for piece, _ in pieces(served):
        text += piece
        if len(text) > len(delivered):
            break
        assert delivered.startswith(text)
    assert count(text) > room


@pytest.mark.parametrize("usage", [True, False])
@pytest.mark.parametrize("choices", [1, 2])
@pytest.mark.parametrize("pace", ["[[interval_ms=1]]", ""])
async def test_when_credit_ends_the_stream_is_cut_cleanly(
    gateway: Gateway, usage: bool, choices: int, pace: str
) -> None:
    fields = stream(f"[[tokens=3000]]{pace}Go on.", n=choices)
    if usage:
        fields["stream_options"] = {"include_usage": True}
    granted = prompt(fields) + 700
    key = await gateway.key(granted)
    async with post(gateway, key, fields) as call:
        await call.head()
        frames = await call.rest()
    *chunks, error, done = frames
    assert done.kind == DONE
    billed = chunks.pop() if usage else None
    finishes = [chunk.finishes for chunk in chunks if chunk.finishes]
    assert sorted(each for some in finishes for each in some) == [(index, "length") for index in range(choices)]
    assert all(chunk.finishes for chunk in chunks[-choices:])
    assert not any("usage" in chunk.data and chunk.data["usage"] for chunk in chunks)
    row = await gateway.session(call.headers["x-tollgate-session"])
    said = error.data["error"]
    assert said.pop("message")
    assert said == {
        "type": "insufficient_quota",
        "param": None,
        "code": "insufficient_quota",
        "metadata": {"limit": "balance", "session": row["sid"], "charged": row["charged"]},
    }
    assert set(error.data) == {"error"}
    if billed is not None:
        assert round(billed.data["usage"]["cost"] * 1_000_000) == row["charged"]
        assert billed.data["choices"] == []
    balance = await gateway.idle(key)
    assert balance.available == granted - row["charged"] >= 0
    assert (row["outcome"], row["metadata"]["ending"], row["source"]) == ("cut", "credit_cut", "counted")
    # The cut comes by our own exact count, so nothing is left for the house.
    assert (row["absorbed"], balance.debt) == (0, 0)
    assert row["prompt_tokens"] + row["output_tokens"] == row["charged"]
    await _delivered_what_was_charged(gateway, call, row, fields, granted)


async def _delivered_what_was_charged(
    gateway: Gateway, call: RawCall, row: dict[str, Any], fields: dict[str, Any], granted: int
) -> None:
    texts = ["" for _ in range(fields["n"])]
    for frame in call.frames:
        for choice in frame.data.get("choices") or []:
            texts[choice["index"]] += choice["delta"].get("content") or ""
    assert row["charged"] == prompt(fields) + sum(count(text) for text in texts) <= granted
    served = await gateway.served(call.headers["x-request-id"])
    assert row["charged"] <= served["prompt_tokens"] + served["served_tokens"]
    for text, choice in zip(texts, served["choices"], strict=True):
        assert choice["content"].startswith(text)
    if fields["n"] == 1:
        whole_chunks(texts[0], served["choices"][0]["content"], granted - prompt(fields))
    if "interval_ms" in fields["messages"][0]["content"]:
        assert served["aborted"]
        assert served["served_tokens"] < 1500


async def test_a_top_up_in_mid_stream_is_used(gateway: Gateway) -> None:
    fields = stream("[[tokens=1500]][[interval_ms=2]]Go on.")
    key = await gateway.key(prompt(fields) + 600)
    async with gateway.stores() as stores, post(gateway, key, fields) as call:
        await call.head()
        await call.until_content(400)
        exhausted = await stores.ledger.balance(key.account)
        assert (exhausted.available, exhausted.held) == (0, prompt(fields) + 600)
        more = grants.NewGrant(id=f"more_{key.account.id}", account=key.account.id, amount=5_000)
        assert (await grants.issue(stores.pool, stores.ledger, more)).state == "applied"
        frames = await call.rest()
    assert frames[-1].kind == DONE
    assert frames[-2].finishes == [(0, "stop")]
    assert count(call.text) == 1500
    balance = await gateway.idle(key)
    assert balance.available == 5_600 - 1_500


# -- Calls that cannot be metered in flight ---------------------------------------------------------------------------

ODD = '{ "model":"gpt-4o-mini",\t"messages":[{"role":"user","content":"[[tokens=300]]caf\\u00e9"}] ,%s "seed" : 7.0e0 }'
LOWERED = [
    ('"max_tokens" : 200,', '"max_tokens" : 50,'),
    ('"max_completion_tokens":200,', '"max_completion_tokens":50,'),
    ('"max_tokens":200, "max_completion_tokens": 90,', '"max_tokens":50, "max_completion_tokens": 50,'),
]


@pytest.mark.parametrize(("asked", "sent"), LOWERED)
async def test_little_credit_lowers_the_limit_and_changes_no_other_byte(
    gateway: Gateway, asked: str, sent: str
) -> None:
    body = (ODD % asked).encode()
    needed = prompt(json.loads(body))
    key = await gateway.key(needed + 50)
    reply = await send(gateway, key, body)
    assert reply.status_code == 200
    assert reply.headers["x-tollgate-limited"] == "credit"
    assert reply.json()["choices"][0]["finish_reason"] == "length"
    served = await gateway.served(reply.headers["x-request-id"])
    seen = await upstream(gateway, f"/__requests/{served['n']}/body")
    assert seen.content.decode() == ODD % sent
    assert (await gateway.idle(key)).available == 0
    row = await gateway.session(reply.headers["x-tollgate-session"])
    assert (row["charged"], row["absorbed"]) == (needed + 50, 0)
    assert row["metadata"]["limited"] is True


async def test_little_credit_adds_a_limit_where_there_was_none(gateway: Gateway) -> None:
    fields = ask("[[tokens=300]]Go on.", n=2)
    key = await gateway.key(prompt(fields) + 101)
    reply = await send(gateway, key, fields)
    assert reply.headers["x-tollgate-limited"] == "credit"
    served = await gateway.served(reply.headers["x-request-id"])
    seen = await upstream(gateway, f"/__requests/{served['n']}/body")
    assert seen.json() == fields | {"max_tokens": 50}
    row = await gateway.session(reply.headers["x-tollgate-session"])
    assert (row["charged"], row["absorbed"]) == (prompt(fields) + 100, 0)
    assert (await gateway.idle(key)).available == 1


async def test_enough_credit_leaves_the_body_as_it_came(gateway: Gateway, key: Key) -> None:
    body = (ODD % '"max_tokens" : 200,').encode()
    reply = await send(gateway, key, body)
    assert "x-tollgate-limited" not in reply.headers
    served = await gateway.served(reply.headers["x-request-id"])
    assert served["body_sha256"] == hashlib.sha256(body).hexdigest()


@pytest.mark.parametrize(
    ("limit", "choices", "least"), [(200, 1, FLOOR), (200, 3, 3 * FLOOR), (9, 1, 9), (None, 1, FLOOR)]
)
@pytest.mark.parametrize("model", ["gpt-4o-mini", "hidden"])
async def test_the_limit_is_never_lowered_below_the_floor(
    gateway: Gateway, model: str, limit: int | None, choices: int, least: int
) -> None:
    fields = ask("[[tokens=300]]Go on.", model=model, n=choices, stream=model == "hidden")
    if limit is not None:
        fields["max_tokens"] = limit
    poor = await gateway.key(prompt(fields) + least - 1)
    reply = await send(gateway, poor, fields)
    refused(reply, "balance")
    assert await never_sent(gateway, reply)
    enough = await gateway.key(prompt(fields) + least)
    reply = await send(gateway, enough, fields)
    assert reply.status_code == 200
    assert reply.headers.get("x-tollgate-limited") == (None if limit == 9 else "credit")
    assert (await gateway.idle(enough)).available == 0


@pytest.mark.parametrize(
    ("limit", "choices", "output"), [(None, 1, 1000), (300, 1, 300), (None, 2, 2000), (5000, 1, 1000)]
)
async def test_hidden_reasoning_holds_the_worst_case_for_streams_too(
    gateway: Gateway, key: Key, limit: int | None, choices: int, output: int
) -> None:
    fields = stream("[[tokens=40]][[interval_ms=20]]Go on.", model="hidden", n=choices)
    if limit is not None:
        fields["max_tokens"] = limit
    async with gateway.stores() as stores, post(gateway, key, fields) as call:
        assert (await held(stores, key)).held == prompt(fields) + output
        await call.head()
        assert "x-tollgate-limited" not in call.headers
        await call.rest()


# -- Many calls on little credit --------------------------------------------------------------------------------------

CALLS, AT_ONCE = 1_000, 64


async def _storm(gateway: Gateway, key: Key, many: list[dict[str, Any]]) -> list[httpx2.Response]:
    """All calls, `AT_ONCE` at a time, each read to its end."""
    bounds = httpx2.Limits(max_connections=AT_ONCE, max_keepalive_connections=AT_ONCE)
    headers = {"authorization": f"Bearer {key.text}"}
    queue = list(reversed(many))
    replies = []
    async with httpx2.AsyncClient(
        verify=False, base_url=gateway.url, headers=headers, limits=bounds, timeout=30
    ) as client:

        async def work() -> None:
            while queue:
                replies.append(await client.post("/v1/chat/completions", json=queue.pop()))

        await asyncio.gather(*(work() for _ in range(AT_ONCE)))
    return replies


async def test_a_thousand_whole_calls_on_credit_for_ten_are_ten(gateway: Gateway) -> None:
    fields = ask("[[tokens=40]][[interval_ms=2]]Go on.", max_tokens=40)
    each = prompt(fields) + 40
    key = await gateway.key(10 * each)
    replies = await _storm(gateway, key, [fields] * CALLS)
    served = [reply for reply in replies if reply.status_code == 200]
    for reply in replies:
        if reply.status_code != 200:
            refused(reply, reply.json()["error"]["metadata"]["limit"])
    assert (len(replies), len(served)) == (CALLS, 10)
    balance = await gateway.idle(key)
    rows = await gateway.sessions(key, 10)
    assert [(row["charged"], row["absorbed"]) for row in rows] == [(each, 0)] * 10
    assert (balance.available, balance.charged, balance.debt) == (0, 10 * each, 0)


async def test_a_thousand_mixed_calls_never_cost_more_than_was_granted(gateway: Gateway) -> None:
    whole = ask("[[tokens=40]][[interval_ms=1]]Go on.", max_tokens=40)
    streamed = stream("[[tokens=60]][[interval_ms=1]]Go on, please.", stream_options={"include_usage": True})
    granted = 5 * (prompt(whole) + 40) + 5 * (prompt(streamed) + 60)
    key = await gateway.key(granted)
    replies = await _storm(gateway, key, [whole, streamed] * (CALLS // 2))
    assert len(replies) == CALLS
    assert {reply.status_code for reply in replies} <= {200, 402}
    balance = await gateway.idle(key)
    admitted = sum(reply.status_code == 200 for reply in replies)
    rows = await gateway.sessions(key, admitted)
    assert len(rows) == admitted >= granted // (prompt(streamed) + 60)
    assert sum(row["charged"] for row in rows) == balance.charged == granted - balance.available <= granted
    assert all(0 <= row["absorbed"] <= (SLICE if row["stream"] else 0) for row in rows)
    assert all(row["outcome"] in ("completed", "cut") for row in rows)
    assert balance.debt == 0
    # What is left would not have paid for one more call of either kind.
    assert balance.available < prompt(whole) + FLOOR


# -- A key's own limits -----------------------------------------------------------------------------------------------


async def test_the_calls_of_a_minute_are_limited(gateway: Gateway) -> None:
    key = await gateway.key(rpm=3)
    for streaming in (True, False, True):
        assert (await send(gateway, key, ask(stream=streaming))).status_code == 200
    reply = await send(gateway, key, ask())
    assert 1 <= limited(reply, "requests") <= 60
    assert await never_sent(gateway, reply)
    await gateway.idle(key)
    assert len(await gateway.sessions(key, 3)) == 3


async def test_a_call_refused_for_credit_uses_none_of_the_minutes_calls(gateway: Gateway) -> None:
    key = await gateway.key(0, rpm=1)
    for _ in range(3):
        refused(await send(gateway, key, ask()), "balance")


@pytest.mark.parametrize("ending", ["completed", "abort", "failed", "cut off"])
async def test_a_slot_is_free_again_however_the_session_ended(gateway: Gateway, ending: str) -> None:
    key = await gateway.key(parallel=1)
    model = {"failed": "sim-error-frame", "cut off": "sim-cut"}.get(ending, "gpt-4o-mini")
    fields = stream("[[tokens=40]][[interval_ms=15]]Go on.", model=model)
    async with gateway.stores() as stores, post(gateway, key, fields) as call:
        await held(stores, key)
        if ending in ("completed", "abort"):
            reply = await send(gateway, key, ask())
            assert limited(reply, "parallel") >= 1
            assert await never_sent(gateway, reply)
        await call.head()
        if ending == "abort":
            await call.until_content(3)
            call.leave("rst")
        else:
            await call.rest()
        await gateway.idle(key)
        assert (await send(gateway, key, ask())).status_code == 200
