"""The flusher: moves finished entries from the Redis outbox to Postgres, exactly once and in order.

Rows and cursor are written in one transaction; the outbox is trimmed after it. A kill at any moment therefore repeats
or completes, and never loses or doubles. Must not: trim what is not committed, skip an entry, or stop a healthy shard
because another one is broken.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, Literal, Protocol

from metering import journal_store as store
from metering import partitions
from metering.journal_fields import Poison
from metering.journal_rows import Rows, entry_id, pairs, payload
from metering.journal_store import Cursor, Divergence
from metering.keys import SHARDS
from storage.database import FAILED, REJECTED, Connection, connect
from storage.redis_client import RedisError
from storage.redis_cluster import ClusterClient

log = logging.getLogger(__name__)

_RETRIED: tuple[type[Exception], ...] = (*FAILED, RedisError)
BACKOFF_FIRST_S: Final = 0.05
BACKOFF_MAX_S: Final = 5.0
INSPECT_EVERY_S: Final = 1.0
READ_LEAST: Final = 16
"""Entries read per shard at least, so that one round is never many tiny reads."""


class Redis(Protocol):
    """The part of the Redis client that the flusher needs."""

    def call(self, *args: str | bytes | int) -> Awaitable[Any]:
        """Send one command; the awaited result is its reply."""


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something a person must look at. All but `poison` stop the shard until the process starts again."""

    kind: Literal["gap", "divergence", "poison", "regress", "missing", "epoch"]
    shard: int
    detail: str


@dataclass(frozen=True, slots=True)
class JournalStatus:
    """As last inspected: entries not yet in Postgres, age of the oldest in ms, dead entries, stopped shards and why."""

    entries_behind: int = 0
    oldest_age_ms: int = 0
    dead: int = 0
    stopped_shards: Mapping[int, str] = field(default_factory=dict)


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
        self._shards = frozenset(shards)
        self._fit = fit
        self._url = database_url
        self._batch_max = self._limit = batch_max
        self._every_s = every_ms / 1000
        self._on_alarm = on_alarm
        self._connection: Connection | None = None
        self._cursors: dict[int, Cursor] = {}
        self._pending = len(SHARDS)
        self._turn = 0
        self._months: set[object] = set()
        self._stopped: dict[int, str] = {}
        self._stopped_in: dict[int, int] = {}
        self._busy = asyncio.Lock()
        self.delivered = 0
        self.status = JournalStatus()

    async def run(self) -> None:
        """Flush until cancelled. Stores that fail are tried again, at first after 50 ms, later every 5 s."""
        loop, pause_s, inspected = asyncio.get_running_loop(), BACKOFF_FIRST_S, float("-inf")
        try:
            while True:
                try:
                    moved = await self.round()
                    pause_s = BACKOFF_FIRST_S
                except _RETRIED as error:
                    log.warning("journal: %s: %s; trying again in %.2f s", type(error).__name__, error, pause_s)
                    await asyncio.sleep(pause_s)
                    moved, pause_s = 0, min(pause_s * 2, BACKOFF_MAX_S)
                if loop.time() - inspected >= INSPECT_EVERY_S:
                    await self._inspect_quietly()
                    inspected = loop.time()
                if moved < self._limit // 2:
                    await asyncio.sleep(self._every_s)
        finally:
            self._drop()

    async def drain(self) -> int:
        """Flush until a round finds nothing; answers how many entries arrived. Raises FAILED or RedisError."""
        total = 0
        while True:
            before = (dict(self._cursors), self._limit, len(self._stopped))
            moved = await self.round()
            total += moved
            if moved == 0 and before == (self._cursors, self._limit, len(self._stopped)):
                return total

    def stopped(self) -> dict[int, tuple[int, str]]:
        """The stopped shards: the epoch in which each was stopped, and why. It goes on by itself in a later one."""
        return {shard: (self._stopped_in[shard], why) for shard, why in self._stopped.items()}

    async def aclose(self) -> None:
        """Give the connection back. `run` does so by itself."""
        self._drop()

    async def round(self) -> int:
        """One transaction at most: answers how many entries arrived. Raises FAILED or RedisError and is tried again."""
        async with self._busy:
            try:
                connection = await self._connected()
                parts = await self._read()
                return await self._deliver(connection, parts) if parts else 0
            except FAILED:
                self._drop()
                raise

    # --- reading

    async def _connected(self) -> Connection:
        if self._connection is not None and not self._connection.is_closed():
            return self._connection
        self._drop()
        connection = self._connection = await connect(self._url, application_name="tollgate journal")
        await store.prepare(connection)
        await partitions.ensure_ahead(connection, datetime.now(UTC).date())
        self._cursors = await store.cursors(connection)
        self._pending = len(SHARDS)
        return connection

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.terminate()
        self._connection = None
        self._months.clear()

    async def _read(self) -> list[_Part]:
        """Entries after the cursors as we know them; whether they still stand there is checked under the lock."""
        if not self._fit():
            return []
        at = {SHARDS[v].outbox.encode(): v for v in self._cursors if v in self._shards and v not in self._stopped}
        if not at:
            return []
        count = max(READ_LEAST, self._limit // max(1, self._pending))
        ids = [f"{self._cursors[v][0]}-{self._cursors[v][1]}" for v in at.values()]
        streams = await self._streams(count, at, ids)
        self._pending = len(streams)
        self._turn += 1
        turned = [streams[(self._turn + i) % len(streams)] for i in range(len(streams))]
        parts, left = [], self._limit
        for key, entries in turned:
            if left <= 0:
                break
            part = self._part(at[key], entries[:left])
            left -= len(part.entries)
            parts.append(part)
        return parts

    async def _streams(self, count: int, keys: Collection[str | bytes], ids: list[str]) -> list[Any]:
        """One XREAD; in a cluster, where a command has keys of one slot only, one for each key, written together. What
        some of its servers bring is not held up by the others: an error is raised when nothing came."""
        if not isinstance(self._redis, ClusterClient):
            return await self._redis.call("XREAD", "COUNT", count, "STREAMS", *keys, *ids) or []
        calls = [self._redis.call("XREAD", "COUNT", count, "STREAMS", *pair) for pair in zip(keys, ids, strict=True)]
        replies = await asyncio.gather(*calls, return_exceptions=True)
        streams = [stream for reply in replies if isinstance(reply, list) for stream in reply]
        failed = [reply for reply in replies if isinstance(reply, BaseException)]
        for error in failed:
            if not streams or not isinstance(error, RedisError):
                raise error
        if failed:
            log.warning("journal: %d outboxes could not be read: %s", len(failed), failed[0])
        return streams

    def _part(self, shard: int, entries: list[Any]) -> _Part:
        start = end = self._cursors[shard]
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
                self._limit = count // 2
                log.warning("journal: a batch of %d entries was refused, trying %d: %s", count, self._limit, error)
                return 0
            moved = await self._deliver_alone(connection, next(part for part in parts if part.entries))
        self._limit = min(self._batch_max, self._limit * 2)
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
        self._cursors.update(held)  # where another flusher was faster, this is its cursor
        self._cursors.update({part.shard: part.end for part in full})
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
                self._alarm(Alarm("poison", shard, f"entry {ep}-{n} went to outbox_dead: {reason}"))
            if part.gap:
                self._stop(Alarm("gap", part.shard, part.gap))

    async def _trim(self, shards: list[int]) -> None:
        """Remove what is committed. A trim that fails costs memory only: the shard's next one makes up for it."""
        calls = []
        for shard in shards:
            ep, n = self._cursors[shard]
            calls.append(self._redis.call("XTRIM", SHARDS[shard].outbox, "MINID", "=", f"{ep}-{n + 1}"))
        for answer in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(answer, BaseException):
                log.warning("journal: the outbox was not trimmed: %s", answer)

    def _stop(self, alarm: Alarm) -> None:
        if alarm.shard not in self._stopped:
            self._stopped[alarm.shard] = f"{alarm.kind}: {alarm.detail}"
            self._stopped_in[alarm.shard] = self._cursors.get(alarm.shard, (0, 0))[0]
            self._alarm(alarm)

    def _alarm(self, alarm: Alarm) -> None:
        log.error("journal: shard %d: %s: %s", alarm.shard, alarm.kind, alarm.detail)
        self._on_alarm(alarm)

    # --- inspection

    async def inspect(self) -> JournalStatus:
        """Compare the cursors with Redis: the lag, and whether Redis lost what Postgres has.

        Raises FAILED or RedisError. While `run` runs, read `status` instead.
        """
        async with self._busy:
            self.status = await self._inspect()
            return self.status

    async def _inspect(self) -> JournalStatus:
        if self._connection is not None and not self._connection.is_closed():
            self._cursors |= await store.cursors(self._connection)
            dead = await store.dead_count(self._connection)
        else:
            dead = self.status.dead
        calls = [self._redis.call("HMGET", shard.meta, "ep", "n") for shard in SHARDS]
        metas = await asyncio.gather(*calls)
        behind, lagging = 0, []
        for shard, (ep, n) in zip(SHARDS, metas, strict=True):
            lag = self._compare(shard.number, ep, n)
            behind += lag
            if lag:
                lagging.append(shard.number)
        age = await self._oldest_age_ms(lagging)
        return JournalStatus(behind, age, dead, dict(self._stopped))

    def _compare(self, shard: int, ep: bytes | None, n: bytes | None) -> int:
        """Entries of the shard that Postgres lacks. Stops the shard when Redis lost what Postgres has."""
        cursor = self._cursors.get(shard)
        if cursor is None:
            return int(n or 0)
        if ep is not None and shard in self._stopped and self._stopped_in[shard] < cursor[0] == int(ep):
            log.warning("journal: shard %d goes on in epoch %d", shard, cursor[0])
            del self._stopped[shard]
        if not self._fit() or (ep is not None and int(ep) < 0):
            return 0  # a recovery is looking at it
        if ep is None:
            self._stop(Alarm("missing", shard, f"Redis has no journal, Postgres is at {cursor[0]}-{cursor[1]}"))
            return 0
        if int(ep) != cursor[0]:
            self._stop(Alarm("epoch", shard, f"Redis is in epoch {int(ep)}, Postgres in {cursor[0]}"))
            return 0
        if int(n or 0) < cursor[1]:
            self._stop(Alarm("regress", shard, f"Redis is at entry {int(n or 0)}, Postgres at {cursor[1]}"))
            return 0
        return int(n or 0) - cursor[1]

    async def _oldest_age_ms(self, shards: list[int]) -> int:
        if not shards:
            return 0
        keys = [SHARDS[v].outbox for v in shards]
        ids = ["{}-{}".format(*self._cursors.get(v, (0, 0))) for v in shards]
        streams = await self._streams(1, keys, ids)
        moments = [int(fields.get(b"ts", b"0")) for _, entries in streams for fields in (pairs(entries[0][1]),)]
        seconds, micros = await self._redis.call("TIME")
        return max(0, int(seconds) * 1000 + int(micros) // 1000 - min(moments)) if moments else 0

    async def _inspect_quietly(self) -> None:
        try:
            await self.inspect()
        except _RETRIED as error:
            log.warning("journal: not inspected: %s: %s", type(error).__name__, error)
