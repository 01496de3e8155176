"""The few fields of a chat completion request that the gateway reads, checked; all else stays bytes.

Must not: re-encode the body or decide on credit. Bad input raises the named errors of `proxy.errors`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import msgspec

from config.settings import Bounds
from metering.prompt import newer_family
from providers.json_root import NotAnObject, RootObject, any_duplicate, depth_exceeds
from proxy.errors import InvalidBody, InvalidValue, UnsupportedParameter

CHOICES_MAX = 128
OUTPUT_TOKENS_MAX = 2**31 - 1
_REFUSED = ("api_base", "base_url", "api_key", "extra_headers", "extra_body")
CACHE_1H = b'"1h"'
"""In the body of whoever wants part of its prompt cached for an hour (`cache_control.ttl`)."""
ESCAPED_1H = (b'"\\u0031h"', b'"1\\u0068"', b'"\\u0031\\u0068"')
"""What JSON lets one write for that."""
_OWN_OUTPUT_MAX = (
    (re.compile(r"(?:ft:)?gpt-(?:3\.5|4-turbo|4-.*preview)"), 4_096),
    (re.compile(r"(?:ft:)?gpt-4(?:-0314|-0613)?(?:$|:)"), 8_192),
)
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
    response_format: Any = None
    modalities: Any = None


_READ = tuple(_Wire.__struct_fields__)
_decode = msgspec.json.Decoder(_Wire).decode


class ChatRequest(msgspec.Struct):
    """A checked request. `limits` are the output limits given, by field, in tokens per choice; `audio` says that some
    of its tokens may be priced as audio, `cache_1h` that some may be written to a cache for an hour."""

    root: RootObject
    model: str
    messages: list[Any]
    tools: list[Any]
    functions: list[Any]
    response_format: Any
    audio: bool
    stream: bool
    usage_wanted: bool
    choices: int
    limits: Mapping[str, int]
    cache_1h: bool = False
    _hash: str = ""

    @property
    def limit(self) -> int | None:
        """The smallest output limit given, in tokens per choice, or None."""
        return min(self.limits.values()) if self.limits else None

    def sizes(self) -> dict[str, int]:
        """Bytes of each root member as sent."""
        return {name: end - start for name, (start, end) in self.root.spans.items()}

    def body_hash(self) -> str:
        """SHA-256 of the body as sent, hex; computed once."""
        if not self._hash:
            self._hash = hashlib.blake2b(self.root.body, digest_size=32).hexdigest()
        return self._hash

    def upstream_body(
        self, model: str, *, include_usage: bool, output_limit: int | None, limit_field: str | None
    ) -> bytes:
        """The body with the candidate's model, usage asked for, and the output limit that the hold covers spliced in.

        Limits above the smallest of all are lowered to it; `output_limit` None adds none. `limit_field` is the only
        limit a provider understands: the limit is put there too. Without a change it is the body as it came.
        """
        changes = {"model": msgspec.json.encode(model)} if model != self.model else {}
        if self.stream and include_usage and not self.usage_wanted:
            changes["stream_options"] = self._stream_options()
        limit = self.limit
        if limit is None or (output_limit is not None and output_limit < limit):
            limit = output_limit
        if limit is not None:
            for name, value in self.limits.items():
                if value > limit:
                    changes[name] = b"%d" % limit
            if limit_field is not None and limit_field not in self.limits:
                changes[limit_field] = b"%d" % limit
            elif not self.limits:
                own = _own_output_max(model)
                if own is None or own > limit:
                    changes["max_completion_tokens" if newer_family(model) else "max_tokens"] = b"%d" % limit
        return self.root.replaced(changes) if changes else self.root.body

    def _stream_options(self) -> bytes:
        raw = self.root.raw("stream_options")
        if raw is None or raw == b"null":
            return b'{"include_usage":true}'
        return RootObject(raw).replaced({"include_usage": b"true"})


@lru_cache(maxsize=1_000)
def _own_output_max(model: str) -> int | None:
    """The most that a model writes, where it refuses a limit above that; None for others."""
    name = model.rpartition("/")[2].lower()
    return next((most for pattern, most in _OWN_OUTPUT_MAX if pattern.match(name)), None)


def read_chat(body: bytes, bounds: Bounds) -> ChatRequest:
    """Read and check a body. Raises InvalidBody, InvalidValue (with the field) or UnsupportedParameter."""
    if depth_exceeds(body, bounds.depth_max):
        raise InvalidBody(f"The request body nests deeper than {bounds.depth_max} levels.")
    try:
        root = RootObject(body, bounds.root_members_max)
    except NotAnObject as error:
        raise InvalidBody(f"We could not parse the JSON body of your request: {error}.") from None
    if not root.spans.keys().isdisjoint(_REFUSED):
        name = next(name for name in _REFUSED if name in root.spans)
        raise UnsupportedParameter(f"Unsupported parameter: '{name}'.", param=name)
    if root.duplicates:
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
    for message in wire.messages:
        if not isinstance(message, dict):
            raise InvalidValue("Invalid type for 'messages': expected an array of objects.", param="messages")
    choices = 1 if wire.n is None else wire.n
    if not 1 <= choices <= CHOICES_MAX:
        raise InvalidValue(f"Invalid 'n': expected an integer from 1 to {CHOICES_MAX}.", param="n")
    limits: dict[str, int] = {}
    for name, value in (("max_tokens", wire.max_tokens), ("max_completion_tokens", wire.max_completion_tokens)):
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
        response_format=wire.response_format,
        audio=root.raw("audio") not in (None, b"null") or _names_audio(wire.modalities, wire.messages),
        stream=bool(wire.stream),
        usage_wanted=bool(options is not None and options.include_usage),
        choices=choices,
        limits=limits,
        cache_1h=CACHE_1H in root.body or (b"\\u00" in root.body and any(each in root.body for each in ESCAPED_1H)),
    )


def _names_audio(modalities: Any, messages: list[dict[str, Any]]) -> bool:
    """Whether audio is asked for, or given in a message."""
    if isinstance(modalities, list) and "audio" in modalities:
        return True
    for message in messages:
        content = message.get("content")
        if isinstance(content, list) and any(_is_audio(part) for part in content):
            return True
        if message.get("audio"):
            return True
    return False


def _is_audio(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "input_audio"


def _invalid(message: str) -> InvalidValue | InvalidBody:
    missing = _MISSING.search(message)
    if missing:
        return InvalidValue(f"Missing required parameter: '{missing[1]}'.", param=missing[1])
    place = _PLACE.search(message)
    if place is None:
        return InvalidBody(f"We could not parse the JSON body of your request: {message}.")
    reason = message[: place.start()].replace("`", "'").replace(" | null", "")
    return InvalidValue(f"Invalid value for '{place[1]}': {reason[0].lower()}{reason[1:]}.", param=place[1])
