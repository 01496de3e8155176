"""What a fault is given to work with, and what every fault is. Must not: hold a fault of its own."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, field
from random import Random
from typing import ClassVar

from loadtests.chaos.check import ChaosVerdict, Evidence
from loadtests.chaos.load import Load, Mix
from loadtests.chaos.world import Gateway, World
from loadtests.users.calls import Call


@dataclass
class Stage:
    """One run under way. `counts`: what the fault did, for the report. `by_hand`: charges that no client was told."""

    world: World
    random: Random
    load: Load
    seconds: float
    counts: Counter[str] = field(default_factory=Counter)
    by_hand: dict[str, int] = field(default_factory=dict)
    freed_s: float | None = None
    """From the death of a gateway until the last of its holds was freed."""
    rebuilt_s: float | None = None
    """From the moment at which Valkey can be asked again until every shard is usable and of one epoch with Postgres."""
    extra_calls: list[Call] = field(default_factory=list)

    async def rest(self, low_s: float, high_s: float) -> None:
        """Let the load work for a drawn time."""
        await asyncio.sleep(self.random.uniform(low_s, high_s))

    def gateway(self) -> Gateway:
        """One gateway, drawn."""
        return self.random.choice(self.world.gateways)


class Fault(ABC):
    """One row of the table of faults. `number` is its row, `name` its short name on the command line.

    `strike` runs while the load does and returns when the fault is over; the world must then be able to recover by
    itself. `judge` adds what this fault alone must hold.
    """

    number: ClassVar[int]
    name: ClassVar[str]
    title: ClassVar[str]
    mix: ClassVar[Mix] = Mix()
    unbilled_bound: ClassVar[int | None] = None
    absorbs: ClassVar[bool] = False
    forks: ClassVar[bool] = False
    """Whether the same credit may be sold by two servers."""
    seconds_least: ClassVar[float] = 0.0
    """How long the load lasts at least."""

    @abstractmethod
    async def strike(self, stage: Stage) -> None:
        """Do it. Raises ChaosError when the world cannot be put in order again."""

    async def judge(self, stage: Stage, evidence: Evidence, verdict: ChaosVerdict) -> None:  # noqa: B027 - most need none
        """What else must hold; called when all is drained. Repairs what a person would have to repair."""
