"""The keys that sign access tokens.

Must not change once released: a later schema is a later revision. One statement per call, as asyncpg requires.
"""

from __future__ import annotations

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the table."""
    op.execute(
        """
        CREATE TABLE signing_key (
            kid text NOT NULL,
            public bytea NOT NULL,
            sealed bytea NOT NULL,
            created_at timestamptz NOT NULL,
            signs_from timestamptz NOT NULL,
            not_after timestamptz,
            CONSTRAINT pk_signing_key PRIMARY KEY (kid),
            CONSTRAINT ck_signing_key_kid_form CHECK (kid ~ '^[A-Za-z0-9_-]{1,64}$'),
            CONSTRAINT ck_signing_key_public_fits CHECK (octet_length(public) BETWEEN 1 AND 1024),
            CONSTRAINT ck_signing_key_sealed_fits CHECK (octet_length(sealed) BETWEEN 28 AND 2048)
        )
        """
    )


def downgrade() -> None:
    """Remove it: no token that was signed so far is accepted any more."""
    op.execute("DROP TABLE signing_key")
