"""A whole answer of Converse as OpenAI's chat completion.

Must not: show what is not the answer's: calls and results of Bedrock's own tools stay out of it.
Source: Amazon Bedrock API reference, Converse (response) and ContentBlock.
"""

from __future__ import annotations

from typing import Any

import msgspec

from providers.bedrock_blocks import THINKING_BLOCKS
from providers.bedrock_errors import failed_stop, garbage
from providers.bedrock_wire import (
    FAILED_STOPS,
    SERVER_TOOL,
    Cited,
    Piece,
    Reasoning,
    Sources,
    ToolUse,
    decode_answer,
    finish_reason,
    redacted,
    usage_of,
)
from providers.chat_chunks import WholeAnswer, assistant_message, tool_call, whole_answer
from providers.codec import ChatCall
from providers.events import ProviderFailure
from providers.json_root import RootObject

_encode = msgspec.json.Encoder().encode


def answer_of(body: bytes, answer_id: str, call: ChatCall) -> WholeAnswer | ProviderFailure:
    """Read a 200. What has no message is no answer."""
    try:
        answer = decode_answer(body)
    except (msgspec.DecodeError, RecursionError, ValueError):
        return garbage("The provider's answer cannot be read as JSON.")
    if answer.output is None or answer.output.message is None:
        return garbage("The provider's answer has no message.")
    stop = answer.stop_reason or ""
    if stop in FAILED_STOPS:
        return failed_stop(stop)
    parts = _Parts()
    for block in answer.output.message.content:
        parts.add(block)
    usage = usage_of(answer.usage)
    whole = whole_answer(
        answer_id,
        call.rename_to or call.model,
        call.created,
        parts.message(),
        finish_reason(stop, called=bool(parts.calls)),
        b"" if usage is None else usage.raw,
    )
    return WholeAnswer(RootObject(whole), usage)


class _Parts:
    """The message's members as its blocks tell them."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self._text = ""
        self._reasoning = ""
        self._thinking: list[dict[str, Any]] = []
        self._cited: dict[str, list[Any]] = {}
        self._sources = Sources()

    def add(self, block: Piece) -> None:
        """One block; those of kinds that OpenAI has no place for are passed over."""
        self._text += block.text or ""
        if block.citations_content is not None:
            self._add_cited(block.citations_content)
        if block.tool_use is not None:
            self._add_call(block.tool_use)
        if block.reasoning_content is not None:
            self._add_thought(block.reasoning_content)

    def _add_cited(self, cited: Cited) -> None:
        start = len(self._text)
        self._text += "".join(each["text"] for each in cited.content if isinstance(each.get("text"), str))
        for name, members in self._sources.members(cited.citations, start, len(self._text)).items():
            self._cited.setdefault(name, []).extend(members)

    def _add_call(self, use: ToolUse) -> None:
        if use.type != SERVER_TOOL:
            arguments = _encode({} if use.input is None else use.input).decode()
            self.calls.append(tool_call(use.tool_use_id or f"call_{len(self.calls)}", use.name or "", arguments))

    def _add_thought(self, reasoning: Reasoning) -> None:
        said = reasoning.reasoning_text
        if said is not None:
            self._reasoning += said.text or ""
            if said.signature:
                signed = {"type": "thinking", "thinking": said.text or "", "signature": said.signature}
                self._thinking.append(signed)
        elif reasoning.redacted_content:
            self._thinking.append(redacted(reasoning.redacted_content))

    def message(self) -> dict[str, Any]:
        """OpenAI's message. Content is null only beside tool calls."""
        extra: dict[str, Any] = dict(self._cited)
        if self._thinking:
            extra[THINKING_BLOCKS] = self._thinking
        content = self._text if self._text or not self.calls else None
        return assistant_message(content, reasoning=self._reasoning, tool_calls=self.calls, extra=extra)
