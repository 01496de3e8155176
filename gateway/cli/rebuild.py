"""`tollgate rebuild`: Redis' state made anew from Postgres and receipts, as the ledger process does it by itself.

Must not: do it any other way than `metering.recovery`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gateway.cli.context import Context, data_dir_option, with_stores
from gateway.cli.output import emit_json, json_option

SHARDS_MAX = 127


@click.command(short_help="Make Redis' state anew from Postgres and receipts.")
@click.option("--shard", "shards", multiple=True, type=click.IntRange(0, SHARDS_MAX), help="Only this one; repeatable.")
@click.option("--yes", is_flag=True, help="Do not ask first.")
@data_dir_option
@json_option
def rebuild(shards: tuple[int, ...], yes: bool, data_dir: Path | None, as_json: bool) -> None:
    """Freeze shards of Redis (all 128 parts, or those named) and make them anew: from Postgres, from what survived, and
    from the gateways' receipts, which are what they were told of sessions that Postgres has not got yet.

    Safe at any time, also while the gateway runs: new calls of these shards get 503 for a moment, running streams go
    on. A running instance does this by itself when Redis has lost something.

    \b
    Example:
      tollgate rebuild --shard 17 --yes
    """
    if not yes:
        click.confirm(f"Freeze and rebuild {len(shards) or 'all'} shards?", abort=True, err=True)
    done = with_stores(data_dir, "rebuilding", lambda ctx: _rebuild(ctx, shards or tuple(range(SHARDS_MAX + 1))))
    if done is None:
        raise click.ClickException("Another process is recovering shards now: try again.")
    if as_json:
        emit_json(
            {
                "shards": list(done.shards), "accounts": done.accounts, "settled": done.settled, "held": done.held,
                "refused": done.failed, "seconds": round(done.seconds, 3),
            }
        )  # fmt: skip
    else:
        click.echo(
            f"Rebuilt {len(done.shards)} shards in {done.seconds:.2f} s: {done.accounts} accounts, "
            f"{done.settled} sessions settled and {done.held} held again, {done.failed} refused."
        )


async def _rebuild(ctx: Context, shards: tuple[int, ...]) -> Any:
    from metering.recovery import Recovery

    recovery = Recovery(
        ctx.redis,
        ctx.stores.database_url,
        lease_ms=ctx.settings.metering.lease_ms,
        pool=ctx.pool,
        on_step=lambda step: ctx.step(f"rebuilding: {step}"),
    )
    return await recovery.recover(shards)
