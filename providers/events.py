"""What a codec tells the relay about a provider's stream, whoever the provider is.

Must not: hold money, do I/O or know a provider. Token counts are the provider's own; None means it said nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import msgspec


class Channel(IntEnum):
    """Where output text appears; each is counted by itself because tokens never span two of them."""

    CONTENT = 0
    REFUSAL = 1
    REASONING = 2
    TOOL_NAME = 3
    TOOL_ARGUMENTS = 4


class Delta(msgspec.Struct):
    """A piece of output text: choice index, channel, tool index (0 outside tools), text."""

    choice: int
    channel: Channel
    tool: int
    text: str


class ReportedUsage(msgspec.Struct):
    """Token counts as the provider reported them (its whole truth, unchecked), and the JSON object itself.

    `cache_write_1h` is the part of `cache_write` that is kept for an hour. `partial`: the report tells only of what
    there is so far, or not of all of it, and is never the last word.
    """

    prompt: int | None
    output: int | None
    cached: int = 0
    cache_write: int = 0
    reasoning: int = 0
    audio_input: int = 0
    audio_output: int = 0
    cache_write_1h: int = 0
    image_output: int = 0
    partial: bool = False
    raw: bytes = b"{}"


class Chunk(msgspec.Struct):
    """One chunk to forward: `payload` is the JSON of one `data:` frame.

    `content` says whether a client would call it content (a role-only chunk is not); `finished` are the choices
    that ended in it.
    """

    payload: bytes
    deltas: list[Delta] = msgspec.field(default_factory=list)
    finished: tuple[int, ...] = ()
    content: bool = False


class UsageSeen(msgspec.Struct):
    """The provider reported usage. Later reports replace earlier ones; nothing is forwarded."""

    usage: ReportedUsage


FailureKind = Literal[
    "caller",
    "context_length",
    "content_policy",
    "key_refused",
    "rate_limited",
    "overloaded",
    "server",
    "garbage",
    "truncated",
]
"""Whose fault it is. `context_length` and `content_policy` are the caller's too (status 400), but another model may
take the same request."""


@dataclass(slots=True)
class ProviderFailure:
    """A provider's error, before or inside a stream. `status` is its HTTP status, or the nearest one."""

    kind: FailureKind
    status: int
    message: str
    type: str | None = None
    code: str | None = None
    param: str | None = None
    retry_after_s: float | None = None


@dataclass(slots=True)
class Failed:
    """The stream carries an error; whatever follows in it is ignored."""

    failure: ProviderFailure


@dataclass(slots=True)
class Completed:
    """The stream is whole: `[DONE]`, or a finish for every choice, or the profile's own end."""

    missing_finish: tuple[int, ...] = ()


Event = Chunk | UsageSeen | Failed | Completed
