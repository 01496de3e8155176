"""Ids the gateway mints: sessions (UUIDv7, sortable by time; the journal's partition comes from it) and requests.

Must not: be guessable; the random part is 74 bits from the system.
"""

from __future__ import annotations

import os
import time

_VARIANT = {digit: "89ab"[int(digit, 16) & 3] for digit in "0123456789abcdef"}
"""A random hex digit with its two upper bits as RFC 9562 wants them."""


def session_id() -> str:
    """A UUIDv7 as text (RFC 9562, 5.7): 48 bits of Unix milliseconds, then version, variant and randomness."""
    moment, random = f"{time.time_ns() // 1_000_000:012x}", os.urandom(10).hex()
    return f"{moment[:8]}-{moment[8:]}-7{random[:3]}-{_VARIANT[random[3]]}{random[4:7]}-{random[7:19]}"


def request_id() -> str:
    """A random UUID: it goes on to providers too, and some servers refuse an x-request-id of any other form."""
    random = os.urandom(16).hex()
    return f"{random[:8]}-{random[8:12]}-4{random[12:15]}-{_VARIANT[random[15]]}{random[16:19]}-{random[19:31]}"
