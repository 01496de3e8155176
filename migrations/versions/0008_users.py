"""Companies, users, their refresh tokens and password resets, and the attempts to log in that lock out guessing.

Must not change once released: a later schema is a later revision. One statement per call, as asyncpg requires.
"""

from __future__ import annotations

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

STATEMENTS = (
    """
    CREATE TABLE company (
        id text NOT NULL,
        name text NOT NULL,
        account_id text NOT NULL,
        created_at timestamptz NOT NULL DEFAULT now(),
        CONSTRAINT pk_company PRIMARY KEY (id),
        CONSTRAINT fk_company_account_id FOREIGN KEY (account_id) REFERENCES account (id),
        CONSTRAINT uq_company_account_id UNIQUE (account_id),
        CONSTRAINT uq_company_id_account_id UNIQUE (id, account_id),
        CONSTRAINT ck_company_id_form CHECK (id ~ '^[A-Za-z0-9_-]{1,64}$'),
        CONSTRAINT ck_company_name_fits CHECK (char_length(name) BETWEEN 1 AND 200)
    )
    """,
    """
    CREATE TABLE user_ (
        id text NOT NULL,
        email text,
        username text NOT NULL,
        password_hash text,
        role text NOT NULL DEFAULT 'user',
        company_id text,
        company_role text,
        account_id text NOT NULL,
        token_version integer NOT NULL DEFAULT 0,
        issuer text,
        subject text,
        created_at timestamptz NOT NULL DEFAULT now(),
        disabled_at timestamptz,
        CONSTRAINT pk_user_ PRIMARY KEY (id),
        CONSTRAINT fk_user__account_id FOREIGN KEY (account_id) REFERENCES account (id),
        CONSTRAINT fk_user__company_id_account_id FOREIGN KEY (company_id, account_id)
            REFERENCES company (id, account_id),
        CONSTRAINT uq_user__email UNIQUE (email),
        CONSTRAINT uq_user__issuer_subject UNIQUE (issuer, subject),
        CONSTRAINT ck_user__id_form CHECK (id ~ '^[A-Za-z0-9_-]{1,64}$'),
        CONSTRAINT ck_user__email_form CHECK (email ~ '^[!-?A-~]{1,64}@[!-?A-~]{1,189}$' AND email = lower(email)),
        CONSTRAINT ck_user__username_fits CHECK (char_length(username) BETWEEN 1 AND 64),
        CONSTRAINT ck_user__password_hash_form CHECK
            (password_hash LIKE '$argon2id$%' AND char_length(password_hash) <= 255),
        CONSTRAINT ck_user__role_known CHECK (role IN ('user', 'supervisor', 'admin')),
        CONSTRAINT ck_user__company_role_known CHECK (company_role IN ('owner', 'member')),
        CONSTRAINT ck_user__company_whole CHECK ((company_id IS NULL) = (company_role IS NULL)),
        CONSTRAINT ck_user__issuer_whole CHECK ((issuer IS NULL) = (subject IS NULL)),
        CONSTRAINT ck_user__issuer_fits CHECK
            (char_length(issuer) BETWEEN 1 AND 255 AND char_length(subject) BETWEEN 1 AND 255),
        CONSTRAINT ck_user__reachable CHECK (email IS NOT NULL OR subject IS NOT NULL)
    )
    """,
    "CREATE UNIQUE INDEX ix_user__own_account ON user_ (account_id) WHERE company_id IS NULL",
    "CREATE INDEX ix_user__company_id ON user_ (company_id) WHERE company_id IS NOT NULL",
    """
    CREATE TABLE refresh_token (
        hash bytea NOT NULL,
        family_id text NOT NULL,
        user_id text NOT NULL,
        family_started_at timestamptz NOT NULL,
        issued_at timestamptz NOT NULL,
        expires_at timestamptz NOT NULL,
        used_at timestamptz,
        revoked_at timestamptz,
        CONSTRAINT pk_refresh_token PRIMARY KEY (hash),
        CONSTRAINT fk_refresh_token_user_id FOREIGN KEY (user_id) REFERENCES user_ (id),
        CONSTRAINT ck_refresh_token_hash_form CHECK (octet_length(hash) = 32),
        CONSTRAINT ck_refresh_token_expires_later CHECK (expires_at > issued_at)
    )
    """,
    "CREATE UNIQUE INDEX ix_refresh_token_open ON refresh_token (family_id) "
    "WHERE used_at IS NULL AND revoked_at IS NULL",
    "CREATE INDEX ix_refresh_token_family_id ON refresh_token (family_id)",
    "CREATE INDEX ix_refresh_token_user_id ON refresh_token (user_id)",
    "CREATE INDEX ix_refresh_token_expires_at ON refresh_token (expires_at)",
    """
    CREATE TABLE password_reset (
        user_id text NOT NULL,
        hash bytea NOT NULL,
        created_at timestamptz NOT NULL,
        expires_at timestamptz NOT NULL,
        CONSTRAINT pk_password_reset PRIMARY KEY (user_id),
        CONSTRAINT fk_password_reset_user_id FOREIGN KEY (user_id) REFERENCES user_ (id),
        CONSTRAINT uq_password_reset_hash UNIQUE (hash),
        CONSTRAINT ck_password_reset_hash_form CHECK (octet_length(hash) = 32)
    )
    """,
    """
    CREATE TABLE login_failure (
        subject bytea NOT NULL,
        attempts integer NOT NULL,
        expires_at timestamptz NOT NULL,
        CONSTRAINT pk_login_failure PRIMARY KEY (subject),
        CONSTRAINT ck_login_failure_subject_form CHECK (octet_length(subject) = 32),
        CONSTRAINT ck_login_failure_attempts_counted CHECK (attempts >= 0)
    )
    """,
    "CREATE INDEX ix_login_failure_expires_at ON login_failure (expires_at)",
)


def upgrade() -> None:
    """Add the tables."""
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    """Remove them, with everybody in them; their accounts stay."""
    for table in ("login_failure", "password_reset", "refresh_token", "user_", "company"):
        op.execute(f"DROP TABLE {table}")
