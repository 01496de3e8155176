"""Ids the gateway mints: sessions (UUIDv7, sortable by time; the journal's partition comes from it) and requests.

Must not: be guessable; the random part is 74 bits from the system.
"""

from __future__ import annotations

import os
import time

_VARIANT = {digit: "89ab"[int(digit, 16) & 3] for digit in "0123456789abcdef"}
"""A random hex digit with its two upper bits as RFC 9562 wants them."""


class _Random:
    """Random hex digits from the system, fetched for many ids at once: asking it costs as much as making the id."""

    BYTES = 1024

    def __init__(self) -> None:
        self._digits = ""
        self._at = 0
        os.register_at_fork(after_in_child=self._forget)  # a child must not mint its parent's ids

    def _forget(self) -> None:
        self._digits, self._at = "", 0

    def take(self, count: int) -> str:
        """The next `count` digits; none is given twice."""
        at = self._at
        if at + count > len(self._digits):
            self._digits, at = os.urandom(self.BYTES).hex(), 0
        self._at = at + count
        return self._digits[at : self._at]


_take = _Random().take


def session_id() -> str:
    """A UUIDv7 as text (RFC 9562, 5.7): 48 bits of Unix milliseconds, then version, variant and randomness."""
    moment, random = f"{time.time_ns() // 1_000_000:012x}", _take(19)
    return f"{moment[:8]}-{moment[8:]}-7{random[:3]}-{_VARIANT[random[3]]}{random[4:7]}-{random[7:19]}"


def request_id() -> str:
    """A random UUID: it goes on to providers too, and some servers refuse an x-request-id of any other form."""
    random = _take(31)
    return f"{random[:8]}-{random[8:12]}-4{random[12:15]}-{_VARIANT[random[15]]}{random[16:19]}-{random[19:31]}"
