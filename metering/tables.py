"""The ledger in Postgres: grants, finished sessions, double-entry journal, cursors. All amounts are BIGINT micros.

Must not: reference `account` from what the journal writes (a row of money lands even when its account is unknown
here; the audit names it), or be updated outside of the cursor, the rollup and the confirmation of what was written here
first (grants, revocations, adjustments).
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

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
from sqlalchemy.dialects.postgresql import JSON, JSONB

from storage.base import METADATA


def _id_form() -> CheckConstraint:
    return CheckConstraint("id ~ '^[A-Za-z0-9_-]{1,64}$'", name="id_form")


def _amount_positive() -> CheckConstraint:
    return CheckConstraint("amount > 0 AND amount <= 9007199254740991", name="amount_positive")


def _now(name: str) -> Column[datetime]:
    return Column(name, DateTime(timezone=True), nullable=False, server_default=func.now())


def _notes() -> Column[str]:
    return Column("notes", Text, nullable=False, server_default=text("''"))


def _applied() -> tuple[Column[int], Column[int], CheckConstraint]:
    """The entry that confirmed what was written here first."""
    return (
        Column("applied_epoch", Integer, nullable=True),
        Column("applied_n", BigInteger, nullable=True),
        CheckConstraint("(applied_epoch IS NULL) = (applied_n IS NULL)", name="applied_whole"),
    )


def _place() -> tuple[Column[int], Column[int], Column[int]]:
    """An entry's own id, as the first part of a primary key."""
    return (
        Column("shard", SmallInteger, primary_key=True),
        Column("ep", Integer, primary_key=True),
        Column("n", BigInteger, primary_key=True, autoincrement=False),
    )


def _charged() -> tuple[Column[int], ...]:
    return tuple(Column(name, BigInteger, nullable=False) for name in ("charged", "absorbed", "debt"))


def _said() -> tuple[Column[Any], ...]:
    """What the metadata names (METADATA_COLUMNS of the journal), and itself as it was written."""
    return (
        *(Column(name, Text, nullable=True) for name in ("route", "provider", "model", "source")),
        Column("stream", Boolean, nullable=True),
        *(Column(name, BigInteger, nullable=True) for name in _TOKEN_COUNTS),
        Column("metadata", JSON, nullable=True),
    )


_TOKEN_COUNTS = ("prompt_tokens", "cached_tokens", "cache_write_tokens", "output_tokens", "reasoning_tokens")

GRANT = Table(
    "grant_",
    METADATA,
    Column("id", Text, primary_key=True),
    Column("account_id", Text, ForeignKey("account.id"), nullable=False),
    Column("amount", BigInteger, nullable=False),
    Column("priority", SmallInteger, nullable=False, server_default=text("50")),
    _now("effective_at"),
    Column("expires_at", DateTime(timezone=True), nullable=True),
    _now("created_at"),
    _notes(),
    *_applied(),
    _id_form(),
    _amount_positive(),
    CheckConstraint("priority BETWEEN 0 AND 99", name="priority_known"),
    Index("ix_grant__account_id", "account_id"),
    Index("ix_grant__pending", "effective_at", postgresql_where=text("applied_n IS NULL")),
)
"""Credit given. Written here first, then applied to Redis; its own journal entry fills `applied_*`."""

REVOCATION = Table(
    "revocation",
    METADATA,
    Column("id", Text, primary_key=True),
    Column("grant_id", Text, ForeignKey("grant_.id"), nullable=False),
    _notes(),
    _now("created_at"),
    *_applied(),
    UniqueConstraint("grant_id", name="uq_revocation_grant_id"),
    _id_form(),
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
    _notes(),
    _now("created_at"),
    *_applied(),
    _id_form(),
    _amount_positive(),
    Index("ix_adjustment_account_id", "account_id"),
    Index("ix_adjustment_pending", "id", postgresql_where=text("applied_n IS NULL")),
)
"""Credit taken back: `amount` micros, all or nothing when `whole`. What was taken is the consumption of its entry."""

PRICE_VERSION = Table(
    "price_version",
    METADATA,
    Column("id", Text, primary_key=True),
    Column("content", JSONB, nullable=False),
    _now("created_at"),
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
    *_charged(),
    Column("metered", BigInteger, nullable=False),
    Column("prompt_cost", BigInteger, nullable=False),
    Column("price_version", Text, nullable=False),
    Column("started_at", DateTime(timezone=True), nullable=False),
    Column("ended_at", DateTime(timezone=True), nullable=False),
    *_said(),
    Index("ix_session_account_id_started_at", "account_id", "started_at"),
    postgresql_partition_by="RANGE (month)",
)
"""A finished session. `month` follows from the UUIDv7 time of `sid`, so (month, sid) makes sid unique over all months:
one terminal entry, (shard, ep, n), per session. Fields that its metadata lacked are null."""

CORRECTION = Table(
    "correction",
    METADATA,
    *_place(),
    Column("month", Date, nullable=False),
    Column("sid", Text, nullable=False),
    Column("account_id", Text, nullable=False),
    Column("key_id", Text, nullable=False),
    *_charged(),
    Column("at", DateTime(timezone=True), nullable=False),
    *_said(),
    Index("ix_correction_sid", "sid"),
    Index("ix_correction_account_id", "account_id"),
)
"""What a swept session was charged beyond its sweep, at most once: `charged` micros more. (month, sid) is its session,
whose row stays as the sweep wrote it; the metadata is the owner's. Append-only."""

ENTRY = Table(
    "entry",
    METADATA,
    *_place(),
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
    *_place(),
    Column("leg", SmallInteger, primary_key=True, autoincrement=False),
    Column("ledger", Text, nullable=False),
    Column("amount", BigInteger, nullable=False),
)
"""The legs of an entry; they sum to zero. Ledgers: `user:avail:<gid>`, `user:debt`, `earned`, `breakage`,
`house:absorbed`, `issuance`. A user's ledgers hold what is owed to the user, so debt is negative. Append-only."""

CONSUMPTION = Table(
    "consumption",
    METADATA,
    *_place(),
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
    _now("at"),
    Index("ix_receipt_shard", "shard"),
)
"""What is known of sessions whose end Postgres may lack, kept through a recovery: `kind` 0 a hold (number `seq` of its
checkpoints), 1 a settlement that is owed, 2 one that was acknowledged. A row goes when its session has arrived."""

GATEWAY = Table(
    "gateway",
    METADATA,
    Column("id", Text, primary_key=True),
    _now("seen_at"),
    Column("delivered", Text, nullable=False, server_default=text("''")),
)
"""The running data workers of all instances, and the last recovery that each has delivered its receipts to."""

SHARD_CURSOR = Table(
    "shard_cursor",
    METADATA,
    Column("shard", SmallInteger, primary_key=True, autoincrement=False),
    Column("ep", Integer, nullable=False),
    Column("n", BigInteger, nullable=False),
    _now("updated_at"),
)
"""How far a shard's outbox has arrived; moves only in the transaction that wrote the rows."""

OUTBOX_DEAD = Table(
    "outbox_dead",
    METADATA,
    *_place(),
    Column("payload", JSONB, nullable=False),
    Column("reason", Text, nullable=False),
    _now("at"),
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
    *(Column(name, BigInteger, nullable=False) for name in _TOKEN_COUNTS),
)
"""Sums per UTC day of a session's end. An unknown route, provider or model is ''. The shard keeps flushers apart."""

APPEND_ONLY = ("entry", "posting", "consumption", "correction")
"""Tables whose rows a trigger protects from UPDATE, DELETE and TRUNCATE."""
