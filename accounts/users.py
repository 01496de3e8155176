"""Users and their passwords: register, authenticate, change, reset, disable.

Must not: answer differently, or take another number of argon2 runs, for an unknown user, a wrong password and a
disabled user; hold a transaction while argon2 runs; take a role from whoever registers; or make tokens
(`refresh_tokens`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from accounts.admin import AccountsError, create_account
from accounts.keys import random_base62
from accounts.login_failures import Attempt, LoginFailures
from accounts.passwords import Passwords, PasswordsBusy, checked
from accounts.user_rows import (
    COLUMNS,
    InvalidEmail,
    User,
    digest,
    email_of,
    end_logins,
    storable_id,
    take_turn,
    user_of,
    username_of,
)
from storage.database import Connection, Pool

RESET_PREFIX = "tg_reset_"
RESET_SECRET_CHARS = 43
RESET_S = 3_600
"""A password reset can be finished for so long."""
RESET_PAUSE_S = 60
"""Between two resets of one user: nobody's mailbox is filled by somebody else."""
_RESET_FORM = re.compile(rf"{RESET_PREFIX}[0-9A-Za-z]{{{RESET_SECRET_CHARS}}}")


class EmailTaken(AccountsError):
    """There is already a user with this email address."""


class LoginRefused(AccountsError):
    """Email address or password is wrong."""


class ResetRefused(AccountsError):
    """This password reset is not valid, was used, or has expired. Ask for a new one."""


@dataclass(frozen=True, slots=True)
class Reset:
    """A password reset just started. Send `text` to `email`, the address on record, and to no other."""

    email: str
    text: str = field(repr=False)
    expires_at: datetime


class Users:
    """The users of one database, as one process reaches them. Every method raises storage.database.FAILED; those that
    take a password also InvalidPassword (a new one) and PasswordsBusy."""

    def __init__(self, pool: Pool, passwords: Passwords, failures: LoginFailures) -> None:
        self._pool = pool
        self._passwords = passwords
        self._failures = failures

    async def register(self, email: str, username: str, password: str, *, now: datetime) -> User:
        """A new user with the role `user` and an account of its own. Raises EmailTaken, InvalidEmail, InvalidUsername.

        One argon2 run, also where the address is taken.
        """
        address, name = email_of(email), username_of(username)
        hashed = await self._passwords.hash(password)
        async with self._pool.acquire() as connection, connection.transaction():
            account = await create_account(connection, address)
            row = await connection.fetchrow(
                "INSERT INTO user_ (id, email, username, password_hash, account_id, created_at)"  # noqa: S608
                f" VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (email) DO NOTHING RETURNING {COLUMNS}",
                f"user_{random_base62(16)}", address, name, hashed, account.id, now,
            )  # fmt: skip
            if row is None:
                raise EmailTaken(EmailTaken.__doc__)
            return user_of(row)

    async def authenticate(self, email: str, password: str, *, ip: str, now: datetime) -> User:
        """Who this is. Raises LoginRefused (unknown, wrong, disabled, without a password: all alike), LockedOut.

        One argon2 run, and on success a second one where the hash was made at another cost.
        """
        try:
            address = email_of(email)
        except InvalidEmail:
            address = ""  # nobody has it
        attempt = await self._failures.take(address or email, ip, now)
        row = await self._pool.fetchrow(
            f"SELECT password_hash, {COLUMNS} FROM user_ WHERE email = $1",  # noqa: S608
            address,
        )
        await self._prove(row, password, attempt)
        await self._rehash(row, password)
        return user_of(row)

    async def change_password(self, user_id: str, old: str, new: str, *, ip: str, now: datetime) -> User:
        """Set a new password, given the old one; every login and open reset of the user ends.

        Raises LoginRefused (also when the password changed meanwhile), LockedOut: guesses count as attempts to log in.
        """
        checked(new)  # before the old one is tried
        row = await self._pool.fetchrow(
            f"SELECT password_hash, {COLUMNS} FROM user_ WHERE id = $1",  # noqa: S608
            storable_id(user_id),
        )
        known_as = user_id if row is None or row["email"] is None else row["email"]
        attempt = await self._failures.take(known_as, ip, now)
        await self._prove(row, old, attempt)
        hashed = await self._passwords.hash(new)
        async with self._pool.acquire() as connection, connection.transaction():
            await take_turn(connection, user_id)
            done = await connection.execute(
                "UPDATE user_ SET password_hash = $3 WHERE id = $1 AND password_hash = $2 AND disabled_at IS NULL",
                user_id, row["password_hash"], hashed,
            )  # fmt: skip
            if done == "UPDATE 0":
                raise LoginRefused(LoginRefused.__doc__)
            return await _ended(connection, user_id, now)

    async def start_reset(self, email: str, *, now: datetime) -> Reset | None:
        """Open a password reset; an older one of the user no longer works. None: nobody is to be written to (unknown,
        disabled, or asked less than a minute ago), which whoever asked must not learn."""
        try:
            address = email_of(email)
        except InvalidEmail:
            return None
        text, expires_at = RESET_PREFIX + random_base62(RESET_SECRET_CHARS), now + timedelta(seconds=RESET_S)
        started = await self._pool.fetchval(
            "INSERT INTO password_reset AS r (user_id, hash, created_at, expires_at)"
            " SELECT id, $2, $3, $4 FROM user_ WHERE email = $1 AND disabled_at IS NULL"
            " ON CONFLICT (user_id) DO UPDATE SET hash = $2, created_at = $3, expires_at = $4 WHERE r.created_at <= $5"
            " RETURNING user_id",
            address, digest(text), now, expires_at, now - timedelta(seconds=RESET_PAUSE_S),
        )  # fmt: skip
        return None if started is None else Reset(address, text, expires_at)

    async def finish_reset(self, text: str, new: str, *, now: datetime) -> User:
        """Set a new password, given a reset that is open; it works once, and every login of the user ends.

        Raises ResetRefused, without an argon2 run unless the reset was open.
        """
        user_id = await self._open_reset(self._pool, text, now)
        hashed = await self._passwords.hash(new)
        async with self._pool.acquire() as connection, connection.transaction():
            user = await take_turn(connection, user_id)
            await self._open_reset(connection, text, now)
            if user is None or user.disabled_at is not None:
                raise ResetRefused(ResetRefused.__doc__)
            await connection.execute("UPDATE user_ SET password_hash = $2 WHERE id = $1", user_id, hashed)
            return await _ended(connection, user_id, now)

    async def disable(self, user_id: str, *, now: datetime) -> bool:
        """Refuse a user from now on, and end every login. False: there is no such user, or it was disabled before."""
        async with self._pool.acquire() as connection, connection.transaction():
            user = await take_turn(connection, user_id)
            if user is None or user.disabled_at is not None:
                return False
            await connection.execute("UPDATE user_ SET disabled_at = $2 WHERE id = $1", user_id, now)
            await end_logins(connection, user_id, now)
            return True

    async def enable(self, user_id: str) -> bool:
        """Let a disabled user log in again. False: there is no such user, or it was not disabled."""
        async with self._pool.acquire() as connection, connection.transaction():
            user = await take_turn(connection, user_id)
            if user is None or user.disabled_at is None:
                return False
            await connection.execute("UPDATE user_ SET disabled_at = NULL WHERE id = $1", user_id)
            return True

    async def _prove(self, row: Any, password: str, attempt: Attempt) -> None:
        """The row's user has this password and may log in. Raises LoginRefused, PasswordsBusy."""
        try:
            right = await self._passwords.verify(None if row is None else row["password_hash"], password)
        except PasswordsBusy:
            await self._failures.give_back(attempt)
            raise
        if not right or row["disabled_at"] is not None:
            raise LoginRefused(LoginRefused.__doc__)
        await self._failures.give_back(attempt, proven=True)

    async def _rehash(self, row: Any, password: str) -> None:
        """Store the password at today's cost; when argon2 is busy, at the next login."""
        if not self._passwords.needs_rehash(row["password_hash"]):
            return
        try:
            hashed = await self._passwords.hash(password)
        except PasswordsBusy:
            return
        await self._pool.execute(
            "UPDATE user_ SET password_hash = $3 WHERE id = $1 AND password_hash = $2",
            row["id"], row["password_hash"], hashed,
        )  # fmt: skip

    @staticmethod
    async def _open_reset(pool: Pool | Connection, text: str, now: datetime) -> str:
        """Whose reset this is. Raises ResetRefused."""
        user_id = None
        if _RESET_FORM.fullmatch(text) is not None:
            user_id = await pool.fetchval(
                "SELECT user_id FROM password_reset WHERE hash = $1 AND expires_at > $2", digest(text), now
            )
        if user_id is None:
            raise ResetRefused(ResetRefused.__doc__)
        return str(user_id)


async def _ended(connection: Connection, user_id: str, now: datetime) -> User:
    """End the user's logins and say how the user is afterwards."""
    await end_logins(connection, user_id, now)
    return user_of(await connection.fetchrow(f"SELECT {COLUMNS} FROM user_ WHERE id = $1", user_id))  # noqa: S608
