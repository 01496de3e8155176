"""The ledger's verbs of a recovery: freeze a shard, work in an epoch that is not open yet, make a hold again.

Must not: decide that a shard is lost (`recovery` does), or open an epoch (`rebuild` does).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final

from metering import ledger_replies
from metering.keys import SHARDS
from metering.ledger import LedgerError, SessionRef
from metering.ledger_calls import LedgerCalls, answered
from metering.receipts import Receipt
from metering.scripts import Caller, Script, Word, run

log = logging.getLogger(__name__)

PATIENCE_S: Final = 20.0
"""How long a session that a rebuilt shard does not know is waited for: late receipts are taken up meanwhile."""


class RecoveryLedger(LedgerCalls):
    """One process's ledger, as far as recoveries go."""

    def __init__(self, client: Caller, loaded: dict[str, Script] | None) -> None:
        super().__init__(client, loaded)
        self._freezing: set[asyncio.Task[None]] = set()
        self._missing_since: dict[int, float] = {}
        self.on_suspect: Callable[[int, str], None] = _tell

    async def freeze(self, number: int, epoch: bytes = b"") -> tuple[bytes, int] | None:
        """Stop a shard for everyone: its former epoch (empty: none) and n. None, with nothing changed, when it has
        another epoch than `epoch` (empty: any). Raises LedgerUnavailable, LedgerError."""
        script = self._scripts["freeze"]
        reply = await answered(run(self._client, script, script.place({"meta": SHARDS[number].meta}, {"ep": epoch})))
        if reply[0] == b"EPOCH":
            return None
        if reply[0] != b"FROZEN":
            raise ledger_replies.refused(script, reply)
        return reply[1], int(reply[2])

    def adopt(self, number: int, epoch: int) -> None:
        """Work in an epoch that is not open to others yet."""
        self._epochs[number] = str(epoch).encode()

    def epoch_of(self, number: int) -> int:
        """The shard's epoch as last known; 0 while it is not."""
        return int(self._epochs[number] or 0)

    async def reassert(self, receipt: Receipt, lease_ms: int) -> bool:
        """Make the session's hold again, of `receipt.held` micros at most. False when it has ended (or was voided
        before it began); a session that is held already stays as it is. Raises LedgerUnavailable, LedgerError."""
        shard, script = SHARDS[receipt.shard], self._scripts["reassert"]
        keys: dict[str, Word | list[Word]] = {
            "meta": shard.meta,
            "account": shard.account + receipt.account,
            "order": shard.order + receipt.account,
            "grants": shard.grants + receipt.account,
            "session": shard.session + receipt.session,
            "leases": shard.leases,
            "limits": shard.limits + receipt.key,
        }
        args: dict[str, Word | list[Word]] = {
            "ep": await self._epoch_of(receipt.shard),
            "uid": receipt.account,
            "sid": receipt.session,
            "kid": receipt.key,
            "fence": receipt.fence,
            "q": receipt.seq,
            "metered": receipt.metered,
            "want": receipt.held,
            "prompt": receipt.prompt,
            "owner": receipt.owner,
            "body": receipt.body,
            "price": receipt.price,
            "metadata": receipt.metadata,
            "lease": lease_ms,
        }
        reply = await self._run(script, script.place(keys, args))
        if reply[0] in (b"BOUNDS", b"CONFLICT"):
            raise ledger_replies.refused(script, reply)
        return reply[0] in (b"HELD", b"EXISTS")

    def awaited(self, ref: SessionRef) -> bool:
        """Whether a live session of ours that the shard does not know may come back. In an epoch that was opened after
        its hold it may: its receipt was late. In its own epoch it was lost unnoticed: the shard is frozen, so that
        it is looked at. False after `PATIENCE_S`: then it is gone."""
        number, now = ref.account.shard, time.monotonic()
        if ref.fence < self._opened[number]:
            return now - self._learned[number] < PATIENCE_S
        since = self._missing_since.get(number, 0.0)
        if now - since > 3 * PATIENCE_S:
            self._missing_since[number] = since = now
            self.suspect(number, self.epoch_of(number), f"does not know {ref.session}, which we hold")
        return now - since < PATIENCE_S

    def suspect(self, number: int, epoch: int, reason: str) -> None:
        """The shard has lost something: freeze it (without waiting), which is how a recovery is asked for."""
        self.on_suspect(number, reason)
        task = asyncio.get_running_loop().create_task(self._freeze_suspect(number, str(epoch).encode()))
        self._freezing.add(task)
        task.add_done_callback(self._freezing.discard)

    async def _freeze_suspect(self, number: int, epoch: bytes) -> None:
        try:
            await self.freeze(number, epoch)
        except LedgerError as error:
            log.error("shard %d could not be frozen: %s", number, error)


def _tell(number: int, reason: str) -> None:
    log.error("shard %d has lost state and is frozen: it %s", number, reason)
