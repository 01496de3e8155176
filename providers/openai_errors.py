"""Reading OpenAI-shaped errors, from a status or from inside a stream.

Must not: decide what to do about one (the relay and routing do).
"""

from __future__ import annotations

from typing import Any

from providers.events import ProviderFailure
from providers.failures import WORD_CHARS_MAX, decoded, hidden, kind_of, message_in, rate_limited, retry_after_s

_OUR_FAULT = {"invalid_api_key", "authentication_error", "insufficient_quota"}
"""Our key or our account at the provider is at fault. A caller would read it as its own, which it has here too."""
_NOT_ALLOWED = "You are not allowed to request "
"""OpenAI's 403 to a parameter that a model does not take (`logprobs`)."""
_FLAGGED = "Content violates usage guidelines"
"""xAI's 403 to a text."""
_FEWER = "or fewer max_tokens"
"""OpenRouter's 402 to a call that could cost more than the account has; one that asks for less would be answered."""
CONTEXT_LENGTH = frozenset(("context_length_exceeded",))
CONTENT_POLICY = frozenset(("content_filter", "content_policy_violation"))
"""Codes of refusals that are the caller's, but that another model may not share."""


def failure_from_status(status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> ProviderFailure:
    """A provider's answer with a status other than 2xx."""
    failure = failure_from_body(body)
    _judge(failure, status)
    _judge_forbidden(failure, _error_object(body))
    failure.retry_after_s = retry_after_s(headers)
    return failure


def _judge_forbidden(failure: ProviderFailure, fields: dict[str, Any]) -> None:
    """Not every 403 is about our key, and a caller must not be able to have the key taken for refused: OpenRouter and
    xAI flag prompts so, OpenAI refuses `logprobs` of its thinking models, and a firewall before a provider answers with
    a page of its own. Nor is every 402 final: OpenRouter lends the highest output that a call asks for."""
    if failure.status == 402 and _FEWER in failure.message:
        failure.kind, failure.status = "rate_limited", 429
        rate_limited(failure)
    if failure.status != 403 or failure.kind != "key_refused":
        return
    metadata = fields.get("metadata")
    if isinstance(metadata, dict) and ("reasons" in metadata or "flagged_input" in metadata):
        failure.kind, failure.code = "content_policy", failure.code or "content_policy_violation"
    elif failure.message.startswith(_FLAGGED):  # its text goes on with our team and key
        failure.kind, failure.code, failure.message = "content_policy", "content_policy_violation", f"{_FLAGGED}."
    elif failure.message.startswith(_NOT_ALLOWED):
        failure.kind = "caller"
    elif not fields:
        failure.kind, failure.status, failure.message = "server", 502, hidden(502)


def failure_from_frame(payload: bytes) -> ProviderFailure:
    """An in-band error: `{"error": {...}}`, a bare error object, or a chunk whose finish_reason is "error"."""
    failure = failure_from_body(payload)
    _judge(failure, _status_in(payload) or 502)
    _judge_forbidden(failure, _error_object(payload))
    return failure


def _judge(failure: ProviderFailure, status: int) -> None:
    """Set status and kind. Texts of faults that are not the caller's stay here: inference servers put file paths and
    the refused input (a prompt) into the text of a 500, and a refused key is quoted."""
    failure.status = status
    failure.kind = kind_of(status)
    if failure.kind == "caller" and failure.code in CONTEXT_LENGTH:
        failure.kind = "context_length"
    elif failure.kind == "caller" and failure.code in CONTENT_POLICY:
        failure.kind = "content_policy"
    if _OUR_FAULT & {failure.type, failure.code}:
        failure.kind = "key_refused"  # also a 401 that came too late for a status
    if status >= 500:
        failure.message, failure.param = hidden(status), None


def failure_from_body(body: bytes) -> ProviderFailure:
    """The four fields as far as the body has them; a body that is no JSON yields a plain message."""
    fields = _error_object(body)
    return ProviderFailure(
        kind="server",
        status=502,
        message=message_in(fields, "message"),
        type=_word(fields.get("type")),
        code=_word(fields.get("code")),
        param=_word(fields.get("param")),
    )


def _error_object(body: bytes) -> dict[str, Any]:
    value = decoded(body)
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


def _word(value: object) -> str | None:
    """OpenRouter's codes are integers; clients expect text."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return None
    return str(value)[:WORD_CHARS_MAX]
