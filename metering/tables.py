"""The ledger in Postgres: grants, finished sessions, double-entry journal, cursors. All amounts are BIGINT micros.

Must not: reference `account` from what the journal writes (a row of money lands even when its account is unknown
here; the audit names it), or be updated outside of the cursor, the rollup and the confirmation of what was written here
first (grants, revocations, adjustments).
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Date,
    DateTime,
    ForeignKey,
    Index,
    Integer,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

from storage.base import METADATA

GRANT = Table(
    "grant_",
    METADATA,
    Column("id", Text, primary_key=True),
    Column("account_id", Text, ForeignKey("account.id"), nullable=False),
    Column("amount", BigInteger, nullable=False),
    Column("priority", SmallInteger, nullable=False, server_default=text("50")),
    Column("effective_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("expires_at", DateTime(timezone=True), nullable=True),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("notes", Text, nullable=False, server_default=text("''")),
    Column("applied_epoch", Integer, nullable=True),
    Column("applied_n", BigInteger, nullable=True),
    CheckConstraint("id ~ '^[A-Za-z0-9_-]{1,64}$'", name="id_form"),
    CheckConstraint("amount > 0 AND amount <= 9007199254740991", name="amount_positive"),
    CheckConstraint("priority BETWEEN 0 AND 99", name="priority_known"),
    CheckConstraint("(applied_epoch IS NULL) = (applied_n IS NULL)", name="applied_whole"),
    Index("ix_grant__account_id", "account_id"),
    Index("ix_grant__pending", "effective_at", postgresql_where=text("applied_n IS NULL")),
)
"""Credit given. Written here first, then applied to Redis; its own journal entry fills `applied_*`."""

REVOCATION = Table(
    "revocation",
    METADATA,
    Column("id", Text, primary_key=True),
    Column("grant_id", Text, ForeignKey("grant_.id"), nullable=False),
    Column("notes", Text, nullable=False, server_default=text("''")),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("applied_epoch", Integer, nullable=True),
    Column("applied_n", BigInteger, nullable=True),
    UniqueConstraint("grant_id", name="uq_revocation_grant_id"),
    CheckConstraint("id ~ '^[A-Za-z0-9_-]{1,64}$'", name="id_form"),
    CheckConstraint("(applied_epoch IS NULL) = (applied_n IS NULL)", name="applied_whole"),
    Index("ix_revocation_pending", "id", postgresql_where=text("applied_n IS NULL")),
)
"""The end of a grant before its time. Written here first, as a grant is; the journal fills `applied_*`."""

ADJUSTMENT = Table(
    "adjustment",
    METADATA,
    Column("id", Text, primary_key=True),
    Column("account_id", Text, ForeignKey("account.id"), nullable=False),
    Column("amount", BigInteger, nullable=False),
    Column("whole", Boolean, nullable=False),
    Column("notes", Text, nullable=False, server_default=text("''")),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("applied_epoch", Integer, nullable=True),
    Column("applied_n", BigInteger, nullable=True),
    CheckConstraint("id ~ '^[A-Za-z0-9_-]{1,64}$'", name="id_form"),
    CheckConstraint("amount > 0 AND amount <= 9007199254740991", name="amount_positive"),
    CheckConstraint("(applied_epoch IS NULL) = (applied_n IS NULL)", name="applied_whole"),
    Index("ix_adjustment_account_id", "account_id"),
    Index("ix_adjustment_pending", "id", postgresql_where=text("applied_n IS NULL")),
)
"""Credit taken back: `amount` micros, all or nothing when `whole`. What was taken is the consumption of its entry."""

PRICE_VERSION = Table(
    "price_version",
    METADATA,
    Column("id", Text, primary_key=True),
    Column("content", JSONB, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
)
"""An immutable compiled price catalog; sessions name the one they were priced with."""

SESSION = Table(
    "session",
    METADATA,
    Column("month", Date, primary_key=True),
    Column("sid", Text, primary_key=True),
    Column("shard", SmallInteger, nullable=False),
    Column("ep", Integer, nullable=False),
    Column("n", BigInteger, nullable=False),
    Column("account_id", Text, nullable=False),
    Column("key_id", Text, nullable=False),
    Column("outcome", Text, nullable=False),
    Column("charged", BigInteger, nullable=False),
    Column("absorbed", BigInteger, nullable=False),
    Column("debt", BigInteger, nullable=False),
    Column("metered", BigInteger, nullable=False),
    Column("prompt_cost", BigInteger, nullable=False),
    Column("price_version", Text, nullable=False),
    Column("started_at", DateTime(timezone=True), nullable=False),
    Column("ended_at", DateTime(timezone=True), nullable=False),
    Column("route", Text, nullable=True),
    Column("provider", Text, nullable=True),
    Column("model", Text, nullable=True),
    Column("source", Text, nullable=True),
    Column("stream", Boolean, nullable=True),
    Column("prompt_tokens", BigInteger, nullable=True),
    Column("cached_tokens", BigInteger, nullable=True),
    Column("cache_write_tokens", BigInteger, nullable=True),
    Column("output_tokens", BigInteger, nullable=True),
    Column("reasoning_tokens", BigInteger, nullable=True),
    Column("metadata", JSONB, nullable=True),
    Index("ix_session_account_id_started_at", "account_id", "started_at"),
    postgresql_partition_by="RANGE (month)",
)
"""A finished session. `month` follows from the UUIDv7 time of `sid`, so (month, sid) makes sid unique over all months:
one terminal entry, (shard, ep, n), per session. Fields that its metadata lacked are null."""

CORRECTION = Table(
    "correction",
    METADATA,
    Column("shard", SmallInteger, primary_key=True),
    Column("ep", Integer, primary_key=True),
    Column("n", BigInteger, primary_key=True, autoincrement=False),
    Column("month", Date, nullable=False),
    Column("sid", Text, nullable=False),
    Column("account_id", Text, nullable=False),
    Column("key_id", Text, nullable=False),
    Column("charged", BigInteger, nullable=False),
    Column("absorbed", BigInteger, nullable=False),
    Column("debt", BigInteger, nullable=False),
    Column("at", DateTime(timezone=True), nullable=False),
    Column("route", Text, nullable=True),
    Column("provider", Text, nullable=True),
    Column("model", Text, nullable=True),
    Column("source", Text, nullable=True),
    Column("stream", Boolean, nullable=True),
    Column("prompt_tokens", BigInteger, nullable=True),
    Column("cached_tokens", BigInteger, nullable=True),
    Column("cache_write_tokens", BigInteger, nullable=True),
    Column("output_tokens", BigInteger, nullable=True),
    Column("reasoning_tokens", BigInteger, nullable=True),
    Column("metadata", JSONB, nullable=True),
    Index("ix_correction_sid", "sid"),
    Index("ix_correction_account_id", "account_id"),
)
"""What a swept session was charged beyond its sweep, at most once: `charged` micros more. (month, sid) is its session,
whose row stays as the sweep wrote it; the metadata is the owner's. Append-only."""

ENTRY = Table(
    "entry",
    METADATA,
    Column("shard", SmallInteger, primary_key=True),
    Column("ep", Integer, primary_key=True),
    Column("n", BigInteger, primary_key=True, autoincrement=False),
    Column("type", Text, nullable=False),
    Column("account_id", Text, nullable=False),
    Column("sid", Text, nullable=True),
    Column("at", DateTime(timezone=True), nullable=False),
    Index("ix_entry_account_id", "account_id", "shard", "ep", "n"),
)
"""One journal entry, under the id it had in the outbox. Append-only."""

POSTING = Table(
    "posting",
    METADATA,
    Column("shard", SmallInteger, primary_key=True),
    Column("ep", Integer, primary_key=True),
    Column("n", BigInteger, primary_key=True, autoincrement=False),
    Column("leg", SmallInteger, primary_key=True, autoincrement=False),
    Column("ledger", Text, nullable=False),
    Column("amount", BigInteger, nullable=False),
)
"""The legs of an entry; they sum to zero. Ledgers: `user:avail:<gid>`, `user:debt`, `earned`, `breakage`,
`house:absorbed`, `issuance`. A user's ledgers hold what is owed to the user, so debt is negative. Append-only."""

CONSUMPTION = Table(
    "consumption",
    METADATA,
    Column("shard", SmallInteger, primary_key=True),
    Column("ep", Integer, primary_key=True),
    Column("n", BigInteger, primary_key=True, autoincrement=False),
    Column("grant_id", Text, primary_key=True),
    Column("amount", BigInteger, nullable=False),
    Column("breakage", BigInteger, nullable=False),
    Column("voided", BigInteger, nullable=False, server_default=text("0")),
)
"""What an entry took from a grant: spent (`amount`), lost to expiry (`breakage`), voided. Append-only."""

RECEIPT = Table(
    "receipt",
    METADATA,
    Column("sid", Text, primary_key=True),
    Column("shard", SmallInteger, nullable=False),
    Column("month", Date, nullable=False),
    Column("kind", SmallInteger, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("content", Text, nullable=False),
    Column("applied_epoch", Integer, nullable=True),
    Column("at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Index("ix_receipt_shard", "shard"),
)
"""What is known of sessions whose end Postgres may lack, kept through a recovery: `kind` 0 a hold (number `seq` of its
checkpoints), 1 a settlement that is owed, 2 one that was acknowledged. A row goes when its session has arrived."""

GATEWAY = Table(
    "gateway",
    METADATA,
    Column("id", Text, primary_key=True),
    Column("seen_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("delivered", Text, nullable=False, server_default=text("''")),
)
"""The running data workers of all instances, and the last recovery that each has delivered its receipts to."""

SHARD_CURSOR = Table(
    "shard_cursor",
    METADATA,
    Column("shard", SmallInteger, primary_key=True, autoincrement=False),
    Column("ep", Integer, nullable=False),
    Column("n", BigInteger, nullable=False),
    Column("updated_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
)
"""How far a shard's outbox has arrived; moves only in the transaction that wrote the rows."""

OUTBOX_DEAD = Table(
    "outbox_dead",
    METADATA,
    Column("shard", SmallInteger, primary_key=True),
    Column("ep", Integer, primary_key=True),
    Column("n", BigInteger, primary_key=True, autoincrement=False),
    Column("payload", JSONB, nullable=False),
    Column("reason", Text, nullable=False),
    Column("at", DateTime(timezone=True), nullable=False, server_default=func.now()),
)
"""Entries that could not become rows, whole, for a person to repair."""

USAGE_ROLLUP = Table(
    "usage_rollup",
    METADATA,
    Column("shard", SmallInteger, primary_key=True),
    Column("account_id", Text, primary_key=True),
    Column("day", Date, primary_key=True),
    Column("route", Text, primary_key=True),
    Column("provider", Text, primary_key=True),
    Column("model", Text, primary_key=True),
    Column("sessions", BigInteger, nullable=False),
    Column("charged", BigInteger, nullable=False),
    Column("absorbed", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("cache_write_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("reasoning_tokens", BigInteger, nullable=False),
)
"""Sums per UTC day of a session's end. An unknown route, provider or model is ''. The shard keeps flushers apart."""

APPEND_ONLY = ("entry", "posting", "consumption", "correction")
"""Tables whose rows a trigger protects from UPDATE, DELETE and TRUNCATE."""
