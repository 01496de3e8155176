"""A background task that a defect in it does not end for ever: it is told, and begins again.

Must not: be used for what ends by itself, or hide a failure that its owner can answer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

log = logging.getLogger(__name__)


class SteadyTask:
    """One. `name` stands in the log line of a failure."""

    def __init__(self, work: Callable[[], Coroutine[Any, Any, None]], name: str) -> None:
        self._work = work
        self._name = name
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin, in a running loop."""
        self._task = asyncio.create_task(self._work(), name=self._name)
        self._task.add_done_callback(self._ended)

    async def aclose(self) -> None:
        """End it, and wait until it has ended. Nothing happens where it was not begun."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task})

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            log.error("%s failed and begins again", self._name, exc_info=task.exception())
            if self._task is task:  # and nobody has closed it meanwhile
                self.start()
