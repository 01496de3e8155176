"""The gemini codec on transcripts: whole, a byte at a time and cut anywhere, always with equal events."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from providers.codec import ChatCall, Upstream
from providers.events import Channel, Completed, Event, Failed, ProviderFailure, UsageSeen
from providers.gemini import GeminiCodec
from tests.support.codecs import bytewise, choices, chunks, cut, ends_once, fed, only, payloads, texts, transcripts

WIRES = transcripts("gemini")
NAMES = list(WIRES)
UPSTREAM = Upstream("g", "gemini", b"/v1beta", key="key-upstream")
SIZE = max(map(len, WIRES.values()))


def codec(upstream: Upstream = UPSTREAM, **call: Any) -> GeminiCodec:
    return GeminiCodec(upstream, ChatCall(**{"body": b"", "model": "m", "stream": True, "created": 17, **call}))


def replay(pieces: list[bytes], upstream: Upstream = UPSTREAM, **call: Any) -> list[Event]:
    return fed(codec(upstream, **call), pieces)


def read(name: str, **call: Any) -> list[Event]:
    return replay([WIRES[name]], **call)


def deltas(events: list[Event], choice: int = 0) -> list[dict[str, Any]]:
    return [each["delta"] for each in choices(events) if each["index"] == choice and each["finish_reason"] is None]


def reasons(events: list[Event]) -> list[tuple[int, str]]:
    return [(each["index"], each["finish_reason"]) for each in choices(events) if each["finish_reason"]]


def usage_of(events: list[Event]) -> tuple[int | None, int | None, int]:
    last = [event.usage for event in events if isinstance(event, UsageSeen)][-1]
    return last.prompt, last.output, last.reasoning


@pytest.mark.parametrize("name", NAMES)
def test_a_byte_at_a_time_gives_the_same_events(name: str) -> None:
    assert replay(bytewise(WIRES[name])) == read(name)


@settings(max_examples=150)
@given(st.sampled_from(NAMES), st.lists(st.integers(0, SIZE), max_size=6))
def test_any_cut_gives_the_same_events(name: str, cuts: list[int]) -> None:
    assert replay(cut(WIRES[name], cuts)) == read(name)


@pytest.mark.parametrize("name", NAMES)
def test_every_stream_ends_exactly_once_and_no_payload_has_a_line_end(name: str) -> None:
    events = read(name)
    assert ends_once(events)
    assert not any(b"\n" in event.payload or b"\r" in event.payload for event in chunks(events))


def test_a_plain_stream_is_openais() -> None:
    events = read("plain")
    assert deltas(events) == [
        {"role": "assistant", "content": "", "refusal": None},
        {"content": "Hel"},
        {"content": "lo \u2028é"},
        {"content": "!"},
    ]
    assert [event.content for event in chunks(events)] == [False, True, True, True, True]
    assert [event.finished for event in chunks(events)] == [(), (), (), (), (0,)]
    heads = [{name: value for name, value in each.items() if name != "choices"} for each in payloads(events)]
    head = {"id": "resp-1", "object": "chat.completion.chunk", "created": 17, "model": "gemini-t"}
    assert heads == [head] * 5
    assert texts(events, Channel.CONTENT) == "Hello \u2028é!"
    assert usage_of(events) == (9, 3, 0)
    assert only(events, Completed).missing_finish == ()


def test_thoughts_are_reasoning_and_their_tokens_are_output() -> None:
    events = read("thoughts")
    assert texts(events, Channel.REASONING) == "Let me think."
    assert texts(events, Channel.CONTENT) == "Ja"
    assert usage_of(events) == (5, 13, 12)
    assert {"extra_content": {"google": {"thought_signature": "c2ln"}}} in deltas(events)


def test_a_call_comes_whole_with_its_signature_and_its_digits() -> None:
    events = read("tools")
    first, arguments, second, _ = deltas(events)[1:]
    assert first["tool_calls"] == [
        {
            "index": 0,
            "id": "id1",
            "type": "function",
            "function": {"name": "f", "arguments": ""},
            "extra_content": {"google": {"thought_signature": "c2lnMQ=="}},
        }
    ]
    told = arguments["tool_calls"][0]["function"]["arguments"]
    assert (json.loads(told), "1.5" in told) == ({"a": 1.5, "b": "é"}, True)
    assert "extra_content" not in second["tool_calls"][0]
    assert second["tool_calls"][0]["index"] == 1
    assert texts(events, Channel.TOOL_NAME) == "fg"
    assert reasons(events) == [(0, "tool_calls")]


def test_calls_without_ids_get_ids_that_are_theirs_alone_and_stay() -> None:
    def ids() -> list[str]:
        calls = [delta["tool_calls"][0] for delta in deltas(read("tools_without_ids")) if "tool_calls" in delta]
        return [call["id"] for call in calls if "id" in call]

    assert len(set(ids())) == 3
    assert ids() == ids()
    assert texts(read("tools_without_ids"), Channel.TOOL_ARGUMENTS).endswith("{}")


def test_a_call_behind_the_finish_reason_still_counts() -> None:
    assert reasons(read("call_after_finish")) == [(0, "tool_calls")]


def test_a_reason_in_every_chunk_ends_the_choice_once_and_last() -> None:
    events = read("finish_every_time")
    assert texts(events, Channel.CONTENT) == "ab"
    assert reasons(events) == [(0, "stop")]
    assert payloads(events)[-1]["choices"][0]["finish_reason"] == "stop"


def test_candidates_are_choices() -> None:
    events = read("choices", choices=2)
    assert (texts(events, Channel.CONTENT, 0), texts(events, Channel.CONTENT, 1)) == ("ad", "bc")
    assert reasons(events) == [(0, "length"), (1, "stop")]
    roles = [delta for choice in (0, 1) for delta in deltas(events, choice) if "role" in delta]
    assert len(roles) == 2


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("max_tokens", "length"),
        ("only_thoughts", "length"),
        ("safety", "content_filter"),
        ("unknown_reason", "content_filter"),
    ],
)
def test_finish_reasons_are_openais(name: str, reason: str) -> None:
    assert reasons(read(name)) == [(0, reason)]


@pytest.mark.parametrize(
    ("native", "reason"),
    [
        *[(each, "content_filter") for each in ("RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "LANGUAGE")],
        *[(each, "content_filter") for each in ("IMAGE_SAFETY", "IMAGE_OTHER", "NO_IMAGE", "MODEL_ARMOR", "OTHER")],
        ("STOP", "stop"),
        ("MAX_TOKENS", "length"),
    ],
)
def test_each_native_reason_has_a_word(native: str, reason: str) -> None:
    frame = {"candidates": [{"content": {"parts": [{"text": "a"}]}, "finishReason": native}]}
    assert reasons(replay([b"data: %b\n\n" % json.dumps(frame).encode()])) == [(0, reason)]


@pytest.mark.parametrize("native", ["UNEXPECTED_TOOL_CALL", "TOO_MANY_TOOL_CALLS", "MALFORMED_RESPONSE"])
def test_an_answer_that_broke_off_is_a_failure(native: str) -> None:
    frame = {"candidates": [{"finishReason": native}]}
    failure = only(replay([b"data: %b\n\n" % json.dumps(frame).encode()]), Failed).failure
    assert (failure.kind, failure.status) == ("server", 502)


def test_a_malformed_call_fails_and_what_came_before_it_counts() -> None:
    events = read("malformed_call")
    assert only(events, Failed).failure.kind == "server"
    assert texts(events, Channel.CONTENT) == "a"
    assert usage_of(events) == (3, 1, 0)


def test_a_missing_signature_is_the_callers() -> None:
    failure = only(read("missing_signature"), Failed).failure
    assert (failure.kind, failure.status, failure.param) == ("caller", 400, "messages")


def test_a_blocked_prompt_is_a_content_policy_failure_with_its_usage() -> None:
    events = read("blocked")
    failure = only(events, Failed).failure
    assert (failure.kind, failure.status, failure.code) == ("content_policy", 400, "content_policy_violation")
    assert "PROHIBITED_CONTENT" in failure.message
    assert usage_of(events) == (8, 0, 0)


@pytest.mark.parametrize(
    ("name", "kind", "status"),
    [
        ("error_frame", "overloaded", 503),
        ("error_bare", "overloaded", 503),
        ("error_behind_frame", "overloaded", 503),
        ("error_array", "rate_limited", 429),
        ("error_without_code", "rate_limited", 429),
        ("truncated", "truncated", 502),
        ("cut_in_a_frame", "truncated", 502),
        ("empty", "truncated", 502),
        ("garbage", "garbage", 502),
        ("odd_types", "garbage", 502),
    ],
)
def test_in_band_errors_and_damage_fail_the_stream(name: str, kind: str, status: int) -> None:
    failure = only(read(name), Failed).failure
    assert (failure.kind, failure.status) == (kind, status)


def test_googles_retry_delay_and_not_its_text_is_told() -> None:
    failure = only(read("error_array"), Failed).failure
    assert failure.retry_after_s == 36.5
    assert "project_number" not in failure.message


def test_what_came_before_damage_counts_and_nothing_after_it() -> None:
    assert texts(read("garbage"), Channel.CONTENT) == "a"


def test_a_profile_may_end_its_streams_without_a_reason() -> None:
    events = replay([WIRES["truncated"]], Upstream("g", "gemini", b"", clean_eof=True))
    assert only(events, Completed).missing_finish == (0,)


def test_code_that_google_runs_is_told_whole_and_counted() -> None:
    events = read("code_execution")
    parts = [delta["extra_content"]["google"] for delta in deltas(events) if "extra_content" in delta]
    assert parts[0]["parts"][0]["executableCode"]["code"] == "print(1+1)"
    assert parts[0]["parts"][0]["thoughtSignature"] == "c2lnQw=="
    assert parts[1]["parts"][0]["codeExecutionResult"]["output"] == "2\n"
    assert parts[2] == {"thought_signature": "c2lnRA=="}
    assert texts(events, Channel.CONTENT) == "print(1+1)It is 2."


def test_while_tools_run_usage_does_not_shrink_and_the_last_one_is_whole() -> None:
    reports = [event.usage for event in read("code_execution") if isinstance(event, UsageSeen)]
    assert [report.output for report in reports] == [152, 152, 152, 215]
    assert reports[-1].prompt == 50


def test_an_image_is_told_as_clients_know_it() -> None:
    events = read("image")
    (image,) = [delta["images"] for delta in deltas(events) if "images" in delta]
    expected = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}, "index": 0}
    assert image == [expected]
    assert usage_of(events) == (3, 1291, 0)


def test_sources_are_annotations() -> None:
    (notes,) = [delta["annotations"] for delta in deltas(read("grounding")) if "annotations" in delta]
    urls = [note["url_citation"]["url"] for note in notes]
    assert urls == ["https://a.example", "https://b.example", "https://c.example"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("usage_dropped", (8, 7, 5)), ("usage_late", (7, 1, 0)), ("bad_usage", (-1, -1, 0)), ("max_tokens", (3, 21, 20))],
)
def test_of_each_count_the_last_one_seen_is_told(name: str, expected: tuple[int, int, int]) -> None:
    assert usage_of(read(name)) == expected


def test_there_is_no_report_before_it_covers_the_text() -> None:
    assert [event for event in read("no_usage") if isinstance(event, UsageSeen)] == []
    said = [(event.usage.output, event.usage.partial) for event in read("plain") if isinstance(event, UsageSeen)]
    assert said == [(0, True), (2, False), (3, False)]  # the first chunk has text and a prompt count only


def test_audio_that_was_cached_is_counted_once() -> None:
    (usage,) = [event.usage for event in read("audio_usage") if isinstance(event, UsageSeen)]
    assert (usage.prompt, usage.cached, usage.audio_input) == (100, 40, 50)


def test_a_report_follows_the_text_it_came_with() -> None:
    kinds = [type(event).__name__ for event in read("plain")]
    assert kinds == ["Chunk", *["Chunk", "UsageSeen"] * 3, "Chunk", "Completed"]


def test_comments_pings_and_json_over_several_lines_are_read() -> None:
    events = read("noise")
    assert texts(events, Channel.CONTENT) == "a b"
    assert only(events, Completed).missing_finish == ()


def test_an_answer_without_names_gets_ours() -> None:
    assert [(each["id"], each["model"]) for each in payloads(read("no_names"))] == [("chatcmpl-tollgate", "m")] * 3


def test_a_renamed_model_shows_in_every_payload() -> None:
    one = codec(rename_to="public")
    events = one.feed(WIRES["plain"]) + one.end_of_stream()
    own = [one.finish_chunk(0, "length"), one.usage_chunk(b'{"a":1}', b',"x":2')]
    assert {each["model"] for each in payloads(events) + [json.loads(each) for each in own]} == {"public"}


def test_our_own_chunks_look_like_the_streams() -> None:
    one = codec(usage_wanted=True)
    one.feed(WIRES["plain"])
    usage = json.loads(one.usage_chunk(b'{"total_tokens":1}', b',"x_tollgate":{}'))
    assert (usage["id"], usage["choices"], usage["usage"], usage["x_tollgate"]) == (
        "resp-1",
        [],
        {"total_tokens": 1},
        {},
    )
    assert json.loads(one.finish_chunk(0, "length"))["choices"][0]["finish_reason"] == "length"
    assert list(one.open_choices) == [0]
    one.end_of_stream()
    assert list(one.open_choices) == []
    assert json.loads(codec().finish_chunk(0, "stop"))["id"] == "chatcmpl-tollgate"


def test_a_frame_above_the_bound_fails_the_stream() -> None:
    for wire in (b"data: " + b"x" * 5000, b"{" + b" " * 5000, b'{"error":{"code":503}' + b" " * 5000 + b"}\n\n"):
        assert only(replay([wire], frame_bytes_max=1000), Failed).failure.kind == "garbage"
        pieces = [wire[i : i + 100] for i in range(0, len(wire), 100)]
        assert only(replay(pieces, frame_bytes_max=1000), Failed).failure.kind == "garbage"


@pytest.mark.parametrize("index", [-1, 128, 10**30])
def test_an_impossible_index_is_damage(index: int) -> None:
    frame = b'data: {"candidates":[{"index":%d,"finishReason":"STOP"}]}\n\n' % index
    assert only(replay([frame]), Failed).failure.kind == "garbage"


def test_deep_nesting_is_damage_at_most() -> None:
    for depth in [10, 300, *range(850, 1010), 5000]:  # around what the parser's recursion limit leaves
        part = b'{"toolCall":' + b"[" * depth + b"]" * depth + b"}"
        wire = b'{"candidates":[{"content":{"parts":[' + part + b']},"finishReason":"STOP"}]}'
        assert isinstance(replay([b"data: " + wire + b"\n\n"])[-1], Completed | Failed)
        codec(stream=False).answer(wire)


FRAGMENTS = [
    *(b"data: ", b"data:", b"event: error", b"\n", b"\r\n\r\n", b"\n\n", b"{", b"}", b"[]", b"null", b",", b"\xff"),
    *(b'"candidates":', b'"parts":', b'{"text":"a"}', b"[DONE]", b"1e999", b'{"error":"x"}', b'{"error":{"code":"5"}}'),
    b'{"candidates":[{}]}',
    b'{"candidates":[{"index":-1}]}',
    b'{"candidates":[{"index":99999999999999999999}]}',
    b'{"candidates":[{"content":{"parts":[{}]}}]}',
    b'{"candidates":[{"content":{"parts":[{"functionCall":{"args":"\xff"}}]},"finishReason":"STOP"}]}',
    b'{"candidates":[{"content":{"parts":[{"x":[1e400,"\\ud800"]}]}}]}',
    b'{"candidates":[null],"usageMetadata":{"promptTokenCount":1e30}}',
    b'{"usageMetadata":{"promptTokenCount":true,"promptTokensDetails":[5,{"modality":"AUDIO","tokenCount":"x"}]}}',
    b'{"promptFeedback":{"blockReason":"X"}}',
]


@settings(max_examples=250)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=30).map(b"".join), st.integers(1, 40))
def test_no_bytes_make_it_raise(wire: bytes, size: int) -> None:
    events = replay([wire[i : i + size] for i in range(0, len(wire), size)])
    assert isinstance(events[-1], Completed | Failed)
    assert events == replay([wire])


@settings(max_examples=200)
@given(
    st.sampled_from(NAMES),
    st.lists(st.tuples(st.integers(0, SIZE), st.binary(max_size=3)), max_size=4),
    st.data(),
)
def test_damaged_transcripts_do_not_make_it_raise(name: str, damage: list[tuple[int, bytes]], data: Any) -> None:
    wire = bytearray(WIRES[name])
    for place, piece in damage:
        wire[place : place + len(piece)] = piece
    cut = data.draw(st.integers(0, len(wire)))
    events = replay([bytes(wire[:cut]), bytes(wire[cut:])])
    assert isinstance(events[-1], Completed | Failed)
    answer = codec(stream=False).answer(bytes(wire[6:]))
    assert isinstance(answer, ProviderFailure) or answer.root.raw("choices") is not None
