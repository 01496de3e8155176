"""The parts of a message's content in OpenAI's shape: text, images, audio, files, refusals.

Must not: fetch an address, decode base64, or know a provider.
Shapes: OpenAI's API reference, "create chat completion", the content parts of each message.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from providers.chat_members import Members
from providers.codec import BadRequest

PARTS_MAX = 20_000
"""Content parts, tool calls and tools of a request that is translated. Each becomes objects of its own: microseconds,
and many times its bytes."""

_DATA_URL = re.compile(r"data:([^;,]*)(?:;[^;,]*)*?;base64,", re.IGNORECASE)
_WEB = re.compile(r"https?://", re.IGNORECASE)


class Text(msgspec.Struct):
    """`cache` is the part's `cache_control` as given, here and in other parts."""

    text: str
    cache: dict[str, Any] | None = None


class Image(msgspec.Struct):
    """At a `url`, or `data` (base64 text) of a `media_type`."""

    url: str | None = None
    media_type: str | None = None
    data: str | None = None
    detail: str | None = None
    cache: dict[str, Any] | None = None


class Audio(msgspec.Struct):
    """`data` is base64 text; `format` as OpenAI names it ("wav", "mp3")."""

    data: str
    format: str


class File(msgspec.Struct):
    """A document (or a video): `data` (base64 text), a `url`, or the provider's own `file_id`."""

    filename: str | None = None
    media_type: str | None = None
    data: str | None = None
    url: str | None = None
    file_id: str | None = None
    cache: dict[str, Any] | None = None


class Refusal(msgspec.Struct):
    """What an earlier answer refused with."""

    text: str


Part = Text | Image | Audio | File | Refusal


def check_parts(root: dict[str, Any]) -> None:
    """Raises BadRequest for a decoded request with more parts than are translated, before anything is made of them."""
    messages = root.get("messages")
    found = sum(_length(root.get(name)) for name in ("tools", "functions"))
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, dict):
            found += sum(map(_length, message.values()))
    if found > PARTS_MAX:
        raise BadRequest("messages", f"The request has more than {PARTS_MAX} content parts, tool calls and tools.")


def _length(value: Any) -> int:
    return len(value) if isinstance(value, list) else 0


def read_content(given: Members) -> list[Part]:
    """The `content` of a message. Raises BadRequest."""
    value = given.any("content")
    if value is None:
        return []
    if isinstance(value, str):
        return [Text(value)]
    if not isinstance(value, list):
        given.wrong("content", "a string or an array of parts")
    path = given.path("content")
    return [
        Text(part) if isinstance(part, str) else _part(Members(part, f"{path}[{at}]")) for at, part in enumerate(value)
    ]


def _part(given: Members) -> Part:
    kind = given.needed("type")
    cache = given.object("cache_control")
    if kind == "text":
        return Text(given.needed("text"), cache)
    if kind == "refusal":
        return Refusal(given.needed("refusal"))
    if kind == "image_url":
        return _image(given, cache)
    if kind == "input_audio":
        audio = given.members("input_audio")
        if audio is None:
            given.wrong("input_audio", "an object")
        return Audio(audio.needed("data"), audio.text("format") or "wav")
    if kind in ("file", "video_url"):
        described = given.members(kind)
        if described is None:
            given.wrong(kind, "an object")
        return _file(described, cache) if kind == "file" else _video(described, cache)
    return given.wrong("type", "'text', 'image_url', 'input_audio', 'file', 'video_url' or 'refusal'")


def _image(given: Members, cache: dict[str, Any] | None) -> Image:
    value = given.any("image_url")
    described = Members({"url": value} if isinstance(value, str) else value, given.path("image_url"))
    url, detail = described.needed("url"), described.text("detail")
    media_type, data = data_url(url)
    if data is not None:
        return Image(None, media_type or described.text("format"), data, detail, cache)
    if not _WEB.match(url):
        described.wrong("url", "an address (http, https) or a data: URL in base64")
    return Image(url, described.text("format"), None, detail, cache)


def _file(given: Members, cache: dict[str, Any] | None) -> File:
    """OpenAI's `file_data` is a data: URL or bare base64; others put addresses there, or into `file_id`."""
    file = File(given.text("filename"), given.text("format"), None, None, given.text("file_id"), cache)
    data = given.text("file_data") or given.text("url")
    if data is None and file.file_id is not None and _WEB.match(file.file_id):
        data, file.file_id = file.file_id, None
    if data is not None:
        media_type, file.data = data_url(data)
        file.media_type = media_type or file.media_type
        if file.data is None and _WEB.match(data):
            file.url = data
        elif file.data is None and data.startswith("data:"):
            given.wrong("file_data", "in base64")
        elif file.data is None:
            file.data = data
    if file.data is None and file.url is None and file.file_id is None:
        given.wrong("file_data", "there, or 'file_id'")
    return file


def _video(given: Members, cache: dict[str, Any] | None) -> File:
    """Not OpenAI's, but what servers and clients of video models agreed on."""
    file = _file(Members({"file_data": given.needed("url"), "format": given.text("format")}, given.path("url")), cache)
    file.media_type = file.media_type or "video/mp4"
    return file


def data_url(url: str) -> tuple[str | None, str | None]:
    """(media type, base64 text) of a `data:` URL; Nones of anything else."""
    found = _DATA_URL.match(url)
    return (None, None) if found is None else (found[1].lower() or None, url[found.end() :])
