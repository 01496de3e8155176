"""A stream's bytes from its provider to its client, metered on the way.

What one read of the provider's socket brought leaves in one write, from inside the callback that brought it: no task
is woken for a chunk. Whatever must wait (a client that does not read, a hold that must grow) and whatever ends the
stream is handed to the session's task, which goes on from the very event; meanwhile the callback keeps its hands off,
and the provider is read no further than the exchange's bound.
Must not: settle, speak to the ledger but through the registry of live sessions, or know a provider's wire.
"""

from __future__ import annotations

import asyncio

from metering.meter import Meter
from providers.events import Chunk, Completed, Event, Failed, UsageSeen
from proxy.client_stream import ClientStream
from proxy.errors import InternalError, LeaseLost
from proxy.failures import AttemptFailed, Failure, failure_of
from proxy.live_session import LiveSession
from proxy.live_sessions import LiveSessions
from proxy.prepared import SessionEnded
from proxy.session import Ending
from proxy.transport import Exchange
from proxy.transport_errors import TransportError
from proxy.upstream import Opened
from proxy.usage import count, report

Over = tuple[Ending, Failure | None]
"""How a stream ended by itself, and why it failed if it did."""


_COMPLETED: Over = (Ending.COMPLETED, None)


class Pump:
    """One stream's. `run` once."""

    __slots__ = (
        "_boot_ms",
        "_broken",
        "_client",
        "_codec",
        "_counted",
        "_exchange",
        "_left",
        "_live",
        "_meter",
        "_session",
        "_unsent",
        "_waiter",
        "kept",
    )

    def __init__(self, session: LiveSession, meter: Meter, opened: Opened, client: ClientStream, live: LiveSessions):
        self._session = session
        self._boot_ms = session.clock.boot_ms
        self._meter = meter
        self._codec = opened.sent.codec
        self._exchange = opened.sent.exchange
        self._client = client
        self._live = live
        self._left: list[Event] = opened.events
        self._unsent: list[bytes] = []
        """What was metered and could not be written at once."""
        self._counted = False
        """Whether the first chunk of `_left` is in the meter already."""
        self._broken = False
        """Whether the callback failed: a fault of ours, which its caller logs."""
        self.kept: list[bytes] = []
        """The end of a complete stream as far as nobody reads anything in it (no text): it goes out in one write with
        what the settlement adds."""
        self._waiter: asyncio.Future[None] | None = None
        """There while it is the callback's turn to forward."""

    async def run(self) -> Over:
        """Forward until the stream is over. Raises SessionEnded when the session ended otherwise, CallError."""
        exchange = self._exchange
        exchange.on_data = self._arrived
        try:
            while True:
                over = await self._forward()
                if over is not None:
                    return over
                if exchange.chunks:
                    self._left = self._codec.feed(exchange.take())
                elif exchange.error is not None:
                    return self._failed(exchange.error)
                elif exchange.complete:
                    self._left = self._codec.end_of_stream()
                else:
                    self._waiter = self._live.future()
                    await self._waiter
                    if self._broken:
                        raise InternalError
        finally:
            self._waiter = None
            exchange.on_data = None

    def _failed(self, error: Exception) -> Over:
        if self._session.ending is not None:
            raise SessionEnded
        if not isinstance(error, TransportError):
            raise error
        return Ending.UPSTREAM_FAILED, failure_of(error, answered=True)

    # -- the session's task ------------------------------------------------------------------------------------------

    async def _forward(self) -> Over | None:
        """Forward what is left, waiting where that is needed; how the stream ended, if it did."""
        events, self._left = self._left, []
        out, self._unsent = self._unsent, []
        kept, self.kept = self.kept, []
        over: Over | None = None
        for event in events:
            if isinstance(event, Chunk):
                if not await self._covered(event):
                    over = Ending.CREDIT_CUT, None
                    break
                if event.deltas:
                    out += kept
                    kept = []
                (out if event.deltas else kept).append(event.payload)
            elif isinstance(event, UsageSeen):
                report(self._session, event.usage)
                if self._codec.open_choices:
                    self._fits()  # what was thought out of sight needs its slices too
            elif isinstance(event, Completed):
                kept += [self._codec.finish_chunk(choice, "stop") for choice in event.missing_finish]
                over = _COMPLETED
            elif isinstance(event, Failed):
                over = Ending.UPSTREAM_FAILED, failure_of(AttemptFailed(event.failure), answered=True)
        if over == _COMPLETED:
            self.kept = kept
        else:
            out += kept
        self._may_write()
        while out and not self._client.written(out) and await self._client.ready():
            self._may_write()  # it may have waited past the fence
        return over

    def _may_write(self) -> None:
        """Raises SessionEnded when nothing may reach the client any more."""
        session = self._session
        if session.ending is None and self._boot_ms() >= session.fence_ms:
            session.end(Ending.LEASE_LOST, LeaseLost())
        if session.ending is not None:
            raise SessionEnded

    async def _covered(self, event: Chunk) -> bool:
        """Meter a chunk; whether the hold covers everything up to and with it, after asking for more if it must."""
        session, meter = self._session, self._meter
        if self._counted:
            self._counted = False
        else:
            count(meter, event)
        if self._fits():
            return True
        await self._live.extend(session)
        if meter.fits(session.held - session.carried_micros):
            return True
        meter.take_back()
        return False

    def _fits(self) -> bool:
        """Whether the hold covers all that is metered. Asks for the next slice when this one is nearly used up."""
        session, fits = self._session, self._meter.fits
        held = session.held - session.carried_micros
        if not session.exhausted and session.held < session.hold_max:
            if fits(held - session.slice_low_cost):
                return True
            if not session.unanswered:  # else the tick asks, and not every chunk
                self._live.checkpoint(session, min(session.held + session.slice_cost, session.hold_max))
        return fits(session.held - session.carried_micros)

    # -- the provider's callback -------------------------------------------------------------------------------------

    def _arrived(self, exchange: Exchange) -> None:
        """Bytes have come, or the end. Forwards at once what needs no waiting, else wakes the task."""
        waiter = self._waiter
        if waiter is None or waiter.done():
            return
        self._broken = True
        go_on = False
        try:
            go_on = bool(exchange.chunks) and self._passed(self._codec.feed(exchange.take())) and not exchange.complete
            self._broken = False
        finally:
            if not go_on:
                waiter.set_result(None)

    def _passed(self, events: list[Event]) -> bool:
        """Meter and write `events`. False when the task must go on, with what is left in `_left`."""
        out: list[bytes] = []
        spoken = 0
        meter, session = self._meter, self._session
        for at, event in enumerate(events):
            if isinstance(event, Chunk):
                count(meter, event)
                if not self._fits():
                    self._left, self._counted = events[at:], True
                    break
                out.append(event.payload)
                if event.deltas:
                    spoken = len(out)
            elif isinstance(event, UsageSeen):
                report(session, event.usage)
                if self._codec.open_choices:
                    self._fits()
            else:
                self._left = events[at:]
                if isinstance(event, Completed):
                    self.kept = out[spoken:]
                    del out[spoken:]
                break
        if not out:
            return not self._left
        if session.ending is not None or self._boot_ms() >= session.fence_ms or not self._client.written(out):
            self._unsent = out
            return False
        return not self._left
