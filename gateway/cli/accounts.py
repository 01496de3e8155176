"""`tollgate accounts`: who pays, how far, and who may answer. Must not: give credit or make keys."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gateway.cli import prefer as preferences
from gateway.cli.context import Context, data_dir_option, with_stores
from gateway.cli.money import CreditsType, format_credits
from gateway.cli.output import emit_json, facts, json_option, table

if TYPE_CHECKING:
    from accounts.preference_admin import Changed
    from metering.ledger import Policy


@click.group()
def accounts() -> None:
    """Accounts: who pays for sessions."""


@accounts.command(short_help="Make an account.")
@click.argument("name")
@data_dir_option
@json_option
def create(name: str, data_dir: Path | None, as_json: bool) -> None:
    """Make an account called NAME. Its id is made up and shown.

    \b
    Example:
      tollgate accounts create "Acme Ltd"
    """
    from accounts import admin

    made = with_stores(data_dir, "creating the account", lambda ctx: admin.create_account(ctx.pool, name))
    if as_json:
        emit_json(_document(made))
    else:
        facts(f"Account {made.name}", [("id", made.id), ("shard", made.shard), ("created", made.created_at)])


@accounts.command(short_help="Say what an account may do without credit.")
@click.argument("account")
@click.argument("policy", type=click.Choice(["cutoff", "grace", "postpaid"]))
@click.option(
    "--limit", type=CreditsType(), metavar="CREDITS", help="The most it may owe (default: grace 1, postpaid 100)."
)
@data_dir_option
@json_option
def policy(account: str, policy: Policy, limit: int | None, data_dir: Path | None, as_json: bool) -> None:
    """Say what ACCOUNT (its id or name) may do when its grants are used up.

    \b
    cutoff    nothing: calls are refused, streams are cut (the default)
    grace     go on into debt up to the limit; meant to be short, the next grant repays it
    postpaid  go on into debt up to the limit; meant to be invoiced

    A limit below what the account owes refuses new calls and ends none.

    \b
    Example:
      tollgate accounts policy "Acme Ltd" postpaid --limit 250
    """
    found, written = with_stores(data_dir, "setting the policy", lambda ctx: _set_policy(ctx, account, policy, limit))
    if as_json:
        money = {"limit": format_credits(written.limit), "limit_micros": written.limit}
        emit_json({"account_id": found.id, **asdict(written), **money})
        return
    state = "in force" if written.state == "applied" else f"waiting: {written.reason}"
    facts(
        f"Account {found.name}",
        [("policy", written.policy), ("limit", format_credits(written.limit)), ("state", state)],
    )


@accounts.command(short_help="Say which providers may answer an account.")
@click.argument("account")
@preferences.preference_options
@data_dir_option
@json_option
def prefer(account: str, clear: bool, data_dir: Path | None, as_json: bool, **lists: tuple[str, ...] | None) -> None:
    """Say which providers may answer ACCOUNT (its id or name), and which first.

    NAMES are `provider` or `provider/model`, with commas between them. Each option replaces its list; an empty one
    (`--allow ""`) takes it away. The account's keys may narrow this and never widen it.
    `tollgate accounts show ACCOUNT` shows it.

    \b
    Example:
      tollgate accounts prefer "Acme Ltd" --exclude openrouter --prefer groq,openai/gpt-4o --tag eu
    """
    said = preferences.given(lists, clear)
    found, changed, unknown = with_stores(
        data_dir, "setting the preferences", lambda ctx: _prefer(ctx, account, said, clear)
    )
    if as_json:
        emit_json({
            "account_id": found.id, "preferences": preferences.document(changed.preferences), "keys": changed.keys,
            "unknown": unknown,
        })  # fmt: skip
        return
    facts(f"Account {found.name}", [*preferences.pairs(changed.preferences), ("keys that follow", changed.keys)])
    preferences.warn(unknown)


@accounts.command(short_help="Show an account, or list all.")
@click.argument("account", required=False)
@data_dir_option
@json_option
def show(account: str | None, data_dir: Path | None, as_json: bool) -> None:
    """Show ACCOUNT (its id or name) with its balance and keys; without it, list all accounts.

    \b
    Example:
      tollgate accounts show "Acme Ltd"
    """
    if account is None:
        _list(data_dir, as_json)
        return
    found, balance, keys = with_stores(data_dir, "reading the account", lambda ctx: _read(ctx, account))
    in_force = [key.id for key in keys if key.revoked_at is None]
    if as_json:
        emit_json({**_document(found), "balance": balance, "keys": in_force})
        return
    money = [(name, format_credits(balance[f"{name}_micros"])) for name in ("available", "held", "debt", "charged")]
    facts(
        f"Account {found.name}",
        [
            ("id", found.id),
            ("shard", found.shard),
            ("created", found.created_at),
            ("policy", found.policy),
            ("credit limit", format_credits(found.credit_limit)),
            *money,
            ("open sessions", balance["open_sessions"]),
            *preferences.pairs(found.preferences),
            ("keys", ", ".join(in_force) or "-"),
        ],
    )


def _document(account: Any) -> dict[str, Any]:
    limit = account.credit_limit
    return {
        **asdict(account),
        "credit_limit": format_credits(limit),
        "credit_limit_micros": limit,
        "preferences": preferences.document(account.preferences),
    }


def balance_document(balance: Any) -> dict[str, Any]:
    """A ledger balance in decimal credits and in micros."""
    names = ("available", "held", "debt", "charged")
    micros = {f"{name}_micros": getattr(balance, name) for name in names}
    return {
        **{name: format_credits(getattr(balance, name)) for name in names},
        **micros,
        "open_sessions": balance.sessions,
    }


async def _set_policy(ctx: Context, account: str, policy: Policy, limit: int | None) -> tuple[Any, Any]:
    from accounts import admin
    from metering import policies

    found = await admin.find_account(ctx.pool, account)
    return found, await policies.change(ctx.pool, ctx.ledger, found.id, policy, limit)


async def _prefer(ctx: Context, account: str, lists: preferences.Lists, clear: bool) -> tuple[Any, Changed, list[str]]:
    from accounts import admin
    from accounts.preference_admin import prefer_account

    found = await admin.find_account(ctx.pool, account)
    changed = await prefer_account(ctx.pool, ctx.redis, found.id, lists, clear=clear)
    return found, changed, preferences.unknown(ctx.settings, changed.preferences)


async def _read(ctx: Context, account: str) -> tuple[Any, dict[str, Any], list[Any]]:
    from accounts import admin
    from metering.ledger import AccountRef

    found = await admin.find_account(ctx.pool, account)
    balance = await ctx.ledger.balance(AccountRef(found.id, found.shard))
    return found, balance_document(balance), await admin.list_keys(ctx.pool, found)


def _list(data_dir: Path | None, as_json: bool) -> None:
    from accounts import admin

    found = with_stores(data_dir, "reading the accounts", lambda ctx: admin.list_accounts(ctx.pool))
    if as_json:
        emit_json({"accounts": [_document(one) for one in found]})
    else:
        rows = [(one.id, one.name, one.shard, one.created_at) for one in found]
        table("Accounts", ("id", "name", "shard", "created (UTC)"), rows, right=("shard",))
