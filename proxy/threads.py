"""Threads for work that would stall the event loop: reading huge bodies and counting long prompts.

The interpreter's lock is handed over a few times in such work, so the loop waits for its parts instead of all of it.
Must not: run anything that waits for a socket or a store, or anything without an end of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

THREADS = 2
"""Per worker."""


class Threads:
    """The threads of one worker."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="beside-loop")

    def run(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """Do `work` in the next free thread. Cancelling takes back what has not begun."""
        return asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def aclose(self) -> None:
        """Take nothing more and drop what has not begun. What runs is not waited for here: nobody needs its result, and
        the process ends once it is done."""
        self._pool.shutdown(wait=False, cancel_futures=True)
