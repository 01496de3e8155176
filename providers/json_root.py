"""The root object of a JSON body as byte spans, so that one member changes and every other byte stays.

Must not: re-encode what it does not replace. Values are located by decoding the root into raw members (C speed) and
walking the keys beside them, which also finds duplicates.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping

import msgspec

_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_KEY = re.compile(rb'[ \t\r\n]*("(?:[^"\\]|\\.)*")[ \t\r\n]*:[ \t\r\n]*')
_NEXT = re.compile(rb"[ \t\r\n]*([,}])")
_OPEN = re.compile(rb"[ \t\r\n]*\{")
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"')
_NOT_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")


class NotAnObject(Exception):
    """The body is not a JSON object."""


class RootObject:
    """`body` and the span of each root member's value, `spans[name] = (start, end)`; of a doubled one the last."""

    __slots__ = ("body", "duplicates", "first", "spans")

    def __init__(self, body: bytes) -> None:
        """Raises NotAnObject with the parser's reason."""
        try:
            members = _members(body)
            if not body.isascii():
                body.decode()  # the decoder skips over raw members without checking their UTF-8
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise NotAnObject(str(error)) from None
        self.body = body
        self.duplicates: set[str] = set()
        self.spans: dict[str, tuple[int, int]] = {}
        opened = _OPEN.match(body)
        if opened is None:  # the decoder accepted it, so a byte order mark or the like stands before it
            raise NotAnObject("the body does not start with {")
        self.first = opened.end()
        self._walk(members)

    def _walk(self, members: Mapping[str, msgspec.Raw]) -> None:
        at = self.first
        body = self.body
        while key := _KEY.match(body, at):
            name = _name(key[1])
            end = self._value_end(key.end(), memoryview(members[name]))
            if name in self.spans:
                self.duplicates.add(name)
            self.spans[name] = (key.end(), end)
            after = _NEXT.match(body, end)
            if after is None or after[1] == b"}":
                return
            at = after.end()

    def _value_end(self, start: int, last: memoryview) -> int:
        """Where the value at `start` ends. The decoder's length fits unless this is an earlier, other double."""
        end = start + len(last)
        if self.body[start:end] == last and _NEXT.match(self.body, end):
            return end
        text = self.body[start:].decode()
        _, length = json.JSONDecoder().raw_decode(text)
        return start + len(text[:length].encode())

    def raw(self, name: str) -> bytes | None:
        """A member's value as sent, or None."""
        span = self.spans.get(name)
        return None if span is None else self.body[span[0] : span[1]]

    def replaced(self, changes: Mapping[str, bytes]) -> bytes:
        """The body with these members' values replaced, or added at the end where they were absent."""
        parts: list[bytes] = []
        at = 0
        spans = sorted((self.spans[name], value) for name, value in changes.items() if name in self.spans)
        for (start, end), value in spans:
            parts += (self.body[at:start], value)
            at = end
        added = [
            b"%b:%b" % (msgspec.json.encode(name), value) for name, value in changes.items() if name not in self.spans
        ]
        if added:
            close = self.body.rindex(b"}")
            parts += (self.body[at:close], b"," if self.spans else b"", b",".join(added))
            at = close
        parts.append(self.body[at:])
        return b"".join(parts)


def _name(raw: bytes) -> str:
    return raw[1:-1].decode() if b"\\" not in raw else str(json.loads(raw))


def depth_exceeds(body: bytes, depth_max: int) -> bool:
    """Whether arrays and objects nest deeper than `depth_max`. Linear; strings are left out only when it matters."""
    if body.count(b"[") + body.count(b"{") <= depth_max:
        return False
    brackets = _STRING.sub(b"", body).translate(None, _NOT_BRACKETS)
    depth = 0
    for byte in brackets:
        if byte in b"[{":
            depth += 1
            if depth > depth_max:
                return True
        else:
            depth -= 1
    return False


def any_duplicate(root: RootObject, names: Iterable[str]) -> str | None:
    """The first of `names` that the root holds twice, or None."""
    return next((name for name in names if name in root.duplicates), None) if root.duplicates else None
