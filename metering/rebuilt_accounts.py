"""Accounts as Postgres says they stand, as the Redis commands that write them: nothing held, nobody's session.

The figures are those of the audit's own projection (a test compares them), asked for many accounts at once. What a
revoked grant has left was held when Redis was lost: it is written as available, so that holds which are made again find
it, and named in `returned`, so that the rest is voided afterwards. So are a debtor's grants: what a void returns repays
debt. What an expired grant has left is the expirer's.
Must not: write anything itself, or guess at a figure.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from metering.grants import to_ms
from metering.keys import SHARDS
from metering.ledger import AccountRef
from storage.database import Connection

log = logging.getLogger(__name__)

Command = tuple[str | int, ...]
NEVER: Final = 999_999_999_999_999
"""The place of a grant without expiry in the burn order."""
PAGE: Final = 1_000
"""Accounts that are asked for at once."""

# Nothing of the epoch that is being made has arrived yet, so all entries count.
_LEDGERS = """
    SELECT e.account_id, p.ledger, sum(p.amount)::bigint AS amount FROM account a
    JOIN entry e ON e.account_id = a.id AND e.shard = a.shard
    JOIN posting p ON (p.shard, p.ep, p.n) = (e.shard, e.ep, e.n)
    WHERE a.id = ANY($1::text[]) GROUP BY e.account_id, p.ledger"""
_TAKEN = """
    SELECT e.account_id, c.grant_id, sum(c.amount)::bigint AS consumed, sum(c.breakage)::bigint AS expired,
        sum(c.voided)::bigint AS voided FROM account a
    JOIN entry e ON e.account_id = a.id AND e.shard = a.shard
    JOIN consumption c ON (c.shard, c.ep, c.n) = (e.shard, e.ep, e.n)
    WHERE a.id = ANY($1::text[]) GROUP BY e.account_id, c.grant_id"""
_GRANTS = """
    SELECT g.account_id, g.id, g.amount, g.priority, g.created_at, g.expires_at, g.applied_n,
        coalesce(c.amount, 0) AS repaid FROM grant_ g JOIN account a ON a.id = g.account_id
    LEFT JOIN consumption c ON (c.shard, c.ep, c.n, c.grant_id) = (a.shard, g.applied_epoch, g.applied_n, g.id)
    WHERE a.id = ANY($1::text[])"""
_REVOKED = """
    SELECT g.account_id, r.grant_id, r.applied_n, coalesce(c.voided, 0) AS voided FROM revocation r
    JOIN grant_ g ON g.id = r.grant_id JOIN account a ON a.id = g.account_id
    LEFT JOIN consumption c ON (c.shard, c.ep, c.n, c.grant_id) = (a.shard, r.applied_epoch, r.applied_n, r.grant_id)
    WHERE a.id = ANY($1::text[]) AND r.applied_n IS NOT NULL"""
_ADJUSTED = """
    SELECT j.account_id, j.id, j.amount, j.whole, j.applied_n, coalesce((SELECT sum(c.voided) FROM consumption c
        WHERE (c.shard, c.ep, c.n) = (a.shard, j.applied_epoch, j.applied_n)), 0)::bigint AS voided
    FROM adjustment j JOIN account a ON a.id = j.account_id WHERE a.id = ANY($1::text[]) AND j.applied_n IS NOT NULL"""


@dataclass(slots=True)
class Rebuilding:
    """One account: the commands that write it, and the grants whose rest goes back through a void."""

    account: AccountRef
    commands: list[Command] = field(default_factory=list)
    returned: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Rows:
    """What Postgres has of one account."""

    sums: dict[str, int] = field(default_factory=dict)
    taken: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)
    revoked: dict[str, Any] = field(default_factory=dict)
    adjusted: list[Any] = field(default_factory=list)

    def grants(self) -> list[str]:
        """Those that the journal knows."""
        posted = [name.removeprefix("user:avail:") for name in self.sums if name.startswith("user:avail:")]
        applied = [gid for gid, row in self.own.items() if row["applied_n"] is not None]
        return sorted({*posted, *self.taken, *applied})

    def left(self, gid: str) -> int:
        """Micros of a grant that are neither spent nor lost."""
        return self.sums.get(f"user:avail:{gid}", 0)


async def accounts(connection: Connection, shards: Iterable[int]) -> AsyncIterator[Rebuilding]:
    """All accounts of these shards that Redis must know. Raises `storage.database.FAILED`."""
    rows = await connection.fetch("SELECT * FROM account WHERE shard = ANY($1::smallint[]) ORDER BY id", list(shards))
    for at in range(0, len(rows), PAGE):
        page = rows[at : at + PAGE]
        known = await _read(connection, [row["id"] for row in page])
        for row in page:
            yield _rebuilding(row, known[row["id"]])
        await asyncio.sleep(0)  # a worker of receipts may share this loop


async def _read(connection: Connection, ids: Sequence[str]) -> dict[str, _Rows]:
    found = {each: _Rows() for each in ids}
    for row in await connection.fetch(_LEDGERS, ids):
        found[row["account_id"]].sums[row["ledger"]] = row["amount"]
    for row in await connection.fetch(_TAKEN, ids):
        found[row["account_id"]].taken[row["grant_id"]] = row
    for row in await connection.fetch(_GRANTS, ids):
        found[row["account_id"]].own[row["id"]] = row
    for row in await connection.fetch(_REVOKED, ids):
        found[row["account_id"]].revoked[row["grant_id"]] = row
    for row in await connection.fetch(_ADJUSTED, ids):
        found[row["account_id"]].adjusted.append(row)
    return found


def _rebuilding(row: Any, rows: _Rows) -> Rebuilding:
    uid, number = row["id"], row["shard"]
    made = Rebuilding(AccountRef(uid, number))
    known = rows.grants()
    charged = rows.sums.get("earned", 0) + rows.sums.get("house:absorbed", 0)
    debt = -rows.sums.get("user:debt", 0)
    if not (known or charged or debt or row["policy_applied"]):
        return made
    fields: dict[str, str | int] = {}
    available = 0
    for gid in known:
        left = max(0, rows.left(gid))
        if rows.left(gid) < 0:  # it cannot be written: the audit names such a grant
            log.error("rebuild: grant %s of %s is overspent by %d micros", gid, uid, -rows.left(gid))
        available += left
        own = rows.own.get(gid)
        fields |= _grant_fields(gid, own, rows.taken.get(gid), left)
        if left and own is not None:
            made.commands += _listings(uid, number, own)
            made.returned += [gid] if debt or gid in rows.revoked else []
    fields |= _changes(rows)
    if fields:
        made.commands.append(("HSET", SHARDS[number].grants + uid, *_words(fields)))
    figures: dict[str, str | int] = {"av": available, "hd": 0, "db": debt, "tc": charged, "ns": 0}
    if row["policy_applied"]:
        figures |= {"pol": row["policy"], "lim": row["credit_limit"], "pr": row["policy_applied"]}
    made.commands.append(("HSET", SHARDS[number].account + uid, *_words(figures)))
    return made


def _words(fields: dict[str, str | int]) -> Iterable[str | int]:
    return (word for pair in fields.items() for word in pair)


def _grant_fields(gid: str, own: Any, taken: Any, left: int) -> dict[str, str | int]:
    parts: dict[str, int] = {
        "i": own["amount"] if own else 0,
        "a": left,
        "h": 0,
        "c": taken["consumed"] if taken else 0,
        "x": taken["expired"] if taken else 0,
        "v": taken["voided"] if taken else 0,
        "e": _expiry_ms(own),
    }
    if own:
        parts |= {"n": own["applied_n"] or 0} | ({"rp": own["repaid"]} if own["repaid"] else {})
    return {f"{gid}:{name}": value for name, value in parts.items()}


def _expiry_ms(own: Any) -> int:
    return to_ms(own["expires_at"]) if own is not None and own["expires_at"] is not None else 0


def _listings(uid: str, number: int, own: Any) -> list[Command]:
    """The burn order and the expiry index have what can still be spent."""
    shard, expiry = SHARDS[number], _expiry_ms(own)
    member = f"{own['priority']:02d}|{expiry or NEVER:015d}|{to_ms(own['created_at']):016d}|{own['id']}"
    commands: list[Command] = [("ZADD", shard.order + uid, 0, member)]
    if expiry:
        commands.append(("ZADD", shard.expiries, expiry, f"{uid}|{own['id']}"))
    return commands


def _changes(rows: _Rows) -> dict[str, str | int]:
    """The marks by which a repeated revocation or adjustment is known."""
    fields: dict[str, str | int] = {}
    for gid, row in rows.revoked.items():
        fields |= {f"{gid}:z": 1, f"{gid}:za": row["voided"], f"{gid}:zn": row["applied_n"]}
    for row in rows.adjusted:
        change = row["id"]
        fields |= {f"{change}:t": row["amount"], f"{change}:tw": int(row["whole"])}
        fields |= {f"{change}:ta": row["voided"], f"{change}:tn": row["applied_n"]}
    return fields
