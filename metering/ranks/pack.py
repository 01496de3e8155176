"""The packed form of a rank file: token lengths, then the tokens themselves, in LZMA. Also the tool that makes it.

A `.tiktoken` file says "<base64 token> <rank>" a line, with ranks counting from 0. Dropping base64 and the ranks, and
putting all lengths first, gives LZMA a third less to store than the file itself. Must not: download anything.

`python -m metering.ranks.pack SRC OUT` packs every known SRC/<name>.tiktoken to OUT/<name>.xz and prints
the line for `PACKED_SHA256` in `metering/ranks/__init__.py` (compressed bytes may differ between liblzma releases).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import lzma
import struct
import sys
from collections.abc import Iterable
from pathlib import Path

PUBLISHED_SHA256 = {
    "o200k_base": "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
    "cl100k_base": "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
}
"""SHA-256 of the `.tiktoken` files as OpenAI publishes them (tiktoken's `openai_public.py` names the same)."""

_COUNT = struct.Struct(">I")
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 4 << 20}]
"""A dictionary as large as the data: preset 9 would make every reader allocate 64 MiB."""


class NotARankFile(ValueError):
    """The bytes are not a rank file in the expected form."""


def pack(tokens: list[bytes]) -> bytes:
    """The packed form of `tokens`, whose index is their rank. Raises NotARankFile for a token over 255 bytes."""
    if any(not 0 < len(token) <= 255 for token in tokens):
        raise NotARankFile("a token has 1 to 255 bytes")
    body = _COUNT.pack(len(tokens)) + bytes(map(len, tokens)) + b"".join(tokens)
    return lzma.compress(body, format=lzma.FORMAT_XZ, filters=_FILTERS)


def unpack(blob: bytes) -> list[bytes]:
    """The tokens in the order of their ranks. Raises NotARankFile when `blob` is not what `pack` made."""
    try:
        body = lzma.decompress(blob, format=lzma.FORMAT_XZ)
    except lzma.LZMAError as error:
        raise NotARankFile(str(error)) from None
    start = _COUNT.size
    if len(body) < start:
        raise NotARankFile("too short for its header")
    (count,) = _COUNT.unpack_from(body)
    at = start + count
    if at + sum(body[start:at]) != len(body):
        raise NotARankFile("its lengths and its tokens disagree")
    tokens: list[bytes] = []
    for size in body[start : start + count]:
        tokens.append(body[at : at + size])
        at += size
    return tokens


def read_tiktoken(raw: bytes) -> list[bytes]:
    """The tokens of a `.tiktoken` file. Raises NotARankFile when a line is odd or the ranks do not count from 0."""
    tokens: list[bytes] = []
    for number, line in enumerate(raw.splitlines()):
        encoded, _, rank = line.partition(b" ")
        if rank != str(number).encode():
            raise NotARankFile(f"line {number + 1}: expected rank {number}")
        try:
            tokens.append(base64.b64decode(encoded, validate=True))
        except binascii.Error as error:
            raise NotARankFile(f"line {number + 1}: {error}") from None
    return tokens


def as_tiktoken(tokens: Iterable[bytes]) -> bytes:
    """The `.tiktoken` file of these tokens, byte for byte as published."""
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


def main(arguments: list[str]) -> int:
    """Pack a folder. Returns the exit code: 2 for wrong use, 1 when a source file is not the published one."""
    if len(arguments) != 2:
        sys.stderr.write("usage: python -m metering.ranks.pack SRC OUT\n")
        return 2
    source, out = map(Path, arguments)
    out.mkdir(parents=True, exist_ok=True)
    for name, expected in PUBLISHED_SHA256.items():
        try:
            raw = (source / f"{name}.tiktoken").read_bytes()
        except OSError as error:
            sys.stderr.write(f"{source / name}.tiktoken: {error.strerror}\n")
            return 1
        if hashlib.sha256(raw).hexdigest() != expected:
            sys.stderr.write(f"{source / name}.tiktoken: not the published file (sha256 {expected})\n")
            return 1
        blob = pack(read_tiktoken(raw))
        (out / f"{name}.xz").write_bytes(blob)
        sys.stdout.write(f'    "{name}": "{hashlib.sha256(blob).hexdigest()}",\n')
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
