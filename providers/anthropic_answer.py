"""A whole message of Anthropic's as OpenAI's chat completion.

Must not: show what is not the answer's: calls and results of the provider's own tools stay out of it.
Source: platform.claude.com/docs/en/api/messages (response).
"""

from __future__ import annotations

from typing import Any

import msgspec

from providers.anthropic_errors import failure_from_error
from providers.anthropic_wire import cited_url, decode_any, finish_reason, refusal_text, usage_of
from providers.chat_answer import Parts
from providers.chat_chunks import UNKNOWN_ID, WholeAnswer, tool_call, whole_answer
from providers.codec import ChatCall
from providers.events import ProviderFailure
from providers.failures import UNREADABLE, garbage
from providers.json_root import RootObject


def answer_of(body: bytes, call: ChatCall) -> WholeAnswer | ProviderFailure:
    """Read a 200. An error object in it is a failure, and anything that is no message too."""
    try:
        value = decode_any(body)
    except UNREADABLE:
        return garbage("The provider's answer cannot be read as JSON.")
    if not isinstance(value, dict):
        return garbage("The provider's answer is not a JSON object.")
    if value.get("type") == "error" or isinstance(value.get("error"), dict):
        return failure_from_error(value)
    content = value.get("content")
    if not isinstance(content, list):
        return garbage("The provider's answer has no content.")
    parts = Parts(cited_url)
    for block in content:
        if isinstance(block, dict):
            _add(parts, block)
    model = call.rename_to or _text(value, "model") or call.model
    usage = usage_of(value["usage"]) if isinstance(value.get("usage"), dict) else None
    whole = whole_answer(
        _text(value, "id") or UNKNOWN_ID,
        model,
        call.created,
        parts.message(refusal_text(value.get("stop_details"))),
        finish_reason(value.get("stop_reason")),
        b"" if usage is None else usage.raw,
    )
    return WholeAnswer(RootObject(whole), usage)


def _add(parts: Parts, block: dict[str, Any]) -> None:
    """One block; those of types that nobody knows are passed over."""
    kind = block.get("type")
    if kind == "text":
        parts.add_text(_text(block, "text"), block.get("citations"))
    elif kind == "thinking":
        parts.add_thinking(_text(block, "thinking"), _text(block, "signature"))
    elif kind == "redacted_thinking":
        parts.thinking.append({"type": "redacted_thinking", "data": _text(block, "data")})
    elif kind == "tool_use":
        arguments = msgspec.json.encode(block.get("input") or {}).decode()
        parts.calls.append(tool_call(_text(block, "id"), _text(block, "name"), arguments))


def _text(value: dict[str, Any], name: str) -> str:
    found = value.get(name)
    return found if isinstance(found, str) else ""
