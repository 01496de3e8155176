"""A call answered whole: attempts, one bill, one settlement, one JSON body.

Must not: stream, or render errors; failures after the hold are settled here and raised with the session's headers.
"""

from __future__ import annotations

import msgspec

from config.settings import Bounds
from metering.ledger import Gone, Settled
from providers.codec import Answer
from proxy.answer import Headers, bill_headers, billed_body
from proxy.errors import CallError, InternalError, LeaseLost
from proxy.live_session import LiveSession
from proxy.prepared import PreparedCall, SessionEnded
from proxy.session import Ending
from proxy.settlement import Bill, Settler
from proxy.upstream import Upstreams
from proxy.usage import CHANNELS, report


class WholeAnswer(msgspec.Struct, frozen=True):
    """The body and headers to send, and the bill behind them."""

    body: bytes
    headers: Headers
    bill: Bill


class WholeRelay:
    """Serves one call without streaming."""

    def __init__(self, upstreams: Upstreams, settler: Settler, bounds: Bounds) -> None:
        self._upstreams = upstreams
        self._settler = settler
        self._bounds = bounds

    async def run(self, session: LiveSession, call: PreparedCall) -> WholeAnswer:
        """The answer. Raises CallError with the session settled; SessionEnded when there is nobody to answer."""
        try:
            _, answer = await self._upstreams.fetch_answer(session, call)
        except CallError as error:
            due, settled = await self._settled(session, call, Ending.UPSTREAM_FAILED)
            error.headers = bill_headers(session, due, settled)
            raise
        except SessionEnded:
            ending = session.ending or Ending.INTERNAL
            due, settled = await self._settled(session, call, ending)
            if ending in (Ending.CLIENT_GONE, Ending.CLIENT_STALLED):
                raise
            public = session.error if isinstance(session.error, CallError) else InternalError()
            public.headers = bill_headers(session, due, settled)
            raise public from None
        _meter(session, answer)
        due, settled = await self._settled(session, call, Ending.COMPLETED)
        if settled is None and session.fenced:
            # A sweeper may have settled it, and then the answer is not paid for; or we have, and then it must be given.
            settled = await self._settler.last_word(session)
            unpaid = not isinstance(settled, Settled)
        else:
            unpaid = isinstance(settled, Gone)
        if unpaid:
            lost = LeaseLost()
            lost.headers = bill_headers(session, due, settled)
            raise lost
        session.delivered = True
        return WholeAnswer(billed_body(answer.root, session, due, settled), bill_headers(session, due, settled), due)

    async def _settled(
        self, session: LiveSession, call: PreparedCall, ending: Ending
    ) -> tuple[Bill, Settled | Gone | None]:
        due, settling = self._settler.begin(session, call, ending)
        return due, await settling


def _meter(session: LiveSession, answer: Answer) -> None:
    meter = session.meter
    if meter is None:
        raise InternalError
    if answer.usage is not None:
        report(session, answer.usage)
    if meter.reported is None:
        for choice, channel, tool, text in answer.texts():
            meter.add(choice, CHANNELS[channel], text, tool)
