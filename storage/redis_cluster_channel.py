"""One pub/sub channel of a Redis Cluster: a message published at any server reaches every server's subscribers.

Must not: stay with a server that has left the cluster: it would hear nothing and not know it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from functools import partial

from storage.redis_client import Subscription
from storage.redis_connection import Address
from storage.redis_slots import Place

CHECK_S = 0.5


class ClusterSubscription:
    """One channel, at one primary at a time; at another when that one has left the cluster or does not answer."""

    def __init__(
        self,
        places: Callable[[], list[Place]],
        url: Callable[[Place], str],
        channel: str,
        on_message: Callable[[bytes], None],
        on_gap: Callable[[], None],
    ) -> None:
        """`places` are the primaries that are connected now."""
        self._places = places
        self._url = url
        self._listen = partial(Subscription, channel=channel, on_message=on_message, on_gap=on_gap)
        self._at: Place | None = None
        self._inner: Subscription | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def active(self) -> bool:
        """Whether messages published now will arrive."""
        return self._inner is not None and self._inner.active

    async def start(self, timeout_s: float) -> None:
        """Subscribe; returns when confirmed or after `timeout_s`."""
        await self._move()
        if self._inner is not None:
            await self._inner.wait_active(timeout_s)
        self._task = asyncio.create_task(self._keep(), name="redis cluster subscription")

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(CHECK_S)
            if self._at not in self._places():
                await self._move()

    async def _move(self) -> None:
        places = self._places()
        if places:
            await self._leave()
            self._at = random.choice(places)  # noqa: S311  (no secret)
            self._inner = self._listen(Address.parse(self._url(self._at)))

    async def _leave(self) -> None:
        inner, self._inner = self._inner, None
        if inner is not None:
            await inner.aclose()

    async def aclose(self) -> None:
        """Stop listening."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        await self._leave()
