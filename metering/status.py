"""The journal's state as the ledger process publishes it in Redis, and the one decision whether the outbox is over its
bound: readiness and admission of every worker follow it.

Must not: touch a store.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec

from config.settings import Metering

STATUS_KEY = "journal:status"
STATUS_TTL_S = 30

BACK_PERCENT = 90
"""Of a bound: what the outbox must fall below before calls are admitted again. Shedding itself takes the load away, so
at the bound a gateway would open and close every second, with a line in the log and a crowd of retries each time."""

Over = Literal["journal_age", "journal_memory"]
"""The bound that the outbox is over."""


class JournalReport(msgspec.Struct, frozen=True):
    """Entries not in Postgres yet, age of the oldest in ms, dead entries, stopped shards, Redis' memory in use in
    percent of its maximum (of which the outbox is a part), and shards that are frozen because Redis lost some of their
    state."""

    entries_behind: int
    oldest_age_ms: int
    dead: int
    stopped_shards: int
    memory_percent: int
    frozen_shards: int = 0


class Outbox(NamedTuple):
    """Age of the oldest entry in ms, and memory in percent of the maximum: the outbox's, or more than that where what
    Redis uses in all is below the bound."""

    oldest_age_ms: int
    memory_percent: int


def over_bound(limits: Metering, seen: Outbox, *, already: bool) -> Over | None:
    """The bound that the outbox is over, None when it is over none. `already`: it was over one before, so it must fall
    below `BACK_PERCENT` of both."""
    share = BACK_PERCENT if already else 100
    if seen.oldest_age_ms * 100 > limits.outbox_age_s_max * 1000 * share:
        return "journal_age"
    return "journal_memory" if fills_bound(limits, seen.memory_percent, already=already) else None


def fills_bound(limits: Metering, memory_percent: int, *, already: bool) -> bool:
    """Whether so much memory would be over the bound."""
    return memory_percent * 100 >= limits.outbox_memory_percent_max * (BACK_PERCENT if already else 100)


_decode = msgspec.json.Decoder(JournalReport).decode


def decode_report(raw: bytes | None) -> JournalReport | None:
    """Read a published report; None when there is none or it is not one."""
    try:
        return None if raw is None else _decode(raw)
    except msgspec.DecodeError:
        return None
