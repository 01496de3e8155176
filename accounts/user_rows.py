"""What every part of a user's identity shares: the row, the turn that changes to one user take, the form of an email.

Must not: hash a password, decide who may log in, or know HTTP.

Turns: whoever writes a user's password, refresh tokens or resets first locks the user's row (`take_turn`), so that
none of them slips past a revocation. The lock is NO KEY UPDATE: rows that only refer to the user do not wait for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import unicodedata
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from accounts.admin import AccountsError
from storage.database import Connection, Pool

USERNAME_CHARS_MAX = 64
EMAIL_CHARS_MAX = 254
_EMAIL = re.compile(r"[a-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)*"
                    r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")  # fmt: skip
"""The HTML living standard's valid email address, in lower case."""
COLUMNS = (
    "id, email, username, role, company_id, company_role, account_id, token_version, issuer, subject, created_at,"
    " disabled_at"
)


class InvalidEmail(AccountsError):
    """An email address has the form name@example.com, in ASCII; write an international domain as xn--..."""


class InvalidUsername(AccountsError):
    """A username has 1 to 64 printable characters."""


@dataclass(frozen=True, slots=True)
class User:
    """A person, without the password. `role` is user, supervisor or admin; `company_role` owner or member, None
    outside of a company; `account_id` pays; access tokens of an older `token_version` are void."""

    id: str
    email: str | None
    username: str
    role: str
    company_id: str | None
    company_role: str | None
    account_id: str
    token_version: int
    issuer: str | None
    subject: str | None
    created_at: datetime
    disabled_at: datetime | None


def email_of(text: str) -> str:
    """The one form of an address: NFKC, trimmed, lower case, ASCII. Raises InvalidEmail.

    Full-width and other compatibility letters become the ASCII letter they stand for. Whatever else looks like one
    (Cyrillic a, dotless i, sharp s) is refused and never folded: nobody gets the address of somebody else by likeness.
    """
    if len(text) > EMAIL_CHARS_MAX:
        raise InvalidEmail(InvalidEmail.__doc__)
    email = unicodedata.normalize("NFKC", text).strip(" ").lower()
    if len(email) > EMAIL_CHARS_MAX or _EMAIL.fullmatch(email) is None:
        raise InvalidEmail(InvalidEmail.__doc__)
    return email


def username_of(text: str) -> str:
    """A username in NFC, trimmed. Raises InvalidUsername. It is a name to show: several users may have the same."""
    name = unicodedata.normalize("NFC", text[: 4 * USERNAME_CHARS_MAX]).strip()
    if not 1 <= len(name) <= USERNAME_CHARS_MAX or len(text) > 4 * USERNAME_CHARS_MAX or not name.isprintable():
        raise InvalidUsername(InvalidUsername.__doc__)
    return name


def user_of(row: Any) -> User:
    """The user of a row that has COLUMNS, and perhaps more."""
    return User(**{name: row[name] for name in User.__dataclass_fields__})


async def find_user(pool: Pool | Connection, id_or_email: str) -> User | None:
    """A user by id or email address, disabled or not. Raises storage.database.FAILED."""
    column, value = "id", storable_id(id_or_email)
    if "@" in id_or_email:  # no id has one
        with contextlib.suppress(InvalidEmail):
            column, value = "email", email_of(id_or_email)
    row = await pool.fetchrow(f"SELECT {COLUMNS} FROM user_ WHERE {column} = $1", value)  # noqa: S608
    return None if row is None else user_of(row)


async def take_turn(connection: Connection, user_id: str) -> User | None:
    """Lock the user until the transaction ends, and say how it is by now. None: there is no such user."""
    row = await connection.fetchrow(
        f"SELECT {COLUMNS} FROM user_ WHERE id = $1 FOR NO KEY UPDATE",  # noqa: S608
        storable_id(user_id),
    )
    return None if row is None else user_of(row)


async def end_logins(connection: Connection, user_id: str, now: datetime) -> None:
    """Void everything that was handed out: access tokens by their version, refresh tokens and resets. Take a turn
    first."""
    await connection.execute("UPDATE user_ SET token_version = token_version + 1 WHERE id = $1", user_id)
    await connection.execute(
        "UPDATE refresh_token SET revoked_at = $2 WHERE user_id = $1 AND revoked_at IS NULL", user_id, now
    )
    await connection.execute("DELETE FROM password_reset WHERE user_id = $1", user_id)


def digest(text: str) -> bytes:
    """What is stored of a random secret of 256 bits: SHA-256, 32 bytes."""
    return hashlib.sha256(text.encode()).digest()


def storable_id(text: str) -> str:
    """`text`, or where no id can look so, one that nobody has: Postgres takes no NUL and no half of a surrogate."""
    return text if text.isascii() and "\0" not in text else ""
