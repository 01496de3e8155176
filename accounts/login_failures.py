"""Lock-out against guessing: attempts to log in are counted before the password is looked at, in Postgres for all.

Must not: know whether a user exists (an email that nobody has locks alike), keep an email in the clear, or run argon2.

Three counters: one email from one network (a person who mistypes, or one guesser), one network (many emails, one
password), one email (many networks). An attempt takes a place in all three or in none; a right password gives its
place back. Counting first means that a hundred guesses at once are not a hundred guesses.
"""

from __future__ import annotations

import hashlib
import ipaddress
import math
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from accounts.admin import AccountsError
from storage.database import Pool

_TAKE = """
INSERT INTO login_failure AS f (subject, attempts, expires_at)
SELECT subject, 1, CASE WHEN attempts_max = 1 THEN $4::timestamptz ELSE $3::timestamptz END
  FROM unnest($1::bytea[], $2::int[]) AS asked (subject, attempts_max) ORDER BY subject
    ON CONFLICT (subject) DO UPDATE SET
       attempts = CASE WHEN f.expires_at <= $5::timestamptz THEN 1 ELSE f.attempts + 1 END,
       expires_at = CASE WHEN f.expires_at <= $5::timestamptz THEN EXCLUDED.expires_at
                         WHEN f.attempts + 1 >= ($2::int[])[array_position($1::bytea[], f.subject)] THEN $4
                         ELSE f.expires_at END
 WHERE f.expires_at <= $5::timestamptz OR f.attempts < ($2::int[])[array_position($1::bytea[], f.subject)]
RETURNING subject
"""
_GIVE_BACK = """
UPDATE login_failure f SET attempts = CASE WHEN f.subject = $2::bytea THEN 0 ELSE greatest(f.attempts - 1, 0) END
  FROM (SELECT subject FROM login_failure WHERE subject = ANY($1::bytea[]) ORDER BY subject FOR UPDATE) AS turn
 WHERE f.subject = turn.subject
"""
_SWEEP = """
DELETE FROM login_failure WHERE subject IN (
    SELECT subject FROM login_failure
     WHERE expires_at <= $1 OR subject IN (SELECT subject FROM login_failure ORDER BY expires_at DESC OFFSET $2)
     LIMIT $3 FOR UPDATE SKIP LOCKED
)
"""


class LockedOut(AccountsError):
    """Too many attempts to log in. Wait and try again."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(LockedOut.__doc__)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class LockOut:
    """How many attempts without success `window_s` may hold, and how long the last of them locks. `rows_max` bounds
    the table: beyond it the counters that expire first go. `sweep_every` attempts of a process it is looked at."""

    pair_max: int = 5
    network_max: int = 100
    email_max: int = 50
    window_s: int = 900
    lock_s: int = 900
    rows_max: int = 100_000
    sweep_every: int = 128
    sweep_rows_max: int = 10_000


@dataclass(frozen=True, slots=True)
class Attempt:
    """Where one attempt was counted."""

    pair: bytes
    subjects: list[bytes]


class LoginFailures:
    """The counters, as one process reaches them."""

    def __init__(self, pool: Pool, rules: LockOut | None = None) -> None:
        self._pool = pool
        self._rules = rules or LockOut()
        self._until_sweep = self._rules.sweep_every

    async def take(self, email: str, ip: str, now: datetime) -> Attempt:
        """Count one attempt and say where, for `give_back`. Raises LockedOut (nothing was counted), ValueError (`ip` is
        no address), storage.database.FAILED."""
        bounds = self._bounds(email, ip)
        pair, subjects = next(iter(bounds)), sorted(bounds)
        window, lock = (now + timedelta(seconds=s) for s in (self._rules.window_s, self._rules.lock_s))
        async with self._pool.acquire() as connection, connection.transaction():
            taken = await connection.fetch(_TAKE, subjects, [bounds[s] for s in subjects], window, lock, now)
            full = set(subjects) - {row["subject"] for row in taken}
            if full:
                until = await connection.fetchval(
                    "SELECT max(expires_at) FROM login_failure WHERE subject = ANY($1::bytea[])", list(full)
                )
                raise LockedOut(_seconds(until, now))
        await self._count_down(now)
        return Attempt(pair, subjects)

    async def give_back(self, attempt: Attempt, *, proven: bool = False) -> None:
        """The attempt was none after all: it was never looked at, or its password was right (`proven`), which forgets
        what this email failed from this network before. The wider counters keep what others did.
        """
        await self._pool.execute(_GIVE_BACK, attempt.subjects, attempt.pair if proven else None)

    async def sweep(self, now: datetime) -> None:
        """Remove expired counters, and those beyond `rows_max`, at most `sweep_rows_max` at a time."""
        await self._pool.execute(_SWEEP, now, self._rules.rows_max, self._rules.sweep_rows_max)

    async def _count_down(self, now: datetime) -> None:
        self._until_sweep -= 1
        if self._until_sweep <= 0:
            self._until_sweep = self._rules.sweep_every
            await self.sweep(now)

    def _bounds(self, email: str, ip: str) -> dict[bytes, int]:
        network = network_of(ip)
        return {
            _subject("pair", email, network): self._rules.pair_max,
            _subject("network", network): self._rules.network_max,
            _subject("email", email): self._rules.email_max,
        }


def network_of(ip: str) -> str:
    """Whom an address stands for: an IPv4 address itself (also inside IPv6), of IPv6 the /64 that one line has.

    Raises ValueError.
    """
    address = ipaddress.ip_address(ip)
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or address
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    return str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))


def _subject(*parts: str) -> bytes:
    return hashlib.sha256("\0".join(parts).encode(errors="surrogatepass")).digest()


def _seconds(until: Any, now: datetime) -> int:
    return 1 if until is None else max(1, math.ceil((until - now).total_seconds()))
