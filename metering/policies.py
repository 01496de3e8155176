"""Policies of accounts at exhaustion: the account's row in Postgres first, then the application to Redis by revision.

A change can therefore be late, and never lost or undone by a late repeat. Must not: mark a change as applied (only the
journal does that).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

from metering.ledger import (
    MICROS_MAX,
    AccountRef,
    LedgerError,
    LedgerUnavailable,
    Policy,
    PolicyChange,
    PolicySet,
)
from metering.ledger_policies import PolicyConflict
from storage.database import Pool

log = logging.getLogger(__name__)

DEFAULT_LIMITS: Final[dict[Policy, int]] = {"cutoff": 0, "grace": 1_000_000, "postpaid": 100_000_000}
"""Micros of debt that a policy allows where nobody says how many: 1 credit of grace, 100 on an invoice."""
PAGE: Final = 500
_FIELDS = "id, shard, policy, credit_limit, policy_revision"


class PolicyLedger(Protocol):
    """The part of the ledger that policies need."""

    async def set_policy(self, change: PolicyChange) -> PolicySet:
        """Set an account's policy, once per revision. Raises LedgerError."""


class PolicyError(Exception):
    """The policy was not written; the message says why."""


@dataclass(frozen=True, slots=True)
class Written:
    """The policy is written. `applied`: in force now; `waiting`: it will be, `reason` says for what; `conflict`:
    never, since Redis has this revision with another content (`change` raises then, and answers it never)."""

    policy: Policy
    limit: int
    revision: int
    state: Literal["applied", "waiting", "conflict"]
    reason: str = ""


async def change(pool: Pool, ledger: PolicyLedger, account: str, policy: Policy, limit: int | None = None) -> Written:
    """Write the account's policy with a limit in micros (None: the policy's default) and apply it. Repeatable.

    Raises PolicyError (unknown account, bad limit, a revision that Redis has with another content) and
    `storage.database.FAILED`. When Redis is away the answer is
    `waiting`: the ledger process applies it later. A limit below what is owed admits nothing new and ends nothing.
    """
    limit = DEFAULT_LIMITS[policy] if limit is None else limit
    if policy == "cutoff" and limit != 0:
        raise PolicyError("limit: under cutoff there is none.")
    if not 0 <= limit <= MICROS_MAX:
        raise PolicyError(f"limit: {limit} micros is not between 0 and {MICROS_MAX}.")
    await pool.execute(
        "UPDATE account SET policy = $2, credit_limit = $3, policy_revision = policy_revision + 1 "
        "WHERE id = $1 AND (policy, credit_limit) IS DISTINCT FROM ($2, $3)",
        account,
        policy,
        limit,
    )
    row = await pool.fetchrow(f"SELECT {_FIELDS} FROM account WHERE id = $1", account)  # noqa: S608
    if row is None:
        raise PolicyError(f"account {account}: there is none with this id.")
    applied = await _apply(ledger, row)
    if applied.state == "conflict":
        raise PolicyError(f"account {account}: {applied.reason}. Set another limit, and then this one again.")
    return applied


async def apply_pending(pool: Pool, ledger: PolicyLedger) -> dict[str, str]:
    """Apply every policy that the journal has not confirmed: why those that wait do so, by account. Harmless to repeat.

    Raises `storage.database.FAILED`."""
    waiting, after = {}, ""
    while True:
        rows = await pool.fetch(
            f"SELECT {_FIELDS} FROM account "  # noqa: S608
            "WHERE policy_applied < policy_revision AND id > $1 ORDER BY id LIMIT $2",
            after,
            PAGE,
        )
        for row in rows:
            written = await _apply(ledger, row)
            if written.state != "applied":
                waiting[row["id"]] = written.reason
        if len(rows) < PAGE:
            return waiting
        after = rows[-1]["id"]


async def _apply(ledger: PolicyLedger, row: Any) -> Written:
    policy, limit, revision = row["policy"], row["credit_limit"], row["policy_revision"]
    if revision == 0:
        return Written(policy, limit, revision, "applied")  # as every account begins
    try:
        await ledger.set_policy(PolicyChange(AccountRef(row["id"], row["shard"]), policy, limit, revision))
    except LedgerUnavailable as error:
        return Written(policy, limit, revision, "waiting", f"Redis: {error}")
    except PolicyConflict as error:
        log.error("policy of account %s: %s", row["id"], error)
        return Written(policy, limit, revision, "conflict", str(error))
    except LedgerError as error:
        log.error("policy of account %s: %s", row["id"], error)
        return Written(policy, limit, revision, "waiting", f"Redis: {error}")
    return Written(policy, limit, revision, "applied")
