"""OpenAI's messages as Anthropic's turns: every part has its block, or is refused by its place."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from providers.anthropic_request import FILES_BETA
from tests.unit.test_anthropic_codec import message, read
from tests.unit.test_anthropic_request import HI, SIGNED, USER, bad, call, made, refused, sent

PDF = base64.b64encode(b"%PDF-1.4").decode()


def turns(*messages: Any) -> Any:
    return made(messages=list(messages))["messages"]


def content(*parts: Any) -> Any:
    return turns({"role": "user", "content": list(parts)})[0]["content"]


def test_system_and_developer_messages_go_to_the_front_with_their_cache_marks() -> None:
    mark = {"type": "ephemeral", "ttl": "1h"}
    out = made(
        messages=[
            {"role": "system", "content": "A"},
            {"role": "developer", "content": [{"type": "text", "text": "B", "cache_control": mark}]},
            USER,
            {"role": "system", "content": "C"},
        ]
    )
    assert out["system"] == [
        {"type": "text", "text": "A"},
        {"type": "text", "text": "B", "cache_control": mark},
        {"type": "text", "text": "C"},
    ]
    assert out["messages"] == [HI]


def test_neighbours_of_one_role_become_one_turn_and_empty_text_is_left_out() -> None:
    assert turns(USER, {"role": "user", "content": ["", "B"]}, {"role": "assistant", "content": ""}, USER) == [
        {"role": "user", "content": [{"type": "text", "text": text} for text in ("Hi", "B", "Hi")]}
    ]


def test_a_message_with_a_cache_mark_marks_its_last_block() -> None:
    (turn,) = turns({**USER, "cache_control": {"type": "ephemeral"}})
    assert turn["content"][-1]["cache_control"] == {"type": "ephemeral"}


def test_an_answer_to_be_continued_does_not_end_in_white_space() -> None:
    assert turns(USER, {"role": "assistant", "content": "So \n"})[1]["content"] == [{"type": "text", "text": "So"}]


@pytest.mark.parametrize(
    ("part", "block"),
    [
        (
            {"type": "image_url", "image_url": {"url": "https://x/a.png", "detail": "low"}},
            {"type": "image", "source": {"type": "url", "url": "https://x/a.png"}},
        ),
        (
            {"type": "image_url", "image_url": {"url": "data:image/jpg;base64,QQ=="}, "cache_control": {"type": "e"}},
            {
                "type": "image",
                "source": {"type": "base64", "media_type": "image/jpeg", "data": "QQ=="},
                "cache_control": {"type": "e"},
            },
        ),
        (
            {"type": "file", "file": {"filename": "a.PDF", "file_data": "QQ=="}},
            {
                "type": "document",
                "title": "a.PDF",
                "source": {"type": "base64", "media_type": "application/pdf", "data": "QQ=="},
            },
        ),
        (
            {"type": "file", "file": {"file_data": PDF}},
            {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": PDF}},
        ),
        (
            {"type": "file", "file": {"file_data": "data:text/markdown;base64,w6k="}},
            {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "é"}},
        ),
        (
            {"type": "file", "file": {"file_data": "https://x/a"}},
            {"type": "document", "source": {"type": "url", "url": "https://x/a"}},
        ),
        (
            {"type": "file", "file": {"file_data": "data:image/png;base64,QQ=="}},
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "QQ=="}},
        ),
        ({"type": "refusal", "refusal": "No."}, {"type": "text", "text": "No."}),
    ],
)
def test_parts_become_blocks(part: dict[str, Any], block: dict[str, Any]) -> None:
    assert content(part) == [block]


def test_a_file_by_its_id_needs_a_beta() -> None:
    out = sent(messages=[{"role": "user", "content": [{"type": "file", "file": {"file_id": "file_1"}}]}])
    (block,) = json.loads(out.body)["messages"][0]["content"]
    assert block == {"type": "document", "source": {"type": "file", "file_id": "file_1"}}
    assert dict(out.own)[b"anthropic-beta"] == FILES_BETA.encode()


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_audio", "input_audio": {"data": "QQ==", "format": "wav"}},
        {"type": "image_url", "image_url": {"url": "data:image/tiff;base64,QQ=="}},
        {"type": "file", "file": {"filename": "a.docx", "file_data": "QQ=="}},
        {"type": "video_url", "video_url": {"url": "https://x/a.mp4"}},
    ],
)
def test_content_it_cannot_read_is_refused_by_place_and_never_dropped(part: dict[str, Any]) -> None:
    messages = [USER, {"role": "user", "content": ["Look", part]}]
    assert refused(messages=messages, drop=frozenset("*")) == "messages[1].content[1]"


def test_text_files_that_are_no_text_are_refused() -> None:
    part = {"type": "file", "file": {"filename": "a.txt", "file_data": "/w=="}}
    assert bad(messages=[{"role": "user", "content": [part]}]) == "messages[0].content[0]"


def test_tool_calls_and_their_results_are_turns_of_their_own() -> None:
    out = turns(
        USER,
        {"role": "assistant", "content": "I look.", "tool_calls": [call("call_1", '{"a":1}'), call("x:2", "")]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
        {
            "role": "tool",
            "tool_call_id": "x:2",
            "is_error": True,
            "content": [
                {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}},
                {"type": "image_url", "image_url": {"url": "https://x/a.png"}},
            ],
        },
        USER,
    )
    assert [turn["role"] for turn in out] == ["user", "assistant", "user"]
    assert out[1]["content"] == [
        {"type": "text", "text": "I look."},
        {"type": "tool_use", "id": "call_1", "name": "f", "input": {"a": 1}},
        {"type": "tool_use", "id": "x_2", "name": "f", "input": {}},
    ]
    assert out[2]["content"] == [
        {"type": "tool_result", "tool_use_id": "call_1", "content": "sunny"},
        {
            "type": "tool_result",
            "tool_use_id": "x_2",
            "content": [
                {"type": "text", "text": "a"},
                {"type": "image", "source": {"type": "url", "url": "https://x/a.png"}},
            ],
            "cache_control": {"type": "ephemeral"},
            "is_error": True,
        },
        {"type": "text", "text": "Hi"},
    ]


@pytest.mark.parametrize("arguments", ["{", "[1]", '"a"', "nul"])
def test_arguments_that_are_no_object_are_shown_inside_one(arguments: str) -> None:
    out = turns(USER, {"role": "assistant", "tool_calls": [call("c", arguments)]})
    assert out[1]["content"][0]["input"] == {"INVALID_JSON": arguments}


def test_an_empty_result_has_no_content() -> None:
    (turn,) = turns({"role": "tool", "tool_call_id": "c", "content": ""})
    assert turn["content"] == [{"type": "tool_result", "tool_use_id": "c"}]


# -- thinking ----------------------------------------------------------------------------------------------------------

REDACTED = {"type": "redacted_thinking", "data": "aGlkZGVu"}


def test_what_a_stream_helper_made_of_our_stream_comes_back_as_it_was() -> None:
    answer = message(read("thinking"))
    assert turns(USER, answer, USER)[1]["content"] == [SIGNED, REDACTED, {"type": "text", "text": "Yes!"}]


@pytest.mark.parametrize(
    "member",
    [
        {"thinking_blocks": [SIGNED, REDACTED]},
        {
            "thinking_blocks": [
                {"type": "thinking", "thinking": "Let me"},
                {"type": "thinking", "thinking": " see."},
                {"type": "thinking", "thinking": "", "signature": "c2ln"},
                {**REDACTED, "index": 1},
            ]
        },
        {
            "reasoning_details": [
                {"type": "reasoning.text", "text": "Let me see.", "signature": "c2ln", "format": "anthropic-claude-v1"},
                {"type": "reasoning.encrypted", "data": "aGlkZGVu"},
                {"type": "reasoning.encrypted", "data": "b3RoZXI=", "format": "openai-responses-v1"},
                "odd",
            ]
        },
    ],
)
def test_signed_thinking_is_accepted_in_every_form_it_comes_back_in(member: dict[str, Any]) -> None:
    assert turns(USER, {"role": "assistant", "content": "Yes", **member}, USER)[1]["content"][:2] == [SIGNED, REDACTED]


def test_thinking_without_a_signature_is_not_sent_again() -> None:
    answer = {"role": "assistant", "content": "Yes", "reasoning_content": "Hm", "thinking_blocks": [{"thinking": "Hm"}]}
    assert turns(USER, answer, USER)[1]["content"] == [{"type": "text", "text": "Yes"}]
