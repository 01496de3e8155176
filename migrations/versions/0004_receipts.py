"""Receipts of settlements and holds for a recovery of Redis, and the gateways that deliver them.

Must not change once released: a later schema is a later revision. One statement per call, as asyncpg requires.
"""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

STATEMENTS = (
    """
    CREATE TABLE receipt (
        sid text NOT NULL,
        shard smallint NOT NULL,
        month date NOT NULL,
        kind smallint NOT NULL,
        seq bigint NOT NULL,
        content text NOT NULL,
        applied_epoch integer,
        at timestamptz NOT NULL DEFAULT now(),
        CONSTRAINT pk_receipt PRIMARY KEY (sid)
    )
    """,
    "CREATE INDEX ix_receipt_shard ON receipt (shard)",
    """
    CREATE TABLE gateway (
        id text NOT NULL,
        seen_at timestamptz NOT NULL DEFAULT now(),
        delivered text NOT NULL DEFAULT '',
        CONSTRAINT pk_gateway PRIMARY KEY (id)
    )
    """,
)


def upgrade() -> None:
    """Add the tables."""
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    """Remove them."""
    op.execute("DROP TABLE gateway")
    op.execute("DROP TABLE receipt")
