"""The openai codec on transcripts: whole, a byte at a time and cut anywhere, always with equal events."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from providers.codec import ChatCall, Upstream
from providers.events import Channel, Completed, Event, Failed, ProviderFailure, UsageSeen
from providers.openai import OpenAIAnswer, OpenAICodec
from tests.support.codecs import bytewise, chunks, cut, ends_once, fed, only, payloads, texts, transcripts

WIRES = transcripts("openai")
NAMES = list(WIRES)
UPSTREAM = Upstream("p", "openai", b"/v1", key="sk-upstream")


def codec(**call: Any) -> OpenAICodec:
    return OpenAICodec(UPSTREAM, ChatCall(**{"body": b"", "model": "m", "stream": True, **call}))


def replay(pieces: list[bytes], **call: Any) -> list[Event]:
    return fed(codec(**call), pieces)


def read(name: str, **call: Any) -> list[Event]:
    return replay([WIRES[name]], **call)


@pytest.mark.parametrize("name", NAMES)
def test_a_byte_at_a_time_gives_the_same_events(name: str) -> None:
    assert replay(bytewise(WIRES[name])) == read(name)


@given(st.sampled_from(NAMES), st.lists(st.integers(0, 3000), max_size=6))
def test_any_cut_gives_the_same_events(name: str, cuts: list[int]) -> None:
    assert replay(cut(WIRES[name], cuts)) == read(name)


@pytest.mark.parametrize("name", NAMES)
def test_every_stream_ends_exactly_once(name: str) -> None:
    assert ends_once(read(name))


def test_a_plain_stream_passes_byte_for_byte_without_its_usage_chunk() -> None:
    events = read("plain")
    wire = [line[6:] for line in WIRES["plain"].split(b"\n") if line.startswith(b"data: {")]
    assert [event.payload for event in chunks(events)] == wire[:-1]
    assert texts(events, Channel.CONTENT) == "Hello \u2028é"
    usage = only(events, UsageSeen).usage
    assert (usage.prompt, usage.output, usage.cached, usage.reasoning) == (9, 2, 3, 1)
    assert only(events, Completed).missing_finish == ()


def test_a_role_only_chunk_is_no_content() -> None:
    assert [event.content for event in chunks(read("plain"))] == [False, True, True, True]


def test_tool_calls_are_counted_by_name_and_arguments() -> None:
    events = read("tools")
    assert (texts(events, Channel.TOOL_NAME), texts(events, Channel.TOOL_ARGUMENTS)) == ("f", '{"a":1}')


def test_a_call_sent_under_both_names_with_repeated_names_is_counted_once() -> None:
    events = read("named_twice")
    assert (texts(events, Channel.TOOL_NAME), texts(events, Channel.TOOL_ARGUMENTS)) == ("f", "{}")


def test_a_missing_tool_index_is_added() -> None:
    first = payloads(read("tools_without_index"))[0]["choices"][0]["delta"]
    assert first["tool_calls"][0]["index"] == 0
    assert first["tool_calls"][0]["id"] == "c"


def test_a_missing_role_is_added_to_the_first_delta_only() -> None:
    deltas = [each["choices"][0]["delta"] for each in payloads(read("no_role"))]
    assert deltas == [{"role": "assistant", "content": "a"}, {"content": "b"}, {}]


@pytest.mark.parametrize(("wanted", "expected"), [(False, [False, False, False]), (True, [True, True, True])])
def test_usage_in_every_chunk_is_taken_out(wanted: bool, expected: list[bool]) -> None:
    events = read("usage_everywhere", usage_wanted=wanted)
    assert ["usage" in each for each in payloads(events)] == expected
    assert all(each.get("usage") is None for each in payloads(events))
    assert [event.usage.output for event in events if isinstance(event, UsageSeen)] == [0, 1, 2]


def test_groq_reports_usage_in_its_own_place() -> None:
    assert only(read("groq"), UsageSeen).usage.output == 2


@pytest.mark.parametrize(("wanted", "frames"), [(False, 3), (True, 4)])
def test_azures_first_chunk_reaches_only_who_expects_empty_choices(wanted: bool, frames: int) -> None:
    assert len(payloads(read("azure", usage_wanted=wanted))) == frames


def test_a_missing_done_is_complete_when_every_choice_finished() -> None:
    assert only(read("no_done"), Completed).missing_finish == ()
    assert only(read("choices", choices=2), Completed).missing_finish == ()


def test_a_stream_without_finish_or_done_is_truncated() -> None:
    assert only(read("truncated"), Failed).failure.kind == "truncated"


def test_a_profile_may_end_its_streams_without_either() -> None:
    upstream = Upstream("p", "openai", b"/v1", clean_eof=True)
    one = OpenAICodec(upstream, ChatCall(b"", "m", True))
    one.feed(WIRES["truncated"])
    assert only(one.end_of_stream(), Completed).missing_finish == (0,)


def test_done_without_finish_names_the_open_choices() -> None:
    assert only(read("no_finish"), Completed).missing_finish == (0,)


@pytest.mark.parametrize(("name", "status"), [("error_frame", 502), ("event_error", 503), ("finish_error", 502)])
def test_in_band_errors_fail_the_stream(name: str, status: int) -> None:
    failure = only(read(name), Failed).failure
    assert failure.status == status
    assert failure.message == f"The provider reported an error (status {status})."


def test_an_empty_stream_is_a_failure() -> None:
    assert only(read("empty"), Failed).failure.kind == "truncated"


def test_garbage_is_a_failure_and_what_came_before_it_counts() -> None:
    events = read("garbage")
    assert only(events, Failed).failure.kind == "garbage"
    assert texts(events, Channel.CONTENT) == "a"


def test_content_in_parts_is_counted() -> None:
    assert texts(read("parts"), Channel.CONTENT) == "a"


def test_counts_that_are_no_counts_come_back_negative() -> None:
    usage = only(read("bad_usage"), UsageSeen).usage
    assert (usage.prompt, usage.output) == (-1, -2)


def test_a_renamed_model_shows_in_every_payload() -> None:
    one = codec(rename_to="public")
    events = one.feed(WIRES["plain"])
    assert {each["model"] for each in payloads(events)} == {"public"}
    own = [one.finish_chunk(0, "length"), one.usage_chunk(b'{"a":1}', b',"x":2')]
    assert {json.loads(each)["model"] for each in own} == {"public"}


def test_our_own_chunks_look_like_the_streams() -> None:
    one = codec()
    one.feed(WIRES["plain"])
    usage = json.loads(one.usage_chunk(b'{"total_tokens":1}', b',"x_tollgate":{}'))
    assert usage["choices"] == []
    assert usage["usage"] == {"total_tokens": 1}
    assert usage["x_tollgate"] == {}
    finish = json.loads(one.finish_chunk(0, "length"))
    assert finish["choices"][0]["finish_reason"] == "length"
    assert usage["id"] == finish["id"] == "chatcmpl-1"


def test_a_frame_above_the_bound_fails_the_stream() -> None:
    events = replay([b"data: " + b"x" * 5000], frame_bytes_max=1000)
    assert only(events, Failed).failure.kind == "garbage"


@settings(max_examples=300)
@given(
    st.lists(
        st.sampled_from(
            [
                b"data: ",
                b"event: error",
                b"\n",
                b"\n\n",
                b"{",
                b"}",
                b"[]",
                b'"choices":',
                b"null",
                b",",
                b'{"choices":[{}]}',
                b'{"choices":[{"delta":5,"index":"x"}]}',
                b'{"choices":[{"delta":{"tool_calls":[null,{"index":-1}]}}]}',
                b'{"choices":{},"usage":[]}',
                b"\xff",
                b"[DONE]",
                b"1e999",
                b'{"usage":{"prompt_tokens":1e30,"completion_tokens":true}}',
            ]
        ),
        max_size=30,
    ).map(b"".join)
)
def test_no_bytes_make_it_raise(wire: bytes) -> None:
    events = replay([wire])
    assert isinstance(events[-1], Completed | Failed)


def test_the_request_carries_our_key_and_nothing_of_the_clients() -> None:
    one = codec()
    request = one.request(ChatCall(b"{}", "m", True), "req_1")
    assert (request.method, request.target, request.body) == (b"POST", b"/v1/chat/completions", b"{}")
    assert dict(request.headers)[b"authorization"] == b"Bearer sk-upstream"
    assert "sk-upstream" not in repr(UPSTREAM)


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [
        (400, "caller", "bad"),
        (401, "key_refused", "bad"),
        (403, "key_refused", "bad"),
        (402, "key_refused", "bad"),
        (408, "server", "bad"),
        (429, "rate_limited", "bad"),
        (500, "server", "The provider reported an error (status 500)."),
        (503, "overloaded", "The provider reported an error (status 503)."),
    ],
)
def test_statuses_mean_what_they_mean(status: int, kind: str, message: str) -> None:
    body = b'{"error":{"message":"bad","code":42,"type":"t"}}'
    failure = codec().failure(status, [(b"retry-after", b"3")], body)
    assert (failure.kind, failure.status, failure.message, failure.code) == (kind, status, message, "42")
    assert failure.retry_after_s == 3


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[1]", b'{"detail":"x"}', b'{"error":"x"}', b'{"error":{"message":5}}', b"\xff"]
)
def test_an_error_body_of_any_shape_is_read(body: bytes) -> None:
    failure = codec().failure(400, [], body)
    assert failure.kind == "caller"
    assert failure.message


def test_a_whole_answer_is_read_and_not_rewritten() -> None:
    body = b'{"id":"x","choices":[{"index":0,"message":{"role":"assistant","content":"hi"}}],'
    body += b'"usage":{"prompt_tokens":1,"completion_tokens":2}, "zz":1.50}'
    answer = codec(stream=False).answer(body)
    assert isinstance(answer, OpenAIAnswer)
    assert answer.root.body is body
    assert answer.usage is not None
    assert answer.usage.output == 2
    assert answer.texts() == [(0, int(Channel.CONTENT), 0, "hi")]


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}", b'{"error":{"message":"x"}}', b'{"choices":null}'])
def test_what_is_no_answer_is_a_failure(body: bytes) -> None:
    assert isinstance(codec(stream=False).answer(body), ProviderFailure)


def chunk_of(delta: str, more: str = "") -> bytes:
    return f'data: {{"choices":[{{"index":0,"delta":{delta},"finish_reason":null}}]{more}}}\n\n'.encode()


@pytest.mark.parametrize("count", ["1e999", "9" * 5000, '"\ud800"'])
def test_usage_that_cannot_be_read_is_no_usage_and_the_stream_goes_on(count: str) -> None:
    body = chunk_of(
        '{"role":"assistant","content":"a"}',
        f',"usage":{{"prompt_tokens":{count},"completion_tokens":1}}'.encode("utf-8", "surrogatepass").decode(
            "latin-1"
        ),
    )
    events = replay([body.decode().encode("latin-1", "replace"), b"data: [DONE]\n\n"])
    assert isinstance(events[-1], Completed)
    assert [event.usage.prompt for event in events if isinstance(event, UsageSeen)] in ([-1], [])


@pytest.mark.parametrize(
    "body", [b'{"choices":[{"message":{"content":"a"},"logprobs":-1e999}]}', b'{"choices":[{"x":"\xff"}]}']
)
def test_a_whole_answer_that_cannot_be_read_is_garbage(body: bytes) -> None:
    answer = codec(stream=False).answer(body)
    assert isinstance(answer, ProviderFailure)
    assert answer.kind == "garbage"


def test_custom_tools_are_counted() -> None:
    wire = chunk_of(
        '{"role":"assistant","tool_calls":[{"index":0,"type":"custom","custom":{"name":"run","input":"ls"}}]}'
    )
    events = replay([wire, b"data: [DONE]\n\n"])
    assert (texts(events, Channel.TOOL_NAME), texts(events, Channel.TOOL_ARGUMENTS)) == ("run", "ls")


def test_an_audio_transcript_is_output_and_content() -> None:
    wire = chunk_of('{"role":"assistant","audio":{"id":"a1","data":"AAAA","transcript":"hello"}}')
    events = replay([wire, b"data: [DONE]\n\n"])
    assert texts(events, Channel.CONTENT) == "hello"
    assert [event.content for event in chunks(events)] == [True]


def test_a_provider_cannot_speak_for_our_bill() -> None:
    events = replay([chunk_of('{"role":"assistant","content":"a"}', ',"x_tollgate":{"charge":0}'), b"data: [DONE]\n\n"])
    assert [list(each) for each in payloads(events)] == [["choices"]]


def test_a_report_follows_the_chunk_it_came_with() -> None:
    events = read("usage_everywhere")
    kinds = [type(event).__name__ for event in events]
    assert kinds == ["Chunk", "UsageSeen"] * 3 + ["Completed"]


def test_usage_sent_over_several_data_lines_becomes_one_line_of_ours() -> None:
    pretty = json.dumps({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}, indent=1)
    wire = "".join(f"data: {line}\n" for line in pretty.splitlines()).encode() + b"\n"
    coder = codec()
    first = coder.feed(chunk_of('{"role":"assistant","content":"a"}'))
    (seen,) = [event for event in coder.feed(wire) if isinstance(event, UsageSeen)]
    assert first
    assert seen.usage.prompt == 3
    assert b"\n" not in seen.usage.raw
    assert b"\n" not in coder.usage_chunk(seen.usage.raw, b"")
