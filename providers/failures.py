"""What the readers of providers' errors have in common: JSON bodies, statuses, texts, and when to come back.

Must not: know a wire, decide what to do about a failure, or read a clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import msgspec

from providers.events import FailureKind, ProviderFailure

MESSAGE_CHARS_MAX = 2_000
WORD_CHARS_MAX = 200
RETRY_S_MAX = 86_400.0
"""A provider that asks for a longer pause than a day is not believed."""
UNREADABLE = (msgspec.DecodeError, RecursionError, ValueError)
"""What decoding provider bytes raises (UnicodeDecodeError is a ValueError)."""
UNTOLD = "The provider reported an error."
_HTTP_DATE = "%a, %d %b %Y %H:%M:%S GMT"
_decode = msgspec.json.Decoder().decode


def garbage(message: str) -> ProviderFailure:
    """The provider sent what cannot be read."""
    return ProviderFailure("garbage", 502, message)


def truncated(message: str = "The provider's stream ended before it was complete.") -> ProviderFailure:
    """The stream ended too early."""
    return ProviderFailure("truncated", 502, message)


def unfinished(reason: str) -> ProviderFailure:
    """The model broke off with something that cannot be used, and gave this reason: a retry often helps."""
    return ProviderFailure("server", 502, f"The model did not complete its answer ({reason[:100]}).", "server_error")


def decoded(body: bytes) -> Any:
    """The body's JSON value; None where it is none."""
    try:
        return _decode(body)
    except UNREADABLE:
        return None


def message_in(fields: Mapping[str, Any], *names: str) -> str:
    """The first text under one of these names, as much of it as is told on."""
    texts = (value for name in names if isinstance(value := fields.get(name), str) and value)
    return next(texts, UNTOLD)[:MESSAGE_CHARS_MAX]


def word(value: object) -> str | None:
    """A type or a code, which are short texts."""
    return value[:WORD_CHARS_MAX] if isinstance(value, str) else None


def kind_of(status: int, servers: tuple[int, ...] = (408,)) -> FailureKind:
    """Whose fault a status is. `servers` are those below 500 that are no fault of the caller's."""
    if status in (401, 402, 403):
        return "key_refused"
    if status == 429:
        return "rate_limited"
    if status in (503, 529):
        return "overloaded"
    return "caller" if 400 <= status < 500 and status not in servers else "server"


def hidden(status: int) -> str:
    """What is told instead of a text about the provider's inside, or about our key or account there."""
    return f"The provider reported an error (status {status})."


def rate_limited(failure: ProviderFailure) -> None:
    """Say so in our words: the provider's name our account and its limits."""
    failure.message, failure.code = "The provider's rate limit is reached.", "rate_limit_exceeded"


def too_long(failure: ProviderFailure) -> None:
    """The prompt does not fit into the model's context, told as OpenAI does."""
    failure.kind, failure.code, failure.param = "context_length", "context_length_exceeded", "messages"
    failure.type = "invalid_request_error"


def retry_after_s(headers: list[tuple[bytes, bytes]]) -> float | None:
    """The pause that an answer's headers ask for, in seconds: `retry-after-ms`, else `retry-after` in seconds or as a
    date. Nobody here knows what time it is, so a date counts from the answer's own `date`, and says nothing without."""
    told = {name.lower(): value for name, value in reversed(headers)}
    ms = _number(told.get(b"retry-after-ms"))
    if ms is not None:
        return within(ms / 1000)
    after = told.get(b"retry-after")
    seconds = _number(after)
    if seconds is not None:
        return within(seconds)
    until, since = _date(after), _date(told.get(b"date"))
    return None if until is None or since is None else within((until - since).total_seconds())


def within(seconds: float) -> float | None:
    """None for what is no pause, or too long a one."""
    return seconds if 0 <= seconds <= RETRY_S_MAX else None


def _number(value: bytes | None) -> float | None:
    try:
        return None if value is None else float(value)
    except ValueError:
        return None


def _date(value: bytes | None) -> datetime | None:
    """RFC 9110, 5.6.7: an IMF-fixdate. Its older forms are too old."""
    try:
        return None if value is None else datetime.strptime(value.decode("latin-1").strip(), _HTTP_DATE)
    except ValueError:
        return None
