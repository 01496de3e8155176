"""`tollgate keys`: API keys. Must not: show a key's text except once, when it is made."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gateway.cli import prefer as preferences
from gateway.cli.context import Context, data_dir_option, with_stores
from gateway.cli.output import emit_json, facts, json_option, note, table

if TYPE_CHECKING:
    from accounts.preference_admin import Changed

_LIMIT = click.IntRange(1, 1_000_000)


@click.group()
def keys() -> None:
    """API keys of accounts."""


@keys.command()
@click.option("--account", required=True, help="Id or name of the account that pays.")
@click.option("--name", default="key", show_default=True, help="What the key is for.")
@click.option("--requests-per-minute", type=_LIMIT, help="Refuse more requests than this within a minute.")
@click.option("--parallel-sessions", type=_LIMIT, help="Refuse more sessions than this at once.")
@data_dir_option
@json_option
def create(
    account: str,
    name: str,
    requests_per_minute: int | None,
    parallel_sessions: int | None,
    data_dir: Path | None,
    as_json: bool,
) -> None:
    """Make a key for an account. Its text is shown now and never again.

    \b
    Example:
      tollgate keys create --account "Acme Ltd" --name laptop --requests-per-minute 60
    """

    async def work(ctx: Context) -> tuple[Any, Any]:
        from accounts import admin

        found = await admin.find_account(ctx.pool, account)
        limits = {"requests_per_minute": requests_per_minute, "parallel_sessions": parallel_sessions}
        return found, await admin.create_key(ctx.pool, ctx.redis, ctx.pepper, found, name, **limits)

    found, made = with_stores(data_dir, "creating the key", work)
    if as_json:
        emit_json({
            "id": made.id, "key": made.text, "account_id": found.id, "name": name,
            "requests_per_minute": requests_per_minute, "parallel_sessions": parallel_sessions,
        })  # fmt: skip
        return
    facts(f"Key for {found.name}", [("id", made.id), ("key", made.text)])
    note("Keep the key now: it is stored nowhere and cannot be shown again.")


@keys.command("list")
@click.option("--account", help="Id or name of one account; all by default.")
@data_dir_option
@json_option
def list_(account: str | None, data_dir: Path | None, as_json: bool) -> None:
    """List keys, the newest first.

    \b
    Example:
      tollgate keys list --account "Acme Ltd"
    """

    async def work(ctx: Context) -> tuple[list[Any], str]:
        from accounts import admin
        from accounts.keys import fingerprint

        found = await admin.find_account(ctx.pool, account) if account is not None else None
        return await admin.list_keys(ctx.pool, found), fingerprint(ctx.pepper)

    found, own = with_stores(data_dir, "reading the keys", work)
    states = [_state(key, own) for key in found]
    if as_json:
        emit_json({"keys": [_document(key, state) for key, state in zip(found, states, strict=True)]})
        return
    rows = [
        (
            key.id, key.name, key.account_id, state, key.requests_per_minute, key.parallel_sessions, key.created_at,
            preferences.brief(key.preferences),
        )
        for key, state in zip(found, states, strict=True)
    ]  # fmt: skip
    columns = ("id", "name", "account", "state", "per minute", "parallel", "created (UTC)", "providers")
    table("Keys", columns, rows, right=("per minute", "parallel"))


def _document(key: Any, state: str) -> dict[str, Any]:
    return {**asdict(key), "state": state, "preferences": preferences.document(key.preferences)}


def _state(key: Any, own_fingerprint: str) -> str:
    if key.revoked_at is not None:
        return "revoked"
    return "valid" if key.pepper_fingerprint == own_fingerprint else "other secret"


@keys.command(short_help="Say which providers may answer a key.")
@click.argument("key_id")
@preferences.preference_options
@data_dir_option
@json_option
def prefer(key_id: str, clear: bool, data_dir: Path | None, as_json: bool, **lists: tuple[str, ...] | None) -> None:
    """Say which providers may answer the key with the id KEY_ID, within what its account allows.

    NAMES are `provider` or `provider/model`, with commas between them. Each option replaces its list; an empty one
    (`--allow ""`) takes it away. `tollgate keys list` shows what keys say.

    \b
    Example:
      tollgate keys prefer 3fT9kQ2a --allow openai,azure/gpt-4o
    """
    said = preferences.given(lists, clear)

    async def work(ctx: Context) -> tuple[Changed, list[str]]:
        from accounts.preference_admin import prefer_key

        changed = await prefer_key(ctx.pool, ctx.redis, key_id, said, clear=clear)
        return changed, preferences.unknown(ctx.settings, changed.preferences)

    changed, unknown = with_stores(data_dir, "setting the preferences", work)
    shown = preferences.document(changed.preferences)
    if as_json:
        emit_json({"id": key_id, "account_id": changed.account_id, "preferences": shown, "unknown": unknown})
        return
    facts(f"Key {key_id}", preferences.pairs(changed.preferences))
    preferences.warn(unknown)


@keys.command(short_help="Refuse a key from now on.")
@click.argument("key_id")
@data_dir_option
@json_option
def revoke(key_id: str, data_dir: Path | None, as_json: bool) -> None:
    """Refuse the key with the id KEY_ID from now on, on every gateway. It cannot be undone.

    \b
    Example:
      tollgate keys revoke 3fT9kQ2a
    """
    from accounts import admin

    changed = with_stores(data_dir, "revoking the key", lambda ctx: admin.revoke_key(ctx.pool, ctx.redis, key_id))
    if as_json:
        emit_json({"id": key_id, "revoked": True, "changed": changed})
    else:
        click.echo(f"Key {key_id} is revoked." if changed else f"Key {key_id} was revoked before.")
