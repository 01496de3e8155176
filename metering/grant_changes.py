"""What becomes of credit after it was given: revocations of grants, and adjustments that take credit back.

Each is a Postgres row first, then one idempotent verb in Redis, confirmed by its journal entry; it can therefore be
late, and never lost or doubled. Must not: change a row once it is written, or mark one as applied (only the journal
does that). Credit that is added is a grant.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

from metering.grants import PAGE, Applied, GrantError, check_id
from metering.ledger import MICROS_MAX, AccountRef, ChangeRefused, LedgerError, LedgerUnavailable, Voided
from storage.database import Pool

log = logging.getLogger(__name__)

NO_CREDIT: Final = "the account has less available; nothing was taken"


class ChangingLedger(Protocol):
    """The part of the ledger that changes need."""

    async def revoke(self, account: AccountRef, grant: str) -> Voided | ChangeRefused:
        """Void what nobody holds of a grant, once. Raises LedgerError."""

    async def take(
        self, account: AccountRef, change: str, amount: int, *, whole: bool = True
    ) -> Voided | ChangeRefused:
        """Void up to `amount` micros of what is available, once per id. Raises LedgerError."""


@dataclass(frozen=True, slots=True)
class NewRevocation:
    """A grant to end. `id` is the caller's and makes the call repeatable."""

    id: str
    grant: str
    notes: str = ""


@dataclass(frozen=True, slots=True)
class NewAdjustment:
    """`amount` micros (more than 0) to take back; `whole`: all of it or nothing. `id` makes the call repeatable."""

    id: str
    account: str
    amount: int
    whole: bool = True
    notes: str = ""


@dataclass(frozen=True, slots=True)
class Changed:
    """The change is written. `applied`: `amount` micros were voided at once; `waiting`: it will be, `reason` says for
    what; `refused`: nothing was taken, and nothing will be."""

    id: str
    state: Literal["applied", "waiting", "refused"]
    reason: str = ""
    amount: int | None = None
    available: int | None = None


async def revoke(pool: Pool, ledger: ChangingLedger, new: NewRevocation) -> Changed:
    """Write the revocation and apply it. Repeating with the same values changes nothing.

    Raises GrantError (unknown grant, bad id, revoked already under another id) and `storage.database.FAILED`. When
    Redis is away the answer is `waiting`: the ledger process applies it later.
    """
    check_id(new.id)
    await pool.execute(
        "INSERT INTO revocation (id, grant_id, notes) SELECT $1, grant_.id, $3 FROM grant_ WHERE grant_.id = $2 "
        "ON CONFLICT DO NOTHING",
        new.id,
        new.grant,
        new.notes,
    )
    rows = await pool.fetch(f"{_REVOCATIONS} WHERE revocation.id = $1 OR grant_id = $2", new.id, new.grant)
    if not rows:
        raise GrantError(f"grant {new.grant}: there is none with this id.")
    row = rows[0]
    if len(rows) > 1 or row["grant_id"] != new.grant:
        raise GrantError(f"revocation {new.id}: exists already for another grant.")
    if row["id"] != new.id:
        raise GrantError(f"grant {new.grant}: is revoked already, by {row['id']}.")
    return await _apply_revocation(ledger, row)


async def adjust(pool: Pool, ledger: ChangingLedger, new: NewAdjustment) -> Changed:
    """Write the adjustment and apply it. Repeating with the same values changes nothing, also where it was refused.

    Raises as `revoke` does (unknown account, bad value)."""
    check_id(new.id)
    if not 0 < new.amount <= MICROS_MAX:
        raise GrantError(f"amount: {new.amount} micros is not between 1 and {MICROS_MAX}.")
    await pool.execute(
        "INSERT INTO adjustment (id, account_id, amount, whole, notes) SELECT $1, account.id, $3, $4, $5 FROM account "
        "WHERE account.id = $2 ON CONFLICT (id) DO NOTHING",
        new.id,
        new.account,
        new.amount,
        new.whole,
        new.notes,
    )
    row = await pool.fetchrow(f"{_ADJUSTMENTS} WHERE adjustment.id = $1", new.id)
    if row is None:
        raise GrantError(f"account {new.account}: there is none with this id.")
    if (row["account_id"], row["amount"], row["whole"]) != (new.account, new.amount, new.whole):
        raise GrantError(f"adjustment {new.id}: exists already with other values.")
    return await _apply_adjustment(ledger, row)


async def apply_pending(pool: Pool, ledger: ChangingLedger) -> Applied:
    """Apply every change that the journal has not confirmed. Harmless to repeat and to run twice at once.

    Raises `storage.database.FAILED`."""
    count, waiting = 0, {}
    for query, name, apply in (
        (_REVOCATIONS, "revocation", _apply_revocation),
        (_ADJUSTMENTS, "adjustment", _apply_adjustment),
    ):
        after, more = "", True
        while more:
            where = f"WHERE {name}.applied_n IS NULL AND {name}.id > $1 ORDER BY {name}.id LIMIT $2"
            rows = await pool.fetch(f"{query} {where}", after, PAGE)
            for row in rows:
                changed = await apply(ledger, row)
                if changed.state == "waiting":
                    waiting[changed.id] = changed.reason
                else:
                    count += 1
            more = len(rows) == PAGE
            after = rows[-1]["id"] if rows else after
    return Applied(count, waiting)


_REVOCATIONS: Final = (
    "SELECT revocation.id, grant_id, grant_.account_id, shard FROM revocation "
    "JOIN grant_ ON grant_.id = grant_id JOIN account ON account.id = grant_.account_id"
)
_ADJUSTMENTS: Final = (
    "SELECT adjustment.id, account_id, amount, whole, shard FROM adjustment JOIN account ON account.id = account_id"
)


async def _apply_revocation(ledger: ChangingLedger, row: Any) -> Changed:
    account = AccountRef(row["account_id"], row["shard"])
    return await _apply(f"revocation {row['id']}", row["id"], ledger.revoke(account, row["grant_id"]))


async def _apply_adjustment(ledger: ChangingLedger, row: Any) -> Changed:
    account = AccountRef(row["account_id"], row["shard"])
    taking = ledger.take(account, row["id"], row["amount"], whole=row["whole"])
    changed = await _apply(f"adjustment {row['id']}", row["id"], taking)
    if changed.state == "applied" and changed.amount == 0:
        return Changed(changed.id, "refused", NO_CREDIT, 0, changed.available)
    return changed


async def _apply(name: str, change: str, verb: Awaitable[Voided | ChangeRefused]) -> Changed:
    try:
        answer = await verb
    except LedgerUnavailable as error:
        return Changed(change, "waiting", f"Redis: {error}")
    except LedgerError as error:
        log.error("%s: %s", name, error)
        return Changed(change, "waiting", f"Redis: {error}")
    if isinstance(answer, Voided):
        return Changed(change, "applied", "", answer.amount, answer.available)
    reason = "Redis has another change of this id" if answer.reason == "conflict" else "out of bounds"
    log.warning("%s: %s", name, reason)
    return Changed(change, "waiting", reason)
