"""One running session: its hold, meter, phase and handles. Plain state with the two moves that need care.

Must not: await or speak to anyone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import msgspec

from config.price import CompiledPrice
from metering.ledger import Gone, SessionRef, Settled
from metering.meter import Meter
from metering.pricing import TokenUsage, at_least, cost
from providers.bulkhead import Ticket
from providers.routing import Live
from proxy.client_stream import ClientStream
from proxy.places import Places
from proxy.session import ALLOWED, Ending, Phase, may_move
from proxy.transport import Exchange

_BOOT_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def boot_ms() -> int:
    """Milliseconds of a clock that runs on while the machine is suspended (macOS lacks one: monotonic there)."""
    return time.clock_gettime_ns(_BOOT_CLOCK) // 1_000_000


class Clock(msgspec.Struct, frozen=True):
    """What tells sessions the time: seconds that only rise, and milliseconds as `boot_ms` counts them."""

    monotonic: Callable[[], float] = time.monotonic
    boot_ms: Callable[[], int] = boot_ms


CLOCK = Clock()
"""This machine's."""


class Attempt(msgspec.Struct):
    """One try at one provider, as the journal and the client learn of it. `prompt` and `output`: tokens that the
    provider worked on, `cost` micros that the house owes for them (None: unknown). `live` counts it while it runs, and
    `waiting` while it has shown no content; `ticket` is its place at the provider."""

    provider: str
    model: str
    outcome: str = "running"
    status: int | None = None
    ms: int = 0
    first_content_ms: int | None = None
    began: float = msgspec.field(default_factory=time.monotonic)
    prompt: int = 0
    output: int = 0
    cost: int | None = None
    reported: TokenUsage | None = None
    """What the provider of a continuation says that it worked on: no client is charged by it."""
    live: Live | None = None
    waiting: bool = False
    places: Places | None = None
    ticket: Ticket | None = None
    fault: str | None = None
    """Why its stream broke off, when it has not been closed yet."""

    def close(self, outcome: str, status: int | None = None) -> None:
        """The attempt is over; the first outcome stays."""
        if self.outcome == "running":
            self.outcome = self.fault or outcome
            self.ms = int((time.monotonic() - self.began) * 1000)
            live, places, ticket = self.live, self.places, self.ticket
            if live is not None:
                live.in_flight -= 1
                if self.waiting:
                    self.waiting = False
                    live.waiting -= 1
            if places is not None and ticket is not None:
                places.release(ticket, float(self.prompt + self.output))
        if status is not None:
            self.status = status

    def record(self) -> dict[str, Any]:
        """The form in the session's metadata."""
        ms = self.ms if self.outcome != "running" else int((time.monotonic() - self.began) * 1000)
        return {
            "provider": self.provider,
            "model": self.model,
            "status": self.status,
            "outcome": self.outcome,
            "ms": ms,
            "first_content_ms": self.first_content_ms,
            "prompt": self.prompt,
            "output": self.output,
            "cost": self.cost,
        }


def added(first: TokenUsage, second: TokenUsage) -> TokenUsage:
    """The tokens of both."""
    return TokenUsage(*map(sum, zip(msgspec.structs.astuple(first), msgspec.structs.astuple(second), strict=True)))


class Cached(msgspec.Struct, frozen=True):
    """What a session comes to whose answer was kept from an earlier one: that one's tokens, and micros by policy."""

    usage: TokenUsage
    micros: int


class LiveSession(msgspec.Struct, eq=False):
    """Amounts in micros; `fence_ms` on the boot clock; other times monotonic seconds."""

    ref: SessionRef
    request_id: str
    route: str
    stream: bool
    held: int
    hold_max: int
    slice_cost: int
    slice_low_cost: int
    fence_ms: int
    task: asyncio.Task[Any] | None = None
    phase: Phase = Phase.HELD
    ending: Ending | None = None
    error: Exception | None = None
    meter: Meter | None = None
    exchange: Exchange | None = None
    rival: Exchange | None = None
    """Of a second attempt beside the first."""
    waking: Callable[[], object] | None = None
    """Ends a wait between attempts."""
    client: ClientStream | None = None
    checkpoint: asyncio.Future[Any] | None = None
    checkpoint_at: float = msgspec.field(default_factory=time.monotonic)
    checkpoint_metered: int = 0
    unanswered: bool = False
    """Whether the last checkpoint got no answer, or a refusal that says nothing of credit."""
    seq: int = 0
    exhausted: bool = False
    limited: bool = False
    request_sent: bool = False
    client_gone: bool = False
    delivered: bool = False
    """Whether a whole answer goes to the client."""
    finishing: bool = False
    """Whether the provider of the running attempt completes a whole answer without its client."""
    output_most: int | None = None
    attempts: list[Attempt] = msgspec.field(default_factory=list)
    started_at: float = msgspec.field(default_factory=time.monotonic)
    reported_raw: bytes | None = None
    price: CompiledPrice | None = None
    cost: CompiledPrice | None = None
    """What the house pays the provider of the last attempt, where that is known."""
    content_due: float | None = None
    abort_client: Callable[[], None] | None = None
    first_content_at: float | None = None
    highest_metered: int = 0
    may_fall_back: bool = False
    """Whether another candidate is tried when the running attempt fails before its first content."""
    settled: Settled | Gone | None = None
    """The ledger's answer to the settlement, once there is one."""
    idempotency: str = ""
    cached: Cached | None = None
    carried: TokenUsage | None = None
    """What attempts had come to whose stream another one continues."""
    carried_micros: int = 0
    clock: Clock = CLOCK

    @property
    def id(self) -> str:
        """The session's id."""
        return self.ref.session

    @property
    def fenced(self) -> bool:
        """Whether a sweeper may have ended it: then nothing of it may reach the client."""
        return self.clock.boot_ms() >= self.fence_ms

    def advance(self, phase: Phase) -> None:
        """Move to `phase`. Raises IllegalMove."""
        if not ALLOWED[self.phase] >> phase & 1:
            may_move(self.phase, phase)
        self.phase = phase

    def metered_now(self) -> int:
        """What the call has cost so far; never falls. Nothing until the provider confirmed it with a 2xx, or showed
        content where another could still take its place: what is metered stays, and a failed attempt costs nothing."""
        if self.meter is not None and self.phase >= (Phase.CONTENT if self.may_fall_back else Phase.ANSWERED):
            self.highest_metered = max(self.highest_metered, self.carried_micros + self.meter.checkpoint())
        return self.highest_metered

    def carry(self) -> None:
        """The running attempt's stream is to be continued: what it came to stays, and the next meter begins anew."""
        meter, price = self.meter, self.price
        if meter is None or price is None:
            return
        usage = meter.counted()
        self.worked(self.attempts[-1], usage)
        self.carried_micros += cost(price, usage)
        self.carried = usage if self.carried is None else added(self.carried, usage)
        self.highest_metered = max(self.highest_metered, self.carried_micros)
        self.meter = self.reported_raw = None

    def worked(self, last: Attempt, usage: TokenUsage) -> None:
        """Note what the provider of an attempt worked on, and what it costs the house. One that goes on with another's
        text has read that and the prompt anew."""
        carried = self.carried
        if carried is not None:
            read = carried.prompt + carried.output
            usage = TokenUsage(read, 0, 0, usage.output, usage.reasoning)
            usage = usage if last.reported is None else at_least(usage, last.reported)
        last.prompt, last.output = usage.prompt, usage.output
        if self.cost is not None and (usage.prompt or usage.output):
            last.cost = cost(self.cost, usage)

    def end(self, ending: Ending, error: Exception | None = None) -> None:
        """End the session from outside its own task; the first ending counts. Closes the upstream at once."""
        if self.ending is not None or self.phase >= Phase.SETTLING:
            return
        self.ending = ending
        self.error = error
        if self.exchange is not None:
            self.exchange.abort()
        if self.rival is not None:
            self.rival.abort()
        if self.waking is not None:
            self.waking()
        if self.client is not None and self.client.writing_since is not None and self.task is not None:
            # Its task waits in a write that this client does not take. What waits there must not go out later either:
            # after the fence nothing may reach the client.
            if self.abort_client is not None:
                self.abort_client()
            self.task.cancel()

    def time_out(self, error: Exception) -> None:
        """The attempt took too long; the session may go on with another."""
        self.content_due = None
        if self.exchange is not None:
            self.exchange.abort(error)
