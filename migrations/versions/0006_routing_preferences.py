"""What accounts and keys say about the providers that may answer them.

Must not change once released: a later schema is a later revision. One statement per call, as asyncpg requires.
"""

from __future__ import annotations

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

TABLES = ("account", "api_key")


def upgrade() -> None:
    """Add the columns; null is no preference."""
    for table in TABLES:
        op.execute(
            f"ALTER TABLE {table} ADD COLUMN preferences text, ADD CONSTRAINT ck_{table}_preferences_fit "
            "CHECK (octet_length(preferences) BETWEEN 2 AND 32768)"
        )


def downgrade() -> None:
    """Remove them, with what they say."""
    for table in TABLES:
        op.execute(f"ALTER TABLE {table} DROP COLUMN preferences")
