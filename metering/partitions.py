"""Month partitions of the session table: made ahead of time, and on demand when a batch needs another month.

Must not: drop or detach a partition (retention is a person's decision).
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date

from storage.database import Connection

LOCK_KEY = 0x746F6C6C6762
MONTHS_AHEAD = 3
# Read from the catalog itself: to_regclass answers from a cache that an advisory lock does not refresh.
_EXISTS = "SELECT EXISTS (SELECT FROM pg_class WHERE relname = $1 AND relnamespace = current_schema()::regnamespace)"


def next_month(month: date) -> date:
    """The first day of the month after `month`."""
    return date(month.year + month.month // 12, month.month % 12 + 1, 1)


def partition_name(month: date) -> str:
    """`session_p2026_11`."""
    return f"session_p{month.year:04d}_{month.month:02d}"


async def ensure(connection: Connection, months: Iterable[date]) -> list[date]:
    """Create the partitions that are missing (each given as its month's first day); answers those created.

    The partition is built aside and attached, so that running inserts are not blocked; an advisory lock orders
    several callers. Raises `storage.database.FAILED`.
    """
    created: list[date] = []
    for month in sorted(set(months)):
        name = partition_name(month)
        if await connection.fetchval(_EXISTS, name):
            continue
        async with connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock($1)", LOCK_KEY)
            if await connection.fetchval(_EXISTS, name):
                continue
            await connection.execute(f"CREATE TABLE {name} (LIKE session INCLUDING ALL)")
            await connection.execute(
                f"ALTER TABLE session ATTACH PARTITION {name} FOR VALUES FROM ('{month}') TO ('{next_month(month)}')"
            )
        created.append(month)
    return created


async def ensure_ahead(connection: Connection, today: date, count: int = MONTHS_AHEAD) -> list[date]:
    """Create the partitions of this month and the next `count`."""
    months = [today.replace(day=1)]
    for _ in range(count):
        months.append(next_month(months[-1]))
    return await ensure(connection, months)
