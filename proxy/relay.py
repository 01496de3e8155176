"""The relay: provider bytes in, metered frames out, one settlement before the end. The walk of a stream.

Walk: attempts -> first content -> pump (`proxy.pump`) -> settle -> usage, `[DONE]`. Any other ending
hands the settlement to a detached task and tells the client in-band.
Must not: know keys, routes' configuration or statuses; errors are rendered by the function it is given.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from config.settings import Bounds
from metering.ledger import Gone, Settled
from metering.meter import Meter
from proxy import telemetry
from proxy.answer import bill_headers, session_members, usage_json
from proxy.client_stream import ClientStream
from proxy.errors import CallError, InternalError, OutOfCredit
from proxy.live_session import LiveSession
from proxy.live_sessions import LiveSessions
from proxy.prepared import PreparedCall, SessionEnded
from proxy.pump import Over, Pump
from proxy.session import Ending, Phase
from proxy.settlement import Bill, Settler, charge_told
from proxy.upstream import Opened, Upstreams

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
        client.silenced = lambda: session.fenced
        try:
            opened = await self._upstreams.open_stream(session, call)
            while True:
                pump = Pump(session, _meter(session), opened, client, self._live)
                over = await pump.run()
                if over[1] is None:
                    sent = opened.sent
                    sent.candidate.live.breaker.succeeded(sent.permit, session.clock.monotonic())
                    break
                further = await self._upstreams.go_on(session, call, opened, over[1])
                if further is None:
                    break
                opened = further
            return await self._close(session, call, client, opened, pump.kept, over)
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

    async def _close(
        self,
        session: LiveSession,
        call: PreparedCall,
        client: ClientStream,
        opened: Opened,
        last: list[bytes],
        over: Over,
    ) -> Bill:
        """The stream is over by itself: settle, then tell the client how. `last` are the payloads that wait for it."""
        ending, failure = over
        if session.ending is not None:
            raise SessionEnded
        outcome = ending if failure is None else failure.fault
        telemetry.count(telemetry.ATTEMPTS, 1, opened.sent.attempt.provider, outcome)
        usage_wanted = call.request.usage_wanted
        due, settling = self._settler.begin(session, call, ending)
        settled = await settling
        if ending is Ending.CREDIT_CUT:
            last += [opened.sent.codec.finish_chunk(choice, "length") for choice in opened.sent.codec.open_choices]
        if usage_wanted and failure is None:
            members = session_members(session, due, settled)
            last.append(opened.sent.codec.usage_chunk(usage_json(session, due, settled), members))
        if ending is Ending.CREDIT_CUT:
            last.append(self._render(_cut_error(session, charge_told(session, due, settled))))
        if failure is not None:
            last.append(self._render(failure.error))
        await _finish(client, last, session, settled)
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
        settled = await settling
        if not client.started:
            client.ended = True
            public.headers = bill_headers(session, due, settled)
            raise public
        if ending is not Ending.LEASE_LOST:
            await _finish(client, [self._render(public)], session, settled)
        return due


def _lost(session: LiveSession, settled: Settled | Gone | None) -> bool:
    """Whether the session may have ended without us, and so nothing more may reach the client: the ledger said so, or
    said nothing before the fence."""
    return isinstance(settled, Gone) or (settled is None and session.fenced)


async def _finish(
    client: ClientStream, last: list[bytes], session: LiveSession, settled: Settled | Gone | None
) -> None:
    """The last payloads and the end, unless the session is lost, also while the client takes nothing."""
    while not client.ended:
        if _lost(session, settled) or not (client.finished(last) or await client.ready()):
            client.ended = True


def _meter(session: LiveSession) -> Meter:
    if session.meter is None:
        raise InternalError
    return session.meter


def _cut_error(session: LiveSession, charged: int | None) -> OutOfCredit:
    metadata: dict[str, str | int] = {"limit": "balance", "session": session.id}
    if charged is not None:
        metadata["charged"] = charged
    return OutOfCredit("The account's credit ended during this answer.", metadata=metadata)
