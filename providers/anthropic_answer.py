"""A whole message of Anthropic's as OpenAI's chat completion.

Must not: show what is not the answer's: calls and results of the provider's own tools stay out of it.
Source: platform.claude.com/docs/en/api/messages (response).
"""

from __future__ import annotations

from typing import Any

import msgspec

from providers.anthropic_errors import failure_from_error, garbage
from providers.anthropic_wire import citation_members, decode_any, finish_reason, refusal_text, usage_of
from providers.chat_chunks import WholeAnswer, assistant_message, tool_call, whole_answer
from providers.codec import ChatCall
from providers.events import ProviderFailure
from providers.json_root import RootObject


def answer_of(body: bytes, call: ChatCall) -> WholeAnswer | ProviderFailure:
    """Read a 200. An error object in it is a failure, and anything that is no message too."""
    try:
        value = decode_any(body)
    except (msgspec.DecodeError, RecursionError, ValueError):
        return garbage("The provider's answer cannot be read as JSON.")
    if not isinstance(value, dict):
        return garbage("The provider's answer is not a JSON object.")
    if value.get("type") == "error" or isinstance(value.get("error"), dict):
        return failure_from_error(value)
    content = value.get("content")
    if not isinstance(content, list):
        return garbage("The provider's answer has no content.")
    parts = _Parts()
    for block in content:
        if isinstance(block, dict):
            parts.add(block)
    model = call.rename_to or _text(value, "model") or call.model
    usage = usage_of(value["usage"]) if isinstance(value.get("usage"), dict) else None
    whole = whole_answer(
        _text(value, "id") or "chatcmpl-tollgate",
        model,
        call.created,
        parts.message(refusal_text(value.get("stop_details"))),
        finish_reason(value.get("stop_reason")),
        b"" if usage is None else usage.raw,
    )
    return WholeAnswer(RootObject(whole), usage)


class _Parts:
    """The message's members as its blocks tell them."""

    def __init__(self) -> None:
        self._text = ""
        self._reasoning = ""
        self._calls: list[dict[str, Any]] = []
        self._thinking: list[dict[str, Any]] = []
        self._cited: dict[str, list[Any]] = {"annotations": [], "citations": []}

    def add(self, block: dict[str, Any]) -> None:
        """One block; those of types that nobody knows are passed over."""
        kind = block.get("type")
        if kind == "text":
            self._add_text(_text(block, "text"), block.get("citations"))
        elif kind == "thinking":
            thinking = _text(block, "thinking")
            self._reasoning += thinking
            if _text(block, "signature"):
                signed = {"type": "thinking", "thinking": thinking, "signature": _text(block, "signature")}
                self._thinking.append(signed)
        elif kind == "redacted_thinking":
            self._thinking.append({"type": "redacted_thinking", "data": _text(block, "data")})
        elif kind == "tool_use":
            arguments = msgspec.json.encode(block.get("input") or {}).decode()
            self._calls.append(tool_call(_text(block, "id"), _text(block, "name"), arguments))

    def _add_text(self, text: str, citations: Any) -> None:
        start = len(self._text)
        self._text += text
        if isinstance(citations, list):
            first = (len(self._cited["annotations"]), len(self._cited["citations"]))
            for name, members in citation_members(citations, start, len(self._text), first).items():
                self._cited[name] += members

    def message(self, refusal: str) -> dict[str, Any]:
        """OpenAI's message. Content is null only beside tool calls."""
        extra: dict[str, Any] = {name: members for name, members in self._cited.items() if members}
        if self._thinking:
            extra["thinking_blocks"] = self._thinking
        content = self._text if self._text or not self._calls else None
        return assistant_message(
            content, reasoning=self._reasoning, refusal=refusal or None, tool_calls=self._calls, extra=extra
        )


def _text(value: dict[str, Any], name: str) -> str:
    found = value.get(name)
    return found if isinstance(found, str) else ""
