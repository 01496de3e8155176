"""The audit: recomputes the ledger across Redis and Postgres, while it runs, to the micro.

Each account is read in Redis at one instant together with its journal position; when Postgres has reached that
position, the rows up to it must say exactly the same. Must not: repair anything, or tolerate a difference.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

from metering import audit_queries as rows
from metering.journal_store import Cursor
from metering.keys import SHARDS
from metering.ledger import AccountRef, GrantState, LedgerError, LedgerUnavailable, Snapshot
from metering.ledger_calls import answered
from storage.database import Connection, Pool
from storage.redis_open import servers

AT_ONCE: Final = 4
POLL_FIRST_S: Final = 0.005
POLL_MAX_S: Final = 0.25
SNAPSHOT_TRIES: Final = 20
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
    """One thing that is not as it must be: `found` is there instead of `expected`. Between the stores these are what
    Redis has and what Postgres has, which is the ledger; `inside` names the store whose own rule is broken.
    `micros` is the distance of two amounts, 0 where they are no amounts."""

    account: str
    what: str
    found: Value
    expected: Value
    micros: int
    inside: Literal["redis", "postgres"] | None = None

    @property
    def redis(self) -> Value:
        """What a table says of Redis: what it has, or what a rule of Postgres asks for."""
        return _asked(self.expected) if self.inside == "postgres" else self.found

    @property
    def postgres(self) -> Value:
        """What a table says of Postgres: what it has, or what a rule of Redis asks for."""
        if self.inside == "postgres":
            return self.found
        return _asked(self.expected) if self.inside == "redis" else self.expected


def _asked(value: Value) -> Value:
    return None if value is None else f"expected {value}"


@dataclass(frozen=True, slots=True)
class Taken:
    """One account as Redis has it at one instant, with what is wrong there already, without asking Postgres.

    `busy`: sessions opened so fast that they could not all be read, so that their sums were not checked."""

    ref: AccountRef
    snapshot: Snapshot
    found: tuple[Difference, ...]
    busy: bool


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
            self.found.append(Difference(self.id, what, redis, expected, abs(redis - expected), "redis"))


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
        differences += strangers(known, await _in_redis(redis))
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


def strangers(known: dict[str, int], present: set[tuple[str, int]]) -> list[Difference]:
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
    return Difference(finding.account, finding.what, finding.found, finding.expected, micros, "postgres")


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
    taken = await take(ledger, redis, ref)
    if isinstance(taken, Difference):
        return [taken]
    snapshot = taken.snapshot
    unread = [
        Difference(
            ref.id,
            "its sessions can be read: too many open at the moment",
            snapshot.balance.sessions,
            len(snapshot.sessions),
            0,
        )
    ]
    at = await awaited(pool, taken, wait_s)
    if not arrived(taken, at):
        stands = "no cursor" if at is None else f"{at[0]}-{at[1]}"
        late = Difference(ref.id, "the journal arrives", f"{snapshot.epoch}-{snapshot.entry}", stands, 0)
        return [*taken.found, late]
    async with pool.acquire() as connection:
        return [*await compare(connection, taken), *(unread if taken.busy else ())]


async def take(ledger: AuditedLedger, redis: Redis, ref: AccountRef) -> Taken | Difference:
    """Read an account in Redis and check what it says of itself; a Difference when it cannot be read.

    Raises LedgerUnavailable, also LedgerFrozen."""
    try:
        snapshot, busy = await _settled_snapshot(ledger, ref)
        check = _Account(ref.id, [])
        await _check_lifetimes(check, redis, ref, snapshot)
    except LedgerUnavailable:
        raise
    except (LedgerError, ValueError, LookupError) as error:
        return unreadable(ref, error)
    _check_inside(check, snapshot)
    if not busy:
        _check_sessions(check, snapshot)
    return Taken(ref, snapshot, tuple(check.found), busy)


def unreadable(ref: AccountRef, error: Exception) -> Difference:
    """What is told of an account that something damaged in Redis keeps from being read."""
    return Difference(ref.id, "the account can be read", str(error), None, 0)


async def compare(connection: Connection, taken: Taken) -> list[Difference]:
    """All that is wrong with an account whose journal has arrived. Raises `storage.database.FAILED`."""
    check, snapshot = _Account(taken.ref.id, list(taken.found)), taken.snapshot
    projected = await rows.projection(connection, taken.ref.id, taken.ref.shard, snapshot.epoch, snapshot.entry)
    _check_across(check, snapshot, projected)
    return check.found


async def _settled_snapshot(ledger: AuditedLedger, ref: AccountRef) -> tuple[Snapshot, bool]:
    """A snapshot that holds every open session; True with one that could not, because there is too much traffic.

    Sessions are listed before the snapshot is taken, so on a busy account one that opened in between is missing. That
    passes with another try (at a random moment, to leave the rhythm of the traffic): how many are missing is a throw of
    dice. A session that is really lost is missing each time: the smallest number comes again and again.
    """
    best = taken = await ledger.snapshot(ref)
    missing = Counter([_missing(taken)])
    while _missing(taken) > 0 and missing.total() <= SNAPSHOT_TRIES:
        await asyncio.sleep(random.uniform(0, SNAPSHOT_PAUSE_S))  # noqa: S311  (no secret)
        taken = await ledger.snapshot(ref)
        missing[_missing(taken)] += 1
        best = min(best, taken, key=_missing)
    return best, _missing(best) > 0 and missing[_missing(best)] * 4 < missing.total() * 3


def _missing(taken: Snapshot) -> int:
    """How many open sessions the account counts beyond those that were read."""
    return taken.balance.sessions - len(taken.sessions)


async def awaited(connection: Connection | Pool, taken: Taken, wait_s: float) -> Cursor | None:
    """Wait until Postgres has the entries of the snapshot, or never will: how far it then is, None without a cursor."""
    loop, pause_s = asyncio.get_running_loop(), POLL_FIRST_S
    ends = loop.time() + wait_s
    while True:
        row = await connection.fetchrow("SELECT ep, n FROM shard_cursor WHERE shard = $1", taken.ref.shard)
        at = None if row is None else (row["ep"], row["n"])
        if arrived(taken, at) or loop.time() >= ends or (at is not None and at[0] > taken.snapshot.epoch):
            return at
        await asyncio.sleep(pause_s)
        pause_s = min(pause_s * 2, POLL_MAX_S)


def arrived(taken: Taken, at: Cursor | None) -> bool:
    """Whether Postgres, being at the cursor, has the entries of the snapshot."""
    return at is not None and at[0] == taken.snapshot.epoch and at[1] >= taken.snapshot.entry


def _check_inside(check: _Account, taken: Snapshot) -> None:
    """I1, I2, I5, I6 and the single sessions, on the snapshot alone."""
    balance, grants = taken.balance, taken.grants
    for gid, grant in grants.items():
        parts = _parts(grant)
        check.holds(f"I1 grant {gid}: issued is the sum of its parts", grant.issued, sum(parts))
        check.holds(f"I1 grant {gid}: no part is negative", min(0, *parts), 0)
        listed = taken.burn_order.count(gid)
        check.holds(f"grant {gid}: with credit left it is in the burn order once", listed, _listings(grant, listed))
        check.holds(f"grant {gid}: revoked, it has nothing available", grant.available if grant.revoked else 0, 0)
    check.holds("I2 available is the sum of the grants", balance.available, _sum(g.available for g in grants.values()))
    on_grants = _sum(g.held for g in grants.values())
    check.holds("I3 held is the sum of the grants and the credit line", balance.held, on_grants + balance.line)
    consumed = _sum(g.consumed for g in grants.values())
    check.holds("I5 charged is consumption and debt", balance.charged, consumed + balance.debt)
    live = _sum(g.available for g in grants.values() if g.expires_ms == 0 or g.expires_ms > taken.now_ms)
    check.holds("I6 who owes has nothing to spend", min(balance.debt, live), 0)
    for sid, session in taken.sessions.items():
        covered = _sum(session.slices.values()) + session.line
        check.holds(f"I3 session {sid}: the hold is the sum of its slices and its line", session.held, covered)
        check.holds(f"I4 session {sid}: it has a lease", int(session.lease_until_ms is not None), 1)


def _check_sessions(check: _Account, taken: Snapshot) -> None:
    """I3 and I4: what the account and its grants hold is what all the sessions together hold."""
    balance, sessions = taken.balance, taken.sessions
    for gid, grant in taken.grants.items():
        slices = _sum(session.slices.get(gid, 0) for session in sessions.values())
        check.holds(f"I3 grant {gid}: held is the sum of the sessions' slices", grant.held, slices)
    check.holds("I3 the line is the sum of the sessions", balance.line, _sum(s.line for s in sessions.values()))
    check.holds("I3 held is the sum of the sessions", balance.held, _sum(s.held for s in sessions.values()))
    check.holds("I4 sessions are counted", balance.sessions, len(sessions))


def _parts(grant: GrantState) -> tuple[int, ...]:
    return (grant.available, grant.held, grant.consumed, grant.expired, grant.voided)


def _listings(grant: GrantState, listed: int) -> int:
    """A grant with credit to spend is listed once; a drained one may still be, until a script meets it."""
    return 1 if grant.available > 0 else min(listed, 1)


def _sum(amounts: Iterable[int]) -> int:
    return sum(amounts)


async def _check_lifetimes(check: _Account, redis: Redis, ref: AccountRef, taken: Snapshot) -> None:
    """I7: a held session never expires. A session that ended since the snapshot may, so its state is read last."""
    keys = {sid: SHARDS[ref.shard].session + sid for sid in taken.sessions}
    lives = await answered(asyncio.gather(*(redis.call("PTTL", key) for key in keys.values())))
    mortal = {sid: life for sid, life in zip(keys, lives, strict=True) if life != -1}
    states = await answered(asyncio.gather(*(redis.call("HGET", keys[sid], "st") for sid in mortal)))
    for (sid, life), state in zip(mortal.items(), states, strict=True):
        if state == b"H":
            check.found.append(Difference(ref.id, f"I7 session {sid}: a hold has no time to live", life, None, 0))


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
