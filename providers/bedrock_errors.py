"""Bedrock's errors: an HTTP status with `x-amzn-errortype`, or an exception or error message inside an event stream.

Must not: decide what to do about one (the relay and routing do). Texts that name our account, our key or AWS's inside
stay here. Source: Amazon Bedrock API reference, Converse and ConverseStream, "Errors", and "common errors"; Smithy,
Amazon Event Stream specification, "modeled and unmodeled errors".
"""

from __future__ import annotations

import re
from typing import Any

from providers.events import FailureKind, ProviderFailure
from providers.failures import (
    decoded,
    hidden,
    kind_of,
    message_in,
    rate_limited,
    retry_after_s,
    too_long,
    word,
)

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
"""By the exception's name in lower case."""
_SERVERS = {408: 504, 424: 502}
"""What AWS answers with these is no fault of the caller's, who is told another status."""
_MESSAGES = ("message", "Message", "originalMessage")

_TOO_LONG = re.compile(
    r"(?:input|prompt) is too long|too many input tokens|maximum context length|context (?:window|length|limit)"
    r"|input (?:length|tokens?)\b.{0,80}\bexceed",
    re.IGNORECASE,
)
"""What models say through a ValidationException about a prompt that is too long; it has no name of its own."""
_POLICY = re.compile(r"content[ _-](?:filter|polic)|filtering policy", re.IGNORECASE)


def failure_from_status(status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> ProviderFailure:
    """A provider's answer with a status other than 2xx."""
    fields = _fields(body)
    name = _header(headers, b"x-amzn-errortype") or word(fields.get("__type")) or word(fields.get("code")) or ""
    failure = _failure(name, fields, status)
    failure.retry_after_s = retry_after_s(headers)
    return failure


def failure_from_exception(name: str, payload: bytes) -> ProviderFailure:
    """An exception inside a stream (`:exception-type` and a JSON payload)."""
    return _failure(name, _fields(payload), 502)


def failure_from_error(code: str, message: str) -> ProviderFailure:
    """An error inside a stream that the API does not name (`:error-code` and `:error-message`)."""
    return _failure(code, {"message": message}, 502)


def _failure(name: str, fields: dict[str, Any], status: int) -> ProviderFailure:
    """`name` as it is sent: `ValidationException:http://...`, `com.amazon.coral#ValidationException`."""
    plain = name.partition(":")[0].rpartition("#")[2].strip().lower()
    kind, status = _KINDS.get(plain) or (kind_of(status, tuple(_SERVERS)), _SERVERS.get(status, status))
    failure = ProviderFailure(kind, status, message_in(fields, *_MESSAGES))
    if kind == "caller":
        _caller(failure)
    elif kind == "rate_limited":  # its text may name our account's quota
        failure.type = "rate_limit_error"
        rate_limited(failure)
    else:
        failure.message, failure.type = hidden(status), "server_error"
    return failure


def _caller(failure: ProviderFailure) -> None:
    failure.type = "invalid_request_error"
    if failure.status == 404:
        failure.code = "model_not_found"
    if failure.status == 400 and _TOO_LONG.search(failure.message):
        too_long(failure)
    elif failure.status == 400 and _POLICY.search(failure.message):
        failure.kind, failure.code, failure.param = "content_policy", "content_policy_violation", "messages"


def _fields(body: bytes) -> dict[str, Any]:
    value = decoded(body)
    return value if isinstance(value, dict) else {}


def _header(headers: list[tuple[bytes, bytes]], name: bytes) -> str | None:
    return next((value.decode("latin-1") for each, value in headers if each.lower() == name), None)
