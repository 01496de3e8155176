"""`tollgate credits`: give credit, take it back, look at it. Must not: compute a balance, the ledger knows it."""

from __future__ import annotations

import secrets
from datetime import UTC, datetime, time, timedelta
from pathlib import Path
from typing import Any

import click

from gateway.cli.accounts import balance_document
from gateway.cli.context import Context, data_dir_option, with_stores
from gateway.cli.money import CreditsType, format_credits
from gateway.cli.output import emit_json, facts, json_option, note, table

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class _Moment(click.ParamType[datetime]):
    """A day (its end, UTC) or an ISO 8601 time (UTC unless it says otherwise)."""

    name = "time"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        if isinstance(value, datetime):
            return value
        text = str(value)
        try:
            moment = datetime.fromisoformat(text)
            if len(text) == len("2026-01-31"):
                moment = datetime.combine(moment.date(), time(23, 59, 59, 999_000))
            return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
        except (ValueError, OverflowError):
            self.fail("write a day such as 2026-12-31, or a time such as 2026-12-31T12:00:00Z.", param, ctx)


@click.group("credits")
def credits_() -> None:
    """Credits of accounts: grants and balances."""


@credits_.command(short_help="Give credit to an account.")
@click.argument("account")
@click.argument("amount", type=CreditsType(), metavar="CREDITS")
@click.option("--expires", type=_Moment(), help="When what is left of it ends: a day or a time (UTC).")
@click.option("--priority", type=click.IntRange(0, 99), default=50, show_default=True, help="Lower is spent first.")
@click.option("--notes", default="", help="Why it was given.")
@click.option("--id", "grant_id", help="An id of your own: repeating it gives nothing twice.")
@data_dir_option
@json_option
def grant(
    account: str,
    amount: int,
    expires: datetime | None,
    priority: int,
    notes: str,
    grant_id: str | None,
    data_dir: Path | None,
    as_json: bool,
) -> None:
    """Give CREDITS (a decimal with at most six decimals) to ACCOUNT (its id or name).

    \b
    Example:
      tollgate credits grant "Acme Ltd" 12.50 --expires 2026-12-31 --notes "trial"
    """

    async def work(ctx: Context) -> tuple[Any, Any]:
        from accounts import admin
        from metering import grants

        found = await admin.find_account(ctx.pool, account)
        new = grants.NewGrant(
            id=grant_id or f"grant_{secrets.token_hex(10)}",
            account=found.id,
            amount=amount,
            priority=priority,
            expires_at=expires,
            notes=notes,
        )
        return found, await grants.issue(ctx.pool, ctx.ledger, new)

    found, issued = with_stores(data_dir, "granting", work)
    _tell("grant", found, issued, amount, as_json)


@credits_.command(short_help="Add credit, or take it back.", context_settings={"ignore_unknown_options": True})
@click.argument("account")
@click.argument("amount", type=CreditsType(signed=True), metavar="CREDITS")
@click.option("--partly", is_flag=True, help="Take what there is when it is less (else: all of it or nothing).")
@click.option("--notes", default="", help="Why it was changed.")
@click.option("--id", "change_id", help="An id of your own: repeating it changes nothing twice.")
@data_dir_option
@json_option
def adjust(
    account: str,
    amount: int,
    partly: bool,
    notes: str,
    change_id: str | None,
    data_dir: Path | None,
    as_json: bool,
) -> int:
    """Change the available credit of ACCOUNT (its id or name) by CREDITS, which may be negative.

    What is added is a grant without expiry. What is taken comes from what nobody holds, in the order in which it would
    be spent; it is decided once, so what was refused for lack of credit stays refused (exit code 1).

    \b
    Example:
      tollgate credits adjust "Acme Ltd" -5 --notes "paid twice"
    """

    async def work(ctx: Context) -> tuple[Any, Any]:
        from accounts import admin
        from metering import grant_changes, grants

        found = await admin.find_account(ctx.pool, account)
        name = change_id or f"adjust_{secrets.token_hex(10)}"
        if amount > 0:
            return found, await grants.issue(ctx.pool, ctx.ledger, grants.NewGrant(name, found.id, amount, notes=notes))
        new = grant_changes.NewAdjustment(name, found.id, -amount, whole=not partly, notes=notes)
        return found, await grant_changes.adjust(ctx.pool, ctx.ledger, new)

    found, changed = with_stores(data_dir, "adjusting", work)
    took = amount if amount > 0 or changed.amount is None else -changed.amount
    _tell("adjustment", found, changed, took, as_json)
    return 1 if changed.state == "refused" else 0


def _tell(what: str, found: Any, done: Any, amount: int, as_json: bool) -> None:
    """What a grant or an adjustment did: `done` has id, state, reason and available; `amount` is in micros."""
    available = None if done.available is None else format_credits(done.available)
    if as_json:
        emit_json({
            "id": done.id, "account_id": found.id, "amount": format_credits(amount), "amount_micros": amount,
            "state": done.state, "reason": done.reason, "available": available,
            "available_micros": done.available,
        })  # fmt: skip
        return
    facts(
        f"{format_credits(amount)} credits for {found.name}",
        [(what, done.id), ("state", done.state), ("available now", available)],
    )
    if done.state == "waiting":
        note(f"It is written and becomes effective later: {done.reason}.")
    elif done.reason:
        note(f"It is {done.state}: {done.reason}.")


@credits_.command(short_help="Show a balance and the open grants.")
@click.argument("account")
@data_dir_option
@json_option
def show(account: str, data_dir: Path | None, as_json: bool) -> None:
    """Show the balance of ACCOUNT (its id or name) and its open grants, in the order in which they are spent.

    \b
    Example:
      tollgate credits show "Acme Ltd"
    """

    async def work(ctx: Context) -> tuple[Any, Any]:
        from accounts import admin
        from metering.ledger import AccountRef

        found = await admin.find_account(ctx.pool, account)
        return found, await ctx.ledger.snapshot(AccountRef(found.id, found.shard))

    found, snapshot = with_stores(data_dir, "reading the balance", work)
    balance = balance_document(snapshot.balance)
    grants = [_grant_document(gid, snapshot.grants[gid]) for gid in snapshot.burn_order]
    if as_json:
        emit_json({"account_id": found.id, "balance": balance, "grants": grants})
        return
    names = ("available", "held", "debt", "charged", "open_sessions")
    facts(f"Credits of {found.name}", [(name.replace("_", " "), balance[name]) for name in names])
    click.echo()
    columns = ("grant", "issued", "available", "held", "consumed", "expires (UTC)")
    rows = [tuple(one[name] for name in ("id", *columns[1:5], "expires_at")) for one in grants]
    table("Open grants", columns, rows, right=columns[1:5])


def _grant_document(gid: str, state: Any) -> dict[str, Any]:
    parts = ("issued", "available", "held", "consumed", "expired")
    return {
        "id": gid,
        **{name: format_credits(getattr(state, name)) for name in parts},
        **{f"{name}_micros": getattr(state, name) for name in parts},
        "expires_at": _EPOCH + timedelta(milliseconds=state.expires_ms) if state.expires_ms else None,
    }
