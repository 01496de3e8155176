"""The audit's Postgres side: one account's projection up to a journal position, and the checks of the whole ledger.

Must not: write, or compare with Redis (`reconcile` does).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from metering.grants import to_ms
from storage.database import Connection, Pool


@dataclass(frozen=True, slots=True)
class GrantRows:
    """One grant as the rows say. `issued` and `expires_ms` come from its own row; `held` is what is not yet spent."""

    issued: int | None
    expires_ms: int | None
    confirmed: bool
    held: int
    consumed: int
    expired: int
    voided: int
    revoked: bool


@dataclass(frozen=True, slots=True)
class Projection:
    """One account's sums over the journal up to a position. `charged` and `absorbed` come from the postings."""

    debt: int
    charged: int
    absorbed: int
    session_charged: int
    session_absorbed: int
    grants: dict[str, GrantRows]


@dataclass(frozen=True, slots=True)
class Finding:
    """One row that breaks a rule: whose, which rule and where, what was expected and what is there."""

    account: str
    what: str
    expected: int | str | None
    found: int | str | None


_UNTIL = "e.account_id = $1 AND e.shard = $2 AND (e.ep, e.n) <= ($3, $4)"
_LEDGERS = f"""
    SELECT p.ledger, sum(p.amount)::bigint AS amount FROM entry e JOIN posting p USING (shard, ep, n)
    WHERE {_UNTIL} GROUP BY p.ledger"""  # noqa: S608
_TAKEN = f"""
    SELECT c.grant_id, sum(c.amount)::bigint AS consumed, sum(c.breakage)::bigint AS expired,
        sum(c.voided)::bigint AS voided
    FROM entry e JOIN consumption c USING (shard, ep, n) WHERE {_UNTIL} GROUP BY c.grant_id"""  # noqa: S608
_SESSIONS = f"""
    SELECT coalesce(sum(e.charged), 0)::bigint AS charged, coalesce(sum(e.absorbed), 0)::bigint AS absorbed FROM (
        SELECT shard, ep, n, account_id, charged, absorbed FROM session
        UNION ALL SELECT shard, ep, n, account_id, charged, absorbed FROM correction) e WHERE {_UNTIL}"""  # noqa: S608
_GRANTS = """
    SELECT g.id, g.amount, g.expires_at,
        coalesce((g.applied_epoch, g.applied_n) <= ($2::int, $3::bigint), false) AS confirmed,
        coalesce((r.applied_epoch, r.applied_n) <= ($2::int, $3::bigint), false) AS revoked
    FROM grant_ g LEFT JOIN revocation r ON r.grant_id = g.id WHERE g.account_id = $1"""


async def projection(connection: Connection, account: str, shard: int, epoch: int, entry: int) -> Projection:
    """What the journal says of the account up to entry (epoch, entry), which must have arrived."""
    at = (account, shard, epoch, entry)
    sums = {row["ledger"]: row["amount"] for row in await connection.fetch(_LEDGERS, *at)}
    taken = {row["grant_id"]: row for row in await connection.fetch(_TAKEN, *at)}
    own = {row["id"]: row for row in await connection.fetch(_GRANTS, account, epoch, entry)}
    sessions = await connection.fetchrow(_SESSIONS, *at)
    posted = {name.removeprefix("user:avail:") for name in sums if name.startswith("user:avail:")}
    return Projection(
        debt=-sums.get("user:debt", 0),
        charged=sums.get("earned", 0) + sums.get("house:absorbed", 0),
        absorbed=-sums.get("house:absorbed", 0),
        session_charged=sessions["charged"],
        session_absorbed=sessions["absorbed"],
        grants={
            gid: _grant_rows(own.get(gid), taken.get(gid), sums.get(f"user:avail:{gid}", 0))
            for gid in posted | taken.keys() | {gid for gid, row in own.items() if row["confirmed"]}
        },
    )


def _grant_rows(own: Any, taken: Any, held: int) -> GrantRows:
    return GrantRows(
        issued=own["amount"] if own else None,
        expires_ms=None if own is None else to_ms(own["expires_at"]) if own["expires_at"] else 0,
        confirmed=own is not None and own["confirmed"],
        held=held,
        consumed=taken["consumed"] if taken else 0,
        expired=taken["expired"] if taken else 0,
        voided=taken["voided"] if taken else 0,
        revoked=own is not None and own["revoked"],
    )


# Each answers account, place, expected, found for every row that breaks the rule. One statement sees one instant.
_RULES: tuple[tuple[str, str], ...] = (
    (
        "postings of an entry sum to zero",
        "SELECT e.account_id AS account, p.at AS place, 0 AS expected, p.amount AS found FROM ("
        "SELECT shard, ep, n, format('%s:%s-%s', shard, ep, n) AS at, sum(amount)::bigint AS amount "
        "FROM posting GROUP BY shard, ep, n HAVING sum(amount) <> 0) p LEFT JOIN entry e USING (shard, ep, n)",
    ),
    (
        "a posting belongs to an entry",
        "SELECT NULL AS account, format('%s:%s-%s', p.shard, p.ep, p.n) AS place, 'an entry' AS expected, "
        "NULL AS found FROM posting p LEFT JOIN entry e USING (shard, ep, n) WHERE e.n IS NULL",
    ),
    (
        "entries are gap-free and end at the cursor",
        "SELECT NULL AS account, "
        "format('shard %s epoch %s', coalesce(c.shard, e.shard), coalesce(c.ep, e.ep)) AS place, "
        "coalesce(CASE WHEN c.n IS NOT NULL THEN c.n ELSE e.last END, 0) AS expected, coalesce(e.count, 0) AS found "
        "FROM shard_cursor c FULL JOIN (SELECT shard, ep, count(*) AS count, min(n) AS first, max(n) AS last FROM "
        "(SELECT shard, ep, n FROM entry UNION ALL SELECT shard, ep, n FROM outbox_dead) arrived GROUP BY shard, ep) e "
        "ON e.shard = c.shard AND e.ep = c.ep "
        "WHERE coalesce(e.count, 0) <> coalesce(e.last, 0) OR coalesce(e.first, 1) <> 1 OR c.n <> coalesce(e.last, 0)",
    ),
    (
        "a session has one terminal entry",
        "SELECT min(account_id) AS account, sid AS place, 1 AS expected, count(*) AS found FROM entry "
        "WHERE type = 'settle' GROUP BY sid HAVING count(*) <> 1",
    ),
    (
        "a session is corrected once at most",
        "SELECT min(account_id) AS account, sid AS place, 1 AS expected, count(*) AS found FROM entry "
        "WHERE type = 'correct' GROUP BY sid HAVING count(*) > 1",
    ),
    (
        "a correction's entry has its row, and that is of a swept session",
        "SELECT coalesce(e.account_id, c.account_id) AS account, coalesce(e.sid, c.sid) AS place, "
        "'swept' AS expected, s.outcome AS found FROM (SELECT * FROM entry WHERE type = 'correct') e "
        "FULL JOIN correction c USING (shard, ep, n) "
        "LEFT JOIN session s ON s.month = c.month AND s.sid = c.sid AND s.account_id = c.account_id "
        "WHERE (e.sid, e.account_id) IS DISTINCT FROM (c.sid, c.account_id) OR s.outcome IS DISTINCT FROM 'swept'",
    ),
    (
        "a terminal entry has its session and a session its entry",
        "SELECT coalesce(e.account_id, s.account_id) AS account, coalesce(e.sid, s.sid) AS place, "
        "e.sid AS expected, s.sid AS found FROM (SELECT * FROM entry WHERE type = 'settle') e "
        "FULL JOIN session s USING (shard, ep, n) "
        "WHERE e.sid IS DISTINCT FROM s.sid OR e.account_id IS DISTINCT FROM s.account_id",
    ),
    (
        "a session's charge is what its entry earned",
        "SELECT s.account_id AS account, s.sid AS place, s.charged AS expected, coalesce(p.amount, 0) AS found "
        "FROM (SELECT shard, ep, n, account_id, sid, charged, absorbed FROM session UNION ALL "
        "SELECT shard, ep, n, account_id, sid, charged, absorbed FROM correction) s LEFT JOIN (SELECT shard, ep, n, "
        "coalesce(sum(amount) FILTER (WHERE ledger IN ('earned', 'house:absorbed')), 0)::bigint AS amount, "
        "coalesce(-sum(amount) FILTER (WHERE ledger = 'house:absorbed'), 0)::bigint AS absorbed "
        "FROM posting GROUP BY shard, ep, n) p USING (shard, ep, n) "
        "WHERE s.charged <> coalesce(p.amount, 0) OR s.absorbed <> coalesce(p.absorbed, 0)",
    ),
    (
        "a grant's postings are its amount less its consumption",
        "SELECT g.account_id AS account, g.id AS place, g.amount - coalesce(c.taken, 0) AS expected, "
        "coalesce(p.amount, 0) AS found FROM grant_ g "
        "LEFT JOIN (SELECT grant_id, sum(amount + breakage + voided)::bigint AS taken FROM consumption GROUP BY 1) c "
        "ON c.grant_id = g.id LEFT JOIN (SELECT substr(ledger, 12) AS gid, sum(amount)::bigint AS amount FROM posting "
        "WHERE ledger LIKE 'user:avail:%' GROUP BY 1) p ON p.gid = g.id "
        "WHERE g.applied_n IS NOT NULL AND g.amount - coalesce(c.taken, 0) <> coalesce(p.amount, 0)",
    ),
    (
        "usage sums equal the sessions",
        "SELECT coalesce(s.account_id, u.account_id) AS account, 'charged' AS place, "
        "coalesce(s.charged, 0) AS expected, coalesce(u.charged, 0) AS found FROM "
        "(SELECT account_id, sum(charged)::bigint AS charged, sum(one)::bigint AS sessions FROM "
        "(SELECT account_id, charged, 1 AS one FROM session UNION ALL "
        "SELECT account_id, charged, 0 AS one FROM correction) each GROUP BY 1) s "
        "FULL JOIN "
        "(SELECT account_id, sum(charged)::bigint AS charged, sum(sessions)::bigint AS sessions FROM usage_rollup "
        "GROUP BY 1) u USING (account_id) WHERE (s.charged, s.sessions) IS DISTINCT FROM (u.charged, u.sessions)",
    ),
    (
        "no entry is dead",
        "SELECT NULL AS account, format('%s:%s-%s', shard, ep, n) AS place, NULL AS expected, reason AS found "
        "FROM outbox_dead",
    ),
    (
        "a confirmed grant has its entry",
        "SELECT g.account_id AS account, g.id AS place, 'grant' AS expected, e.type AS found FROM grant_ g "
        "JOIN account a ON a.id = g.account_id LEFT JOIN entry e ON e.shard = a.shard AND e.ep = g.applied_epoch "
        "AND e.n = g.applied_n AND e.account_id = g.account_id AND e.type = 'grant' "
        "WHERE g.applied_n IS NOT NULL AND e.n IS NULL",
    ),
    (
        "a confirmed revocation has its entry",
        "SELECT g.account_id AS account, r.id AS place, 'revoke' AS expected, e.type AS found FROM revocation r "
        "JOIN grant_ g ON g.id = r.grant_id JOIN account a ON a.id = g.account_id "
        "LEFT JOIN entry e ON e.shard = a.shard AND e.ep = r.applied_epoch AND e.n = r.applied_n "
        "AND e.account_id = g.account_id AND e.type = 'revoke' WHERE r.applied_n IS NOT NULL AND e.n IS NULL",
    ),
    (
        "a confirmed adjustment has its entry and took what it may",
        "SELECT j.account_id AS account, j.id AS place, j.amount AS expected, coalesce(c.voided, 0) AS found "
        "FROM adjustment j JOIN account a ON a.id = j.account_id "
        "LEFT JOIN entry e ON e.shard = a.shard AND e.ep = j.applied_epoch AND e.n = j.applied_n "
        "AND e.account_id = j.account_id AND e.type = 'adjust' "
        "LEFT JOIN LATERAL (SELECT sum(voided)::bigint AS voided FROM consumption "
        "WHERE shard = e.shard AND ep = e.ep AND n = e.n) c ON true WHERE j.applied_n IS NOT NULL AND (e.n IS NULL "
        "OR coalesce(c.voided, 0) > j.amount OR (j.whole AND coalesce(c.voided, 0) NOT IN (0, j.amount)))",
    ),
    (
        "an entry that voids credit was asked for",
        "SELECT e.account_id AS account, format('%s:%s-%s', e.shard, e.ep, e.n) AS place, 'a row' AS expected, "
        "e.type AS found FROM entry e WHERE e.type IN ('revoke', 'adjust') AND NOT EXISTS ("
        "SELECT FROM revocation r JOIN grant_ g ON g.id = r.grant_id WHERE g.account_id = e.account_id "
        "AND r.applied_epoch = e.ep AND r.applied_n = e.n AND e.type = 'revoke') AND NOT EXISTS ("
        "SELECT FROM adjustment j WHERE j.account_id = e.account_id AND j.applied_epoch = e.ep "
        "AND j.applied_n = e.n AND e.type = 'adjust')",
    ),
    (
        "an account's entries lie in its shard",
        "SELECT DISTINCT e.account_id AS account, format('shard %s', e.shard) AS place, a.shard::text AS expected, "
        "e.shard::text AS found FROM entry e LEFT JOIN account a ON a.id = e.account_id "
        "WHERE a.shard IS DISTINCT FROM e.shard",
    ),
)


async def broken_rules(pool: Pool, timeout_s: float) -> list[Finding]:
    """Every row of the whole ledger that breaks a rule of its own, without looking at Redis. Raises FAILED."""
    findings = []
    async with pool.acquire() as connection:
        for rule, query in _RULES:
            findings += [
                Finding(row["account"] or "", f"{rule}: {row['place']}", row["expected"], row["found"])
                for row in await connection.fetch(query, timeout=timeout_s)
            ]
    return findings


async def accounts(pool: Pool | Connection, only: Sequence[str] | None) -> dict[str, int]:
    """Account id -> shard, of all or of those named."""
    rows = await pool.fetch("SELECT id, shard FROM account WHERE $1::text[] IS NULL OR id = ANY($1) ORDER BY id", only)
    return {row["id"]: row["shard"] for row in rows}


async def account_ends(connection: Connection) -> tuple[str, str]:
    """The first and the last account id; both '' without accounts."""
    row = await connection.fetchrow("SELECT min(id) AS first, max(id) AS last FROM account")
    return row["first"] or "", row["last"] or ""


async def accounts_after(connection: Connection, after: str, limit: int) -> dict[str, int]:
    """Account id -> shard of the next accounts by id, in their order."""
    rows = await connection.fetch("SELECT id, shard FROM account WHERE id > $1 ORDER BY id LIMIT $2", after, limit)
    return {row["id"]: row["shard"] for row in rows}


async def accounts_of(connection: Connection, entries: Sequence[tuple[int, int, int]]) -> set[tuple[str, int]]:
    """Account id and shard of journal entries (shard, epoch, n); one that does not exist has none."""
    rows = await connection.fetch(
        "SELECT account_id, shard FROM unnest($1::smallint[], $2::int[], $3::bigint[]) AS named(shard, ep, n) "
        "JOIN entry USING (shard, ep, n)",
        *map(list, zip(*entries, strict=True)),
    )
    return {(row["account_id"], row["shard"]) for row in rows}


async def pending_grants(pool: Pool, only: Sequence[str] | None) -> tuple[str, ...]:
    """Ids of effective grants that the journal has not confirmed yet."""
    rows = await pool.fetch(
        "SELECT id FROM grant_ WHERE applied_n IS NULL AND effective_at <= now() "
        "AND NOT EXISTS (SELECT FROM revocation WHERE grant_id = grant_.id) "
        "AND ($1::text[] IS NULL OR account_id = ANY($1)) ORDER BY id",
        only,
    )
    return tuple(row["id"] for row in rows)


async def pending_changes(pool: Pool, only: Sequence[str] | None) -> tuple[str, ...]:
    """Ids of revocations and adjustments that the journal has not confirmed yet."""
    rows = await pool.fetch(
        "SELECT id FROM (SELECT r.id, account_id FROM revocation r JOIN grant_ g ON g.id = r.grant_id "
        "WHERE r.applied_n IS NULL UNION ALL SELECT id, account_id FROM adjustment WHERE applied_n IS NULL) pending "
        "WHERE $1::text[] IS NULL OR account_id = ANY($1) ORDER BY id",
        only,
    )
    return tuple(row["id"] for row in rows)
