"""`tollgate audit`: the ledger recomputed across Redis and Postgres. Must not: repair, or round anything away."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from gateway.cli.context import Context, data_dir_option, with_stores
from gateway.cli.output import emit_json, json_option, table


@click.command(short_help="Recompute the ledger across Redis and Postgres.")
@click.option("--account", "accounts", multiple=True, help="Id or name of an account; repeatable. All by default.")
@click.option(
    "--wait-s", type=click.FloatRange(0, 3600), default=30.0, show_default=True,
    help="Wait this long per account for the journal to arrive.",
)  # fmt: skip
@data_dir_option
@json_option
def audit(accounts: tuple[str, ...], wait_s: float, data_dir: Path | None, as_json: bool) -> int:
    """Recompute every account's credit across Redis and Postgres, also while the gateway runs.

    Exit code 1 when anything differs by one micro or more.

    \b
    Example:
      tollgate audit --json
    """
    report = with_stores(data_dir, "auditing", lambda ctx: _audit(ctx, accounts, wait_s))
    if as_json:
        differences = [{name: getattr(one, name) for name in _DIFFERENCE} for one in report.differences]
        emit_json({"ok": report.ok, **asdict(report), "differences": differences})
    else:
        _show(report)
    return 0 if report.ok else 1


_DIFFERENCE = ("account", "what", "redis", "postgres", "micros")


async def _audit(ctx: Context, names: tuple[str, ...], wait_s: float) -> Any:
    from accounts import admin
    from metering import reconcile
    from metering.journal import Flusher

    def show(done: int, total: int) -> None:
        ctx.step(f"auditing: {done} of {total} accounts")

    only = [(await admin.find_account(ctx.pool, name)).id for name in names] or None
    flusher = Flusher(ctx.redis, ctx.stores.database_url)
    try:  # without a running instance nobody else moves the journal; with one, several flushers are safe
        await flusher.drain()
    finally:
        await flusher.aclose()
    return await reconcile.audit(ctx.pool, ctx.ledger, ctx.redis, only=only, wait_s=wait_s, on_progress=show)


def _show(report: Any) -> None:
    if report.differences:
        rows = [(one.account, one.what, one.redis, one.postgres, one.micros) for one in report.differences]
        table("Differences", ("account", "what", "Redis", "Postgres", "micros"), rows, right=("micros",))
    if report.pending_grants:
        click.echo(f"Grants that wait to be applied: {', '.join(report.pending_grants)}")
    if report.pending_changes:
        click.echo(f"Revocations and adjustments that wait to be applied: {', '.join(report.pending_changes)}")
    verdict = "no difference" if report.ok else f"{len(report.differences)} differences"
    click.secho(f"Audited {report.accounts} accounts: {verdict}.", bold=True, fg="green" if report.ok else "red")
