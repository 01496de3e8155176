"""The journal's state as the ledger process publishes it in Redis, for readiness of every worker.

Must not: touch a store.
"""

from __future__ import annotations

import msgspec

STATUS_KEY = "journal:status"
STATUS_TTL_S = 30


class JournalReport(msgspec.Struct, frozen=True):
    """Entries not in Postgres yet, age of the oldest in ms, dead entries, stopped shards, outbox memory in percent,
    and shards that are frozen because Redis lost some of their state."""

    entries_behind: int
    oldest_age_ms: int
    dead: int
    stopped_shards: int
    memory_percent: int
    frozen_shards: int = 0


_decode = msgspec.json.Decoder(JournalReport).decode


def decode_report(raw: bytes | None) -> JournalReport | None:
    """Read a published report; None when there is none or it is not one."""
    try:
        return None if raw is None else _decode(raw)
    except msgspec.DecodeError:
        return None
