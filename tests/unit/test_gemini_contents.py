"""OpenAI's messages as Google's turns: parts, media, calls and their results, signatures."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from providers.chat_request import BadRequest, Unsupported
from providers.gemini_contents import NO_SIGNATURE
from tests.unit.test_gemini_request import CALL, IMAGE, RESULT, USER, native, sent


def contents(*messages: dict[str, Any], model: str = "gemini-2.5-flash", **more: Any) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = native({"messages": list(messages)}, model, **more)["contents"]
    return told


def test_system_messages_are_one_instruction_and_the_others_are_turns() -> None:
    messages = [
        {"role": "system", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c", "reasoning_content": "not sent"},
        {"role": "developer", "content": [{"type": "text", "text": "d"}]},
        {"role": "user", "content": [{"type": "text", "text": "e"}, {"type": "text", "text": ""}]},
    ]
    assert native({"messages": messages}) == {
        "contents": [
            {"role": "user", "parts": [{"text": "b"}]},
            {"role": "model", "parts": [{"text": "c"}]},
            {"role": "user", "parts": [{"text": "e"}]},
        ],
        "systemInstruction": {"parts": [{"text": "a"}, {"text": "d"}]},
    }


def test_a_system_message_alone_is_the_users() -> None:
    assert native({"messages": [{"role": "system", "content": "a"}]}) == {
        "contents": [{"role": "user", "parts": [{"text": "a"}]}]
    }


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (IMAGE, {"inlineData": {"mimeType": "image/png", "data": "AA=="}}),
        (
            {"type": "image_url", "image_url": {"url": "data:;base64,iVBORw0"}},
            {"inlineData": {"mimeType": "image/png", "data": "iVBORw0"}},
        ),
        (
            {"type": "image_url", "image_url": {"url": "https://a.example/x.WEBP?w=1.jpg"}},
            {"fileData": {"fileUri": "https://a.example/x.WEBP?w=1.jpg", "mimeType": "image/webp"}},
        ),
        (
            {"type": "image_url", "image_url": {"url": "https://a.example/x"}},
            {"fileData": {"fileUri": "https://a.example/x"}},
        ),
        (
            {"type": "input_audio", "input_audio": {"data": "AA==", "format": "mp3"}},
            {"inlineData": {"mimeType": "audio/mp3", "data": "AA=="}},
        ),
        (
            {"type": "file", "file": {"filename": "x.pdf", "file_data": "data:application/pdf;base64,AA=="}},
            {"inlineData": {"mimeType": "application/pdf", "data": "AA=="}},
        ),
        (
            {"type": "file", "file": {"filename": "x.csv", "file_data": "AA=="}},
            {"inlineData": {"mimeType": "text/csv", "data": "AA=="}},
        ),
        (
            {"type": "file", "file": {"file_data": "https://a.example/x.pdf"}},
            {"fileData": {"fileUri": "https://a.example/x.pdf", "mimeType": "application/pdf"}},
        ),
    ],
)
def test_media_go_inline_or_by_address(part: dict[str, Any], expected: dict[str, Any]) -> None:
    assert contents({"role": "user", "content": [part]}) == [{"role": "user", "parts": [expected]}]


def test_vertex_must_be_told_a_media_type() -> None:
    part = {"type": "image_url", "image_url": {"url": "https://a.example/x"}}
    (turn,) = contents({"role": "user", "content": [part]}, kind="vertex")
    assert turn["parts"] == [{"fileData": {"fileUri": "https://a.example/x", "mimeType": "image/jpeg"}}]


def test_only_web_addresses_are_passed_on() -> None:
    """A bucket's address would be read with the rights of our own project."""
    with pytest.raises(BadRequest):
        contents({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "gs://ours/x.png"}}]})
    told = contents({"role": "user", "content": [{"type": "file", "file": {"file_data": "gs://ours/x"}}]})
    assert "fileData" not in json.dumps(told)


def test_calls_and_their_results_are_one_turn_each() -> None:
    calls = [CALL, {"id": "c2", "type": "function", "function": {"name": "g", "arguments": ""}}]
    told = contents(
        USER,
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c2", "content": '{"x": 1.0}'},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "[1]"}]},
        USER,
    )
    assert told[1:3] == [
        {
            "role": "model",
            "parts": [
                {"functionCall": {"name": "f", "args": {"a": 1.5}}},
                {"functionCall": {"name": "g", "args": {}}},
            ],
        },
        {
            "role": "user",
            "parts": [
                {"functionResponse": {"name": "g", "response": {"x": 1.0}}},
                {"functionResponse": {"name": "f", "response": {"output": "[1]"}}},
            ],
        },
    ]
    assert len(told) == 4


def test_each_round_of_results_is_a_turn_of_its_own() -> None:
    call = {"role": "assistant", "tool_calls": [CALL]}
    told = contents(USER, call, RESULT, call, RESULT)
    assert [(turn["role"], len(turn["parts"])) for turn in told[1:]] == [("model", 1), ("user", 1)] * 2


def test_arguments_keep_their_digits_and_broken_ones_are_not_lost() -> None:
    assert b'"args":{"a":1.50}' in sent({"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}]}).body
    broken = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a":'}}
    (_, turn) = contents(USER, {"role": "assistant", "tool_calls": [broken]})
    assert turn["parts"][0]["functionCall"]["args"] == {"arguments": '{"a":'}


@pytest.mark.parametrize(("model", "ids"), [("gemini-2.5-flash", False), ("gemini-3-flash-preview", True)])
@pytest.mark.parametrize("kind", ["gemini", "vertex"])
def test_ids_go_only_to_models_that_know_them(model: str, ids: bool, kind: str) -> None:
    told = contents(USER, {"role": "assistant", "tool_calls": [CALL]}, RESULT, model=model, kind=kind)
    assert ("id" in told[1]["parts"][0]["functionCall"]) is ids
    assert ("id" in told[2]["parts"][0]["functionResponse"]) is ids


@pytest.mark.parametrize("name", ["google", "vertex"])
def test_signatures_come_back_where_they_were(name: str) -> None:
    signed = {"extra_content": {name: {"thought_signature": "c2ln"}}}
    call = {**CALL, **signed}
    told = contents(USER, {"role": "assistant", "content": "t", "tool_calls": [call], **signed}, model="gemini-3-pro")
    assert told[1]["parts"] == [
        {"text": "t", "thoughtSignature": "c2ln"},
        {"functionCall": {"name": "f", "args": {"a": 1.5}, "id": "c1"}, "thoughtSignature": "c2ln"},
    ]


def test_a_signature_without_text_has_a_part_of_its_own() -> None:
    message = {"role": "assistant", "content": "", "extra_content": {"google": {"thought_signature": "c2ln"}}}
    assert contents(USER, message)[1]["parts"] == [{"text": "", "thoughtSignature": "c2ln"}]


def test_calls_of_another_model_get_googles_word_for_no_signature() -> None:
    message = {"role": "assistant", "tool_calls": [CALL, {**CALL, "id": "c2"}]}
    (_, turn) = contents(USER, message, model="gemini-3-flash-preview")
    assert [part.get("thoughtSignature") for part in turn["parts"]] == [NO_SIGNATURE, None]
    (_, turn) = contents(USER, message, model="gemini-2.5-flash")
    assert [part.get("thoughtSignature") for part in turn["parts"]] == [None, None]


def test_parts_of_other_kinds_and_images_of_an_answer_go_back() -> None:
    theirs = {"fileData": {"fileUri": "gs://ours/secret.txt"}, "thoughtSignature": "c2ln"}  # read with our rights
    code = {"executableCode": {"language": "PYTHON", "code": "1"}, "thoughtSignature": "c2ln"}
    message = {
        "role": "assistant",
        "content": "x",
        "extra_content": {"google": {"parts": [code, 5, theirs]}},
        "images": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}, 5, {"image_url": {}}],
    }
    image = {"inlineData": {"mimeType": "image/png", "data": "AA=="}}
    assert contents(USER, message)[1]["parts"] == [code, {"text": "x"}, image]


def test_a_result_may_have_media_where_the_model_knows_that() -> None:
    messages: list[dict[str, Any]] = [USER, {"role": "assistant", "tool_calls": [CALL]}, {**RESULT, "content": [IMAGE]}]
    told = contents(*messages, model="gemini-3-flash-preview")[2]["parts"][0]["functionResponse"]
    assert told["parts"] == [{"inlineData": {"mimeType": "image/png", "data": "AA=="}}]
    with pytest.raises(Unsupported):
        contents(*messages)


def test_a_refusal_is_text() -> None:
    assert contents(USER, {"role": "assistant", "refusal": "no"})[1]["parts"] == [{"text": "no"}]


# -- what no request may do -------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "system"]), "content": st.text(max_size=3) | JSON},
    optional={
        "tool_calls": st.lists(st.just(CALL) | JSON, max_size=2),
        "tool_call_id": st.sampled_from(["c1", "x"]),
        "extra_content": JSON | st.fixed_dictionaries({"google": st.dictionaries(st.sampled_from(["parts"]), JSON)}),
        "images": JSON,
    },
)
FIELDS = st.dictionaries(
    st.sampled_from(
        ["google", "safety_settings", "top_k", "tools", "tool_choice", "stop", "reasoning_effort", "n", "zz"]
    ),
    JSON,
    max_size=3,
)


@settings(max_examples=300)
@given(st.lists(MESSAGE, max_size=4), FIELDS, st.sampled_from(["gemini-2.5-flash", "gemini-3-pro"]), st.booleans())
def test_any_request_is_translated_or_refused(
    messages: list[dict[str, Any]], fields: dict[str, Any], model: str, drop: bool
) -> None:
    try:
        told = native({**fields, "messages": messages}, model, drop=["*"] if drop else [])
    except (BadRequest, Unsupported):
        return
    assert told["contents"]
    assert all(turn["parts"] for turn in told["contents"])
