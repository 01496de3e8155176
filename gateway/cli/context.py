"""What a command works with: the stores of a running instance (or our own for its duration), opened and closed here.

Must not: stay open between commands, or read a provider's key (commands do not need one).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from gateway.cli.output import note, progress

if TYPE_CHECKING:
    from config.settings import Secrets, Settings
    from metering.redis_ledger import RedisLedger
    from storage.database import Pool
    from storage.embedded import Stores
    from storage.redis_open import Redis

Result = TypeVar("Result")
Command = TypeVar("Command", bound=Callable[..., object])

POOL_SIZE = 4


@dataclass(frozen=True)
class Context:
    """Open connections and the settings in force. `embedded`: both stores are those of the data folder.

    `step` changes the progress line that the person at the terminal sees.
    """

    settings: Settings
    stores: Stores
    data_dir: Path
    pepper: bytes
    embedded: bool
    pool: Pool
    redis: Redis
    ledger: RedisLedger
    step: Callable[[str], None]


def data_dir_option(command: Command) -> Command:
    """Adds `--data-dir` as the argument `data_dir` (a Path or None)."""
    return click.option(
        "--data-dir",
        type=click.Path(file_okay=False, path_type=Path),
        envvar="TOLLGATE_DATA_DIR",
        show_envvar=True,
        help="Folder of the embedded stores.",
    )(command)


def chosen_data_dir(data_dir: Path | None) -> Path:
    """The folder named on the command line, else the one of the environment, else the default."""
    from config import settings

    return data_dir.absolute() if data_dir is not None else settings.data_dir(os.environ)


def load_settings() -> Settings:
    """The configuration file in force. Raises ConfigError."""
    from config import settings

    return settings.load(settings.find(os.environ))


def store_secrets() -> Secrets:
    """Store addresses and the secret from the environment; providers' keys are not asked for. Raises ConfigError."""
    from config import settings

    return settings.read_secrets(settings.Settings(), os.environ)


def with_stores(data_dir: Path | None, first: str, work: Callable[[Context], Awaitable[Result]]) -> Result:
    """Run `work` on open stores, with a progress line that begins as `first`."""
    from storage.embedded import Stores, stores_for

    folder, settings, secrets = chosen_data_dir(data_dir), load_settings(), store_secrets()
    external = Stores(secrets.redis_url or "", secrets.database_url or "")

    async def run(stores: Stores) -> Result:
        async with opened(settings, secrets, stores, folder, step) as context:
            step(first)
            return await work(context)

    with progress("opening the stores") as step, stores_for(folder, external=external, log=step) as stores:
        result = asyncio.run(run(stores))
        step("closing the stores")
        return result


@contextlib.asynccontextmanager
async def opened(
    settings: Settings,
    secrets: Secrets,
    stores: Stores,
    data_dir: Path,
    step: Callable[[str], None] = lambda _: None,
) -> AsyncIterator[Context]:
    """Connect to both stores; an embedded database without a schema gets one, empty shards are made ready.

    Raises RedisError, storage.database.FAILED, metering.ledger.LedgerError, OSError.
    """
    from config.run import load_or_create_secret
    from metering.bootstrap import ensure_shards
    from metering.redis_ledger import RedisLedger
    from storage.database import connect_pool
    from storage.redis_open import open_redis

    embedded = not (secrets.redis_url or secrets.database_url)
    bounds = settings.redis
    async with contextlib.AsyncExitStack() as stack:
        redis = await open_redis(
            stores.redis_url, call_ms=bounds.call_ms, connect_ms=bounds.connect_ms, pending_max=bounds.pending_max
        )
        stack.push_async_callback(redis.aclose)
        pool = await connect_pool(stores.database_url, size_max=POOL_SIZE, application_name="tollgate-cli")
        stack.push_async_callback(pool.close)
        await _require_schema(pool, stores.database_url, make=embedded)
        ledger = RedisLedger(redis, lease_ms=settings.metering.lease_ms)
        lost = await ensure_shards(redis, ledger, pool)
        if lost:
            note(f"warning: Redis has lost {len(lost)} shards that the journal knows; their accounts are frozen.")
        pepper = load_or_create_secret(data_dir, os.environ)
        yield Context(settings, stores, data_dir, pepper, embedded, pool, redis, ledger, step)


async def _require_schema(pool: Pool, database_url: str, *, make: bool) -> None:
    if await pool.fetchval("SELECT to_regclass('alembic_version')") is not None:
        return
    if not make:
        raise click.ClickException("The database has no Tollgate schema yet: run `tollgate db upgrade`.")
    import migrations

    await migrations.upgrade(database_url)
