"""A session's one settlement: the amount by the table of `proxy.session`, its metadata, and the reply for the client.

Must not: run inside a request's own task (a disconnect cancels that); `LiveSessions.detach` runs it to its end.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec

from metering.ledger import (
    Corrected,
    Gone,
    LedgerError,
    LedgerFrozen,
    LedgerUnavailable,
    NotCorrected,
    Outcome,
    Settled,
)
from metering.pricing import TokenUsage, cost
from metering.receipts import Receipts
from metering.redis_ledger import RedisLedger
from proxy import telemetry
from proxy.candidates import Route
from proxy.live_session import Attempt, LiveSession, added
from proxy.live_sessions import LiveSessions
from proxy.prepared import PreparedCall
from proxy.session import Charge, Ending, Phase, charge_for

RETRY_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
CORRECT_WITHIN_S = 3_600.0
"""How long after its sweep the ledger takes a session's correction."""
METADATA_BYTES_MAX = 4_096
ATTEMPTS_KEPT = 16


Reply = Settled | Gone | None
"""What the ledger said of a settlement; None when it has not answered yet."""


class Bill(msgspec.Struct, frozen=True):
    """What a session comes to: the usage charged, its source, the amount and the journal's outcome."""

    usage: TokenUsage
    source: str
    micros: int
    outcome: Outcome
    counted_output: int | None
    ending: Ending


def bill(session: LiveSession, ending: Ending, prompt_kind: str) -> Bill:
    """Who pays what. Pure over the session's state."""
    charge, outcome = charge_for(ending, session.phase, stream=session.stream)
    meter, price = session.meter, session.price
    if charge is Charge.CACHED and session.cached is not None:
        return Bill(session.cached.usage, "cache", session.cached.micros, outcome, None, ending)
    if charge is Charge.PROMPT and not session.request_sent:
        charge, outcome = Charge.NOTHING, "void"  # the attempt was still connecting: the provider saw nothing
    if session.carried is not None:
        return _continued(session, ending, prompt_kind, outcome)
    if charge is Charge.NOTHING or meter is None or price is None:
        return Bill(TokenUsage(0, 0, 0, 0, 0), "counted", 0, outcome, 0, ending)
    if charge is Charge.REPORTED and meter.reported is not None:
        # A whole answer with believable usage is not tokenised.
        counted = meter.counted_output() if session.stream else None
        return Bill(meter.reported, "provider", cost(price, meter.reported), outcome, counted, ending)
    usage = meter.counted()
    charged = TokenUsage(usage.prompt, 0, 0, 0, 0) if charge is Charge.PROMPT else usage
    return Bill(charged, prompt_kind, cost(price, charged), outcome, meter.counted_output(), ending)


def _continued(session: LiveSession, ending: Ending, prompt_kind: str, outcome: Outcome) -> Bill:
    """The bill of a stream that several providers wrote: each part at its provider's price, the prompt once."""
    usage, micros, counted = session.carried or TokenUsage(0, 0, 0, 0, 0), session.carried_micros, 0
    meter, price = session.meter, session.price
    if meter is not None and price is not None:
        last = meter.counted()
        usage, micros = added(usage, last), micros + cost(price, last)
        counted = last.output
    carried = session.carried.output if session.carried is not None else 0
    return Bill(usage, prompt_kind, micros, outcome, carried + counted, ending)


class _Owed(msgspec.Struct):
    """One settlement on its way."""

    session: LiveSession
    route: Route
    ending: Ending
    due: Bill
    metadata: bytes


def _refused(owed: _Owed, error: LedgerError) -> None:
    telemetry.SETTLE_FAILED.inc()
    telemetry.log.error(
        "the ledger refused a settlement; the session stays open",
        session=owed.session.id,
        account=owed.session.ref.account.id,
        ending=owed.ending,
        due_micros=owed.due.micros,
        reason=str(error),
    )


def _given(session: LiveSession, due: Bill) -> bool:
    """Whether the client has what the bill is for. A whole answer whose session was swept is held back, and so is a
    kept one."""
    return (session.stream and session.cached is None) or session.delivered or due.outcome != "completed"


def corrects(session: LiveSession, due: Bill, reply: Gone) -> bool:
    """Whether a correction follows: only a sweep answers a settlement with a charge that is not its own (a void charges
    nothing to begin with)."""
    return reply.state == "final" and due.micros > reply.charged and _given(session, due)


def charge_told(session: LiveSession, due: Bill, reply: Reply) -> int | None:
    """Micros that a client is told, wherever it is told: what Postgres will show for the session, or None, which is not
    told. Certain are the ledger's own words, unless a correction follows, which the house may have to absorb. Before
    its answer that is the amount due where the hold covers it and no checkpoint said more, so that a sweep and its
    correction come to the same."""
    if reply is None:
        return due.micros if session.checkpoint_metered <= due.micros <= session.held else None
    if isinstance(reply, Gone) and (reply.state != "final" or corrects(session, due, reply)):
        return None
    return reply.charged


def _corrected(owed: _Owed, reply: Corrected | NotCorrected | None, said: str) -> None:
    """Count and tell a correction; `said` is the ledger's trouble where there is no reply."""
    about = {"session": owed.session.id, "account": owed.session.ref.account.id, "due_micros": owed.due.micros}
    if isinstance(reply, Corrected):
        telemetry.CORRECTIONS.labels("corrected").inc()
        telemetry.CORRECTED_MICROS.inc(reply.charged)
        telemetry.log.warning(
            "swept session corrected", **about, charged_micros=reply.charged, absorbed_micros=reply.absorbed
        )
        return
    reason = reply.reason if reply is not None else "failed"
    telemetry.CORRECTIONS.labels(reason).inc()
    if reason != "lower":  # then nothing was due: the house had already paid for the difference
        telemetry.log.error("swept session not corrected", **about, reason=reason if reply is not None else said)


class Settler:
    """Settles sessions of this worker."""

    def __init__(self, ledger: RedisLedger, live: LiveSessions, price_version: str, reply_ms: int) -> None:
        self._reply_s = reply_ms / 1000
        self._ledger = ledger
        self._live = live
        self._price_version = price_version
        self.receipts = Receipts(price_version, ledger.suspect)
        """What this worker owes and was acknowledged, until Postgres has it."""
        self._last_words: dict[str, asyncio.Future[None]] = {}

    def begin(self, session: LiveSession, call: PreparedCall, ending: Ending) -> tuple[Bill, asyncio.Future[Reply]]:
        """Fix the bill now and settle, whatever becomes of the request. The future brings the ledger's answer; None
        when it does not come in `settle_reply_ms` (to the tick) or is a refusal. Call once per session."""
        if session.exchange is not None:
            session.request_sent = session.exchange.sent
            session.exchange.release()
            session.exchange = None
        due = bill(session, ending, call.prompt_kind)
        owed = _Owed(session, call.route, ending, due, self._metadata(session, call, ending, due))
        self.receipts.owed(session.ref, due.micros, due.outcome, owed.metadata)
        session.advance(Phase.SETTLING)
        session.content_due = None
        settling: asyncio.Future[Reply] = self._live.due_within(self._reply_s)
        sent = None  # a checkpoint under way must not come after it
        if session.checkpoint is None:
            sent = self._ledger.settle_sent(session.ref, due.micros, due.outcome, owed.metadata)
        if sent is None:
            self._live.detach(self._settle(owed, settling))
        else:
            sent.add_done_callback(lambda sent: self._answered(owed, sent, settling))
        return due, settling

    async def last_word(self, session: LiveSession) -> Reply:
        """The ledger's answer to a settlement that was begun, however long it takes; None for a refusal. For what may
        reach the client only when it is known to be charged."""
        if session.phase is not Phase.FINAL:
            last = self._last_words[session.id] = self._live.future()
            try:
                await last
            finally:
                del self._last_words[session.id]
        return session.settled

    def abandoned(self, session: LiveSession, call: PreparedCall) -> None:
        """The request's task is over. Whatever ended it, a session that nobody began to settle is settled now: its
        lease is renewed as long as it is live, so no sweeper would ever end it."""
        if session.phase < Phase.SETTLING:
            self.begin(session, call, session.ending or Ending.INTERNAL)

    def _answered(self, owed: _Owed, sent: asyncio.Future[Any], settling: asyncio.Future[Reply]) -> None:
        """The first try is over. No task was needed for it; whatever must be tried again gets one."""
        reply: Reply = None
        again = False
        try:
            reply = self._ledger.settled(owed.due.outcome, sent)
            again = self._awaited(owed, reply)
        except LedgerUnavailable:
            again = True
        except LedgerError as error:
            _refused(owed, error)
        finally:
            if not again:
                self._over(owed, reply, settling)
        if again:
            telemetry.SETTLE_RETRIED.inc()
            self._live.detach(self._settle(owed, settling))

    async def _settle(self, owed: _Owed, settling: asyncio.Future[Reply]) -> None:
        """Until the ledger answers: every call is idempotent. Gone when the session was no longer ours; None when the
        ledger cannot settle it: the session stays there, for the sweeper once its damage is mended."""
        session, due = owed.session, owed.due
        if session.checkpoint is not None:
            await asyncio.wait({session.checkpoint})
        reply: Reply = None
        tries = 0
        try:
            while reply is None:
                try:
                    reply = await self._send(session, due, owed.metadata)
                    if self._awaited(owed, reply):
                        reply = None
                        raise LedgerFrozen("the session is not held again yet")
                except LedgerUnavailable:
                    telemetry.SETTLE_RETRIED.inc()
                    await asyncio.sleep(RETRY_S[min(tries, len(RETRY_S) - 1)])
                    tries += 1
        except LedgerError as error:
            _refused(owed, error)
        finally:
            self._over(owed, reply, settling)

    def _over(self, owed: _Owed, reply: Reply, settling: asyncio.Future[Reply]) -> None:
        if not settling.done():  # else the client was not kept waiting any longer, or is gone
            settling.set_result(reply)
        owed.session.settled = reply
        owed.session.advance(Phase.FINAL)
        last = self._last_words.get(owed.session.id) if self._last_words else None
        if last is not None and not last.done():
            last.set_result(None)
        self._live.remove(owed.session)
        if isinstance(reply, Settled):
            epoch = self._ledger.epoch_of(owed.session.ref.account.shard)
            self.receipts.acknowledged(owed.session.id, epoch, reply.entry, reply.charged, repeated=reply.repeated)
        elif reply is None or not corrects(owed.session, owed.due, reply):
            self.receipts.dropped(owed.session.id)
        if reply is None:
            return
        self._count(owed.session, owed.route, owed.ending, owed.due, reply)
        if isinstance(reply, Gone) and corrects(owed.session, owed.due, reply):
            self._live.detach(self._correct(owed))

    def _awaited(self, owed: _Owed, reply: Settled | Gone) -> bool:
        """Whether the ledger lost the session and may get it back. A void has nothing to wait for."""
        lost = isinstance(reply, Gone) and reply.state == "unknown" and owed.due.outcome != "void"
        return lost and self._ledger.awaited(owed.session.ref)

    async def _correct(self, owed: _Owed) -> None:
        """Charge what the sweep of our session could not know: the ledger was told of it too late."""
        session, due = owed.session, owed.due
        ends, tries = time.monotonic() + CORRECT_WITHIN_S, 0
        reply: Corrected | NotCorrected | None = None
        said = "the ledger did not answer"
        while reply is None and time.monotonic() < ends:
            try:
                reply = await self._ledger.correct(session.ref, due.micros, owed.metadata)
            except LedgerUnavailable as error:
                said = str(error)
                await asyncio.sleep(RETRY_S[min(tries, len(RETRY_S) - 1)])
                tries += 1
            except LedgerError as error:
                said = str(error)
                break
        self.receipts.dropped(session.id)
        _corrected(owed, reply, said)

    async def _send(self, session: LiveSession, due: Bill, metadata: bytes) -> Settled | Gone:
        if due.outcome == "void":
            return await self._ledger.void(session.ref, metadata)
        return await self._ledger.settle(session.ref, due.micros, due.outcome, metadata)

    def _count(self, session: LiveSession, route: Route, ending: Ending, due: Bill, reply: Settled | Gone) -> None:
        ours = isinstance(reply, Settled)
        labels = route.name, ending, due.outcome if ours else "swept", due.source
        usage = due.usage
        telemetry.session_ended(
            labels,
            reply.charged,
            reply.absorbed if isinstance(reply, Settled) else 0,
            (usage.prompt, usage.cached, usage.output, usage.reasoning),
        )
        if isinstance(reply, Gone):
            telemetry.log.error(
                "session was no longer ours at its settlement",
                session=session.id,
                state=reply.state,
                charged_micros=reply.charged,
                due_micros=due.micros,
            )

    def _metadata(self, session: LiveSession, call: PreparedCall, ending: Ending, due: Bill) -> bytes:
        answered = session.attempts[-1] if session.attempts else None
        if answered is not None:
            _account(answered, session, due)
            answered.close(ending)
        first, usage = session.first_content_at, due.usage
        metadata = _Metadata(
            request_id=session.request_id,
            route=call.route.name,
            stream=session.stream,
            provider=answered.provider if answered else None,
            model=answered.model if answered else None,
            attempts=[each.record() for each in session.attempts[-ATTEMPTS_KEPT:]],
            prompt=usage.prompt,
            cached=usage.cached,
            cache_write=usage.cache_write,
            output=usage.output,
            reasoning=usage.reasoning,
            counted_prompt=call.prompt_tokens,
            counted_output=due.counted_output,
            source=due.source,
            ending=ending,
            first_content_ms=None if first is None else int((first - session.started_at) * 1000),
            duration_ms=int((time.monotonic() - session.started_at) * 1000),
            price_version=self._price_version,
            house_cost=_house_cost(session),
            limited=session.limited,
            idempotency=session.idempotency or msgspec.UNSET,
        )
        encoded = msgspec.json.encode(metadata)
        while len(encoded) > METADATA_BYTES_MAX and metadata.attempts:
            del metadata.attempts[0]
            encoded = msgspec.json.encode(metadata)
        return encoded


class _Metadata(msgspec.Struct):
    """What the journal's row says of a session beside the money, as it stands in the outbox."""

    request_id: str
    route: str
    stream: bool
    provider: str | None
    model: str | None
    attempts: list[dict[str, Any]]
    prompt: int
    cached: int
    cache_write: int
    output: int
    reasoning: int
    counted_prompt: int
    counted_output: int | None
    source: str
    ending: str
    first_content_ms: int | None
    duration_ms: int
    price_version: str
    house_cost: int | None
    limited: bool
    idempotency: str | msgspec.UnsetType


def _account(last: Attempt, session: LiveSession, due: Bill) -> None:
    """What the last attempt worked on, and its cost to the house, unless that was told when it failed."""
    meter = session.meter
    if last.prompt:
        return
    if session.carried is None:
        session.worked(last, due.usage)
    elif meter is not None and last.status is not None and 200 <= last.status < 300:
        session.worked(last, meter.counted())


def _house_cost(session: LiveSession) -> int | None:
    """Micros the house pays for all attempts whose cost is known; nothing for a kept answer. None: none is."""
    if session.cached is not None:
        return 0
    total: int | None = None
    for each in session.attempts:
        if each.cost is not None:
            total = each.cost if total is None else total + each.cost
    return total
