"""Credit grants: the Postgres row first, then the idempotent application to Redis, confirmed by its journal entry.

A grant can therefore be late, and never lost or doubled. Must not: change a grant once it is written, or mark one as
applied (only the journal does that).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, Protocol

from metering.ledger import (
    MICROS_MAX,
    AccountRef,
    Granted,
    GrantRefused,
    GrantRequest,
    LedgerError,
    LedgerUnavailable,
)
from storage.database import Pool

log = logging.getLogger(__name__)

PAGE: Final = 500
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_MS = timedelta(milliseconds=1)
_FIELDS = "grant_.id, grant_.account_id, amount, priority, effective_at, expires_at, grant_.created_at, notes, shard"


_REFUSALS: Mapping[str, str] = {
    "full": "64 grants are open",
    "conflict": "Redis has another grant of this id",
    "revoked": "it was revoked before it came",
    "bounds": "out of bounds",
}


class GrantingLedger(Protocol):
    """The part of the ledger that grants need."""

    async def grant(self, request: GrantRequest) -> Granted | GrantRefused:
        """Issue credit, once per grant id. Raises LedgerError."""


class GrantError(Exception):
    """The grant was not written; the message says why."""


@dataclass(frozen=True, slots=True)
class NewGrant:
    """Credit to give. `id` is the caller's and makes the call repeatable; times are aware, kept to the millisecond."""

    id: str
    account: str
    amount: int
    priority: int = 50
    effective_at: datetime | None = None
    expires_at: datetime | None = None
    notes: str = ""


@dataclass(frozen=True, slots=True)
class Issued:
    """The grant is written. `applied`: in force; `waiting`: it will be, `reason` says for what; `revoked`: never."""

    id: str
    state: Literal["applied", "waiting", "revoked"]
    reason: str = ""
    available: int | None = None


@dataclass(frozen=True, slots=True)
class Applied:
    """What one look at the unconfirmed grants did: how many are in force, and why the others are not (by id)."""

    count: int = 0
    waiting: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Listed:
    """A grant as it was written. What became of it is the ledger's to say."""

    id: str
    amount: int
    priority: int
    effective_at: datetime
    expires_at: datetime | None
    created_at: datetime
    notes: str
    revoked_at: datetime | None


def to_ms(moment: datetime) -> int:
    """Milliseconds since 1970, rounded down."""
    return (moment - _EPOCH) // _MS


async def issue(pool: Pool, ledger: GrantingLedger, grant: NewGrant) -> Issued:
    """Write the grant and apply it. Repeating with the same values changes nothing.

    Raises GrantError (unknown account, bad value, the id stands for another grant) and `storage.database.FAILED`.
    When Redis is away the answer is `waiting`: the ledger process applies it later.
    """
    _check(grant)
    row = await _written(pool, grant)
    if row["effective_at"] > datetime.now(UTC):
        return Issued(grant.id, "waiting", "not yet effective")
    return await _apply(ledger, row)


async def apply_pending(pool: Pool, ledger: GrantingLedger) -> Applied:
    """Apply every effective grant that the journal has not confirmed. Harmless to repeat and to run twice at once.

    Raises `storage.database.FAILED`."""
    count, waiting, after = 0, {}, ""
    while True:
        rows = await pool.fetch(
            f"SELECT {_FIELDS} FROM grant_ JOIN account ON account.id = account_id "  # noqa: S608
            "WHERE applied_n IS NULL AND effective_at <= now() AND grant_.id > $1 "
            "AND NOT EXISTS (SELECT FROM revocation WHERE grant_id = grant_.id) ORDER BY grant_.id LIMIT $2",
            after,
            PAGE,
        )
        for row in rows:
            issued = await _apply(ledger, row)
            if issued.state == "applied":
                count += 1
            else:
                waiting[issued.id] = issued.reason
        if len(rows) < PAGE:
            return Applied(count, waiting)
        after = rows[-1]["id"]


async def listed(pool: Pool, account: str) -> list[Listed]:
    """All grants of an account, the newest first. Raises `storage.database.FAILED`."""
    rows = await pool.fetch(
        "SELECT grant_.id, amount, priority, effective_at, expires_at, grant_.created_at, grant_.notes, "
        "revocation.created_at FROM grant_ LEFT JOIN revocation ON grant_id = grant_.id WHERE account_id = $1 "
        "ORDER BY grant_.created_at DESC, grant_.id",
        account,
    )
    return [Listed(*row) for row in rows]


def check_id(value: str) -> None:
    """Raise GrantError unless the text may stand for a grant or for a change of one."""
    if not _ID.fullmatch(value):
        raise GrantError("id: 1 to 64 letters, digits, '-' and '_'.")


def _check(grant: NewGrant) -> None:
    check_id(grant.id)
    if not 0 < grant.amount <= MICROS_MAX:
        raise GrantError(f"amount: {grant.amount} micros is not between 1 and {MICROS_MAX}.")
    if not 0 <= grant.priority <= 99:
        raise GrantError(f"priority: {grant.priority} is not between 0 (spent first) and 99.")
    for name, moment in (("effective_at", grant.effective_at), ("expires_at", grant.expires_at)):
        if moment is not None and moment.tzinfo is None:
            raise GrantError(f"{name}: give a time with its time zone.")
    start = grant.effective_at or datetime.now(UTC)
    if grant.expires_at is not None and grant.expires_at <= start:
        raise GrantError("expires_at: must be later than the moment when the grant becomes effective.")


async def _written(pool: Pool, grant: NewGrant) -> Any:
    """The row as it stands, whoever wrote it."""
    now = datetime.now(UTC)
    effective, expires = _whole_ms(grant.effective_at or now), _whole_ms(grant.expires_at)
    await pool.execute(
        "INSERT INTO grant_ (id, account_id, amount, priority, effective_at, expires_at, created_at, notes) "
        "SELECT $1, account.id, $3, $4, $5, $6, $7, $8 FROM account WHERE account.id = $2 ON CONFLICT (id) DO NOTHING",
        grant.id,
        grant.account,
        grant.amount,
        grant.priority,
        effective,
        expires,
        _whole_ms(now),
        grant.notes,
    )
    row = await pool.fetchrow(
        f"SELECT {_FIELDS} FROM grant_ JOIN account ON account.id = account_id WHERE grant_.id = $1",  # noqa: S608
        grant.id,
    )
    if row is None:
        raise GrantError(f"account {grant.account}: there is none with this id.")
    same = (row["account_id"], row["amount"], row["priority"], row["expires_at"])
    if same != (grant.account, grant.amount, grant.priority, expires):
        raise GrantError(f"grant {grant.id}: exists already with other values.")
    return row


def _whole_ms(moment: datetime | None) -> datetime | None:
    """Redis counts milliseconds; what is written must be what is applied."""
    return None if moment is None else _EPOCH + to_ms(moment) * _MS


async def _apply(ledger: GrantingLedger, row: Any) -> Issued:
    request = GrantRequest(
        id=row["id"],
        account=AccountRef(row["account_id"], row["shard"]),
        amount=row["amount"],
        priority=row["priority"],
        expires_ms=to_ms(row["expires_at"]) if row["expires_at"] is not None else 0,
        created_ms=to_ms(row["created_at"]),
    )
    try:
        answer = await ledger.grant(request)
    except LedgerUnavailable as error:
        return Issued(request.id, "waiting", f"Redis: {error}")
    except LedgerError as error:
        log.error("grant %s: %s", request.id, error)
        return Issued(request.id, "waiting", f"Redis: {error}")
    if isinstance(answer, Granted):
        return Issued(request.id, "applied", available=answer.available)
    log.warning("grant %s: %s", request.id, _REFUSALS[answer.reason])
    return Issued(request.id, "revoked" if answer.reason == "revoked" else "waiting", _REFUSALS[answer.reason])
