"""The short way that the openai codec has for ordinary chunks: always the events of the long one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from providers.codec import ChatCall, Upstream
from providers.events import Chunk, Event
from providers.openai import OpenAICodec

TRANSCRIPTS = Path(__file__).parent.parent / "transcripts" / "openai"
NAMES = sorted(path.stem for path in TRANSCRIPTS.glob("*.sse"))


class LongWay(OpenAICodec):
    """The codec without its short way for ordinary chunks."""

    def _frame(self, name: bytes, payload: bytes, events: list[Event]) -> None:
        self._any_frame(name, payload, None, events)


def replay(pieces: list[bytes], kind: type[OpenAICodec] = OpenAICodec, **call: Any) -> list[Event]:
    one = kind(Upstream("p", "openai", b"/v1"), ChatCall(**{"body": b"", "model": "m", "stream": True, **call}))
    events = [event for piece in pieces for event in one.feed(piece)]
    return events + one.end_of_stream()


CALLS: list[dict[str, Any]] = [{}, {"usage_wanted": True}, {"rename_to": "mine"}]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("call", CALLS)
def test_the_short_way_gives_the_events_of_the_long_one(name: str, call: dict[str, Any]) -> None:
    wire = (TRANSCRIPTS / f"{name}.sse").read_bytes()
    alone = re.split(rb"(?<=\n\n)", wire)
    assert replay(alone, **call) == replay(alone, LongWay, **call) == replay([wire], LongWay, **call)


DELTA_MEMBERS = [
    '"role":"assistant"', '"role":null', '"refusal":"no"', '"refusal":null', '"reasoning":"hm"', '"reasoning":""',
    '"reasoning_content":"hm"', '"tool_calls":[]', '"tool_calls":[{"function":{"name":"f","arguments":"{}"}}]',
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

    events = replay([(TRANSCRIPTS / "plain.sse").read_bytes()], Watched)
    ordinary = [one for one in events if isinstance(one, Chunk) and one.deltas]
    assert ordinary
    assert not {one.payload for one in ordinary[1:]} & set(went)
