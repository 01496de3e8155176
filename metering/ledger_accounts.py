"""The ledger's verbs on accounts, which no call waits for: credit given, figures read. `redis_ledger` adds a call's.

Must not: retry (every verb is idempotent, its caller may), or spell a key or a script.
"""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from metering import ledger_replies
from metering.keys import SHARDS, Shard
from metering.ledger import (
    AccountRef,
    Balance,
    ChangeRefused,
    Expired,
    Granted,
    GrantRefused,
    GrantRequest,
    LedgerFrozen,
    Past,
    Snapshot,
    Voided,
)
from metering.ledger_calls import LedgerCalls, answered
from metering.scripts import Word

SNAPSHOT_TRIES = 5


_GRANT_REFUSALS: dict[bytes, Literal["conflict", "full", "revoked", "bounds"]] = {
    b"CONFLICT": "conflict",
    b"FULL": "full",
    b"REVOKED": "revoked",
    b"BOUNDS": "bounds",
}


class AccountLedger(LedgerCalls):
    """One process's ledger, as far as accounts and grants go."""

    async def grant(self, request: GrantRequest) -> Granted | GrantRefused:
        """Issue credit, once per grant id. Raises LedgerUnavailable (repeat it), LedgerFrozen, LedgerError."""
        shard, uid, script = SHARDS[request.account.shard], request.account.id, self._scripts["grant"]
        reply = await self._run(
            script,
            script.place(
                _grant_keys(shard, uid),
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
        return GrantRefused(_GRANT_REFUSALS[code])

    async def revoke(self, account: AccountRef, grant: str) -> Voided | ChangeRefused:
        """Void what nobody holds of a grant, once; what is held and not spent is voided when its session ends.

        A grant that has not come yet stays out. Raises LedgerUnavailable (repeat it), LedgerFrozen, LedgerError."""
        shard, script = SHARDS[account.shard], self._scripts["revoke"]
        epoch = await self._epoch_of(shard.number)
        words: dict[str, Word | list[Word]] = {"ep": epoch, "uid": account.id, "gid": grant}
        return _voided(await self._run(script, script.place(_grant_keys(shard, account.id), words)))

    async def take(
        self, account: AccountRef, change: str, amount: int, *, whole: bool = True
    ) -> Voided | ChangeRefused:
        """Void up to `amount` micros of what is available, in burn order; `whole`: all of it or nothing.

        Decided once per id `change`, also when nothing was taken. Raises as `revoke` does."""
        shard, script = SHARDS[account.shard], self._scripts["take"]
        keys = _grant_keys(shard, account.id)
        del keys["expiries"]
        words: dict[str, Word | list[Word]] = {
            "ep": await self._epoch_of(shard.number),
            "uid": account.id,
            "change": change,
            "debit": amount,
            "whole": int(whole),
        }
        return _voided(await self._run(script, script.place(keys, words)))

    async def expire_due(self, shard: int, limit: int) -> tuple[int, list[Expired]]:
        """Expire up to `limit` grants of a shard whose time is over: how many were due, and those that had credit left.

        Raises LedgerUnavailable, LedgerFrozen, LedgerError."""
        at, script, epoch = SHARDS[shard], self._scripts["expiring"], await self._epoch_of(shard)
        due = await self._run(
            script, script.place({"meta": at.meta, "expiries": at.expiries}, {"ep": epoch, "limit": limit})
        )
        named = [member.decode(errors="replace").partition("|") for member in due[1:]]
        answers = await asyncio.gather(
            *(self._expire(epoch, AccountRef(uid, shard), gid) for uid, _, gid in named), return_exceptions=True
        )
        for one in answers:
            if isinstance(one, BaseException):
                raise one  # after the others had their turn: a damaged grant keeps no other from expiring
        return len(named), [one for one in answers if isinstance(one, Expired)]

    async def _expire(self, epoch: bytes, account: AccountRef, gid: str) -> Expired | None:
        script = self._scripts["expire"]
        words: dict[str, Word | list[Word]] = {"ep": epoch, "uid": account.id, "gid": gid}
        reply = await self._run(script, script.place(_grant_keys(SHARDS[account.shard], account.id), words))
        if reply[0] == b"BOUNDS":
            raise ledger_replies.refused(script, reply)
        return Expired(gid, account, int(reply[1]), int(reply[3])) if reply[0] == b"EXPIRED" else None

    async def balance(self, account: AccountRef) -> Balance:
        """The account's figures; zeros for one without grants. Raises LedgerUnavailable, LedgerFrozen."""
        shard = SHARDS[account.shard]
        calls = (
            self._client.call("HGET", shard.meta, "ep"),
            self._client.call("HMGET", shard.account + account.id, *ledger_replies.BALANCE_FIELDS),
        )
        epoch, row = await answered(asyncio.gather(*calls))
        if epoch is None or epoch != await self._epoch_of(shard.number):
            self._epochs[shard.number] = None  # asked for again: it was rebuilt, or will be
        if epoch is None or epoch != await self._epoch_of(shard.number):
            raise LedgerFrozen(f"shard {shard.number} is frozen")
        return ledger_replies.read_balance(row)

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


def _grant_keys(shard: Shard, uid: str) -> dict[str, Word | list[Word]]:
    """The keys of the verbs on one account's grants."""
    return {
        "meta": shard.meta,
        "account": shard.account + uid,
        "order": shard.order + uid,
        "grants": shard.grants + uid,
        "expiries": shard.expiries,
        "outbox": shard.outbox,
    }


def _voided(reply: list[Any]) -> Voided | ChangeRefused:
    if reply[0] in (b"CONFLICT", b"BOUNDS"):
        return ChangeRefused("conflict" if reply[0] == b"CONFLICT" else "bounds")
    return Voided(int(reply[1]), int(reply[2]), int(reply[3]), reply[0] == b"EXISTS")
