"""One embedded server process: start, find again after its parent was killed, stop, report.

The server inherits the open, exclusively locked file `<name>.lock`. The kernel keeps that lock for as long as any
process of the server lives and drops it with the last one, whoever was killed and how: so holding the lock proves
that no second server works on the same files. A process is signalled only after its name and working folder match.

Must not: know Redis or Postgres beyond their plan, or signal a process by its number alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import msgspec
import psutil

from storage.embedded_files import EmbeddedError, Owner

POLL_S = 0.02
START_S_MAX = 120.0
"""A server that replays a long log after a crash needs time; a healthy start takes well under a second."""
ADOPT_S_MAX = 20.0
"""A survivor that does not answer in this time is stopped and started anew."""

_LOG_BYTES_MAX = 16 * 1024 * 1024
_TAIL_LINES = 12

Log = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """How one server runs. `process` and `home` (its working folder) identify it; `url` is what clients use;
    `ready` gets the main process id; `stop` lists signals with the seconds each may take; `stale` are files of a killed
    server that would stop the next one; `leaving` gets the main process id of a server that may be shutting down."""

    name: str
    process: str
    argv: tuple[str, ...]
    home: Path
    url: str
    ready: Callable[[int], bool]
    stop: tuple[tuple[signal.Signals, float], ...]
    stale: tuple[Path, ...] = ()
    leaving: Callable[[int], bool] = lambda _: False


class Record(msgspec.Struct, frozen=True):
    """What `<name>.json` remembers of a started server."""

    pid: int
    argv: tuple[str, ...]
    url: str


class Locked:
    """An exclusive flock on a file, released by `close` or by the end of every process that inherited it."""

    def __init__(self, path: Path, *, shared: bool = False) -> None:
        """Raises BlockingIOError when somebody else holds it."""
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self.fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BaseException:
            os.close(self.fd)
            raise

    def close(self) -> None:
        """Let go of our own descriptor. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def free(path: Path) -> bool:
    """Whether nobody holds the lock now."""
    try:
        Locked(path).close()
    except BlockingIOError:
        return False
    return True


def until(done: Callable[[], bool], seconds: float) -> bool:
    """Poll until `done` or the deadline; the last answer of `done`."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_S)
    return True


def is_server(process: psutil.Process, name: str, home: Path) -> bool:
    """Whether this process is the named program, at work in this folder, and alive."""
    try:
        if process.name() != name or process.status() == psutil.STATUS_ZOMBIE:
            return False
        return Path(process.cwd()) == home
    except (psutil.Error, OSError):
        return False


def running(name: str, home: Path) -> Iterator[psutil.Process]:
    """The topmost processes of one server: those whose parent is not of the same server."""
    found = [process for process in psutil.process_iter() if is_server(process, name, home)]
    known = {process.pid for process in found}
    for process in found:
        with contextlib.suppress(psutil.Error):
            if process.ppid() not in known:
                yield process


def read_record(folder: Path, name: str) -> Record | None:
    """The record of a server started from this data folder, if one is left."""
    try:
        return msgspec.json.decode((folder / f"{name}.json").read_bytes(), type=Record)
    except (OSError, msgspec.DecodeError):
        return None


class RunAs(TypedDict, total=False):
    """Keywords of subprocess that make a server independent of us: session, user, environment, file modes."""

    user: int
    group: int
    extra_groups: list[int]
    start_new_session: bool
    umask: int
    env: dict[str, str]


def run_as(owner: Owner | None) -> RunAs:
    """Own session (Ctrl-C must not reach it), private files, and an environment without our secrets."""
    environ = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}
    common = RunAs(start_new_session=True, umask=0o077, env=environ)
    if owner is None:
        return common
    return RunAs(user=owner.uid, group=owner.gid, extra_groups=[], **common)


class ServerProcess:
    """One server of one data folder. Not safe for use from two threads at once."""

    def __init__(self, plan: Plan, data_dir: Path, owner: Owner | None, log: Log) -> None:
        self.plan = plan
        self._lock_path = data_dir / "servers" / f"{plan.name}.lock"
        self._record_path = data_dir / "servers" / f"{plan.name}.json"
        self._log_path = data_dir / "logs" / f"{plan.name}.log"
        self._owner = owner
        self._log = log
        self._child: subprocess.Popen[bytes] | None = None
        self._pid = 0
        self._log_from = 0

    @property
    def pid(self) -> int:
        """Process id of the server, 0 when none was started."""
        return self._pid

    def alive(self) -> bool:
        """Whether the server that we started or adopted still runs."""
        if self._child is not None:
            return self._child.poll() is None
        return self._pid != 0 and self._is_ours(self._pid)

    def leaving(self) -> bool:
        """Whether it still runs but was told by somebody else to end, and takes no new clients."""
        return self.alive() and self.plan.leaving(self._pid)

    def launch(self) -> None:
        """Start the server, or adopt a survivor that runs as planned; one that does not is stopped first."""
        try:
            lock = Locked(self._lock_path)
        except BlockingIOError:
            if self._adopt():
                return
            self._log(f"stopping a {self.plan.name} server that a killed parent left behind")
            self._end_survivors()
            lock = Locked(self._lock_path)
        try:
            self._spawn(lock)
        finally:
            lock.close()

    def wait_ready(self) -> None:
        """Block until the server answers. Raises EmbeddedError with the end of its log when it ends or is too slow."""
        answered = until(lambda: not self.alive() or self.plan.ready(self._pid), START_S_MAX)
        if self.alive() and answered:
            return
        code = self._child.returncode if self._child is not None else None
        what = f"did not answer within {START_S_MAX:.0f} s" if self.alive() else f"ended at start with exit code {code}"
        raise EmbeddedError(f"The embedded {self.plan.name} {what}. {self._tail()}")

    def stop(self) -> None:
        """Stop the server with its signals in order and wait until its last process is gone. Idempotent."""
        if self._pid == 0:
            return
        self._end_survivors()
        if self._child is not None:
            self._child.wait()
            self._child = None
        self._pid = 0
        self._record_path.unlink(missing_ok=True)

    def _adopt(self) -> bool:
        record = read_record(self._record_path.parent, self.plan.name)
        if record is None or record.argv != self.plan.argv or not self._is_ours(record.pid):
            return False
        if not until(lambda: self.plan.ready(record.pid) or not self._is_ours(record.pid), ADOPT_S_MAX):
            return False
        if not self._is_ours(record.pid):
            return False
        self._log(f"adopted the {self.plan.name} server {record.pid} that a killed parent left behind")
        self._pid, self._child = record.pid, None
        return True

    def _spawn(self, lock: Locked) -> None:
        foreign = next(running(self.plan.process, self.plan.home), None)
        if foreign is not None:
            raise EmbeddedError(
                f"A {self.plan.process} that Tollgate did not start (process {foreign.pid}) works in "
                f"{self.plan.home}. Stop it first."
            )
        for leftover in self.plan.stale:  # a stale process number, perhaps taken by another program since
            leftover.unlink(missing_ok=True)
        with self._open_log() as output:
            try:
                self._child = subprocess.Popen(
                    self.plan.argv,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    cwd=self.plan.home,
                    pass_fds=(lock.fd,),
                    **run_as(self._owner),
                )
            except OSError as error:
                raise EmbeddedError(f"The embedded {self.plan.name} cannot be started: {error}.") from None
        self._pid = self._child.pid
        record = Record(pid=self._pid, argv=self.plan.argv, url=self.plan.url)
        fresh = self._record_path.with_suffix(".new")
        fresh.write_bytes(msgspec.json.encode(record))
        fresh.replace(self._record_path)

    @contextlib.contextmanager
    def _open_log(self) -> Iterator[int]:
        """The server's log, appended; set aside once when it has grown large."""
        if self._log_path.exists() and self._log_path.stat().st_size > _LOG_BYTES_MAX:
            self._log_path.replace(self._log_path.with_suffix(".log.1"))
        fd = os.open(self._log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            self._log_from = os.fstat(fd).st_size
            yield fd
        finally:
            os.close(fd)

    def _end_survivors(self) -> None:
        for sign, seconds in self.plan.stop:
            if self._child is not None:
                self._child.poll()
            for process in running(self.plan.process, self.plan.home):
                with contextlib.suppress(psutil.Error):
                    process.send_signal(sign)
            if until(lambda: free(self._lock_path), seconds):
                return
            self._log(f"{self.plan.name} did not end within {seconds:.0f} s of {sign.name}")
        raise EmbeddedError(
            f"The embedded {self.plan.name} does not end: its lock {self._lock_path} is still held. {self._tail()}"
        )

    def _is_ours(self, pid: int) -> bool:
        try:
            return is_server(psutil.Process(pid), self.plan.process, self.plan.home)
        except psutil.Error:
            return False

    def _tail(self) -> str:
        try:
            with self._log_path.open("rb") as file:
                file.seek(self._log_from)
                lines = file.read(_LOG_BYTES_MAX).decode("utf-8", "replace").splitlines()[-_TAIL_LINES:]
        except OSError:
            lines = []
        shown = "\n  ".join(lines) or "(nothing was logged)"
        return f"End of {self._log_path}:\n  {shown}"
