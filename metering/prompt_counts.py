"""Token counts of texts that come again: a conversation sends its history with every turn, an application its
instructions with every call.

Must not: keep a long text (only its digest), or let one account learn by the clock what another has sent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import chain

from metering.token_counter import Encoder, count_text

TEXTS_MAX = 4_096
"""Counts of one generation; two are kept."""
PLAIN_CHARS_MAX = 256
"""A text of so many characters is its own key: a digest would cost more than comparing it."""

_Key = tuple[str, Encoder, str | bytes]


class PromptCounts:
    """Counts by account, encoding and text. The least used half goes when a generation is full: memory is bounded by
    `2 * TEXTS_MAX` entries of a few hundred bytes. Threads may share it: at worst a text is counted twice."""

    __slots__ = ("_old", "_young")

    def __init__(self) -> None:
        self._young: dict[_Key, int] = {}
        self._old: dict[_Key, int] = {}

    def count(self, account: str, encoding: Encoder, text: str) -> int:
        """What `count_text` returns."""
        short = len(text) <= PLAIN_CHARS_MAX
        key = account, encoding, text if short else _digest(text)
        tokens = self._young.get(key)
        if tokens is None:
            tokens = self._old.pop(key, None)
            if tokens is None:
                tokens = count_text(encoding, text)
            if len(self._young) >= TEXTS_MAX:
                self._old, self._young = self._young, {}
            self._young[key] = tokens
        return tokens

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def __iter__(self) -> Iterator[_Key]:
        """What counts are kept of: account, encoding, and the text or its digest."""
        return chain(self._young, self._old)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
