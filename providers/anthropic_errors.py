"""Anthropic's errors: `{"type":"error","error":{"type","message"},"request_id"}`, from a status or inside a stream.

Must not: decide what to do about one (the relay and routing do). Texts about our account, our key or the provider's
inside stay here. Source: platform.claude.com/docs/en/api/errors.
"""

from __future__ import annotations

import re
from typing import Any

from providers.events import FailureKind, ProviderFailure
from providers.failures import decoded, hidden, kind_of, message_in, rate_limited, retry_after_s, too_long, word

_STATUSES = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "conflict_error": 409,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "gateway_timeout_error": 504,
    "overloaded_error": 503,
}
"""What an error inside a stream would have had for a status (529 is 503 to everybody but Anthropic)."""
_OUR_ACCOUNT = re.compile(
    r"(?![a-z_]+[.:]).{0,60}(?:credit balance|api usage limits|spend limit|purchase credits)", re.IGNORECASE
)
"""A plain invalid_request_error too, but about who pays. One about the request begins with a place in it, and may quote
it: nobody may have the key taken for refused."""
_TOO_LONG = re.compile(
    r"prompt is too long|input is too long|exceed(?:s|ed)? (?:the )?context (?:limit|window)", re.IGNORECASE
)
_FILTERED = re.compile(r"content filter(?:ing)? policy|violat\w+ .{0,40}usage policy", re.IGNORECASE)


def failure_from_status(status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> ProviderFailure:
    """A provider's answer with a status other than 2xx."""
    failure = _failure(_fields(decoded(body)), 503 if status == 529 else status)
    failure.retry_after_s = retry_after_s(headers)
    return failure


def failure_from_error(value: Any) -> ProviderFailure:
    """An error event of a stream, or an error object in a 200, as decoded."""
    fields = _fields(value)
    return _failure(fields, _STATUSES.get(str(fields.get("type")), 502))


def _fields(value: Any) -> dict[str, Any]:
    error = value.get("error", value) if isinstance(value, dict) else None
    if isinstance(error, str):
        return {"message": error}
    return error if isinstance(error, dict) else {}


def _failure(fields: dict[str, Any], status: int) -> ProviderFailure:
    message = message_in(fields, "message")
    kind = _kind(status, message)
    failure = ProviderFailure(kind, status, message, word(fields.get("type")))
    if kind == "context_length":
        too_long(failure)
    elif kind == "content_policy":
        failure.code, failure.type = "content_policy_violation", "invalid_request_error"
    elif kind == "rate_limited":  # the text names our organization and its limits
        rate_limited(failure)
    elif status == 404 and message.startswith("model:"):  # not a file, which the caller named
        failure.code, failure.type = "model_not_found", "invalid_request_error"
    elif status >= 500:
        failure.message = hidden(status)
        failure.type = "server_error"
    return failure


def _kind(status: int, message: str) -> FailureKind:
    if status == 400 and _OUR_ACCOUNT.match(message):
        return "key_refused"
    if status == 400 and _TOO_LONG.search(message):
        return "context_length"
    if status == 400 and _FILTERED.search(message):
        return "content_policy"
    return kind_of(status)
