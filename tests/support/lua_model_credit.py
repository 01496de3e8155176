"""What changes an account beside its sessions, as the ledger means it: grants, their ends, adjustments, policies.

Must not: know a script or a key. The answers are the ledger's own types, so that a test compares them whole.
"""

from __future__ import annotations

from typing import Literal

from metering.ledger import (
    MICROS_MAX,
    ChangeRefused,
    Granted,
    GrantRefused,
    GrantRequest,
    Policy,
    PolicySet,
    Voided,
)
from tests.support.lua_model_books import NEVER, Books, Grant


class Credit(Books):
    """Grants and policies of one account."""

    def __init__(self) -> None:
        super().__init__()
        self.issued: dict[str, Granted] = {}
        self.early: dict[str, Voided] = {}
        self.changes: dict[str, tuple[int, bool, Voided]] = {}
        self.revision = 0
        self.policy_entry = 0

    def grant(self, asked: GrantRequest) -> Granted | GrantRefused:
        """Issue credit once per id; debt is repaid first."""
        if not 0 < asked.amount <= MICROS_MAX:
            return GrantRefused("bounds")
        grant, first = self.grants.get(asked.id), self.issued.get(asked.id)
        if grant is not None and first is not None:
            if (grant.issued, grant.expires) != (asked.amount, asked.expires_ms):
                return GrantRefused("conflict")
            return Granted(self.available, first.entry, first.repaid, repeated=True)
        if asked.id in self.early:
            return GrantRefused("revoked")
        if self.available + self.held + self.charged + asked.amount > MICROS_MAX:
            return GrantRefused("bounds")
        repaid = min(self.debt, asked.amount)
        self.debt -= repaid
        left = asked.amount - repaid
        order = (asked.priority, asked.expires_ms or NEVER, asked.created_ms, asked.id)
        self.grants[asked.id] = Grant(order, asked.amount, left, asked.expires_ms, c=repaid, listed=left > 0)
        self.issued[asked.id] = Granted(self.available, self.journal(), repaid)
        return self.issued[asked.id]

    def expiries(self) -> dict[str, int]:
        """The grants whose end will be looked at, with that end."""
        return {gid: grant.expires for gid, grant in self.grants.items() if grant.listed and grant.expires}

    def expire_due(self) -> tuple[int, list[tuple[str, int, int]]]:
        """What the expirer moves: how many are due, and (grant, amount, entry) in the order of their ends."""
        over = sorted((end, gid) for gid, end in self.expiries().items() if end <= self.now)
        moved = [(gid, self.grants[gid].a, self.expire(gid)) for _, gid in over]
        return len(over), [(gid, amount, int(answer[3])) for gid, amount, answer in moved if amount]

    def expire(self, gid: str) -> list[str]:
        """What nobody holds of one grant breaks at its end: the verb's answer, word by word."""
        grant = self.grants.get(gid)
        if grant is None or grant.expires == 0:
            return ["UNKNOWN"]
        if grant.live(self.now):
            return ["NOTDUE", str(grant.expires - self.now)]
        amount, grant.a, grant.x, grant.listed = grant.a, 0, grant.x + grant.a, False
        self.write()
        return ["EXPIRED", str(amount), str(self.available), str(self.journal())] if amount else ["DONE"]

    def revoke(self, gid: str) -> Voided:
        """What nobody holds of a grant is voided, once; one that never came is refused from then on."""
        grant = self.grants.get(gid)
        past = self.early.get(gid) if grant is None else grant.revocation
        if past is not None:
            return Voided(past.amount, self.available, past.entry, repeated=True)
        entry = self.journal()
        if grant is None:
            self.early[gid] = Voided(0, self.available, entry)
            return self.early[gid]
        amount, grant.a, grant.v = grant.a, 0, grant.v + grant.a
        grant.listed, grant.revoked = False, True
        grant.revocation = Voided(amount, self.available, entry)
        return grant.revocation

    def adjust(self, change: str, amount: int, whole: bool) -> Voided | ChangeRefused:
        """Up to `amount` micros of what is available are voided in burn order, decided once per `change`."""
        if amount == 0:
            return ChangeRefused("bounds")
        if change in self.changes:
            *same, first = self.changes[change]
            if same != [amount, whole]:
                return ChangeRefused("conflict")
            return Voided(first.amount, self.available, first.entry, repeated=True)
        taken = self.plan(amount)
        if whole and sum(taken.values()) < amount:
            taken = {}
        for gid, part in taken.items():
            self.grants[gid].a -= part
            self.grants[gid].v += part
        self.changes[change] = (amount, whole, Voided(sum(taken.values()), self.available, self.journal()))
        return self.changes[change][2]

    def set_policy(self, policy: Policy, limit: int, revision: int) -> PolicySet | Literal["bounds", "conflict"]:
        """A policy counts once per revision, and none that is older than the last."""
        if revision < 1 or (policy == "cutoff" and limit > 0):
            return "bounds"
        if revision < self.revision:
            return PolicySet(False, self.debt, self.line, self.policy_entry)
        if revision == self.revision:
            if (policy, limit) != (self.policy, self.limit):
                return "conflict"
            return PolicySet(True, self.debt, self.line, self.policy_entry)
        self.policy, self.limit, self.revision = policy, limit, revision
        self.policy_entry = self.journal()
        return PolicySet(True, self.debt, self.line, self.policy_entry)
