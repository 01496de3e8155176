"""`tollgate db`: the Postgres schema. Must not: change data."""

from __future__ import annotations

import asyncio
from pathlib import Path

import click

from gateway.cli.context import chosen_data_dir, data_dir_option, store_secrets
from gateway.cli.output import emit_json, json_option, progress


@click.group()
def db() -> None:
    """The Postgres schema."""


@db.command()
@data_dir_option
@json_option
def upgrade(data_dir: Path | None, as_json: bool) -> None:
    """Bring the database's schema to this version.

    Safe to run at any time and from several places at once; `tollgate serve` does it by itself.

    \b
    Example:
      DATABASE_URL=postgresql://tollgate:secret@db/tollgate tollgate db upgrade
    """
    with progress("opening the database") as step:
        import migrations
        from storage.embedded import Stores, stores_for

        secrets = store_secrets()
        external = Stores(secrets.redis_url or "", secrets.database_url or "")
        with stores_for(chosen_data_dir(data_dir), external=external, log=step) as stores:

            async def work() -> tuple[str | None, str | None]:
                before = await migrations.current(stores.database_url)
                step("applying migrations")
                await migrations.upgrade(stores.database_url)
                return before, await migrations.current(stores.database_url)

            before, after = asyncio.run(work())
    if as_json:
        emit_json({"before": before, "revision": after, "changed": before != after})
    elif before == after:
        click.echo(f"The schema is at {after}; nothing to do.")
    else:
        click.echo(f"The schema is now at {after} (was {before or 'empty'}).")
