"""Accounts and keys as Postgres keeps them. A key's secret is never stored, only its HMAC.

Must not: hold balances (the journal's rows do) or query anything.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    DateTime,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    SmallInteger,
    Table,
    Text,
    func,
    text,
)

from storage.base import METADATA

ACCOUNT = Table(
    "account",
    METADATA,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("shard", SmallInteger, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("policy", Text, nullable=False, server_default=text("'cutoff'")),
    Column("credit_limit", BigInteger, nullable=False, server_default=text("0")),
    Column("policy_revision", BigInteger, nullable=False, server_default=text("0")),
    Column("policy_applied", BigInteger, nullable=False, server_default=text("0")),
    Column("preferences", Text, nullable=True),
    CheckConstraint("shard BETWEEN 0 AND 127", name="shard_known"),
    CheckConstraint("policy IN ('cutoff', 'grace', 'postpaid')", name="policy_known"),
    CheckConstraint(
        "credit_limit BETWEEN 0 AND 9007199254740991 AND (policy <> 'cutoff' OR credit_limit = 0)",
        name="credit_limit_fits",
    ),
    Index("ix_account_policy_pending", "id", postgresql_where=text("policy_applied < policy_revision")),
    CheckConstraint("id ~ '^[A-Za-z0-9_-]{1,64}$'", name="id_form"),
    CheckConstraint("octet_length(preferences) BETWEEN 2 AND 32768", name="preferences_fit"),
)
"""Who pays. `shard` is fixed at creation (crc32(id) % 128) and says where the account lives in Redis. `policy` and
`credit_limit` (micros of debt) are what revision `policy_revision` says; the journal notes in `policy_applied` which
revision is in force. `preferences`: JSON of `accounts.preferences.RoutingPreferences`; null is none."""

API_KEY = Table(
    "api_key",
    METADATA,
    Column("id", Text, primary_key=True),
    Column("account_id", Text, ForeignKey("account.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("mac", LargeBinary, nullable=False),
    Column("pepper_fingerprint", Text, nullable=False),
    Column("requests_per_minute", Integer, nullable=True),
    Column("parallel_sessions", Integer, nullable=True),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("revoked_at", DateTime(timezone=True), nullable=True),
    Column("preferences", Text, nullable=True),
    CheckConstraint("id ~ '^[A-Za-z0-9]{8}$'", name="id_form"),
    CheckConstraint("requests_per_minute > 0", name="requests_per_minute_positive"),
    CheckConstraint("parallel_sessions > 0", name="parallel_sessions_positive"),
    CheckConstraint("octet_length(preferences) BETWEEN 2 AND 32768", name="preferences_fit"),
    Index("ix_api_key_account_id", "account_id"),
)
"""An API key: 8 base62 characters of id, HMAC-SHA256 of its secret, and the fingerprint of the pepper that made it.
Its `preferences` narrow the account's."""
