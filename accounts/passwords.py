"""Passwords: argon2id in threads of its own, with bounds, and a dummy for whoever does not exist.

Must not: store anything, run argon2 on the event loop, or put a password or a hash into an error or a log line.
"""

from __future__ import annotations

import asyncio
import secrets
import unicodedata
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import argon2
from argon2.exceptions import InvalidHashError, VerificationError

BYTES_MIN, BYTES_MAX = 8, 1_024
"""A password's length, as UTF-8 after NFKC."""

_Result = TypeVar("_Result")


class InvalidPassword(Exception):
    """A password has 8 to 1024 bytes of valid text."""


class PasswordsBusy(Exception):
    """Too many passwords are being checked at the moment. Retry shortly."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one argon2id run takes; the hash itself says with which it was made. The default is OWASP's second
    recommendation (Password Storage Cheat Sheet, 2024): 19 MiB, 2 passes, 1 lane."""

    memory_kib: int = 19_456
    passes: int = 2
    lanes: int = 1
    salt_bytes: int = 16
    hash_bytes: int = 32


class Passwords:
    """Hashes and verifies, at most `threads` at once; beyond `waiting_max` in line a caller gets PasswordsBusy.

    `runs` counts argon2 runs ever started: an answer about somebody unknown must take as many as one about a user.
    """

    def __init__(self, cost: Cost | None = None, *, threads: int = 2, waiting_max: int = 64) -> None:
        self._hasher = _hasher(cost or Cost())
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="argon2")
        self._places = threads + waiting_max
        self._taken = 0
        self._nobody = self._pool.submit(self._hasher.hash, secrets.token_bytes(32))  # first in line, in a thread
        self.runs = 0

    async def hash(self, password: str) -> str:
        """A new salted hash, in PHC form. Raises InvalidPassword, PasswordsBusy."""
        return await self._run(self._hasher.hash, checked(password))

    async def verify(self, stored: str | None, password: str) -> bool:
        """Whether `stored` was made of `password`; always one run. Raises PasswordsBusy.

        Without a stored hash (nobody has this name, or the user has no password), or with a password that no user can
        have, a dummy is verified and the answer is no. A damaged hash is a no that may come early.
        """
        try:
            presented = checked(password)
        except InvalidPassword:
            stored, presented = None, b""
        matches = await self._run(_matches, self._hasher, stored or self._nobody, presented)
        return matches and stored is not None

    def needs_rehash(self, stored: str) -> bool:
        """Whether `stored` was made at another cost than today's. Raises ValueError when it is no hash."""
        return self._hasher.check_needs_rehash(stored)

    async def _run(self, work: Callable[..., _Result], *args: object) -> _Result:
        if self._taken >= self._places:
            raise PasswordsBusy
        self._taken += 1
        self.runs += 1
        started = asyncio.get_running_loop().run_in_executor(self._pool, work, *args)
        started.add_done_callback(self._leave)  # not when the caller leaves: a cancelled request's run goes on
        return await asyncio.shield(started)

    def _leave(self, run: asyncio.Future[_Result]) -> None:
        self._taken -= 1
        if not run.cancelled():
            run.exception()  # looked at, also where the caller has left

    def close(self) -> None:
        """Give up what waits and let what runs finish."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def checked(password: str) -> bytes:
    """The bytes that are hashed: NFKC (one keyboard's é is another's), UTF-8. Raises InvalidPassword."""
    if len(password) > BYTES_MAX:  # before the normalisation, which can lengthen a text 18 times
        raise InvalidPassword
    try:
        text = unicodedata.normalize("NFKC", password).encode()
    except UnicodeEncodeError:
        raise InvalidPassword from None
    if not BYTES_MIN <= len(text) <= BYTES_MAX:
        raise InvalidPassword
    return text


def _hasher(cost: Cost) -> argon2.PasswordHasher:
    return argon2.PasswordHasher(
        time_cost=cost.passes,
        memory_cost=cost.memory_kib,
        parallelism=cost.lanes,
        hash_len=cost.hash_bytes,
        salt_len=cost.salt_bytes,
        type=argon2.Type.ID,
    )


def _matches(hasher: argon2.PasswordHasher, stored: str | Future[str], presented: bytes) -> bool:
    try:
        return hasher.verify(stored if isinstance(stored, str) else stored.result(), presented)
    except (VerificationError, InvalidHashError):
        return False
