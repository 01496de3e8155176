"""Reading OpenAI-shaped errors, from a status or from inside a stream.

Must not: decide what to do about one (the relay and routing do).
"""

from __future__ import annotations

from typing import Any

import msgspec

from providers.events import FailureKind, ProviderFailure

MESSAGE_CHARS_MAX = 2_000
_OUR_FAULT = {"invalid_api_key", "authentication_error", "insufficient_quota"}
"""Our key or our account at the provider is at fault. A caller would read it as its own, which it has here too."""
CONTEXT_LENGTH = frozenset(("context_length_exceeded",))
CONTENT_POLICY = frozenset(("content_filter", "content_policy_violation"))
"""Codes of refusals that are the caller's, but that another model may not share."""
UNTOLD = "The provider reported an error."
_decode = msgspec.json.Decoder().decode


def failure_from_status(status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> ProviderFailure:
    """A provider's answer with a status other than 2xx."""
    failure = failure_from_body(body)
    _judge(failure, status)
    failure.retry_after_s = _retry_after_s(headers)
    return failure


def failure_from_frame(payload: bytes) -> ProviderFailure:
    """An in-band error: `{"error": {...}}`, a bare error object, or a chunk whose finish_reason is "error"."""
    failure = failure_from_body(payload)
    _judge(failure, _status_in(payload) or 502)
    return failure


def _judge(failure: ProviderFailure, status: int) -> None:
    """Set status and kind. Texts of faults that are not the caller's stay here: inference servers put file paths and
    the refused input (a prompt) into the text of a 500, and a refused key is quoted."""
    failure.status = status
    failure.kind = _kind(status)
    if failure.kind == "caller" and failure.code in CONTEXT_LENGTH:
        failure.kind = "context_length"
    elif failure.kind == "caller" and failure.code in CONTENT_POLICY:
        failure.kind = "content_policy"
    if _OUR_FAULT & {failure.type, failure.code}:
        failure.kind = "key_refused"  # also a 401 that came too late for a status
    if status >= 500:
        failure.message, failure.param = f"The provider reported an error (status {status}).", None


def failure_from_body(body: bytes) -> ProviderFailure:
    """The four fields as far as the body has them; a body that is no JSON yields a plain message."""
    fields = _error_object(body)
    message = fields.get("message")
    return ProviderFailure(
        kind="server",
        status=502,
        message=message[:MESSAGE_CHARS_MAX] if isinstance(message, str) and message else UNTOLD,
        type=_word(fields.get("type")),
        code=_word(fields.get("code")),
        param=_word(fields.get("param")),
    )


def _error_object(body: bytes) -> dict[str, Any]:
    try:
        value = _decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    if not isinstance(value, dict):
        return {}
    error = value.get("error", value.get("detail"))
    if isinstance(error, str):
        return {"message": error}
    return error if isinstance(error, dict) else value


def _status_in(payload: bytes) -> int | None:
    """The HTTP status some providers put into an in-band error (`code: 429`, `status_code: 503`)."""
    fields = _error_object(payload)
    for name in ("status_code", "status", "code"):
        value = fields.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and 400 <= value <= 599:
            return value
    return None


def _kind(status: int) -> FailureKind:
    if status in (401, 402, 403):
        return "key_refused"
    if status == 429:
        return "rate_limited"
    if status in (503, 529):
        return "overloaded"
    return "caller" if 400 <= status < 500 and status != 408 else "server"


def _retry_after_s(headers: list[tuple[bytes, bytes]]) -> float | None:
    for name, value in headers:
        if name in (b"retry-after", b"retry-after-ms"):
            try:
                seconds = float(value)
            except ValueError:
                return None
            seconds = seconds / 1000 if name.endswith(b"-ms") else seconds
            return seconds if 0 <= seconds <= 86_400 else None
    return None


def _word(value: object) -> str | None:
    """OpenRouter's codes are integers; clients expect text."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return None
    return str(value)[:200]
