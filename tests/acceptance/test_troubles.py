"""Every scripted trouble of a provider, streamed and not: what the client gets, who pays, that nothing stays held."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

import pytest

from loadtests.simulated_provider import text
from tests.support.gateway import SCRIPTS, Gateway, Key, Stores, until
from tests.support.strict_client import Answer, Stream, connected, stream_of

GRANT = 1_000_000
ASK = [{"role": "user", "content": "Say something short."}]


@dataclass(frozen=True)
class Refused:
    """An HTTP error before anything else; nothing is charged."""

    status: int
    code: str | None
    retry_after: str | None = None


@dataclass(frozen=True)
class InBand:
    """An error frame inside a 200: after content, which is charged, or before any, which costs nothing."""

    code: str | None
    content: bool = True


@dataclass(frozen=True)
class Whole:
    """A complete answer. `believed`: the provider's own usage is charged, else what is true."""

    believed: bool = True


Expected = Refused | InBand | Whole
OK = Whole()
GARBAGE, TRUNCATED = Refused(502, "upstream_invalid"), Refused(502, "upstream_truncated")
TIMEOUT, FAILED = Refused(504, "upstream_timeout"), Refused(502, None)

# script -> (what a stream gets, what a call without streaming gets)
TABLE: dict[str, tuple[Expected, Expected]] = {
    "slow-headers:ms.900": (OK, OK),
    "slow-headers:ms.9000": (InBand("upstream_timeout", content=False), TIMEOUT),
    "slow-first:ms.900": (OK, OK),
    "slow-first:ms.9000": (InBand("upstream_timeout", content=False), TIMEOUT),
    "slow-drip:tokens.5": (OK, OK),
    "stall": (InBand("upstream_timeout"), TIMEOUT),
    "stall:after.0": (InBand("upstream_timeout", content=False), TIMEOUT),
    "cut": (InBand("upstream_truncated"), TRUNCATED),
    "cut:after.0": (TRUNCATED, TRUNCATED),
    "cut:after.999": (InBand("upstream_truncated"), TRUNCATED),
    "cut:mid.1": (InBand("upstream_truncated"), TRUNCATED),
    "cut:how.rst:interval_ms.20": (InBand("upstream_truncated"), TRUNCATED),
    "truncate": (InBand("upstream_truncated"), TRUNCATED),
    "truncate:after.0": (TRUNCATED, TRUNCATED),
    "truncate:after.999": (InBand("upstream_truncated"), TRUNCATED),
    "empty": (TRUNCATED, GARBAGE),
    "close-delimited": (OK, OK),
    "garbage:interval_ms.20": (InBand("upstream_invalid"), GARBAGE),
    "garbage:after.0": (GARBAGE, GARBAGE),
    "garbage:kind.half:interval_ms.20": (InBand("upstream_invalid"), GARBAGE),
    "garbage:kind.array:interval_ms.20": (InBand("upstream_invalid"), GARBAGE),
    "garbage:kind.null:interval_ms.20": (InBand("upstream_invalid"), GARBAGE),
    "garbage:kind.empty:interval_ms.20": (InBand("upstream_invalid"), GARBAGE),
    "garbage:kind.binary:interval_ms.20": (InBand("upstream_invalid"), GARBAGE),
    "garbage:kind.html:interval_ms.20": (OK, GARBAGE),
    "not-http": (GARBAGE, GARBAGE),
    "html": (GARBAGE, GARBAGE),
    "json-for-stream": (FAILED, FAILED),
    "json-for-stream:body.completion": (GARBAGE, OK),
    "context-length": (Refused(400, "context_length_exceeded"),) * 2,
    "400": (Refused(400, None),) * 2,
    "401": (Refused(502, "upstream_key_refused"),) * 2,
    "402": (Refused(502, "upstream_key_refused"),) * 2,
    "403": (Refused(502, "upstream_key_refused"),) * 2,
    "404": (Refused(404, "model_not_found"),) * 2,
    "408": (Refused(408, None),) * 2,
    "409": (Refused(409, None),) * 2,
    "413": (Refused(413, None),) * 2,
    "422": (Refused(422, None),) * 2,
    "429": (Refused(429, "rate_limit_exceeded", retry_after="7"),) * 2,
    "429:code.insufficient_quota": (Refused(502, "upstream_key_refused"),) * 2,
    "500": (Refused(500, None),) * 2,
    "502": (Refused(502, None),) * 2,
    "503": (Refused(503, None),) * 2,
    "503:retry_after.3": (Refused(503, None, retry_after="3"),) * 2,
    "504": (Refused(504, None),) * 2,
    "529": (Refused(529, "overloaded"),) * 2,
    "fail-times:times.1000000:status.503": (Refused(503, None),) * 2,
    "error-frame:interval_ms.20": (InBand(None), FAILED),
    "error-frame:after.0": (FAILED, FAILED),
    "error-frame:done.0:code.rate_limit_exceeded:interval_ms.20": (
        InBand("rate_limit_exceeded"),
        Refused(502, "rate_limit_exceeded"),
    ),
    "event-error:interval_ms.20": (InBand("server_error"), GARBAGE),
    "event-error:after.0": (Refused(502, "server_error"), GARBAGE),
    "finish-error:interval_ms.20": (InBand("502"), Refused(502, "502")),
    "huge-frame:interval_ms.20": (InBand("upstream_invalid"), OK),
    "huge-frame:size.900000": (OK, OK),
    "no-usage": (Whole(believed=False),) * 2,
    "zero-usage": (OK, OK),
    "wrong-usage:kind.big": (OK, OK),
    "wrong-usage:kind.small": (OK, OK),
    "wrong-usage:kind.two": (OK, OK),
    **{
        f"wrong-usage:kind.{kind}": (Whole(believed=False),) * 2
        for kind in ("negative", "huge", "string", "float", "boolean", "null", "cached", "reasoning", "empty")
    },
    **dict.fromkeys(("usage-everywhere", "usage-on-finish", "cached", "comments", "crlf", "cr", "no-space"), (OK, OK)),
    **dict.fromkeys(("id-lines", "no-done", "no-finish", "no-role", "azure", "chars", "tools"), (OK, OK)),
    **dict.fromkeys(("parallel-tools", "no-tool-index", "reasoning", "refusal", "extra-fields"), (OK, OK)),
    "crlf+comments+id-lines+no-done+no-role+azure+usage-everywhere": (OK, OK),
}
SLOW = ("slow-headers:ms.1500", "slow-first:ms.1500")
PACED = "chars:interval_ms.5"
RECORDED = ("extra-fields", "chars:record.1", "reasoning:record.1", "parallel-tools:record.1", "refusal:record.1")


MODELS = tuple(f"sim-{script}" for script in (*TABLE, *RECORDED, *SLOW, PACED, "fail-times:tag.once"))


def test_the_table_has_every_script() -> None:
    assert {script.partition(":")[0] for script in TABLE if "+" not in script} == set(SCRIPTS)


def chat(model: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": ASK, **more}


async def ask(gateway: Gateway, key: Key, model: str, form: str) -> Answer:
    """One call, and the proof that its connection is in order after it."""
    body = chat(model)
    if form != "whole":
        body["stream"] = True
    if form == "stream with usage":
        body["stream_options"] = {"include_usage": True}
    async with connected(gateway.port) as client:
        answer = await client.chat(key.text, body, accept_encoding="gzip, deflate", accept="application/json")
        after = await client.request("GET", "/v1/models", key.text)
        assert after.status == 200
    assert len(answer.request_id) == 36
    assert not {"openai-organization", "openai-version", "openai-processing-ms", "set-cookie"} & set(answer.headers)
    return answer


FORMS = ("stream with usage", "stream", "whole")


@pytest.mark.parametrize("script", TABLE)
async def test_a_providers_trouble_reaches_the_client_in_order_and_is_charged_right_once(
    gateway: Gateway, key: Key, script: str
) -> None:
    answers = await asyncio.gather(*(ask(gateway, key, f"sim-{script}", form) for form in FORMS))
    charged = 0
    async with gateway.stores() as stores:
        for form, answer in zip(FORMS, answers, strict=True):
            expected = TABLE[script][form == "whole"]
            entry = await gateway.served(answer.request_id)
            row = await settled(stores, answer.headers["x-tollgate-session"])
            check(expected, form, answer, entry, row)
            charged += row["charged"]
        balance = await stores.ledger.balance(key.account)
    assert (balance.available, balance.held, balance.sessions) == (GRANT - charged, 0, 0)
    assert balance.charged == charged


async def settled(stores: Stores, session: str) -> dict[str, Any]:
    """The session's row, after checking that the journal has one ending of it."""
    row = dict(await until(lambda: stores.pool.fetchrow("SELECT * FROM session WHERE sid = $1", session), 15))
    entries = await stores.pool.fetchval("SELECT count(*) FROM entry WHERE sid = $1", session)
    assert entries == 1
    row["metadata"] = json.loads(row["metadata"])
    return row


def check(expected: Expected, form: str, answer: Answer, entry: dict[str, Any], row: dict[str, Any]) -> None:
    assert answer.headers["x-tollgate-route"] == row["route"]
    (attempt,) = row["metadata"]["attempts"]
    assert attempt["provider"] == "sim"
    if isinstance(expected, Refused):
        check_refused(expected, answer, entry, row)
    elif form == "whole":
        assert isinstance(expected, Whole)
        check_whole(expected, answer, entry, row)
    else:
        stream = stream_of(answer, usage_wanted=form == "stream with usage")
        assert (stream.error is None) == isinstance(expected, Whole)
        if isinstance(expected, InBand):
            check_in_band(expected, stream, entry, row)
        else:
            assert attempt["status"] == 200
            check_complete(expected, stream, entry, row)


def check_refused(expected: Refused, answer: Answer, entry: dict[str, Any], row: dict[str, Any]) -> None:
    error = answer.error()
    assert (answer.status, error["code"]) == (expected.status, expected.code)
    assert answer.headers.get("retry-after") == expected.retry_after
    assert answer.headers["x-tollgate-charge"] == "0"
    assert (row["outcome"], row["charged"], row["absorbed"]) == ("void", 0, 0)
    (attempt,) = row["metadata"]["attempts"]
    if error["code"] != "upstream_timeout":
        assert attempt["status"] == entry["status"]
    if entry["status"] is not None and entry["status"] != 200 and expected.status >= 500:
        assert "Sorry about that" not in error["message"]
        assert "api key" not in error["message"].lower()


def check_in_band(expected: InBand, stream: Stream, entry: dict[str, Any], row: dict[str, Any]) -> None:
    assert stream.error is not None
    assert stream.error["code"] == expected.code
    assert stream.usage is None
    if not expected.content:
        assert (stream.text(), row["outcome"], row["charged"]) == ("", "void", 0)
        return
    delivered = text.count(stream.text())
    assert delivered > 0
    assert (row["outcome"], row["charged"]) == ("error", entry["prompt_tokens"] + delivered)
    assert delivered <= entry["served_tokens"]
    assert stream.finishes() == {}


def check_complete(expected: Whole, stream: Stream, entry: dict[str, Any], row: dict[str, Any]) -> None:
    check_charge(expected, entry, row)
    assert stream.text() + stream.text("refusal") == entry["text"]
    if stream.usage is not None:
        bill = stream.chunks[-1]["x_tollgate"]
        assert bill["session"] == row["sid"]
        assert stream.usage["cost"] == bill["charge"] == row["charged"] / 1_000_000
        assert stream.usage["prompt_tokens"] + stream.usage["completion_tokens"] == row["charged"]
        assert (bill["provider"], bill["attempts"]) == ("sim", 1)


def check_whole(expected: Whole, answer: Answer, entry: dict[str, Any], row: dict[str, Any]) -> None:
    assert answer.status == 200
    assert "content-encoding" not in answer.headers
    check_charge(expected, entry, row)
    body = answer.json()
    assert (body["usage"]["cost"], body["x_tollgate"]["session"]) == (row["charged"] / 1_000_000, row["sid"])
    assert body["usage"]["prompt_tokens"] + body["usage"]["completion_tokens"] == row["charged"]
    assert float(answer.headers["x-tollgate-charge"]) == row["charged"] / 1_000_000
    assert (answer.headers["x-tollgate-provider"], answer.headers["x-tollgate-attempts"]) == ("sim", "1")
    assert float(answer.headers["x-tollgate-balance"]) <= 1


def check_charge(expected: Whole, entry: dict[str, Any], row: dict[str, Any]) -> None:
    true = {"prompt_tokens": entry["prompt_tokens"], "completion_tokens": entry["completion_tokens"]}
    usage = entry["usage_sent"] if expected.believed else true
    assert (row["prompt_tokens"], row["output_tokens"]) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert row["charged"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert (row["outcome"], row["source"] == "provider") == ("completed", expected.believed)


async def recorded(gateway: Gateway, answer: Answer) -> tuple[bytes, bytes]:
    """What the provider read and what it sent, byte for byte."""
    entry = await gateway.served(answer.request_id)
    host, _, port = gateway.provider.removeprefix("http://").partition(":")
    async with connected(int(port)) as client:
        asked = await client.request("GET", f"/__requests/{entry['n']}/body")
        sent = await client.request("GET", f"/__requests/{entry['n']}/response")
    assert (asked.status, sent.status, host) == (200, 200, "127.0.0.1")
    return asked.body, sent.body


@pytest.mark.parametrize("script", RECORDED)
async def test_plain_chunks_pass_byte_for_byte(gateway: Gateway, key: Key, script: str) -> None:
    answer = await ask(gateway, key, f"sim-{script}", "stream with usage")
    stream = stream_of(answer, usage_wanted=True)
    _, sent = await recorded(gateway, answer)
    *payloads, usage, done, rest = sent.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    assert b'"choices":[]' in usage
    assert [b"data: " + payload for payload in stream.payloads[:-1]] == payloads


@pytest.mark.parametrize("script", RECORDED)
async def test_a_whole_answer_keeps_every_byte_but_its_usage(gateway: Gateway, key: Key, script: str) -> None:
    answer = await ask(gateway, key, f"sim-{script}", "whole")
    _, sent = await recorded(gateway, answer)
    before, _, rest = sent.partition(b'"usage":')
    assert answer.body.startswith(before + b'"usage":')
    _, end = json.JSONDecoder().raw_decode(rest.decode())
    tail = rest.decode()[end:].encode().removesuffix(b"}")
    assert tail in answer.body[len(before) :]


async def test_a_request_that_needs_no_change_reaches_the_provider_byte_for_byte(gateway: Gateway, key: Key) -> None:
    body = (
        b' {"stream_options" : {"include_usage":true, "x":1e2},"zz":[1.50,"\\u00e9\\/"],"stream":true ,"model":'
        b'"sim-extra-fields","messages":[ {"role":"user","content":"hi \\ud83d\\ude80","api_base":"x"}],'
        b'"max_tokens":7}\n'
    )
    async with connected(gateway.port) as client:
        answer = await client.chat(key.text, body, cookie="c=1", x_forwarded_for="1.2.3.4", connection="authorization")
    stream_of(answer, usage_wanted=True)
    asked, _ = await recorded(gateway, answer)
    assert asked == body


async def test_a_provider_that_fails_once_works_the_next_time(gateway: Gateway, key: Key) -> None:
    first = await ask(gateway, key, "sim-fail-times:tag.once", "stream")
    second = await ask(gateway, key, "sim-fail-times:tag.once", "stream")
    assert (first.status, first.error()["type"]) == (500, "server_error")
    assert stream_of(second, usage_wanted=False).text()


@pytest.mark.parametrize("form", FORMS)
async def test_an_unreachable_provider_is_a_502_and_costs_nothing(gateway: Gateway, key: Key, form: str) -> None:
    answer = await ask(gateway, key, "unreachable", form)
    error = answer.error()
    assert (answer.status, error["code"]) == (502, "upstream_unreachable")
    row = await gateway.session(answer.headers["x-tollgate-session"])
    assert (row["outcome"], row["charged"]) == ("void", 0)
    assert [each["outcome"] for each in row["metadata"]["attempts"]] == ["connect"]
    assert (await gateway.idle(key)).available == GRANT


@pytest.mark.parametrize("form", FORMS)
async def test_a_route_falls_back_until_a_candidate_answers_and_charges_once(
    gateway: Gateway, key: Key, form: str
) -> None:
    answer = await ask(gateway, key, "falls-back", form)
    assert answer.status == 200
    assert (answer.headers["x-tollgate-attempts"], answer.headers["x-tollgate-provider"]) == ("4", "sim")
    row = await gateway.session(answer.headers["x-tollgate-session"])
    attempts = [(each["provider"], each["model"], each["outcome"]) for each in row["metadata"]["attempts"]]
    assert attempts == [
        ("gone", "x", "connect"),
        ("sim", "sim-500", "server"),
        ("sim", "sim-error-frame:after=0", "server"),
        ("sim", "gpt-4o-mini", "completed"),
    ]
    assert (row["outcome"], row["model"]) == ("completed", "gpt-4o-mini")
    assert (await gateway.idle(key)).available == GRANT - row["charged"] < GRANT


@pytest.mark.parametrize("script", SLOW)
async def test_a_slow_provider_keeps_the_client_awake_with_comments(gateway: Gateway, key: Key, script: str) -> None:
    answer = await ask(gateway, key, f"sim-{script}", "stream with usage")
    stream = stream_of(answer, usage_wanted=True)
    assert answer.body.startswith(b": ")
    assert stream.comments >= 2  # one at the commit, then one every keepalive_ms
    assert stream.chunks[-1]["x_tollgate"]["attempts"] == 1


async def test_the_body_ends_with_the_very_write_that_says_done(gateway: Gateway, key: Key) -> None:
    answer = await ask(gateway, key, f"sim-{PACED}", "stream with usage")
    assert answer.parts[-1].endswith(b"data: [DONE]\n\n")
    assert b'"x_tollgate"' in answer.parts[-1]  # usage and [DONE], once it is settled
    assert b'"x_tollgate"' not in b"".join(answer.parts[:-1])
    assert len(answer.parts) > 10  # nothing is gathered up before it is sent
