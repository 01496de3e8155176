"""Anthropic's whole answers and errors as OpenAI's."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.chat import ChatCompletion

from providers.chat_chunks import WholeAnswer
from providers.events import Channel, ProviderFailure
from tests.unit.test_anthropic_codec import codec

WHOLE = {
    "id": "msg_9",
    "type": "message",
    "role": "assistant",
    "model": "claude-test-5",
    "content": [
        {"type": "thinking", "thinking": "Hm.", "signature": "c2ln"},
        {"type": "redacted_thinking", "data": "eA=="},
        {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
        {"type": "text", "text": "It "},
        {
            "type": "text",
            "text": "rains.",
            "citations": [{"type": "web_search_result_location", "url": "https://example.org", "title": "Rain"}],
        },
        {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"a": 1}},
        {"type": "hologram"},
        "odd",
    ],
    "stop_reason": "tool_use",
    "usage": {"input_tokens": 3, "cache_read_input_tokens": 2, "output_tokens": 9},
}


def whole(value: Any, **call: Any) -> Any:
    return codec(stream=False, **call).answer(json.dumps(value).encode())


def test_a_whole_answer_is_openais() -> None:
    answer = whole(WHOLE)
    assert isinstance(answer, WholeAnswer)
    assert answer.usage is not None
    ChatCompletion.model_validate_json(answer.root.body)
    value = json.loads(answer.root.body)
    assert (value["id"], value["object"], value["created"], value["model"]) == (
        "msg_9",
        "chat.completion",
        7,
        "claude-test-5",
    )
    (choice,) = value["choices"]
    assert choice["finish_reason"] == "tool_calls"
    said = choice["message"]
    assert (said["role"], said["content"], said["reasoning_content"]) == ("assistant", "It rains.", "Hm.")
    assert said["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"a":1}'}
    assert [block["type"] for block in said["thinking_blocks"]] == ["thinking", "redacted_thinking"]
    assert said["annotations"][0]["url_citation"]["start_index"] == 3
    assert (answer.usage.prompt, answer.usage.cached, answer.usage.output) == (5, 2, 9)
    assert answer.root.raw("usage") == answer.usage.raw
    assert answer.texts() == [
        (0, Channel.CONTENT, 0, "It rains."),
        (0, Channel.REASONING, 0, "Hm."),
        (0, Channel.TOOL_NAME, 0, "f"),
        (0, Channel.TOOL_ARGUMENTS, 0, '{"a":1}'),
    ]


def test_citations_that_are_none_and_thoughts_without_a_signature_do_not_come_back() -> None:
    thought = {"type": "thinking", "thinking": "Hm."}
    said = json.loads(whole({"content": [thought, {"type": "text", "text": "a", "citations": [5]}]}).root.body)
    message = said["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "a", "refusal": None, "reasoning_content": "Hm."}


def test_content_is_null_only_beside_calls() -> None:
    call = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
    for content, expected in (([call], None), ([], "")):
        answer = whole({"content": content, "stop_reason": "end_turn"})
        assert json.loads(answer.root.body)["choices"][0]["message"]["content"] == expected


def test_a_whole_answer_without_usage_and_with_a_renamed_model() -> None:
    answer = whole({**WHOLE, "usage": None}, rename_to="public")
    assert (answer.usage, answer.root.raw("usage")) == (None, None)
    assert answer.root.raw("model") == b'"public"'


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", "garbage"),
        (b"[]", "garbage"),
        (b"{}", "garbage"),
        (b'{"content":"a"}', "garbage"),
        (b"\xff", "garbage"),
        (b"[" * 9000, "garbage"),
        (b'{"type":"error","error":{"type":"overloaded_error","message":"x"}}', "overloaded"),
    ],
)
def test_what_is_no_message_is_a_failure(body: bytes, kind: str) -> None:
    failure = codec().answer(body)
    assert isinstance(failure, ProviderFailure)
    assert failure.kind == kind


TOO_LONG = ("context_length", "context_length_exceeded", 400)
BLOCKED = ("content_policy", "content_policy_violation", 400)

# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "type_", "message", "kind", "code", "told"),
    [
        (400, "invalid_request_error", "tools.0.name: too long", "caller", None, 400),
        (400, "invalid_request_error", "prompt is too long: 9 > 8", *TOO_LONG),
        (400, "invalid_request_error", "input length and `max_tokens` exceed context limit", *TOO_LONG),
        (400, "invalid_request_error", "Output blocked by content filtering policy", *BLOCKED),
        (400, "invalid_request_error", "Your credit balance is too low", "key_refused", None, 400),
        (400, "invalid_request_error", "messages.0.cache_control.credit balance: Extra inputs", "caller", None, 400),
        (401, "authentication_error", "invalid x-api-key", "key_refused", None, 401),
        (402, "billing_error", "x", "key_refused", None, 402),
        (403, "permission_error", "x", "key_refused", None, 403),
        (404, "not_found_error", "model: claude-9", "caller", "model_not_found", 404),
        (404, "not_found_error", "File not found: file_7", "caller", None, 404),
        (413, "request_too_large", "x", "caller", None, 413),
        (429, "rate_limit_error", "your organization org-7", "rate_limited", "rate_limit_exceeded", 429),
        (500, "api_error", "at /srv/app", "server", None, 500),
        (504, "timeout_error", "x", "server", None, 504),
        (529, "overloaded_error", "Overloaded", "overloaded", None, 503),
    ],
)  # fmt: skip
def test_errors_by_status(status: int, type_: str, message: str, kind: str, code: str | None, told: int) -> None:
    body = json.dumps({"type": "error", "error": {"type": type_, "message": message}}).encode()
    failure = codec().failure(status, [(b"retry-after", b"7")], body)
    assert (failure.kind, failure.code, failure.status, failure.retry_after_s) == (kind, code, told, 7)
    assert (failure.message == message) is (status < 429)
    assert "org-7" not in failure.message


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"error":5}', b"\xff", b'{"error":{"message":{}}}'])
def test_an_error_of_any_shape_is_told(body: bytes) -> None:
    failure = codec().failure(502, [(b"retry-after", b"soon")], body)
    assert (failure.kind, failure.retry_after_s) == ("server", None)
