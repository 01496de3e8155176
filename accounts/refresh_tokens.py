"""Refresh tokens: each is good for one rotation, and a second use ends the login that it belongs to.

Must not: make access tokens, keep a refresh token's text, or answer differently for unknown, expired, revoked and
replayed ones.

Reuse: there is no leeway. Of two rotations of one refresh token exactly one gets a successor; the other is a replay,
whoever sends it and however soon, and revokes the whole family, the successor included (RFC 9700, 4.14.2: thief and
owner cannot be told apart). A client must therefore refresh one at a time, and log in anew when an answer was lost.
Other logins of the user stay. Access tokens already out run to their end (15 minutes at most).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from accounts.admin import AccountsError
from accounts.keys import random_base62
from accounts.user_rows import User, digest, end_logins, take_turn
from storage.database import Connection, Pool

PREFIX = "tg_refresh_"
SECRET_CHARS = 43
IDLE_S = 30 * 86_400
"""A refresh token that is not rotated for so long expires."""
FAMILY_S = 90 * 86_400
"""A login ends after so long, however often it is refreshed."""
FAMILIES_MAX = 32
"""Logins that a user has open at once; the next ends the oldest."""

_FORM = re.compile(rf"{PREFIX}[0-9A-Za-z]{{{SECRET_CHARS}}}")
_OPEN = "used_at IS NULL AND revoked_at IS NULL AND expires_at > "


class RefreshRefused(AccountsError):
    """This refresh token is not valid. Log in again."""


class RefreshReplayed(RefreshRefused):
    """This refresh token is not valid. Log in again."""


@dataclass(frozen=True, slots=True)
class Refresh:
    """A refresh token just made; `text` goes to its owner and is stored nowhere."""

    text: str = field(repr=False)
    user: User
    family_id: str
    expires_at: datetime


async def issue(pool: Pool, user: User, *, now: datetime) -> Refresh:
    """The first refresh token of a new login. Raises RefreshRefused when the user was disabled, or the password
    changed, since `user` was read; storage.database.FAILED."""
    async with pool.acquire() as connection, connection.transaction():
        current = await take_turn(connection, user.id)
        if current is None or current.disabled_at or current.token_version != user.token_version:
            raise RefreshRefused(RefreshRefused.__doc__)
        await _end_oldest(connection, user.id, now)
        return await _insert(connection, current, f"rf_{random_base62(16)}", now, now)


async def rotate(pool: Pool, text: str, *, now: datetime) -> Refresh:
    """Take one refresh token and give the next. Raises RefreshRefused, RefreshReplayed (its family is revoked now),
    storage.database.FAILED."""
    hashed = _hash(text)
    async with pool.acquire() as connection, connection.transaction():
        next_one = await _rotated(connection, hashed, now)
    if next_one is None:  # only here: raised inside, it would take the revocation back
        raise RefreshReplayed(RefreshReplayed.__doc__)
    return next_one


async def _rotated(connection: Connection, hashed: bytes, now: datetime) -> Refresh | None:
    """The successor, or None when the family was revoked because of a replay."""
    owner = await connection.fetchval("SELECT user_id FROM refresh_token WHERE hash = $1", hashed)
    user = None if owner is None else await take_turn(connection, owner)
    if user is None:
        raise RefreshRefused(RefreshRefused.__doc__)
    row = await connection.fetchrow(
        "SELECT family_id, family_started_at, expires_at, used_at, revoked_at FROM refresh_token WHERE hash = $1",
        hashed,
    )
    if row is not None and row["used_at"] is not None:
        await _revoke(connection, row["family_id"], now)
        return None
    if row is None or row["revoked_at"] is not None or row["expires_at"] <= now or user.disabled_at is not None:
        raise RefreshRefused(RefreshRefused.__doc__)
    await connection.execute("UPDATE refresh_token SET used_at = $2 WHERE hash = $1", hashed, now)
    return await _insert(connection, user, row["family_id"], row["family_started_at"], now)


async def logout(pool: Pool, text: str, *, now: datetime) -> bool:
    """End the login that a refresh token belongs to, used or not. False: it had ended before, or never was.

    Raises storage.database.FAILED.
    """
    try:
        hashed = _hash(text)
    except RefreshRefused:
        return False
    async with pool.acquire() as connection, connection.transaction():
        row = await connection.fetchrow("SELECT user_id, family_id FROM refresh_token WHERE hash = $1", hashed)
        if row is None or await take_turn(connection, row["user_id"]) is None:
            return False
        return await _revoke(connection, row["family_id"], now)


async def logout_everywhere(pool: Pool, user_id: str, *, now: datetime) -> bool:
    """End every login of a user and void the access tokens that are out. False: there is no such user.

    Raises storage.database.FAILED.
    """
    async with pool.acquire() as connection, connection.transaction():
        if await take_turn(connection, user_id) is None:
            return False
        await end_logins(connection, user_id, now)
        return True


async def purge(pool: Pool, *, now: datetime, limit: int = 10_000) -> int:
    """Remove refresh tokens that have expired, at most `limit`; how many. Until then a used one shows its replay."""
    done = await pool.execute(
        "DELETE FROM refresh_token WHERE hash IN"
        " (SELECT hash FROM refresh_token WHERE expires_at <= $1 ORDER BY expires_at LIMIT $2 FOR UPDATE SKIP LOCKED)",
        now, limit,
    )  # fmt: skip
    return int(done.rpartition(" ")[2])


async def _insert(
    connection: Connection, user: User, family_id: str, family_started_at: datetime, now: datetime
) -> Refresh:
    text = PREFIX + random_base62(SECRET_CHARS)
    expires_at = min(now + timedelta(seconds=IDLE_S), family_started_at + timedelta(seconds=FAMILY_S))
    await connection.execute(
        "INSERT INTO refresh_token (hash, family_id, user_id, family_started_at, issued_at, expires_at)"
        " VALUES ($1, $2, $3, $4, $5, $6)",
        digest(text), family_id, user.id, family_started_at, now, expires_at,
    )  # fmt: skip
    return Refresh(text, user, family_id, expires_at)


async def _end_oldest(connection: Connection, user_id: str, now: datetime) -> None:
    """Make room for one more login."""
    await connection.execute(
        "UPDATE refresh_token SET revoked_at = $2 WHERE revoked_at IS NULL AND family_id IN"  # noqa: S608
        f" (SELECT family_id FROM refresh_token WHERE user_id = $1 AND {_OPEN} $2"
        "   ORDER BY family_started_at DESC, family_id OFFSET $3)",
        user_id, now, FAMILIES_MAX - 1,
    )  # fmt: skip


async def _revoke(connection: Connection, family_id: str, now: datetime) -> bool:
    """Whether the family had a refresh token that could still be rotated."""
    had = await connection.fetchval(
        f"SELECT count(*) FROM refresh_token WHERE family_id = $1 AND {_OPEN} $2",  # noqa: S608
        family_id, now,
    )  # fmt: skip
    await connection.execute(
        "UPDATE refresh_token SET revoked_at = $2 WHERE family_id = $1 AND revoked_at IS NULL", family_id, now
    )
    return bool(had)


def _hash(text: str) -> bytes:
    """Refuse what cannot be one before any store is asked."""
    if _FORM.fullmatch(text) is None:
        raise RefreshRefused(RefreshRefused.__doc__)
    return digest(text)
