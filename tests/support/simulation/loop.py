"""An event loop without sockets or a selector: time stands still until the simulation moves it.

Callbacks run in the order in which they became ready, as asyncio promises; everything that comes from outside (bytes,
replies, clients, time) is an act of the schedule. Must not: read a clock of the machine.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import Context
from typing import Any

from proxy.live_session import Clock

Dialler = Callable[[Callable[[], asyncio.Protocol], str], Awaitable[tuple[asyncio.Transport, asyncio.Protocol]]]
FIRST_S = 1_000.0
"""Where the loop's clock begins, in seconds."""


TURNS_MAX = 10_000
"""More turns than that without rest are a loop that never ends."""


class Violation(AssertionError):
    """The core did what it must never do."""


class VirtualLoop(asyncio.BaseEventLoop):
    """`turn` runs what is ready, `advance` moves the clocks. `faults` are the contexts of failed callbacks; `tasks` all
    that were ever made here; `broken` what was found wrong inside a call from the core."""

    def __init__(self) -> None:
        super().__init__()
        self._now = FIRST_S
        self._slept_ms = 0
        self._waiting: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._made = 0
        self.dialler: Dialler | None = None
        self.faults: list[dict[str, Any]] = []
        self.broken: list[Violation] = []
        self.tasks: list[asyncio.Task[Any]] = []
        self.set_exception_handler(lambda _, context: self.faults.append(context))
        self.clock = Clock(self.time, self.boot_ms)

    # -- what asyncio asks of a loop -----------------------------------------------------------------------------------

    def time(self) -> float:
        """Virtual monotonic seconds."""
        return self._now

    def boot_ms(self) -> int:
        """The clock that also counts while the machine is suspended."""
        return round(self._now * 1000) + self._slept_ms

    def call_soon(  # type: ignore[override]  # the base class is generic over the arguments' types
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._waiting.append(handle)
        return handle

    def call_at(  # type: ignore[override]  # as above
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        self._made += 1
        heapq.heappush(self._timers, (when, self._made, timer))
        return timer

    def call_later(  # type: ignore[override]  # as above
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def create_task(self, coro: Coroutine[Any, Any, Any], **options: Any) -> asyncio.Task[Any]:  # type: ignore[override]
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=self, **options)
        self.tasks.append(task)
        return task

    async def create_connection(  # type: ignore[override]  # without its twenty options
        self, factory: Callable[[], asyncio.Protocol], host: str, port: int, **options: Any
    ) -> tuple[asyncio.Transport, asyncio.Protocol]:
        assert self.dialler is not None
        return await self.dialler(factory, host)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Cancelled timers are dropped when their time comes."""

    # -- what the simulation does with it ------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether nothing is ready to run."""
        return not self._waiting

    def turn(self) -> None:
        """Run what is ready now, as one turn of a loop does: what becomes ready meanwhile waits for the next."""
        for _ in range(len(self._waiting)):
            handle = self._waiting.popleft()
            if not handle.cancelled():
                handle._run()

    def settle(self) -> None:
        """Turn until nothing is ready."""
        for _ in range(TURNS_MAX):
            if not self._waiting:
                return
            self.turn()
        raise self.violation("callbacks make callbacks for ever")

    def violation(self, text: str) -> Violation:
        """To be raised. It is noted too: the core may catch what is raised inside it."""
        self.broken.append(Violation(text))
        return self.broken[-1]

    def next_timer(self) -> float | None:
        """When the next timer is due, or None without one."""
        timers = self._timers
        while timers and timers[0][2].cancelled():
            heapq.heappop(timers)
        return timers[0][0] if timers else None

    def advance(self, seconds: float) -> None:
        """Let time pass. All timers that come due become ready at once, as after a stop of the process."""
        self._now += seconds
        while (due := self.next_timer()) is not None and due <= self._now:
            self._waiting.append(heapq.heappop(self._timers)[2])

    def suspend(self, milliseconds: int) -> None:
        """The machine sleeps: only the boot clock goes on."""
        self._slept_ms += milliseconds

    def enter(self) -> None:
        """From here on, until `leave`, this is the running loop of the thread."""
        asyncio.events._set_running_loop(self)

    def leave(self) -> None:
        """Undo `enter`."""
        asyncio.events._set_running_loop(None)
