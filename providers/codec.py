"""What every codec takes and gives. A codec is sans-IO: bytes in, events out; one object per attempt.

Must not: open connections, read clocks, hold money. Requests leave as bytes; what can be forwarded is never re-encoded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import msgspec

from providers.events import Event, ProviderFailure, ReportedUsage
from providers.json_root import RootObject


@dataclass(frozen=True, slots=True)
class Upstream:
    """A configured provider as codecs see it. `target` is the path prefix of its base URL; `key` is secret."""

    name: str
    kind: str
    target: bytes
    key: str | None = None
    include_usage: bool = True
    clean_eof: bool = False
    limit_field: str | None = None

    def __repr__(self) -> str:
        return f"Upstream({self.name!r})"


class ChatCall(msgspec.Struct, frozen=True):
    """One chat completion to send: the client's body with its splices already decided.

    `body` is the upstream body; `model` the candidate's model; `choices` how many the client wants;
    `usage_wanted` whether the client asked for the usage chunk; `rename_to` a model name to put into answers.
    """

    body: bytes
    model: str
    stream: bool
    choices: int = 1
    usage_wanted: bool = False
    rename_to: str | None = None
    frame_bytes_max: int = 1024 * 1024


class UpstreamRequest(msgspec.Struct, frozen=True):
    """What to send: method, target (path and query) and headers without host and content-length: those that every
    such request has, and this one's `own`."""

    method: bytes
    target: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    own: tuple[tuple[bytes, bytes], ...]
    body: bytes


class Answer(Protocol):
    """A whole non-stream answer: the body to forward with its members' places, and the usage in it."""

    root: RootObject
    usage: ReportedUsage | None

    def texts(self) -> list[tuple[int, int, int, str]]:
        """(choice, channel, tool, text) of every text in it, for counting where usage is missing."""


class Codec(Protocol):
    """A provider's wire, both ways (the openai codec is the first of several)."""

    def request(self, call: ChatCall, request_id: str) -> UpstreamRequest:
        """The upstream request for `call`."""

    def feed(self, data: bytes) -> list[Event]:
        """Events completed by `data`. Never raises: damage becomes `Failed`."""

    def end_of_stream(self) -> list[Event]:
        """The body ended: `Completed`, or `Failed` of kind truncated."""

    def failure(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> ProviderFailure:
        """What a status other than 2xx means."""

    def answer(self, body: bytes) -> Answer | ProviderFailure:
        """A non-stream 200's meaning."""

    def finish_chunk(self, choice: int, reason: str) -> bytes:
        """The payload that ends `choice` on the provider's behalf."""

    def usage_chunk(self, usage: bytes, extra: bytes) -> bytes:
        """The final payload: no choices, `usage` (a JSON object) and `extra` members (`,"x":...` or empty)."""
