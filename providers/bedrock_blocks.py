"""Messages in OpenAI's shape as Converse's: system blocks, and turns of user and assistant that alternate.

Must not: fetch an address, decode or check media, or say anything that the client did not say.
Source: Amazon Bedrock API reference, Message, ContentBlock and the types in it; limits of Converse that it does not
name are told by Bedrock itself (a 400 that names the block).
"""

from __future__ import annotations

import re
from base64 import b64encode
from hashlib import sha256
from typing import Any

from providers.chat_request import Audio, File, Image, Message, Part, Text, refuse
from providers.claude import thinking_pieces

Block = dict[str, Any]

UNDECODED = "base64"
"""`encoding` of redacted thinking whose bytes are no text."""

_IMAGES = {"image/png": "png", "image/jpeg": "jpeg", "image/jpg": "jpeg", "image/gif": "gif", "image/webp": "webp"}
_AUDIO = frozenset(("mp3", "opus", "wav", "aac", "flac", "mp4", "ogg", "mkv", "m4a", "mpeg", "pcm", "webm"))
_DOCUMENTS = {
    "application/pdf": "pdf",
    "text/csv": "csv",
    "application/msword": "doc",
    "application/vnd.openxmlformats-officedocument.wordprocessingml.document": "docx",
    "application/vnd.ms-excel": "xls",
    "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet": "xlsx",
    "text/html": "html",
    "text/plain": "txt",
    "text/markdown": "md",
}
_VIDEOS = {
    "video/x-matroska": "mkv",
    "video/quicktime": "mov",
    "video/mp4": "mp4",
    "video/webm": "webm",
    "video/x-flv": "flv",
    "video/mpeg": "mpeg",
    "video/x-ms-wmv": "wmv",
    "video/3gpp": "three_gp",
}
_PDF = "JVBERi"  # %PDF- in base64
_TTLS = ("5m", "1h")
_TOOL_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_NOT_IN_NAMES = re.compile(r"[^a-zA-Z0-9\-()\[\]]+")
_NAME_CHARS_MAX = 180


class Conversation:
    """Converse's `system` and `messages`, filled message by message. Raises BadRequest and Unsupported."""

    def __init__(self, drop: frozenset[str]) -> None:
        self.system: list[Block] = []
        self.messages: list[Block] = []
        self.uses_tools = False
        self._drop = drop
        self._documents: dict[str, int] = {}
        """How often each name was given, in one form or another."""

    def add(self, at: int, message: Message) -> None:
        """The message at index `at` of the request. Instructions go to `system` wherever they stand; consecutive
        messages of one role become one, as Converse wants them to alternate."""
        place = f"messages[{at}]"
        if message.role in ("system", "developer"):
            self.system += self._instructions(place, message)
            return
        if message.role == "tool":
            blocks = self._result(place, message)
        elif message.role == "assistant":
            blocks = self._answer(place, message)
        else:
            blocks = self._parts(place, message.parts)
        blocks += cache_point(message.extra.get("cache_control"))
        role = "assistant" if message.role == "assistant" else "user"
        if self.messages and self.messages[-1]["role"] == role:
            self.messages[-1]["content"] += blocks
        elif any("cachePoint" not in block for block in blocks):
            self.messages.append({"role": role, "content": blocks})

    def trim(self) -> None:
        """An answer to be continued must not end in white space."""
        if self.messages and self.messages[-1]["role"] == "assistant":
            last = self.messages[-1]["content"][-1]
            if "text" in last:
                last["text"] = last["text"].rstrip()

    def thinks_before_tools(self) -> bool:
        """Whether a turn that waits for its tools' results began with thinking. Extended thinking by budget demands it,
        and whoever does not send thinking back cannot have it."""
        for message in reversed(self.messages):
            content = message["content"]
            if message["role"] == "assistant":
                return not any("toolUse" in block for block in content) or "reasoningContent" in content[0]
            if "toolResult" not in content[0]:
                return True
        return True

    def _instructions(self, place: str, message: Message) -> list[Block]:
        blocks: list[Block] = []
        for at, part in enumerate(message.parts):
            if not isinstance(part, Text):
                refuse(
                    f"{place}.content[{at}]", self._drop, "The provider of this model takes only text as instructions."
                )
            elif part.text.strip():
                blocks += [{"text": part.text}, *cache_point(part.cache)]
        return blocks + (cache_point(message.extra.get("cache_control")) if blocks else [])

    def _result(self, place: str, message: Message) -> list[Block]:
        """A tool's result. Cache points stand beside it: inside there is no place for them."""
        self.uses_tools = True
        blocks = self._parts(place, message.parts)
        content = [block for block in blocks if "cachePoint" not in block]
        result: Block = {"toolUseId": tool_id(message.tool_call_id or ""), "content": content}
        if message.extra.get("is_error") is True and content:
            result["status"] = "error"
        return [{"toolResult": result}, *(block for block in blocks if "cachePoint" in block)]

    def _answer(self, place: str, message: Message) -> list[Block]:
        """An earlier answer. Thinking goes back only with its signature: without one no model takes it."""
        blocks = signed_thinking(message)
        blocks += self._parts(place, message.parts)
        for use in message.tool_uses:
            self.uses_tools = True
            blocks.append({"toolUse": {"toolUseId": tool_id(use.id), "name": use.name, "input": use.object()}})
            blocks += cache_point(use.extra.get("cache_control"))
        return blocks

    def _parts(self, place: str, parts: list[Part]) -> list[Block]:
        """Blank texts are left out: Converse refuses a message that has one."""
        blocks: list[Block] = []
        for at, part in enumerate(parts):
            where = f"{place}.content[{at}]"
            if isinstance(part, Image):
                block = self._image(where, part)
            elif isinstance(part, File):
                block = self._file(where, part)
            elif isinstance(part, Audio):
                block = self._audio(where, part)
            else:
                block = {"text": part.text} if part.text.strip() else None
            if block is not None:
                blocks.append(block)
                blocks += [] if isinstance(part, Audio) else cache_point(getattr(part, "cache", None))
        return blocks

    def _image(self, where: str, part: Image) -> Block | None:
        if part.data is None:
            text = "The provider of this model fetches no images: send them as data: URLs."
            return self._left_out(f"{where}.image_url.url", text)
        form = _IMAGES.get(part.media_type or "")
        if form is None:
            return self._left_out(f"{where}.image_url.url", "The provider of this model takes PNG, JPEG, GIF and WebP.")
        return {"image": {"format": form, "source": {"bytes": part.data}}}

    def _audio(self, where: str, part: Audio) -> Block | None:
        if part.format not in _AUDIO:
            return self._left_out(f"{where}.input_audio.format")
        return {"audio": {"format": part.format, "source": {"bytes": part.data}}}

    def _file(self, where: str, part: File) -> Block | None:
        """A document, or a video. An address is never passed on: Bedrock would read S3 with our credentials."""
        if part.data is None:
            text = "The provider of this model fetches no files: send them as 'file_data'."
            return self._left_out(f"{where}.file.{'file_id' if part.url is None else 'file_data'}", text)
        if part.media_type in _IMAGES:
            return {"image": {"format": _IMAGES[part.media_type], "source": {"bytes": part.data}}}
        if part.media_type in _VIDEOS:
            return {"video": {"format": _VIDEOS[part.media_type], "source": {"bytes": part.data}}}
        stem, _, extension = (part.filename or "").rpartition(".")
        form = "pdf" if part.data.startswith(_PDF) else _DOCUMENTS.get(part.media_type or "")
        if form is None and extension.lower() in _DOCUMENTS.values():
            form = extension.lower()
        if form is None:
            return self._left_out(
                f"{where}.file.file_data", "The provider of this model does not take files of this type."
            )
        name = self._document_name(stem or extension)
        return {"document": {"format": form, "name": name, "source": {"bytes": part.data}}}

    def _document_name(self, stem: str) -> str:
        """In the characters that Converse allows, and no name twice."""
        plain = _NOT_IN_NAMES.sub(" ", stem).strip()[:_NAME_CHARS_MAX].strip() or "Document"
        name = plain
        while name in self._documents:  # twice at most, but for documents that are named like our numbered ones
            self._documents[plain] += 1
            name = f"{plain} ({self._documents[plain]})"
        self._documents[name] = 1
        return name

    def _left_out(self, param: str, message: str | None = None) -> Block | None:
        """Raises Unsupported, or leaves the part out where the configuration says so."""
        refuse(param, self._drop, message)
        return None


def cache_point(cache: Any) -> list[Block]:
    """The block that `cache_control` becomes; it stands behind what is to be kept."""
    if not isinstance(cache, dict):
        return []
    ttl = cache.get("ttl")
    return [{"cachePoint": {"type": "default", "ttl": ttl} if ttl in _TTLS else {"type": "default"}}]


def tool_id(given: str) -> str:
    """A call's id as Converse takes it: other servers' longer ones are replaced, always by the same."""
    return given if _TOOL_ID.fullmatch(given) else "call_" + sha256(given.encode()).hexdigest()[:32]


def signed_thinking(message: Message) -> list[Block]:
    """An earlier answer's thinking with its signatures. Where only the signature came back, its text is the message's
    reasoning. Thinking without a signature is left out: no model takes it."""
    blocks: list[Block] = []
    text = ""
    for piece in thinking_pieces(message.extra):
        data, signature, more = piece.get("data"), piece.get("signature"), piece.get("thinking")
        if isinstance(data, str) and data:
            kept = data if piece.get("encoding") == UNDECODED else b64encode(data.encode()).decode()
            blocks.append({"reasoningContent": {"redactedContent": kept}})
            continue
        text += more if isinstance(more, str) else ""
        if isinstance(signature, str) and signature:
            blocks.append({"reasoningContent": {"reasoningText": {"text": text, "signature": signature}}})
            text = ""
    signed = [found for block in blocks if (found := block["reasoningContent"].get("reasoningText"))]
    if len(signed) == 1 and not signed[0]["text"]:
        signed[0]["text"] = message.reasoning or ""
    return blocks
