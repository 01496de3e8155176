"""A provider whose model list is probed: its candidates, a clock that stands still, and what the probes said."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from itertools import count
from typing import Any

from prometheus_client import REGISTRY

from providers.breaker import Breaker, BreakerPolicy, Change, State
from providers.codec import Upstream
from providers.latency import PeakEwma
from providers.routing import Live
from proxy import telemetry
from proxy.http_request import Origin
from proxy.httpx_exchange import HttpxPool
from proxy.live_session import Clock
from proxy.probes import Probes, ProbeTarget
from tests.support.rawserver import RawServer, Script, transport_with, until

POLICY = BreakerPolicy(consecutive_max=2, open_s=5.0)
LATER_S = 1_000.0
"""After every opening is over."""
NUMBERS = count()


class World:
    """A provider's candidates, a clock that stands still, and what the probes said."""

    def __init__(self, *models: str, kind: str = "openai", key: str | None = "k") -> None:
        self.now = 100.0
        self.name = f"probed-{next(NUMBERS)}"
        self.upstream = Upstream(self.name, kind, b"/v1", key)
        self.lives = {
            model: Live(Breaker(POLICY, lambda: 0.0), PeakEwma(20.0), PeakEwma(20.0)) for model in models or ("a",)
        }
        self.changes: list[tuple[str, Change]] = []

    @property
    def live(self) -> Live:
        """The first candidate."""
        return next(iter(self.lives.values()))

    def target(
        self, origin: Origin, pool: HttpxPool | None = None, *, every_s: float = 60.0, timeout_s: float = 20.0
    ) -> ProbeTarget:
        return ProbeTarget(self.upstream, origin, pool, every_s, timeout_s, list(self.lives.items()))

    def counted(self, result: str) -> float:
        """How many probes came to this result."""
        telemetry.publish()
        labels = {"provider": self.name, "result": result}
        return REGISTRY.get_sample_value("tollgate_probes_total", labels) or 0.0

    def shown_missing(self, model: str) -> float | None:
        return REGISTRY.get_sample_value("tollgate_model_missing", {"provider": self.name, "model": model})

    def open_breaker(self, *, key_refused: bool = False) -> None:
        """Open the first candidate's breaker, and let its time pass."""
        breaker = self.live.breaker
        for _ in range(1 if key_refused else POLICY.consecutive_max):
            permit = breaker.try_pass(self.now)
            assert permit is not None
            breaker.failed(permit, self.now, key_refused=key_refused)
        assert breaker.state is State.OPEN
        self.now += LATER_S


@contextlib.asynccontextmanager
async def probing(world: World, *targets: ProbeTarget, connections_max: int | None = None) -> AsyncIterator[Probes]:
    """The probes of these targets, started; at the end nothing of them is left."""
    before = asyncio.all_tasks()
    async with transport_with(connections_max=connections_max) as transport:
        clock = Clock(monotonic=lambda: world.now)
        running = Probes(
            targets, transport, lambda name, change: world.changes.append((name, change)), clock=clock, draw=lambda: 0.5
        )
        running.start()
        try:
            yield running
        finally:
            await running.aclose()
            assert transport.counts().active == 0
    await until(lambda: not {task for task in asyncio.all_tasks() - before if task.get_name().startswith("probe of")})


async def once(world: World, script: Script, result: str) -> RawServer:
    """One probe of a server with this script, which must come to `result`."""
    async with RawServer(script) as server, probing(world, world.target(server.origin)):
        await until(lambda: world.counted(result) == 1)
    return server


def reply(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    head = "".join(f"{line}\r\n" for line in (f"HTTP/1.1 {status}", *headers, f"content-length: {len(body)}"))
    return head.encode() + b"\r\n" + body


def listed(*ids: str, **more: Any) -> bytes:
    return reply(json.dumps({"object": "list", "data": [{"id": each} for each in ids], **more}).encode())
