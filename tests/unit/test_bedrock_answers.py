"""Whole answers and errors of Bedrock, and bytes that are neither."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from providers.chat_chunks import WholeAnswer
from providers.events import Channel, Chunk, Completed, Event, Failed, ProviderFailure, UsageSeen
from tests.support.codecs import payloads
from tests.support.eventstream import event, wire
from tests.unit.test_bedrock_codec import NAMES, codec, replay

ANSWER: dict[str, Any] = {
    "output": {
        "message": {
            "role": "assistant",
            "content": [
                {"reasoningContent": {"reasoningText": {"text": "Hm.", "signature": "c2ln"}}},
                {"reasoningContent": {"redactedContent": "RW5jcnlwdGVk"}},
                {"text": "See "},
                {
                    "citationsContent": {
                        "content": [{"text": "here"}],
                        "citations": [{"title": "T", "location": {"web": {"url": "https://example.org"}}}],
                    }
                },
                {"toolUse": {"toolUseId": "tooluse_a", "name": "look", "input": {"q": "é"}}},
                {"toolUse": {"toolUseId": "s", "name": "x", "input": {}, "type": "server_tool_use"}},
                {"newBlock": {"a": 1}},
            ],
        }
    },
    "stopReason": "tool_use",
    "usage": {"inputTokens": 5, "outputTokens": 6, "totalTokens": 21, "cacheReadInputTokens": 10},
    "metrics": {"latencyMs": 3},
}


def test_a_whole_answer_is_openais() -> None:
    found = codec(stream=False, rename_to="fast").answer(json.dumps(ANSWER).encode())
    assert isinstance(found, WholeAnswer)
    told = json.loads(found.root.body)
    (choice,) = told.pop("choices")
    assert (told["object"], told["model"], told["created"]) == ("chat.completion", "fast", 7)
    assert told["usage"]["prompt_tokens"] == 15
    assert choice["finish_reason"] == "tool_calls"
    arguments = choice["message"]["tool_calls"][0]["function"].pop("arguments")
    assert json.loads(arguments) == {"q": "é"}
    place = {"start_index": 4, "end_index": 8, "url": "https://example.org", "title": "T"}
    assert choice["message"] == {
        "role": "assistant",
        "content": "See here",
        "refusal": None,
        "reasoning_content": "Hm.",
        "tool_calls": [{"id": "tooluse_a", "type": "function", "function": {"name": "look"}}],
        "annotations": [{"index": 0, "type": "url_citation", "url_citation": place}],
        "thinking_blocks": [
            {"type": "thinking", "thinking": "Hm.", "signature": "c2ln"},
            {"type": "redacted_thinking", "data": "Encrypted"},
        ],
    }
    assert found.usage is not None
    assert (found.usage.prompt, found.usage.output, found.usage.cached) == (15, 6, 10)
    assert [(channel, text) for _, channel, _, text in found.texts()] == [
        (Channel.CONTENT, "See here"),
        (Channel.REASONING, "Hm."),
        (Channel.TOOL_NAME, "look"),
        (Channel.TOOL_ARGUMENTS, arguments),
    ]


def test_a_whole_answer_without_usage_is_left_to_be_counted() -> None:
    answer = {"output": {"message": {"content": [{"text": "Hi"}]}}, "stopReason": "end_turn"}
    found = codec(stream=False).answer(json.dumps(answer).encode())
    assert isinstance(found, WholeAnswer)
    assert found.usage is None
    assert "usage" not in json.loads(found.root.body)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", "garbage"),
        (b"<html>", "garbage"),
        (b"[]", "garbage"),
        (b'{"Output":{"__type":"com.amazon.coral.service#UnknownOperationException"}}', "garbage"),
        (b'{"output":{"message":{"content":"text"}}}', "garbage"),
        (b'{"output":{"message":{"content":[]}},"stopReason":"malformed_model_output"}', "server"),
    ],
)
def test_answers_that_are_none_say_so(body: bytes, kind: str) -> None:
    found = codec(stream=False).answer(body)
    assert isinstance(found, ProviderFailure)
    assert found.kind == kind


TOO_LONG, POLICY = "context_length_exceeded", "content_policy_violation"


@pytest.mark.parametrize(
    ("status", "name", "message", "kind", "status_told", "code"),
    [
        (400, "ValidationException", "messages.0 is blank", "caller", 400, None),
        (400, "ValidationException", "Input is too long for requested model.", "context_length", 400, TOO_LONG),
        (400, "ValidationException", "prompt is too long: 9 tokens > 8 maximum", "context_length", 400, TOO_LONG),
        (400, "ValidationException", "Output blocked by content filtering policy", "content_policy", 400, POLICY),
        (400, "ServiceQuotaExceededException", "account 123456789012", "rate_limited", 429, "rate_limit_exceeded"),
        (403, "AccessDeniedException", "User: arn:aws:iam::1", "key_refused", 403, None),
        (403, "UnrecognizedClientException", "security token invalid", "key_refused", 403, None),
        (403, "InvalidSignatureException", "Signature expired", "key_refused", 403, None),
        (403, "ExpiredTokenException", "expired", "key_refused", 403, None),
        (404, "ResourceNotFoundException", "no such context window", "caller", 404, "model_not_found"),
        (408, "ModelTimeoutException", "took too long", "server", 504, None),
        (424, "ModelErrorException", "the model broke", "server", 502, None),
        (429, "ThrottlingException", "Too many tokens, please wait", "rate_limited", 429, "rate_limit_exceeded"),
        (429, "ModelNotReadyException", "not ready", "overloaded", 503, None),
        (500, "InternalServerException", "host 10.0.0.1", "server", 500, None),
        (503, "ServiceUnavailableException", "busy", "overloaded", 503, None),
        (424, "", "", "server", 502, None),
        (418, "", "", "caller", 418, None),
        (401, "", "", "key_refused", 401, None),
        (502, "", "", "server", 502, None),
    ],
)
def test_a_status_means_what_its_exception_says(
    status: int, name: str, message: str, kind: str, status_told: int, code: str | None
) -> None:
    body = json.dumps({"message": message}).encode()
    headers = [(b"x-amzn-errortype", f"{name}:http://internal.amazon.com/".encode())] if name else []
    found = codec().failure(status, headers, body)
    assert (found.kind, found.status, found.code) == (kind, status_told, code)
    assert not any(secret in found.message for secret in ("123456789012", "10.0.0.1", "arn:aws"))
    typed = json.dumps({"__type": f"com.amazon.bedrock#{name}", "Message": message}).encode()
    assert codec().failure(status, [], typed) == found


def test_errors_of_any_shape_have_a_failure() -> None:
    for body in (b"", b"<html>", b"[]", b'{"message":5}', b"\xff"):
        found = codec().failure(400, [(b"retry-after", b"2")], body)
        assert (found.kind, found.status, found.retry_after_s) == ("caller", 400, 2.0)
    assert codec().failure(429, [(b"retry-after", b"soon")], b"").retry_after_s is None


WORDS = (
    "contentBlockIndex delta start text toolUse input name toolUseId type usage citation reasoningContent signature "
    "redactedContent stopReason inputTokens cacheDetails location web url output message content citationsContent "
    "citations reasoningText"
)
MEMBER = st.sampled_from(WORDS.split())
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(MEMBER, inner, max_size=4),
    max_leaves=8,
)
EVENTS = st.sampled_from(
    ["messageStart", "contentBlockStart", "contentBlockDelta", "contentBlockStop", "messageStop", "metadata", "other"]
)


def ends_well(events: list[Event]) -> bool:
    return all(isinstance(each, Chunk | UsageSeen) for each in events[:-1]) and isinstance(
        events[-1], Completed | Failed
    )


@settings(max_examples=150)
@given(st.lists(st.tuples(EVENTS, st.dictionaries(MEMBER, JUNK, max_size=4)), max_size=6))
def test_events_of_any_json_never_raise(sent: list[tuple[str, dict[str, Any]]]) -> None:
    raw = b"".join(event(name, json.dumps(payload).encode()) for name, payload in sent)
    events = replay([raw])
    assert ends_well(events)
    for payload in payloads(events):
        assert payload["object"] == "chat.completion.chunk"


@settings(max_examples=150)
@given(st.sampled_from(NAMES), st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=4), st.binary())
def test_changed_transcripts_never_raise(name: str, changes: list[tuple[int, int]], tail: bytes) -> None:
    raw = bytearray(wire(name))
    for at, value in changes:
        if raw:
            raw[at % len(raw)] = value
    assert ends_well(replay([bytes(raw), tail]))


@settings(max_examples=100)
@given(st.binary(max_size=300))
def test_any_bytes_never_raise(raw: bytes) -> None:
    assert ends_well(replay([raw]))
    assert isinstance(codec().answer(raw), ProviderFailure)
    assert codec().failure(500, [], raw).kind == "server"


@settings(max_examples=150)
@given(st.dictionaries(MEMBER, JUNK, max_size=4))
def test_answers_of_any_json_never_raise(answer: dict[str, Any]) -> None:
    codec().answer(json.dumps(answer).encode())
    codec().answer(json.dumps({"output": {"message": {"content": [answer]}}, "usage": answer}).encode())
