"""OpenAI-shaped refusals that are the caller's, but that another model may not share."""

from __future__ import annotations

import json

import pytest

from providers.openai_errors import failure_from_status


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
