"""`application/vnd.amazon.eventstream`, bytes in, messages out: AWS's binary framing of streamed answers.

Must not: know what a message means, or keep more than one unfinished message.
Source of the format: AWS's "event stream encoding" (Smithy, Amazon Event Stream specification; the same in Amazon
Transcribe's developer guide): a prelude of two lengths and their CRC-32, typed headers, payload, CRC-32 of it all.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from uuid import UUID
from zlib import crc32

import msgspec

HeaderValue = bool | int | bytes | str | UUID

_PRELUDE = struct.Struct(">III")  # total length, length of the headers, CRC-32 of the two
_CHECKSUM = struct.Struct(">I")
_SHORT = struct.Struct(">H")
_OVERHEAD = _PRELUDE.size + _CHECKSUM.size
_NUMBERS = {2: struct.Struct(">b"), 3: struct.Struct(">h"), 4: struct.Struct(">i"), 5: struct.Struct(">q")}
_NUMBERS[8] = _NUMBERS[5]  # a timestamp: milliseconds since 1970
_TRUE, _FALSE, _BYTES, _TEXT, _UUID = 0, 1, 6, 7, 9
_UUID_BYTES = 16


class DamagedStream(Exception):
    """The bytes are no event stream, or not what was sent."""


class MessageTooLarge(DamagedStream):
    """A message is above the bound."""


class Message(msgspec.Struct, frozen=True):
    """Headers by name (timestamps in milliseconds) and the payload as sent."""

    headers: Mapping[str, HeaderValue]
    payload: bytes

    def text(self, name: str) -> str:
        """A header's text; "" where it is absent or no text."""
        value = self.headers.get(name)
        return value if isinstance(value, str) else ""


class EventStreamSplitter:
    """Feed bytes as they arrive; get each message whose last byte has come and whose checksums agree."""

    __slots__ = ("_block", "_buffer", "_headers", "_headers_size", "_message_bytes_max", "_need")

    def __init__(self, message_bytes_max: int) -> None:
        self._buffer = bytearray()
        self._message_bytes_max = message_bytes_max
        self._need = _PRELUDE.size
        self._headers_size = -1  # unknown: the prelude of the next message has not been read
        self._block = b""
        self._headers: Mapping[str, HeaderValue] = {}

    @property
    def unfinished(self) -> bool:
        """Whether a part of a message is waiting for its rest."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> Iterator[Message]:
        """Messages completed by `data`, to be taken at once. After those before the damage it raises DamagedStream; the
        splitter is unusable then."""
        buffer, at = self._buffer, 0
        buffer += data
        try:
            while len(buffer) - at >= self._need:
                if self._headers_size < 0:
                    self._prelude(bytes(buffer[at : at + _PRELUDE.size]))
                    continue
                raw = bytes(buffer[at : at + self._need])
                at += self._need
                message = self._message(raw)
                self._need, self._headers_size = _PRELUDE.size, -1
                yield message
        finally:
            del buffer[:at]

    def _prelude(self, raw: bytes) -> None:
        """Read as soon as it is there, so that what is no event stream is not gathered."""
        size, headers_size, checksum = _PRELUDE.unpack(raw)
        if crc32(raw[:8]) != checksum:
            raise DamagedStream("a prelude's checksum is wrong")
        if size > self._message_bytes_max:
            raise MessageTooLarge(f"a message has {size} bytes")
        if size < _OVERHEAD + headers_size:
            raise DamagedStream("a message is shorter than its headers")
        self._need, self._headers_size = size, headers_size

    def _message(self, raw: bytes) -> Message:
        (checksum,) = _CHECKSUM.unpack_from(raw, len(raw) - _CHECKSUM.size)
        if crc32(memoryview(raw)[: -_CHECKSUM.size]) != checksum:
            raise DamagedStream("a message's checksum is wrong")
        start = _PRELUDE.size + self._headers_size
        block = raw[_PRELUDE.size : start]
        if block != self._block:  # most messages of a stream have the headers of the one before
            self._headers, self._block = read_headers(block), block
        return Message(self._headers, raw[start : -_CHECKSUM.size])


def read_headers(block: bytes) -> dict[str, HeaderValue]:
    """A message's headers. Raises DamagedStream."""
    headers: dict[str, HeaderValue] = {}
    at = 0
    try:
        while at < len(block):
            end = at + 1 + block[at]
            name = _whole(block, at + 1, end).decode()
            value, at = _value(block, end + 1, block[end])
            if name in headers:
                raise DamagedStream("a message has a header twice")
            headers[name] = value
    except (IndexError, struct.error, UnicodeDecodeError):
        raise DamagedStream("a message's headers cannot be read") from None
    return headers


def _value(block: bytes, at: int, kind: int) -> tuple[HeaderValue, int]:
    """A value of this type, and where it ends."""
    if kind in (_TRUE, _FALSE):
        return kind == _TRUE, at
    number = _NUMBERS.get(kind)
    if number is not None:
        return int(number.unpack_from(block, at)[0]), at + number.size
    if kind == _UUID:
        return UUID(bytes=_whole(block, at, at + _UUID_BYTES)), at + _UUID_BYTES
    if kind not in (_BYTES, _TEXT):
        raise DamagedStream(f"a header has the unknown type {kind}")
    start = at + _SHORT.size
    end = start + int(_SHORT.unpack_from(block, at)[0])
    raw = _whole(block, start, end)
    return (raw.decode() if kind == _TEXT else raw), end


def _whole(block: bytes, start: int, end: int) -> bytes:
    if end > len(block):
        raise IndexError
    return block[start:end]
