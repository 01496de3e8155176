"""Ids the gateway mints: sessions (UUIDv7, sortable by time; the journal's partition comes from it) and requests.

Must not: be guessable; the random part is 74 bits from the system.
"""

from __future__ import annotations

import os
import time
import uuid


def session_id() -> str:
    """A UUIDv7 as text (RFC 9562, 5.7): 48 bits of Unix milliseconds, then version, variant and randomness."""
    value = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10), "big")
    value = value & ~(0xF << 76) & ~(0x3 << 62) | 0x7 << 76 | 0x2 << 62
    return str(uuid.UUID(int=value))


def request_id() -> str:
    """A random UUID: it goes on to providers too, and some servers refuse an x-request-id of any other form."""
    return str(uuid.UUID(bytes=os.urandom(16), version=4))
