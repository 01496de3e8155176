"""The schema: migrations make exactly what the tables describe, and the ledger cannot be rewritten."""

from __future__ import annotations

import asyncio
from datetime import date
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, text

import accounts.tables
import metering.tables
import migrations
from metering.partitions import ensure, ensure_ahead, next_month
from storage.base import METADATA
from storage.database import DatabaseUrlError, connect, connect_pool, dsn, engine, redacted

NEWEST = max(path.name[:4] for path in Path(migrations.__file__).with_name("versions").glob("[0-9]*.py"))
CONSTRAINTS = """
    SELECT conrelid::regclass::text || '.' || conname || ' ' || pg_get_constraintdef(oid) FROM pg_constraint
    WHERE connamespace = 'public'::regnamespace AND contype <> 'n' AND conrelid::regclass::text <> 'alembic_version'
"""
INDEXES = "SELECT indexdef FROM pg_indexes WHERE schemaname = 'public' AND tablename <> 'alembic_version'"


async def described(url: str) -> set[str]:
    connection = await connect(url)
    try:
        return {row[0] for query in (CONSTRAINTS, INDEXES) for row in await connection.fetch(query)}
    finally:
        await connection.close()


async def test_an_empty_database_has_no_revision_and_an_upgraded_one_the_newest(empty_database: str) -> None:
    assert await migrations.current(empty_database) is None
    await migrations.upgrade(empty_database)
    assert await migrations.current(empty_database) == NEWEST
    await migrations.upgrade(empty_database)
    assert await migrations.current(empty_database) == NEWEST


async def test_upgrades_at_the_same_time_take_turns(empty_database: str) -> None:
    await asyncio.gather(*(migrations.upgrade(empty_database) for _ in range(4)))
    assert await migrations.current(empty_database) == NEWEST


async def test_the_migrated_schema_is_the_one_that_the_tables_describe(ledger_database: str) -> None:
    def differences(connection: Connection) -> list[object]:
        options = {"include_name": migrations.include_name, "compare_server_default": True}
        return list(compare_metadata(MigrationContext.configure(connection, opts=options), METADATA))

    connection = await connect(ledger_database)
    await ensure_ahead(connection, date(2026, 11, 20))
    await connection.close()
    made = engine(ledger_database)
    async with made.connect() as compared:
        assert await compared.run_sync(differences) == []
    await made.dispose()


async def test_constraints_and_indexes_have_the_names_and_texts_of_the_tables(
    ledger_database: str, empty_database: str
) -> None:
    made = engine(empty_database)
    async with made.begin() as connection:
        await connection.run_sync(METADATA.create_all)
    await made.dispose()
    assert await described(ledger_database) == await described(empty_database)


@pytest.mark.parametrize("table", metering.tables.APPEND_ONLY)
async def test_a_ledger_row_cannot_be_changed_or_removed(ledger_database: str, table: str) -> None:
    made = engine(ledger_database)
    for statement in (f"UPDATE {table} SET n = n", f"DELETE FROM {table}", f"TRUNCATE {table}"):
        with pytest.raises(Exception, match="append-only"):
            async with made.begin() as connection:
                await connection.execute(text(statement))
    await made.dispose()


async def test_a_downgrade_leaves_nothing_behind(empty_database: str) -> None:
    from alembic import command

    def down(connection: Connection) -> None:
        configured = migrations.config()
        configured.attributes["connection"] = connection
        command.downgrade(configured, "base")

    await migrations.upgrade(empty_database)
    made = engine(empty_database)
    async with made.begin() as connection:
        await connection.run_sync(down)
    await made.dispose()
    assert await described(empty_database) == set()


async def test_partitions_are_made_once_however_many_ask(ledger_database: str) -> None:
    pool = await connect_pool(ledger_database, size_max=4)

    async def ask() -> list[date]:
        async with pool.acquire() as connection:
            return await ensure(connection, [date(2026, 12, 1), date(2027, 1, 1)])

    made = [month for answer in await asyncio.gather(*(ask() for _ in range(4))) for month in answer]
    assert sorted(made) == [date(2026, 12, 1), date(2027, 1, 1)]
    bounds = await pool.fetch(
        "SELECT pg_get_expr(relpartbound, oid) AS bound FROM pg_class WHERE relispartition AND relkind = 'r' ORDER BY 1"
    )
    assert [row["bound"] for row in bounds] == [
        "FOR VALUES FROM ('2026-12-01') TO ('2027-01-01')",
        "FOR VALUES FROM ('2027-01-01') TO ('2027-02-01')",
    ]
    await pool.close()


def test_the_month_after_december_is_january() -> None:
    assert next_month(date(2026, 11, 1)) == date(2026, 12, 1)
    assert next_month(date(2026, 12, 1)) == date(2027, 1, 1)


def test_database_urls_are_read_in_every_spelling_and_shown_without_the_password() -> None:
    assert dsn("postgres://u:p@h/d") == "postgresql://u:p@h/d"
    assert dsn("postgresql+asyncpg://u@/d?host=/run/x") == "postgresql://u@/d?host=/run/x"
    assert (
        redacted("postgresql://u:secret@h:5432/d?password=secret&sslmode=require")
        == "postgresql://u@h:5432/d?sslmode=require"
    )
    with pytest.raises(DatabaseUrlError):
        dsn("mysql://u:secret@h/d")


def test_every_table_is_registered() -> None:
    assert accounts.tables.ACCOUNT.metadata is METADATA
    assert set(METADATA.tables) == {
        "account", "api_key", "grant_", "price_version", "session", "entry", "posting", "consumption",
        "shard_cursor", "outbox_dead", "usage_rollup", "correction", "revocation", "adjustment",
        "receipt", "gateway", "signing_key",
        "company", "user_", "refresh_token", "password_reset", "login_failure",
    }  # fmt: skip
