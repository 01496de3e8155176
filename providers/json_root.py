"""The root object of a JSON body as byte spans, so that one member changes and every other byte stays.

Must not: re-encode what it does not replace, look at a byte more than a few times, or keep a second copy of a large
body. The parser validates the body once; for a small one it also gives the members. Written again in one of two usual
styles they are the body, or each of them is found in it, exactly or not at all. A large body, or one with a doubled or
an escaped name, is walked from member to member.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate

import msgspec

ROOT_MEMBERS_MAX = 1_000
"""Members of the root object, doubles included, unless the caller says otherwise."""

CHUNK_BYTES = 64 * 1024
"""What is looked at in one piece where a pass over a body makes copies."""

_skip = msgspec.json.Decoder(msgspec.Raw).decode
_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_encode = msgspec.json.Encoder().encode
_BLANK = rb"[ \t\r\n]*+"
_OPEN = re.compile(_BLANK + rb"\{" + _BLANK)
_COLON = re.compile(_BLANK + rb":" + _BLANK)
_NEXT = re.compile(_BLANK + rb"([,}])" + _BLANK)
_MEMBER = re.compile(_BLANK + rb"[{,]" + _BLANK + rb'"([^"\\]*+)"' + _BLANK + rb":" + _BLANK)
_END = re.compile(_BLANK + rb"\}")
_SCALAR = re.compile(rb"[^ \t\r\n,}]++")
_TRAILING = re.compile(r"trailing characters \(byte ([0-9]+)\)")
_TOKEN = re.compile(rb'[^"\[\]{}]*+(?:(")|([\[{])|[\]}])')
_TEXT = re.compile(rb'[^"\\]*+(?:(")|\\.)', re.DOTALL)
_CLOSES = {0x22: b'"', 0x5B: b"]", 0x7B: b"}"}
_UNQUOTED = bytes(byte for byte in range(256) if byte not in b'"[]{}')
_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")


class NotAnObject(Exception):
    """The body is not a JSON object, or has too many members."""


class RootObject:
    """`body` and the span of each root member's value, `spans[name] = (start, end)`; of a doubled one the last."""

    __slots__ = ("body", "duplicates", "spans")

    def __init__(self, body: bytes, members_max: int = ROOT_MEMBERS_MAX) -> None:
        """Raises NotAnObject with the parser's reason."""
        try:
            members = _members(body) if len(body) <= CHUNK_BYTES else _skip(body)
            if not body.isascii():
                _check_utf8(body)  # the parser skips over values without checking their UTF-8
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise NotAnObject(str(error)) from None
        self.body = body
        self.duplicates: set[str] = set()
        self.spans: dict[str, tuple[int, int]] = {}
        if isinstance(members, dict) and 0 < len(members) <= members_max:
            if self._placed(members):
                return
            self.spans.clear()
        self._walk(members_max)

    def _placed(self, members: dict[str, msgspec.Raw]) -> bool:
        """The spans from the lengths of the members, where the body is these as one of two usual writers puts them.

        Exact: values are written as they were read. An escaped name, or one beyond ASCII, is longer in the body than
        its characters, so the lengths add up to the whole only where there is none; False otherwise.
        """
        body, spans, at = self.body, self.spans, 1
        if _encode(members) == body:
            blank = 0
        elif body.startswith(b'{"') and _spaced(members) == body:
            blank = 1
        else:
            return self._found(members)
        for name, raw in members.items():
            start = at + len(name) + 3 + blank
            at = start + len(raw)
            spans[name] = start, at
            at += 1 + blank
        return at == len(body) + blank

    def _found(self, members: dict[str, msgspec.Raw]) -> bool:
        """Find the members in the body. False when they are not all of it, in this order, as they are written.

        Exact: a whole value is never the beginning of another one (but for numbers, which need what follows them), so
        a member that compares equal stands where it was found, and a doubled one leaves a member that nobody expects.
        """
        body, spans, at = self.body, self.spans, 0
        for name, raw in members.items():
            found = _MEMBER.match(body, at)
            if found is None or found[1] != name.encode():
                return False
            start = found.end()
            if not body.startswith(bytes(raw), start):
                return False
            at = start + len(raw)
            spans[name] = start, at
        return _END.match(body, at) is not None

    def _walk(self, members_max: int) -> None:
        body = self.body
        opened = _OPEN.match(body)
        if opened is None:  # a byte order mark or the like stands before it
            raise NotAnObject("the body does not start with {")
        at = opened.end()
        with memoryview(body) as view:
            for _ in range(members_max):
                if body.startswith(b"}", at):
                    return
                end = value_end(body, view, at)
                name = _name(body[at:end])
                colon = _COLON.match(body, end)
                start = colon.end() if colon else end
                end = value_end(body, view, start)
                if name in self.spans:
                    self.duplicates.add(name)
                self.spans[name] = (start, end)
                after = _NEXT.match(body, end)
                if after is None or after[1] == b"}":
                    return
                at = after.end()
        raise NotAnObject(f"the object has more than {members_max} members")

    def raw(self, name: str) -> bytes | None:
        """A member's value as sent, or None."""
        span = self.spans.get(name)
        return None if span is None else self.body[span[0] : span[1]]

    def replaced(self, changes: Mapping[str, bytes]) -> bytes:
        """The body with these members' values replaced, or added at the end where they were absent."""
        body = self.body
        spliced: list[tuple[tuple[int, int], bytes]] = []
        added: list[bytes] = []
        for name, value in changes.items():
            span = self.spans.get(name)
            if span is None:
                added.append(b"%b:%b" % (_encode(name), value))
            else:
                spliced.append((span, value))
        spliced.sort()
        parts: list[bytes] = []
        at = 0
        for (start, end), value in spliced:
            parts += (body[at:start], value)
            at = end
        if added:
            close = body.rindex(b"}")
            parts += (body[at:close], b"," if self.spans else b"", b",".join(added))
            at = close
        parts.append(body[at:])
        return b"".join(parts)


def _spaced(members: Mapping[str, msgspec.Raw]) -> bytes:
    """The object with a blank after each comma and colon, as Python's json writes it."""
    return b"{%b}" % b", ".join([b"%b: %b" % (_encode(name), raw) for name, raw in members.items()])


def value_end(body: bytes, view: memoryview, start: int) -> int:
    """Where the value at `start` of a valid body ends; it stands inside the root object, so something follows it.

    The parser is asked to read that value alone and tells where it found more: it looks at no byte behind that.
    """
    close = _CLOSES.get(body[start])
    if close is None:
        scalar = _SCALAR.match(body, start)
        return scalar.end() if scalar else start
    try:
        _skip(view[start:])
    except msgspec.DecodeError as error:
        found = _TRAILING.search(str(error))
        if found is not None:
            return body.rindex(close, start, start + int(found[1]) - 1) + 1  # the parser counts from 1
    return skipped(body, start)


def skipped(body: bytes, start: int) -> int:
    """What `value_end` returns for a string, array or object, without the parser: one step for each bracket and
    escape. Only a parser that words its errors in another way makes it needed."""
    depth, at = 0, start
    while token := _TOKEN.match(body, at):
        at = token.end()
        if token[1]:
            at = _string_end(body, at)
        else:
            depth += 1 if token[2] else -1
        if depth == 0:
            return at
    raise NotAnObject("a value has no end")


def _string_end(body: bytes, at: int) -> int:
    """Behind the quote that ends the string whose text begins at `at`."""
    while text := _TEXT.match(body, at):
        at = text.end()
        if text[1]:
            return at
    raise NotAnObject("a string has no end")


def _name(raw: bytes) -> str:
    try:
        return raw[1:-1].decode() if b"\\" not in raw else str(json.loads(raw))
    except ValueError as error:
        raise NotAnObject(f"a member's name cannot be read: {error}") from None


def _chunks(body: bytes) -> Iterator[bytes]:
    return (body[at : at + CHUNK_BYTES] for at in range(0, len(body), CHUNK_BYTES))


def _check_utf8(body: bytes) -> None:
    """Raises UnicodeDecodeError where the body is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for chunk in _chunks(body):
        decoder.decode(chunk)
    decoder.decode(b"", final=True)


def depth_exceeds(body: bytes, depth_max: int) -> bool:
    """Whether arrays and objects nest deeper than `depth_max`. Linear, in pieces; strings count for nothing."""
    if body.count(b"[") + body.count(b"{") <= depth_max:
        return False
    depth = 0
    for brackets in _brackets(body):
        steps = brackets.translate(_STEPS)
        opened = steps.count(b"\x01")
        if depth + opened > depth_max:
            with memoryview(steps).cast("b") as signed:
                if max(accumulate(signed, initial=depth)) > depth_max:
                    return True
        depth += 2 * opened - len(steps)
    return False


def _brackets(body: bytes) -> Iterator[bytes]:
    """All brackets outside of strings, in pieces. What is no JSON is cut wrongly only behind its first error."""
    quoted, carried = 0, b""
    for chunk in _chunks(body):
        # A backslash stands only in strings. Pairs go first, so that what is left before a quote escapes it.
        text = (carried + chunk).replace(b"\\\\", b"")
        carried = b"\\" if text.endswith(b"\\") else b""
        parts = text.replace(b'\\"', b"").translate(None, _UNQUOTED).split(b'"')
        yield b"".join(parts[quoted::2])
        quoted ^= len(parts) % 2 == 0


def any_duplicate(root: RootObject, names: Iterable[str]) -> str | None:
    """The first of `names` that the root holds twice, or None."""
    return next((name for name in names if name in root.duplicates), None) if root.duplicates else None
