"""The ledger's verb on an account's policy: what it may do when its grants are used up.

Must not: retry (the verb is idempotent, its caller may), or decide who gets credit.
"""

from __future__ import annotations

from metering import ledger_replies
from metering.keys import SHARDS
from metering.ledger import LedgerError, PolicyChange, PolicySet
from metering.ledger_accounts import AccountLedger


class PolicyConflict(LedgerError):
    """The ledger has this revision with another policy or limit: the two stores do not tell the same history."""


class PolicyLedger(AccountLedger):
    """One process's ledger, as far as accounts, grants and policies go."""

    async def set_policy(self, change: PolicyChange) -> PolicySet:
        """Set an account's policy and limit, once per revision; an older revision changes nothing.

        Raises LedgerUnavailable (repeat it), LedgerFrozen, PolicyConflict, LedgerError (a value out of its bounds)."""
        shard, script = SHARDS[change.account.shard], self._scripts["policy"]
        words = script.place(
            {"meta": shard.meta, "account": shard.account + change.account.id, "outbox": shard.outbox},
            {
                "ep": await self._epoch_of(shard.number),
                "uid": change.account.id,
                "policy": change.policy,
                "limit": change.limit,
                "revision": change.revision,
            },
        )
        reply = await self._run(script, words)
        if reply[0] == b"BOUNDS":
            raise ledger_replies.refused(script, reply)
        if reply[0] == b"CONFLICT":
            raise PolicyConflict(f"revision {change.revision} has another policy or limit in Redis than in Postgres")
        return PolicySet(reply[0] != b"STALE", *(int(part) for part in reply[1:4]))
