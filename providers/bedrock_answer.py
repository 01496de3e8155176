"""A whole answer of Converse as OpenAI's chat completion.

Must not: show what is not the answer's: calls and results of Bedrock's own tools stay out of it.
Source: Amazon Bedrock API reference, Converse (response) and ContentBlock.
"""

from __future__ import annotations

import msgspec

from providers.bedrock_wire import (
    FAILED_STOPS,
    SERVER_TOOL,
    Piece,
    cited_url,
    decode_answer,
    finish_reason,
    redacted,
    usage_of,
)
from providers.chat_answer import Parts
from providers.chat_chunks import WholeAnswer, tool_call, whole_answer
from providers.codec import ChatCall
from providers.events import ProviderFailure
from providers.failures import UNREADABLE, garbage, unfinished
from providers.json_root import RootObject

_encode = msgspec.json.Encoder().encode


def answer_of(body: bytes, answer_id: str, call: ChatCall) -> WholeAnswer | ProviderFailure:
    """Read a 200. What has no message is no answer."""
    try:
        answer = decode_answer(body)
    except UNREADABLE:
        return garbage("The provider's answer cannot be read as JSON.")
    if answer.output is None or answer.output.message is None:
        return garbage("The provider's answer has no message.")
    stop = answer.stop_reason or ""
    if stop in FAILED_STOPS:
        return unfinished(stop)
    parts = Parts(cited_url)
    for block in answer.output.message.content:
        _add(parts, block)
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


def _add(parts: Parts, block: Piece) -> None:
    """One block; those of kinds that OpenAI has no place for are passed over."""
    if block.text:
        parts.add_text(block.text)
    cited, use, reasoning = block.citations_content, block.tool_use, block.reasoning_content
    if cited is not None:
        text = "".join(each["text"] for each in cited.content if isinstance(each.get("text"), str))
        parts.add_text(text, cited.citations)
    if use is not None and use.type != SERVER_TOOL:
        arguments = _encode({} if use.input is None else use.input).decode()
        parts.calls.append(tool_call(use.tool_use_id or f"call_{len(parts.calls)}", use.name or "", arguments))
    if reasoning is not None and reasoning.reasoning_text is not None:
        parts.add_thinking(reasoning.reasoning_text.text or "", reasoning.reasoning_text.signature)
    elif reasoning is not None and reasoning.redacted_content:
        parts.thinking.append(redacted(reasoning.redacted_content))
