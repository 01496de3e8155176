"""Accounts and keys as Postgres keeps them. A key's secret is never stored, only its HMAC.

Must not: hold balances (the journal's rows do) or query anything.
"""

from __future__ import annotations

from sqlalchemy import (
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
)

from storage.base import METADATA

ACCOUNT = Table(
    "account",
    METADATA,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("shard", SmallInteger, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    CheckConstraint("shard BETWEEN 0 AND 127", name="shard_known"),
    CheckConstraint("id ~ '^[A-Za-z0-9_-]{1,64}$'", name="id_form"),
)
"""Who pays. `shard` is fixed at creation (crc32(id) % 128) and says where the account lives in Redis."""

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
    CheckConstraint("id ~ '^[A-Za-z0-9]{8}$'", name="id_form"),
    CheckConstraint("requests_per_minute > 0", name="requests_per_minute_positive"),
    CheckConstraint("parallel_sessions > 0", name="parallel_sessions_positive"),
    Index("ix_api_key_account_id", "account_id"),
)
"""An API key: 8 base62 characters of id, HMAC-SHA256 of its secret, and the fingerprint of the pepper that made it."""
