"""What a worker knows about its candidates now: one `Live` for each provider and model, whatever routes name it.

Must not: choose among candidates, or speak to anyone.
"""

from __future__ import annotations

import random

from config.providers import Provider
from config.routing import Breaker as BreakerTable
from providers.breaker import Breaker, BreakerPolicy
from providers.latency import PeakEwma
from providers.routing import Live
from proxy.places import Places, build_places
from proxy.shared_breakers import breaker_policy

LATENCY_HALF_LIFE_S = 20.0
"""How long until half of what is known of a candidate's latency is forgotten."""


class Lives:
    """The candidates of one worker. `worker` is its number of how many."""

    def __init__(self, table: BreakerTable, worker: tuple[int, int] = (0, 1)) -> None:
        self._policy: BreakerPolicy = breaker_policy(table)
        self._missing_s = table.model_missing_ms / 1000
        self._number, self._workers = worker
        self.known: dict[tuple[str, str], Live] = {}
        self.places: dict[str, Places] = {}

    def provider(self, name: str, provider: Provider) -> Places | None:
        """A provider's places, where they are bounded. Made once."""
        if name not in self.places and provider.bounded:
            made = build_places(name, provider, self._workers, self._number)
            if made is not None:
                self.places[name] = made
        return self.places.get(name)

    def of(self, provider: str, model: str) -> Live:
        """The live state of a provider's model. Made once."""
        live = self.known.get((provider, model))
        if live is None:
            places = self.places.get(provider)
            live = self.known[provider, model] = Live(
                Breaker(self._policy, random.random),
                PeakEwma(LATENCY_HALF_LIFE_S),
                PeakEwma(LATENCY_HALF_LIFE_S),
                bulkhead=None if places is None else places.bulkhead,
                missing_s=self._missing_s,
            )
        return live

    def named(self, provider: str) -> tuple[tuple[str, Live], ...]:
        """All of a provider's, by name."""
        return tuple((f"{name}/{model}", live) for (name, model), live in self.known.items() if name == provider)
