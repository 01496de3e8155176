"""Users on a real Postgres for tests, with an argon2 that costs little."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime

import pytest

from accounts.login_failures import LockOut, LoginFailures
from accounts.passwords import Cost, Passwords
from accounts.user_rows import User
from accounts.users import Users
from storage.database import Pool, connect_pool

QUICK = Cost(memory_kib=64, passes=1)
NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
HOME, EMAIL, RIGHT, WRONG = "192.0.2.7", "ada@example.com", "correct horse battery", "wrong horse battery"


@dataclass
class Identity:
    """Everything that a test of users needs, over one database."""

    pool: Pool
    passwords: Passwords
    users: Users

    async def ada(self) -> User:
        """The first user."""
        return await self.users.register(EMAIL, "Ada", RIGHT, now=NOW)

    def with_rules(self, rules: LockOut) -> Users:
        """The same users with another lock-out."""
        return Users(self.pool, self.passwords, LoginFailures(self.pool, rules))


@pytest.fixture(name="identity")
async def identity_fixture(ledger_database: str) -> AsyncIterator[Identity]:
    """Users of a fresh database."""
    pool = await connect_pool(ledger_database, size_max=8)
    passwords = Passwords(QUICK)
    yield Identity(pool, passwords, Users(pool, passwords, LoginFailures(pool)))
    passwords.close()
    await pool.close()
