"""`tollgate grants`: what became of an account's grants, and their end before their time.

Must not: compute what is left of a grant, the ledger knows it.
"""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from gateway.cli.context import Context, data_dir_option, with_stores
from gateway.cli.money import format_credits
from gateway.cli.output import emit_json, facts, json_option, note, table

_PARTS = ("issued", "available", "held", "consumed", "expired", "voided")


@click.group()
def grants() -> None:
    """Grants: all credit that an account was given."""


@grants.command("list", short_help="List all grants of an account.")
@click.argument("account")
@data_dir_option
@json_option
def list_(account: str, data_dir: Path | None, as_json: bool) -> None:
    """List all grants of ACCOUNT (its id or name), the newest first, with what became of them.

    \b
    Example:
      tollgate grants list "Acme Ltd"
    """

    async def work(ctx: Context) -> tuple[Any, Any, Any]:
        from accounts import admin
        from metering import grants
        from metering.ledger import AccountRef

        found = await admin.find_account(ctx.pool, account)
        written = await grants.listed(ctx.pool, found.id)
        return found, written, await ctx.ledger.snapshot(AccountRef(found.id, found.shard))

    found, written, snapshot = with_stores(data_dir, "reading the grants", work)
    now = datetime.fromtimestamp(snapshot.now_ms / 1000, UTC)
    documents = [_document(one, snapshot.grants.get(one.id), now) for one in written]
    if as_json:
        emit_json({"account_id": found.id, "grants": documents})
        return
    columns = ("grant", "state", *_PARTS, "priority", "expires (UTC)", "notes")
    names = ("id", "state", *_PARTS, "priority", "expires_at", "notes")
    rows = [tuple(one[name] for name in names) for one in documents]
    table(f"Grants of {found.name}", columns, rows, right=(*_PARTS, "priority"))


def _document(written: Any, state: Any, now: datetime) -> dict[str, Any]:
    """A grant's row and, once it is in force, its parts; before that only `issued` is known."""
    parts = {name: getattr(state, name) if state is not None else None for name in _PARTS}
    parts["issued"] = written.amount
    return {
        "id": written.id,
        "state": _state(written, state, now),
        **{name: None if micros is None else format_credits(micros) for name, micros in parts.items()},
        **{f"{name}_micros": micros for name, micros in parts.items()},
        "priority": written.priority,
        "effective_at": written.effective_at,
        "expires_at": written.expires_at,
        "created_at": written.created_at,
        "revoked_at": written.revoked_at,
        "notes": written.notes,
    }


def _state(written: Any, state: Any, now: datetime) -> str:
    if written.revoked_at is not None:
        return "revoked"
    if state is None:
        return "waiting"
    if written.expires_at is not None and written.expires_at <= now:
        return "expired"
    return "open" if state.available or state.held else "spent"


@grants.command(short_help="End a grant for ever.")
@click.argument("grant")
@click.option("--notes", default="", help="Why it was revoked.")
@click.option("--id", "revocation_id", help="An id of your own for the revocation.")
@data_dir_option
@json_option
def revoke(grant: str, notes: str, revocation_id: str | None, data_dir: Path | None, as_json: bool) -> None:
    """End GRANT (its id) for ever: what is left of it is voided.

    What running sessions hold of it they may spend; what they do not spend is voided when they end. Repeating it
    changes nothing.

    \b
    Example:
      tollgate grants revoke grant_1f0c5a --notes "payment returned"
    """

    async def work(ctx: Context) -> Any:
        from metering import grant_changes

        # A grant is revoked once, so without an id of the caller's own its name gives one: a repeat is no error.
        name = revocation_id or f"revoke_{hashlib.sha256(grant.encode()).hexdigest()[:20]}"
        return await grant_changes.revoke(ctx.pool, ctx.ledger, grant_changes.NewRevocation(name, grant, notes))

    done = with_stores(data_dir, "revoking", work)
    voided, available = (None if micros is None else format_credits(micros) for micros in (done.amount, done.available))
    if as_json:
        emit_json({
            "id": done.id, "grant": grant, "state": done.state, "reason": done.reason, "voided": voided,
            "voided_micros": done.amount, "available": available, "available_micros": done.available,
        })  # fmt: skip
        return
    facts(
        f"Grant {grant}",
        [("revocation", done.id), ("state", done.state), ("voided at once", voided), ("available now", available)],
    )
    if done.state == "waiting":
        note(f"It is written and becomes effective later: {done.reason}.")
