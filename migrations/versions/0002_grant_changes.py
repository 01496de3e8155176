"""Revocations and adjustments, and what they take from a grant.

Must not change once released: a later schema is a later revision. One statement per call, as asyncpg requires.
"""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

STATEMENTS = (
    """
    CREATE TABLE revocation (
        id text NOT NULL,
        grant_id text NOT NULL,
        notes text NOT NULL DEFAULT '',
        created_at timestamptz NOT NULL DEFAULT now(),
        applied_epoch integer,
        applied_n bigint,
        CONSTRAINT pk_revocation PRIMARY KEY (id),
        CONSTRAINT fk_revocation_grant_id FOREIGN KEY (grant_id) REFERENCES grant_ (id),
        CONSTRAINT uq_revocation_grant_id UNIQUE (grant_id),
        CONSTRAINT ck_revocation_id_form CHECK (id ~ '^[A-Za-z0-9_-]{1,64}$'),
        CONSTRAINT ck_revocation_applied_whole CHECK ((applied_epoch IS NULL) = (applied_n IS NULL))
    )
    """,
    "CREATE INDEX ix_revocation_pending ON revocation (id) WHERE applied_n IS NULL",
    """
    CREATE TABLE adjustment (
        id text NOT NULL,
        account_id text NOT NULL,
        amount bigint NOT NULL,
        whole boolean NOT NULL,
        notes text NOT NULL DEFAULT '',
        created_at timestamptz NOT NULL DEFAULT now(),
        applied_epoch integer,
        applied_n bigint,
        CONSTRAINT pk_adjustment PRIMARY KEY (id),
        CONSTRAINT fk_adjustment_account_id FOREIGN KEY (account_id) REFERENCES account (id),
        CONSTRAINT ck_adjustment_id_form CHECK (id ~ '^[A-Za-z0-9_-]{1,64}$'),
        CONSTRAINT ck_adjustment_amount_positive CHECK (amount > 0 AND amount <= 9007199254740991),
        CONSTRAINT ck_adjustment_applied_whole CHECK ((applied_epoch IS NULL) = (applied_n IS NULL))
    )
    """,
    "CREATE INDEX ix_adjustment_account_id ON adjustment (account_id)",
    "CREATE INDEX ix_adjustment_pending ON adjustment (id) WHERE applied_n IS NULL",
    "ALTER TABLE consumption ADD COLUMN voided bigint NOT NULL DEFAULT 0",
)


def upgrade() -> None:
    """Add the tables and the column."""
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    """Remove them, with what was taken back."""
    op.execute("ALTER TABLE consumption DROP COLUMN voided")
    op.execute("DROP TABLE adjustment")
    op.execute("DROP TABLE revocation")
