"""The ledger on Redis: each verb is one script call, typed on both sides.

Must not: decide how much to hold or charge, retry a reserve or a progress (their callers do), or spell a key or a
script. Every verb is idempotent, so after LedgerUnavailable (outcome unknown) the same call may be made again.
The four hot verbs place their words by position; `RedisLedger` checks those positions against the headers once.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from metering import ledger_replies
from metering.keys import SHARDS
from metering.ledger import (
    AccountRef,
    Corrected,
    Gone,
    Held,
    HoldRequest,
    LedgerFrozen,
    LedgerUnavailable,
    NotCorrected,
    Outcome,
    Progressed,
    Refused,
    Repeated,
    SessionRef,
    Settled,
    Swept,
)
from metering.ledger_calls import answered, brought
from metering.ledger_policies import PolicyLedger
from metering.ledger_recovery import RecoveryLedger
from metering.ledger_replies import REFUSALS
from metering.scripts import Caller, Script, Word

RETRY_FIRST_S = 0.05

_RESERVE_KEYS = "meta account order grants session leases limits idempotency"
_RESERVE_ARGS = "ep uid sid kid owner body price metadata want minimum prompt lease rpm parallel past"
_PROGRESS_KEYS = "meta account order grants session leases"
_PROGRESS_ARGS = "ep uid sid fence q metered want lease"
_FINISH_KEYS = "meta account order grants session leases limits outbox"
_SETTLE_ARGS = "ep uid sid kid fence charge outcome metadata"
_CORRECT_ARGS = "ep uid sid kid fence charge metadata"
_VOID_ARGS = "ep uid sid kid fence metadata"
_SWEEP_ARGS = "ep uid sid kid"


class RedisLedger(PolicyLedger, RecoveryLedger):
    """One process's ledger. `lease_ms` is what reserve and progress ask for.

    settle and void repeat themselves while Redis gives no answer, at most `tries` times within `budget_ms`. They and
    the sweep go through `settling` where one is given: the client whose answers wait for a replica.
    """

    def __init__(
        self,
        client: Caller,
        *,
        lease_ms: int = 15_000,
        tries: int = 4,
        budget_ms: int = 10_000,
        loaded: dict[str, Script] | None = None,
        settling: Caller | None = None,
    ) -> None:
        super().__init__(client, loaded)
        self._settling = settling or client
        self.forget_when_lost(settling)
        self._lease_ms = lease_ms
        self._tries = tries
        self._budget_s = budget_ms / 1000
        self._reserve, self._progress = self._scripts["reserve"], self._scripts["progress"]
        self._settle, self._void, self._sweep = (self._scripts[name] for name in ("settle", "void", "sweep"))
        self._reserve.check(_RESERVE_KEYS, _RESERVE_ARGS)
        self._progress.check(_PROGRESS_KEYS, _PROGRESS_ARGS)
        self._settle.check(_FINISH_KEYS, _SETTLE_ARGS)
        self._void.check(_FINISH_KEYS, _VOID_ARGS)
        self._sweep.check(_FINISH_KEYS, _SWEEP_ARGS)
        self._scripts["correct"].check(_FINISH_KEYS, _CORRECT_ARGS)

    # --- the hot verbs

    async def reserve(self, request: HoldRequest) -> Held | Refused | Repeated:
        """Hold credit and admit the session under its key's limits. Raises LedgerUnavailable (outcome unknown:
        repeat with the same request, or `void`), LedgerFrozen, LedgerError."""
        uid, sid, kid, limits = request.account.id, request.session, request.key, request.limits
        shard = SHARDS[request.account.shard]
        rpm, parallel = limits.requests_per_minute, limits.parallel_sessions
        words: tuple[Word, ...] = (
            8,
            shard.meta,
            shard.account + uid,
            shard.order + uid,
            shard.grants + uid,
            shard.session + sid,
            shard.leases,
            shard.limits + kid,
            # Without one the bare prefix: a key of this shard like the others, so that a cluster takes the call.
            f"{shard.idempotency}{uid}:{request.idempotency}" if request.idempotency else shard.idempotency,
            self._epochs[shard.number] or await self._epoch(shard.number),
            uid,
            sid,
            kid,
            request.owner,
            request.body_hash,
            request.price_version,
            request.metadata,
            request.want,
            request.minimum,
            request.prompt_cost,
            self._lease_ms,
            "" if rpm is None else rpm,
            "" if parallel is None else parallel,
            request.past,
        )
        reply = await self._run(self._reserve, words)
        code = reply[0]
        if code == b"HELD" or code == b"EXISTS":
            return Held(int(reply[1]), int(reply[2]), int(reply[3]), int(reply[4]), code == b"EXISTS")
        if code == b"BOUNDS":
            return Refused("bounds", 0, 0)
        if code == b"REPEATED":
            return Repeated(reply[1].decode(), reply[2] == b"same")
        return Refused(REFUSALS[code], int(reply[1]), int(reply[2]), int(reply[3]))

    async def progress(self, ref: SessionRef, seq: int, metered: int, want_hold: int) -> Progressed | Gone:
        """Checkpoint `metered` micros (absolute, with the prompt) as number `seq`, renew the lease, extend the hold.

        Raises LedgerUnavailable (repeat it, or send the next one), LedgerFrozen, LedgerError."""
        epoch = self._epochs[ref.account.shard] or await self._epoch(ref.account.shard)
        words = _progress_words(epoch, ref, seq, metered, want_hold, self._lease_ms)
        return self._progress_reply(await self._run(self._progress, words))

    def progress_sent(self, ref: SessionRef, seq: int, metered: int, want_hold: int) -> asyncio.Future[Any] | None:
        """`progress` sent without a coroutine; `progressed` reads what it brings. None, with nothing sent, when the
        shard's epoch is not known yet."""
        epoch = self._epochs[ref.account.shard]
        if epoch is None:
            return None
        words = _progress_words(epoch, ref, seq, metered, want_hold, self._lease_ms)
        return self._client.call("EVALSHA", self._progress.sha, *words)

    def progressed(self, sent: asyncio.Future[Any]) -> Progressed | Gone:
        """What `progress_sent` brought. Raises as `progress` does, and LedgerUnavailable where `progress` would have
        loaded the script first."""
        return self._progress_reply(brought(sent))

    def _progress_reply(self, reply: list[Any]) -> Progressed | Gone:
        code = reply[0]
        if code == b"OK" or code == b"STALE":
            return Progressed(int(reply[1]), int(reply[2]), code == b"OK")
        return ledger_replies.gone(self._progress, reply)

    async def settle(self, ref: SessionRef, charge: int, outcome: Outcome, metadata: bytes = b"") -> Settled | Gone:
        """Charge `charge` micros and end the session; empty `metadata` keeps the reserve's.

        A repeat answers the first answer with `repeated`. Raises LedgerUnavailable when the retries are used up
        (the session is still owed), LedgerFrozen, LedgerError."""
        return self._settle_reply(await self._run_owed(self._settle, ref, ref.fence, charge, outcome, metadata))

    async def void(self, ref: SessionRef, metadata: bytes = b"") -> Settled | Gone:
        """Return the whole hold. An unknown session is `Gone("unknown")` and leaves a tombstone against a late reserve.

        `fence` 0 in `ref` says that reserve's answer never came. Raises as `settle` does."""
        return self._void_reply(await self._run_owed(self._void, ref, ref.fence, metadata))

    def settle_sent(
        self, ref: SessionRef, charge: int, outcome: Outcome, metadata: bytes
    ) -> asyncio.Future[Any] | None:
        """The first try of `settle`, for outcome void of `void`, sent without a coroutine; `settled` reads what it
        brings. None, with nothing sent, when the shard's epoch is not known yet."""
        epoch = self._epochs[ref.account.shard]
        if epoch is None:
            return None
        if outcome == "void":
            script, words = self._void, _finish_words(epoch, ref, ref.fence, metadata)
        else:
            script, words = self._settle, _finish_words(epoch, ref, ref.fence, charge, outcome, metadata)
        return self._settling.call("EVALSHA", script.sha, *words)

    def settled(self, outcome: Outcome, sent: asyncio.Future[Any]) -> Settled | Gone:
        """What `settle_sent` brought. Raises LedgerUnavailable (call `settle` or `void`), LedgerFrozen, LedgerError."""
        reply = brought(sent)
        return self._void_reply(reply) if outcome == "void" else self._settle_reply(reply)

    def _settle_reply(self, reply: list[Any]) -> Settled | Gone:
        return ledger_replies.ended(self._settle, reply, swept_is_gone=True)

    def _void_reply(self, reply: list[Any]) -> Settled | Gone:
        if reply[0] == b"TOMBSTONE":
            return Gone("unknown")
        if reply[0] == b"FINAL" and reply[5] != b"void":
            return Gone("final", int(reply[1]))
        return ledger_replies.ended(self._void, reply, swept_is_gone=False)

    async def correct(self, ref: SessionRef, charge: int, metadata: bytes) -> Corrected | NotCorrected:
        """Charge what a swept session of the caller came to, `charge` micros in all, beyond what the sweep charged.

        Upward only, once (a repeat answers the first answer), within an hour of the sweep. Raises LedgerUnavailable
        (outcome unknown: repeat it), LedgerFrozen, LedgerError."""
        epoch, script = await self._epoch_of(ref.account.shard), self._scripts["correct"]
        words = _finish_words(epoch, ref, ref.fence, charge, metadata)
        return ledger_replies.corrected(script, await self._run(script, words, self._settling))

    # --- the sweeper's verb

    async def sweep_due(self, shard: int, limit: int) -> list[Swept]:
        """Settle up to `limit` sessions whose lease is over, at what they last metered.

        Raises LedgerUnavailable, LedgerFrozen, LedgerError."""
        at, script = SHARDS[shard], self._scripts["due"]
        epoch = await self._epoch_of(shard)
        due = await self._run(
            script, script.place({"meta": at.meta, "leases": at.leases}, {"ep": epoch, "limit": limit})
        )
        named = [member.decode().split("|", 1) for member in due[1:]]
        keys = await answered(asyncio.gather(*(self._client.call("HGET", at.session + sid, "k") for _, sid in named)))
        swept = await asyncio.gather(
            *(
                self._sweep_one(epoch, SessionRef(sid, AccountRef(uid, shard), key.decode() if key else "-", 0))
                for (uid, sid), key in zip(named, keys, strict=True)
            ),
            return_exceptions=True,
        )
        for one in swept:
            if isinstance(one, BaseException):
                raise one  # after the others had their turn: a damaged session stops nobody else's sweep
        return [one for one in swept if isinstance(one, Swept)]

    async def _sweep_one(self, epoch: bytes, ref: SessionRef) -> Swept | None:
        reply = await self._run(self._sweep, _finish_words(epoch, ref), self._settling)
        if reply[0] in (b"NOTDUE", b"FINAL", b"UNKNOWN"):
            return None  # renewed or ended since it was listed
        if reply[0] != b"SETTLED":
            raise ledger_replies.refused(self._sweep, reply)
        return Swept(ref.session, ref.account, int(reply[1]), int(reply[2]), int(reply[4]))

    # --- plumbing

    async def _run_owed(self, script: Script, ref: SessionRef, *tail: Word) -> list[Any]:
        """`_run`, repeated while there is no answer: a settlement is owed until it is known to be done. The epoch is
        looked up each time: a lost connection makes it unknown."""
        ends = time.monotonic() + self._budget_s
        pause_s = RETRY_FIRST_S
        for left in range(self._tries - 1, -1, -1):
            try:
                epoch = self._epochs[ref.account.shard] or await self._epoch(ref.account.shard)
                return await self._run(script, _finish_words(epoch, ref, *tail), self._settling)
            except LedgerFrozen:
                raise
            except LedgerUnavailable:
                if left == 0 or time.monotonic() + pause_s >= ends:
                    raise
            await asyncio.sleep(pause_s)
            pause_s *= 2
        raise AssertionError("tries is at least 1")


def _progress_words(
    epoch: bytes, ref: SessionRef, seq: int, metered: int, want_hold: int, lease_ms: int
) -> tuple[Word, ...]:
    uid, sid = ref.account.id, ref.session
    shard = SHARDS[ref.account.shard]
    return (
        6,
        shard.meta,
        shard.account + uid,
        shard.order + uid,
        shard.grants + uid,
        shard.session + sid,
        shard.leases,
        epoch,
        uid,
        sid,
        ref.fence,
        seq,
        metered,
        want_hold,
        lease_ms,
    )


def _finish_words(epoch: bytes, ref: SessionRef, *tail: Word) -> tuple[Word, ...]:
    uid, sid, kid = ref.account.id, ref.session, ref.key
    shard = SHARDS[ref.account.shard]
    return (
        8,
        shard.meta,
        shard.account + uid,
        shard.order + uid,
        shard.grants + uid,
        shard.session + sid,
        shard.leases,
        shard.limits + kid,
        shard.outbox,
        epoch,
        uid,
        sid,
        kid,
        *tail,
    )
