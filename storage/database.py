"""Postgres connections: one reading of the database URL for asyncpg and for SQLAlchemy, pools with bounds.

Must not: know a table, import SQLAlchemy at the top (data workers use the pool), or print a password.
The Protocols describe the part of asyncpg that we use, because asyncpg ships no types.
"""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit, urlunsplit

import asyncpg  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

APPLICATION_NAME = "tollgate"
CONNECT_S = 5.0
COMMAND_S = 30.0
POOL_SIZE = 8
IDLE_S = 300.0

REJECTED: tuple[type[Exception], ...] = (
    asyncpg.DataError,
    asyncpg.IntegrityConstraintViolationError,
    ValueError,
    OverflowError,
)
"""The values themselves were refused: repeating the same statement cannot help."""

FAILED: tuple[type[Exception], ...] = (
    OSError,
    TimeoutError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)
"""Everything else that a statement or a connection can raise: unreachable, shutting down, out of disk, deadlock."""


class DatabaseUrlError(ValueError):
    """The database URL is not usable; the message never shows it."""


class HostUnknown(OSError):
    """The database URL names a host without an address (one of FAILED: names can be out for a while)."""


_HOST = re.compile(r"(?:[A-Za-z0-9._%-]*|\[[0-9A-Fa-f:.]+\])(?::(?P<port>[0-9]{1,5}))?")


class Connection(Protocol):
    """The part of ``asyncpg.Connection`` that we use."""

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str: ...
    async def executemany(self, command: str, args: Iterable[Sequence[Any]]) -> None: ...
    async def fetch(self, query: str, *args: Any, timeout: float | None = None) -> list[Any]: ...
    async def fetchrow(self, query: str, *args: Any, timeout: float | None = None) -> Any: ...
    async def fetchval(self, query: str, *args: Any, timeout: float | None = None) -> Any: ...
    async def copy_records_to_table(
        self, table_name: str, *, records: Iterable[Sequence[Any]], columns: Sequence[str] | None = None
    ) -> str: ...
    def transaction(
        self, *, isolation: str | None = None, readonly: bool = False
    ) -> AbstractAsyncContextManager[None]: ...
    def is_closed(self) -> bool: ...
    async def close(self, *, timeout: float | None = None) -> None: ...
    def terminate(self) -> None: ...


class Pool(Protocol):
    """The part of ``asyncpg.Pool`` that we use."""

    def acquire(self, *, timeout: float | None = None) -> AbstractAsyncContextManager[Connection]: ...
    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str: ...
    async def fetch(self, query: str, *args: Any, timeout: float | None = None) -> list[Any]: ...
    async def fetchrow(self, query: str, *args: Any, timeout: float | None = None) -> Any: ...
    async def fetchval(self, query: str, *args: Any, timeout: float | None = None) -> Any: ...
    async def close(self) -> None: ...
    def terminate(self) -> None: ...


def dsn(url: str) -> str:
    """The URL as asyncpg reads it: ``postgres://`` and ``postgresql+asyncpg://`` become ``postgresql://``.

    A unix socket is named by its folder: ``postgresql://user@/database?host=/folder``. Raises DatabaseUrlError, also
    where a password with special characters was cut in pieces: what then looks like a host or a port is part of it.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in ("postgres", "postgresql", "postgresql+asyncpg"):
        raise DatabaseUrlError("DATABASE_URL: write postgresql://user:password@host:5432/database.")
    place, rest_of_it = re.fullmatch(r"([^/?#]*)(.*)", rest, re.DOTALL).groups()  # type: ignore[union-attr]
    hosts = place.rpartition("@")[2].split(",")
    whole = place.count("@") <= 1 and "#" not in rest_of_it and "@" not in rest_of_it.partition("?")[0]
    if not whole or ("@" in rest_of_it and "@" not in place) or not all(map(_is_host, hosts)):
        raise DatabaseUrlError(
            "DATABASE_URL: its host or port cannot be read. Write postgresql://user:password@host:5432/database with "
            "a port of 1-65535, and / # ? @ % inside the password as %2F %23 %3F %40 %25."
        )
    return f"postgresql://{rest}"


def _is_host(text: str) -> bool:
    found = _HOST.fullmatch(text)
    return found is not None and 0 < int(found["port"] or 1) < 65_536


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """asyncpg's words about the URL itself under our names, without what the URL holds."""
    try:
        yield
    except socket.gaierror as error:
        raise HostUnknown(
            f"Postgres cannot be reached: the host in DATABASE_URL has no address ({error.strerror}). Correct its name."
        ) from None
    except UnicodeError:
        raise DatabaseUrlError("DATABASE_URL: its host is not a name that can be looked up.") from None
    except asyncpg.exceptions.ClientConfigurationError as error:
        raise DatabaseUrlError(f"DATABASE_URL: {error}") from None
    except ValueError:
        raise DatabaseUrlError("DATABASE_URL: it, or a parameter behind its '?', cannot be read.") from None


def redacted(url: str) -> str:
    """The URL without its password, for logs and messages."""
    parts = urlsplit(dsn(url))
    user, _, place = parts.netloc.rpartition("@")
    name = user.partition(":")[0]
    query = "&".join(pair for pair in parts.query.split("&") if pair and not pair.startswith("password="))
    return urlunsplit((parts.scheme, f"{name}@{place}" if name else place, parts.path, query, ""))


async def connect(url: str, *, application_name: str = APPLICATION_NAME, command_s: float = COMMAND_S) -> Connection:
    """One connection outside of any pool, bounded by 5 s to connect and `command_s` a statement. Raises FAILED."""
    target, named = dsn(url), {"application_name": application_name}
    with _readable():
        connection: Connection = await asyncpg.connect(
            target, timeout=CONNECT_S, command_timeout=command_s, server_settings=named
        )
    return connection


async def connect_pool(
    url: str, *, size_max: int = POOL_SIZE, application_name: str = APPLICATION_NAME, command_s: float = COMMAND_S
) -> Pool:
    """A pool of at most `size_max` connections, opened on demand; one is tried now. Raises FAILED."""
    target = dsn(url)
    with _readable():
        pool: Pool = await asyncpg.create_pool(
            target,
            min_size=0,  # a floor would be restored in the background, with a traceback in the log for each failure
            max_size=size_max,
            timeout=CONNECT_S,
            command_timeout=command_s,
            max_inactive_connection_lifetime=IDLE_S,
            server_settings={"application_name": application_name},
        )
    try:
        with _readable():
            await pool.fetchval("SELECT 1")
    except BaseException:
        pool.terminate()
        raise
    return pool


def engine(url: str) -> AsyncEngine:
    """A SQLAlchemy engine without a pool for cold work (migrations, administration), on asyncpg and the same URL."""
    from sqlalchemy.ext.asyncio import create_async_engine
    from sqlalchemy.pool import NullPool

    target = dsn(url)

    async def creator() -> Any:
        named = {"application_name": APPLICATION_NAME}
        with _readable():
            return await asyncpg.connect(target, timeout=CONNECT_S, server_settings=named)

    return create_async_engine("postgresql+asyncpg://", async_creator=creator, poolclass=NullPool)
