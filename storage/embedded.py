"""A private Valkey and a private Postgres in one data folder, started from the programs inside their wheels.

Both listen on unix sockets in a 0700 folder only. Their data survives restarts and kill -9 of anybody. One process at
a time owns a data folder (`lock`); others attach. Files of a data folder: docs of `EmbeddedStores`.

Must not: use the wheels' own launchers, open a TCP port, or remove data.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import quote, unquote

import psutil

from storage.embedded_files import (
    Binaries,
    EmbeddedError,
    Owner,
    check_reachable,
    choose_owner,
    find_binaries,
    own_folder,
    prepare_data_dir,
    prune_binaries,
    socket_folder,
)
from storage.embedded_process import POLL_S, Locked, Log, Plan, ServerProcess, is_server, read_record, run_as, until

__all__ = ["BusyError", "EmbeddedError", "EmbeddedStores", "Stores", "stores_for"]

DATABASE = "tollgate"
LOCK_WAIT_S = 30.0
GUESTS_S_MAX = 60.0
INITDB_S_MAX = 120.0
_PG_PORT = 5432
"""No port is opened: Postgres only names its socket after it."""

VALKEY_CONFIG: Mapping[str, str] = {
    "port": "0",
    "unixsocketperm": "700",
    "daemonize": "no",
    "set-proc-title": "no",
    "appendonly": "yes",
    "appendfsync": "everysec",  # "always" makes Valkey exit on a full disk; kill -9 loses nothing either way
    "save": "",
    "maxmemory": "1gb",  # the outbox bound is a share of it, so it may not be unlimited
    "maxmemory-policy": "noeviction",
    "hash-max-listpack-entries": "128",  # of 64 grants the hash has 512 fields: as a list it is walked, field by field
}
"""The embedded Valkey's settings; `valkey_config` of `EmbeddedStores` overrides single ones."""

_POSTGRES_CONFIG: Mapping[str, str] = {
    "listen_addresses": "",
    "port": str(_PG_PORT),
    "unix_socket_permissions": "0700",
    "logging_collector": "off",
    "log_min_messages": "warning",
    "log_min_error_statement": "panic",  # statements carry customers' data
    "log_checkpoints": "off",
}
_POSTGRES_NOT_DURABLE: Mapping[str, str] = {"fsync": "off", "full_page_writes": "off"}
"""Commits stay synchronous: without that a kill -9 of Postgres loses acknowledged ones."""

_VALKEY_STOP = ((signal.SIGTERM, 15.0), (signal.SIGKILL, 10.0))
_POSTGRES_STOP = ((signal.SIGINT, 30.0), (signal.SIGQUIT, 10.0), (signal.SIGKILL, 10.0))

Role = Literal["serve", "command"]


@dataclass(frozen=True, slots=True)
class Stores:
    """Addresses of both stores. An empty one is not known here.

    `redis_url` is `unix:///<path>`; `database_url` is `postgresql://tollgate@/tollgate?host=<folder>&port=5432`, which
    asyncpg takes as it stands; for SQLAlchemy use `storage.database.engine`, or the scheme `postgresql+asyncpg`.
    """

    redis_url: str = ""
    database_url: str = ""


class BusyError(EmbeddedError):
    """Another process owns this data folder."""


class EmbeddedStores:
    """The servers of one data folder.

    Files: `lock` (flock; who owns the folder), `secret`, `run/` (run files), `servers/` (a lock and a record per
    server), `logs/`, `valkey/` (append-only files), `postgres/` (cluster), `sockets/`, `binaries/` (only when the
    virtual environment is closed to the servers' user).
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        valkey_config: Mapping[str, str] | None = None,
        log: Log | None = None,
        durable: bool = True,
        external: Stores | None = None,
    ) -> None:
        """`external` names stores run by somebody else: those parts are passed through and not started.
        `durable=False` lets Postgres skip fsync (tests: a power cut would lose data, kill -9 does not).
        `log` gets one line per slow or unusual step."""
        self.data_dir = data_dir.absolute()
        self._valkey_config = {**VALKEY_CONFIG, **(valkey_config or {})}
        self._log: Log = log or (lambda _: None)
        self._durable = durable
        self._external = external or Stores()
        self._lock: Locked | None = None
        self._servers: list[ServerProcess] = []

    @property
    def owns(self) -> bool:
        """Whether this object holds the data folder now."""
        return self._lock is not None

    def start(self, role: Role = "command", *, wait_s: float = LOCK_WAIT_S) -> Stores:
        """Start or adopt both servers and wait until they answer. Blocks.

        Raises BusyError when another `serve` owns the folder (a command's short ownership is waited for, `wait_s`),
        EmbeddedError with a readable reason otherwise; then nothing is left running.
        """
        if self._external.redis_url and self._external.database_url:
            return self._external
        prepare_data_dir(self.data_dir)
        self.data_dir = self.data_dir.resolve()
        self._lock = _own(self.data_dir, role, wait_s)
        try:
            return self._start_servers()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop Valkey (append-only file synced), then Postgres (fast), then release the folder. Idempotent."""
        try:
            while self._servers:
                self._servers[0].stop()
                self._servers.pop(0)
        finally:
            if self._lock is not None:
                os.ftruncate(self._lock.fd, 0)
                self._lock.close()
                self._lock = None

    def ensure(self) -> list[str]:
        """Start every server again that ended by itself or is about to; the names of those. Raises EmbeddedError.

        Blocks. Postgres asked to end (SIGTERM) waits for its clients, and the journal's connection never leaves.
        """
        gone = [server for server in self._servers if not server.alive() or server.leaving()]
        for server in gone:
            if server.leaving():
                server.stop()
            server.launch()
            server.wait_ready()
        return [server.plan.name for server in gone]

    @classmethod
    def attach(cls, data_dir: Path, *, external: Stores | None = None) -> Stores | None:
        """The stores of a running instance of this data folder, or None when one of them does not answer."""
        given = external or Stores()
        folder = data_dir.resolve()
        redis_url = given.redis_url or _running_url(folder, "valkey")
        database_url = given.database_url or _running_url(folder, "postgres")
        return Stores(redis_url, database_url) if redis_url and database_url else None

    def pids(self) -> dict[str, int]:
        """Process ids by server name, for logs and tests."""
        return {server.plan.name: server.pid for server in self._servers}

    def _start_servers(self) -> Stores:
        owner = choose_owner(self.data_dir)
        if owner is not None:
            check_reachable(self.data_dir, owner)
        binaries = find_binaries(self.data_dir, owner)
        sockets = socket_folder(self.data_dir, owner)
        plans = []
        if not self._external.redis_url:
            own_folder(self.data_dir / "valkey", owner)
            plans.append(self._valkey_plan(binaries, sockets))
        if not self._external.database_url:
            self._init_postgres(binaries, owner)
            plans.append(self._postgres_plan(binaries, sockets))
        for plan in plans:
            server = ServerProcess(plan, self.data_dir, owner, self._log)
            server.launch()
            self._servers.append(server)
        for server in self._servers:
            server.wait_ready()
        prune_binaries(self.data_dir, binaries)
        urls = {plan.name: plan.url for plan in plans}
        return Stores(
            redis_url=self._external.redis_url or urls["valkey"],
            database_url=self._external.database_url or urls["postgres"],
        )

    def _valkey_plan(self, binaries: Binaries, sockets: Path) -> Plan:
        home, path = self.data_dir / "valkey", sockets / "valkey.sock"
        options = {**self._valkey_config, "dir": str(home), "unixsocket": str(path)}
        argv = [str(binaries.valkey)]
        for name, value in options.items():
            argv += [f"--{name}", *(value.split() if name not in ("dir", "unixsocket") and value else [value])]
        return Plan(
            name="valkey",
            process="valkey-server",
            argv=tuple(argv),
            home=home,
            url=f"unix://{quote(str(path))}",
            ready=lambda _: _valkey_ready(path),
            stop=_VALKEY_STOP,
        )

    def _postgres_plan(self, binaries: Binaries, sockets: Path) -> Plan:
        home = self.data_dir / "postgres"
        options = {**_POSTGRES_CONFIG, "unix_socket_directories": '"' + str(sockets).replace('"', '""') + '"'}
        if not self._durable:
            options.update(_POSTGRES_NOT_DURABLE)
        argv = [str(binaries.postgres / "postgres"), "-D", str(home)]
        for name, value in options.items():
            argv += ["-c", f"{name}={value}"]
        return Plan(
            name="postgres",
            process="postgres",
            argv=tuple(argv),
            home=home,
            url=f"postgresql://{DATABASE}@/{DATABASE}?host={quote(str(sockets), safe='/')}&port={_PG_PORT}",
            ready=lambda pid: _postgres_state(home, pid) == "ready",
            leaving=lambda pid: _postgres_state(home, pid) == "stopping",
            stop=_POSTGRES_STOP,
            stale=(home / "postmaster.pid", sockets / f".s.PGSQL.{_PG_PORT}.lock", sockets / f".s.PGSQL.{_PG_PORT}"),
        )

    def _init_postgres(self, binaries: Binaries, owner: Owner | None) -> None:
        """Make the cluster with its database in a fresh folder and rename it: there is never half a cluster."""
        home = self.data_dir / "postgres"
        for leftover in self.data_dir.glob("postgres-new-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        if (home / "PG_VERSION").exists():
            return
        self._log("preparing a new Postgres database")
        fresh = Path(tempfile.mkdtemp(prefix="postgres-new-", dir=self.data_dir))
        own_folder(fresh, owner)
        sync = [] if self._durable else ["--no-sync"]
        initdb = [str(binaries.postgres / "initdb"), "-D", str(fresh), "--username", DATABASE, "--encoding=UTF8"]
        initdb += ["--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--auth-local=trust"]
        _run([*initdb, "--auth-host=reject", "--no-instructions", *sync], fresh, owner, b"")
        no_fsync = [] if self._durable else ["-c", "fsync=off"]
        single = [str(binaries.postgres / "postgres"), "--single", "-D", str(fresh), *no_fsync, "template1"]
        _run(single, fresh, owner, f"CREATE DATABASE {DATABASE};\n".encode())
        if home.exists():
            home.rmdir()
        fresh.rename(home)


@contextlib.contextmanager
def stores_for(data_dir: Path, *, external: Stores | None = None, log: Log | None = None) -> Iterator[Stores]:
    """The stores for one command: those of a running instance, else servers of our own for the command's duration.

    Commands at the same time share one set: the one that started it ends it when the others have left (60 s at most).
    Raises EmbeddedError, BusyError when an instance is still starting or already stopping after 30 s.
    """
    folder = data_dir.absolute()
    stores = EmbeddedStores(folder, external=external, log=log)
    guests = folder / "servers" / "guests.lock"
    with contextlib.ExitStack() as stack:
        found = _start_or_join(stores, guests, stack, external)
        yield found
        if stores.owns:
            until(lambda: _hold(guests, stack), GUESTS_S_MAX)


def _start_or_join(
    stores: EmbeddedStores, guests: Path, stack: contextlib.ExitStack, external: Stores | None
) -> Stores:
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            found = stores.start("command", wait_s=0)
            stack.callback(stores.stop)
            return found
        except BusyError:
            if time.monotonic() >= deadline:
                raise
        with contextlib.suppress(BlockingIOError), contextlib.ExitStack() as guest:
            guest.enter_context(contextlib.closing(Locked(guests, shared=True)))
            joined = EmbeddedStores.attach(stores.data_dir, external=external)
            if joined is not None:
                stack.push(guest.pop_all())
                return joined
        time.sleep(POLL_S)


def _hold(path: Path, stack: contextlib.ExitStack) -> bool:
    """Take the lock until the stack unwinds; False when somebody else has it."""
    try:
        stack.enter_context(contextlib.closing(Locked(path)))
    except BlockingIOError:
        return False
    return True


def _own(data_dir: Path, role: Role, wait_s: float) -> Locked:
    """Take the data folder. Raises BusyError when a `serve` has it, or a command for longer than `wait_s`."""
    path = data_dir / "lock"
    deadline = time.monotonic() + wait_s
    while True:
        try:
            lock = Locked(path)
        except BlockingIOError:
            holder, _, held_as = path.read_text(encoding="utf-8").partition(" ")
            if held_as != "serve" and time.monotonic() < deadline:
                time.sleep(POLL_S)
                continue
            raise BusyError(
                f"Another Tollgate (process {holder or 'unknown'}) already works with {data_dir}. "
                "Stop it, or set TOLLGATE_DATA_DIR to another folder."
            ) from None
        os.ftruncate(lock.fd, 0)
        os.pwrite(lock.fd, f"{os.getpid()} {role}".encode(), 0)
        return lock


def _run(command: list[str], cwd: Path, owner: Owner | None, stdin: bytes) -> None:
    """Run one preparing program to its end. Raises EmbeddedError with what it said."""
    try:
        done = subprocess.run(
            command,
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            timeout=INITDB_S_MAX,
            check=False,
            **run_as(owner),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EmbeddedError(f"{Path(command[0]).name} could not prepare {cwd.parent}: {error}") from None
    if done.returncode != 0:
        said = "\n  ".join(done.stdout.decode("utf-8", "replace").splitlines()[-12:])
        raise EmbeddedError(f"{Path(command[0]).name} failed with exit code {done.returncode}:\n  {said}")


def _valkey_ready(path: Path) -> bool:
    """PING over the socket; False while it still loads its data."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(1.0)
            connection.connect(str(path))
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith(b"+PONG")
    except OSError:
        return False


def _postgres_state(home: Path, pid: int) -> str:
    """Postgres writes its state into the eighth line of `postmaster.pid`; empty where this process wrote none."""
    try:
        lines = (home / "postmaster.pid").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return lines[7].strip() if len(lines) >= 8 and lines[0].strip() == str(pid) else ""


def _running_url(data_dir: Path, name: str) -> str:
    """The address of a running server by its record, or an empty text."""
    record = read_record(data_dir / "servers", name)
    if record is None or not psutil.pid_exists(record.pid):
        return ""
    home = data_dir / name
    with contextlib.suppress(psutil.Error):
        process = "valkey-server" if name == "valkey" else "postgres"
        if not is_server(psutil.Process(record.pid), process, home):
            return ""
        if name == "valkey":
            answers = _valkey_ready(Path(unquote(record.url.removeprefix("unix://"))))
        else:
            answers = _postgres_state(home, record.pid) == "ready"
        return record.url if answers else ""
    return ""
