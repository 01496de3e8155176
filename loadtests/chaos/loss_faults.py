"""Faults in which Valkey loses what it had: the end of its file, or everything. Row numbers are in each class.

Must not: leave anything spoilt behind when `strike` has returned, or help the gateways to find out.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from abc import abstractmethod
from collections import deque
from pathlib import Path
from typing import ClassVar

from loadtests.chaos import usable
from loadtests.chaos.check import ChaosVerdict, Evidence
from loadtests.chaos.servers import Valkey
from loadtests.chaos.stage import Fault, Stage

TAIL_S = 1.0
SAMPLE_S = 0.02


class Lost(Fault):
    """A loss that the gateways must notice by themselves, and make good within `WITHIN_S`.

    Whoever is refused meanwhile is told 503; whoever was told a charge finds it in Postgres, as after every run.
    """

    WITHIN_S: ClassVar[float] = 10.0
    REFUSALS: ClassVar[frozenset[int]] = frozenset({503})

    def __init__(self) -> None:
        self._before: dict[int, int] = {}
        self._raised = 0
        self._watch: asyncio.Task[float | None] | None = None

    async def strike(self, stage: Stage) -> None:
        await stage.rest(2.0, 3.5)
        self._before = await usable.epochs(stage.world)
        await self.lose(stage)
        self._watch = asyncio.create_task(usable.until_usable(stage.world, time.monotonic()))

    @abstractmethod
    async def lose(self, stage: Stage) -> None:
        """Lose it. The server answers again when this returns."""

    async def judge(self, stage: Stage, evidence: Evidence, verdict: ChaosVerdict) -> None:
        assert self._watch is not None
        stage.rebuilt_s = await self._watch
        after = await usable.epochs(stage.world)
        self._raised = sum(after[shard] > epoch for shard, epoch in self._before.items())
        stage.counts["shards rebuilt"] = self._raised
        verdict.expect(self._raised > 0, "nobody noticed that anything was lost")
        took = stage.rebuilt_s
        verdict.expect(took is not None and took <= self.WITHIN_S, f"rebuilt after {took} s, {self.WITHIN_S:g} at most")
        refused = {call.status for call in evidence.calls if call.ending == "refused"}
        stage.counts["calls refused"] = sum(call.ending == "refused" for call in evidence.calls)
        verdict.same("statuses of refused calls", sorted(refused - self.REFUSALS), [])


class TailLost(Lost):
    """Row 11. A power loss, by what it leaves: a file without its last second, and a server that starts from it."""

    number, name = 11, "valkey-tail-loss"
    title = "Valkey is killed, its append-only file loses its last second, and it starts from the rest"

    async def lose(self, stage: Stage) -> None:
        valkey = stage.world.valkey
        file, size = await self._a_second_ago(valkey)
        killed = time.time()
        await asyncio.to_thread(valkey.kill)
        stage.counts["bytes lost"] += file.stat().st_size - size
        with file.open("r+b") as log:
            log.truncate(size)
        await stage.rest(0.2, 1.0)
        await asyncio.to_thread(valkey.start)
        told = [call.at + call.total_ms / 1000 for call in stage.load.calls if call.told_micros]
        stage.counts["charges told within the lost second"] += sum(killed - TAIL_S < at < killed for at in told)

    async def _a_second_ago(self, valkey: Valkey) -> tuple[Path, int]:
        """The file and its size `TAIL_S` ago, of what is sampled until that is known."""
        samples: deque[tuple[float, Path, int]] = deque()
        while not samples or time.monotonic() - samples[0][0] < TAIL_S:
            samples.append((time.monotonic(), *valkey.log_end()))
            await asyncio.sleep(SAMPLE_S)
        _, file, size = samples[0]
        return file, size

    async def judge(self, stage: Stage, evidence: Evidence, verdict: ChaosVerdict) -> None:
        await super().judge(stage, evidence, verdict)
        verdict.expect(stage.counts["bytes lost"] > 0, "the last second had nothing to lose")


class Wiped(Lost):
    """Row 12, by a command: the server is the same, and empty."""

    number, name, title = 12, "valkey-wiped", "Valkey is wiped with FLUSHALL"

    async def lose(self, stage: Stage) -> None:
        store = stage.world.redis()
        async with contextlib.aclosing(store):
            stage.counts["keys lost"] += await store.dbsize()
            await store.flushall()

    async def judge(self, stage: Stage, evidence: Evidence, verdict: ChaosVerdict) -> None:
        await super().judge(stage, evidence, verdict)
        verdict.same("shards rebuilt", self._raised, len(self._before))


class FileLost(Wiped):
    """Row 12, by a restart without its file. The replica follows the empty server."""

    number, name, title = 12, "valkey-file-lost", "Valkey is killed and started again without its append-only file"

    async def lose(self, stage: Stage) -> None:
        valkey = stage.world.valkey
        await asyncio.to_thread(valkey.kill)
        stage.counts["bytes lost"] += valkey.lose_data()
        await stage.rest(0.2, 1.0)
        await asyncio.to_thread(valkey.start)


FAULTS: tuple[type[Fault], ...] = (TailLost, Wiped, FileLost)
