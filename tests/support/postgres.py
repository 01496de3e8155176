"""A private Postgres for one test run, on a unix socket, and databases in it: empty ones and migrated ones."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import migrations
from storage.database import connect
from storage.embedded import EmbeddedStores, Stores

NO_REDIS = Stores(redis_url="unix:///not-started-here")


class PostgresServer:
    """One cluster in its own folder, without a Valkey. `start`, `stop` and `start` again keep the data."""

    def __init__(self, *, durable: bool = False) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="tollgate-pg-"))
        self.folder.chmod(0o755)  # root's servers run as somebody else
        self._stores = EmbeddedStores(self.folder / "data", durable=durable, external=NO_REDIS)
        self._url = ""

    def url(self, database: str = "tollgate") -> str:
        """The URL of one of its databases."""
        return self._url.replace("/tollgate?", f"/{database}?", 1)

    def start(self) -> None:
        """Start, or start again, and wait until it accepts connections."""
        if self._stores.owns:
            self._stores.ensure()
        else:
            self._url = self._stores.start().database_url

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT is a fast shutdown, SIGQUIT an immediate one (crash recovery at the next start)."""
        process = psutil.Process(self._stores.pids()["postgres"])
        process.send_signal(how)
        psutil.wait_procs([process], timeout=20)

    def remove(self) -> None:
        """Stop and delete."""
        self._stores.stop()
        shutil.rmtree(self.folder)

    def execute(self, statement: str) -> None:
        """Run one statement in the maintenance database, outside of any running loop."""
        asyncio.run(self._execute(statement))

    async def _execute(self, statement: str) -> None:
        connection = await connect(self.url())
        try:
            await connection.execute(statement)
        finally:
            await connection.close()


@contextlib.contextmanager
def fresh_database(server: PostgresServer, template: str = "template1") -> Iterator[str]:
    """The URL of a new database, dropped at the end."""
    name = f"t{secrets.token_hex(6)}"
    server.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
    try:
        yield server.url(name)
    finally:
        server.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture(scope="session", name="postgres_server")
def postgres_server_fixture() -> Iterator[PostgresServer]:
    """One Postgres for the run, with a migrated template database `ledger`."""
    server = PostgresServer()
    try:
        server.start()
        server.execute("CREATE DATABASE ledger")
        asyncio.run(migrations.upgrade(server.url("ledger")))
        yield server
    finally:
        server.remove()


@pytest.fixture(name="empty_database")
def empty_database_fixture(postgres_server: PostgresServer) -> Iterator[str]:
    """URL of a database without any table."""
    with fresh_database(postgres_server) as url:
        yield url


@pytest.fixture(name="ledger_database")
def ledger_database_fixture(postgres_server: PostgresServer) -> Iterator[str]:
    """URL of a migrated, empty database."""
    with fresh_database(postgres_server, "ledger") as url:
        yield url
