"""Faults in which a replica takes over. Row numbers are in each class.

Must not: leave anything spoilt behind when `strike` has returned, or help the gateways to find out.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from typing import ClassVar

from loadtests.chaos import failover, usable
from loadtests.chaos.check import ChaosVerdict, Evidence
from loadtests.chaos.load import body, one_call
from loadtests.chaos.loss_faults import Lost
from loadtests.chaos.proxy import Toxic
from loadtests.chaos.servers import Valkey
from loadtests.chaos.stage import Stage
from loadtests.chaos.world import Account, Gateway, client_of
from loadtests.users.calls import Call, Manner

LAG_S = 0.3
ALARM = "Redis is in epoch"
"""What a journal and a recovery say of a Redis that is not where Postgres is."""


class Promoted(Lost):
    """What both rows have in common: the old primary comes back as the new one's replica, and no shard goes on in the
    epoch that it had."""

    async def strike(self, stage: Stage) -> None:
        await super().strike(stage)
        await failover.rejoin(stage.world)

    async def judge(self, stage: Stage, evidence: Evidence, verdict: ChaosVerdict) -> None:
        await failover.until_following(stage.world)
        await super().judge(stage, evidence, verdict)
        verdict.same("shards in a new epoch", self._raised, len(self._before))
        stage.counts["NOSCRIPT answers"] = await failover.errors(stage.world.valkey, "NOSCRIPT")
        verdict.expect(stage.counts["NOSCRIPT answers"] > 0, "the new primary knew every script")


class FailedOver(Promoted):
    """Row 13. The replica is behind when the primary dies, and takes over; the old primary follows it later."""

    number, name = 13, "failover"
    title = "the primary is killed while its replica is 300 ms behind, and the replica takes over"

    async def lose(self, stage: Stage) -> None:
        world = stage.world
        world.replication.spoil(Toxic(down_s=LAG_S))
        await stage.rest(1.5, 2.5)
        killed = time.time()
        await asyncio.to_thread(world.valkey.kill)
        stage.counts["replication connections cut"] += world.replication.cut(reset=True)  # with what was under way
        await failover.promote(world.replica)
        failover.swap(world)
        failover.lead(world.gateways, world.valkey)
        told = [call.at + call.total_ms / 1000 for call in stage.load.calls if call.told_micros]
        stage.counts[f"charges told in the last {LAG_S:g} s"] += sum(killed - LAG_S < at < killed for at in told)


class SplitBrain(Promoted):
    """Row 14. One gateway stays with the old primary, the others go to the promoted replica; both sell the same credit.

    The old primary has the settings that docs/operations.md asks for, so it stops taking writes some seconds after it
    has last heard of a replica. Then the network is whole again: the gateway is led to the new primary, and the old
    one follows it.
    """

    number, name = 14, "split-brain"
    title = "the old primary goes on behind a partition with one gateway, the others use the promoted replica"
    absorbs = forks = True
    WITHIN_S: ClassVar[float] = 20.0
    REFUSALS: ClassVar[frozenset[int]] = frozenset({402, 503})
    MAX_LAG_S: ClassVar[int] = 3
    STOPS_S: ClassVar[float] = MAX_LAG_S + 2.0
    """The lag is counted in whole seconds, once a second."""
    POOR_CREDITS: ClassVar[str] = "0.004"
    STREAMS: ClassVar[int] = 6
    PROMOTED_S: ClassVar[float] = 5.0
    """How long the new primary is waited for while the old one can still be used."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[asyncio.Task[Call]] = []
        self._poor: Account | None = None
        self._promoting: asyncio.Task[float | None] | None = None
        self._log, self._from = Path(), 0

    async def lose(self, stage: Stage) -> None:
        world = stage.world
        poor, quiet = await world.account(self.POOR_CREDITS), await world.account()
        self._poor, old, stays = poor, world.valkey, stage.gateway()
        others = [gateway for gateway in world.gateways if gateway is not stays]
        self._log = stays.folder / "log"
        self._from = self._log.stat().st_size
        await self._demand(old, 1)
        try:
            world.replication.spoil(Toxic(stalled=True, refuse=True))
            parted = time.monotonic()
            await failover.promote(world.replica)
            failover.swap(world)
            failover.lead(others, world.valkey)
            self._sell(stage, [stays], poor, 400)
            stopped = asyncio.create_task(failover.stops_writing(old, self.STOPS_S + 10))
            self._promoting = asyncio.create_task(usable.until_usable(world, parted))
            await asyncio.wait({self._promoting}, timeout=self.PROMOTED_S)
            stage.counts["both primaries in use"] += self._promoting.done() and not stopped.done()
            self._sell(stage, others, poor, 400)
            # An account that nobody has used since the servers were parted: its entries get the same numbers on both
            # sides, and those of the old one arrive first.
            self._sell(stage, [stays], quiet, 3)
            await asyncio.sleep(0.8)
            for _ in range(2):
                self._sell(stage, others, quiet, 3)
            stage.counts["ms until the old primary refused writes"] = round((await stopped - parted) * 1000)
            await stage.rest(1.0, 3.0)
        finally:
            await self._demand(old, 0)
        failover.lead([stays], world.valkey)

    async def _demand(self, server: Valkey, replicas: int) -> None:
        async with contextlib.aclosing(client_of(server)) as store:
            await store.config_set("min-replicas-max-lag", str(self.MAX_LAG_S))
            await store.config_set("min-replicas-to-write", str(replicas))

    def _sell(self, stage: Stage, gateways: list[Gateway], account: Account, tokens: int) -> None:
        """Streams of one account, several at once at each of these gateways."""
        for gateway in gateways:
            for _ in range(self.STREAMS):
                fields = body("gpt-4o-mini", tokens, stream=True, random=stage.random)
                manner = Manner(leave_after_s=60)
                call = asyncio.to_thread(one_call, gateway.front.port, account.key, fields, manner, "extra")
                self._calls.append(asyncio.create_task(call))

    async def strike(self, stage: Stage) -> None:
        await super().strike(stage)
        stage.extra_calls += await asyncio.gather(*self._calls)

    async def judge(self, stage: Stage, evidence: Evidence, verdict: ChaosVerdict) -> None:
        await super().judge(stage, evidence, verdict)
        assert self._poor is not None
        assert self._promoting is not None
        promoted_s = await self._promoting  # the longer of: until the new primary was used, and until all was again
        stage.rebuilt_s = None if None in (stage.rebuilt_s, promoted_s) else max(stage.rebuilt_s or 0, promoted_s or 0)
        with self._log.open(encoding="utf-8", errors="replace") as log:
            log.seek(self._from)
            alarms = sum(ALARM in line for line in log)
        stage.counts["alarms of the gateway that stayed"] = alarms
        verdict.expect(alarms > 0, "the gateway that stayed with the old primary did not notice")
        stopped = stage.counts["ms until the old primary refused writes"]
        verdict.expect(stopped <= self.STOPS_S * 1000, f"the old primary took writes for {stopped} ms")
        granted = round(float(self.POOR_CREDITS) * 1_000_000)
        mine = [row for row in evidence.sessions if row["account_id"] == self._poor.id]
        others = [row for row in evidence.sessions if row["account_id"] != self._poor.id]
        charged, absorbed = sum(row["charged"] for row in mine), sum(row["absorbed"] for row in mine)
        stage.counts["micros sold twice, absorbed by the house"] = absorbed
        verdict.at_most("charged on the small credit", charged, granted)
        verdict.at_most("sold twice of the small credit", absorbed, granted)
        verdict.equal("absorbed of accounts with credit", sum(row["absorbed"] for row in others), 0)


FAULTS: tuple[type[Lost], ...] = (FailedOver, SplitBrain)
