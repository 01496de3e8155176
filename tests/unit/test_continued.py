"""The stream of an attempt that goes on with another's text: the client sees a single answer."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionChunk

from providers.anthropic import AnthropicCodec
from providers.codec import ChatCall, Codec, Upstream
from providers.continued import ContinuedCodec, Identity
from providers.events import Channel, Chunk, Completed, Event, Failed, UsageSeen
from providers.openai import OpenAICodec
from providers.seam import Seam, Style, anchor_of
from tests.support.seams import STORY, cut_texts, means_echo, pieces

STYLES: tuple[Style, ...] = get_args(Style)
NATIVE: tuple[Style, ...] = ("prefill", "prefix", "continue_final")
FIRST = (
    b'{"id":"chatcmpl-a","object":"chat.completion.chunk","created":1700000000,"model":"m-a",'
    b'"system_fingerprint":"fp_a","choices":[]}'
)


def sse(*payloads: Any) -> bytes:
    return b"".join(b"data: %b\n\n" % json.dumps(payload).encode() for payload in payloads) + b"data: [DONE]\n\n"


def frame(delta: dict[str, Any], finish: str | None = None, **members: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"id": "b", "object": "chat.completion.chunk", "created": 9, "model": "m-b", "choices": [choice], **members}


def openai() -> Codec:
    return OpenAICodec(Upstream("p", "openai", b"/v1"), ChatCall(body=b"", model="m-b", stream=True))


def continued(delivered: str, style: Style, data: list[bytes], inner: Codec | None = None) -> list[Event]:
    codec = ContinuedCodec(inner or openai(), Seam(delivered, style), Identity.of(FIRST))
    return [event for each in data for event in codec.feed(each)] + codec.end_of_stream()


def chunks_of(events: list[Event]) -> list[dict[str, Any]]:
    return [json.loads(event.payload) for event in events if isinstance(event, Chunk)]


def text_of(events: list[Event]) -> str:
    """The text in the payloads; deltas must say the same."""
    shown = "".join(
        choice["delta"].get("content", "") for chunk in chunks_of(events) for choice in chunk.get("choices", [])
    )
    counted = [delta for event in events if isinstance(event, Chunk) for delta in event.deltas]
    assert all(delta.choice == 0 and delta.channel is Channel.CONTENT for delta in counted)
    assert "".join(delta.text for delta in counted) == shown
    return shown


def reply_to(delivered: str, style: Style, rest: str, *, echo: bool = False) -> str:
    stem = delivered.rstrip()
    start = stem if echo else anchor_of(stem) if style == "instruction" and stem else ""
    return start + delivered[len(stem) :] + rest


@given(cut_texts(), st.sampled_from(STYLES), st.data())
def test_two_streams_are_one_wherever_bytes_are_cut(cut: tuple[str, str], style: Style, data: st.DataObject) -> None:
    whole, delivered = cut
    stem = delivered.rstrip()
    echo = style == "prefix" and stem == stem.lstrip() and data.draw(st.booleans())
    reply = reply_to(delivered, style, whole[len(delivered) :], echo=echo)
    assume(echo or style == "instruction" or not means_echo(stem, reply))
    assume(echo or style != "prefix" or not stem or not reply.lstrip().startswith(stem))
    parts = data.draw(st.composite(pieces)(reply))
    raw = sse(
        frame({"role": "assistant", "content": ""}), *(frame({"content": part}) for part in parts), frame({}, "stop")
    )
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=6)))
    events = continued(delivered, style, [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)])
    assert delivered + text_of(events) == whole
    assert events[-1] == Completed()


def test_the_client_sees_one_stream() -> None:
    raw = sse(
        frame({"role": "assistant", "content": ""}, system_fingerprint="fp_b"),
        frame({"reasoning_content": "Hm, they want more"}),
        frame({"content": anchor_of(STORY)[:10]}),
        frame({"content": anchor_of(STORY)[10:] + " ever", "refusal": None}),
        frame({"content": " seen it.", "annotations": [{"start_index": 4}]}, stop_reason=None),
        frame({}, "length"),
        {"id": "b", "choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 8, "total_tokens": 17}},
    )
    events = continued(STORY, "instruction", [raw])
    chunks = chunks_of(events)
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
        assert {name: chunk[name] for name in ("id", "created", "model", "system_fingerprint")} == {
            "id": "chatcmpl-a",
            "created": 1700000000,
            "model": "m-a",
            "system_fingerprint": "fp_a",
        }
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [{"content": " ever"}, {"content": " seen it."}, {}]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "length"]
    assert text_of(events) == " ever seen it."
    (usage,) = [event.usage for event in events if isinstance(event, UsageSeen)]
    assert (usage.prompt, usage.output) == (9, 8)
    assert [event.finished for event in events if isinstance(event, Chunk)] == [(), (), (0,)]
    assert events[-1] == Completed()


@pytest.mark.parametrize("members", [b'{"id":"a","created":1}', b'{"id":"a","created":1,"model":null,"choices":[{}]}'])
def test_what_the_first_chunk_did_not_have_no_later_one_has(members: bytes) -> None:
    codec = ContinuedCodec(openai(), Seam("Once", "prefill"), Identity.of(members))
    (chunk,) = chunks_of(
        codec.feed(sse(frame({"role": "assistant", "content": " upon"}, system_fingerprint="fp"))[:-14])
    )
    assert (chunk["id"], chunk["created"], "system_fingerprint" in chunk) == ("a", 1, False)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("reason", ["stop", "length"])
def test_a_reply_without_text_completes_the_answer(style: Style, reason: str) -> None:
    events = continued(STORY, style, [sse(frame({"role": "assistant", "content": ""}, reason))])
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks_of(events)] == [reason]
    assert (text_of(events), events[-1]) == ("", Completed())


def test_a_reply_that_starts_anew_fails_as_garbage() -> None:
    parts = [frame({"content": word + " "}) for word in ("Certainly! Let me tell you the story again. " * 6).split()]
    events = continued(STORY, "instruction", [sse(*parts, frame({}, "stop"))])
    (failed,) = events
    assert isinstance(failed, Failed)
    assert (failed.failure.kind, failed.failure.status) == ("garbage", 502)


@pytest.mark.parametrize(
    "delta",
    [
        {"refusal": "No."},
        {"tool_calls": [{"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
    ],
)
def test_anything_but_text_fails(delta: dict[str, Any]) -> None:
    events = continued("Once", "prefill", [sse(frame({"content": " upon"}), frame(delta), frame({}, "stop"))])
    assert text_of(events) == " upon"
    assert [type(event) for event in events] == [Chunk, Failed]


@pytest.mark.parametrize("style", NATIVE)
def test_a_rest_that_was_taken_for_thinking_is_no_end(style: Style) -> None:
    lost = [frame({"role": "assistant", "reasoning_content": " upon a time"}), frame({}, "stop")]
    assert [type(event) for event in continued("Once", style, [sse(*lost)])] == [Failed]
    cut = [lost[0], frame({}, "length")]
    assert [type(event) for event in continued("Once", style, [sse(*cut)])] == [Chunk, Completed]


def test_a_chunk_that_cannot_be_read_fails() -> None:
    odd = {**frame({"content": "a"}), "choices": [{"index": 0, "delta": {"content": "a"}}, 7]}
    events = continued("Once", "prefill", [sse(frame({"role": "assistant", "content": " upon"}), odd)])
    assert [type(event) for event in events] == [Chunk, Failed]


def test_what_is_held_back_comes_before_the_end() -> None:
    held = STORY[-40:-20]  # a word or so that stands in the text, too
    for last in ([frame({"content": held}, "stop")], [frame({"content": held}), frame({}, "stop")]):
        events = continued(STORY, "prefill", [sse(*last)])
        assert (text_of(events), len(chunks_of(events))) == (held, 1)
    events = continued(STORY, "prefill", [sse(frame({"content": held}))])
    assert text_of(events) == held
    assert events[-1] == Completed((0,))


def test_what_is_held_back_is_not_shown_when_the_provider_breaks_off_too() -> None:
    codec = ContinuedCodec(openai(), Seam(STORY, "prefill"), Identity.of(FIRST))
    assert codec.feed(sse(frame({"content": STORY[-40:-20]}))[:-14]) == []
    (failed,) = codec.end_of_stream()
    assert isinstance(failed, Failed)
    assert failed.failure.kind == "truncated"
    assert codec.open_choices == (0,)


def test_frames_of_the_gateways_own_belong_to_the_first_stream() -> None:
    codec = ContinuedCodec(openai(), Seam("Once", "prefill"), Identity.of(FIRST))
    assert codec.open_choices == (0,)
    finish = json.loads(codec.finish_chunk(0, "length"))
    assert (finish["id"], finish["model"], finish["choices"][0]["finish_reason"]) == ("chatcmpl-a", "m-a", "length")
    codec.feed(sse(frame({"content": " upon"}), frame({}, "stop")))
    assert not codec.open_choices
    usage = json.loads(codec.usage_chunk(b'{"prompt_tokens":1}', b',"x_tollgate":{"charged":2}'))
    assert (usage["id"], usage["created"], usage["choices"]) == ("chatcmpl-a", 1700000000, [])
    assert (usage["usage"], usage["x_tollgate"]) == ({"prompt_tokens": 1}, {"charged": 2})


def test_a_translated_stream_goes_on_too() -> None:
    native: list[dict[str, Any]] = [
        {"type": "message_start", "message": {"id": "msg", "model": "claude", "usage": {"input_tokens": 5}}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": " "}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "upon"}},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 3}},
        {"type": "message_stop"},
    ]
    raw = b"".join(b"event: %b\ndata: %b\n\n" % (each["type"].encode(), json.dumps(each).encode()) for each in native)
    call = ChatCall(body=b"", model="claude-sonnet-4-5", stream=True)
    inner = AnthropicCodec(Upstream("p", "anthropic", b"/v1"), call)
    events = continued("Once\n", "prefill", [raw[:100], raw[100:]], inner)
    assert text_of(events) == "upon"
    assert {chunk["id"] for chunk in chunks_of(events)} == {"chatcmpl-a"}
    assert any(isinstance(event, UsageSeen) and event.usage.output == 3 for event in events)


def test_the_request_and_its_errors_are_the_providers_own() -> None:
    codec = ContinuedCodec(openai(), Seam("Once", "prefill"), Identity.of(FIRST))
    call = ChatCall(body=b"{}", model="m", stream=True)
    assert codec.request(call, "r") == openai().request(call, "r")
    assert codec.failure(529, [], b"") == openai().failure(529, [], b"")
    assert codec.answer(b"x") == openai().answer(b"x")


@given(
    st.lists(
        st.one_of(
            st.binary(max_size=40),
            st.just(sse(frame({"content": "x"}))),
            st.just(b'data: {"choices":[{"delta":{"content":"a"}},7]}\n\n'),
        )
    )
)
def test_bytes_whatever_raise_nothing(data: list[bytes]) -> None:
    for style in STYLES:
        continued("Once upon a time", style, data)
