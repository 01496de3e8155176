"""The anthropic codec on transcripts: whole, a byte at a time and cut anywhere, always with equal events."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.lib.streaming._deltas import accumulate_delta
from openai.types.chat import ChatCompletionChunk

from providers.anthropic import CITATIONS_MAX, OPEN_BLOCKS_MAX, AnthropicCodec
from providers.anthropic_wire import EVENTS
from providers.chat_chunks import WholeAnswer
from providers.codec import ChatCall, Upstream
from providers.events import Channel, Completed, Event, Failed, ProviderFailure, UsageSeen
from providers.openai_wire import usage_of
from tests.support.codecs import bytewise, choices, chunks, cut, ends_once, fed, only, transcripts

WIRES = transcripts("anthropic")
NAMES = list(WIRES)
UPSTREAM = Upstream("p", "anthropic", b"/v1", key="sk-ant")


def codec(**call: Any) -> AnthropicCodec:
    return AnthropicCodec(UPSTREAM, ChatCall(**{"body": b"", "model": "m", "stream": True, "created": 7, **call}))


def replay(pieces: list[bytes], **call: Any) -> list[Event]:
    return fed(codec(**call), pieces)


def read(name: str, **call: Any) -> list[Event]:
    return replay([WIRES[name]], **call)


def all_texts(events: list[Event]) -> dict[tuple[Channel, int], str]:
    found: dict[tuple[Channel, int], str] = {}
    for chunk in chunks(events):
        for delta in chunk.deltas:
            key = (delta.channel, delta.tool)
            found[key] = found.get(key, "") + delta.text
    return found


def message(events: list[Event]) -> dict[str, Any]:
    """What OpenAI's own stream helper makes of it."""
    whole: dict[object, object] = {}
    for choice in choices(events):
        whole = accumulate_delta(whole, choice["delta"])
    return {str(name): value for name, value in whole.items()}


def finish(events: list[Event]) -> Any:
    return next(choice["finish_reason"] for choice in choices(events) if choice["finish_reason"])


def reported(events: list[Event]) -> UsageSeen:
    """The report that may be the last word; every other one tells of a part."""
    (found,) = [event for event in events if isinstance(event, UsageSeen) and not event.usage.partial]
    return found


def frame(**event: Any) -> bytes:
    return b"data: %b\n\n" % json.dumps(event).encode()


@pytest.mark.parametrize("name", NAMES)
def test_a_byte_at_a_time_gives_the_same_events(name: str) -> None:
    assert replay(bytewise(WIRES[name])) == read(name)


@settings(deadline=None)
@given(st.sampled_from(NAMES), st.lists(st.integers(0, 4000), max_size=8))
def test_any_cut_gives_the_same_events(name: str, cuts: list[int]) -> None:
    assert replay(cut(WIRES[name], cuts)) == read(name)


@pytest.mark.parametrize("name", NAMES)
def test_every_stream_ends_exactly_once_and_every_chunk_is_openais(name: str) -> None:
    events = read(name)
    assert ends_once(events)
    for chunk in chunks(events):
        ChatCompletionChunk.model_validate_json(chunk.payload)


def test_a_plain_stream_is_openais() -> None:
    events = read("plain")
    assert replay([WIRES["crlf"]]) == events
    first = json.loads(chunks(events)[0].payload)
    assert (first["id"], first["model"], first["created"]) == ("msg_1", "claude-test-5", 7)
    assert [choice["delta"] for choice in choices(events)] == [
        {"role": "assistant", "content": "", "refusal": None},
        {"content": "Hello"},
        {"content": ' \u2028é"'},
        {},
    ]
    assert [chunk.content for chunk in chunks(events)] == [False, True, True, True]
    assert chunks(events)[-1].finished == (0,)
    assert finish(events) == "stop"
    assert all_texts(events) == {(Channel.CONTENT, 0): 'Hello \u2028é"'}
    assert (reported(events).usage.prompt, reported(events).usage.output) == (10, 4)
    assert events.index(reported(events)) > events.index(chunks(events)[-1])  # a report covers what is before it
    assert only(events, Completed).missing_finish == ()


def test_thinking_comes_back_with_its_signatures() -> None:
    events = read("thinking")
    assert all_texts(events) == {(Channel.REASONING, 0): "Let me see.", (Channel.CONTENT, 0): "Yes!"}
    whole = message(events)
    assert (whole["content"], whole["reasoning_content"]) == ("Yes!", "Let me see.")
    assert whole["thinking_blocks"] == [
        {"index": 0, "type": "thinking", "thinking": "Let me see.", "signature": "c2ln"},
        {"index": 1, "type": "redacted_thinking", "data": "aGlkZGVu"},
    ]
    assert reported(events).usage.reasoning == 20


def test_thinking_between_texts_keeps_its_blocks_apart() -> None:
    blocks = message(read("interleaved"))["thinking_blocks"]
    assert [(block["thinking"], block["signature"]) for block in blocks] == [("One.", "MQ=="), ("Two.", "Mg==")]


def test_tool_calls_stream_their_arguments_and_an_empty_call_has_an_object() -> None:
    events = read("tools")
    assert finish(events) == "tool_calls"
    assert all_texts(events) == {
        (Channel.CONTENT, 0): "I look.",
        (Channel.TOOL_NAME, 0): "weather",
        (Channel.TOOL_ARGUMENTS, 0): '{"city": "Köln"}',
        (Channel.TOOL_NAME, 1): "now",
        (Channel.TOOL_ARGUMENTS, 1): "{}",
    }
    calls = message(events)["tool_calls"]
    assert [(call["id"], call["index"], call["type"]) for call in calls] == [
        ("toolu_1", 0, "function"),
        ("toolu_2", 1, "function"),
    ]


def test_the_providers_own_tools_are_not_shown_as_calls_and_citations_name_their_place() -> None:
    events = read("server_tools")
    text = "Look: it rains, or dry."
    assert all_texts(events) == {(Channel.CONTENT, 0): text}
    whole = message(events)
    places = [note["url_citation"] for note in whole["annotations"]]
    assert [(text[at["start_index"] : at["end_index"]], at["url"], at["title"]) for at in places] == [
        ("it rains", "https://example.org/a", "Rain"),
        (", or dry", "https://example.org/a", ""),
    ]
    (cited,) = whole["citations"]
    assert (cited["type"], cited["cited_text"], cited["start_index"]) == ("char_location", "Dry.", 14)
    usage = reported(events).usage
    assert (usage.prompt, usage.output) == (4000, 60)  # the last report's, not the first's
    assert json.loads(usage.raw)["server_tool_use"]["web_search_requests"] == 1


def test_the_prompt_is_what_was_read_and_written_to_the_cache_too() -> None:
    usage = reported(read("cache")).usage
    assert (usage.prompt, usage.cached, usage.cache_write, usage.output) == (1305, 1000, 300, 7)
    assert usage.cache_write_1h == 200
    told = json.loads(usage.raw)
    assert (told["prompt_tokens"], told["total_tokens"]) == (1305, 1312)
    assert told["prompt_tokens_details"]["cache_write_tokens_details"] == {"ttl_5m_tokens": 100, "ttl_1h_tokens": 200}
    assert told["prompt_tokens_details"]["cached_tokens"] == 1000
    again = usage_of(usage.raw)
    assert again is not None
    assert (again.prompt, again.cached, again.cache_write, again.cache_write_1h) == (1305, 1000, 300, 200)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("max_tokens", "length"), ("pause", "stop"), ("refusal", "content_filter"), ("unknown", "stop")],
)
def test_stop_reasons(name: str, reason: str) -> None:
    assert finish(read(name)) == reason


def test_a_refusals_explanation_is_told() -> None:
    assert all_texts(read("refusal")) == {(Channel.REFUSAL, 0): "Not this."}


def test_what_is_unknown_does_not_matter() -> None:
    events = read("unknown")
    assert all_texts(events) == {(Channel.CONTENT, 0): "ok"}
    assert reported(events).usage.output == 3
    assert only(events, Completed).missing_finish == ()


def test_a_copy_of_the_wire_without_event_names_and_with_done_is_read() -> None:
    events = read("copied")
    assert all_texts(events) == {
        (Channel.CONTENT, 0): "Hey",
        (Channel.TOOL_NAME, 0): "f",
        (Channel.TOOL_ARGUMENTS, 0): '{"a":1}',
    }
    assert reported(events).usage.prompt == 12
    assert isinstance(events[-1], Completed)


@pytest.mark.parametrize(
    ("name", "kind", "status"),
    [
        ("overloaded", "overloaded", 503),
        ("error_first", "server", 500),
        ("truncated", "truncated", 502),
        ("empty", "truncated", 502),
        ("garbage", "garbage", 502),
        ("wrong_type", "garbage", 502),
    ],
)
def test_broken_streams_fail(name: str, kind: str, status: int) -> None:
    failure = only(read(name), Failed).failure
    assert (failure.kind, failure.status) == (kind, status)
    assert "/srv" not in failure.message


@pytest.mark.parametrize(("name", "missing"), [("no_stop", ()), ("no_reason", (0,))])
def test_an_end_without_one_half_of_it_is_complete(name: str, missing: tuple[int, ...]) -> None:
    assert only(read(name), Completed).missing_finish == missing


def test_counts_that_are_no_counts_come_back_negative() -> None:
    usage = reported(read("bad_usage")).usage
    assert (usage.prompt, usage.output) == (-1, -1)


def test_the_first_event_tells_of_the_prompt_before_any_text() -> None:
    events = read("cache")
    first = next(event for event in events if isinstance(event, UsageSeen))
    assert events.index(first) < events.index(next(each for each in chunks(events) if each.deltas))
    usage = first.usage
    assert usage.partial
    assert (usage.prompt, usage.cached, usage.cache_write, usage.cache_write_1h) == (1305, 1000, 300, 200)


@pytest.mark.parametrize(
    ("creation", "hour"),
    [({"ephemeral_1h_input_tokens": 7}, 7), ({"ephemeral_1h_input_tokens": 99}, 9), ({}, 0), ("x", 0),
     ({"ephemeral_1h_input_tokens": "many"}, 0), ({"ephemeral_5m_input_tokens": 9}, 0)],
)  # fmt: skip
def test_what_is_written_for_an_hour_is_a_part_of_what_is_written(creation: Any, hour: int) -> None:
    usage = {"input_tokens": 1, "cache_creation_input_tokens": 9, "output_tokens": 3, "cache_creation": creation}
    seen = reported(replay([frame(type="message_delta", delta={"stop_reason": "end_turn"}, usage=usage)])).usage
    assert (seen.cache_write, seen.cache_write_1h) == (9, hour)


def test_usage_without_a_side_is_no_report() -> None:
    events = replay([frame(type="message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 3})])
    assert not [event for event in events if isinstance(event, UsageSeen)]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ({"type": "rate_limit_error", "message": "org-1"}, "rate_limited"),
        ({"type": "overloaded_error"}, "overloaded"),
        ({"type": "invalid_request_error", "message": "prompt is too long: 9 tokens > 8 maximum"}, "context_length"),
        ({"type": "authentication_error"}, "key_refused"),
        ("a text", "server"),
        (None, "server"),
    ],
)
def test_errors_inside_a_stream(error: Any, kind: str) -> None:
    for wire in (frame(type="error", error=error), b"event: error\n" + frame(error=error)):
        assert only(replay([wire]), Failed).failure.kind == kind


def test_a_bare_error_of_its_event_name_is_one() -> None:
    failure = only(replay([b"event: error\n" + frame(type="overloaded_error", message="x")]), Failed).failure
    assert failure.kind == "overloaded"


def test_an_error_whose_text_cannot_be_read_is_one_too() -> None:
    events = replay([b'event: error\ndata: {"unread":"\xc9"}\n\n'])
    assert only(events, Failed).failure.kind == "server"


def test_a_renamed_model_shows_in_every_payload() -> None:
    one = codec(rename_to="public")
    events = one.feed(WIRES["plain"])
    own = [one.finish_chunk(0, "length"), one.usage_chunk(b'{"a":1}', b',"x":2')]
    assert {json.loads(payload)["model"] for payload in [*own, *(chunk.payload for chunk in chunks(events))]} == {
        "public"
    }


def test_our_own_chunks_look_like_the_streams() -> None:
    one = codec(usage_wanted=True)
    events = one.feed(WIRES["truncated"])
    assert one.open_choices == (0,)
    assert {json.loads(chunk.payload)["usage"] for chunk in chunks(events)} == {None}
    ended = json.loads(one.finish_chunk(0, "length"))
    assert (ended["id"], ended["choices"][0]["finish_reason"]) == ("msg_1", "length")
    usage = json.loads(one.usage_chunk(b'{"total_tokens":1}', b',"x_tollgate":{}'))
    assert (usage["choices"], usage["usage"], usage["x_tollgate"]) == ([], {"total_tokens": 1}, {})


def test_before_the_stream_begins_nothing_is_open_and_chunks_can_be_made() -> None:
    one = codec()
    assert one.open_choices == ()
    assert json.loads(one.finish_chunk(0, "stop"))["model"] == "m"


def test_a_frame_above_the_bound_fails_the_stream() -> None:
    events = replay([b"data: " + b"x" * 5000], frame_bytes_max=1000)
    assert only(events, Failed).failure.kind == "garbage"


def test_blocks_that_never_close_are_bounded() -> None:
    wire = b"".join(
        frame(type="content_block_start", index=index, content_block={"type": "text"})
        for index in range(OPEN_BLOCKS_MAX + 1)
    )
    assert only(replay([wire]), Failed).failure.kind == "garbage"


def test_citations_without_end_do_not_gather() -> None:
    one = codec()
    one.feed(frame(type="content_block_start", index=0, content_block={"type": "text"}))
    cited = {"type": "citations_delta", "citation": {"type": "char_location"}}
    wire = frame(type="content_block_delta", index=0, delta=cited) * (CITATIONS_MAX + 1)
    (chunk,) = chunks(one.feed(wire))
    assert len(json.loads(chunk.payload)["choices"][0]["delta"]["citations"]) == CITATIONS_MAX


# -- malformed input ---------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.binary(max_size=60) | st.sampled_from([b"data: ", b"\n\n", b'{"type":"message_start"}', b"event: "]))
)
def test_no_bytes_make_it_raise(pieces: list[bytes]) -> None:
    events = replay(pieces)
    assert isinstance(events[-1], Completed | Failed)
    assert codec().answer(b"".join(pieces)) is not None


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(NAMES), st.data())
def test_a_damaged_transcript_only_fails(name: str, data: st.DataObject) -> None:
    wire = bytearray(WIRES[name])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(wire) - 1))
        wire[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3) | st.sampled_from([b'"', b"}"]))
    cut = data.draw(st.integers(0, len(wire)))
    pieces = [bytes(wire[:cut]), bytes(wire[cut:])]
    events = replay(pieces)
    assert events == replay([bytes(wire)])
    assert isinstance(events[-1], Completed | Failed)
    for chunk in chunks(events):
        json.loads(chunk.payload)


_LEAF = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
_ODD = _LEAF | st.lists(_LEAF, max_size=2) | st.dictionaries(st.text(max_size=4), _LEAF, max_size=2)
_MEMBERS = "type index text thinking partial_json signature citation stop_reason usage id name input"
_INNER = st.dictionaries(st.sampled_from(_MEMBERS.split(" ")), _ODD, max_size=5)
_TYPES = st.sampled_from([*sorted(EVENTS), "error"])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(_TYPES, _INNER, _INNER, _INNER | _ODD), max_size=6))
def test_events_with_odd_members_only_fail(odd: list[tuple[Any, Any, Any, Any]]) -> None:
    wire = b"".join(
        frame(type=kind, index=0, delta=delta, content_block=block, message={"usage": rest}, usage=rest)
        for kind, delta, block, rest in odd
    )
    assert isinstance(replay([wire])[-1], Completed | Failed)
    blocks = [block for _, delta, block, _ in odd for block in (delta, block)]
    assert isinstance(codec().answer(json.dumps({"content": blocks}).encode()), WholeAnswer | ProviderFailure)
