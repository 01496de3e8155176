"""Child processes: how a child reports, and how the supervisor starts, restarts and ends one.

A child gets TOLLGATE_READY_FD (it writes one line there once it serves) and TOLLGATE_PARENT_FD (a pipe whose end of
file says that the supervisor is gone, however it died). Children have sessions of their own: Ctrl-C reaches the
supervisor alone, which ends them in order.
Must not: know what a child does, import a store, or end a process that it did not start.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import structlog

LISTEN_FD_ENV = "TOLLGATE_LISTEN_FD"
READY_FD_ENV = "TOLLGATE_READY_FD"
PARENT_FD_ENV = "TOLLGATE_PARENT_FD"

BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 5.0
HEALTHY_S = 10.0
START_S_MAX = 60.0
HURRY_S = 5.0
KILL_S = 10.0
SILENT_S = 1.0
"""For the end of a child that closed its pipe without a report."""

_LINE_BYTES_MAX = 4096
_NOT_STARTED = 127
"""The shell's exit code for a command that cannot be run."""

log = structlog.get_logger()


class ChildError(Exception):
    """A child process could not be started."""


def watch_parent(loop: asyncio.AbstractEventLoop, on_gone: Callable[[], object]) -> None:
    """In a child: call `on_gone` once when the supervisor is gone. Nothing happens without TOLLGATE_PARENT_FD."""
    text = os.environ.get(PARENT_FD_ENV)
    if not text:
        return
    fd = int(text)

    def readable() -> None:  # nobody ever writes to this pipe: readable means end of file
        loop.remove_reader(fd)
        on_gone()

    loop.add_reader(fd, readable)


def tell_ready() -> None:
    """In a child: report to the supervisor that it serves. Once; nothing happens without TOLLGATE_READY_FD."""
    text = os.environ.pop(READY_FD_ENV, None)
    if not text:
        return
    fd = int(text)
    with contextlib.suppress(BrokenPipeError):  # the supervisor is gone; watch_parent says so too
        os.write(fd, b"ready\n")
    os.close(fd)


@dataclass(frozen=True)
class ChildSpec:
    """One child: its command, environment and inherited descriptors. `drain_s` is the time it gets after SIGTERM.

    `ready_on_stdout`: it reports by its first line on standard output instead of TOLLGATE_READY_FD.
    `repeat` makes the specification of the next start out of that line (a port once chosen is kept).
    """

    name: str
    command: tuple[str, ...]
    environ: Mapping[str, str]
    pass_fds: tuple[int, ...] = ()
    drain_s: float = 10.0
    ready_on_stdout: bool = False
    repeat: Callable[[ChildSpec, bytes], ChildSpec] | None = None


@dataclass(frozen=True)
class Timing:
    """Bounds in seconds; tests use shorter ones."""

    backoff_first_s: float = BACKOFF_FIRST_S
    backoff_max_s: float = BACKOFF_MAX_S
    healthy_s: float = HEALTHY_S
    start_s_max: float = START_S_MAX
    hurry_s: float = HURRY_S


@dataclass
class Orders:
    """What all children of one supervisor share: the parent pipe, the call to hurry, and who hears of a death."""

    timing: Timing = field(default_factory=Timing)
    hurry: asyncio.Event = field(default_factory=asyncio.Event)
    on_death: Callable[[int], object] = lambda _: None
    parent_read: int = -1
    parent_write: int = -1

    def open(self) -> None:
        """Make the parent pipe; only its reading end is inherited."""
        self.parent_read, self.parent_write = os.pipe()

    def close(self) -> None:
        """Close the parent pipe: any child that still runs leaves."""
        os.close(self.parent_read)
        os.close(self.parent_write)


class Child:
    """One supervised child process. `start` once, then it is kept running until `stop`."""

    def __init__(self, spec: ChildSpec, orders: Orders) -> None:
        self.spec = spec
        self._orders = orders
        self._timing = orders.timing
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self._first: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._serving = False
        self._starts = 0
        self._ready_at = 0.0

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return self._process.pid if self._process is not None else None

    @property
    def serving(self) -> bool:
        """Whether the running process has reported that it serves."""
        return self._serving

    @property
    def starts(self) -> int:
        """How often it was started."""
        return self._starts

    async def start(self) -> bytes:
        """Start and wait for its report: that line. Raises ChildError when the first start fails (no retry then)."""
        self._task = asyncio.create_task(self._keep_running())
        either: list[asyncio.Future[Any]] = [self._task, self._first]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if self._first.done():
            return self._first.result()
        raise ChildError(f"The {self.spec.name} process was stopped while it started.")

    async def stop(self) -> None:
        """SIGTERM, wait for its drain (less when hurried: SIGINT and 5 s), then SIGKILL. Idempotent."""
        self._stopping.set()
        if self._task is None:
            return
        if not self._task.done():
            self._signal(signal.SIGTERM)
            await self._wait_for_end()
        await self._task
        if self._first.done() and not self._first.cancelled():
            self._first.exception()  # seen: a start that was abandoned has nobody else to ask

    async def _wait_for_end(self) -> None:
        assert self._task is not None
        hurried = asyncio.create_task(self._orders.hurry.wait())
        try:
            await asyncio.wait({self._task, hurried}, timeout=self.spec.drain_s, return_when=asyncio.FIRST_COMPLETED)
            if not self._task.done() and hurried.done():
                self._signal(signal.SIGINT)
                await asyncio.wait({self._task}, timeout=self._timing.hurry_s)
        finally:
            hurried.cancel()
        if not self._task.done():
            log.warning("child killed", child=self.spec.name, pid=self.pid, drain_s=self.spec.drain_s)
            self._signal(signal.SIGKILL)
            await asyncio.wait({self._task}, timeout=KILL_S)

    def _signal(self, number: signal.Signals) -> None:
        # Not Process.send_signal: it polls first, which takes the exit code away from asyncio's own waiting.
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, number)

    async def _keep_running(self) -> None:
        """Start, wait for its end, pause, again. Before the first report an end is final."""
        pause_s = self._timing.backoff_first_s
        loop = asyncio.get_running_loop()
        while not self._stopping.is_set():
            self._ready_at = loop.time() + self._timing.start_s_max
            code, line = await self._run_once()
            if self._stopping.is_set():
                return
            if not self._first.done():
                self._first.set_exception(ChildError(self._why(code, line)))
                return
            if loop.time() - self._ready_at >= self._timing.healthy_s:
                pause_s = self._timing.backoff_first_s
            log.error("child ended", child=self.spec.name, restart_s=pause_s, **_ending(code))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause_s)
            pause_s = min(pause_s * 2, self._timing.backoff_max_s)

    def _why(self, code: int, line: bytes) -> str:
        how = " ".join(f"{name} {value}" for name, value in _ending(code).items())
        said = "before it was ready" if not line else f"after it said {line[:80]!r}"
        return f"The {self.spec.name} process ended {said} ({how}). Its own message is above."

    async def _run_once(self) -> tuple[int, bytes]:
        """One life: exit code (negative: signal) and what it reported."""
        read_fd, write_fd = os.pipe()
        try:
            process = await self._spawn(write_fd)
        except OSError as error:
            os.close(read_fd)
            log.error("child cannot be started", child=self.spec.name, error=str(error))
            return _NOT_STARTED, b""
        finally:
            os.close(write_fd)
        self._process, self._starts = process, self._starts + 1
        reader, transport = await _read_pipe(read_fd)
        if self._stopping.is_set():  # stop() came while it was being started and found nothing to signal
            self._signal(signal.SIGTERM)
        ended = asyncio.create_task(process.wait())
        drain: asyncio.Task[None] | None = None
        try:
            line = await self._report(reader, ended)
            if line:
                self._reported(line)
                drain = asyncio.create_task(_discard(reader))
                return await ended, line
            await asyncio.wait({ended}, timeout=SILENT_S)
            if not ended.done():
                log.error("child did not report that it serves", child=self.spec.name, pid=process.pid)
                self._signal(signal.SIGKILL)
            return await ended, line
        finally:
            if drain is not None:
                drain.cancel()
            transport.close()
            self._serving, self._process = False, None
            self._orders.on_death(process.pid)

    async def _spawn(self, write_fd: int) -> asyncio.subprocess.Process:
        environ = {**self.spec.environ, PARENT_FD_ENV: str(self._orders.parent_read)}
        inherited = [*self.spec.pass_fds, self._orders.parent_read]
        if not self.spec.ready_on_stdout:
            environ[READY_FD_ENV] = str(write_fd)
            inherited.append(write_fd)
        return await asyncio.create_subprocess_exec(
            *self.spec.command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=write_fd if self.spec.ready_on_stdout else None,
            env=environ,
            pass_fds=inherited,
            start_new_session=True,
        )

    async def _report(self, reader: asyncio.StreamReader, ended: asyncio.Task[int]) -> bytes:
        """Its first line; empty when it ended, closed the pipe, or took too long."""
        reading = asyncio.create_task(reader.readline())
        await asyncio.wait({reading, ended}, timeout=self._timing.start_s_max, return_when=asyncio.FIRST_COMPLETED)
        if reading.done():
            with contextlib.suppress(ValueError):  # a line beyond the bound is no report
                return reading.result()
        reading.cancel()
        return b""

    def _reported(self, line: bytes) -> None:
        self._serving = True
        self._ready_at = asyncio.get_running_loop().time()
        log.info("child ready", child=self.spec.name, pid=self.pid)
        if self.spec.repeat is not None:
            self.spec = self.spec.repeat(self.spec, line)
        if not self._first.done():
            self._first.set_result(line)


async def stop_all(children: list[Child]) -> None:
    """Stop these children at the same time."""
    await asyncio.gather(*(child.stop() for child in children))


def with_arguments(spec: ChildSpec, *arguments: str) -> ChildSpec:
    """The same child with further arguments; later starts keep them."""
    return replace(spec, command=(*spec.command, *arguments), repeat=None)


def _ending(code: int) -> dict[str, int | str]:
    if code >= 0:
        return {"exit_code": code}
    try:
        return {"signal": signal.Signals(-code).name}
    except ValueError:
        return {"signal": -code}


async def _read_pipe(fd: int) -> tuple[asyncio.StreamReader, asyncio.ReadTransport]:
    reader = asyncio.StreamReader(limit=_LINE_BYTES_MAX)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(fd, "rb", buffering=0)
    )
    return reader, transport


async def _discard(reader: asyncio.StreamReader) -> None:
    """Keep the pipe empty: a child that writes on would block for ever."""
    while await reader.read(_LINE_BYTES_MAX):
        pass
