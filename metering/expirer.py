"""The expirer: moves what is left of grants whose time is over to breakage, in every shard.

Any number may run at once: the script decides, a grant expires once. Must not: judge a time by its own clock, or let a
frozen shard keep the others from expiring.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from metering.keys import SHARDS
from metering.ledger import Expired, LedgerError

log = logging.getLogger(__name__)

BATCH: Final = 100
"""Grants of one shard per call; a pass repeats the call while batches come back full."""
REPEATS_MAX: Final = 20


class ExpiringLedger(Protocol):
    """The part of the ledger that the expirer needs."""

    async def expire_due(self, shard: int, limit: int) -> tuple[int, list[Expired]]:
        """Expire up to `limit` grants of a shard whose time is over. Raises LedgerError."""


class Expirer:
    """`on_expired` is called with each grant that had credit left and must not raise. `failures` only grows."""

    def __init__(
        self,
        ledger: ExpiringLedger,
        *,
        every_ms: int = 1_000,
        on_expired: Callable[[Expired], None] = lambda expired: None,
        shards: Sequence[int] = range(len(SHARDS)),
    ) -> None:
        self._ledger = ledger
        self._every_s = every_ms / 1000
        self._on_expired = on_expired
        self._shards = shards
        self._failing: dict[int, type[LedgerError]] = {}
        self.failures = 0

    async def run(self) -> None:
        """Expire until cancelled, once per interval however long a pass takes."""
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            await self.expire_once()
            await asyncio.sleep(max(0.0, began + self._every_s - loop.time()))

    async def expire_once(self) -> int:
        """One pass over all shards: how many grants lost credit by this call."""
        errors: dict[int, LedgerError] = {}
        expired = sum(await asyncio.gather(*(self._expire(shard, errors) for shard in self._shards)))
        self._tell(errors)
        return expired

    def _tell(self, errors: dict[int, LedgerError]) -> None:
        """One line when shards fall into trouble, or into another, and one when all have left it."""
        before, self._failing = self._failing, {shard: type(error) for shard, error in errors.items()}
        if errors and self._failing != before:
            shard, error = min(errors.items(), key=lambda item: item[0])
            log.warning("expirer: %d shards failed, first %d: %s: %s", len(errors), shard, type(error).__name__, error)
        elif before and not errors:
            log.warning("expirer: no shard fails any more")

    async def _expire(self, shard: int, errors: dict[int, LedgerError]) -> int:
        count = 0
        try:
            for _ in range(REPEATS_MAX):
                due, expired = await self._ledger.expire_due(shard, BATCH)
                count += len(expired)
                for one in expired:
                    self._on_expired(one)
                if due < BATCH:
                    break
        except LedgerError as error:
            self.failures += 1
            errors[shard] = error
        return count
