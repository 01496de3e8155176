"""One lane of the flusher: some shards and one connection, from the outbox into a transaction to the trim after it.

Lanes share nothing but the alarms, so that one builds rows while Postgres writes those of another. Must not: trim
what is not committed, skip an entry, or let a broken shard hold up a healthy one.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, Literal, Protocol

from metering import journal_store as store
from metering import partitions
from metering.journal_fields import Poison
from metering.journal_quick import settle_quickly
from metering.journal_rows import Rows, entry_id, pairs, payload
from metering.journal_store import Cursor, Divergence
from metering.keys import SHARDS
from storage.database import FAILED, REJECTED, Connection, connect
from storage.redis_client import RedisError
from storage.redis_cluster import ClusterClient

log = logging.getLogger(__name__)

READ_LEAST: Final = 16
"""Entries read per shard at least, so that one round is never many tiny reads."""

DEEP_SHARDS: Final = 8
"""Shards of a round that works off a backlog: many entries of few accounts make few rows of the rollup."""

CONTAINERS_MAX: Final = 200_000
"""Objects that may be made between two looks for cycles while a round runs: about two batches of 4,000 entries."""


class Redis(Protocol):
    """The part of the Redis client that the flusher needs."""

    def call(self, *args: str | bytes | int) -> Awaitable[Any]:
        """Send one command; the awaited result is its reply."""


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something a person must look at. All but `poison` stop the shard until its next epoch."""

    kind: Literal["gap", "divergence", "poison", "regress", "missing", "epoch"]
    shard: int
    detail: str


@dataclass(slots=True)
class _Part:
    """What one shard brings to a round: contiguous entries from `start` (exclusive) to `end` (inclusive)."""

    shard: int
    start: Cursor
    end: Cursor
    entries: list[tuple[int, list[bytes]]] = field(default_factory=list)
    rows: Rows = field(default_factory=Rows)
    dead: list[tuple[int, int, int, str, str]] = field(default_factory=list)
    gap: str = ""


class Alarms:
    """What went wrong, and the shards that stopped for it: why, and in which epoch."""

    def __init__(self, on_alarm: Callable[[Alarm], None]) -> None:
        self._on_alarm = on_alarm
        self.stopped: dict[int, str] = {}
        self.epochs: dict[int, int] = {}

    def stop(self, alarm: Alarm, epoch: int) -> None:
        """Once per shard."""
        if alarm.shard not in self.stopped:
            self.stopped[alarm.shard] = f"{alarm.kind}: {alarm.detail}"
            self.epochs[alarm.shard] = epoch
            self.sound(alarm)

    def sound(self, alarm: Alarm) -> None:
        """Tell, without stopping."""
        log.error("journal: shard %d: %s: %s", alarm.shard, alarm.kind, alarm.detail)
        self._on_alarm(alarm)


@dataclass(frozen=True, slots=True)
class Ends:
    """Both ends of the way, and whether the server's contents are verified: else nothing is read, or trimmed."""

    redis: Redis
    database_url: str
    fit: Callable[[], bool]


class _RareCollections:
    """A batch is tens of thousands of tuples and no cycle: looking for one again and again took a fifth of our
    time. While any round runs in this process the collector lets that many pass."""

    def __init__(self) -> None:
        self._inside = 0
        self._usual = gc.get_threshold()

    def __enter__(self) -> None:
        if self._inside == 0:
            self._usual = gc.get_threshold()
            gc.set_threshold(CONTAINERS_MAX, *self._usual[1:])
        self._inside += 1

    def __exit__(self, *_: object) -> None:
        self._inside -= 1
        if self._inside == 0:
            gc.set_threshold(*self._usual)


_RARE_COLLECTIONS: Final = _RareCollections()


class Lane:
    """`shards` are its own; of other flushers it is kept apart by locks on the cursors. `batch_max` bounds the entries
    of a transaction."""

    def __init__(self, ends: Ends, shards: Iterable[int], batch_max: int, alarms: Alarms) -> None:
        self._ends = ends
        self._shards = sorted(shards)
        self._batch_max = self.limit = batch_max
        self._alarms = alarms
        self.cursors: dict[int, Cursor] = {}
        self._pending = len(self._shards)
        self._deep: list[int] = []
        self._turn = 0
        self._months: set[object] = set()
        self.connection: Connection | None = None
        self.busy = asyncio.Lock()
        self.delivered = 0

    @property
    def backlog(self) -> bool:
        """Whether shards are known to have more than was read of them."""
        return bool(self._deep)

    def position(self) -> tuple[object, ...]:
        """Changes with everything that a round may change beside moving entries."""
        return dict(self.cursors), self.limit, len(self._alarms.stopped), tuple(self._deep)

    def learn(self, cursors: Mapping[int, Cursor]) -> None:
        """What somebody else read of the cursors; never a step back."""
        for shard in self._shards:
            if shard in cursors and cursors[shard] > self.cursors.get(shard, (0, -1)):
                self.cursors[shard] = cursors[shard]

    async def round(self) -> int:
        """One transaction at most: answers how many entries arrived. Raises FAILED or RedisError and is tried again."""
        async with self.busy:
            with _RARE_COLLECTIONS:
                return await self._round()

    async def _round(self) -> int:
        try:
            connection = await self._connected()
            parts = await self._read()
            return await self._deliver(connection, parts) if parts else 0
        except FAILED:
            self.drop()
            raise

    async def drain(self) -> int:
        """Rounds until one over all shards finds nothing; answers how many entries arrived."""
        total = 0
        while True:
            before = self.position()
            moved = await self.round()
            total += moved
            if moved == 0 and not self._deep and before == self.position():
                return total

    def drop(self) -> None:
        """Give the connection back."""
        if self.connection is not None:
            self.connection.terminate()
        self.connection = None
        self._months.clear()

    # --- reading

    async def _connected(self) -> Connection:
        if self.connection is not None and not self.connection.is_closed():
            return self.connection
        self.drop()
        connection = self.connection = await connect(self._ends.database_url, application_name="tollgate journal")
        await store.prepare(connection)
        await partitions.ensure_ahead(connection, datetime.now(UTC).date())
        found = await store.cursors(connection)
        self.cursors = {shard: found[shard] for shard in self._shards if shard in found}
        self._pending = len(self._shards)
        return connection

    async def _read(self) -> list[_Part]:
        """Entries after the cursors as we know them; whether they still stand there is checked under the lock."""
        at = [shard for shard in self.cursors if shard not in self._alarms.stopped]
        if not at or not self._ends.fit():
            return []
        deep = [shard for shard in self._deep[:DEEP_SHARDS] if shard in at]
        self._deep = self._deep[DEEP_SHARDS:]
        count = max(READ_LEAST, self.limit // (len(deep) or max(1, self._pending)))
        streams = await self._streams(count, deep or at)
        if not deep:  # a look at all shards, as after every look at the deep ones
            self._pending = len(streams)
            self._deep = [shard for shard, entries in streams if len(entries) == count]
        return self._parts(streams)

    async def _streams(self, count: int, shards: Sequence[int]) -> list[tuple[int, list[Any]]]:
        named = {SHARDS[shard].outbox.encode(): shard for shard in shards}
        ids = ["{}-{}".format(*self.cursors[shard]) for shard in shards]
        return [(named[key], entries) for key, entries in await read_streams(self._ends.redis, count, named, ids)]

    def _parts(self, streams: Sequence[tuple[int, list[Any]]]) -> list[_Part]:
        self._turn += 1
        parts, left = [], self.limit
        for i in range(len(streams)):
            if left <= 0:
                break
            shard, entries = streams[(self._turn + i) % len(streams)]
            part = self._part(shard, entries[:left])
            left -= len(part.entries)
            parts.append(part)
        return parts

    def _part(self, shard: int, entries: list[Any]) -> _Part:
        start = end = self.cursors[shard]
        part = _Part(shard, start, end)
        for raw, flat in entries:
            found = entry_id(raw)
            if found != (end[0], end[1] + 1):
                part.gap = f"expected entry {end[0]}-{end[1] + 1}, found {found[0]}-{found[1]}"
                break
            part.entries.append((found[1], flat))
            end = found
        part.end = end
        for n, flat in part.entries:
            try:
                if not settle_quickly(part.rows, shard, end[0], n, flat):
                    part.rows.add(shard, end[0], n, pairs(flat))
            except (Poison, ValueError) as error:
                part.dead.append((shard, end[0], n, payload(flat), str(error)))
        return part

    # --- writing

    async def _deliver(self, connection: Connection, parts: list[_Part]) -> int:
        """Commit; of values that Postgres refuses take fewer, until the refused one stands alone, and bury it."""
        try:
            moved = await self._commit(connection, parts)
        except Divergence as error:
            for shard in error.shards:
                self._stop(Alarm("divergence", shard, "rows exist already with another content"))
            return 0
        except REJECTED as error:
            self._months.clear()  # a partition may have been removed
            count = sum(len(part.entries) for part in parts)
            if count > 1:
                self.limit = count // 2
                log.warning("journal: a batch of %d entries was refused, trying %d: %s", count, self.limit, error)
                return 0
            moved = await self._deliver_alone(connection, next(part for part in parts if part.entries))
        self.limit = min(self._batch_max, self.limit * 2)
        return moved

    async def _deliver_alone(self, connection: Connection, part: _Part) -> int:
        try:
            return await self._commit(connection, [part])
        except REJECTED as error:
            (n, flat) = part.entries[0]
            reason = f"{type(error).__name__}: {error}"
            buried = _Part(part.shard, part.start, part.end, part.entries, gap=part.gap)
            buried.dead.append((part.shard, part.end[0], n, payload(flat), reason))
            return await self._commit(connection, [buried])

    async def _commit(self, connection: Connection, parts: list[_Part]) -> int:
        await self._ensure_months(connection, parts)
        async with connection.transaction():
            held = await store.lock(connection, [part.shard for part in parts])
            mine = [part for part in parts if held.get(part.shard) == part.start]
            full = [part for part in mine if part.entries]
            if full:
                await store.write(connection, [part.rows for part in full])
                await store.bury(connection, [dead for part in full for dead in part.dead])
                await store.advance(connection, {part.shard: part.end for part in full})
        self.cursors.update(held)  # where another flusher was faster, this is its cursor
        self.cursors.update({part.shard: part.end for part in full})
        moved = sum(len(part.entries) for part in full)
        self.delivered += moved
        self._report(mine)
        await self._trim([part.shard for part in full])
        return moved

    async def _ensure_months(self, connection: Connection, parts: list[_Part]) -> None:
        needed = store.months([part.rows for part in parts])
        if not needed <= self._months:
            await partitions.ensure(connection, needed)
            self._months |= needed

    def _report(self, parts: list[_Part]) -> None:
        for part in parts:
            for shard, ep, n, _payload, reason in part.dead:
                self._alarms.sound(Alarm("poison", shard, f"entry {ep}-{n} went to outbox_dead: {reason}"))
            if part.gap:
                self._stop(Alarm("gap", part.shard, part.gap))

    def _stop(self, alarm: Alarm) -> None:
        self._alarms.stop(alarm, self.cursors.get(alarm.shard, (0, 0))[0])

    async def _trim(self, shards: list[int]) -> None:
        """Remove what is committed. A trim that fails costs memory only: the shard's next one makes up for it."""
        calls = []
        for shard in shards:
            ep, n = self.cursors[shard]
            calls.append(self._ends.redis.call("XTRIM", SHARDS[shard].outbox, "MINID", "=", f"{ep}-{n + 1}"))
        for answer in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(answer, BaseException):
                log.warning("journal: the outbox was not trimmed: %s", answer)


async def read_streams(redis: Redis, count: int, keys: Collection[str | bytes], ids: list[str]) -> list[Any]:
    """One XREAD; in a cluster, where a command has keys of one slot only, one for each key, written together. What
    some of its servers bring is not held up by the others: an error is raised when nothing came."""
    if not isinstance(redis, ClusterClient):
        return await redis.call("XREAD", "COUNT", count, "STREAMS", *keys, *ids) or []
    calls = [redis.call("XREAD", "COUNT", count, "STREAMS", *pair) for pair in zip(keys, ids, strict=True)]
    replies = await asyncio.gather(*calls, return_exceptions=True)
    streams = [stream for reply in replies if isinstance(reply, list) for stream in reply]
    failed = [reply for reply in replies if isinstance(reply, BaseException)]
    for error in failed:
        if not streams or not isinstance(error, RedisError):
            raise error
    if failed:
        log.warning("journal: %d outboxes could not be read: %s", len(failed), failed[0])
    return streams
