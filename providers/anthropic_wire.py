"""Partial shapes of Anthropic's stream, and what both a stream and a whole answer need: usage, stop reasons, citations.

Must not: model more than what is translated; new events, blocks and members come without notice.
Source: platform.claude.com/docs/en/build-with-claude/streaming, .../api/messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from providers.chat_chunks import count, reported, total
from providers.events import ReportedUsage

EVENTS = frozenset(
    (
        *("message_start", "content_block_start", "content_block_delta", "content_block_stop"),
        *("message_delta", "message_stop"),
    )
)
BLOCKS = frozenset(("text", "thinking", "redacted_thinking", "tool_use"))
DELTAS = frozenset(("text_delta", "input_json_delta", "thinking_delta", "signature_delta", "citations_delta"))
USAGE = (
    *("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens", "cache_creation"),
    *("output_tokens", "output_tokens_details", "server_tool_use"),
)
"""Members of a usage report that are read."""
_REASONS = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "pause_turn": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}
_URLS = ("web_search_result_location", "search_result_location")


class WireDelta(msgspec.Struct, gc=False):
    type: str | None = None
    text: str | None = None
    thinking: str | None = None
    partial_json: str | None = None
    signature: str | None = None
    citation: Any = None
    stop_reason: str | None = None
    stop_details: Any = None


class WireBlock(msgspec.Struct, gc=False):
    type: str | None = None
    id: str | None = None
    name: str | None = None
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    data: str | None = None
    input: Any = None


class WireMessage(msgspec.Struct, gc=False):
    id: str | None = None
    model: str | None = None
    usage: dict[str, Any] | None = None


class WireEvent(msgspec.Struct, gc=False):
    type: str | None = None
    index: int = 0
    delta: WireDelta | None = None
    content_block: WireBlock | None = None
    message: WireMessage | None = None
    usage: dict[str, Any] | None = None
    error: Any = None


decode_event = msgspec.json.Decoder(WireEvent).decode
decode_any = msgspec.json.Decoder().decode


def lenient_event(payload: bytes) -> WireEvent | None:
    """An event that does not fit the shapes above: one of another type, or with a block or delta of another type, is
    nobody's business. None for one that should have fitted. Raises msgspec.DecodeError when it is not JSON."""
    value = decode_any(payload)
    if not isinstance(value, dict):
        return None
    kind = value.get("type")
    if kind == "error":
        return WireEvent(type="error", error=value.get("error"))
    strange = kind not in EVENTS
    for name, known in (("delta", DELTAS), ("content_block", BLOCKS)):
        inner = value.get(name)
        if isinstance(inner, dict) and isinstance(inner.get("type"), str) and inner["type"] not in known:
            strange = True
    return WireEvent() if strange else None


def finish_reason(stop_reason: object) -> str:
    """OpenAI's word. A reason that is new is a stop: the answer is whole as far as anybody knows."""
    return _REASONS.get(stop_reason, "stop") if isinstance(stop_reason, str) else "stop"


def refusal_text(stop_details: object) -> str:
    """The explanation of a refusal, where there is one."""
    told = stop_details.get("explanation") if isinstance(stop_details, dict) else None
    return told if isinstance(told, str) else ""


def usage_of(usage: Mapping[str, Any], *, partial: bool = False) -> ReportedUsage | None:
    """OpenAI's counts: the prompt is what was read from and written to the cache too. None when it does not say both
    sides. Of a stream, the members of the last report that has them; `partial` as in `ReportedUsage`."""
    given = [usage.get(name) for name in ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")]
    if usage.get("output_tokens") is None or all(value is None for value in given):
        return None
    fresh, written, read = map(count, given)
    output = count(usage["output_tokens"])
    thought = usage.get("output_tokens_details")
    reasoning = count(thought.get("thinking_tokens")) if isinstance(thought, dict) else 0
    creation = usage.get("cache_creation")
    hour = count(creation.get("ephemeral_1h_input_tokens")) if isinstance(creation, dict) else 0
    report = ReportedUsage(
        prompt=total(fresh, written, read),
        output=output,
        cached=read,
        cache_write=written,
        cache_write_1h=max(0, min(hour, written)),
        partial=partial,
        reasoning=min(reasoning, output),  # recounted by the provider, so it may exceed the total a little
    )
    return reported(report, _details(usage, written))


def _details(usage: Mapping[str, Any], written: int) -> dict[str, Any]:
    """The cache writes by their time to live, which have different prices, and calls of the provider's own tools."""
    details: dict[str, Any] = {}
    creation = usage.get("cache_creation")
    if isinstance(creation, dict) and written > 0:
        short, long = (count(creation.get(f"ephemeral_{ttl}_input_tokens")) for ttl in ("5m", "1h"))
        if total(short, long) == written:
            split = {"ttl_5m_tokens": short, "ttl_1h_tokens": long}
            details["prompt_tokens_details"] = {"cache_write_tokens_details": split}
    tools = usage.get("server_tool_use")
    if isinstance(tools, dict) and any(count(value) > 0 for value in tools.values()):
        details["server_tool_use"] = tools
    return details


def cited_url(citation: Mapping[str, Any]) -> str | None:
    """The address that is cited; None where it is a document."""
    url = citation.get("url", citation.get("source"))
    return url if citation.get("type") in _URLS and isinstance(url, str) else None
