"""The ledger's verbs on accounts, which no call waits for: credit given, figures read. `redis_ledger` adds a call's.

Must not: retry (every verb is idempotent, its caller may), or spell a key or a script.
"""

from __future__ import annotations

import asyncio

from metering import ledger_replies
from metering.keys import SHARDS
from metering.ledger import (
    AccountRef,
    Balance,
    Granted,
    GrantRefused,
    GrantRequest,
    LedgerFrozen,
    Past,
    Snapshot,
)
from metering.ledger_calls import LedgerCalls, answered
from metering.scripts import Word

SNAPSHOT_TRIES = 5


class AccountLedger(LedgerCalls):
    """One process's ledger, as far as accounts and grants go."""

    async def grant(self, request: GrantRequest) -> Granted | GrantRefused:
        """Issue credit, once per grant id. Raises LedgerUnavailable (repeat it), LedgerFrozen, LedgerError."""
        shard, uid, script = SHARDS[request.account.shard], request.account.id, self._scripts["grant"]
        reply = await self._run(
            script,
            script.place(
                {
                    "meta": shard.meta,
                    "account": shard.account + uid,
                    "order": shard.order + uid,
                    "grants": shard.grants + uid,
                    "expiries": shard.expiries,
                    "outbox": shard.outbox,
                },
                {
                    "ep": await self._epoch_of(shard.number),
                    "uid": uid,
                    "gid": request.id,
                    "credit": request.amount,
                    "priority": request.priority,
                    "expiry": request.expires_ms,
                    "created": request.created_ms,
                },
            ),
        )
        code = reply[0]
        if code in (b"GRANTED", b"EXISTS"):
            return Granted(int(reply[1]), int(reply[2]), int(reply[3]), code == b"EXISTS")
        return GrantRefused("conflict" if code == b"CONFLICT" else "full" if code == b"FULL" else "bounds")

    async def balance(self, account: AccountRef) -> Balance:
        """The account's figures; zeros for one without grants. Raises LedgerUnavailable, LedgerFrozen."""
        shard = SHARDS[account.shard]
        calls = (
            self._client.call("HGET", shard.meta, "ep"),
            self._client.call("HMGET", shard.account + account.id, "av", "hd", "db", "tc", "ns"),
        )
        epoch, row = await answered(asyncio.gather(*calls))
        if epoch is None or epoch != await self._epoch_of(shard.number):
            raise LedgerFrozen(f"shard {shard.number} is frozen")
        return Balance(*(int(value or 0) for value in row))

    async def past(self, account: AccountRef, session: str) -> Past | None:
        """What became of a session of the account; None when Redis does not know it. Raises LedgerUnavailable."""
        name = SHARDS[account.shard].session + session
        row = await answered(self._client.call("HMGET", name, "st", "o", "c", "u"))
        return ledger_replies.read_past(row, account.id)

    async def snapshot(self, account: AccountRef) -> Snapshot:
        """The account with all its grants and open sessions at one instant, for the audit.

        Raises LedgerUnavailable, LedgerFrozen, LedgerError."""
        for _ in range(SNAPSHOT_TRIES):
            taken = await self._snapshot(account)
            if len(taken.sessions) == taken.balance.sessions:
                break  # else a session opened between the listing and the script; or the ledger is really wrong
        return taken

    async def _snapshot(self, account: AccountRef) -> Snapshot:
        shard, uid, script = SHARDS[account.shard], account.id, self._scripts["audit"]
        members = await answered(self._client.call("ZRANGE", shard.leases, "0", "-1"))
        mine = f"{uid}|".encode()
        sids: list[Word] = [member[len(mine) :] for member in members if member.startswith(mine)]
        reply = await self._run(
            script,
            script.place(
                {
                    "meta": shard.meta,
                    "account": shard.account + uid,
                    "order": shard.order + uid,
                    "grants": shard.grants + uid,
                    "leases": shard.leases,
                    "sessions": [shard.session.encode() + sid for sid in sids if isinstance(sid, bytes)],
                },
                {"ep": await self._epoch_of(shard.number), "uid": uid, "sids": sids},
            ),
        )
        if reply[0] != b"SNAPSHOT":
            raise ledger_replies.refused(script, reply)
        return ledger_replies.read_snapshot(reply)
