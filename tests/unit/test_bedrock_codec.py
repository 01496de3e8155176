"""The bedrock codec on transcripts: whole, a byte at a time and cut anywhere, always with equal events."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from providers.bedrock import BLOCKS_OPEN_MAX, CITATIONS_MAX, BedrockCodec
from providers.codec import ChatCall, Upstream
from providers.events import Channel, Chunk, Completed, Event, Failed, ReportedUsage, UsageSeen
from tests.support.codecs import bytewise, choices, chunks, cut, ends_once, fed, only, payloads, texts
from tests.support.eventstream import TRANSCRIPTS, event, wire

NAMES = sorted(path.stem for path in TRANSCRIPTS.glob("*.txt"))
CLAUDE = "us.anthropic.claude-sonnet-4-5-20250929-v1:0"
UPSTREAM = Upstream("p", "bedrock", b"", key="bearer")
MESSAGES = b'{"model":"m","messages":[{"role":"user","content":"Hi"}]}'


def codec(upstream: Upstream = UPSTREAM, **call: Any) -> BedrockCodec:
    return BedrockCodec(upstream, ChatCall(**{"body": b"", "model": CLAUDE, "stream": True, "created": 7, **call}))


def replay(pieces: list[bytes], **call: Any) -> list[Event]:
    return fed(codec(**call), pieces)


def read(name: str, **call: Any) -> list[Event]:
    return replay([wire(name)], **call)


def deltas(events: list[Event]) -> list[dict[str, Any]]:
    return [choice["delta"] for choice in choices(events)]


def finish(events: list[Event]) -> str:
    (found,) = [choice for choice in choices(events) if choice["finish_reason"] is not None]
    return str(found["finish_reason"])


@pytest.mark.parametrize("name", NAMES)
def test_a_byte_at_a_time_gives_the_same_events(name: str) -> None:
    assert replay(bytewise(wire(name))) == read(name)


@given(st.sampled_from(NAMES), st.lists(st.integers(0, 3000), max_size=6))
def test_any_cut_gives_the_same_events(name: str, cuts: list[int]) -> None:
    assert replay(cut(wire(name), cuts)) == read(name)


@pytest.mark.parametrize("name", NAMES)
def test_every_stream_ends_exactly_once_and_begins_with_the_role(name: str) -> None:
    events = read(name)
    assert ends_once(events)
    if payloads(events):
        assert deltas(events)[0] == {"role": "assistant", "content": "", "refusal": None}
        assert not chunks(events)[0].content


@pytest.mark.parametrize("name", NAMES)
def test_what_is_counted_is_what_the_client_sees(name: str) -> None:
    events = read(name)
    shown = deltas(events)
    calls = [call for delta in shown for call in delta.get("tool_calls", [])]
    assert texts(events, Channel.CONTENT) == "".join(delta.get("content") or "" for delta in shown)
    assert texts(events, Channel.REASONING) == "".join(delta.get("reasoning_content", "") for delta in shown)
    assert texts(events, Channel.TOOL_NAME) == "".join(call["function"].get("name", "") for call in calls)
    assert texts(events, Channel.TOOL_ARGUMENTS) == "".join(call["function"]["arguments"] for call in calls)


def test_a_plain_stream_becomes_one_chunk_a_delta() -> None:
    one = codec()
    one.request(ChatCall(body=MESSAGES, model=CLAUDE, stream=True, created=7), "req-1")
    events = one.feed(wire("plain"))
    assert [delta.get("content") for delta in deltas(events)] == ["", "Hello", " world, ", "\u2028é \U0001f60a", None]
    assert {(each["id"], each["object"], each["created"], each["model"]) for each in payloads(events)} == {
        ("chatcmpl-req-1", "chat.completion.chunk", 7, CLAUDE)
    }
    assert finish(events) == "stop"
    assert [type(each).__name__ for each in events[-3:]] == ["Chunk", "UsageSeen", "Completed"]
    assert [each.finished for each in chunks(events)][-1] == (0,)
    usage = only(events, UsageSeen).usage
    assert (usage.prompt, usage.output) == (9, 4)
    assert one.open_choices == ()
    assert one.feed(b"anything") == one.end_of_stream() == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("plain", "stop"),
        ("cached", "stop"),
        ("unknown", "stop"),
        ("silent", "stop"),
        ("server_tool", "stop"),
        ("limit", "length"),
        ("guardrail", "content_filter"),
        ("tools", "tool_calls"),
    ],
)
def test_stop_reasons_have_openais_names(name: str, reason: str) -> None:
    events = read(name)
    assert (finish(events), type(events[-1])) == (reason, Completed)


def test_tool_calls_are_numbered_and_a_call_without_arguments_has_an_empty_object() -> None:
    events = read("tools")
    calls = [call for delta in deltas(events) for call in delta.get("tool_calls", [])]
    assert calls == [
        {"index": 0, "id": "tooluse_a1", "type": "function", "function": {"name": "get_weather", "arguments": ""}},
        {"index": 0, "function": {"arguments": '{"city":'}},
        {"index": 0, "function": {"arguments": ' "Paris"}'}},
        {"index": 1, "id": "tooluse_b2", "type": "function", "function": {"name": "get_time", "arguments": ""}},
        {"index": 1, "function": {"arguments": "{}"}},
    ]
    start = event("contentBlockStart", b'{"contentBlockIndex":3,"start":{"toolUse":{"toolUseId":"t","name":"n"}}}')
    events = replay([start + event("contentBlockStop", b'{"contentBlockIndex":3}')])
    assert texts(events, Channel.TOOL_ARGUMENTS) == "{}"


def test_calls_that_bedrock_runs_itself_are_not_the_clients() -> None:
    events = read("server_tool")
    assert texts(events, Channel.CONTENT) == "It is 42."
    assert not any("tool_calls" in delta for delta in deltas(events))


def test_thinking_is_shown_and_its_signature_can_come_back() -> None:
    assert [delta for delta in deltas(read("reasoning")) if "thinking_blocks" in delta] == [
        {
            "reasoning_content": "The user ",
            "thinking_blocks": [{"index": 0, "type": "thinking", "thinking": "The user "}],
        },
        {
            "reasoning_content": "greets.",
            "thinking_blocks": [{"index": 0, "type": "thinking", "thinking": "greets."}],
        },
        {"thinking_blocks": [{"index": 0, "type": "thinking", "thinking": "", "signature": "U2lnbmF0dXJl"}]},
        {"thinking_blocks": [{"index": 1, "type": "redacted_thinking", "data": "Encrypted"}]},
    ]


def test_thinking_of_models_that_do_not_sign_is_sent_once() -> None:
    shown = deltas(read("reasoning", model="openai.gpt-oss-120b-1:0"))
    assert {"reasoning_content": "greets."} in shown


def test_redacted_thinking_that_is_no_text_is_kept_as_it_came() -> None:
    (kept,) = [delta for delta in deltas(read("redacted_bytes")) if "thinking_blocks" in delta]
    assert kept["thinking_blocks"] == [{"index": 0, "type": "redacted_thinking", "data": "//79", "encoding": "base64"}]


def test_the_cache_is_part_of_the_prompt_and_its_times_to_live_are_told() -> None:
    usage: ReportedUsage = only(read("cached"), UsageSeen).usage
    assert (usage.prompt, usage.output, usage.cached, usage.cache_write) == (135, 2, 100, 30)
    assert usage.cache_write_1h == 20
    told = json.loads(usage.raw)
    assert told["total_tokens"] == 137
    assert told["prompt_tokens_details"]["cache_write_tokens_details"] == {"ttl_5m_tokens": 10, "ttl_1h_tokens": 20}


def test_counts_that_are_none_are_reported_as_such() -> None:
    usage = only(read("bad_usage"), UsageSeen).usage
    assert (usage.prompt, usage.output) == (-1, -1)


def test_times_to_live_that_do_not_add_up_are_not_told() -> None:
    usage = (
        b'{"inputTokens":1,"outputTokens":1,"cacheWriteInputTokens":9,"cacheDetails":[{"ttl":"1h","inputTokens":8}]}'
    )
    found = only(codec().feed(event("metadata", b'{"usage":%b}' % usage)), UsageSeen).usage
    assert (found.cache_write, found.cache_write_1h, b"ttl" in found.raw) == (9, 8, False)


def test_half_a_report_is_none() -> None:
    assert not codec().feed(event("metadata", b'{"usage":{"inputTokens":3}}'))


def test_sources_are_annotations_or_citations() -> None:
    (told,) = [delta for delta in deltas(read("citations")) if "annotations" in delta]
    place = {"start_index": 5, "end_index": 15, "url": "https://example.org/cats", "title": "Cats"}
    assert told["annotations"] == [{"index": 0, "type": "url_citation", "url_citation": place}]
    assert [(each["title"], each["index"], each["end_index"]) for each in told["citations"]] == [("Notes", 0, 15)]


def test_a_flood_of_citations_is_not_gathered() -> None:
    one = event("contentBlockDelta", b'{"contentBlockIndex":0,"delta":{"citation":{"title":"t"}}}')
    events = codec().feed(one * (2 * CITATIONS_MAX + 1))
    assert [len(delta["citations"]) for delta in deltas(events)[1:]] == [CITATIONS_MAX, CITATIONS_MAX]
    assert deltas(events)[2]["citations"][0]["index"] == CITATIONS_MAX


def test_a_flood_of_open_blocks_is_garbage() -> None:
    starts = [
        event("contentBlockStart", b'{"contentBlockIndex":%d,"start":{"toolUse":{"toolUseId":"t","name":"n"}}}' % index)
        for index in range(BLOCKS_OPEN_MAX + 1)
    ]
    assert only(codec().feed(b"".join(starts)), Failed).failure.kind == "garbage"


@pytest.mark.parametrize("name", ["no_metadata", "metadata_cut"])
def test_a_stream_that_ends_behind_its_stop_is_complete_without_usage(name: str) -> None:
    events = read(name)
    assert isinstance(events[-1], Completed)
    assert not any(isinstance(event, UsageSeen) for event in events)


@pytest.mark.parametrize("name", ["metadata_twice", "metadata_first", "unknown", "no_start"])
def test_other_orders_and_unknown_events_do_not_end_a_stream(name: str) -> None:
    events = read(name)
    assert texts(events, Channel.CONTENT) == "Hello"
    assert only(events, UsageSeen).usage.output == 1
    assert isinstance(events[-1], Completed)


@pytest.mark.parametrize(
    ("name", "kind", "status"),
    [
        ("truncated", "truncated", 502),
        ("cut", "truncated", 502),
        ("empty", "truncated", 502),
        ("throttled", "rate_limited", 429),
        ("model_error", "server", 502),
        ("internal", "server", 500),
        ("unavailable", "overloaded", 503),
        ("error", "server", 502),
        ("malformed", "server", 502),
        ("invalid", "caller", 400),
        ("too_long", "context_length", 400),
        ("damaged", "garbage", 502),
        ("not_a_stream", "garbage", 502),
        ("huge", "garbage", 502),
        ("bad_json", "garbage", 502),
        ("odd_types", "garbage", 502),
        ("not_an_object", "garbage", 502),
        ("tool_without_start", "garbage", 502),
    ],
)
def test_failed_streams_say_how(name: str, kind: str, status: int) -> None:
    failure = only(read(name), Failed).failure
    assert (failure.kind, failure.status) == (kind, status)
    assert not any(secret in failure.message for secret in ("10.0.0.1", "arn:aws"))


def test_an_event_above_the_bound_is_garbage() -> None:
    large = event("contentBlockDelta", b'{"contentBlockIndex":0,"delta":{"text":"%b"}}' % (b"x" * 5000))
    assert isinstance(replay([large], frame_bytes_max=6000)[-2], Chunk)
    assert only(replay([large], frame_bytes_max=5000), Failed).failure.kind == "garbage"


def test_what_the_gateway_adds_looks_like_the_stream() -> None:
    one = codec(rename_to="fast", usage_wanted=True)
    events = one.feed(wire("truncated"))
    assert one.open_choices == (0,)
    ended = json.loads(one.finish_chunk(0, "length"))
    assert ended["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}]
    last = json.loads(one.usage_chunk(b'{"total_tokens":3}', b',"x_tollgate":{"cost":1}'))
    assert (last["choices"], last["usage"], last["x_tollgate"]) == ([], {"total_tokens": 3}, {"cost": 1})
    assert {each["model"] for each in (*payloads(events), ended, last)} == {"fast"}
    assert all(each["usage"] is None for each in payloads(events))
