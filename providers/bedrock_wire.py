"""Partial shapes of Bedrock's answers: what is translated, counted or decided on; everything else is skipped.

Must not: model the whole API. Source: Amazon Bedrock API reference, ConverseStreamOutput, ContentBlock, TokenUsage.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Mapping
from typing import Any

import msgspec

from providers.bedrock_blocks import UNDECODED
from providers.chat_chunks import count, reported, total
from providers.events import ReportedUsage

SERVER_TOOL = "server_tool_use"
"""The type of a call that Bedrock runs itself: it is none of the client's."""
FAILED_STOPS = frozenset(("malformed_model_output", "malformed_tool_use"))
_FINISHES = {
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "guardrail_intervened": "content_filter",
    "content_filtered": "content_filter",
}


class ToolUse(msgspec.Struct, rename="camel", gc=False):
    """`input` is a piece of JSON as text in a delta, and the object itself in a whole answer."""

    tool_use_id: str | None = None
    name: str | None = None
    type: str | None = None
    input: Any = None


class ReasoningText(msgspec.Struct, gc=False):
    text: str | None = None
    signature: str | None = None


class Reasoning(msgspec.Struct, rename="camel", gc=False):
    """A delta has `text` or `signature`, a whole answer `reasoning_text`; `redacted_content` is base64 in both."""

    text: str | None = None
    signature: str | None = None
    redacted_content: str | None = None
    reasoning_text: ReasoningText | None = None


class Cited(msgspec.Struct):
    """A whole answer's text with what it is taken from."""

    content: list[dict[str, Any]] = []
    citations: list[dict[str, Any]] = []


class Piece(msgspec.Struct, rename="camel", gc=False):
    """A content block, or a delta of one."""

    text: str | None = None
    tool_use: ToolUse | None = None
    reasoning_content: Reasoning | None = None
    citation: dict[str, Any] | None = None
    citations_content: Cited | None = None


class StreamEvent(msgspec.Struct, rename="camel", gc=False):
    """Any event of ConverseStream: which it is says the message's header."""

    content_block_index: int = 0
    start: Piece | None = None
    delta: Piece | None = None
    stop_reason: str | None = None
    usage: dict[str, Any] | None = None


class Spoken(msgspec.Struct, gc=False):
    content: list[Piece] = []


class Output(msgspec.Struct, gc=False):
    message: Spoken | None = None


class Converse(msgspec.Struct, rename="camel", gc=False):
    """A whole answer."""

    output: Output | None = None
    stop_reason: str | None = None
    usage: dict[str, Any] | None = None


decode_event = msgspec.json.Decoder(StreamEvent).decode
decode_answer = msgspec.json.Decoder(Converse).decode


def finish_reason(stop: str, *, called: bool) -> str:
    """OpenAI's word for a stop reason. `called`: the client has a call to answer."""
    return _FINISHES.get(stop) or ("tool_calls" if called else "stop")


def usage_of(usage: dict[str, Any] | None) -> ReportedUsage | None:
    """`inputTokens` leaves out what came from the cache and what went into it; OpenAI's prompt has both. None when it
    does not say both sides."""
    if usage is None or usage.get("inputTokens") is None or usage.get("outputTokens") is None:
        return None
    cached, written = count(usage.get("cacheReadInputTokens")), count(usage.get("cacheWriteInputTokens"))
    report = ReportedUsage(
        prompt=total(count(usage.get("inputTokens")), cached, written),
        output=count(usage.get("outputTokens")),
        cached=cached,
        cache_write=written,
        cache_write_1h=max(0, min(_by_ttl(usage).get("1h", 0), written)),
    )
    return reported(report, _details(usage, written))


def _by_ttl(usage: dict[str, Any]) -> dict[Any, int]:
    """Tokens written to the cache, by how long they are kept."""
    listed = usage.get("cacheDetails")
    found = [each for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
    return {each["ttl"]: count(each.get("inputTokens")) for each in found if isinstance(each.get("ttl"), str)}


def _details(usage: dict[str, Any], written: int) -> dict[str, Any]:
    """The cache writes by their time to live, which have different prices, and calls of Bedrock's own tools."""
    details: dict[str, Any] = {}
    by_ttl = _by_ttl(usage)
    if by_ttl and written > 0:
        split = {f"ttl_{ttl}_tokens": by_ttl.get(ttl, 0) for ttl in ("5m", "1h")}
        if total(*split.values()) == written:
            details["prompt_tokens_details"] = {"cache_write_tokens_details": split}
    tools = usage.get("serverToolUsage")
    if isinstance(tools, dict) and any(count(value) > 0 for value in tools.values()):
        details["server_tool_use"] = tools
    return details


def redacted(content: str) -> dict[str, Any]:
    """Encrypted thinking as a thinking block of Anthropic's: Bedrock puts its text into base64 once more."""
    try:
        return {"type": "redacted_thinking", "data": b64decode(content, validate=True).decode("ascii")}
    except ValueError:
        return {"type": "redacted_thinking", "data": content, "encoding": UNDECODED}


def cited_url(citation: Mapping[str, Any]) -> str | None:
    """The address that is cited; None where it is a document."""
    location = citation.get("location")
    web = location.get("web") if isinstance(location, dict) else None
    url = web.get("url") if isinstance(web, dict) else None
    return url if isinstance(url, str) else None
