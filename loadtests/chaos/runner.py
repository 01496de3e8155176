"""One run: load, a fault in the middle of it, then everything must come to rest and every record must agree.

Must not: know any fault, or print (`__main__` does).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from random import Random
from typing import Any

from loadtests.chaos import (
    check,
    collect,
    failover_faults,
    faults,
    grant_faults,
    journal_faults,
    loss_faults,
    store_faults,
)
from loadtests.chaos.check import ChaosVerdict, Evidence
from loadtests.chaos.load import Door, Load, body, one_call
from loadtests.chaos.servers import ChaosError
from loadtests.chaos.stage import Fault, Stage
from loadtests.chaos.world import Gateway, World
from loadtests.users.calls import Manner

_KINDS = (faults, store_faults, journal_faults, loss_faults, failover_faults, grant_faults)
FAULTS: dict[str, type[Fault]] = {
    fault.name: fault
    for fault in sorted((one for kind in _KINDS for one in kind.FAULTS), key=lambda fault: (fault.number, fault.name))
}
SERVING_S = 30.0
THREADS = 160
TAIL_S = 1.5
"""How long the load goes on after the fault is over and every gateway answers."""


@dataclass
class Result:
    """What one run came to. Times in seconds, money in micros. `serving_s`: from the end of the fault until every
    gateway has answered a call; `drained_s`: from the last call's end until nothing is held and Postgres has all;
    `freed_s`: from a gateway's death until the last of its holds was freed; `rebuilt_s`: from when Valkey can be asked
    again after it lost something until every shard is usable."""

    fault: str
    number: int
    title: str
    seed: str
    started_at: float = field(default_factory=time.time)
    load_s: float = 0.0
    sessions: int = 0
    calls: dict[str, int] = field(default_factory=dict)
    charged_micros: int = 0
    micros: int = 0
    unbilled_max: int = 0
    serving_s: float = 0.0
    drained_s: float = 0.0
    freed_s: float | None = None
    rebuilt_s: float | None = None
    checked: dict[str, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "ok": self.ok}


def chosen(names: Iterable[str]) -> list[str]:
    """The faults of these names, all where none is named. Raises ChaosError for one that does not exist."""
    wanted = list(names) or list(FAULTS)
    unknown = [name for name in wanted if name not in FAULTS]
    if unknown:
        raise ChaosError(f"no such fault: {', '.join(unknown)}. There are: {', '.join(FAULTS)}")
    return wanted


def use_threads() -> None:
    """Enough threads for the calls that faults make themselves; the running loop's executor."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS))


async def run(world: World, fault: Fault, seed: str, *, seconds: float, clients: int) -> Result:
    """One run of one fault. What goes wrong is in the result's findings; raises only what nobody foresaw."""
    result = Result(fault.name, fault.number, fault.title, seed)
    door = Door(
        [gateway.front.port for gateway in world.gateways],
        [gateway.port for gateway in world.gateways],
        [account.key for account in world.customers],
    )
    load = Load(door, clients, seed, fault.mix)
    stage = Stage(world, Random(f"{seed}:fault"), load, seconds)
    verdict = ChaosVerdict()
    load.start()
    try:
        await _strike(fault, stage, result)
    except ChaosError as trouble:
        verdict.findings.append(str(trouble))
    finally:
        world.calm()
        load.stop()
        await asyncio.to_thread(load.join)
    result.load_s = time.time() - result.started_at
    await _judge(fault, stage, result, verdict)
    _fill(result, stage, verdict)
    return result


async def _strike(fault: Fault, stage: Stage, result: Result) -> None:
    """The fault under load, and how long until every gateway serves again."""
    began = time.monotonic()
    await fault.strike(stage)
    over = time.monotonic()
    calls = await asyncio.gather(*(_serves(stage, gateway) for gateway in stage.world.gateways))
    result.serving_s = time.monotonic() - over
    if not all(calls):
        raise ChaosError(f"not every gateway serves {SERVING_S:g} s after the fault")
    left = stage.seconds - (time.monotonic() - began)
    await asyncio.sleep(max(TAIL_S, left))


async def _serves(stage: Stage, gateway: Gateway) -> bool:
    """Whether it answers a call within `SERVING_S`, tried again and again."""
    random, key = Random(0), stage.world.customers[0].key
    deadline = time.monotonic() + SERVING_S
    while time.monotonic() < deadline:
        fields = body("gpt-4o-mini", 2, stream=False, random=random)
        call = await asyncio.to_thread(one_call, gateway.front.port, key, fields, Manner(leave_after_s=5), "probe")
        stage.extra_calls.append(call)
        if call.ending == "completed":
            return True
        await asyncio.sleep(0.1)
    return False


async def _judge(fault: Fault, stage: Stage, result: Result, verdict: ChaosVerdict) -> None:
    world = stage.world
    result.drained_s, left = await collect.drained(world)
    verdict.expect(not left, f"after {collect.DRAIN_S:g} s there are still {left}")
    since = result.started_at - 0.5
    try:
        rows = await collect.sessions(world, world.accounts, since)
        evidence = Evidence(
            rows, await collect.served(world, rows, since), [*stage.load.calls, *stage.extra_calls], stage.by_hand,
            fault.absorbs, fault.forks, fault.unbilled_bound,
        )  # fmt: skip
        check.check_sessions(evidence, verdict)
        for state in await collect.account_states(world, world.accounts):
            check.check_account(state, verdict)
        for grant in await collect.grant_states(world, world.accounts):
            check.check_grant(grant, verdict)
        await fault.judge(stage, evidence, verdict)
        check.check_audit(await world.tollgate("audit", codes=(0, 1)), verdict)
    except (ChaosError, *collect.OUT_OF_ORDER) as trouble:
        verdict.findings.append(f"the stores cannot be checked: {type(trouble).__name__}: {trouble}")
        return
    result.sessions = len(rows)
    result.charged_micros = sum(row["charged"] for row in rows)


def _fill(result: Result, stage: Stage, verdict: ChaosVerdict) -> None:
    if stage.load.running:
        verdict.findings.append(f"{stage.load.running} clients still wait for an answer")
    for call in (*stage.load.calls, *stage.extra_calls):
        result.calls[call.ending] = result.calls.get(call.ending, 0) + 1
    result.freed_s, result.rebuilt_s = stage.freed_s, stage.rebuilt_s
    result.micros, result.unbilled_max = verdict.micros, verdict.unbilled_max
    result.checked, result.counts = dict(verdict.checked), dict(stage.counts)
    result.findings = verdict.findings
