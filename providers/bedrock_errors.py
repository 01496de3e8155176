"""Bedrock's errors: an HTTP status with `x-amzn-errortype`, or an exception or error message inside an event stream.

Must not: decide what to do about one (the relay and routing do). Texts that name our account, our key or AWS's inside
stay here. Source: Amazon Bedrock API reference, Converse and ConverseStream, "Errors", and "common errors"; Smithy,
Amazon Event Stream specification, "modeled and unmodeled errors".
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from providers.events import FailureKind, ProviderFailure

MESSAGE_CHARS_MAX = 2_000
RETRY_S_MAX = 86_400.0
_UNTOLD = "The provider reported an error."

_KINDS: dict[str, tuple[FailureKind, int]] = {
    "validationexception": ("caller", 400),
    "resourcenotfoundexception": ("caller", 404),
    "conflictexception": ("caller", 409),
    "throttlingexception": ("rate_limited", 429),
    "throttledexception": ("rate_limited", 429),
    "toomanyrequestsexception": ("rate_limited", 429),
    "servicequotaexceededexception": ("rate_limited", 429),
    "modelnotreadyexception": ("overloaded", 503),
    "serviceunavailableexception": ("overloaded", 503),
    "modelerrorexception": ("server", 502),
    "modelstreamerrorexception": ("server", 502),
    "internalserverexception": ("server", 500),
    "internalfailure": ("server", 500),
    "modeltimeoutexception": ("server", 504),
    "accessdeniedexception": ("key_refused", 403),
    "unrecognizedclientexception": ("key_refused", 403),
    "missingauthenticationtokenexception": ("key_refused", 403),
    "incompletesignatureexception": ("key_refused", 403),
    "invalidsignatureexception": ("key_refused", 403),
    "expiredtokenexception": ("key_refused", 403),
    "expiredtoken": ("key_refused", 403),
    "invalidclienttokenid": ("key_refused", 403),
    "optinrequired": ("key_refused", 403),
}
"""By the exception's name in lower case. What AWS answers with 408 and 424 is no fault of the caller's: 504 and 502."""

_TOO_LONG = re.compile(
    r"(?:input|prompt) is too long|too many input tokens|maximum context length|context (?:window|length|limit)"
    r"|input (?:length|tokens?)\b.{0,80}\bexceed",
    re.IGNORECASE,
)
"""What models say through a ValidationException about a prompt that is too long; it has no name of its own."""
_POLICY = re.compile(r"content[ _-](?:filter|polic)|filtering policy", re.IGNORECASE)
_decode = msgspec.json.Decoder().decode


def failure_from_status(status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> ProviderFailure:
    """A provider's answer with a status other than 2xx."""
    fields = _fields(body)
    name = _header(headers, b"x-amzn-errortype") or _word(fields.get("__type")) or _word(fields.get("code")) or ""
    failure = _failure(name, _message(fields), status)
    failure.retry_after_s = _retry_s(_header(headers, b"retry-after"))
    return failure


def failure_from_exception(name: str, payload: bytes) -> ProviderFailure:
    """An exception inside a stream (`:exception-type` and a JSON payload)."""
    return _failure(name, _message(_fields(payload)), 502)


def failure_from_error(code: str, message: str) -> ProviderFailure:
    """An error inside a stream that the API does not name (`:error-code` and `:error-message`)."""
    return _failure(code, message[:MESSAGE_CHARS_MAX], 502)


def failed_stop(reason: str) -> ProviderFailure:
    """A stop reason that says that the model's output cannot be used: a retry often helps."""
    return ProviderFailure("server", 502, f"The model did not complete its answer ({reason[:100]}).", "server_error")


def garbage(message: str) -> ProviderFailure:
    """What cannot be read."""
    return ProviderFailure("garbage", 502, message)


def truncated(message: str) -> ProviderFailure:
    """A stream that ended too early."""
    return ProviderFailure("truncated", 502, message)


def _failure(name: str, message: str, status: int) -> ProviderFailure:
    """`name` as it is sent: `ValidationException:http://...`, `com.amazon.coral#ValidationException`."""
    plain = name.partition(":")[0].rpartition("#")[2].strip().lower()
    kind, status = _KINDS.get(plain) or (_kind(status), _status(status))
    failure = ProviderFailure(kind, status, message or _UNTOLD)
    if kind == "caller":
        _caller(failure)
    elif kind == "rate_limited":  # its text may name our account's quota
        failure.message = "The provider's rate limit is reached."
        failure.type, failure.code = "rate_limit_error", "rate_limit_exceeded"
    else:
        failure.message, failure.type = f"The provider reported an error (status {status}).", "server_error"
    return failure


def _caller(failure: ProviderFailure) -> None:
    failure.type = "invalid_request_error"
    if failure.status == 404:
        failure.code = "model_not_found"
    if failure.status == 400 and _TOO_LONG.search(failure.message):
        failure.kind, failure.code, failure.param = "context_length", "context_length_exceeded", "messages"
    elif failure.status == 400 and _POLICY.search(failure.message):
        failure.kind, failure.code, failure.param = "content_policy", "content_policy_violation", "messages"


def _kind(status: int) -> FailureKind:
    if status in (401, 402, 403):
        return "key_refused"
    if status == 429:
        return "rate_limited"
    if status in (503, 529):
        return "overloaded"
    return "caller" if 400 <= status < 500 and status not in (408, 424) else "server"


def _status(status: int) -> int:
    return {408: 504, 424: 502}.get(status, status)


def _fields(body: bytes) -> dict[str, Any]:
    try:
        value = _decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _message(fields: dict[str, Any]) -> str:
    for name in ("message", "Message", "originalMessage"):
        value = fields.get(name)
        if isinstance(value, str) and value:
            return value[:MESSAGE_CHARS_MAX]
    return ""


def _header(headers: list[tuple[bytes, bytes]], name: bytes) -> str | None:
    return next((value.decode("latin-1") for each, value in headers if each.lower() == name), None)


def _retry_s(value: str | None) -> float | None:
    try:
        seconds = float(value or "")
    except ValueError:
        return None
    return seconds if 0 <= seconds <= RETRY_S_MAX else None


def _word(value: object) -> str | None:
    return value[:200] if isinstance(value, str) else None
