"""Which class speaks which wire. A codec's module is loaded when the first configured provider needs it.

Must not: know kinds or providers, only codecs: a data worker that speaks one wire pays for one.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from providers.codec import ChatCall, Codec, Upstream

CodecClass = Callable[[Upstream, ChatCall], Codec]
EVENT_STREAM = (b"event-stream",)
"""Server-sent events. Some servers leave out the `text/` or write it otherwise."""


class Wire(msgspec.Struct, frozen=True):
    """A wire: `codec` makes one attempt's, and a stream's content type has one of `stream_types` (lower case) in it.
    `translates`: whether a request is read and written anew for it."""

    codec: CodecClass
    stream_types: tuple[bytes, ...]
    translates: bool = True


def wire(codec: str) -> Wire:
    """The wire of that name. Raises KeyError for a name that no codec has."""
    return _WIRES[codec]()


def _openai() -> Wire:
    from providers.openai import OpenAICodec

    return Wire(OpenAICodec, EVENT_STREAM, translates=False)


def _anthropic() -> Wire:
    from providers.anthropic import AnthropicCodec

    return Wire(AnthropicCodec, EVENT_STREAM)


def _gemini() -> Wire:
    from providers.gemini import GeminiCodec

    return Wire(GeminiCodec, EVENT_STREAM)


def _bedrock() -> Wire:
    from providers.bedrock import BedrockCodec

    return Wire(BedrockCodec, BedrockCodec.content_types)


_WIRES: dict[str, Callable[[], Wire]] = {
    "openai": _openai,
    "anthropic": _anthropic,
    "gemini": _gemini,
    "bedrock": _bedrock,
}
CODECS = frozenset(_WIRES)
