"""One account as Postgres says it stands, as the Redis commands that write it: nothing held, nobody's session.

The figures are those of the audit's own projection, so that what is rebuilt is what the audit expects.
Must not: write anything itself, or guess at a figure.
"""

from __future__ import annotations

import logging
from typing import Any, Final

from metering.audit_queries import GrantRows, projection
from metering.grants import to_ms
from metering.keys import SHARDS
from storage.database import Connection

log = logging.getLogger(__name__)

Command = tuple[str | int, ...]
NEVER: Final = 999_999_999_999_999
"""The place of a grant without expiry in the burn order."""

_GRANTS = """
    SELECT g.id, g.priority, g.created_at, g.applied_n, coalesce(c.amount, 0) AS repaid FROM grant_ g
    LEFT JOIN consumption c ON (c.shard, c.ep, c.n, c.grant_id) = ($2, g.applied_epoch, g.applied_n, g.id)
    WHERE g.account_id = $1 AND g.applied_n IS NOT NULL"""
_REVOKED = """
    SELECT r.grant_id, r.applied_n, coalesce(c.voided, 0) AS voided FROM revocation r
    JOIN grant_ g ON g.id = r.grant_id
    LEFT JOIN consumption c ON (c.shard, c.ep, c.n, c.grant_id) = ($2, r.applied_epoch, r.applied_n, r.grant_id)
    WHERE g.account_id = $1 AND r.applied_n IS NOT NULL"""
_ADJUSTED = """
    SELECT j.id, j.amount, j.whole, j.applied_n, coalesce((SELECT sum(c.voided) FROM consumption c
        WHERE (c.shard, c.ep, c.n) = ($2, j.applied_epoch, j.applied_n)), 0)::bigint AS voided
    FROM adjustment j WHERE j.account_id = $1 AND j.applied_n IS NOT NULL"""


async def account_commands(connection: Connection, row: Any, epoch: int) -> list[Command]:
    """`row` is the account's; everything before (`epoch`, 1) counts. Raises `storage.database.FAILED`."""
    uid, number = row["id"], row["shard"]
    known = await projection(connection, uid, number, epoch, 0)
    if not (known.grants or known.charged or known.debt or row["policy_applied"]):
        return []
    shard = SHARDS[number]
    commands: list[Command] = []
    fields: dict[str, str | int] = {}
    available = 0
    own = {each["id"]: each for each in await connection.fetch(_GRANTS, uid, number)}
    for gid, grant in known.grants.items():
        left = _left(uid, gid, grant)
        available += left
        fields |= _grant_fields(gid, grant, left)
        if gid in own:
            fields |= {f"{gid}:n": own[gid]["applied_n"]}
            fields |= {f"{gid}:rp": own[gid]["repaid"]} if own[gid]["repaid"] else {}
            commands += _listings(uid, number, own[gid], grant, left)
    fields |= await _changes(connection, uid, number)
    if fields:
        commands.append(("HSET", shard.grants + uid, *(word for pair in fields.items() for word in pair)))
    figures = {"av": available, "hd": 0, "db": known.debt, "tc": known.charged, "ns": 0}
    if row["policy_applied"]:
        figures |= {"pol": row["policy"], "lim": row["credit_limit"], "pr": row["policy_applied"]}
    commands.append(("HSET", shard.account + uid, *(word for pair in figures.items() for word in pair)))
    return commands


def _left(uid: str, gid: str, grant: GrantRows) -> int:
    """What is available of it. Less than nothing cannot be written: the audit names such a grant."""
    if grant.held < 0:
        log.error("rebuild: grant %s of %s is overspent by %d micros", gid, uid, -grant.held)
    return max(0, grant.held)


def _grant_fields(gid: str, grant: GrantRows, left: int) -> dict[str, str | int]:
    parts = {
        "i": grant.issued or 0,
        "a": left,
        "h": 0,
        "c": grant.consumed,
        "x": grant.expired,
        "v": grant.voided,
        "e": grant.expires_ms or 0,
    }
    return {f"{gid}:{name}": value for name, value in parts.items()}


def _listings(uid: str, number: int, own: Any, grant: GrantRows, left: int) -> list[Command]:
    """The burn order and the expiry index have what can still be spent."""
    if left == 0:
        return []
    shard, expiry = SHARDS[number], grant.expires_ms or 0
    member = f"{own['priority']:02d}|{expiry or NEVER:015d}|{to_ms(own['created_at']):016d}|{own['id']}"
    commands: list[Command] = [("ZADD", shard.order + uid, 0, member)]
    if expiry:
        commands.append(("ZADD", shard.expiries, expiry, f"{uid}|{own['id']}"))
    return commands


async def _changes(connection: Connection, uid: str, number: int) -> dict[str, str | int]:
    """The marks by which a repeated revocation or adjustment is known."""
    fields: dict[str, str | int] = {}
    for row in await connection.fetch(_REVOKED, uid, number):
        gid = row["grant_id"]
        fields |= {f"{gid}:z": 1, f"{gid}:za": row["voided"], f"{gid}:zn": row["applied_n"]}
    for row in await connection.fetch(_ADJUSTED, uid, number):
        change = row["id"]
        fields |= {f"{change}:t": row["amount"], f"{change}:tw": int(row["whole"])}
        fields |= {f"{change}:ta": row["voided"], f"{change}:tn": row["applied_n"]}
    return fields
