"""The sessions that run in this worker: their leases, checkpoints, deadlines and the tasks that outlive a request.

One tick serves all sessions, so a stream costs no timer of its own. A session is held here from its hold to its
settlement; detached tasks are tracked here and drained at shutdown.
Must not: speak HTTP or decide who pays (`proxy.session` does).
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Coroutine
from typing import Any

from prometheus_client import Counter

from config.settings import Bounds, Metering
from metering.ledger import Gone, LedgerError, LedgerUnavailable, Progressed
from metering.receipts import HELD, Receipt
from metering.redis_ledger import RedisLedger
from metering.status import Outbox, Over
from proxy import telemetry
from proxy.bodies import Bodies
from proxy.errors import Draining, InternalError, LeaseLost, Overloaded, UpstreamTimedOut
from proxy.live_session import CLOCK, Clock, LiveSession
from proxy.session import Ending, Phase

TICK_S = 0.1
LAG_ALARM_S = 0.25
"""How late a tick may be: by then clients see streams stop."""
LAG_LINE_S = 10.0
EXTEND_PAUSE_S = 0.1
"""Between two tries to extend a hold while the ledger does not answer."""

FULL_RETRY_MS = 1_000
BEHIND_RETRY_MS = 5_000
"""An outbox that passed its bound is not below it again in a second."""
SHED = Counter("tollgate_shed_total", "Calls refused before their hold because of overload, by reason.", ["reason"])


class LiveSessions:
    """The registry of one worker."""

    def __init__(self, ledger: RedisLedger, metering: Metering, bounds: Bounds, clock: Clock = CLOCK) -> None:
        self._ledger = ledger
        self.clock = clock
        """What tells the sessions of this worker the time."""
        self._loop = asyncio.get_running_loop()  # asked once: up to Python 3.11 each time is a call of the system
        self._metering = metering
        self._bounds = bounds
        self._sessions: dict[str, LiveSession] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ticker: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        """Set while draining, whenever something has ended."""
        self._late: list[tuple[float, asyncio.Future[Any]]] = []
        self._admitting = 0
        self._ticking: LiveSession | None = None
        self._lag_told = -math.inf
        self.draining = False
        self.ticked: list[Callable[[], None]] = []
        """Called on every tick, to bring figures into metrics."""
        self.shedding: Over | None = None
        """The bound that the outbox is over: no further session may begin."""
        self.bodies = Bodies(bounds.bodies_bytes_max)
        """The request bodies of this worker."""

    def start(self) -> None:
        """Begin to tick."""
        self._ticker = self._loop.create_task(self._run())
        self._ticker.add_done_callback(self._ticker_ended)

    def _ticker_ended(self, ticker: asyncio.Task[None]) -> None:
        """Leases depend on the tick: a session that makes it fail is ended, and the others are ticked on."""
        if ticker.cancelled():
            return
        self.start()
        culprit, self._ticking = self._ticking, None
        if culprit is not None:
            culprit.end(Ending.INTERNAL, InternalError())
        telemetry.log.error("the tick failed", exc_info=ticker.exception())

    def admit(self) -> None:
        """Raises Draining or Overloaded when no further session may begin."""
        if self.draining:
            raise Draining(retry_after_ms=1_000)
        if self.shedding is not None:
            raise _shed(self.shedding, "The gateway is behind with its journal. Retry shortly.", BEHIND_RETRY_MS)
        if len(self._sessions) + self._admitting > self._bounds.live_sessions_max:
            raise _shed("live_sessions", None, FULL_RETRY_MS)

    def outbox_changed(self, over: Over | None, seen: Outbox) -> None:
        """The outbox is over a bound (None: over none any more): told once, not by every call that it concerns. What
        runs goes on, and settles."""
        before, self.shedding = self.shedding, over
        if (before is None) == (over is None):
            return
        telemetry.log.warning(
            "new calls are admitted again" if over is None else "new calls are shed: the journal is over its bound",
            reason=over or before,
            oldest_age_s=seen.oldest_age_ms // 1000,
            age_s_max=self._metering.outbox_age_s_max,
            memory_percent=seen.memory_percent,
            memory_percent_max=self._metering.outbox_memory_percent_max,
            sessions=len(self._sessions),
        )

    def admission_begins(self) -> None:
        """A call is being admitted: a drain waits for it too, since it may hold credit any moment. Or one whose session
        is settled is still being given what was kept for it."""
        self._admitting += 1

    def admission_ended(self) -> None:
        """The call is admitted, or refused."""
        self._admitting -= 1
        if self.draining:
            self._changed.set()

    def add(self, session: LiveSession) -> None:
        """A session was held. Its first fence runs from the moment the hold was asked for."""
        self._sessions[session.ref.session] = session

    def remove(self, session: LiveSession) -> None:
        """A session is settled."""
        if self._sessions.pop(session.ref.session, None) is not None and self.draining:
            self._changed.set()

    def __len__(self) -> int:
        return len(self._sessions)

    def holds(self) -> list[Receipt]:
        """What runs now, as a recovery of the ledger must know it."""
        return [
            Receipt(
                session=each.id,
                account=each.ref.account.id,
                shard=each.ref.account.shard,
                key=each.ref.key,
                fence=each.ref.fence,
                kind=HELD,
                held=each.held,
                metered=each.checkpoint_metered,
                seq=each.seq,
            )
            for each in self._sessions.values()
            if each.phase < Phase.SETTLING
        ]

    def due_within(self, seconds: float) -> asyncio.Future[Any]:
        """A future that is given None at the first tick after that time, unless somebody gave it a result before. A
        timer for each would cost more than what it guards."""
        future: asyncio.Future[Any] = self._loop.create_future()
        self._late.append((self._loop.time() + seconds, future))
        return future

    def future(self) -> asyncio.Future[None]:
        """A future of this worker's loop."""
        return self._loop.create_future()

    def detach(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run `work` to its end whatever becomes of the request that started it."""
        task = self._tracked(work)
        task.add_done_callback(_log_failure)
        return task

    def _tracked(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """A task that a drain waits for."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        self._changed.set()

    async def extend(self, session: LiveSession) -> None:
        """Checkpoint and ask for a slice beyond the hold and all that is metered (a chunk may be larger than a slice);
        returns when the ledger has answered, or the session has ended: without an answer its lease does so in time."""
        want = max(session.held, session.metered_now()) + session.slice_cost
        while True:
            while session.checkpoint is not None:  # the tick may start another before this task runs again
                await asyncio.wait({session.checkpoint})
            if session.ending is not None or session.held >= want:
                return
            await asyncio.wait({self.checkpoint(session, want)})
            if not session.unanswered:
                return
            await asyncio.sleep(EXTEND_PAUSE_S)

    def checkpoint(self, session: LiveSession, want_hold: int = 0) -> asyncio.Future[Any]:
        """Tell the ledger what is metered so far and renew the lease; at most one at a time per session. What is
        returned is done when the session has the answer."""
        if session.checkpoint is not None:
            return session.checkpoint
        want, sent_ms = max(want_hold, session.held), self.clock.boot_ms()
        session.seq += 1
        # Never more than the hold: what is metered beyond it was not forwarded yet, and may be taken back.
        metered = min(session.metered_now(), session.held)
        session.checkpoint_at = self.clock.monotonic()
        session.checkpoint_metered = metered
        sent = None  # without a task, but where the last one failed: the other way loads a script that is missing
        if not session.unanswered:
            sent = self._ledger.progress_sent(session.ref, session.seq, metered, want)
        if sent is None:
            sent = self._tracked(self._ledger.progress(session.ref, session.seq, metered, want))
            session.checkpoint = sent
            sent.add_done_callback(lambda sent: self._checkpointed(session, sent_ms, want, sent.result))
        else:
            session.checkpoint = sent
            read = self._ledger.progressed
            sent.add_done_callback(lambda sent: self._checkpointed(session, sent_ms, want, lambda: read(sent)))
        return session.checkpoint

    def confirm(self, session: LiveSession) -> None:
        """The provider answered 2xx. A prompt that costs more than the low mark is told to the ledger at once, so that
        a killed gateway does not give it away."""
        if session.metered_now() > session.slice_low_cost:
            self.checkpoint(session)

    def _checkpointed(
        self, session: LiveSession, sent_ms: int, want: int, read: Callable[[], Progressed | Gone]
    ) -> None:
        """The answer to a checkpoint, or that there is none: then the stream goes on inside its held slice until the
        fence, and the tick tries again."""
        session.checkpoint = None
        session.unanswered = True
        try:
            reply = read()
        except (LedgerUnavailable, asyncio.CancelledError):
            return
        except LedgerError as error:
            telemetry.log.error("the ledger refused a checkpoint", session=session.id, reason=str(error))
            return
        if isinstance(reply, Gone) and reply.state == "unknown" and self._ledger.awaited(session.ref):
            return
        session.unanswered = False
        if isinstance(reply, Progressed):
            if not reply.applied:
                return  # an older report: it renewed nothing
            session.held = reply.held
            session.exhausted = reply.held < want
            session.fence_ms = sent_ms + self._metering.lease_ms - self._metering.fence_margin_ms
        elif session.phase < Phase.SETTLING:
            telemetry.LEASES_LOST.inc()
            session.end(Ending.LEASE_LOST, LeaseLost())

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            due += TICK_S
            await asyncio.sleep(max(0.0, due - loop.time()))
            lag = loop.time() - due
            self._give_up_late(loop.time())
            if lag > TICK_S:
                due = loop.time()
            if lag >= LAG_ALARM_S:
                self._lag_alarm(lag, loop.time())
            now, now_boot = self.clock.monotonic(), self.clock.boot_ms()
            for session in list(self._sessions.values()):
                self._ticking = session
                self._tick(session, now, now_boot)
            self._ticking = None
            telemetry.LOOP_LAG.set(max(0.0, lag))
            telemetry.LIVE.set(len(self._sessions))
            telemetry.BODY_BYTES.set(self.bodies.held)
            for show in self.ticked:
                show()
            telemetry.publish()

    def _lag_alarm(self, lag: float, now: float) -> None:
        """Something kept this worker from every stream. Counted each time, told once in `LAG_LINE_S`."""
        telemetry.LOOP_LATE.inc()
        if now >= self._lag_told + LAG_LINE_S:
            self._lag_told = now
            telemetry.log.warning("the event loop was late", lag_ms=int(lag * 1000), sessions=len(self._sessions))

    def _give_up_late(self, now: float) -> None:
        waiting = [(due, future) for due, future in self._late if not future.done()]
        self._late = [(due, future) for due, future in waiting if due > now]
        for due, future in waiting:
            if due <= now:
                telemetry.SETTLE_LATE.inc()
                future.set_result(None)

    def _tick(self, session: LiveSession, now: float, now_boot: int) -> None:
        if session.phase >= Phase.SETTLING or session.ending is not None:
            return
        if now_boot >= session.fence_ms:
            telemetry.LEASES_LOST.inc()
            session.end(Ending.LEASE_LOST, LeaseLost())
            return
        if session.content_due is not None and now >= session.content_due:
            session.time_out(UpstreamTimedOut())
            return
        self._tick_client(session, now)
        every = self._metering.progress_ms / 1000
        idle_every = self._metering.lease_ms / 3000
        since = now - session.checkpoint_at
        if since >= idle_every or (
            since >= every and min(session.metered_now(), session.held) != session.checkpoint_metered
        ):
            self.checkpoint(session)

    def _tick_client(self, session: LiveSession, now: float) -> None:
        client = session.client
        if client is None or client.ended:
            return
        writing = client.writing_since
        if writing is not None:
            if now - writing >= self._bounds.client_write_ms / 1000:
                session.end(Ending.CLIENT_STALLED)
        elif not client.started:
            if now - session.started_at >= self._bounds.commit_after_ms / 1000:
                self.detach(client.commit())
        elif now - client.last_write >= self._bounds.keepalive_ms / 1000:
            self.detach(client.keepalive())

    async def drain(self, seconds: float) -> None:
        """Let running sessions end by themselves, then end the rest; returns when all is settled or given up."""
        self.draining = True
        await self._emptied(seconds, tasks_too=False)
        self.end_all()
        await self._emptied(self._metering.lease_ms / 1000, tasks_too=True)
        if self._ticker is not None:
            self._ticker.cancel()
            await asyncio.wait({self._ticker})
        self._give_up_late(math.inf)
        telemetry.LIVE.set(len(self._sessions))
        telemetry.publish()

    def end_all(self) -> None:
        """End what still runs, in-band where a client listens."""
        for session in list(self._sessions.values()):
            session.end(Ending.SHUTDOWN, Draining())

    async def _emptied(self, seconds: float, *, tasks_too: bool) -> None:
        """Wait, at most so long, until no session (and no detached task) is left."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._sessions or self._admitting or (tasks_too and self._tasks):
                    self._changed.clear()
                    await self._changed.wait()


def _shed(reason: str, message: str | None, retry_after_ms: int) -> Overloaded:
    """The refusal of one call, counted at the next tick."""
    telemetry.count(SHED, 1, reason)
    return Overloaded(message, retry_after_ms=retry_after_ms)


def _log_failure(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and task.exception() is not None:
        telemetry.log.error("a detached task failed", exc_info=task.exception())
