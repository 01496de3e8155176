"""The short ways that the openai codec has for what providers mostly send: always the outcome of the long ones."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from providers.codec import ChatCall, Upstream
from providers.events import Chunk, Event
from providers.failures import UNREADABLE
from providers.openai import OpenAICodec
from providers.openai_wire import lenient_usage, usage_of
from tests.support.codecs import fed, transcripts

WIRES = transcripts("openai")
NAMES = list(WIRES)


class LongWay(OpenAICodec):
    """The codec without its short way for ordinary chunks."""

    def _frame(self, name: bytes, payload: bytes, events: list[Event]) -> None:
        self._any_frame(name, payload, None, events)


def replay(pieces: list[bytes], kind: type[OpenAICodec] = OpenAICodec, **call: Any) -> list[Event]:
    one = kind(Upstream("p", "openai", b"/v1"), ChatCall(**{"body": b"", "model": "m", "stream": True, **call}))
    return fed(one, pieces)


CALLS: list[dict[str, Any]] = [{}, {"usage_wanted": True}, {"rename_to": "mine"}]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("call", CALLS)
def test_the_short_way_gives_the_events_of_the_long_one(name: str, call: dict[str, Any]) -> None:
    wire = WIRES[name]
    alone = re.split(rb"(?<=\n\n)", wire)
    assert replay(alone, **call) == replay(alone, LongWay, **call) == replay([wire], LongWay, **call)


DELTA_MEMBERS = [
    '"role":"assistant"', '"role":null', '"refusal":"no"', '"refusal":null', '"reasoning":"hm"', '"reasoning":""',
    '"reasoning_content":"hm"', '"reasoning_content":"hm","content":""', '"reasoning":"hm","content":null',
    '"reasoning":"hm","reasoning_content":"hm","content":null', '"reasoning_details":[{"text":"hm"}],"content":null',
    '"tool_calls":[]', '"tool_calls":[{"function":{"name":"f","arguments":"{}"}}]',
    '"tool_calls":[{"index":1,"custom":{"name":"c"}}]', '"function_call":null', '"function_call":{}',
    '"function_call":{"name":"f"}', '"audio":{"transcript":"heard"}', '"content":""', '"content":null',
    '"content":["a",{"text":"b"}]', '"x_tollgate":1',
]  # fmt: skip
CHOICE_MEMBERS = [
    '"index":0', '"index":1', '"index":"x"', '"finish_reason":null', '"finish_reason":"stop"',
    '"finish_reason":"error"', '"finish_reason":7', '"delta":null', '"delta":5', '"x_tollgate":1',
]  # fmt: skip
FRAME_MEMBERS = [
    '"usage":null', '"usage":{"prompt_tokens":1,"completion_tokens":2}', '"usage":{}', '"usage":5', '"x_groq":null',
    '"x_groq":{"id":"r"}', '"x_groq":{"usage":{"prompt_tokens":1,"completion_tokens":2}}', '"error":null',
    '"error":{"message":"bad"}', '"error":"bad"', '"model":"theirs"', '"x_tollgate":{}', '"choices":[]',
    '"choices":null',
    '"choices":[{"delta":{"content":"a"}},{"index":1,"delta":{"content":"b"}}]',
]  # fmt: skip


def frame(delta: str = "", choice: str = "", other: str = "") -> bytes:
    """An ordinary chunk with these members besides; of a doubled one the last counts."""
    parts = [f",{members}" if members else "" for members in (delta, choice, other)]
    return '{{"choices":[{{"delta":{{"content":"hi"{}}}{}}}]{}}}'.format(*parts).encode()


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("before", [[], [b"data: " + frame() + b"\n\n"]])
def test_one_odd_member_gives_the_events_of_the_long_way(before: list[bytes], call: dict[str, Any]) -> None:
    odd = [
        *(frame(delta=members) for members in DELTA_MEMBERS),
        *(frame(choice=members) for members in CHOICE_MEMBERS),
        *(frame(other=members) for members in FRAME_MEMBERS),
    ]
    for payload in odd:
        for lead in (b"data: ", b"data:", b"event: error\ndata: ", b"event: ping\ndata: ", b"data: \ndata: "):
            events = [*before, lead + payload + b"\n\n"]
            assert replay(events, **call) == replay(events, LongWay, **call), payload


def some(members: list[str]) -> st.SearchStrategy[str]:
    return st.one_of(st.just(""), st.lists(st.sampled_from(members), max_size=2).map(",".join))


FRAME = st.builds(frame, some(DELTA_MEMBERS), some(CHOICE_MEMBERS), some(FRAME_MEMBERS))
EVENT = st.builds(
    lambda name, lead, payload: name + lead + payload + b"\n\n",
    st.sampled_from([b"", b"", b"", b"", b"event: ping\n", b"event: error\n", b"event: message\n"]),
    st.sampled_from([b"data: ", b"data: ", b"data:", b"data: \ndata: "]),
    st.one_of(*[FRAME] * 9, st.sampled_from([b"[DONE]", b"[]", b"{", b'{"choices":[{"delta":{"content":"\xff"}}]}'])),
)


@settings(max_examples=400, deadline=None)
@given(events=st.lists(EVENT, max_size=8), call=st.sampled_from(CALLS))
def test_the_short_way_gives_the_events_of_the_long_one_for_frames_of_any_kind(
    events: list[bytes], call: dict[str, Any]
) -> None:
    assert replay(events, **call) == replay(events, LongWay, **call) == replay([b"".join(events)], **call)


def test_the_short_way_is_taken_by_an_ordinary_stream() -> None:
    went: list[bytes] = []

    class Watched(OpenAICodec):
        def _any_frame(self, name: bytes, payload: bytes, chunk: Any, events: list[Event]) -> None:
            went.append(payload)
            super()._any_frame(name, payload, chunk, events)

    events = replay([WIRES["plain"]], Watched)
    ordinary = [one for one in events if isinstance(one, Chunk) and one.deltas]
    assert ordinary
    assert not {one.payload for one in ordinary[1:]} & set(went)


COUNTS = [
    *("1", "0", "-1", "1.0", "-0.0", "1.5", "1e3", "1e30", "1e999", "9007199254740992", "9007199254740993.0", "true"),
    *("18446744073709551616", "9" * 5000, "null", '"5"', '"\\ud800"', "[]", "{}", '{"cached_tokens":4}'),
    *('{"cached_tokens":3,"cache_write_tokens":2,"audio_tokens":1}', '{"reasoning_tokens":1.0,"audio_tokens":2}'),
    *('{"image_tokens":2}', '{"reasoning_tokens":1,"audio_tokens":1,"image_tokens":9}', '{"image_tokens":-2}'),
    *('{"cache_write_tokens":2,"cache_write_tokens_details":{"ttl_1h_tokens":1}}', '{"cache_write_tokens_details":[]}'),
    *('{"accepted_prediction_tokens":1,"rejected_prediction_tokens":0,"audio_tokens":null}', '{"text_tokens":1}'),
]  # fmt: skip
USAGE_MEMBERS = [
    "prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details", "completion_tokens_details",
    "prompt_cache_hit_tokens", "cost",
]  # fmt: skip


def read_by(reader: Any, raw: bytes) -> Any:
    try:
        return reader(raw)
    except UNREADABLE:
        return "unreadable"


@pytest.mark.parametrize("name", USAGE_MEMBERS)
@pytest.mark.parametrize(
    "start", ['{"prompt_tokens":9,"completion_tokens":5', '{"x":"\xff","prompt_tokens":9', '{"x":1']
)
def test_usage_in_the_ordinary_form_is_read_as_any_usage_is(name: str, start: str) -> None:
    for count in COUNTS:
        raw = f'{start},"{name}":{count}}}'.encode("latin-1")
        assert read_by(usage_of, raw) == read_by(lenient_usage, raw), raw


@pytest.mark.parametrize(("told", "drawn"), [("4", 4), ("9", 5), ("-1", 0), ("null", 0), ('"x"', 0)])
def test_images_are_a_class_of_the_output_as_far_as_it_goes(told: str, drawn: int) -> None:
    made = f'{{"reasoning_tokens":1,"audio_tokens":2,"image_tokens":{told}}}'
    usage = usage_of(
        f'{{"prompt_tokens":9,"completion_tokens":8,"total_tokens":17,"completion_tokens_details":{made}}}'.encode()
    )
    assert usage is not None
    assert (usage.output, usage.reasoning, usage.audio_output, usage.image_output) == (8, 1, 2, drawn)


@pytest.mark.parametrize(("kept", "hour"), [("2", 2), ("5", 3), ("-1", 0), ("null", 0)])
def test_what_is_written_to_the_cache_for_an_hour_is_read_as_we_write_it(kept: str, hour: int) -> None:
    given = f'{{"cache_write_tokens":3,"cache_write_tokens_details":{{"ttl_5m_tokens":1,"ttl_1h_tokens":{kept}}}}}'
    usage = usage_of(f'{{"prompt_tokens":9,"completion_tokens":8,"prompt_tokens_details":{given}}}'.encode())
    assert usage is not None
    assert (usage.cache_write, usage.cache_write_1h) == (3, hour)


@pytest.mark.parametrize("raw", [b"[]", b"5", b"null", b"{}", b"{", b""])
def test_what_is_no_usage_is_none_for_both_readers(raw: bytes) -> None:
    assert read_by(usage_of, raw) == read_by(lenient_usage, raw)


@pytest.mark.parametrize("call", [{}, {"rename_to": "mine"}])
@pytest.mark.parametrize(
    ("first", "kept"),
    [
        (b'{"choices":[{"delta":{}}]}', []),
        (b'{"zz":1,"model":"m","choices":[{"delta":{}}],"id":7,"created":null}', ["id", "created", "model"]),
        (b'{"system_fingerprint":"f","object":{"a":1.50},"choices":[{"delta":{}}]}', ["object", "system_fingerprint"]),
    ],
)
def test_our_own_payloads_have_what_the_first_chunk_has_and_no_more(
    first: bytes, kept: list[str], call: dict[str, Any]
) -> None:
    one = OpenAICodec(Upstream("p", "openai", b"/v1"), ChatCall(body=b"", model="m", stream=True, **call))
    one.feed(b"data: " + first + b"\n\n")
    if call and "model" not in kept:
        kept = [name for name in ("id", "object", "created", "model", "system_fingerprint") if name in {*kept, "model"}]
    usage, finish = json.loads(one.usage_chunk(b'{"cost":1}', b',"x":2')), json.loads(one.finish_chunk(3, "stop"))
    assert list(usage) == [*kept, "choices", "usage", "x"]
    assert list(finish) == [*kept, "choices"]
    assert finish["choices"] == [{"index": 3, "delta": {}, "logprobs": None, "finish_reason": "stop"}]
    sent = {**json.loads(first), **({"model": "mine"} if call else {})}
    assert all(usage[name] == finish[name] == sent[name] for name in kept)
