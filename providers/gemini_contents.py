"""OpenAI's messages as Google's `contents` and `systemInstruction`.

Must not: fetch an address or decode base64. Sources: as in `providers.gemini_request`.

System and developer messages, wherever they stand, become the one system instruction. Results of one round of calls
become one turn, because Google wants as many of them in it as there were calls. `extra_content.google` (`.vertex` from
Vertex's compatible endpoint) brings back what `providers.gemini` gave out: signatures and parts of other kinds.
"""

from __future__ import annotations

from typing import Any

import msgspec

from providers.chat_parts import data_url
from providers.chat_request import (
    Audio,
    BadRequest,
    Image,
    Message,
    Part,
    Refusal,
    Text,
    ToolUse,
    refuse,
)

NO_SIGNATURE = "skip_thought_signature_validator"
"""What Google documents for calls that another model made: Gemini 3 answers 400 to a call without a signature."""
_BEGINNINGS = (("iVBOR", "image/png"), ("/9j/", "image/jpeg"), ("R0lG", "image/gif"), ("UklG", "image/webp"))
_SUFFIXES = {
    **{suffix: f"image/{suffix}" for suffix in ("png", "jpeg", "webp", "gif", "heic", "heif", "bmp")},
    **{suffix: f"audio/{suffix}" for suffix in ("wav", "mp3", "aiff", "aac", "ogg", "flac")},
    **{suffix: f"video/{suffix}" for suffix in ("mp4", "mpeg", "webm", "mpg", "avi")},
    "jpg": "image/jpeg",
    "mov": "video/quicktime",
    "pdf": "application/pdf",
    "json": "application/json",
    "txt": "text/plain",
    "md": "text/markdown",
    "html": "text/html",
    "csv": "text/csv",
    "xml": "text/xml",
}
_decode = msgspec.json.Decoder().decode


_CODE = ("executableCode", "codeExecutionResult", "thoughtSignature", "thought_signature")


class Contents:
    """Takes the messages in order. `signs`: the model wants signatures and ids; `vertex`: the Vertex rules apply."""

    def __init__(self, *, signs: bool, vertex: bool, drop: frozenset[str]) -> None:
        self._signs = signs
        self._vertex = vertex
        self._drop = drop
        self._system: list[dict[str, Any]] = []
        self._turns: list[dict[str, Any]] = []
        self._names: dict[str, str] = {}
        self._results: list[dict[str, Any]] | None = None

    def add(self, at: int, message: Message) -> None:
        """The message at place `at` of the request. Raises Unsupported and BadRequest."""
        if message.role == "tool":
            self._result(at, message)
            return
        self._results = None
        parts = [told for part in message.parts if (told := self._part(at, part)) is not None]
        if message.role in ("system", "developer"):
            if any("text" not in part for part in parts):
                refuse(f"messages[{at}].content", self._drop)
            self._system += [part for part in parts if "text" in part]
        elif message.role == "user":
            self._turn("user", parts)
        else:
            self._turn("model", self._answered(at, message, parts))

    def told(self) -> dict[str, Any]:
        """`contents` and `systemInstruction`. Google wants a turn: alone, the system's text is the user's."""
        if not self._turns and not self._system:
            raise BadRequest("messages", "'messages' must have some content.")
        if not self._turns:
            return {"contents": [{"role": "user", "parts": self._system}]}
        told: dict[str, Any] = {"contents": self._turns}
        if self._system:
            told["systemInstruction"] = {"parts": self._system}
        return told

    def _turn(self, role: str, parts: list[dict[str, Any]]) -> None:
        if parts:  # a turn without parts is refused
            self._turns.append({"role": role, "parts": parts})

    def _answered(self, at: int, message: Message, parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """An earlier answer's parts: those of other kinds, the text with its signature, images, calls."""
        if message.extra.get("audio") is not None:
            refuse(f"messages[{at}].audio", self._drop)
        google = _google(message.extra)
        others = google.get("parts")
        before = [_of_code(part) for part in others if isinstance(part, dict)] if isinstance(others, list) else []
        signature = _signature(google)
        if signature is not None:
            if not parts or "text" not in parts[-1]:
                parts.append({"text": ""})
            parts[-1]["thoughtSignature"] = signature
        calls = [self._call(use) for use in message.tool_uses]
        if self._signs and calls and not any("thoughtSignature" in call for call in calls):
            calls[0]["thoughtSignature"] = NO_SIGNATURE
        return [*filter(None, before), *parts, *_images(message.extra.get("images")), *calls]

    def _call(self, use: ToolUse) -> dict[str, Any]:
        self._names[use.id] = use.name
        call: dict[str, Any] = {"name": use.name, "args": _object(use.arguments.strip() or "{}", "arguments")}
        if self._signs:
            call["id"] = use.id
        part: dict[str, Any] = {"functionCall": call}
        signature = _signature(_google(use.extra))
        if signature is not None:
            part["thoughtSignature"] = signature
        return part

    def _result(self, at: int, message: Message) -> None:
        """A tool's result. Google knows calls by their functions' names: that of the call with this id."""
        call_id = message.tool_call_id or ""
        name = self._names.get(call_id, message.name)
        if name is None:
            raise BadRequest(f"messages[{at}].tool_call_id", f"No earlier message has a tool call '{call_id[:100]}'.")
        answer: dict[str, Any] = {"name": name, "response": _object(message.text(), "output")}
        if self._signs:
            answer["id"] = call_id
        media = [part for part in message.parts if not isinstance(part, Text | Refusal)]
        told = [inner for part in media if (inner := self._part(at, part)) is not None and "inlineData" in inner]
        if told and self._signs:
            answer["parts"] = told
        if len(told) < len(media) or (media and not self._signs):
            refuse(f"messages[{at}].content", self._drop)
        if self._results is None:
            self._results = []
            self._turns.append({"role": "user", "parts": self._results})
        self._results.append({"functionResponse": answer})

    def _part(self, at: int, part: Part) -> dict[str, Any] | None:
        """One part, None for an empty one (and for one that the configuration says is dropped)."""
        if isinstance(part, Text | Refusal):
            return {"text": part.text} if part.text else None
        if isinstance(part, Audio):
            return _inline(f"audio/{part.format}", part.data)
        media_type = part.media_type
        if part.data is not None:
            if isinstance(part, Image):
                return _inline(media_type or _begun(part.data), part.data)
            return _inline(media_type or _suffixed(part.filename) or "application/pdf", part.data)
        if part.url is not None:
            usual = "image/jpeg" if isinstance(part, Image) else "application/pdf"
            return self._linked(part.url, media_type or _suffixed(part.url), usual)
        message = "The provider of this model does not know files by OpenAI's ids."
        refuse(f"messages[{at}].content", self._drop, message)
        return None

    def _linked(self, url: str, media_type: str | None, usual: str) -> dict[str, Any]:
        """An address: Google fetches it (file-input-methods, "External URLs"). Vertex must be told its type."""
        told = {"fileUri": url}
        if media_type is not None or self._vertex:
            told["mimeType"] = media_type or usual
        return {"fileData": told}


def _of_code(part: dict[str, Any]) -> dict[str, Any]:
    """Of a part that came back as it was sent, what the model's own code is. Anything else (an address above all, which
    Google would read with the operator's rights) goes the way of messages, where it is checked, or nowhere."""
    return {name: part[name] for name in _CODE if name in part} if part.keys() & set(_CODE[:2]) else {}


def _inline(media_type: str, data: str) -> dict[str, Any]:
    return {"inlineData": {"mimeType": media_type, "data": data}}


def _begun(data: str) -> str:
    return next((kind for start, kind in _BEGINNINGS if data.startswith(start)), "image/jpeg")


def _suffixed(name: str | None) -> str | None:
    """The media type that a file's name or an address ends in."""
    path = (name or "").partition("?")[0].partition("#")[0]
    _, dot, suffix = path.rpartition(".")
    return _SUFFIXES.get(suffix.lower()) if dot else None


def _object(text: str, otherwise: str) -> msgspec.Raw | dict[str, str]:
    """Google takes objects only: the text as it is where it is one, else an object with the text in `otherwise`
    ("output" is Google's own name for the result of a function that is no object)."""
    try:
        value = _decode(text)
    except (msgspec.DecodeError, RecursionError):
        value = None
    return msgspec.Raw(text.encode()) if isinstance(value, dict) else {otherwise: text}


def _google(extra: dict[str, Any]) -> dict[str, Any]:
    content = extra.get("extra_content")
    found = (content.get("google") or content.get("vertex")) if isinstance(content, dict) else None
    return found if isinstance(found, dict) else {}


def _signature(google: dict[str, Any]) -> str | None:
    signature = google.get("thought_signature")
    return signature if isinstance(signature, str) and signature else None


def _images(given: Any) -> list[dict[str, Any]]:
    """Images of an earlier answer, as `providers.gemini` gave them out."""
    parts = []
    for image in given if isinstance(given, list) else []:
        described = image.get("image_url") if isinstance(image, dict) else None
        url = described.get("url") if isinstance(described, dict) else None
        media_type, data = data_url(url) if isinstance(url, str) else (None, None)
        if data is not None:
            parts.append(_inline(media_type or "image/png", data))
    return parts
