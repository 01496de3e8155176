"""The few fields of a chat completion request that the gateway reads, checked; all else stays bytes.

Must not: re-encode the body or decide on credit. Bad input raises the named errors of `proxy.errors`.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

import msgspec

from config.settings import Bounds
from providers.json_root import NotAnObject, RootObject, any_duplicate, depth_exceeds
from proxy.errors import InvalidBody, InvalidValue, UnsupportedParameter

CHOICES_MAX = 128
OUTPUT_TOKENS_MAX = 2**31 - 1
_REFUSED = ("api_base", "base_url", "api_key", "extra_headers", "extra_body")
_PLACE = re.compile(r" - at `\$\.?([^`]*)`$")
_MISSING = re.compile(r"missing required field `([^`]*)`")


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class _Wire(msgspec.Struct):
    model: str
    messages: list[Any]
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None


_READ = tuple(_Wire.__struct_fields__)
_decode = msgspec.json.Decoder(_Wire).decode


@dataclass(slots=True)
class ChatRequest:
    """A checked request. `limit` is the smaller of the two output limits given, in tokens per choice, or None."""

    root: RootObject
    model: str
    messages: list[Any]
    tools: list[Any]
    functions: list[Any]
    stream: bool
    usage_wanted: bool
    choices: int
    limit: int | None
    limit_fields: tuple[str, ...]

    def body_hash(self) -> str:
        """SHA-256 of the body as sent, hex."""
        return hashlib.sha256(self.root.body).hexdigest()

    def upstream_body(
        self, model: str, *, include_usage: bool, output_limit: int | None, limit_field: str | None
    ) -> bytes:
        """The body with the candidate's model, usage asked for, and a lowered output limit (or None) spliced in.

        `limit_field` is the only limit a provider understands; the client's limit is put there too.
        """
        changes = {"model": msgspec.json.encode(model)} if model != self.model else {}
        if self.stream and include_usage and not self.usage_wanted:
            changes["stream_options"] = self._stream_options()
        if output_limit is not None:
            for name in self.limit_fields or (limit_field or "max_tokens",):
                changes[name] = b"%d" % output_limit
        limit = self.limit if output_limit is None else output_limit
        if limit is not None and limit_field is not None and limit_field not in self.limit_fields:
            changes[limit_field] = b"%d" % limit
        return self.root.replaced(changes) if changes else self.root.body

    def _stream_options(self) -> bytes:
        raw = self.root.raw("stream_options")
        if raw is None or raw == b"null":
            return b'{"include_usage":true}'
        return RootObject(raw).replaced({"include_usage": b"true"})


def read_chat(body: bytes, bounds: Bounds) -> ChatRequest:
    """Read and check a body. Raises InvalidBody, InvalidValue (with the field) or UnsupportedParameter."""
    if depth_exceeds(body, bounds.depth_max):
        raise InvalidBody(f"The request body nests deeper than {bounds.depth_max} levels.")
    try:
        root = RootObject(body)
    except NotAnObject as error:
        raise InvalidBody(f"We could not parse the JSON body of your request: {error}.") from None
    for name in _REFUSED:
        if name in root.spans:
            raise UnsupportedParameter(f"Unsupported parameter: '{name}'.", param=name)
    doubled = any_duplicate(root, _READ)
    if doubled is not None:
        raise InvalidValue(f"Duplicate field: '{doubled}'.", param=doubled)
    try:
        wire = _decode(body)
    except (msgspec.DecodeError, RecursionError) as error:
        raise _invalid(str(error)) from None
    return _checked(root, wire, bounds)


def _checked(root: RootObject, wire: _Wire, bounds: Bounds) -> ChatRequest:
    if not wire.messages:
        raise InvalidValue("Invalid 'messages': empty array. Expected at least one message.", param="messages")
    if len(wire.messages) > bounds.messages_max:
        raise InvalidValue(f"Invalid 'messages': more than {bounds.messages_max} messages.", param="messages")
    if not all(isinstance(message, dict) for message in wire.messages):
        raise InvalidValue("Invalid type for 'messages': expected an array of objects.", param="messages")
    choices = 1 if wire.n is None else wire.n
    if not 1 <= choices <= CHOICES_MAX:
        raise InvalidValue(f"Invalid 'n': expected an integer from 1 to {CHOICES_MAX}.", param="n")
    limits = {}
    for name in ("max_tokens", "max_completion_tokens"):
        value: int | None = getattr(wire, name)
        if value is not None:
            if not 1 <= value <= OUTPUT_TOKENS_MAX:
                raise InvalidValue(f"Invalid '{name}': expected an integer from 1 to {OUTPUT_TOKENS_MAX}.", param=name)
            limits[name] = value
    options = wire.stream_options
    if options is not None and not wire.stream:
        raise InvalidValue(
            "The 'stream_options' parameter is only allowed when 'stream' is enabled.", param="stream_options"
        )
    return ChatRequest(
        root=root,
        model=wire.model,
        messages=wire.messages,
        tools=wire.tools or [],
        functions=wire.functions or [],
        stream=bool(wire.stream),
        usage_wanted=bool(options is not None and options.include_usage),
        choices=choices,
        limit=min(limits.values()) if limits else None,
        limit_fields=tuple(limits),
    )


def _invalid(message: str) -> InvalidValue | InvalidBody:
    missing = _MISSING.search(message)
    if missing:
        return InvalidValue(f"Missing required parameter: '{missing[1]}'.", param=missing[1])
    place = _PLACE.search(message)
    if place is None:
        return InvalidBody(f"We could not parse the JSON body of your request: {message}.")
    reason = message[: place.start()].replace("`", "'").replace(" | null", "")
    return InvalidValue(f"Invalid value for '{place[1]}': {reason[0].lower()}{reason[1:]}.", param=place[1])
