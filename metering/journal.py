"""The flusher: moves finished entries from the Redis outbox to Postgres, exactly once and in order.

Rows and cursor are written in one transaction; the outbox is trimmed after it. A kill at any moment therefore repeats
or completes, and never loses or doubles. The work is done by lanes (`metering.journal_lane`), each with some of the
shards; here they are kept going, and their cursors compared with Redis. Must not: skip what an alarm should say.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from metering import journal_store as store
from metering.journal_lane import Alarm, Alarms, Ends, Lane, Redis, read_streams
from metering.journal_rows import pairs
from metering.journal_store import Cursor
from metering.keys import SHARDS
from storage.database import FAILED
from storage.redis_client import RedisError

__all__ = ["Alarm", "Flusher", "JournalStatus"]

log = logging.getLogger(__name__)

_RETRIED: tuple[type[Exception], ...] = (*FAILED, RedisError)
BACKOFF_FIRST_S: Final = 0.05
BACKOFF_MAX_S: Final = 5.0
INSPECT_EVERY_S: Final = 1.0
LANES: Final = 8
"""Connections of a flusher: while Postgres writes some lanes' rows, Python makes others'. Two left a third of its
core idle."""


@dataclass(frozen=True, slots=True)
class JournalStatus:
    """As last inspected: entries not yet in Postgres, age of the oldest in ms, dead entries, stopped shards and why."""

    entries_behind: int = 0
    oldest_age_ms: int = 0
    dead: int = 0
    stopped_shards: Mapping[int, str] = field(default_factory=dict)


class Flusher:
    """One flusher. Several may run at once, also in other processes: cursor rows are locked with SKIP LOCKED.

    `batch_max` bounds the entries of a transaction. `on_alarm` is called once per alarm and must not raise. While `fit`
    says that the server's contents are not verified nothing is read, or trimmed, or compared.
    """

    def __init__(
        self,
        redis: Redis,
        database_url: str,
        *,
        batch_max: int = 2_000,
        every_ms: int = 200,
        on_alarm: Callable[[Alarm], None] = lambda alarm: None,
        shards: Collection[int] = range(len(SHARDS)),
        fit: Callable[[], bool] = lambda: True,
    ) -> None:
        self._redis = redis
        self._fit = fit
        self._every_s = every_ms / 1000
        self._alarms = Alarms(on_alarm)
        ends = Ends(redis, database_url, fit)
        self._lanes = [
            Lane(ends, [shard for shard in shards if shard % LANES == number], batch_max, self._alarms)
            for number in range(LANES)
        ]
        self._inspected = float("-inf")
        self.status = JournalStatus()

    @property
    def delivered(self) -> int:
        """Entries that this flusher has brought to Postgres."""
        return sum(lane.delivered for lane in self._lanes)

    async def run(self) -> None:
        """Flush until cancelled. Stores that fail are tried again, at first after 50 ms, later every 5 s."""
        running = [asyncio.create_task(self._keep(lane)) for lane in self._lanes]
        try:
            ended, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for one in ended:
                one.result()  # a lane does not end by itself: this is an error that nobody expects
        finally:
            for one in running:
                one.cancel()
            await asyncio.wait(running)
            await self.aclose()

    async def drain(self) -> int:
        """Flush until a round finds nothing; answers how many entries arrived. Raises FAILED or RedisError."""
        return await _all(lane.drain() for lane in self._lanes)

    async def round(self) -> int:
        """One transaction at most per lane: answers how many entries arrived. Raises FAILED or RedisError."""
        return await _all(lane.round() for lane in self._lanes)

    def stopped(self) -> dict[int, tuple[int, str]]:
        """The stopped shards: the epoch in which each was stopped, and why. It goes on by itself in a later one."""
        return {shard: (self._alarms.epochs[shard], why) for shard, why in self._alarms.stopped.items()}

    async def aclose(self) -> None:
        """Give the connections back. `run` does so by itself."""
        for lane in self._lanes:
            lane.drop()

    async def _keep(self, lane: Lane) -> None:
        loop, pause_s = asyncio.get_running_loop(), BACKOFF_FIRST_S
        while True:
            try:
                moved = await lane.round()
                pause_s = BACKOFF_FIRST_S
            except _RETRIED as error:
                log.warning("journal: %s: %s; trying again in %.2f s", type(error).__name__, error, pause_s)
                await asyncio.sleep(pause_s)
                moved, pause_s = 0, min(pause_s * 2, BACKOFF_MAX_S)
            if lane is self._lanes[0] and loop.time() - self._inspected >= INSPECT_EVERY_S:
                await self._inspect_quietly()
                self._inspected = loop.time()
            if moved < lane.limit // 2 and not lane.backlog:
                await asyncio.sleep(self._every_s)

    # --- inspection

    async def inspect(self) -> JournalStatus:
        """Compare the cursors with Redis: the lag, and whether Redis lost what Postgres has.

        Raises FAILED or RedisError. While `run` runs, read `status` instead.
        """
        self.status = await self._inspect()
        return self.status

    async def _inspect(self) -> JournalStatus:
        # The cursors of one instant, before Redis is asked: what lanes move meanwhile must not look like a loss.
        at, dead = await self._read_cursors()
        calls = [self._redis.call("HMGET", shard.meta, "ep", "n") for shard in SHARDS]
        metas = await asyncio.gather(*calls)
        behind, lagging = 0, {}
        for shard, (ep, n) in zip(SHARDS, metas, strict=True):
            lag = self._compare(shard.number, at.get(shard.number), ep, n)
            behind += lag
            if lag:
                lagging[shard.number] = at.get(shard.number, (0, 0))
        age = await self._oldest_age_ms(lagging)
        return JournalStatus(behind, age, dead, dict(self._alarms.stopped))

    async def _read_cursors(self) -> tuple[dict[int, Cursor], int]:
        """Every shard's cursor and the number of dead entries; without a connection, as they were last."""
        at: dict[int, Cursor] = {}
        dead, first = self.status.dead, self._lanes[0]
        for lane in self._lanes:
            at |= lane.cursors
        async with first.busy:
            connection = first.connection
            if connection is not None and not connection.is_closed():
                at = await store.cursors(connection)
                dead = await store.dead_count(connection)
        for lane in self._lanes:
            lane.learn(at)
        return at, dead

    def _compare(self, shard: int, cursor: Cursor | None, ep: bytes | None, n: bytes | None) -> int:
        """Entries of the shard that Postgres lacks. Stops the shard when Redis lost what Postgres has."""
        if cursor is None:
            return int(n or 0)
        stopped, epochs = self._alarms.stopped, self._alarms.epochs
        if ep is not None and shard in stopped and epochs[shard] < cursor[0] == int(ep):
            log.warning("journal: shard %d goes on in epoch %d", shard, cursor[0])
            del stopped[shard]
        if not self._fit() or (ep is not None and int(ep) < 0):
            return 0  # a recovery is looking at it
        lost = _lost(cursor, ep, int(n or 0))
        if lost is not None:
            self._alarms.stop(Alarm(lost[0], shard, lost[1]), cursor[0])
            return 0
        return int(n or 0) - cursor[1]

    async def _oldest_age_ms(self, cursors: Mapping[int, Cursor]) -> int:
        if not cursors:
            return 0
        keys = [SHARDS[shard].outbox for shard in cursors]
        streams = await read_streams(self._redis, 1, keys, ["{}-{}".format(*at) for at in cursors.values()])
        told = [pairs(entries[0][1]).get(b"ts", b"") for _, entries in streams]
        moments = [int(moment) for moment in told if moment.isdigit()]  # an entry that nobody can read has no age
        seconds, micros = await self._redis.call("TIME")
        return max(0, int(seconds) * 1000 + int(micros) // 1000 - min(moments)) if moments else 0

    async def _inspect_quietly(self) -> None:
        try:
            await self.inspect()
        except _RETRIED as error:
            log.warning("journal: not inspected: %s: %s", type(error).__name__, error)


def _lost(cursor: Cursor, ep: bytes | None, n: int) -> tuple[Literal["missing", "epoch", "regress"], str] | None:
    """What Redis lost of a shard that Postgres has up to `cursor`."""
    if ep is None:
        return "missing", f"Redis has no journal, Postgres is at {cursor[0]}-{cursor[1]}"
    if int(ep) != cursor[0]:
        return "epoch", f"Redis is in epoch {int(ep)}, Postgres in {cursor[0]}"
    if n < cursor[1]:
        return "regress", f"Redis is at entry {n}, Postgres at {cursor[1]}"
    return None


async def _all(works: Iterable[Awaitable[int]]) -> int:
    """The sum of all, each run to its end; then the first error, if there was one."""
    done = await asyncio.gather(*works, return_exceptions=True)
    for one in done:
        if isinstance(one, BaseException):
            raise one
    return sum(one for one in done if isinstance(one, int))
