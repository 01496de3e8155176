"""Schema migrations, run from Python: no alembic.ini, the scripts lie beside this file.

Must not: read settings or the environment, or leave a half-applied schema (all steps share one transaction).
"""

from __future__ import annotations

import re
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, text

from storage.database import engine

LOCK_KEY = 0x746F6C6C6761  # "tollga": one migration at a time per database
LOCK_WAIT_S = 60
_PARTITION = re.compile(r"session_p\d{4}_\d{2}")


def include_name(name: str | None, kind: str, _parents: object) -> bool:
    """Whether the schema comparison looks at an object: month partitions come and go and are not in the metadata."""
    return not (kind == "table" and name is not None and _PARTITION.fullmatch(name))


def config() -> Config:
    """Alembic's configuration for the scripts of this package."""
    made = Config()
    made.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    made.set_main_option("path_separator", "os")
    return made


async def upgrade(database_url: str, revision: str = "head") -> None:
    """Bring the schema to `revision`. Safe to call from several processes at once: an advisory lock orders them.

    Waits at most 60 s for the lock. Raises `storage.database.FAILED` or SQLAlchemy's DBAPIError when Postgres refuses.
    """
    made = engine(database_url)
    try:
        async with made.begin() as connection:
            await connection.execute(text(f"SET LOCAL lock_timeout = '{LOCK_WAIT_S}s'"))
            await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK_KEY})
            await connection.run_sync(_upgrade, revision)
    finally:
        await made.dispose()


async def current(database_url: str) -> str | None:
    """The revision of the schema, None for a database that was never migrated."""
    made = engine(database_url)
    try:
        async with made.connect() as connection:
            return await connection.run_sync(lambda sync: MigrationContext.configure(sync).get_current_revision())
    finally:
        await made.dispose()


def _upgrade(connection: Connection, revision: str) -> None:
    made = config()
    made.attributes["connection"] = connection
    command.upgrade(made, revision)
