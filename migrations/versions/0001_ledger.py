"""Accounts, keys, grants, the session table partitioned by month, the double-entry journal and its cursors.

Must not change once released: a later schema is a later revision. One statement per call, as asyncpg requires.
"""

from __future__ import annotations

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

ACCOUNTS = (
    """
    CREATE TABLE account (
        id text NOT NULL,
        name text NOT NULL,
        shard smallint NOT NULL,
        created_at timestamptz NOT NULL DEFAULT now(),
        CONSTRAINT pk_account PRIMARY KEY (id),
        CONSTRAINT ck_account_shard_known CHECK (shard BETWEEN 0 AND 127),
        CONSTRAINT ck_account_id_form CHECK (id ~ '^[A-Za-z0-9_-]{1,64}$')
    )
    """,
    """
    CREATE TABLE api_key (
        id text NOT NULL,
        account_id text NOT NULL,
        name text NOT NULL,
        mac bytea NOT NULL,
        pepper_fingerprint text NOT NULL,
        requests_per_minute integer,
        parallel_sessions integer,
        created_at timestamptz NOT NULL DEFAULT now(),
        revoked_at timestamptz,
        CONSTRAINT pk_api_key PRIMARY KEY (id),
        CONSTRAINT fk_api_key_account_id FOREIGN KEY (account_id) REFERENCES account (id),
        CONSTRAINT ck_api_key_id_form CHECK (id ~ '^[A-Za-z0-9]{8}$'),
        CONSTRAINT ck_api_key_requests_per_minute_positive CHECK (requests_per_minute > 0),
        CONSTRAINT ck_api_key_parallel_sessions_positive CHECK (parallel_sessions > 0)
    )
    """,
    "CREATE INDEX ix_api_key_account_id ON api_key (account_id)",
    """
    CREATE TABLE grant_ (
        id text NOT NULL,
        account_id text NOT NULL,
        amount bigint NOT NULL,
        priority smallint NOT NULL DEFAULT 50,
        effective_at timestamptz NOT NULL DEFAULT now(),
        expires_at timestamptz,
        created_at timestamptz NOT NULL DEFAULT now(),
        notes text NOT NULL DEFAULT '',
        applied_epoch integer,
        applied_n bigint,
        CONSTRAINT pk_grant_ PRIMARY KEY (id),
        CONSTRAINT fk_grant__account_id FOREIGN KEY (account_id) REFERENCES account (id),
        CONSTRAINT ck_grant__id_form CHECK (id ~ '^[A-Za-z0-9_-]{1,64}$'),
        CONSTRAINT ck_grant__amount_positive CHECK (amount > 0 AND amount <= 9007199254740991),
        CONSTRAINT ck_grant__priority_known CHECK (priority BETWEEN 0 AND 99),
        CONSTRAINT ck_grant__applied_whole CHECK ((applied_epoch IS NULL) = (applied_n IS NULL))
    )
    """,
    "CREATE INDEX ix_grant__account_id ON grant_ (account_id)",
    "CREATE INDEX ix_grant__pending ON grant_ (effective_at) WHERE applied_n IS NULL",
    """
    CREATE TABLE price_version (
        id text NOT NULL,
        content jsonb NOT NULL,
        created_at timestamptz NOT NULL DEFAULT now(),
        CONSTRAINT pk_price_version PRIMARY KEY (id)
    )
    """,
)

SESSIONS = (
    """
    CREATE TABLE session (
        month date NOT NULL,
        sid text NOT NULL,
        shard smallint NOT NULL,
        ep integer NOT NULL,
        n bigint NOT NULL,
        account_id text NOT NULL,
        key_id text NOT NULL,
        outcome text NOT NULL,
        charged bigint NOT NULL,
        absorbed bigint NOT NULL,
        debt bigint NOT NULL,
        metered bigint NOT NULL,
        prompt_cost bigint NOT NULL,
        price_version text NOT NULL,
        started_at timestamptz NOT NULL,
        ended_at timestamptz NOT NULL,
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
        CONSTRAINT pk_session PRIMARY KEY (month, sid)
    ) PARTITION BY RANGE (month)
    """,
    "CREATE INDEX ix_session_account_id_started_at ON session (account_id, started_at)",
    """
    CREATE TABLE usage_rollup (
        shard smallint NOT NULL,
        account_id text NOT NULL,
        day date NOT NULL,
        route text NOT NULL,
        provider text NOT NULL,
        model text NOT NULL,
        sessions bigint NOT NULL,
        charged bigint NOT NULL,
        absorbed bigint NOT NULL,
        prompt_tokens bigint NOT NULL,
        cached_tokens bigint NOT NULL,
        cache_write_tokens bigint NOT NULL,
        output_tokens bigint NOT NULL,
        reasoning_tokens bigint NOT NULL,
        CONSTRAINT pk_usage_rollup PRIMARY KEY (shard, account_id, day, route, provider, model)
    )
    """,
)

JOURNAL = (
    """
    CREATE TABLE entry (
        shard smallint NOT NULL,
        ep integer NOT NULL,
        n bigint NOT NULL,
        type text NOT NULL,
        account_id text NOT NULL,
        sid text,
        at timestamptz NOT NULL,
        CONSTRAINT pk_entry PRIMARY KEY (shard, ep, n)
    )
    """,
    "CREATE INDEX ix_entry_account_id ON entry (account_id, shard, ep, n)",
    """
    CREATE TABLE posting (
        shard smallint NOT NULL,
        ep integer NOT NULL,
        n bigint NOT NULL,
        leg smallint NOT NULL,
        ledger text NOT NULL,
        amount bigint NOT NULL,
        CONSTRAINT pk_posting PRIMARY KEY (shard, ep, n, leg)
    )
    """,
    """
    CREATE TABLE consumption (
        shard smallint NOT NULL,
        ep integer NOT NULL,
        n bigint NOT NULL,
        grant_id text NOT NULL,
        amount bigint NOT NULL,
        breakage bigint NOT NULL,
        CONSTRAINT pk_consumption PRIMARY KEY (shard, ep, n, grant_id)
    )
    """,
    """
    CREATE TABLE shard_cursor (
        shard smallint NOT NULL,
        ep integer NOT NULL,
        n bigint NOT NULL,
        updated_at timestamptz NOT NULL DEFAULT now(),
        CONSTRAINT pk_shard_cursor PRIMARY KEY (shard)
    )
    """,
    """
    CREATE TABLE outbox_dead (
        shard smallint NOT NULL,
        ep integer NOT NULL,
        n bigint NOT NULL,
        payload jsonb NOT NULL,
        reason text NOT NULL,
        at timestamptz NOT NULL DEFAULT now(),
        CONSTRAINT pk_outbox_dead PRIMARY KEY (shard, ep, n)
    )
    """,
)

APPEND_ONLY = ("entry", "posting", "consumption")
REFUSE_CHANGE = """
    CREATE FUNCTION tollgate_refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        RAISE EXCEPTION 'the ledger is append-only: % of % is refused', lower(TG_OP), TG_TABLE_NAME
            USING ERRCODE = 'restrict_violation';
    END
    $$
"""


def upgrade() -> None:
    """Create everything."""
    for statement in (*ACCOUNTS, *SESSIONS, *JOURNAL, REFUSE_CHANGE):
        op.execute(statement)
    for table in APPEND_ONLY:
        op.execute(
            f"CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
            "FOR EACH STATEMENT EXECUTE FUNCTION tollgate_refuse_change()"
        )


def downgrade() -> None:
    """Drop everything, with all money in it."""
    for table in (
        "outbox_dead", "shard_cursor", "consumption", "posting", "entry", "usage_rollup", "session",
        "price_version", "grant_", "api_key", "account",
    ):  # fmt: skip
        op.execute(f"DROP TABLE {table}")
    op.execute("DROP FUNCTION tollgate_refuse_change()")
