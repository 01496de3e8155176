"""A Valkey and a Postgres that Tollgate did not start: over TCP, each with a password. Must not: be a part of ours."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from storage.database import FAILED, connect
from storage.embedded_files import choose_owner, find_binaries, own_folder
from storage.embedded_process import run_as
from tests.support.ports import free_port
from tests.support.redis_server import RedisServer

START_S = 60.0
PASSWORD = "p@ss/w:rd#1"
"""With every sign that a URL must quote."""
USER = "keeper"


class ForeignPostgres:
    """A cluster in its own folder, with the database and the user `keeper`, who has to give a password."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="foreign-pg-"))
        self.folder.chmod(0o711)
        self.port = free_port()
        self._owner = choose_owner(self.folder)
        self._programs = find_binaries(self.folder, self._owner).postgres
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """As DATABASE_URL has it."""
        return f"postgresql://{USER}:{quote(PASSWORD, safe='')}@127.0.0.1:{self.port}/postgres"

    @property
    def alive(self) -> bool:
        """Whether its main process runs."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Make the cluster, start it and wait until it lets us in."""
        home, given = self.folder / "cluster", self.folder / "password"
        own_folder(home, self._owner)
        given.write_text(PASSWORD)
        if self._owner is not None:
            os.chown(given, self._owner.uid, self._owner.gid)
        command = [str(self._programs / "initdb"), "-D", str(home), "--username", USER, "--auth=scram-sha-256"]
        command += [f"--pwfile={given}", "--encoding=UTF8", "--locale=C", "--no-sync"]
        made = subprocess.run(command, cwd=home, capture_output=True, text=True, check=False, **run_as(self._owner))
        assert made.returncode == 0, made.stdout + made.stderr
        command = [str(self._programs / "postgres"), "-D", str(home), "-p", str(self.port)]
        command += ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "fsync=off"]
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(
            command, cwd=home, stdin=quiet, stdout=quiet, stderr=quiet, **run_as(self._owner)
        )
        deadline = time.monotonic() + START_S
        while not asyncio.run(self._answers()):
            assert self.alive, f"postgres ended with {self._process.returncode}"
            assert time.monotonic() < deadline, f"postgres did not answer within {START_S} s"
            time.sleep(0.02)

    async def _answers(self) -> bool:
        try:
            connection = await connect(self.url)
        except FAILED:
            return False
        await connection.close()
        return True

    def remove(self) -> None:
        """Stop and delete."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(START_S)
        shutil.rmtree(self.folder)


@dataclass
class ForeignStores:
    """Both, running."""

    redis: RedisServer
    redis_url: str
    postgres: ForeignPostgres

    def environ(self, secret: str) -> dict[str, str]:
        """What `serve` and every command are told of them."""
        return {"REDIS_URL": self.redis_url, "DATABASE_URL": self.postgres.url, "TOLLGATE_SECRET": secret}


@contextlib.contextmanager
def foreign_stores() -> Iterator[ForeignStores]:
    """Both, started for the block."""
    postgres, port = ForeignPostgres(), free_port()
    with tempfile.TemporaryDirectory(prefix="tg-", dir="/tmp") as folder:
        redis = RedisServer(Path(folder), port=port, password=PASSWORD, appendonly=True)
        try:
            redis.start()
            postgres.start()
            yield ForeignStores(redis, f"redis://:{quote(PASSWORD, safe='')}@127.0.0.1:{port}/0", postgres)
        finally:
            redis.kill()
            postgres.remove()
