"""The sweeper: each second it settles the sessions whose owner stopped renewing their lease, in every shard.

Any number may run at once: the script decides, a session ends once. Must not: judge a lease by its own clock, or let a
frozen shard keep the others from being swept.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from metering.keys import SHARDS
from metering.ledger import LedgerError, Swept

log = logging.getLogger(__name__)

BATCH: Final = 100
"""Sessions of one shard per call; a pass repeats the call while batches come back full."""
REPEATS_MAX: Final = 20


class SweepingLedger(Protocol):
    """The part of the ledger that the sweeper needs."""

    async def sweep_due(self, shard: int, limit: int) -> list[Swept]:
        """Settle up to `limit` sessions of a shard whose lease is over. Raises LedgerError."""


class Sweeper:
    """`on_swept` is called with each swept session and must not raise. `swept` and `failures` only grow."""

    def __init__(
        self,
        ledger: SweepingLedger,
        *,
        every_ms: int = 1_000,
        on_swept: Callable[[Swept], None] = lambda swept: None,
        shards: Sequence[int] = range(len(SHARDS)),
    ) -> None:
        self._ledger = ledger
        self._every_s = every_ms / 1000
        self._on_swept = on_swept
        self._shards = shards
        self._failing: dict[int, str] = {}
        self.swept = 0
        self.failures = 0

    async def run(self) -> None:
        """Sweep until cancelled, once per interval however long a pass takes."""
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            await self.sweep_once()
            await asyncio.sleep(max(0.0, began + self._every_s - loop.time()))

    async def sweep_once(self) -> int:
        """One pass over all shards: how many sessions were swept by this call. A failing shard is logged once."""
        return sum(await asyncio.gather(*(self._sweep(shard) for shard in self._shards)))

    async def _sweep(self, shard: int) -> int:
        count = 0
        try:
            for _ in range(REPEATS_MAX):
                batch = await self._ledger.sweep_due(shard, BATCH)
                count += len(batch)
                for one in batch:
                    self._record(one)
                if len(batch) < BATCH:
                    break
        except LedgerError as error:
            self._fail(shard, error)
        else:
            if self._failing.pop(shard, None) is not None:
                log.warning("sweeper: shard %d is swept again", shard)
        return count

    def _record(self, one: Swept) -> None:
        self.swept += 1
        log.info("sweeper: session %s of %s: charged %d micros", one.session, one.account.id, one.charged)
        self._on_swept(one)

    def _fail(self, shard: int, error: LedgerError) -> None:
        self.failures += 1
        kind = type(error).__name__
        if self._failing.get(shard) != kind:
            self._failing[shard] = kind
            log.warning("sweeper: shard %d: %s: %s", shard, kind, error)
