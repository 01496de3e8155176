"""Policies of accounts whose grants are used up, and corrections of swept sessions.

Must not change once released: a later schema is a later revision. One statement per call, as asyncpg requires.
"""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

STATEMENTS = (
    """
    ALTER TABLE account
        ADD COLUMN policy text NOT NULL DEFAULT 'cutoff',
        ADD COLUMN credit_limit bigint NOT NULL DEFAULT 0,
        ADD COLUMN policy_revision bigint NOT NULL DEFAULT 0,
        ADD COLUMN policy_applied bigint NOT NULL DEFAULT 0,
        ADD CONSTRAINT ck_account_policy_known CHECK (policy IN ('cutoff', 'grace', 'postpaid')),
        ADD CONSTRAINT ck_account_credit_limit_fits CHECK
            (credit_limit BETWEEN 0 AND 9007199254740991 AND (policy <> 'cutoff' OR credit_limit = 0))
    """,
    "CREATE INDEX ix_account_policy_pending ON account (id) WHERE policy_applied < policy_revision",
    """
    CREATE TABLE correction (
        shard smallint NOT NULL,
        ep integer NOT NULL,
        n bigint NOT NULL,
        month date NOT NULL,
        sid text NOT NULL,
        account_id text NOT NULL,
        key_id text NOT NULL,
        charged bigint NOT NULL,
        absorbed bigint NOT NULL,
        debt bigint NOT NULL,
        at timestamptz NOT NULL,
        route text,
        provider text,
        model text,
        source text,
        stream boolean,
        prompt_tokens bigint,
        cached_tokens bigint,
        cache_write_tokens bigint,
        output_tokens bigint,
        reasoning_tokens bigint,
        metadata jsonb,
        CONSTRAINT pk_correction PRIMARY KEY (shard, ep, n)
    )
    """,
    "CREATE INDEX ix_correction_sid ON correction (sid)",
    "CREATE INDEX ix_correction_account_id ON correction (account_id)",
    "CREATE TRIGGER correction_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON correction "
    "FOR EACH STATEMENT EXECUTE FUNCTION tollgate_refuse_change()",
)


def upgrade() -> None:
    """Add the table and the columns."""
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    """Remove them, with the corrections."""
    op.execute("DROP TABLE correction")
    op.execute("DROP INDEX ix_account_policy_pending")
    for column in ("policy_applied", "policy_revision", "credit_limit", "policy"):
        op.execute(f"ALTER TABLE account DROP COLUMN {column}")
