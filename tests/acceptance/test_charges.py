"""What completed calls cost: the charge against the provider's own log, to the token, whatever its usage looks like."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import httpx2
import pytest

from tests.support.gateway import Gateway, Key
from tests.support.raw_client import DONE, RawCall, ask, post

MICROS = 1_000_000
GRANTED = 1_000_000

WRONG = {
    # kind -> whether the report can be believed; then it is charged, else our own count is
    "big": True,
    "small": True,
    "two": True,
    "negative": False,
    "huge": False,
    "string": False,
    "float": False,
    "boolean": False,
    "null": False,
    "cached": False,
    "reasoning": False,
    "empty": False,
}
UNCOUNTED = ("tools", "parallel-tools", "reasoning", "refusal", "chars", "crlf+comments", "no-done", "no-finish")
WHOLE_IN_ONE = "sim-chars:size.60000"
MODELS = (
    WHOLE_IN_ONE,
    *(f"sim-wrong-usage:kind.{kind}" for kind in WRONG),
    *(f"sim-no-usage+{name}" for name in UNCOUNTED),
)


class Answered:
    """A call that was read to its end: the bill as its client saw it."""

    def __init__(self, request_id: str, usage: dict[str, Any], bill: dict[str, Any]) -> None:
        self.request_id, self.usage, self.bill = request_id, usage, bill

    @property
    def micros(self) -> int:
        return micros(self.usage["cost"])

    @property
    def session(self) -> str:
        return str(self.bill["session"])


def micros(credits_: object) -> int:
    exact = Decimal(str(credits_)) * MICROS
    assert exact == int(exact)
    return int(exact)


async def streamed(gateway: Gateway, key: Key, fields: dict[str, Any]) -> Answered:
    """A stream with usage asked for, read to [DONE]: exactly one usage, on the last frame before it."""
    fields = {**fields, "stream": True, "stream_options": {"include_usage": True}}
    async with post(gateway, key, fields) as call:
        await call.head()
        assert call.status == 200, await call.body()
        frames = await call.rest()
    assert frames[-1].kind == DONE
    with_usage = [frame for frame in frames if frame.data.get("usage")]
    assert with_usage == [frames[-2]]
    last = frames[-2].data
    assert last["usage"]["cost"] == last["x_tollgate"]["charge"]
    return Answered(call.headers["x-request-id"], last["usage"], last["x_tollgate"])


async def whole(gateway: Gateway, key: Key, fields: dict[str, Any]) -> Answered:
    """A call without streaming: the same bill in the body and in the headers."""
    async with httpx2.AsyncClient(verify=False, timeout=20) as client:
        headers = {"authorization": f"Bearer {key.text}"}
        reply = await client.post(f"{gateway.url}/v1/chat/completions", json=fields, headers=headers)
    assert reply.status_code == 200, reply.text
    body = reply.json()
    bill = body["x_tollgate"]
    assert micros(reply.headers["x-tollgate-charge"]) == micros(body["usage"]["cost"]) == micros(bill["charge"])
    assert micros(reply.headers["x-tollgate-balance"]) == micros(bill["balance"])
    assert reply.headers["x-tollgate-session"] == bill["session"]
    return Answered(reply.headers["x-request-id"], body["usage"], bill)


CALLS = {"stream": streamed, "whole": whole}


async def reconciled(gateway: Gateway, key: Key, answered: Answered) -> tuple[dict[str, Any], dict[str, Any]]:
    """The provider's log entry and the session's row, after client, ledger, journal and balance agreed."""
    served = await gateway.served(answered.request_id)
    row = await gateway.session(answered.session)
    balance = await gateway.idle(key)
    assert row["charged"] == answered.micros == micros(answered.bill["charge"]) >= 0
    assert row["absorbed"] == 0
    assert row["metadata"]["request_id"] == answered.request_id
    assert micros(answered.bill["balance"]) == balance.available == GRANTED - row["charged"]
    assert row["charged"] == row["prompt_tokens"] + row["output_tokens"]
    return served, row


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
COMPLETED = {
    "plain": ask(),
    "long": ask("[[tokens=900]]Tell me more."),
    "limit": ask(max_tokens=33),
    "completion-limit": ask(max_completion_tokens=7),
    "three choices": ask(n=3),
    "a tool": ask(tools=TOOLS),
    "system and names": {
        "model": "gpt-4o-mini",
        "messages": [
            {"role": "system", "content": "Be brief: ganz kurz, 简短。"},
            {"role": "user", "name": "Ada", "content": [{"type": "text", "text": "Hello, Zoë!"}]},
        ],
    },
    **{
        name: ask(model=f"sim-{name}")
        for name in (
            "tools", "parallel-tools", "no-tool-index", "reasoning", "refusal", "usage-on-finish", "usage-everywhere",
            "extra-fields", "crlf", "cr", "comments", "slow-drip", "no-space", "id-lines", "no-done", "no-finish",
            "no-role", "azure", "chars", "cached", "close-delimited",
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("way", CALLS)
@pytest.mark.parametrize("name", COMPLETED)
async def test_a_completed_call_costs_what_the_provider_logged(gateway: Gateway, key: Key, name: str, way: str) -> None:
    answered = await CALLS[way](gateway, key, COMPLETED[name])
    served, row = await reconciled(gateway, key, answered)
    # [DONE] ends the call: the bytes that end the chunked body may be dripping still when the gateway hangs up.
    assert served["completed"] or name == "slow-drip"
    assert row["charged"] == served["prompt_tokens"] + served["completion_tokens"]
    assert (row["prompt_tokens"], row["output_tokens"]) == (served["prompt_tokens"], served["completion_tokens"])
    assert row["reasoning_tokens"] == served["reasoning_tokens"]
    assert row["source"] == row["metadata"]["source"] == "provider"
    assert row["outcome"] == "completed"
    assert answered.usage["prompt_tokens"] == served["prompt_tokens"]
    assert answered.usage["completion_tokens"] == served["completion_tokens"]
    if way == "stream":
        assert row["metadata"]["counted_output"] == served["completion_tokens"]


@pytest.mark.parametrize("way", CALLS)
@pytest.mark.parametrize("name", ["", *UNCOUNTED])
async def test_without_usage_our_count_is_the_providers_to_the_token(
    gateway: Gateway, key: Key, name: str, way: str
) -> None:
    model = f"sim-no-usage+{name}" if name else "sim-no-usage"
    answered = await CALLS[way](gateway, key, ask(model=model, n=2))
    served, row = await reconciled(gateway, key, answered)
    assert served["usage_sent"] is None
    assert row["charged"] == served["prompt_tokens"] + served["completion_tokens"]
    assert (row["prompt_tokens"], row["output_tokens"]) == (served["prompt_tokens"], served["completion_tokens"])
    assert row["reasoning_tokens"] == served["reasoning_tokens"]
    assert row["source"] == "counted"
    assert row["metadata"]["counted_output"] == served["completion_tokens"]
    assert row["metadata"]["counted_prompt"] == served["prompt_tokens"]


@pytest.mark.parametrize("way", CALLS)
@pytest.mark.parametrize("kind", WRONG)
async def test_wrong_usage_is_charged_only_when_it_can_be_believed(
    gateway: Gateway, key: Key, kind: str, way: str
) -> None:
    answered = await CALLS[way](gateway, key, ask(model=f"sim-wrong-usage:kind.{kind}"))
    served, row = await reconciled(gateway, key, answered)
    reported = served["usage_sent"]
    if WRONG[kind]:
        assert row["charged"] == reported["prompt_tokens"] + reported["completion_tokens"]
        assert row["source"] == "provider"
    else:
        assert row["charged"] == served["prompt_tokens"] + served["completion_tokens"]
        assert row["source"] == "counted"
        assert answered.usage["completion_tokens"] == served["completion_tokens"]


@pytest.mark.parametrize("way", CALLS)
async def test_a_report_above_the_credit_takes_the_credit_and_no_more(gateway: Gateway, way: str) -> None:
    key = await gateway.key(200)
    answered = await CALLS[way](gateway, key, ask("[[tokens=50]]Hi.", model="sim-wrong-usage:kind.big"))
    served = await gateway.served(answered.request_id)
    row = await gateway.session(answered.session)
    reported = served["usage_sent"]["prompt_tokens"] + served["usage_sent"]["completion_tokens"]
    assert (row["charged"], row["absorbed"]) == (200, reported - 200)
    assert answered.micros == micros(answered.bill["charge"]) == 200
    balance = await gateway.idle(key)
    assert (balance.available, balance.debt) == (0, 0)


@pytest.mark.parametrize("tokens", [700, 1100, 5000])
async def test_a_chunk_larger_than_the_hold_is_covered_while_credit_lasts(
    gateway: Gateway, key: Key, tokens: int
) -> None:
    answered = await streamed(gateway, key, ask(f"[[tokens={tokens}]]Hi.", model=WHOLE_IN_ONE))
    served, row = await reconciled(gateway, key, answered)
    assert row["outcome"] == "completed"
    assert row["charged"] == served["prompt_tokens"] + tokens


async def test_a_chunk_larger_than_the_credit_is_not_delivered_and_not_charged(gateway: Gateway) -> None:
    key = await gateway.key(1_500)
    async with post(gateway, key, ask("[[tokens=2000]]Hi.", model=WHOLE_IN_ONE, stream=True)) as call:
        await call.head()
        frames = await call.rest()
    assert call.text == ""
    assert frames[-2].data["error"]["code"] == "insufficient_quota"
    row = await gateway.session(call.headers["x-tollgate-session"])
    assert (row["outcome"], row["charged"], row["absorbed"]) == ("cut", row["prompt_tokens"], 0)
    assert (await gateway.idle(key)).available == 1_500 - row["prompt_tokens"]


async def test_of_two_usages_the_last_one_counts(gateway: Gateway, key: Key) -> None:
    answered = await streamed(gateway, key, ask(model="sim-wrong-usage:kind.two"))
    served, row = await reconciled(gateway, key, answered)
    assert row["charged"] == served["prompt_tokens"] + served["completion_tokens"]


@pytest.mark.parametrize("way", CALLS)
async def test_a_usage_of_explicit_zeros_is_free(gateway: Gateway, key: Key, way: str) -> None:
    answered = await CALLS[way](gateway, key, ask(model="sim-zero-usage"))
    served, row = await reconciled(gateway, key, answered)
    assert served["completion_tokens"] > 0
    assert row["charged"] == 0
    assert row["source"] == "provider"


@pytest.mark.parametrize("way", CALLS)
async def test_the_session_row_tells_the_whole_story(gateway: Gateway, key: Key, way: str) -> None:
    answered = await CALLS[way](gateway, key, ask(model="falls-back"))
    _, row = await reconciled(gateway, key, answered)
    assert (row["provider"], row["model"], row["route"]) == ("sim", "gpt-4o-mini", "falls-back")
    assert row["stream"] is (way == "stream")
    assert (row["account_id"], row["key_id"]) == (key.account.id, key.id)
    assert row["started_at"] <= row["ended_at"]
    story = row["metadata"]
    assert story["price_version"] == row["price_version"] != ""
    assert story["ending"] == "completed"
    assert 0 <= story["first_content_ms"] <= story["duration_ms"]
    assert [(each["provider"], each["model"]) for each in story["attempts"]] == [
        ("gone", "x"),
        ("sim", "sim-500"),
        ("sim", "sim-error-frame:after=0"),
        ("sim", "gpt-4o-mini"),
    ]
    outcomes = [each["outcome"] for each in story["attempts"]]
    assert outcomes == ["connect", "server", "server", "completed"]
    assert [each["status"] for each in story["attempts"]][1::2] == [500, 200]
    assert answered.bill["attempts"] == 4


async def test_the_prices_that_a_session_was_charged_at_are_kept(gateway: Gateway, key: Key) -> None:
    answered = await streamed(gateway, key, ask())
    row = await gateway.session(answered.session)
    async with gateway.stores() as stores:
        kept = await stores.pool.fetchval("SELECT content FROM price_version WHERE id = $1", row["price_version"])
    assert kept is not None


async def test_what_clients_were_told_is_what_the_rows_and_the_balance_say(gateway: Gateway, key: Key) -> None:
    told = 0
    names = ("plain", "three choices", "a tool", "reasoning", "cached", "cr")
    for name in names:
        for way in CALLS.values():
            told += (await way(gateway, key, COMPLETED[name])).micros
    balance = await gateway.idle(key)
    rows = await gateway.sessions(key, 2 * len(names))
    assert len(rows) == 2 * len(names)
    assert told == sum(row["charged"] for row in rows) == GRANTED - balance.available == balance.charged
    async with gateway.stores() as stores:
        once = await stores.pool.fetch(
            "SELECT sid, count(*) FROM entry WHERE account_id = $1 AND sid IS NOT NULL GROUP BY sid", key.account.id
        )
        earned = await stores.pool.fetchval(
            "SELECT sum(amount) FROM posting JOIN entry USING (shard, ep, n) "
            "WHERE account_id = $1 AND sid IS NOT NULL AND ledger = 'earned'",
            key.account.id,
        )
    assert {row["count"] for row in once} == {1}
    assert len(once) == len(rows)
    assert abs(earned) == told


@pytest.mark.parametrize(
    "model", ["sim-500", "sim-429", "sim-400", "sim-401", "sim-error-frame", "sim-cut", "sim-html"]
)
@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_that_failed_costs_what_was_delivered_of_it(
    gateway: Gateway, key: Key, model: str, stream: bool
) -> None:
    async with post(gateway, key, ask(model=model, stream=stream)) as call:
        await call.head()
        delivered = await _delivered(call)
    balance = await gateway.idle(key)
    (row,) = await gateway.sessions(key, 1)
    assert row["charged"] == GRANTED - balance.available
    if not delivered:
        assert (row["charged"], row["outcome"]) == (0, "void")
        return
    served = await gateway.served(call.headers["x-request-id"])
    assert row["outcome"] == "error"
    assert row["charged"] == served["prompt_tokens"] + served["served_tokens"]
    assert delivered == served["text"]


async def _delivered(call: RawCall) -> str:
    if call.status != 200:
        await call.body()
        return ""
    await call.rest()
    return call.text
