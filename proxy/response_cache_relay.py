"""A kept answer to its client: paid for first, as a session of its own, then given as it was.

The charge is known before a byte is sent, so it is settled before: there is no end of such a session that could cost
anything else, whatever becomes of the client.
Must not: speak to a provider or to Redis, or decide what may be given.
"""

from __future__ import annotations

from metering.ledger import Gone, Settled
from proxy.answer import bill_headers, credits_text, session_members
from proxy.client_stream import ClientStream, Headers
from proxy.errors import CallError, InternalError, LeaseLost
from proxy.live_session import LiveSession
from proxy.response_cache_entry import Kept
from proxy.session import Ending
from proxy.settlement import Bill, Reply, Settler, charge_told
from proxy.upstream import PreparedCall, SessionEnded
from proxy.whole_relay import WholeAnswer


class CachedRelay:
    """Gives kept answers."""

    def __init__(self, settler: Settler) -> None:
        self._settler = settler

    async def whole(self, session: LiveSession, call: PreparedCall, kept: Kept, age_s: int) -> WholeAnswer:
        """A whole answer. Raises CallError with the session settled, SessionEnded when there is nobody to answer."""
        due, reply = await self._paid(session, call)
        return WholeAnswer(_last(session, due, reply, kept, age_s), bill_headers(session, due, reply), due)

    async def stream(
        self, session: LiveSession, call: PreparedCall, kept: Kept, age_s: int, client: tuple[ClientStream, Headers]
    ) -> Bill:
        """A stream, frame by frame as it was, as fast as the client reads. The bill's headers are put into the list
        beside the client's stream, which asks for them when it starts. Raises as `whole` does."""
        to, headers = client
        due, reply = await self._paid(session, call)
        headers += bill_headers(session, due, reply)
        for block in kept.blocks():
            while not to.written(block):
                if not await to.ready():
                    to.ended = True
                    return due
        last = [_last(session, due, reply, kept, age_s)] if kept.last else []
        while not to.finished(last) and await to.ready():
            pass
        to.ended = True
        return due

    async def _paid(self, session: LiveSession, call: PreparedCall) -> tuple[Bill, Reply]:
        """Settle. Nothing may be given that the ledger did not take; where it does not answer, before the fence."""
        ended = session.ending
        due, settling = self._settler.begin(session, call, ended or Ending.CACHED)
        reply: Reply = await settling
        if ended in (Ending.CLIENT_GONE, Ending.CLIENT_STALLED):
            raise SessionEnded
        unpaid = isinstance(reply, Gone)
        if reply is None and session.fenced:
            reply = await self._settler.last_word(session)
            unpaid = not isinstance(reply, Settled)
        if ended is not None or unpaid:
            error = session.error if isinstance(session.error, CallError) else InternalError()
            error = LeaseLost() if ended is None else error
            error.headers = bill_headers(session, due, reply)
            raise error
        session.delivered = True
        return due, reply


def _last(session: LiveSession, due: Bill, reply: Reply, kept: Kept, age_s: int) -> bytes:
    """What carries the bill: `x_tollgate` says in addition that the answer was kept, and for how long."""
    micros = charge_told(session, due, reply)
    members = session_members(session, due, reply).partition(b":")[2]
    marked = b'%b,"cache":"hit","age":%d}' % (members[:-1], age_s)
    return kept.billed(None if micros is None else credits_text(micros), marked)
