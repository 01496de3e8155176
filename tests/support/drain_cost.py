"""How fast the journal goes from a full outbox to Postgres, and what the time is spent on.

`python -m tests.support.drain_cost` fills the outbox of a fresh Valkey (append-only file on), drains it with the real
flusher into a fresh Postgres (fsync on), several turns into the same growing tables, and prints entries per second and
CPU per entry of each process; then it audits the ledger's rules. Where the time goes is sampled: the flusher's stack
every 4 ms of its CPU, and what its connections do every 20 ms. Must not: decide what is too slow.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import psutil

import migrations
from metering import audit_queries
from metering.journal import Flusher
from storage.database import connect
from tests.support.drain_fill import Filler, open_accounts
from tests.support.postgres import PostgresServer
from tests.support.redis_server import RedisServer
from tests.support.stack import Stack, open_stack

SAMPLE_CPU_S = 0.004
SAMPLE_PG_S = 0.02
TABLES = ("session", "entry", "posting", "consumption", "usage_rollup")
_ACTIVITY = """
    SELECT CASE WHEN state = 'active' THEN left(regexp_replace(query, '\\s+', ' ', 'g'), 60) ELSE state END AS doing,
    CASE WHEN wait_event_type IN ('IO', 'LWLock', 'Lock') THEN wait_event ELSE '' END AS waits
    FROM pg_stat_activity WHERE application_name = 'tollgate journal'"""
_SIZES = """SELECT coalesce(parent.relname, c.relname) AS name, sum(pg_table_size(c.oid))::bigint AS heap,
    sum(pg_indexes_size(c.oid))::bigint AS indexes
    FROM pg_class c LEFT JOIN pg_inherits i ON i.inhrelid = c.oid LEFT JOIN pg_class parent ON parent.oid = i.inhparent
    WHERE c.relkind = 'r' AND c.relnamespace = 'public'::regnamespace GROUP BY 1"""


@dataclass(slots=True)
class Turn:
    """One drain: entries, seconds, and CPU seconds of the flusher, of Postgres (all its processes) and of Valkey."""

    entries: int
    wall_s: float
    flusher_s: float
    postgres_s: float
    valkey_s: float
    stacks: Counter[str] = field(default_factory=Counter)
    activity: Counter[str] = field(default_factory=Counter)

    @property
    def rate(self) -> float:
        """Entries per second."""
        return self.entries / self.wall_s


def _cpu_s(process: psutil.Process) -> float:
    """CPU of a process, of its living children, and of those it has waited for."""
    total = 0.0
    for one in (process, *process.children(recursive=True)):
        try:
            spent = one.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += spent.user + spent.system
        if one == process:
            total += spent.children_user + spent.children_system
    return total


class _Stacks:
    """Samples of this process' stack, by the innermost function of ours, each after some CPU time."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()

    def __enter__(self) -> _Stacks:
        self._before = signal.signal(signal.SIGPROF, self._sample)
        signal.setitimer(signal.ITIMER_PROF, SAMPLE_CPU_S, SAMPLE_CPU_S)
        return self

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, self._before)

    def _sample(self, _number: int, frame: FrameType | None) -> None:
        while frame is not None:
            name = frame.f_code.co_filename
            if "/metering/" in name or "/storage/" in name or "/asyncpg/" in name:
                self.found[f"{Path(name).stem}.{frame.f_code.co_name}"] += 1
                return
            frame = frame.f_back
        self.found["(the event loop)"] += 1


class _Activity:
    """Samples of what Postgres does for the flusher's connections, from a thread with a connection of its own."""

    def __init__(self, url: str) -> None:
        self.found: Counter[str] = Counter()
        self._url = url
        self._over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._watch()))

    def __enter__(self) -> _Activity:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    async def _watch(self) -> None:
        connection = await connect(self._url)
        while not self._over.is_set():
            for row in await connection.fetch(_ACTIVITY):
                doing = re.sub(r"\s*\(.*", "", row["doing"] or "")
                self.found[f"{doing} [{row['waits']}]" if row["waits"] else doing] += 1
            await asyncio.sleep(SAMPLE_PG_S)
        await connection.close()


@dataclass(slots=True)
class Bench:
    """Both stores and a flusher whose batches are of at most `batch` entries."""

    stack: Stack
    postgres: psutil.Process
    valkey: psutil.Process
    batch: int
    sampled: bool

    async def turn(self) -> Turn:
        """Drain what is there with a flusher of its own, as after its start."""
        flusher = Flusher(self.stack.redis, self.stack.database_url, batch_max=self.batch)
        others = (self.postgres, self.valkey)
        before, began, own = [_cpu_s(one) for one in others], time.monotonic(), time.process_time()
        if self.sampled:
            with _Activity(self.stack.database_url) as activity, _Stacks() as stacks:
                entries = await flusher.drain()
        else:
            entries = await flusher.drain()
        wall, own = time.monotonic() - began, time.process_time() - own
        spent = [_cpu_s(one) - was for one, was in zip(others, before, strict=True)]
        await flusher.aclose()
        made = Turn(entries, wall, own, spent[0], spent[1])
        if self.sampled:
            made.stacks, made.activity = stacks.found, activity.found
        return made

    async def sizes(self) -> dict[str, tuple[int, int]]:
        """Table -> bytes of its rows and of its indexes, partitions counted to their table."""
        rows = await self.stack.pool.fetch(_SIZES)
        return {row["name"]: (row["heap"], row["indexes"]) for row in rows if row["name"] in TABLES}


def _process_of(folder: Path, name: str) -> psutil.Process:
    mine = psutil.Process().children(recursive=True)
    return next(one for one in mine if one.name() == name and str(folder) in " ".join(one.cmdline()))


def show(turn: Turn, number: int) -> None:
    """One line of a turn, and its samples."""
    each = 1e6 / turn.entries
    print(
        f"turn {number}: {turn.entries:,} entries in {turn.wall_s:.2f} s = {turn.rate:,.0f}/s; CPU us per entry: "
        f"flusher {turn.flusher_s * each:.1f}, Postgres {turn.postgres_s * each:.1f}, "
        f"Valkey {turn.valkey_s * each:.1f}",
        flush=True,
    )
    for title, found in (("flusher's CPU", turn.stacks), ("Postgres' connections", turn.activity)):
        if total := sum(found.values()):
            print(f"  {title}:", "; ".join(f"{name} {100 * n / total:.0f}%" for name, n in found.most_common(14)))


async def measure(postgres: PostgresServer, redis: RedisServer, options: argparse.Namespace) -> list[Turn]:
    """All turns, printed as they come; then sizes and the audit's rules."""
    await migrations.upgrade(postgres.url())
    stack = await open_stack(postgres.url(), redis)
    try:
        bench = Bench(
            stack,
            _process_of(postgres.folder, "postgres"),
            _process_of(redis.socket.parent, "valkey-server"),
            options.batch,
            options.sample,
        )
        filler = Filler(stack, await open_accounts(stack, options.accounts))
        turns = []
        for number in range(1, options.turns + 1):
            size = await filler.fill(options.entries)
            turns.append(await bench.turn())
            show(turns[-1], number)
        total = sum(turn.entries for turn in turns)
        print(
            f"best {max(turn.rate for turn in turns):,.0f} entries/s; an entry takes {size // options.entries} bytes in"
        )
        for name, (heap, indexes) in (await bench.sizes()).items():
            print(f"  {name:14} {heap / total:7.0f} bytes of rows, {indexes / total:6.0f} of indexes per session")
        began = time.monotonic()
        broken = await audit_queries.broken_rules(stack.pool, 600)
        print(f"the audit's rules over {total:,} entries: {len(broken)} broken, {time.monotonic() - began:.1f} s")
        assert broken == [], broken[:5]
        return turns
    finally:
        await stack.close()


def main(words: Sequence[str] | None = None) -> list[Turn]:
    """Run by `make prove-drain`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, default=200_000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--accounts", type=int, default=6_000)
    parser.add_argument("--batch", type=int, default=6_000)
    parser.add_argument("--sample", action="store_true")
    options = parser.parse_args(words)
    postgres, folder = PostgresServer(durable=True), Path(tempfile.mkdtemp(prefix="tg-", dir="/tmp"))
    redis = RedisServer(folder, appendonly=True)
    try:
        postgres.start()
        redis.start()
        return asyncio.run(measure(postgres, redis, options))
    finally:
        redis.kill()
        postgres.remove()
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
