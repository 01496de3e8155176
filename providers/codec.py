"""What every codec takes and gives. A codec is sans-IO: bytes in, events out; one object per attempt.

Must not: open connections, read clocks, hold money. Requests leave as bytes; what can be forwarded is never re-encoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import msgspec

from providers.events import Event, ProviderFailure, ReportedUsage
from providers.json_root import RootObject


class BadRequest(Exception):
    """The request is not what OpenAI's API takes: `param` is at fault (400 `invalid_value`)."""

    def __init__(self, param: str, message: str) -> None:
        self.param = param
        self.message = message
        super().__init__(message)


class Unsupported(Exception):
    """The provider cannot do what `param` asks for (400 `unsupported_parameter`, where no other candidate can)."""

    def __init__(self, param: str, message: str | None = None) -> None:
        self.param = param
        self.message = message or f"The provider of this model does not support '{param}'."
        super().__init__(self.message)


@dataclass(frozen=True, slots=True)
class Upstream:
    """A configured provider as codecs see it. `target` is the path prefix of its base URL; `key` is secret, and sent as
    `key_style` says where a wire has more than one way.

    `drop` are the request's members that are left out where this provider cannot serve them (all of them where it has
    "*"); any other of them is refused. `options` are settings that only its kind knows (a region, an API version).
    `refused` are members that buy more than the price covers (`providers.refused`); `caseless` says that the server may
    read their names, and those of the gateway's own, in any case.
    """

    name: str
    kind: str
    target: bytes
    key: str | None = None
    include_usage: bool = True
    clean_eof: bool = False
    limit_field: str | None = None
    drop: frozenset[str] = frozenset()
    options: Mapping[str, str] = field(default_factory=dict, hash=False)
    key_style: Literal["bearer", "api-key"] = "bearer"
    refused: frozenset[str] = frozenset()
    caseless: bool = False

    def __repr__(self) -> str:
        return f"Upstream({self.name!r})"


class ChatCall(msgspec.Struct, frozen=True):
    """One chat completion to send: the client's body with its splices already decided.

    `body` is the upstream body; `model` the candidate's model; `choices` how many the client wants;
    `usage_wanted` whether the client asked for the usage chunk; `rename_to` a model name to put into answers;
    `created` the time in answers that the gateway makes, in seconds (codecs read no clock); `root` the client's own
    body, where it is read already: a codec that must know its members reads `body` again without it.
    """

    body: bytes
    model: str
    stream: bool
    choices: int = 1
    usage_wanted: bool = False
    rename_to: str | None = None
    frame_bytes_max: int = 1024 * 1024
    created: int = 0
    root: RootObject | None = None


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
    """A provider's wire, both ways. Made with `(upstream, call)`; `providers.registry` finds the class."""

    def request(self, call: ChatCall, request_id: str) -> UpstreamRequest:
        """The upstream request for `call`. Raises `Unsupported`, and `BadRequest` where the codec translates."""

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

    @property
    def open_choices(self) -> tuple[int, ...]:
        """Choices that began and have not finished."""
