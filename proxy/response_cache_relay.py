"""A kept answer to its client: paid for first, as a session of its own, then given as it was.

The charge is known before a byte is sent, so it is settled before: there is no end of such a session that could cost
anything else, whatever becomes of the client.
Must not: speak to a provider or to Redis, or decide what may be given.
"""

from __future__ import annotations

from collections.abc import Callable

from metering.ledger import Gone, Settled
from proxy.answer import bill_headers, credits_text, session_members
from proxy.client_stream import Headers
from proxy.errors import CallError, InternalError, LeaseLost
from proxy.live_session import LiveSession
from proxy.prepared import PreparedCall, SessionEnded
from proxy.response_cache_entry import Kept
from proxy.response_cache_waiting import Unwatched
from proxy.session import Ending
from proxy.settlement import Bill, Reply, Settler, charge_told
from proxy.whole_relay import WholeAnswer


class CachedRelay:
    """Gives kept answers."""

    def __init__(self, settler: Settler, render: Callable[[CallError], bytes] | None = None) -> None:
        """`render` makes an error's frame. None: then no response may begin before it is known what it is."""
        self._settler = settler
        self._render = render

    @property
    def tells_errors(self) -> bool:
        """Whether `refuse` may be called."""
        return self._render is not None

    async def refuse(self, client: Unwatched, error: CallError) -> None:
        """Tell a client whose response has begun with comments that nothing more will come of it."""
        if self._render is None:
            raise InternalError
        frame = self._render(error)
        while not client.finished([frame]) and await client.ready():
            pass
        client.ended = True

    async def whole(self, session: LiveSession, call: PreparedCall, kept: Kept, age_s: int) -> WholeAnswer:
        """A whole answer. Raises CallError with the session settled, SessionEnded when there is nobody to answer."""
        due, reply = await self._paid(session, call)
        return WholeAnswer(_last(session, due, reply, kept, age_s), bill_headers(session, due, reply), due)

    async def stream(
        self, session: LiveSession, call: PreparedCall, kept: Kept, age_s: int, client: tuple[Unwatched, Headers]
    ) -> Bill:
        """A stream, frame by frame as it was, as fast as the client reads, within its bounds. The bill's headers are
        put into the list beside the client's stream, which asks for them when it starts. Raises as `whole` does."""
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
