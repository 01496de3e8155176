"""The providers that all calls of a schedule share: what is known of them, their places, and the attempts at them.

Must not: move anything, or judge what happened.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import msgspec

from config.price import CompiledPrice
from providers.breaker import Breaker, BreakerPolicy
from providers.bulkhead import Bulkhead, Limits, QueuePolicy, Refusal
from providers.latency import PeakEwma, RecentQuantiles
from providers.routing import Live
from proxy.candidates import Candidate
from proxy.live_session import Attempt
from proxy.places import Places, Waiting
from tests.support.simulation.links import Socket
from tests.support.simulation.loop import VirtualLoop
from tests.support.simulation.provider import Kind, Script
from tests.support.simulation.witness import at_least, cost_of

PROVIDERS = 3
LONG_S = 1e6
"""Longer than any schedule: a probe that is not handed back is missed, and observations stay."""
KNOWN_S = (0.05, 0.1, 0.3, 0.8)


@dataclass
class Tried:
    """One attempt that was sent, as the schedule knows it. `beside`: while another one ran."""

    number: int
    walk: int
    """How many breaks of the stream came before it: each begins a walk of its own."""
    at: int
    """The place of its provider among all."""
    candidate: Candidate
    attempt: Attempt
    script: Script
    resumed: bool = False
    beside: Tried | None = None
    socket: Socket | None = None

    @property
    def price(self) -> CompiledPrice:
        """What its words cost: who goes on with another's text is not paid per request."""
        price = self.candidate.price
        return msgspec.structs.replace(price, request=0) if self.resumed else price

    @property
    def shown(self) -> bool:
        """Whether content has come."""
        return self.socket is not None and self.socket.shown

    @property
    def running(self) -> bool:
        """Whether it has a connection, or will have one, that is not over."""
        return self.attempt.outcome == "running"

    def texts(self) -> dict[Kind, str]:
        """All that a client is to get of what has come."""
        return {} if self.socket is None else self.socket.texts()

    def cost(self, prompt: int, texts: dict[Kind, str]) -> int:
        """Micros of these texts, with what has been reported beside them."""
        if self.resumed:
            return cost_of(self.price, 0, texts)
        seen = None if self.socket is None else self.script.seen(self.socket.given)
        return cost_of(self.price, prompt, texts) if seen is None else at_least(self.price, prompt, texts, seen)

    def output(self, texts: dict[Kind, str]) -> int:
        """Output tokens of the same."""
        seen = None if self.socket is None or self.resumed else self.script.seen(self.socket.given)
        said = sum(text.count(" ") for text in texts.values())
        return said if seen is None else max(said, seen.output)


@dataclass
class Part:
    """What one attempt gave to an answer before its stream broke, and what that costs."""

    tried: Tried
    texts: dict[Kind, str]
    micros: int
    output: int


class _Places(Places):
    """Places that tell who waits."""

    told: Callable[[str], None]

    def begin_wait(self, model: str, tokens: float, patience_s: float) -> Waiting | Refusal:
        waiting = super().begin_wait(model, tokens, patience_s)
        self.told("queue refused" if isinstance(waiting, Refusal) else "queued")
        return waiting


@dataclass
class Known:
    """One provider as all calls see it."""

    live: Live
    places: Places | None
    concurrent: int | None
    probes: list[str] = field(default_factory=list)


def known(loop: VirtualLoop, rng: Random, told: Callable[[str], None]) -> list[Known]:
    """All providers of a schedule. `told` hears the names of paths."""
    found = []
    policy = BreakerPolicy(
        consecutive_max=rng.choice((1, 1, 2, 100)),
        open_s=rng.choice((0.05, 0.5)),
        open_s_max=4.0,
        key_refused_s=rng.choice((0.0, 0.5)),
        probe_s=LONG_S,
    )
    for number in range(PROVIDERS):
        live = Live(Breaker(policy, rng.random), PeakEwma(20.0), PeakEwma(20.0), RecentQuantiles(age_s_max=LONG_S))
        assert live.recent is not None
        for _ in range(5):
            live.recent.observe(rng.choice(KNOWN_S), loop.time())
        places, concurrent = None, rng.choice((None, None, 1, 1, 2))
        if concurrent is not None:
            queue = QueuePolicy(rng.choice((0, 0, 1, 5)), rng.choice((0.3, 2.0)))
            places = _Places(f"p{number}", Bulkhead(Limits(concurrent), {}, queue), loop.time)
            places.told = told
            live.bulkhead = places.bulkhead
        found.append(Known(live, places, concurrent))
    return found
