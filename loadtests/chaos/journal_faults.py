"""Faults of Postgres and of those who bring it the journal. Row numbers are in each class.

Must not: leave anything spoilt behind when `strike` has returned.
"""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial

import psutil

from loadtests.chaos.check import ChaosVerdict, Evidence
from loadtests.chaos.load import Mix
from loadtests.chaos.proxy import Toxic
from loadtests.chaos.stage import Fault, Stage
from loadtests.chaos.world import until

STEADY = Mix(leaving=0.05, unlucky=0.0)


class _Unaffected(Fault):
    """Calls of keys that are known go on as if nothing were."""

    async def judge(self, stage: Stage, evidence: Evidence, verdict: ChaosVerdict) -> None:
        hurt = [call for call in stage.load.calls if call.ending in ("failed", "refused", "broken")]
        verdict.same("calls that Postgres' trouble hurt", [f"{one.status} {one.error}" for one in hurt[:3]], [])


class PostgresDown(_Unaffected):
    """Row 18: down for some seconds, started again."""

    number, name, title, mix = 18, "postgres-down", "Postgres is down (immediate shutdown), then started again", STEADY

    async def strike(self, stage: Stage) -> None:
        await stage.rest(1.0, 2.0)
        await asyncio.to_thread(stage.world.postgres.stop)
        await asyncio.sleep(stage.seconds * 0.4)
        await asyncio.to_thread(stage.world.postgres.start)


class PostgresKilled(_Unaffected):
    """Row 18: kill -9, several times."""

    number, name, title, mix = 18, "postgres-kill", "Postgres is killed with kill -9, again and again", STEADY

    async def strike(self, stage: Stage) -> None:
        for _ in range(3):
            await stage.rest(1.0, 2.0)
            await asyncio.to_thread(stage.world.postgres.kill)
            stage.counts["servers killed"] += 1
            await asyncio.to_thread(stage.world.postgres.start)


class PostgresSlow(_Unaffected):
    """Row 18: slow, frozen, its links cut in the middle of transactions, and a lock that somebody else holds."""

    number, name, title, mix = 18, "postgres-slow", "Postgres slow, frozen, cut off, and with a table locked", STEADY

    async def strike(self, stage: Stage) -> None:
        world, links = stage.world, stage.world.links("postgres")
        for link in links:
            link.spoil(Toxic(up_s=0.15, down_s=0.15))
        await stage.rest(2.0, 3.0)
        world.calm()
        stage.counts["connections cut"] += sum(link.cut(reset=True) for link in links)
        await stage.rest(0.5, 1.0)
        world.postgres.freeze(True)
        try:
            await stage.rest(2.0, 3.0)
        finally:
            world.postgres.freeze(False)
        connection = await world.postgres_connection()
        try:
            async with connection.transaction():
                await connection.execute("LOCK TABLE shard_cursor IN ACCESS EXCLUSIVE MODE")
                await stage.rest(2.0, 3.0)
        finally:
            await connection.close()


class FlusherKills(_Unaffected):
    """Row 19: each gateway has a ledger process, so two of them compete for the journal."""

    number, name, title, mix = (
        19,
        "flusher-kills",
        "ledger processes are killed, again and again",
        STEADY,
    )

    async def strike(self, stage: Stage) -> None:
        for _ in range(8):
            await stage.rest(0.3, 1.2)
            gateway = stage.gateway()
            for process in gateway.family("gateway.ledger_process"):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
                    stage.counts["ledger processes killed"] += 1
            await until(partial(gateway.family, "gateway.ledger_process"), 30, "a new ledger process")

    async def judge(self, stage: Stage, evidence: Evidence, verdict: ChaosVerdict) -> None:
        await super().judge(stage, evidence, verdict)
        verdict.expect(stage.counts["ledger processes killed"] > 0, "no ledger process was killed")


FAULTS: tuple[type[Fault], ...] = (PostgresDown, PostgresKilled, PostgresSlow, FlusherKills)
