"""A worker's breakers among those of other workers and gateways: told, shared through Redis, and shown in metrics.

Records only grow (`providers.breaker_record`), so the exchange is gossip that may be lost, repeated or reordered: what
is greater in Redis is adopted, what is greater or missing there is put there again. So a Redis that lost everything,
or a worker that begins anew, knows within a look or two what any living worker knows.
Must not: be asked by a call (breakers are memory), decide when a breaker opens, or let Redis' absence hurt a call.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable

import msgspec
from prometheus_client import Counter, Gauge

from config import routing as config
from providers.breaker import Breaker, BreakerPolicy, Change, State
from providers.breaker_record import Reason, Record, decode, encode
from proxy.telemetry import log
from storage.breaker_store import BreakerStore
from storage.redis_connection import RedisError
from storage.steady_task import SteadyTask

RETRY_S = 1.0
"""After a failed try, at the latest; sooner where looks are more frequent."""
TTL_S_MIN = 60.0

OPEN = Gauge(
    "tollgate_breaker_open",
    "1 while a candidate gets no calls, or probes only.",
    ["provider", "model"],
    multiprocess_mode="livemax",
)
CHANGES = Counter(
    "tollgate_breaker_changes_total",
    "Openings and closings of breakers, by reason; `heard`: another worker found it.",
    ["provider", "model", "state", "reason"],
)
_NOTHING = encode(Record())


def breaker_policy(breaker: config.Breaker) -> BreakerPolicy:
    """The policy that `[breaker]` asks for."""
    return BreakerPolicy(
        consecutive_max=breaker.consecutive_max,
        error_rate=breaker.error_percent / 100,
        calls_min=breaker.calls_min,
        window_s=breaker.window_ms / 1000,
        open_s=breaker.open_ms / 1000,
        open_s_max=breaker.open_ms_max / 1000,
        forget_s=breaker.forget_ms / 1000,
        key_refused_s=breaker.key_refused_ms / 1000,
        retry_after_s_max=breaker.retry_after_ms_max / 1000,
    )


def record_ttl_s(policy: BreakerPolicy) -> float:
    """How long a record says anything: its opening, and then the time until it is forgotten."""
    return max(policy.longest_s() + policy.forget_s, TTL_S_MIN)


class _Shared(msgspec.Struct):
    """One candidate's breaker. `told`: what the gauge says."""

    provider: str
    model: str
    breaker: Breaker
    gauge: Gauge
    told: bool = False


class SharedBreakers:
    """All breakers of one worker. Memory: one entry per breaker, however long Redis is away."""

    def __init__(
        self, store: BreakerStore, every_s: float, ttl_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Others' records are read every `every_s`, up to half of it sooner; `clock` is the breakers' `now`."""
        self._store = store
        self._every_s = every_s
        self._ttl_ms = max(1, round(ttl_s * 1000))
        self._clock = clock
        self._shared: dict[str, _Shared] = {}
        self._dirty: set[str] = set()
        self._woken = asyncio.Event()
        self._away = False
        self._task = SteadyTask(self._run, "sharing breakers")

    def register(self, name: str, breaker: Breaker) -> None:
        """Share this breaker under `provider/model`. Raises ValueError for a second one of that name."""
        if name in self._shared:
            if self._shared[name].breaker is breaker:
                return
            raise ValueError(f"{name} has a breaker already")
        provider, _, model = name.partition("/")
        gauge = OPEN.labels(provider, model)
        gauge.set(0)
        breaker.wall_offset_s = self._offset_s()
        self._shared[name] = _Shared(provider, model, breaker, gauge)

    def changed(self, name: str, change: Change) -> None:
        """A breaker has reported this: it is logged, counted, and published soon where others do not know it yet."""
        self._tell(self._shared[name], change)
        if not change.heard:
            self._dirty.add(name)
            self._woken.set()

    async def start(self) -> None:
        """Look once, at most for the time of a Redis call or two, then go on until `aclose`."""
        await self.look()
        self._task.start()

    async def aclose(self) -> None:
        """Stop; what nobody knows yet is published first, if Redis answers."""
        await self._task.aclose()
        await self._publish()

    async def look(self) -> bool:
        """Adopt what others know better, publish what they do not know; whether Redis answered."""
        names = list(self._shared)
        offset_s = self._offset_s()  # anew each time: the wall clock may be set
        for shared in self._shared.values():
            shared.breaker.wall_offset_s = offset_s
        self._show()
        try:
            records = await self._store.read(names)
        except RedisError as error:
            self._answered(error)
            return False
        self._answered(None)
        for name, record in zip(names, records, strict=True):
            self._compare(name, record)
        return await self._publish()

    def _compare(self, name: str, theirs: bytes | None) -> None:
        shared = self._shared[name]
        ours = shared.breaker.record()
        if theirs is not None and theirs > ours:
            change = shared.breaker.adopt(theirs, self._clock())
            if change is not None:
                self._tell(shared, change)
        elif theirs != ours and ours != _NOTHING:
            self._dirty.add(name)

    async def _publish(self) -> bool:
        """Give Redis the newest records of those that changed, in one command; whether it took them."""
        if not self._dirty:
            return True
        records = {name: self._shared[name].breaker.record() for name in self._dirty}
        try:
            await self._store.raise_to(records, self._ttl_ms)
        except RedisError as error:
            self._answered(error)
            return False
        self._answered(None)
        # What changed meanwhile stays to be published, as does everything when this is cancelled.
        self._dirty -= {name for name, record in records.items() if self._shared[name].breaker.record() == record}
        return True

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        look_at = loop.time() + self._pause_s()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(look_at):
                    await self._woken.wait()
            self._woken.clear()
            if loop.time() < look_at:
                answered = await self._publish()
            else:
                answered = await self.look()
                look_at = loop.time() + self._pause_s()
            if not answered:
                await asyncio.sleep(min(RETRY_S, self._pause_s()))
                if self._dirty:
                    self._woken.set()

    def _pause_s(self) -> float:
        """Workers that started together do not ask together."""
        return self._every_s * random.uniform(0.5, 1.0)  # noqa: S311  (no secret)

    def _offset_s(self) -> float:
        return time.time() - self._clock()

    def _tell(self, shared: _Shared, change: Change) -> None:
        opened = change.state is State.OPEN
        reason = change.reason.name.lower() if opened else "healed"
        CHANGES.labels(
            shared.provider, shared.model, "open" if opened else "closed", "heard" if change.heard else reason
        ).inc()
        self._gauge(shared, opened)
        names = {"provider": shared.provider, "model": shared.model}
        if change.alert:
            log.error("the provider refuses our key", seconds=round(change.open_s, 3), **names)
        tell = log.info if change.heard or not opened else log.warning
        tell(
            "breaker opened" if opened else "breaker closed",
            reason=reason,
            seconds=round(change.open_s, 3),
            heard=change.heard,
            **names,
        )

    def _show(self) -> None:
        """A pause that a provider asked for ends without a word: the first call after it passes, if one comes."""
        for shared in self._shared.values():
            if shared.told and self._passes(shared.breaker):
                self._gauge(shared, False)
                CHANGES.labels(shared.provider, shared.model, "closed", "resumed").inc()
                names = {"provider": shared.provider, "model": shared.model}
                log.info("breaker closed", reason="resumed", seconds=0.0, heard=False, **names)

    def _passes(self, breaker: Breaker) -> bool:
        if breaker.state is not State.OPEN:
            return breaker.state is State.CLOSED
        record = decode(breaker.record())
        return record is not None and record.reason is Reason.RETRY_AFTER and breaker.blocked_s(self._clock()) <= 0

    def _gauge(self, shared: _Shared, opened: bool) -> None:
        if shared.told != opened:
            shared.told = opened
            shared.gauge.set(opened)

    def _answered(self, error: RedisError | None) -> None:
        """An outage is told once, and its end."""
        away = error is not None
        if away != self._away:
            self._away = away
            if away:
                log.warning(
                    "breakers are not shared: Redis does not answer; each worker goes on alone", reason=str(error)
                )
            else:
                log.info("breakers are shared again")
