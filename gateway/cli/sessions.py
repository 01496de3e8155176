"""`tollgate sessions`: what was streamed and what it cost. Must not: change a session."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from gateway.cli.context import Context, data_dir_option, with_stores
from gateway.cli.money import format_credits
from gateway.cli.output import emit_json, json_option, table

RUNNING_ACCOUNTS_MAX = 100
"""Accounts whose running sessions are looked up; more would make a list nobody reads."""

_FIELDS = (
    "sid", "account_id", "key_id", "outcome", "charged", "absorbed", "started_at", "ended_at", "route", "provider",
    "model", "source", "stream", "prompt_tokens", "cached_tokens", "cache_write_tokens", "output_tokens",
    "reasoning_tokens", "price_version", "metadata",
)  # fmt: skip


@click.group()
def sessions() -> None:
    """Metered sessions."""


@sessions.command("list", short_help="List running and finished sessions.")
@click.option("--account", help="Id or name of one account; all by default.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=20, show_default=True, help="At most this many.")
@data_dir_option
@json_option
def list_(account: str | None, limit: int, data_dir: Path | None, as_json: bool) -> None:
    """List sessions, the newest first: those that run now, then finished ones as Postgres has them.

    \b
    Example:
      tollgate sessions list --account "Acme Ltd" --limit 5
    """

    async def work(ctx: Context) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        from accounts import admin

        found = await admin.find_account(ctx.pool, account) if account is not None else None
        finished = await _finished(ctx, found.id if found else None, limit)
        return (await _running(ctx, found.id if found else None))[:limit], finished

    running, finished = with_stores(data_dir, "reading the sessions", work)
    known = {one["id"] for one in running}
    listed = [*running, *(one for one in finished if one["id"] not in known)][:limit]
    if as_json:
        emit_json({"sessions": listed})
        return
    columns = ("session", "account", "state", "route", "prompt", "output", "source", "credits", "ms", "started (UTC)")
    rows = [
        (
            one["id"], one["account_id"], one["state"], one.get("route"), one.get("prompt_tokens"),
            one.get("output_tokens"), one.get("source"), one["charged"], one.get("duration_ms"), one["started_at"],
        )
        for one in listed
    ]  # fmt: skip
    table("Sessions", columns, rows, right=("prompt", "output", "credits", "ms"))


@sessions.command("show", short_help="Show one finished session with its attempts.")
@click.argument("session")
@data_dir_option
@json_option
def show(session: str, data_dir: Path | None, as_json: bool) -> None:
    """Show one finished session: what it cost, and every attempt at a provider in it, with its outcome and its cost.

    \b
    Example:
      tollgate sessions show 01a1fbb6-34cd-7cce-a03d-fe5e61e34734
    """

    async def work(ctx: Context) -> dict[str, Any] | None:
        rows = await ctx.pool.fetch(f"{_SELECT} WHERE sid = $1", session)
        return _finished_document(dict(rows[0])) if rows else None

    found = with_stores(data_dir, "reading the session", work)
    if found is None:
        raise click.ClickException(
            f"there is no finished session '{session[:64]}'; one that runs is shown once it has ended. "
            "See: tollgate sessions list"
        )
    if as_json:
        emit_json(found)
        return
    table("Session", ("field", "value"), _facts(found))
    columns = ("provider", "model", "outcome", "status", "first ms", "ms", "prompt", "output", "house credits")
    table("Attempts", columns, [_attempt(each) for each in found["metadata"].get("attempts", ())], right=columns[4:])


def _facts(found: dict[str, Any]) -> list[tuple[str, Any]]:
    names = (
        "id", "account_id", "key_id", "state", "route", "prompt_tokens", "output_tokens", "source", "charged",
        "started_at", "ended_at", "duration_ms",
    )  # fmt: skip
    metadata = found["metadata"]
    cost = metadata.get("house_cost")
    return [
        *((name, found[name]) for name in names),
        ("request_id", metadata.get("request_id")),
        ("ending", metadata.get("ending")),
        ("house credits", None if cost is None else format_credits(cost)),
    ]


def _attempt(each: dict[str, Any]) -> tuple[Any, ...]:
    cost = each.get("cost")
    return (
        each["provider"], each["model"], each["outcome"], each["status"], each.get("first_content_ms"), each["ms"],
        each.get("prompt"), each.get("output"), None if cost is None else format_credits(cost),
    )  # fmt: skip


_SELECT = (
    f"SELECT {', '.join(_FIELDS)}, (SELECT coalesce(sum(correction.charged), 0)::bigint"  # noqa: S608  (our columns)
    " FROM correction WHERE correction.sid = session.sid) AS corrected FROM session"
)


async def _finished(ctx: Context, account_id: str | None, limit: int) -> list[dict[str, Any]]:
    """Rows of the journal's session table, newest first (a session id begins with its time)."""
    rows = await ctx.pool.fetch(
        f"{_SELECT} WHERE $1::text IS NULL OR account_id = $1 ORDER BY month DESC, sid DESC LIMIT $2",
        account_id, limit,
    )  # fmt: skip
    return [_finished_document(dict(row)) for row in rows]


def _finished_document(row: dict[str, Any]) -> dict[str, Any]:
    import json

    metadata = row.pop("metadata")
    corrected = row.pop("corrected")  # by the owner of a session that had been swept
    charged, absorbed = row.pop("charged") + corrected, row.pop("absorbed")
    return {
        "id": row.pop("sid"),
        "state": row.pop("outcome"),
        "charged": format_credits(charged),
        "charged_micros": charged,
        "corrected_micros": corrected,
        "absorbed_micros": absorbed,
        "duration_ms": round((row["ended_at"] - row["started_at"]).total_seconds() * 1000),
        **row,
        "metadata": json.loads(metadata) if isinstance(metadata, str) else metadata,
    }


async def _running(ctx: Context, account_id: str | None) -> list[dict[str, Any]]:
    """Held sessions as Redis has them, newest first."""
    from metering.keys import SHARDS
    from metering.ledger import AccountRef

    owners: dict[str, int] = {}
    for shard in SHARDS:
        for member in await ctx.redis.call("ZRANGE", shard.leases, 0, -1):
            owners[member.decode().partition("|")[0]] = shard.number
    wanted = [uid for uid in owners if account_id in (None, uid)][:RUNNING_ACCOUNTS_MAX]
    found = []
    for uid in wanted:
        snapshot = await ctx.ledger.snapshot(AccountRef(uid, owners[uid]))
        found += [_running_document(uid, sid, state) for sid, state in snapshot.sessions.items()]
    return sorted(found, key=lambda one: str(one["id"]), reverse=True)


def _running_document(account_id: str, sid: str, state: Any) -> dict[str, Any]:
    return {
        "id": sid,
        "state": "running",
        "account_id": account_id,
        "charged": format_credits(state.metered),
        "charged_micros": state.metered,
        "held_micros": state.held,
        "started_at": _started(sid),
    }


def _started(sid: str) -> datetime | None:
    """The time inside a UUIDv7, which our session ids are."""
    try:
        return datetime.fromtimestamp(int(sid.replace("-", "")[:12], 16) / 1000, UTC)
    except (ValueError, OverflowError, OSError):
        return None
