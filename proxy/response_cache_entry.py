"""A kept answer: what of it is stored, how it is packed, and the recording of a stream while it goes to its client.

A stream is kept as the payloads of its frames, so that it is replayed as it was; a whole answer as its body. The two
are kept apart, neither is made from the other. What is told of the bill is put in anew each time.
Must not: speak to Redis, decide what may be kept, or touch a stream that nobody wants to keep.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

import msgspec

from metering.pricing import TokenUsage
from providers.json_root import NotAnObject, RootObject
from proxy.client_stream import ClientStream

FRAME_BYTES = 48
"""What a frame in memory needs beside its bytes."""
WRITE_BYTES = 64 * 1024
"""About how much of a replayed stream goes out in one write."""
_PACK_LEVEL = 1  # chunks are alike: more effort gains little


class Kept(msgspec.Struct, frozen=True, array_like=True):
    """One answer. `last` is the frame, or the whole body, that carries the bill, `usage` the object in it, marked as
    cached and without a cost (both empty for a stream that asked for no usage). `micros` is what the first call was
    charged; `stored_ms` milliseconds of the wall clock."""

    payloads: list[bytes]
    last: bytes
    usage: bytes
    tokens: TokenUsage
    micros: int
    stored_ms: int

    def billed(self, cost: str | None, members: bytes) -> bytes:
        """`last` with this call's bill: `cost` in credits where it is known, `members` a JSON object about us."""
        usage = self.usage if cost is None else b'%b,"cost":%b}' % (self.usage[:-1], cost.encode())
        return RootObject(self.last).replaced({"usage": usage, "x_tollgate": members})

    def blocks(self) -> Iterator[list[bytes]]:
        """The payloads in groups, each for one write."""
        block: list[bytes] = []
        size = 0
        for payload in self.payloads:
            block.append(payload)
            size += len(payload)
            if size >= WRITE_BYTES:
                yield block
                block, size = [], 0
        if block:
            yield block

    def size(self) -> int:
        """Bytes in memory, roughly."""
        return sum(map(len, self.payloads)) + FRAME_BYTES * len(self.payloads) + len(self.last) + len(self.usage)

    def age_s(self, now_ms: int) -> int:
        """Whole seconds since it was stored."""
        return max(0, now_ms - self.stored_ms) // 1000


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Kept).decode
_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_json = msgspec.json.Encoder().encode


def pack(kept: Kept) -> bytes:
    """The stored form: its length unpacked in four bytes, then zlib."""
    data = _encode(kept)
    return len(data).to_bytes(4, "big") + zlib.compress(data, _PACK_LEVEL)


def unpack(stored: bytes, bytes_max: int) -> Kept | None:
    """What `pack` made, when it is not damaged and not larger than `bytes_max` unpacked."""
    size = int.from_bytes(stored[:4], "big")
    if not 0 < size <= bytes_max:
        return None
    try:
        unpacker = zlib.decompressobj()
        data = unpacker.decompress(stored[4:], size + 1)
        return _decode(data) if len(data) == size and unpacker.eof else None  # at its end the checksum was right
    except (zlib.error, msgspec.DecodeError):
        return None


def marked(last: bytes) -> bytes | None:
    """The usage object of a frame or body as later calls see it: all of the prompt counts as cached, and nothing was
    paid for it yet. None where there is none that can be read."""
    try:
        raw = RootObject(last).raw("usage")
        usage = _members(raw) if raw is not None else {}
        if "prompt_tokens" not in usage:
            return None
        details = _members(usage.get("prompt_tokens_details", b"{}")) if _given(usage) else {}
    except (NotAnObject, msgspec.DecodeError):
        return None
    details["cached_tokens"] = usage["prompt_tokens"]
    usage.pop("cost", None)
    usage["prompt_tokens_details"] = msgspec.Raw(_json(details))
    return _json(usage)


def stripped(last: bytes) -> bytes:
    """A frame or body without what it told the first client of its bill."""
    return RootObject(last).replaced({"x_tollgate": b"{}"}) if last else b""


def _given(usage: dict[str, msgspec.Raw]) -> bool:
    return bytes(usage.get("prompt_tokens_details", b"null")) != b"null"


class Room:
    """How many bytes of answers a worker holds, being recorded or given, and the bound on their sum. An answer that is
    given to many at once is held once."""

    __slots__ = ("_given", "left")

    def __init__(self, bytes_max: int) -> None:
        self.left = bytes_max
        self._given: dict[int, int] = {}

    def take(self, kept: Kept) -> bool:
        """Hold an answer while it is given, until `give_back`; False when there is no room."""
        holders = self._given.get(id(kept), 0)
        if not holders:
            size = kept.size()
            if size > self.left:
                return False
            self.left -= size
        self._given[id(kept)] = holders + 1
        return True

    def give_back(self, kept: Kept) -> None:
        """One that was taken is held no longer."""
        holders = self._given.pop(id(kept))
        if holders > 1:
            self._given[id(kept)] = holders - 1
        else:
            self.left += kept.size()


class Recording(ClientStream):
    """A client's stream whose payloads are remembered, as long as they are within `bytes_max` and the worker has room;
    else all of it is forgotten."""

    __slots__ = ("_bytes_left", "_held", "_room", "payloads", "whole")

    def record(self, bytes_max: int, room: Room) -> None:
        """Begin. Call before the first write, and `release` in the end."""
        self.payloads: list[bytes] | None = []
        self._held = 0
        self._bytes_left = bytes_max
        self._room = room
        self.whole = False
        """Whether the client was given the end of it."""

    def release(self) -> None:
        """What was remembered is no longer held here."""
        self._room.left += self._held
        self._held, self.payloads = 0, None

    def written(self, payloads: Sequence[bytes]) -> bool:
        """As ever."""
        done = super().written(payloads)
        if done and self.payloads is not None:
            self._remember(payloads)
        return done

    def finished(self, payloads: Sequence[bytes]) -> bool:
        """As ever."""
        done = super().finished(payloads)
        if done and self.payloads is not None:
            self._remember(payloads)
            self.whole = True
        return done

    def _remember(self, payloads: Sequence[bytes]) -> None:
        size = sum(map(len, payloads))
        held = size + FRAME_BYTES * len(payloads)
        self._bytes_left -= size
        if self._bytes_left < 0 or held > self._room.left:
            self.release()
        elif self.payloads is not None:
            self._held += held
            self._room.left -= held
            self.payloads += payloads
