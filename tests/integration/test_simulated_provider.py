"""The simulated provider speaks OpenAI's wire, counts exactly, and logs what it really served."""

from __future__ import annotations

import hashlib
import http.client
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from loadtests.simulated_provider import text
from metering.ranks import encoding
from tests.support.simulated_provider import DEADLINE_S, Simulated, chat_body, read_until

KEYS = ["id", "object", "created", "model", "service_tier", "system_fingerprint", "choices", "usage", "obfuscation"]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    },
}


def count(said: str) -> int:
    return len(encoding("o200k_base").encode_ordinary(said))


@pytest.fixture(scope="module")
def provider() -> Iterator[Simulated]:
    with Simulated.start() as running:
        yield running
        assert running.stop() == 0


def client_of(provider: Simulated) -> openai.OpenAI:
    return openai.OpenAI(base_url=provider.base_url, api_key="sk-test", max_retries=0)


# -- the wire -------------------------------------------------------------------------------------------------------


def test_a_stream_has_openais_frames_in_openais_key_order(provider: Simulated) -> None:
    answered = provider.chat("gpt-4o-mini", usage=True)
    frames = answered.frames()
    assert answered.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert all(list(frame) == KEYS for frame in frames)
    assert {frame["model"] for frame in frames} == {"gpt-4o-mini-2024-07-18"}
    assert frames[0]["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert frames[-2]["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]
    assert frames[-1]["choices"] == []
    assert [frame["usage"] for frame in frames[:-1]] == [None] * (len(frames) - 1)
    assert answered.body.endswith(b"}\n\ndata: [DONE]\n\n")


def test_a_stream_carries_one_token_a_chunk_and_no_usage_unless_asked(provider: Simulated) -> None:
    answered = provider.chat("gpt-4o-mini", "[[say=Plain words and 12345678 digits, then a full stop.]]")
    deltas = answered.deltas()
    assert deltas == [
        "Plain",
        " words",
        " and",
        " ",
        "123",
        "456",
        "78",
        " digits",
        ",",
        " then",
        " a",
        " full",
        " stop",
        ".",
    ]
    assert all("usage" not in frame for frame in answered.frames())


def test_obfuscation_stops_when_asked_to(provider: Simulated) -> None:
    answered = provider.chat("gpt-4o-mini", stream_options={"include_obfuscation": False})
    assert b"obfuscation" not in answered.body


def test_usage_is_the_count_of_the_texts_in_one_go(provider: Simulated) -> None:
    messages = [
        {"role": "system", "content": "Answer in 日本語 🚀."},
        {
            "role": "user",
            "name": "Zoë",
            "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "2+2?"}],
        },
    ]
    answered = provider.chat("gpt-4o", messages=messages, usage=True)
    prompt = 3 + 3 + count("system") + count("Answer in 日本語 🚀.")
    prompt += 3 + count("user") + count("What is 2+2?") + 1 + count("Zoë")
    usage = answered.usages()[0]
    said = "".join(answered.deltas())
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (prompt, count(said))
    assert usage["total_tokens"] == prompt + count(said)
    logged = provider.last()
    assert logged["usage_sent"] == usage
    assert (logged["served_tokens"], logged["completion_tokens"], logged["text"]) == (count(said), count(said), said)


def test_a_default_answer_is_deterministic_and_of_middle_length(provider: Simulated) -> None:
    first, again = (provider.chat("gpt-4o", "Tell me about toll gates").deltas() for _ in range(2))
    assert first == again
    assert 60 <= count("".join(first)) <= 130


def test_every_start_of_a_default_answer_counts_the_tokens_of_its_chunks() -> None:
    for topic in range(60):
        so_far, tokens = "", 0
        for piece, cost in text.pieces(text.answer(f"topic {topic}", topic % 3, None)):
            so_far, tokens = so_far + piece, tokens + cost
            assert count(so_far) == tokens


@pytest.mark.parametrize("limit", [1, 2, 17, 41, 55])
@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_a_limit_cuts_at_exactly_that_many_tokens(provider: Simulated, limit: int, field: str) -> None:
    answered = provider.chat("gpt-4o-mini", "Hello", **{"usage": True, field: limit})
    assert answered.finishes() == ["length"]
    assert count("".join(answered.deltas())) == limit == answered.usages()[0]["completion_tokens"]


@pytest.mark.parametrize("limit", range(1, 14))
def test_a_limit_inside_a_character_still_counts_exactly(provider: Simulated, limit: int) -> None:
    answered = provider.chat("gpt-4o", "[[say=👩‍💻🇨🇭  \n\n 𓀀𓁐 and 🀄𓆉]]", max_tokens=limit)
    assert count("".join(answered.deltas())) == limit


def test_a_limit_no_answer_reaches_changes_nothing(provider: Simulated) -> None:
    assert provider.chat("gpt-4o", "[[tokens=20]]", max_tokens=20).finishes() == ["stop"]


def test_choices_take_turns_and_are_billed_together(provider: Simulated) -> None:
    answered = provider.chat("gpt-4o", "[[tokens=30]] and more", n=3, usage=True)
    texts = ["".join(answered.deltas(choice=choice)) for choice in range(3)]
    assert [count(said) for said in texts] == [30, 30, 30]
    assert len(set(texts)) > 1
    assert answered.finishes() == ["stop"] * 3
    assert answered.usages()[0]["completion_tokens"] == 90


def test_the_last_message_steers_length_and_pace(provider: Simulated) -> None:
    answered = provider.chat("gpt-4o", "[[tokens=6]][[interval_ms=40]][[ttft_ms=100]]", usage=True)
    logged = provider.last()
    assert answered.usages()[0]["completion_tokens"] == 6
    assert logged["ended_ms"] - logged["started_ms"] >= 100 + 5 * 40 - 20


def test_a_call_without_stream_answers_in_one_body(provider: Simulated) -> None:
    answered = provider.chat("gpt-4o", stream=False)
    body = answered.json()
    assert list(body) == ["id", "object", "created", "model", "choices", "usage", "service_tier", "system_fingerprint"]
    assert body["usage"]["completion_tokens"] == count(body["choices"][0]["message"]["content"])
    logged = provider.last()
    assert logged["served_tokens"] == body["usage"]["completion_tokens"]
    assert logged["text"] == body["choices"][0]["message"]["content"]


def test_offered_tools_are_called_with_arguments_in_pieces(provider: Simulated) -> None:
    answered = provider.chat("gpt-4o", "Zug", tools=[TOOL], usage=True)
    calls = [
        c["delta"]["tool_calls"][0] for f in answered.frames() for c in f["choices"] if c["delta"].get("tool_calls")
    ]
    assert calls[0]["function"] == {"name": "get_weather", "arguments": ""}
    assert all(list(call) == ["index", "function"] for call in calls[1:])
    arguments = "".join(call["function"]["arguments"] for call in calls)
    assert json.loads(arguments) == {"city": "Zürich, Zug", "days": 42}
    assert answered.finishes() == ["tool_calls"]
    assert answered.usages()[0]["completion_tokens"] == count("get_weather") + count(arguments)
    assert provider.last()["choices"][0]["tools"] == [{"name": "get_weather", "arguments": arguments}]


def test_a_limit_cuts_the_arguments_of_a_tool_call(provider: Simulated) -> None:
    answered = provider.chat("gpt-4o", "Zug", tools=[TOOL], max_tokens=6, stream=False).json()
    made = answered["choices"][0]["message"]["tool_calls"][0]["function"]
    assert count(made["name"]) + count(made["arguments"]) == 6 == answered["usage"]["completion_tokens"]
    assert answered["choices"][0]["finish_reason"] == "length"


def test_a_tools_answer_or_choice_none_leads_to_text(provider: Simulated) -> None:
    said = [{"role": "user", "content": "Zug"}, {"role": "tool", "tool_call_id": "x", "content": "rain"}]
    assert provider.chat("gpt-4o", tools=[TOOL], messages=said).finishes() == ["stop"]
    assert provider.chat("gpt-4o", tools=[TOOL], tool_choice="none").finishes() == ["stop"]
    assert provider.chat("sim-no-usage", tools=[TOOL]).finishes() == ["stop"]
    assert provider.chat("sim-no-usage", tools=[TOOL], tool_choice="required").finishes() == ["tool_calls"]


def test_a_response_format_gets_json_of_its_schema(provider: Simulated) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "tags": {"type": "array", "items": {"enum": ["a"]}}},
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert json.loads("".join(provider.chat("gpt-4o", response_format=wanted).deltas())) == {"ok": True, "tags": ["a"]}
    plain = provider.chat("gpt-4o", response_format={"type": "json_object"})
    assert isinstance(json.loads("".join(plain.deltas())), dict)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{", None),
        (b"[]", None),
        (b'{"a":' * 5000, None),
        (chat_body("", "x"), "model"),
        (chat_body("gpt-4o", messages=[]), "messages"),
        (chat_body("gpt-4o", max_tokens=-1), "max_tokens"),
        (chat_body("gpt-4o", max_tokens=True), "max_tokens"),
        (chat_body("gpt-4o", n=10**9), "n"),
        (chat_body("sim-stall:afterr=3"), "model"),
        (chat_body("sim-stall:after=x"), "model"),
        (chat_body("gpt-4o", "[[tokens=-1]]"), "messages"),
    ],
)
def test_a_bad_request_is_a_400_in_openais_form(provider: Simulated, body: bytes, param: str | None) -> None:
    answered = provider.request("POST", "/v1/chat/completions", body)
    assert answered.status == 400
    assert list(answered.json()["error"]) == ["message", "type", "param", "code"]
    assert answered.json()["error"]["param"] == param


def test_models_are_listed_and_unknown_ones_are_404(provider: Simulated) -> None:
    listed = [model["id"] for model in provider.request("GET", "/v1/models").json()["data"]]
    assert listed[:2] == ["gpt-4o-mini", "gpt-4o"]
    assert {"sim-stall", "sim-429", "sim-huge-frame"} <= set(listed)
    assert provider.request("GET", "/v1/models/sim-stall:after=3").json()["id"] == "sim-stall:after=3"
    assert provider.request("GET", "/v1/models/sim-nothing").json()["error"]["code"] == "model_not_found"
    assert provider.chat("sim-nothing").status == 404
    assert provider.request("GET", "/v1/nothing").status == 404


# -- the official SDK -----------------------------------------------------------------------------------------------


def test_the_sdk_streams_and_reads_usage(provider: Simulated) -> None:
    said: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hi"}]
    with client_of(provider) as client:
        chunks = list(
            client.chat.completions.create(
                model="gpt-4o",
                messages=said,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        assert client.models.retrieve("gpt-4o").id == "gpt-4o"
        with pytest.raises(openai.RateLimitError) as refused:
            client.chat.completions.create(model="sim-429", messages=said)
    assert chunks[-1].usage is not None
    words = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert chunks[-1].usage.completion_tokens == count(words)
    assert refused.value.response.headers["retry-after"] == "7"


async def test_the_async_sdk_keeps_its_connection_over_streams(provider: Simulated) -> None:
    async with openai.AsyncOpenAI(base_url=provider.base_url, api_key="sk-test", max_retries=0) as client:
        for _ in range(3):
            stream = await client.chat.completions.create(
                model="gpt-4o", messages=[{"role": "user", "content": "Hi"}], stream=True
            )
            assert len([chunk async for chunk in stream]) > 60


# -- HTTP -----------------------------------------------------------------------------------------------------------


def test_a_connection_serves_one_request_after_the_other(provider: Simulated) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", provider.port, timeout=DEADLINE_S)
    connection.connect()
    own = connection.sock
    for stream in (True, False, True):
        connection.request("POST", "/v1/chat/completions", chat_body("gpt-4o", stream=stream))
        assert connection.getresponse().read()
        assert connection.sock is own
    connection.close()


def test_requests_are_read_in_any_pieces_and_in_chunks(provider: Simulated) -> None:
    body = chat_body("gpt-4o", "[[say=in pieces]]", stream=False)
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    with provider.connect(chat_body("gpt-4o")) as raw:
        read_until(raw, b"0\r\n\r\n")
        for byte in head:
            raw.send(bytes([byte]))
        assert read_until(raw, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        for byte in body:
            raw.send(b"1\r\n%c\r\n" % byte)
        raw.sendall(b"0\r\n\r\n")
        assert b"in pieces" in read_until(raw, b"}]")
    logged = provider.last()
    assert logged["body_sha256"] == hashlib.sha256(body).hexdigest()


def test_pipelined_requests_are_answered_in_order(provider: Simulated) -> None:
    get = b"GET /v1/models/%b HTTP/1.1\r\nhost: x\r\n\r\n"
    with provider.connect(chat_body("gpt-4o", "[[tokens=3]][[interval_ms=20]]")) as raw:
        raw.sendall(get % b"gpt-4o" + get % b"sim-cr")
        got = read_until(raw, b'"id":"sim-cr"')
    assert got.index(b"[DONE]") < got.index(b'"id":"gpt-4o"') < got.index(b'"id":"sim-cr"')


def test_what_is_not_http_gets_a_400(provider: Simulated) -> None:
    with provider.connect(b"") as raw:
        read_until(raw, b'"code":null}}')
        raw.sendall(b"\x16\x03\x01 nonsense\r\n\r\n")
        assert read_until(raw, b"never").startswith(b"HTTP/1.1 400 ")


def test_a_reader_that_does_not_read_is_waited_for(provider: Simulated) -> None:
    total = 60_000
    with provider.connect(chat_body("gpt-4o", f"[[tokens={total}]]"), receive_bytes=4096) as raw:
        seen = [0] * 20

        def settled(entry: dict[str, Any]) -> bool:
            seen.append(entry["served_tokens"])
            return seen[-1] == seen[-20] > 0

        provider.wait_for(settled)
        assert provider.last()["running"]
        assert seen[-1] < total
        read_until_done(raw)
    assert provider.wait_for(lambda e: not e["running"])["served_tokens"] == total


def read_until_done(raw: Any) -> None:
    tail = b""
    while b"[DONE]" not in tail:
        tail = tail[-16:] + raw.recv(1 << 20)
