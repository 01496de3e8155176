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
NAMED_MAX: Final = 8
"""Shards that a log line names; of more it tells the number."""


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
        """One pass over all shards: how many sessions were swept by this call. What fails, or does so no longer, is
        logged once, however many shards it concerns."""
        errors: dict[int, LedgerError] = {}
        swept = sum(await asyncio.gather(*(self._sweep(shard, errors) for shard in self._shards)))
        self._tell(errors)
        return swept

    async def _sweep(self, shard: int, errors: dict[int, LedgerError]) -> int:
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
            self.failures += 1
            errors[shard] = error
        return count

    def _record(self, one: Swept) -> None:
        self.swept += 1
        log.info("sweeper: session %s of %s: charged %d micros", one.session, one.account.id, one.charged)
        self._on_swept(one)

    def _tell(self, errors: dict[int, LedgerError]) -> None:
        """One line for each kind of trouble that shards fell into since the last pass, one for those that left it."""
        before, self._failing = self._failing, {shard: type(error).__name__ for shard, error in errors.items()}
        fresh: dict[str, list[int]] = {}
        for shard, kind in self._failing.items():
            if before.get(shard) != kind:
                fresh.setdefault(kind, []).append(shard)
        for kind, shards in fresh.items():
            log.warning("sweeper: %s not swept: %s: %s", _named(shards), kind, errors[shards[0]])
        back = [shard for shard in before if shard not in self._failing]
        if back:
            log.warning("sweeper: %s swept again", _named(back))


def _named(shards: list[int]) -> str:
    """How many, and which when they are few."""
    few = "" if len(shards) > NAMED_MAX else f" ({', '.join(str(shard) for shard in sorted(shards))})"
    return f"{len(shards)} shard{'s' if len(shards) > 1 else ''}{few}"
