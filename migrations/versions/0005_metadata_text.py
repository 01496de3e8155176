"""Metadata of sessions as it was written: checking JSON costs Postgres a third of taking it apart and binding it anew.

Rewrites the tables, partition by partition, under a lock. Must not change once released: a later schema is a later
revision. One statement per call, as asyncpg requires.
"""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

TABLES = ("session", "correction")


def upgrade() -> None:
    """Keep the text."""
    for table in TABLES:
        op.execute(f"ALTER TABLE {table} ALTER COLUMN metadata TYPE json USING metadata::text::json")


def downgrade() -> None:
    """Take it apart again."""
    for table in TABLES:
        op.execute(f"ALTER TABLE {table} ALTER COLUMN metadata TYPE jsonb USING metadata::text::jsonb")
