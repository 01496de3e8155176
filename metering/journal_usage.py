"""Sums of usage per account, UTC day, route, provider and model, made of the rows of one batch.

Pure. Must not: be given a row twice (the caller adds the sums of rows that are new, and of no others).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import date
from operator import itemgetter
from typing import Any, Final

from metering.journal_corrections import CORRECTION_COLUMNS
from metering.journal_fields import Row
from metering.journal_rows import SESSION_COLUMNS

UsageKey = tuple[int, str, date, str, str, str]
"""Shard, account id, UTC day of the end, route, provider, model; what is unknown of the last three is ''."""

Reader = Callable[[Row], tuple[Any, ...]]

USAGE_SUMS: Final = (
    "sessions", "charged", "absorbed", "prompt_tokens", "cached_tokens", "cache_write_tokens", "output_tokens",
    "reasoning_tokens",
)  # fmt: skip


def sums_of(sessions: Iterable[Row], corrections: Iterable[Row]) -> dict[UsageKey, list[int]]:
    """The sums, in the order of USAGE_SUMS. A correction counts as no session: its swept one was counted."""
    sums: dict[UsageKey, list[int]] = {}
    _add(sums, sessions, _readers(SESSION_COLUMNS, "ended_at"), 1)
    _add(sums, corrections, _readers(CORRECTION_COLUMNS, "at"), 0)
    return sums


def _readers(columns: Sequence[str], ended: str) -> tuple[Reader, Reader]:
    """What takes a row's key (its moment not yet a day) and its counts."""
    key = (columns.index(name) for name in ("shard", "account_id", ended, "route", "provider", "model"))
    return itemgetter(*key), itemgetter(*(columns.index(name) for name in USAGE_SUMS[1:]))


def _add(sums: dict[UsageKey, list[int]], rows: Iterable[Row], readers: tuple[Reader, Reader], sessions: int) -> None:
    key_of, counts_of = readers
    for row in rows:
        shard, account, ended, route, provider, model = key_of(row)
        key = (shard, account, ended.date(), route or "", provider or "", model or "")
        found = sums.get(key)
        if found is None:
            found = sums[key] = [0] * len(USAGE_SUMS)
        found[0] += sessions
        for place, count in enumerate(counts_of(row), 1):
            if count:
                found[place] += count
