"""OpenAI's messages as Anthropic's: system blocks, and user and assistant turns in turn.

Must not: fetch anything, or leave content out: what Anthropic cannot read is refused by its place in the request.
Source: platform.claude.com/docs/en/api/messages (input messages), .../build-with-claude/vision, /pdf-support, /files,
/extended-thinking (preserving thinking blocks), .../agents-and-tools/tool-use/handle-tool-calls.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any

import msgspec

from providers.chat_request import Audio, BadRequest, File, Image, Message, Part, Refusal, Text, ToolUse, Unsupported
from providers.claude import thinking_pieces

Block = dict[str, Any]
_NOT_IN_IDS = re.compile(r"[^a-zA-Z0-9_-]")
_IMAGES = frozenset(("image/jpeg", "image/png", "image/gif", "image/webp"))
_BY_NAME = ((".pdf", "application/pdf"), (".txt", "text/plain"), (".md", "text/plain"), (".csv", "text/plain"))


class Turns(msgspec.Struct):
    """The request's `system` and `messages`; `files` whether one of them names a file by its id (a beta)."""

    system: list[Block] = msgspec.field(default_factory=list)
    messages: list[Block] = msgspec.field(default_factory=list)
    files: bool = False


def turns_of(messages: list[Message]) -> Turns:
    """Translate. System and developer messages go to the front, as in Anthropic's own compatibility layer; neighbours
    of one role become one turn, tool results among the user's. Raises BadRequest, Unsupported."""
    turns = Turns()
    for at, message in enumerate(messages):
        path = f"messages[{at}]"
        blocks = _blocks(message, path, turns)
        cache = message.extra.get("cache_control")
        if blocks and isinstance(cache, dict):
            blocks[-1]["cache_control"] = cache
        if message.role in ("system", "developer"):
            turns.system += blocks
        elif blocks:
            _append(turns.messages, "assistant" if message.role == "assistant" else "user", blocks)
    _trim(turns.messages)
    return turns


def thinks_before_tools(messages: list[Block]) -> bool:
    """Whether a turn that waits for its tools' results began with thinking. Extended thinking by budget demands it, and
    whoever does not send thinking back cannot have it."""
    for message in reversed(messages):
        if message["role"] == "assistant":
            kinds = [block["type"] for block in message["content"]]
            return "tool_use" not in kinds or kinds[0] in ("thinking", "redacted_thinking")
        if message["content"][0]["type"] != "tool_result":
            return True
    return True


def _append(messages: list[Block], role: str, blocks: list[Block]) -> None:
    if messages and messages[-1]["role"] == role:
        messages[-1]["content"] += blocks
    else:
        messages.append({"role": role, "content": blocks})


def _trim(messages: list[Block]) -> None:
    """An answer to be continued must not end in white space."""
    if messages and messages[-1]["role"] == "assistant":
        last = messages[-1]["content"][-1]
        if last["type"] == "text":
            last["text"] = last["text"].rstrip()


def _blocks(message: Message, path: str, turns: Turns) -> list[Block]:
    blocks: list[Block] = []
    if message.role == "assistant":
        blocks += thinking_blocks(message)
    for at, part in enumerate(message.parts):
        block = _block(part, f"{path}.content[{at}]", turns)
        if block is not None:
            blocks.append(block)
    if message.role == "tool":
        return [_tool_result(message, blocks)]
    return blocks + [_tool_use(use) for use in message.tool_uses]


def _block(part: Part, path: str, turns: Turns) -> Block | None:
    """None for text without anything in it, which Anthropic refuses."""
    if isinstance(part, Audio):
        raise Unsupported(path, "The provider of this model does not take audio.")
    if isinstance(part, Refusal):
        return {"type": "text", "text": part.text} if part.text.strip() else None
    if isinstance(part, Text):
        block: Block | None = {"type": "text", "text": part.text} if part.text.strip() else None
    elif isinstance(part, Image):
        block = _image(part.url, part.media_type, part.data, path)
    else:
        block = _document(part, path, turns)
    if block is not None and part.cache is not None:
        block["cache_control"] = part.cache
    return block


def _image(url: str | None, media_type: str | None, data: str | None, path: str) -> Block:
    if data is None:
        return {"type": "image", "source": {"type": "url", "url": url}}
    media_type = "image/jpeg" if media_type == "image/jpg" else media_type
    if media_type not in _IMAGES:
        raise Unsupported(path, f"The provider of this model does not take images of type '{media_type}'.")
    return {"type": "image", "source": {"type": "base64", "media_type": media_type, "data": data}}


def _document(file: File, path: str, turns: Turns) -> Block:
    kind = file.media_type or _guessed(file)
    if kind is not None and kind.startswith("image/"):
        return _image(file.url, kind, file.data, path)
    block: Block = {"type": "document"}
    if file.filename:
        block["title"] = file.filename
    if file.data is not None and kind == "application/pdf":
        block["source"] = {"type": "base64", "media_type": kind, "data": file.data}
    elif file.data is not None and kind is not None and kind.startswith("text/"):
        block["source"] = {"type": "text", "media_type": "text/plain", "data": _plain(file.data, path)}
    elif file.data is None and file.url is not None and kind in (None, "application/pdf"):
        block["source"] = {"type": "url", "url": file.url}
    elif file.data is None and file.file_id is not None:
        turns.files = True
        block["source"] = {"type": "file", "file_id": file.file_id}
    else:
        raise Unsupported(path, f"The provider of this model does not take files of type '{kind}'.")
    return block


def _guessed(file: File) -> str | None:
    if file.data is not None and file.data.startswith("JVBERi"):  # %PDF- in base64
        return "application/pdf"
    name = (file.filename or "").lower()
    return next((kind for end, kind in _BY_NAME if name.endswith(end)), None)


def _plain(data: str, path: str) -> str:
    try:
        return base64.b64decode(data, validate=True).decode()
    except (binascii.Error, ValueError):
        raise BadRequest(path, f"'{path}' must be text in base64.") from None


def _tool_result(message: Message, blocks: list[Block]) -> Block:
    result: Block = {"type": "tool_result", "tool_use_id": tool_id(message.tool_call_id or "")}
    caches = [cache for block in blocks if (cache := block.pop("cache_control", None)) is not None]
    if blocks:
        result["content"] = blocks[0]["text"] if len(blocks) == 1 and blocks[0]["type"] == "text" else blocks
    if caches:
        result["cache_control"] = caches[-1]
    if message.extra.get("is_error") is True:
        result["is_error"] = True
    return result


def _tool_use(use: ToolUse) -> Block:
    block: Block = {"type": "tool_use", "id": tool_id(use.id), "name": use.name, "input": use.object()}
    if isinstance(use.extra.get("cache_control"), dict):
        block["cache_control"] = use.extra["cache_control"]
    return block


def tool_id(given: str) -> str:
    """Ids from other providers in the letters that Anthropic takes; the same everywhere in a request."""
    return _NOT_IN_IDS.sub("_", given) or "_"


def thinking_blocks(message: Message) -> list[Block]:
    """An earlier answer's thinking with its signatures. Thinking without one is refused by Anthropic and left out; it
    need not come back."""
    blocks: list[Block] = []
    text = ""
    for piece in thinking_pieces(message.extra):
        kind, data, signature = piece.get("type"), piece.get("data"), piece.get("signature")
        if kind == "redacted_thinking" and isinstance(data, str) and data:
            blocks.append({"type": "redacted_thinking", "data": data})
        elif kind == "thinking":
            more = piece.get("thinking")
            text += more if isinstance(more, str) else ""
            if isinstance(signature, str) and signature:
                blocks.append({"type": "thinking", "thinking": text, "signature": signature})
                text = ""
    return blocks
