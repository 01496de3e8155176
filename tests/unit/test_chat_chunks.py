"""OpenAI's side of a translated answer: what a client sees is what is counted."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from providers.chat_chunks import (
    COUNT_MAX,
    ChunkMaker,
    WholeAnswer,
    assistant_message,
    count,
    reported,
    tool_call,
    total,
    whole_answer,
    whole_choices,
)
from providers.events import Channel, Chunk, Delta, ReportedUsage
from providers.json_root import RootObject
from providers.openai import OpenAICodec
from providers.openai_wire import usage_of
from tests.unit.test_openai_codec import UPSTREAM, codec

MAKER = ChunkMaker('id"1', "mödel", 1_700_000_000)
CHUNKS = [
    MAKER.role(),
    MAKER.content('é"\n\u2028'),
    MAKER.reasoning("hm", 1),
    MAKER.refusal("no"),
    MAKER.tool_start(2, "call_1", "f", {"extra_content": {"a": 1}}),
    MAKER.tool_arguments(2, '{"a":'),
    MAKER.extra({"annotations": []}),
    MAKER.finish("stop"),
]


def delta(chunk: Chunk) -> Any:
    return json.loads(chunk.payload)["choices"][0]["delta"]


@pytest.mark.parametrize("chunk", CHUNKS)
def test_chunks_are_openais(chunk: Chunk) -> None:
    read = ChatCompletionChunk.model_validate_json(chunk.payload, strict=True)
    assert (read.id, read.object, read.model, read.created) == (
        'id"1',
        "chat.completion.chunk",
        "mödel",
        1_700_000_000,
    )
    assert b"\n" not in chunk.payload


@pytest.mark.parametrize("chunk", CHUNKS)
def test_chunks_tell_what_the_openai_codec_reads_in_them(chunk: Chunk) -> None:
    one: OpenAICodec = codec()
    (event,) = one.feed(b"data: %b\n\n" % chunk.payload)
    assert isinstance(event, Chunk)
    assert (event.deltas, event.finished, event.content) == (chunk.deltas, chunk.finished, chunk.content)


def test_deltas_carry_the_text_and_its_place() -> None:
    assert delta(MAKER.role()) == {"role": "assistant", "content": "", "refusal": None}
    assert MAKER.content("a", 3).deltas == [Delta(3, Channel.CONTENT, 0, "a")]
    assert delta(MAKER.reasoning("b")) == {"reasoning_content": "b"}
    start = MAKER.tool_start(1, "c", "f", {"x": 1})
    function = {"name": "f", "arguments": ""}
    assert delta(start) == {"tool_calls": [{"index": 1, "id": "c", "type": "function", "function": function, "x": 1}]}
    assert start.deltas == [Delta(0, Channel.TOOL_NAME, 1, "f")]
    assert MAKER.tool_arguments(1, "{}").deltas == [Delta(0, Channel.TOOL_ARGUMENTS, 1, "{}")]


def test_reasoning_with_further_members_is_counted_once() -> None:
    chunk = MAKER.reasoning("hm", extra={"thinking_blocks": [{"thinking": "hm"}]})
    assert delta(chunk) == {"reasoning_content": "hm", "thinking_blocks": [{"thinking": "hm"}]}
    assert chunk.deltas == [Delta(0, Channel.REASONING, 0, "hm")]


def test_empty_text_is_no_content() -> None:
    for chunk in (MAKER.content(""), MAKER.tool_arguments(0, "")):
        assert (chunk.deltas, chunk.content) == ([], False)


def test_the_ends_of_a_stream() -> None:
    finish = json.loads(MAKER.finish_payload(1, "length"))
    assert finish["choices"] == [{"index": 1, "delta": {}, "logprobs": None, "finish_reason": "length"}]
    usage = json.loads(MAKER.usage_payload(b'{"total_tokens":3}', b',"x_tollgate":{}'))
    assert (usage["choices"], usage["usage"], usage["x_tollgate"]) == ([], {"total_tokens": 3}, {})


def test_usage_is_null_before_the_last_chunk_where_it_was_asked_for() -> None:
    maker = ChunkMaker("i", "m", 0, null_usage=True)
    for payload in (maker.content("a").payload, maker.finish_payload(0, "stop")):
        assert json.loads(payload)["usage"] is None
    assert json.loads(maker.usage_payload(b"{}", b""))["usage"] == {}
    assert b'"usage"' not in MAKER.content("a").payload


def test_a_whole_answer_is_openais_and_its_texts_are_found() -> None:
    message = assistant_message(
        "é", reasoning="hm", tool_calls=[tool_call("c", "f", '{"a":1}', {"x": 1})], extra={"thinking_blocks": []}
    )
    raw = reported(ReportedUsage(3, 2)).raw
    body = whole_answer("i", "m", 5, message, "tool_calls", raw)
    ChatCompletion.model_validate_json(body, strict=True)
    answer = WholeAnswer(RootObject(body), usage_of(raw))
    assert answer.root.raw("usage") == raw
    assert answer.texts() == [
        (0, Channel.CONTENT, 0, "é"),
        (0, Channel.REASONING, 0, "hm"),
        (0, Channel.TOOL_NAME, 0, "f"),
        (0, Channel.TOOL_ARGUMENTS, 0, '{"a":1}'),
    ]


def test_an_answer_of_several_choices_and_without_usage() -> None:
    body = whole_choices("i", "m", 5, [(assistant_message("a"), "stop"), (assistant_message("b"), "length")], b"")
    assert "usage" not in json.loads(body)
    assert [text[0] for text in WholeAnswer(RootObject(body), None).texts()] == [0, 1]


def test_usage_is_openais_with_details_merged() -> None:
    details = {"prompt_tokens_details": {"split": {"a": 1}}, "server_tool_use": {"b": 2}}
    usage = reported(ReportedUsage(10, 5, cached=4, cache_write=3, reasoning=2, audio_input=1), details)
    read = usage_of(usage.raw)
    assert read is not None
    assert (read.prompt, read.output, read.cached, read.cache_write, read.reasoning) == (10, 5, 4, 3, 2)
    assert (usage.prompt, usage.output, usage.cached, usage.cache_write, usage.reasoning) == (10, 5, 4, 3, 2)
    value = json.loads(usage.raw)
    assert (value["total_tokens"], value["prompt_tokens_details"]["split"]) == (15, {"a": 1})
    assert value["prompt_tokens_details"]["audio_tokens"] == usage.audio_input == 1
    assert value["server_tool_use"] == {"b": 2}


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, 0), (0, 0), (5, 5), (5.0, 5), (5.5, -1), (-1, -1), (True, -1), ("5", -1), (COUNT_MAX + 1, -1), (1e300, -1)],
)
def test_what_is_no_count_is_negative(value: Any, expected: int) -> None:
    assert count(value) == expected


def test_a_sum_with_something_that_is_no_count_is_none_either() -> None:
    assert (total(1, 2, 3), total(1, -1, 3)) == (6, -1)


def test_upstreams_with_options_can_be_compared_and_hashed() -> None:
    assert hash(UPSTREAM) == hash(UPSTREAM)
