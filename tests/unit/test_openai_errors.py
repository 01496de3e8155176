"""OpenAI-shaped refusals that are the caller's, but that another model may not share."""

from __future__ import annotations

import json
from typing import Any

import pytest

from providers.openai_errors import failure_from_frame, failure_from_status


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "context_length_exceeded", "context_length"),
        (400, "content_filter", "content_policy"),
        (400, "content_policy_violation", "content_policy"),
        (400, "invalid_value", "caller"),
        (503, "content_filter", "overloaded"),
        (401, "context_length_exceeded", "key_refused"),
    ],
)
def test_a_refusal_is_told_by_its_code(status: int, code: str, kind: str) -> None:
    body = json.dumps({"error": {"message": "m", "type": "invalid_request_error", "code": code}}).encode()
    failure = failure_from_status(status, [], body)
    assert (failure.kind, failure.status, failure.code) == (kind, status, code)


@pytest.mark.parametrize(
    ("status", "error", "kind", "told"),
    [
        (402, "This request requires more credits, or fewer max_tokens. You can afford 9.", "rate_limited", 429),
        (402, "Insufficient credits.", "key_refused", 402),
        (403, "Content violates usage guidelines. Team: t-7, API key ID: k-7", "content_policy", 403),
        (403, "You are not allowed to request logprobs from this model", "caller", 403),
        (403, "You are not allowed to sample from this model", "key_refused", 403),
        (403, {"message": "Flagged.", "metadata": {"reasons": ["x"]}}, "content_policy", 403),
        (403, {"message": "No access to it.", "code": "model_not_found"}, "key_refused", 403),
    ],
)
def test_what_a_caller_can_bring_about_is_no_refusal_of_our_key(status: int, error: Any, kind: str, told: int) -> None:
    fields = error if isinstance(error, dict) else {"message": error}
    inside = json.dumps({"error": {"code": status, **fields}}).encode()
    for failure in (failure_from_status(status, [], json.dumps({"error": error}).encode()), failure_from_frame(inside)):
        if failure.code != "model_not_found":  # inside a stream it says no status then
            assert (failure.kind, failure.status) == (kind, told)
        assert "k-7" not in failure.message
        assert "9" not in failure.message
