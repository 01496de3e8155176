"""The journal's statements: cursors, temporary tables, conflict-proof inserts, and the comparison after a conflict.

Must not: open a transaction (the flusher does), read Redis, or swallow a conflict whose content differs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from itertools import chain
from typing import Any

from metering.journal_corrections import CORRECTION_COLUMNS
from metering.journal_fields import Row
from metering.journal_rows import (
    CONSUMPTION_COLUMNS,
    ENTRY_COLUMNS,
    POSTING_COLUMNS,
    SESSION_COLUMNS,
    Rows,
)
from metering.journal_usage import USAGE_SUMS, UsageKey, sums_of
from storage.database import REJECTED, Connection, Pool

Cursor = tuple[int, int]
"""(epoch, n) of the last entry that arrived."""

_TABLES: Mapping[str, tuple[Sequence[str], Sequence[str]]] = {
    "session": (SESSION_COLUMNS, ("month", "sid")),
    "entry": (ENTRY_COLUMNS, ("shard", "ep", "n")),
    "posting": (POSTING_COLUMNS, ("shard", "ep", "n", "leg")),
    "consumption": (CONSUMPTION_COLUMNS, ("shard", "ep", "n", "grant_id")),
    "correction": (CORRECTION_COLUMNS, ("shard", "ep", "n")),
}
_SUMS = USAGE_SUMS
_COUNTS = _SUMS[1:]
_USAGE_KEY = ("shard", "account_id", "day", "route", "provider", "model")
_ADD_USAGE = f"""
    INSERT INTO usage_rollup AS kept ({", ".join((*_USAGE_KEY, *_SUMS))})
    SELECT * FROM unnest($1::smallint[], $2::text[], $3::date[], $4::text[], $5::text[], $6::text[],
        {", ".join(f"${number}::bigint[]" for number in range(7, 7 + len(_SUMS)))})
    ON CONFLICT ({", ".join(_USAGE_KEY)})
    DO UPDATE SET {", ".join(f"{name} = kept.{name} + excluded.{name}" for name in _SUMS)}
"""  # noqa: S608  (names from the tuples above)


def _insert(table: str) -> str:
    columns = ", ".join(_TABLES[table][0])
    return f"INSERT INTO {table} ({columns}) SELECT {columns} FROM new_{table} ON CONFLICT DO NOTHING"  # noqa: S608


def _insert_summed(table: str, ended: str, sessions: str) -> str:
    """Insert, and add what was new here to the rollup: a repeat inserts nothing and so adds nothing. `ended` is the
    column of a row's moment, `sessions` what a group of rows counts as."""
    return f"""
    WITH fresh AS ({_insert(table)}
        RETURNING shard, account_id, {ended}, route, provider, model, {", ".join(_COUNTS)}
    ), summed AS (
        INSERT INTO usage_rollup AS kept (shard, account_id, day, route, provider, model, {", ".join(_SUMS)})
        SELECT shard, account_id, ({ended} AT TIME ZONE 'UTC')::date, coalesce(route, ''), coalesce(provider, ''),
            coalesce(model, ''), {sessions}, {", ".join(f"coalesce(sum({name}), 0)::bigint" for name in _COUNTS)}
        FROM fresh GROUP BY 1, 2, 3, 4, 5, 6
        ON CONFLICT (shard, account_id, day, route, provider, model)
        DO UPDATE SET {", ".join(f"{name} = kept.{name} + excluded.{name}" for name in _SUMS)}
    ) SELECT count(*) FROM fresh
"""  # noqa: S608  (names from the tuples above)


# The swept session was counted when it was swept; its correction brings what it really used.
_SUMMED = {
    "session": _insert_summed("session", "ended_at", "count(*)"),
    "correction": _insert_summed("correction", "at", "0"),
}


def _compare(table: str) -> str:
    columns, key = _TABLES[table]
    same = " AND ".join(f"old.{name} = new.{name}" for name in key)
    # What is JSON is compared as it was written: its type has no equality.
    casts = {"metadata": "::text"}
    new, old = (", ".join(f"{side}.{name}{casts.get(name, '')}" for name in columns) for side in ("new", "old"))
    return (
        f"SELECT DISTINCT new.shard FROM new_{table} AS new LEFT JOIN {table} AS old ON {same} "  # noqa: S608
        f"WHERE ROW({new}) IS DISTINCT FROM ROW({old})"
    )


class Divergence(Exception):
    """Rows of these shards exist already with another content: two histories. Nothing was written."""

    def __init__(self, shards: frozenset[int]) -> None:
        super().__init__(f"shards {sorted(shards)}: rows exist already with another content")
        self.shards = shards


async def shards_without_journal(pool: Pool, shards: Sequence[int] = range(128)) -> dict[int, int]:
    """Shard -> epoch of the shards whose journal holds nothing: only these may be initialised in Redis."""
    known = {row["shard"]: row for row in await pool.fetch("SELECT shard, ep, n FROM shard_cursor")}
    return {
        shard: known[shard]["ep"] if shard in known else 1
        for shard in shards
        if shard not in known or (known[shard]["ep"], known[shard]["n"]) == (1, 0)
    }


async def open_cursors(pool: Pool, epochs: Mapping[int, int]) -> None:
    """Give shards a cursor at the start of their epoch; one that exists stays. Call after the shard's Redis `init`."""
    await pool.execute(
        "INSERT INTO shard_cursor (shard, ep, n) SELECT shard, ep, 0 FROM unnest($1::smallint[], $2::int[]) "
        "AS opened(shard, ep) ON CONFLICT DO NOTHING",
        list(epochs),
        list(epochs.values()),
    )


async def prepare(connection: Connection) -> None:
    """Create the connection's temporary tables (once per connection; each commit empties them).

    A commit is what allows the outbox to be trimmed, so it must be on disk when it returns, whatever the database's own
    setting says: one that is stronger stays.
    """
    await connection.execute(
        "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'"
    )
    for table in _TABLES:
        await connection.execute(f"CREATE TEMPORARY TABLE new_{table} (LIKE {table}) ON COMMIT DELETE ROWS")


async def cursors(connection: Connection) -> dict[int, Cursor]:
    """Every shard's cursor, without a lock."""
    found = await connection.fetch("SELECT shard, ep, n FROM shard_cursor")
    return {row["shard"]: (row["ep"], row["n"]) for row in found}


async def lock(connection: Connection, shards: Iterable[int]) -> dict[int, Cursor]:
    """Lock the cursors that no other flusher holds, in shard order, until the transaction ends."""
    found = await connection.fetch(
        "SELECT shard, ep, n FROM shard_cursor WHERE shard = ANY($1::smallint[]) ORDER BY shard FOR UPDATE SKIP LOCKED",
        list(shards),
    )
    return {row["shard"]: (row["ep"], row["n"]) for row in found}


async def write(connection: Connection, parts: Sequence[Rows]) -> None:
    """Insert the rows; rows that exist with the same content are fine. Raises Divergence, or FAILED.

    Rows of entries after a locked cursor are new, unless there is a second history, or the cursor was set back: so they
    are copied straight into their tables, and only what Postgres refuses there goes the long way that can compare.
    """
    records: dict[str, list[Row]] = {}
    for table in _TABLES:
        records[table] = list(chain.from_iterable(getattr(part, table) for part in parts))
    try:
        async with connection.transaction():
            for table, rows in records.items():
                if rows:
                    await connection.copy_records_to_table(table, records=rows, columns=_TABLES[table][0])
            await _add_usage(connection, sums_of(records["session"], records["correction"]))
    except REJECTED:
        await _write_compared(connection, records)
    await _confirm(connection, "grant_", "id", list(chain.from_iterable(part.confirmed for part in parts)))
    await _confirm(connection, "revocation", "grant_id", list(chain.from_iterable(part.revoked for part in parts)))
    await _confirm(connection, "adjustment", "id", list(chain.from_iterable(part.adjusted for part in parts)))
    await _confirm_policies(connection, list(chain.from_iterable(part.policies for part in parts)))


async def _add_usage(connection: Connection, sums: Mapping[UsageKey, Sequence[int]]) -> None:
    if sums:
        keys, counted = zip(*sums, strict=True), zip(*sums.values(), strict=True)
        await connection.execute(_ADD_USAGE, *map(list, keys), *map(list, counted))


async def _write_compared(connection: Connection, records: Mapping[str, Sequence[Row]]) -> None:
    short = []
    for table, (columns, _key) in _TABLES.items():
        if not records[table]:
            continue
        await connection.copy_records_to_table(f"new_{table}", records=records[table], columns=columns)
        if await _inserted(connection, table) != len(records[table]):
            short.append(table)
    diverging = [row["shard"] for table in short for row in await connection.fetch(_compare(table))]
    if diverging:
        raise Divergence(frozenset(diverging))


async def _inserted(connection: Connection, table: str) -> int:
    if table in _SUMMED:
        return int(await connection.fetchval(_SUMMED[table]))
    return int((await connection.execute(_insert(table))).rpartition(" ")[2])


async def _confirm(connection: Connection, table: str, key: str, confirmed: Sequence[Row]) -> None:
    """Fill in which entry applied the rows that were written before it: (`key`, ep, n)."""
    if confirmed:
        await connection.execute(
            f"UPDATE {table} SET applied_epoch = done.ep, applied_n = done.n "  # noqa: S608  (names of this module)
            "FROM unnest($1::text[], $2::int[], $3::bigint[]) AS done(id, ep, n) "
            f"WHERE {table}.{key} = done.id AND {table}.applied_n IS NULL",
            *map(list, zip(*confirmed, strict=True)),
        )


async def _confirm_policies(connection: Connection, confirmed: Sequence[Row]) -> None:
    """Note the newest revision of an account's policy that is in force: (account id, revision)."""
    if confirmed:
        await connection.execute(
            "UPDATE account SET policy_applied = done.revision FROM (SELECT id, max(revision) AS revision "
            "FROM unnest($1::text[], $2::bigint[]) AS each(id, revision) GROUP BY id) AS done "
            "WHERE account.id = done.id AND account.policy_applied < done.revision",
            *map(list, zip(*confirmed, strict=True)),
        )


async def bury(connection: Connection, dead: Sequence[tuple[int, int, int, str, str]]) -> None:
    """Keep entries that cannot become rows: (shard, ep, n, payload as JSON, reason)."""
    if dead:
        await connection.execute(
            "INSERT INTO outbox_dead (shard, ep, n, payload, reason) "
            "SELECT shard, ep, n, payload::jsonb, reason "
            "FROM unnest($1::smallint[], $2::int[], $3::bigint[], $4::text[], $5::text[]) "
            "AS dead(shard, ep, n, payload, reason) ON CONFLICT DO NOTHING",
            *map(list, zip(*dead, strict=True)),
        )


async def advance(connection: Connection, ends: Mapping[int, Cursor]) -> None:
    """Move locked cursors to the last entry of their batch."""
    await connection.execute(
        "UPDATE shard_cursor SET ep = moved.ep, n = moved.n, updated_at = now() "
        "FROM unnest($1::smallint[], $2::int[], $3::bigint[]) AS moved(shard, ep, n) "
        "WHERE shard_cursor.shard = moved.shard",
        list(ends),
        [ep for ep, _ in ends.values()],
        [n for _, n in ends.values()],
    )


def months(parts: Sequence[Rows]) -> set[date]:
    """The months that the sessions belong to."""
    return {session[0] for part in parts for session in part.session}


async def dead_count(connection: Connection) -> int:
    """How many entries wait in the dead table."""
    counted: Any = await connection.fetchval("SELECT count(*) FROM outbox_dead")
    return int(counted)
