"""Reading keys again: one reading at a time, shared by all who wait, and a rest after what strangers can cause.

Must not: know what is read, or fail on its own: the reading says whether it worked.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable

Read = Callable[[], Awaitable[bool]]
"""Reads anew; False when that did not work. Must be bounded in time."""


class Reloading:
    """`rest_s` seconds lie between a reading that failed, or that an unknown name has caused, and the next."""

    def __init__(self, read: Read, *, rest_s: float, fresh_s: float) -> None:
        self._read, self._rest_s, self._fresh_s = read, rest_s, fresh_s
        self._running: asyncio.Task[bool] | None = None
        self._rests_until = float("-inf")
        self._read_at = float("-inf")

    @property
    def age_s(self) -> float:
        """Seconds since the last reading that worked."""
        return time.monotonic() - self._read_at

    async def freshen(self) -> None:
        """Read again what is older than `fresh_s`: beside the caller, or before it goes on at twice that age or never
        read. What then is known, and how old it is, may be as before: the reading may fail, or rest."""
        age_s = self.age_s
        if age_s > 2 * self._fresh_s:
            await self.again(stranger=False)
        elif age_s > self._fresh_s:
            self._begin(stranger=False)

    async def again(self, *, stranger: bool) -> bool:
        """Wait for a reading: the one under way, or a new one. False at once while it rests.

        `stranger`: the caller was moved by something that anybody may invent.
        """
        task = self._begin(stranger=stranger)
        return task is not None and await asyncio.shield(task)

    def _begin(self, *, stranger: bool) -> asyncio.Task[bool] | None:
        if self._running is None:
            now = time.monotonic()
            if now < self._rests_until:
                return None
            if stranger:
                self._rests_until = now + self._rest_s
            self._running = asyncio.create_task(self._run())
        return self._running

    async def _run(self) -> bool:
        try:
            worked = await self._read()
            now = time.monotonic()
            if worked:
                self._read_at = now
            else:
                self._rests_until = now + self._rest_s
            return worked
        finally:
            self._running = None

    async def aclose(self) -> None:
        """Give up the reading that is under way."""
        task = self._running
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
