"""The relay: provider bytes in, metered frames out, one settlement before the end. The only loop of a stream.

Walk: attempts -> first content -> pump (meter, cover check, forward) -> settle -> usage, `[DONE]`. Any other ending
hands the settlement to a detached task and tells the client in-band.
Must not: know keys, routes' configuration or statuses; errors are rendered by the function it is given.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from config.settings import Bounds
from metering.ledger import Gone, Settled
from metering.meter import Meter
from providers.events import Chunk, Completed, Failed, UsageSeen
from proxy import telemetry
from proxy.answer import bill_headers, session_members, usage_json
from proxy.client_stream import ClientStream
from proxy.errors import CallError, InternalError, LeaseLost, OutOfCredit
from proxy.live_session import LiveSession
from proxy.live_sessions import LiveSessions, boot_ms
from proxy.session import Ending, Phase
from proxy.settlement import Bill, Settler
from proxy.transport_errors import TransportError
from proxy.upstream import Opened, PreparedCall, SessionEnded, Upstreams, count, failure_error, report, transport_error

RenderError = Callable[[CallError], bytes]


class StreamRelay:
    """Relays one stream. Made per call; `run` returns when the client has its answer and the settlement is owed to
    nobody but a tracked task."""

    def __init__(
        self,
        upstreams: Upstreams,
        live: LiveSessions,
        settler: Settler,
        bounds: Bounds,
        render: RenderError,
    ) -> None:
        self._upstreams = upstreams
        self._live = live
        self._settler = settler
        self._bounds = bounds
        self._render = render

    async def run(self, session: LiveSession, call: PreparedCall, client: ClientStream) -> Bill:
        """Serve the stream. Raises CallError when it failed before the response began (the session is settled)."""
        session.client = client
        try:
            opened = await self._upstreams.open_stream(session, call)
            ending, failure = await self._pump(session, opened, client)
            return await self._close(session, call, client, opened, ending, failure)
        except CallError as error:
            return await self._end(session, call, client, Ending.UPSTREAM_FAILED, error)
        except SessionEnded:
            return await self._end(session, call, client, session.ending or Ending.INTERNAL, session.error)
        except asyncio.CancelledError:
            if session.ending is None or session.phase >= Phase.SETTLING:
                raise
            client.ended = True  # we cancelled it ourselves, in a write: there is nobody to tell
            due, _ = self._settler.begin(session, call, session.ending)
            return due

    async def _pump(
        self, session: LiveSession, opened: Opened, client: ClientStream
    ) -> tuple[Ending, CallError | None]:
        """Forward until the stream is over; returns how it ended. Raises SessionEnded."""
        events = opened.events
        codec, exchange = opened.codec, opened.exchange
        while True:
            out: list[bytes] = []
            over: tuple[Ending, CallError | None] | None = None
            for event in events:
                if isinstance(event, Chunk):
                    if not await self._covered(session, event):
                        over = Ending.CREDIT_CUT, None
                        break
                    out.append(event.payload)
                elif isinstance(event, UsageSeen):
                    report(session, event.usage)
                elif isinstance(event, Completed):
                    out += [codec.finish_chunk(choice, "stop") for choice in event.missing_finish]
                    over = Ending.COMPLETED, None
                elif isinstance(event, Failed):
                    over = Ending.UPSTREAM_FAILED, failure_error(event.failure)
            if session.ending is not None:
                raise SessionEnded
            if boot_ms() >= session.fence_ms:
                session.end(Ending.LEASE_LOST, LeaseLost())
                raise SessionEnded
            if out:
                await client.payloads(out)
            if over is not None:
                return over
            try:
                data = await exchange.read()
            except TransportError as error:
                if session.ending is not None:
                    raise SessionEnded from None
                return Ending.UPSTREAM_FAILED, transport_error(error)
            events = codec.feed(data) if data else codec.end_of_stream()

    async def _covered(self, session: LiveSession, event: Chunk) -> bool:
        """Meter a chunk; whether the hold covers everything up to and with it, after asking for more if it must."""
        meter = _meter(session)
        count(meter, event)
        if not session.exhausted and session.held < session.hold_max:
            if meter.fits(session.held - session.slice_low_cost):
                return True
            self._live.checkpoint(session, min(session.held + session.slice_cost, session.hold_max))
        if meter.fits(session.held):
            return True
        await self._live.extend(session)
        if meter.fits(session.held):
            return True
        meter.take_back()
        return False

    async def _close(
        self,
        session: LiveSession,
        call: PreparedCall,
        client: ClientStream,
        opened: Opened,
        ending: Ending,
        failure: CallError | None,
    ) -> Bill:
        """The stream is over by itself: settle, then tell the client how."""
        if session.ending is not None:
            raise SessionEnded
        attempt = session.attempts[-1]
        attempt.close(ending.value if failure is None else type(failure).__name__)
        telemetry.ATTEMPTS.labels(attempt.provider, attempt.outcome).inc()
        usage_wanted = call.request.usage_wanted
        due, settling = self._settler.begin(session, call, ending)
        settled = await self._reply(settling)
        last: list[bytes] = []
        if ending is Ending.CREDIT_CUT:
            last += [opened.codec.finish_chunk(choice, "length") for choice in opened.codec.open_choices]
        if usage_wanted and failure is None:
            members = session_members(session, due, settled)
            last.append(opened.codec.usage_chunk(usage_json(session, due, settled), members))
        if ending is Ending.CREDIT_CUT:
            charged = settled.charged if settled is not None else due.micros
            last.append(self._render(_cut_error(session, charged)))
        if failure is not None:
            last.append(self._render(failure))
        await client.finish(last)
        return due

    async def _end(
        self,
        session: LiveSession,
        call: PreparedCall,
        client: ClientStream,
        ending: Ending,
        error: Exception | None,
    ) -> Bill:
        """The stream ended before content, or from outside. A client that is still there is told."""
        due, settling = self._settler.begin(session, call, ending)
        public = error if isinstance(error, CallError) else InternalError()
        if ending in (Ending.CLIENT_GONE, Ending.CLIENT_STALLED):
            client.ended = True
            return due
        settled = await self._reply(settling)
        if not client.started:
            client.ended = True
            public.headers = bill_headers(session, due, settled)
            raise public
        if ending is not Ending.LEASE_LOST:
            await client.finish([self._render(public)])
        return due

    async def _reply(self, settling: asyncio.Task[Settled | Gone]) -> Settled | Gone | None:
        """The settlement's answer, if it comes in time; the task goes on either way."""
        done, _ = await asyncio.wait({settling}, timeout=self._bounds.settle_reply_ms / 1000)
        if not done:
            telemetry.SETTLE_LATE.inc()
            return None
        return settling.result()


def _meter(session: LiveSession) -> Meter:
    if session.meter is None:
        raise InternalError
    return session.meter


def _cut_error(session: LiveSession, charged: int) -> OutOfCredit:
    return OutOfCredit(
        "The account's credit ended during this answer.",
        metadata={"limit": "balance", "session": session.id, "charged": charged},
    )
