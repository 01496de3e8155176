"""The gemini codec's whole answers and errors."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from providers.chat_chunks import WholeAnswer
from providers.codec import ChatCall, Upstream
from providers.events import Channel, ProviderFailure
from providers.gemini import GeminiCodec

SIGNED = {"google": {"thought_signature": "c2ln"}}


def codec(**call: Any) -> GeminiCodec:
    upstream = Upstream("g", "gemini", b"/v1beta", key="k")
    return GeminiCodec(upstream, ChatCall(**{"body": b"", "model": "m", "stream": False, "created": 17, **call}))


def body_of(*parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "candidates": [{"content": {"parts": list(parts), "role": "model"}, "finishReason": "STOP", "index": 0}],
        "usageMetadata": {"promptTokenCount": 4, "candidatesTokenCount": 2, "thoughtsTokenCount": 3},
        "modelVersion": "gemini-t",
        "responseId": "resp-1",
        **more,
    }


def answer_of(body: dict[str, Any], **call: Any) -> WholeAnswer:
    answer = codec(**call).answer(json.dumps(body).encode())
    assert isinstance(answer, WholeAnswer), answer
    return answer


def read(body: dict[str, Any], **call: Any) -> dict[str, Any]:
    root: dict[str, Any] = json.loads(answer_of(body, **call).root.body)
    return root


def message_of(body: dict[str, Any]) -> dict[str, Any]:
    message: dict[str, Any] = read(body)["choices"][0]["message"]
    return message


def failure_of(body: bytes) -> ProviderFailure:
    failure = codec().answer(body)
    assert isinstance(failure, ProviderFailure)
    return failure


def test_a_whole_answer_is_openais() -> None:
    body = body_of({"text": "I ", "thought": True}, {"text": "Hi"}, {"text": " you", "thoughtSignature": "c2ln"})
    told = read(body)
    assert (told["id"], told["object"], told["created"], told["model"]) == ("resp-1", "chat.completion", 17, "gemini-t")
    assert told["choices"] == [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": "Hi you",
                "refusal": None,
                "reasoning_content": "I ",
                "extra_content": SIGNED,
            },
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert (told["usage"]["prompt_tokens"], told["usage"]["completion_tokens"], told["usage"]["total_tokens"]) == (
        4,
        5,
        9,
    )
    assert told["usage"]["completion_tokens_details"]["reasoning_tokens"] == 3


@pytest.mark.parametrize(
    ("details", "drawn"),
    [([{"modality": "IMAGE", "tokenCount": 1290}, {"modality": "TEXT", "tokenCount": 5}], 1290),
     ([{"modality": "IMAGE", "tokenCount": 9999}], 1295), ([{"modality": "IMAGE", "tokenCount": -1}], 0), (None, 0),
     ([{"modality": "AUDIO", "tokenCount": 95}, {"modality": "IMAGE", "tokenCount": 1290}], 1200)],
)  # fmt: skip
def test_tokens_of_images_are_a_class_of_the_output(details: Any, drawn: int) -> None:
    counts = {"promptTokenCount": 3, "candidatesTokenCount": 1295, "candidatesTokensDetails": details}
    usage = answer_of(body_of({"text": "a"}, usageMetadata=counts)).usage
    assert usage is not None
    assert (usage.output, usage.image_output, usage.partial) == (1295, drawn, False)
    told = json.loads(usage.raw)["completion_tokens_details"]
    assert told.get("image_tokens", 0) == drawn


def test_its_texts_and_usage_are_for_the_meter() -> None:
    answer = answer_of(body_of({"text": "a", "thought": True}, {"text": "b"}))
    assert answer.usage is not None
    assert (answer.usage.prompt, answer.usage.output, answer.usage.reasoning) == (4, 5, 3)
    assert answer.texts() == [(0, int(Channel.CONTENT), 0, "b"), (0, int(Channel.REASONING), 0, "a")]


def test_calls_have_ids_signatures_and_no_content() -> None:
    call = {"functionCall": {"name": "f", "args": {"a": 1}}, "thoughtSignature": "c2ln"}
    told = read(body_of(call, {"functionCall": {"name": "g", "id": "g1"}}))
    message = told["choices"][0]["message"]
    first, second = message["tool_calls"]
    assert message["content"] is None
    assert first["extra_content"] == SIGNED
    assert json.loads(first["function"]["arguments"]) == {"a": 1}
    assert second == {"id": "g1", "type": "function", "function": {"name": "g", "arguments": "{}"}}
    assert first["id"].startswith("call_")
    assert told["choices"][0]["finish_reason"] == "tool_calls"


def test_other_parts_images_and_sources_are_kept() -> None:
    code = {"executableCode": {"language": "PYTHON", "code": "1"}}
    body = body_of(code, {"text": "x"}, {"inlineData": {"mimeType": "image/png", "data": "AA=="}})
    body["candidates"][0]["groundingMetadata"] = {"groundingChunks": [{"web": {"uri": "https://a", "title": "A"}}]}
    message = message_of(body)
    assert message["extra_content"]["google"]["parts"] == [code]
    assert message["images"][0]["image_url"]["url"] == "data:image/png;base64,AA=="
    assert message["annotations"] == [{"type": "url_citation", "url_citation": {"url": "https://a", "title": "A"}}]


def test_sound_is_no_image_and_not_lost() -> None:
    part = {"inlineData": {"mimeType": "audio/L16", "data": "AA=="}}
    assert message_of(body_of(part))["extra_content"]["google"]["parts"] == [part]


def test_a_great_many_parts_of_another_kind_are_read_in_one_pass() -> None:
    started = time.process_time()
    body = body_of(*[{"toolCall": at} for at in range(20_000)])
    assert len(message_of(body)["extra_content"]["google"]["parts"]) == 20_000
    assert time.process_time() - started < 5  # a pass for each takes a minute


def test_candidates_are_choices_in_their_order() -> None:
    parts = [
        {"content": {"parts": [{"text": text}]}, "finishReason": "STOP", "index": i} for i, text in ((1, "b"), (0, "a"))
    ]
    told = read(body_of(candidates=parts))
    assert [(each["index"], each["message"]["content"]) for each in told["choices"]] == [(0, "a"), (1, "b")]


def test_a_renamed_model_shows() -> None:
    assert read(body_of({"text": "a"}), rename_to="public")["model"] == "public"


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({}, None),
        ({"promptTokenCount": 4}, None),
        ({"promptTokenCount": 4, "candidatesTokenCount": 1, "toolUsePromptTokenCount": 5}, (9, 1)),
        ({"promptTokenCount": "4", "candidatesTokenCount": 1}, (-1, 1)),
    ],
)
def test_usage_that_does_not_cover_the_text_is_none(usage: dict[str, Any], expected: tuple[int, int] | None) -> None:
    found = answer_of(body_of({"text": "a"}, usageMetadata=usage)).usage
    assert (None if found is None else (found.prompt, found.output)) == expected


def test_an_answer_of_nothing_but_thinking_is_charged_for_it() -> None:
    body = body_of(usageMetadata={"promptTokenCount": 4, "thoughtsTokenCount": 60})
    body["candidates"] = [{"content": {"role": "model"}, "finishReason": "MAX_TOKENS"}]
    answer = answer_of(body)
    assert answer.usage is not None
    assert (answer.usage.prompt, answer.usage.output) == (4, 60)
    assert json.loads(answer.root.body)["choices"][0]["message"]["content"] == ""


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[]", b"5", b"{}", b'{"candidates":[]}', b'{"candidates":5}', b"\xff"]
)
def test_what_is_no_answer_is_garbage(body: bytes) -> None:
    assert failure_of(body).kind == "garbage"


def test_a_blocked_prompt_an_error_and_a_broken_answer_in_a_200_are_failures() -> None:
    blocked = failure_of(b'{"promptFeedback":{"blockReason":"SAFETY","blockReasonMessage":"no"}}')
    assert (blocked.kind, blocked.status) == ("content_policy", 400)
    assert failure_of(b'[{"error":{"code":503,"status":"UNAVAILABLE"}}]').kind == "overloaded"
    broken = json.dumps({"candidates": [{"finishReason": "MALFORMED_FUNCTION_CALL"}]})
    assert failure_of(broken.encode()).kind == "server"


def error(code: int, status: str, message: str, *details: dict[str, Any]) -> bytes:
    return json.dumps({"error": {"code": code, "message": message, "status": status, "details": details}}).encode()


RETRY = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "36.4s"}
BAD_KEY = {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}
TOO_LONG = "The input token count (1200293) exceeds the maximum number of tokens allowed (1048576)."
TOO_LONG_VERTEX = (
    "Unable to submit request because the input token count is 1052630 but model only supports up to 1048576."
)


@pytest.mark.parametrize(
    ("status", "body", "kind", "code"),
    [
        (400, error(400, "INVALID_ARGUMENT", "bad"), "caller", None),
        (400, error(400, "INVALID_ARGUMENT", "Bad.", BAD_KEY), "key_refused", None),
        (400, error(400, "INVALID_ARGUMENT", "API key expired. Please renew the API key."), "key_refused", None),
        (
            400,
            error(400, "FAILED_PRECONDITION", "User location is not supported for the API use."),
            "key_refused",
            None,
        ),
        (400, error(400, "INVALID_ARGUMENT", TOO_LONG), "context_length", "context_length_exceeded"),
        (400, error(400, "INVALID_ARGUMENT", TOO_LONG_VERTEX), "context_length", "context_length_exceeded"),
        (400, error(400, "INVALID_ARGUMENT", "Unknown name \"API key not valid\" at 'tools[0]'"), "caller", None),
        (401, error(401, "UNAUTHENTICATED", "x"), "key_refused", None),
        (403, error(403, "PERMISSION_DENIED", "x"), "key_refused", None),
        (
            403,
            error(403, "PERMISSION_DENIED", "You do not have permission to access the File x or it may not exist."),
            "caller",
            None,
        ),
        (404, error(404, "NOT_FOUND", "models/x is not found"), "caller", None),
        (408, b"", "server", None),
        (429, error(429, "RESOURCE_EXHAUSTED", "project 1"), "rate_limited", "rate_limit_exceeded"),
        (499, error(499, "CANCELLED", "x"), "server", None),
        (500, error(500, "INTERNAL", "x"), "server", None),
        (503, error(503, "UNAVAILABLE", "x"), "overloaded", None),
        (504, error(504, "DEADLINE_EXCEEDED", "x"), "server", None),
    ],
)
def test_statuses_mean_what_they_mean(status: int, body: bytes, kind: str, code: str | None) -> None:
    failure = codec().failure(status, [], body)
    assert (failure.kind, failure.status, failure.code) == (kind, status, code)


@pytest.mark.parametrize("status", [429, 499, 500, 503])
def test_texts_of_faults_that_are_not_the_callers_stay_here(status: int) -> None:
    assert "secret" not in codec().failure(status, [], error(status, "X", "secret")).message


def test_the_callers_own_fault_is_told() -> None:
    assert codec().failure(400, [], error(400, "INVALID_ARGUMENT", "bad field")).message == "bad field"


@pytest.mark.parametrize(
    ("details", "headers", "expected"),
    [
        ([RETRY], [], 36.4),
        ([BAD_KEY, RETRY], [(b"retry-after", b"5")], 36.4),
        ([], [(b"retry-after", b"5")], 5.0),
        ([], [(b"retry-after", b"soon")], None),
        ([{"retryDelay": "-1s"}], [], None),
        ([{"retryDelay": "99999999s"}], [], None),
        ([{"retryDelay": 5}], [], None),
        ([], [], None),
    ],
)
def test_how_long_to_wait_comes_from_the_body_or_the_header(
    details: list[dict[str, Any]], headers: list[tuple[bytes, bytes]], expected: float | None
) -> None:
    failure = codec().failure(429, headers, error(429, "RESOURCE_EXHAUSTED", "x", *details))
    assert failure.retry_after_s == expected


@pytest.mark.parametrize("body", [b"", b"<html>", b"[1]", b'{"error":"x"}', b'{"error":{"message":5}}', b"\xff", b"[]"])
def test_an_error_body_of_any_shape_is_read(body: bytes) -> None:
    failure = codec().failure(400, [], body)
    assert failure.kind == "caller"
    assert failure.message
