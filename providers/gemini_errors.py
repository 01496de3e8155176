"""Google's errors: `{"error": {"code", "message", "status", "details"}}`, from a status or from inside a stream.

Must not: decide what to do about one (the relay and routing do). Texts that name our project, our key or Google's
inside stay here. Source: ai.google.dev/gemini-api/docs/troubleshooting, google.rpc.Code, google.rpc.ErrorInfo,
google.rpc.RetryInfo.
"""

from __future__ import annotations

import re
from typing import Any

from providers.events import ProviderFailure
from providers.failures import (
    MESSAGE_CHARS_MAX,
    decoded,
    hidden,
    kind_of,
    message_in,
    rate_limited,
    retry_after_s,
    too_long,
    unfinished,
    within,
    word,
)

CONTENT_POLICY_CODE = "content_policy_violation"
_STATUSES = {
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "OUT_OF_RANGE": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "ABORTED": 409,
    "RESOURCE_EXHAUSTED": 429,
    "CANCELLED": 499,
    "INTERNAL": 500,
    "DATA_LOSS": 500,
    "UNKNOWN": 500,
    "UNIMPLEMENTED": 501,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
"""google.rpc.Code's own mapping to HTTP, for errors inside a stream that name a status and no number."""
_SERVERS = (408, 499)
"""No fault of the caller's: 499 is CANCELLED, and it was not us."""
_KEY_REASONS = ("API_KEY_", "ACCESS_TOKEN_", "CREDENTIALS_MISSING", "BILLING_DISABLED", "SERVICE_DISABLED")
_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)s")
_KEY_TEXT = re.compile(r"api key (?:not (?:valid|found)|expired)|user location is not supported", re.IGNORECASE)
"""How a text about our key begins. Further on it may quote a request: nobody may have the key taken for refused."""
_FILE_TEXT = re.compile(r"you do not have permission to access the file\b", re.IGNORECASE)
"""Google's 403 to the name of a file that does not exist."""
_TOO_LONG = re.compile(
    r"token count .{0,60}exceeds the maximum number of tokens|token count is .{0,60}only supports"
    r"|exceeds the (?:model's |maximum )?context (?:window|length)",
    re.IGNORECASE,
)
"""What Google says of a prompt that is too long; it has no reason or status of its own (a plain INVALID_ARGUMENT)."""


def failure_from_status(status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> ProviderFailure:
    """A provider's answer with a status other than 2xx. RetryInfo in the body wins over the `retry-after` header."""
    failure = _failure(error_in(body) or {}, status)
    if failure.retry_after_s is None:
        failure.retry_after_s = retry_after_s(headers)
    return failure


def failure_from_error(error: dict[str, Any]) -> ProviderFailure:
    """An error inside a stream or inside a 200. Its `code` is the HTTP status; else `status` names it."""
    code = error.get("code")
    if not isinstance(code, int) or isinstance(code, bool) or not 400 <= code <= 599:
        code = _STATUSES.get(str(error.get("status")), 502)
    return _failure(error, code)


def blocked_prompt(reason: str, message: str | None) -> ProviderFailure:
    """`promptFeedback.blockReason`: the prompt was refused and nothing was generated."""
    text = f"The provider blocked the prompt ({reason[:100]})."
    if message:
        text = f"{text} {message[:MESSAGE_CHARS_MAX]}"
    return ProviderFailure("content_policy", 400, text, "invalid_request_error", CONTENT_POLICY_CODE, "messages")


def failed_finish(reason: str) -> ProviderFailure:
    """A finish reason that says that the model broke off with something that cannot be used (a malformed function
    call, too many tool calls): a retry often helps. A missing thought signature is the request's fault."""
    if reason == "MISSING_THOUGHT_SIGNATURE":
        text = "The provider misses the thought signature of a tool call (extra_content.google.thought_signature)."
        return ProviderFailure("caller", 400, text, "invalid_request_error", "invalid_value", "messages")
    return unfinished(reason)


def error_in(body: bytes) -> dict[str, Any] | None:
    """The error object in a body: in an object, or in the first object of an array (as without `alt=sse`)."""
    value = decoded(body)
    if isinstance(value, list):
        value = next((each for each in value if isinstance(each, dict)), None)
    return error_of(value.get("error")) if isinstance(value, dict) else None


def error_of(error: Any) -> dict[str, Any] | None:
    """An `error` member of whatever type as an object; None when there is none."""
    if error is None:
        return None
    return error if isinstance(error, dict) else {"message": str(error)[:MESSAGE_CHARS_MAX]}


def _failure(error: dict[str, Any], status: int) -> ProviderFailure:
    text, details = message_in(error, "message"), _details(error)
    kind = kind_of(status, _SERVERS)
    failure = ProviderFailure(kind, status, text, word(error.get("status")), retry_after_s=_retry_s(details))
    if status == 400 and (_key_reason(details) or _KEY_TEXT.match(text)):
        failure.kind = "key_refused"  # Google answers 400 to a bad key
    elif status == 403 and _FILE_TEXT.match(text):
        failure.kind = "caller"
    elif status == 400 and _TOO_LONG.search(text):
        too_long(failure)
    elif status == 429:  # its text names our project and our plan
        rate_limited(failure)
    elif status >= 500 or failure.kind == "server":
        failure.message = hidden(status)
    return failure


def _details(error: dict[str, Any]) -> list[dict[str, Any]]:
    details = error.get("details")
    return [each for each in details if isinstance(each, dict)] if isinstance(details, list) else []


def _key_reason(details: list[dict[str, Any]]) -> bool:
    return any(str(each.get("reason")).startswith(_KEY_REASONS) for each in details)


def _retry_s(details: list[dict[str, Any]]) -> float | None:
    """`google.rpc.RetryInfo.retryDelay`, a protobuf duration such as `36.4s`, in seconds."""
    for each in details:
        delay = each.get("retryDelay")
        found = _DURATION.fullmatch(delay) if isinstance(delay, str) else None
        if found is not None:
            return within(float(found[1]))
    return None
