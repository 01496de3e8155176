"""The audit: recomputes the ledger across Redis and Postgres, while it runs, to the micro.

Each account is read in Redis at one instant together with its journal position; when Postgres has reached that
position, the rows up to it must say exactly the same. Must not: repair anything, or tolerate a difference.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from metering import audit_queries as rows
from metering.keys import SHARDS
from metering.ledger import AccountRef, GrantState, LedgerError, LedgerUnavailable, Snapshot
from storage.database import Pool
from storage.redis_open import servers

AT_ONCE: Final = 4
POLL_FIRST_S: Final = 0.005
POLL_MAX_S: Final = 0.25
SNAPSHOT_TRIES: Final = 40
SNAPSHOT_PAUSE_S: Final = 0.01
RULES_TIMEOUT_S: Final = 600.0
Value = int | str | None


class AuditedLedger(Protocol):
    """The part of the ledger that the audit needs."""

    async def snapshot(self, account: AccountRef) -> Snapshot:
        """The account at one instant. Raises LedgerError."""


class Redis(Protocol):
    """The part of the Redis client that the audit needs."""

    def call(self, *args: str | bytes | int) -> Awaitable[Any]:
        """Send one command; the awaited result is its reply."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not as it must be. `micros` is the distance of two amounts, 0 where they are no amounts."""

    account: str
    what: str
    redis: Value
    postgres: Value
    micros: int


@dataclass(frozen=True, slots=True)
class AuditReport:
    """`ok` without any difference. What is pending is written and waits to be applied: late, not wrong."""

    accounts: int
    differences: tuple[Difference, ...]
    pending_grants: tuple[str, ...]
    pending_changes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.differences


@dataclass(slots=True)
class _Account:
    """Collects one account's differences."""

    id: str
    found: list[Difference]

    def same(self, what: str, redis: Value, postgres: Value) -> None:
        if redis != postgres:
            numbers = isinstance(redis, int) and isinstance(postgres, int)
            micros = abs(int(redis or 0) - int(postgres or 0)) if numbers else 0
            self.found.append(Difference(self.id, what, redis, postgres, micros))

    def holds(self, what: str, redis: int, expected: int) -> None:
        """An invariant inside of Redis; both values are its own."""
        if redis != expected:
            self.found.append(Difference(self.id, what, redis, f"expected {expected}", abs(redis - expected)))


async def audit(
    pool: Pool,
    ledger: AuditedLedger,
    redis: Redis,
    *,
    only: Sequence[str] | None = None,
    wait_s: float = 30.0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> AuditReport:
    """Audit all accounts and the whole journal, or (`only`) the named accounts, without the journal's own rules.

    Waits at most `wait_s` per account for the journal to arrive. Raises LedgerUnavailable, RedisError or FAILED when
    a store cannot be asked; LedgerFrozen too, since a frozen shard has no state to compare.
    """
    named = None if only is None else list(only)
    known = await rows.accounts(pool, named)
    if named is None:
        differences = [_found(one) for one in await rows.broken_rules(pool, RULES_TIMEOUT_S)]
        differences += await _positions(pool, redis)
        differences += _strangers(known, await _in_redis(redis))
    else:
        unknown = sorted(set(named) - known.keys())
        differences = [Difference(name, "the account is in Postgres", None, None, 0) for name in unknown]
    gate, done = asyncio.Semaphore(AT_ONCE), 0

    async def one(ref: AccountRef) -> list[Difference]:
        nonlocal done
        async with gate:
            found = await _account(pool, ledger, redis, ref, wait_s)
        done += 1
        on_progress(done, len(known))
        return found

    for found in await asyncio.gather(*(one(AccountRef(name, shard)) for name, shard in known.items())):
        differences += found
    pending = await rows.pending_grants(pool, named), await rows.pending_changes(pool, named)
    return AuditReport(len(known), tuple(differences), *pending)


def _strangers(known: dict[str, int], present: set[tuple[str, int]]) -> list[Difference]:
    """Accounts of Redis that Postgres lacks (they join `known`, so that they are audited too) or has elsewhere."""
    found = []
    for account, shard in sorted(present):
        if account not in known:
            known[account] = shard
            found.append(Difference(account, "the account is in Postgres", "present", None, 0))
        elif known[account] != shard:
            found.append(Difference(account, "the account is in its shard", shard, known[account], 0))
    return found


async def _positions(pool: Pool, redis: Redis) -> list[Difference]:
    """Redis must be where Postgres is, or further. The cursors are read first, so that a busy shard is no finding."""
    found = []
    for row in await pool.fetch("SELECT shard, ep, n FROM shard_cursor ORDER BY shard"):
        ep, n = await redis.call("HMGET", SHARDS[row["shard"]].meta, "ep", "n")
        here = (int(ep or 0), int(n or 0))
        if here < (row["ep"], row["n"]):
            what = f"shard {row['shard']}: Redis is not behind Postgres"
            found.append(Difference("", what, f"{here[0]}-{here[1]}", f"{row['ep']}-{row['n']}", 0))
    return found


def _found(finding: rows.Finding) -> Difference:
    both = isinstance(finding.expected, int) and isinstance(finding.found, int)
    micros = abs(int(finding.expected or 0) - int(finding.found or 0)) if both else 0
    expected = None if finding.expected is None else f"expected {finding.expected}"
    return Difference(finding.account, finding.what, expected, finding.found, micros)


async def _in_redis(redis: Redis) -> set[tuple[str, int]]:
    """Every account that Redis knows, with the shard of its key."""
    return set().union(*[await _on_server(server) for server in servers(redis)])


async def _on_server(server: Redis) -> set[tuple[str, int]]:
    found, cursor = set(), b"0"
    while True:
        cursor, keys = await server.call("SCAN", cursor, "MATCH", "a:{v*}:*", "COUNT", 1_000)
        for key in keys:
            tag, _, account = key.decode(errors="replace").removeprefix("a:{v").partition("}:")
            if tag.isdigit():
                found.add((account, int(tag)))
        if cursor == b"0":
            return found


async def _account(pool: Pool, ledger: AuditedLedger, redis: Redis, ref: AccountRef, wait_s: float) -> list[Difference]:
    check = _Account(ref.id, [])
    try:
        taken = await _settled_snapshot(ledger, ref)
    except LedgerUnavailable:
        raise
    except (LedgerError, ValueError) as error:
        check.found.append(Difference(ref.id, "the account can be read", str(error), None, 0))
        return check.found
    _check_inside(check, taken)
    await _check_lifetimes(check, redis, ref, taken)
    arrived = await _arrived(pool, ref.shard, taken, wait_s)
    if arrived:
        check.found.append(Difference(ref.id, "the journal arrives", f"{taken.epoch}-{taken.entry}", arrived, 0))
        return check.found
    async with pool.acquire() as connection:
        projected = await rows.projection(connection, ref.id, ref.shard, taken.epoch, taken.entry)
    _check_across(check, taken, projected)
    return check.found


async def _settled_snapshot(ledger: AuditedLedger, ref: AccountRef) -> Snapshot:
    """A snapshot that holds every open session.

    Sessions are listed before the snapshot is taken, so on a busy account one that opened in between is missing. That
    passes with another try (at a random moment, to leave the rhythm of the traffic); a real loss does not.
    """
    taken = await ledger.snapshot(ref)
    for _ in range(SNAPSHOT_TRIES):
        if len(taken.sessions) == taken.balance.sessions:
            break
        await asyncio.sleep(random.uniform(0, SNAPSHOT_PAUSE_S))  # noqa: S311  (no secret)
        taken = await ledger.snapshot(ref)
    return taken


async def _arrived(pool: Pool, shard: int, taken: Snapshot, wait_s: float) -> str:
    """Wait until Postgres has the entries of the snapshot. Answers where it stands instead, '' when it has them."""
    loop, pause_s = asyncio.get_running_loop(), POLL_FIRST_S
    ends = loop.time() + wait_s
    while True:
        row = await pool.fetchrow("SELECT ep, n FROM shard_cursor WHERE shard = $1", shard)
        if row is not None and row["ep"] == taken.epoch and row["n"] >= taken.entry:
            return ""
        if loop.time() >= ends or (row is not None and row["ep"] > taken.epoch):
            return "no cursor" if row is None else f"{row['ep']}-{row['n']}"
        await asyncio.sleep(pause_s)
        pause_s = min(pause_s * 2, POLL_MAX_S)


def _check_inside(check: _Account, taken: Snapshot) -> None:
    """I1-I5 and I7 on the snapshot alone."""
    balance, grants, sessions = taken.balance, taken.grants, taken.sessions
    for gid, grant in grants.items():
        parts = _parts(grant)
        check.holds(f"I1 grant {gid}: issued is the sum of its parts", grant.issued, sum(parts))
        check.holds(f"I1 grant {gid}: no part is negative", min(0, *parts), 0)
        slices = sum(session.slices.get(gid, 0) for session in sessions.values())
        check.holds(f"I3 grant {gid}: held is the sum of the sessions' slices", grant.held, slices)
        listed = taken.burn_order.count(gid)
        check.holds(f"grant {gid}: with credit left it is in the burn order once", listed, _listings(grant, listed))
        check.holds(f"grant {gid}: revoked, it has nothing available", grant.available if grant.revoked else 0, 0)
    check.holds("I2 available is the sum of the grants", balance.available, _sum(g.available for g in grants.values()))
    on_grants = _sum(g.held for g in grants.values())
    check.holds("I3 held is the sum of the grants and the credit line", balance.held, on_grants + balance.line)
    check.holds("I3 the line is the sum of the sessions", balance.line, _sum(s.line for s in sessions.values()))
    check.holds("I3 held is the sum of the sessions", balance.held, _sum(s.held for s in sessions.values()))
    check.holds("I4 sessions are counted", balance.sessions, len(sessions))
    consumed = _sum(g.consumed for g in grants.values())
    check.holds("I5 charged is consumption and debt", balance.charged, consumed + balance.debt)
    live = _sum(g.available for g in grants.values() if g.expires_ms == 0 or g.expires_ms > taken.now_ms)
    check.holds("I6 who owes has nothing to spend", min(balance.debt, live), 0)
    for sid, session in sessions.items():
        covered = _sum(session.slices.values()) + session.line
        check.holds(f"I3 session {sid}: the hold is the sum of its slices and its line", session.held, covered)
        check.holds(f"I4 session {sid}: it has a lease", int(session.lease_until_ms is not None), 1)


def _parts(grant: GrantState) -> tuple[int, ...]:
    return (grant.available, grant.held, grant.consumed, grant.expired, grant.voided)


def _listings(grant: GrantState, listed: int) -> int:
    """A grant with credit to spend is listed once; a drained one may still be, until a script meets it."""
    return 1 if grant.available > 0 else min(listed, 1)


def _sum(amounts: Iterable[int]) -> int:
    return sum(amounts)


async def _check_lifetimes(check: _Account, redis: Redis, ref: AccountRef, taken: Snapshot) -> None:
    """I7: a held session never expires. A session that ended since the snapshot may, so its state is read last."""
    for sid in taken.sessions:
        key = SHARDS[ref.shard].session + sid
        ttl = await redis.call("PTTL", key)
        if ttl != -1 and await redis.call("HGET", key, "st") == b"H":
            check.found.append(Difference(ref.id, f"I7 session {sid}: a hold has no time to live", ttl, None, 0))


def _check_across(check: _Account, taken: Snapshot, projected: rows.Projection) -> None:
    """I11: what Redis says is what the rows up to the snapshot's entry say. I9 in sums."""
    check.same("debt", taken.balance.debt, projected.debt)
    check.same("charged", taken.balance.charged, projected.charged)
    check.same("charged (sessions)", taken.balance.charged, projected.session_charged)
    check.same("absorbed (postings, sessions)", projected.absorbed, projected.session_absorbed)
    for gid in sorted(taken.grants.keys() | projected.grants.keys()):
        here, there = taken.grants.get(gid), projected.grants.get(gid)
        if here is None or there is None:
            present = tuple(None if side is None else "present" for side in (here, there))
            check.same(f"grant {gid}", *present)
            continue
        check.same(f"grant {gid}: issued", here.issued, there.issued)
        check.same(f"grant {gid}: available and held", here.available + here.held, there.held)
        check.same(f"grant {gid}: consumed", here.consumed, there.consumed)
        check.same(f"grant {gid}: expired", here.expired, there.expired)
        check.same(f"grant {gid}: voided", here.voided, there.voided)
        check.same(f"grant {gid}: revoked", *("revoked" if side.revoked else None for side in (here, there)))
        check.same(f"grant {gid}: expiry in ms", here.expires_ms, there.expires_ms)
        check.same(f"grant {gid}: confirmed", "applied", "applied" if there.confirmed else None)
    available = sum(grant.held for grant in projected.grants.values())
    balance = taken.balance
    check.same("available and held", balance.available + balance.held - balance.line, available)
