"""Messages of `application/vnd.amazon.eventstream` as bytes, and transcripts of them in a form that people can read.

A transcript has one message a line: `event <type> <payload>`, `exception <type> <payload>`, `error <code> <text>`; and
what goes wrong on the way: `damaged <type> <payload>` (a bit is flipped), `cut <type> <payload>` (half of it is
missing), `bytes <hex>`.
"""

from __future__ import annotations

from pathlib import Path
from struct import pack
from zlib import crc32

TRANSCRIPTS = Path(__file__).parent.parent / "transcripts" / "bedrock"


def message(headers: dict[str, str], payload: bytes) -> bytes:
    """One message whose headers are text."""
    block = b"".join(
        pack(">B", len(name)) + name.encode() + pack(">BH", 7, len(value.encode())) + value.encode()
        for name, value in headers.items()
    )
    return raw_message(block, payload)


def raw_message(block: bytes, payload: bytes) -> bytes:
    """One message around a block of headers."""
    prelude = pack(">II", len(block) + len(payload) + 16, len(block))
    head = prelude + pack(">I", crc32(prelude))
    return head + block + payload + pack(">I", crc32(head + block + payload))


def event(kind: str, payload: bytes, message_type: str = "event") -> bytes:
    """A message as Bedrock sends it."""
    headers = {f":{message_type}-type": kind, ":content-type": "application/json", ":message-type": message_type}
    return message(headers, payload)


def wire(name: str) -> bytes:
    """The bytes of a transcript."""
    return b"".join(_line(line) for line in (TRANSCRIPTS / f"{name}.txt").read_text().splitlines() if line)


def _line(line: str) -> bytes:
    kind, _, rest = line.partition(" ")
    if kind == "bytes":
        return bytes.fromhex(rest)
    name, _, payload = rest.partition(" ")
    if kind == "error":
        return message({":message-type": "error", ":error-code": name, ":error-message": payload}, b"")
    raw = event(name, payload.encode(), "exception" if kind == "exception" else "event")
    if kind == "damaged":
        return raw[:-6] + bytes([raw[-6] ^ 1]) + raw[-5:]
    return raw[: len(raw) // 2] if kind == "cut" else raw
