"""Messages of an OpenAI request as Converse's: turns, calls and results, media, thinking that comes back."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest

from providers.chat_request import BadRequest, Unsupported
from tests.unit.test_bedrock_request import CACHE, CALL, HI, PNG, WEATHER, converse

POINT = {"cachePoint": {"type": "default"}}
USE = {"toolUse": {"toolUseId": "call_1", "name": "weather", "input": {"city": "Paris"}}}


def content(parts: list[Any], **more: Any) -> list[dict[str, Any]]:
    """The blocks of a user message of these parts."""
    (message,) = converse([{"role": "user", "content": parts}], **more)["messages"]
    blocks: list[dict[str, Any]] = message["content"]
    return blocks


def test_instructions_go_to_the_front_and_roles_alternate() -> None:
    made = converse(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "a"},
            {"role": "user", "content": [{"type": "text", "text": "b"}]},
            {"role": "developer", "content": [{"type": "text", "text": "Be kind.", "cache_control": CACHE}]},
            {"role": "assistant", "content": "c"},
            {"role": "assistant", "content": "d"},
            {"role": "user", "content": " "},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "e \n"}]},
        ]
    )
    assert made["system"] == [{"text": "Be brief."}, {"text": "Be kind."}, POINT]
    assert made["messages"] == [
        {"role": "user", "content": [{"text": "a"}, {"text": "b"}]},
        {"role": "assistant", "content": [{"text": "c"}, {"text": "d"}, {"text": "e"}]},
    ]


def test_calls_and_results_are_blocks_of_their_turns() -> None:
    odd = {"id": "x.y/" + "z" * 80, "type": "function", "function": {"name": "clock", "arguments": "not JSON"}}
    made = converse(
        [
            *HI,
            {"role": "assistant", "content": "I look.", "tool_calls": [CALL, odd]},
            {"role": "tool", "tool_call_id": "call_1", "content": "mild", "name": "weather"},
            {"role": "tool", "tool_call_id": odd["id"], "content": "late", "is_error": True},
            {"role": "user", "content": "So?"},
        ],
        tools=[WEATHER],
    )
    _, answer, results = made["messages"]
    assert answer["content"][:2] == [{"text": "I look."}, USE]
    second = answer["content"][2]["toolUse"]
    assert second["input"] == {"INVALID_JSON": "not JSON"}
    assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", second["toolUseId"])
    assert results["content"] == [
        {"toolResult": {"toolUseId": "call_1", "content": [{"text": "mild"}]}},
        {"toolResult": {"toolUseId": second["toolUseId"], "content": [{"text": "late"}], "status": "error"}},
        {"text": "So?"},
    ]


def test_a_result_may_be_empty_or_an_image_and_its_cache_point_stands_behind_it() -> None:
    parts = [{"type": "image_url", "image_url": {"url": PNG}, "cache_control": CACHE}]
    made = converse(
        [
            {"role": "tool", "tool_call_id": "a", "content": ""},
            {"role": "tool", "tool_call_id": "b", "content": parts},
        ]
    )
    image = {"image": {"format": "png", "source": {"bytes": "iVBORw0="}}}
    assert made["messages"][0]["content"] == [
        {"toolResult": {"toolUseId": "a", "content": []}},
        {"toolResult": {"toolUseId": "b", "content": [image]}},
        POINT,
    ]


def test_media_are_blocks_with_a_format() -> None:
    file = {"filename": "My_report: 2026.pdf", "file_data": "data:application/pdf;base64,JVBERi0="}
    blocks = content(
        [
            {"type": "text", "text": "Look:", "cache_control": CACHE},
            {"type": "image_url", "image_url": {"url": "data:image/jpg;base64,/9j/"}},
            {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}},
            {"type": "file", "file": file},
            {"type": "file", "file": file},
            {"type": "file", "file": {"file_data": "JVBERi0="}},
            {"type": "file", "file": {"filename": "a.CSV", "file_data": "YSxi"}},
            {"type": "file", "file": {"filename": "i.png", "file_data": PNG}},
            {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}},
        ]
    )
    assert blocks == [
        {"text": "Look:"},
        POINT,
        {"image": {"format": "jpeg", "source": {"bytes": "/9j/"}}},
        {"audio": {"format": "wav", "source": {"bytes": "UklGRg=="}}},
        {"document": {"format": "pdf", "name": "My report 2026", "source": {"bytes": "JVBERi0="}}},
        {"document": {"format": "pdf", "name": "My report 2026 (2)", "source": {"bytes": "JVBERi0="}}},
        {"document": {"format": "pdf", "name": "Document", "source": {"bytes": "JVBERi0="}}},
        {"document": {"format": "csv", "name": "a", "source": {"bytes": "YSxi"}}},
        {"image": {"format": "png", "source": {"bytes": "iVBORw0="}}},
        {"video": {"format": "mp4", "source": {"bytes": "AAAA"}}},
    ]


def test_many_documents_of_one_name_cost_no_more_than_as_many_of_others() -> None:
    part = {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,JVBERi0="}}
    began = time.process_time()
    names = [block["document"]["name"] for block in content([part] * 20_000)]
    assert len(set(names)) == 20_000
    assert time.process_time() - began < 5  # a search from the first number on took 20 s


@pytest.mark.parametrize(
    ("part", "param"),
    [
        ({"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}, "image_url.url"),
        ({"type": "image_url", "image_url": {"url": "data:image/tiff;base64,AAAA"}}, "image_url.url"),
        ({"type": "file", "file": {"file_id": "file-1"}}, "file.file_id"),
        ({"type": "file", "file": {"file_data": "https://example.org/a.pdf"}}, "file.file_data"),
        ({"type": "file", "file": {"filename": "a.zip", "file_data": "UEs="}}, "file.file_data"),
        ({"type": "input_audio", "input_audio": {"data": "AA==", "format": "amr"}}, "input_audio.format"),
    ],
)
def test_media_that_bedrock_cannot_have_are_refused_by_their_place(part: dict[str, Any], param: str) -> None:
    parts = [{"type": "text", "text": "See"}, part]
    with pytest.raises(Unsupported) as refused:
        content(parts)
    assert refused.value.param == f"messages[0].content[1].{param}"
    assert content(parts, drop=f"messages.content.{param}") == [{"text": "See"}]


def test_a_bucket_is_never_read_for_a_client() -> None:
    for part in (
        {"type": "image_url", "image_url": {"url": "s3://ours/secret.png"}},
        {"type": "file", "file": {"file_id": "s3://ours/secret.pdf"}},
        {"type": "video_url", "video_url": {"url": "s3://ours/secret.mp4"}},
    ):
        try:
            made = json.dumps(content([{"type": "text", "text": "See"}, part]))
        except (BadRequest, Unsupported):
            continue
        assert "s3Location" not in made


@pytest.mark.parametrize(
    ("member", "given", "blocks"),
    [
        (
            "thinking_blocks",
            [
                {"index": 0, "type": "thinking", "thinking": "a"},
                {"index": 0, "type": "thinking", "thinking": "b"},
                {"index": 0, "type": "thinking", "thinking": "", "signature": "sig"},
                {"index": 1, "type": "redacted_thinking", "data": "Encrypted"},
            ],
            [{"reasoningText": {"text": "ab", "signature": "sig"}}, {"redactedContent": "RW5jcnlwdGVk"}],
        ),
        (
            "thinking_blocks",
            [{"type": "redacted_thinking", "data": "//79", "encoding": "base64"}],
            [{"redactedContent": "//79"}],
        ),
        (
            "thinking_blocks",
            [{"type": "thinking", "thinking": "", "signature": "sig"}],
            [{"reasoningText": {"text": "said", "signature": "sig"}}],
        ),
        (
            "reasoning_details",
            [
                {"type": "reasoning.text", "text": "a", "signature": "sig", "format": "anthropic-claude-v1"},
                {"type": "reasoning.encrypted", "data": "Encrypted"},
                {"type": "reasoning.text", "text": "b", "signature": "x", "format": "another"},
            ],
            [{"reasoningText": {"text": "a", "signature": "sig"}}, {"redactedContent": "RW5jcnlwdGVk"}],
        ),
        ("thinking_blocks", [{"type": "thinking", "thinking": "unsigned"}], []),
        ("thinking_blocks", "odd", []),
        ("thinking_blocks", [1, {"type": "thinking", "signature": 5}], []),
    ],
)
def test_thinking_goes_back_with_its_signature(member: str, given: Any, blocks: list[dict[str, Any]]) -> None:
    answer = {"role": "assistant", "content": "c", "reasoning_content": "said", member: given}
    made = converse([*HI, answer, *HI])["messages"][1]["content"]
    assert made == [*({"reasoningContent": block} for block in blocks), {"text": "c"}]
