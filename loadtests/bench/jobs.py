"""The load process: one job from stdin (JSON), its measured window as JSON on stdout.

Jobs: `closed` (each connection sends again when its answer ended, or at a fixed `rate` of them all), `streams` (so many
paced streams at once, until they are told to end), `latency` (one request at a time, the targets in turn). CPU time and
counters are read together at both ends of the window, so that a figure is a difference over a difference, without start
and end.
Must not: judge a figure; scenarios.py does.
"""

from __future__ import annotations

import asyncio
import functools
import json
import sys
import time
from typing import Any

import uvloop

from loadtests.bench import procstat, wire
from loadtests.bench.client import Load, Totals, as_json

GRACE_S = 240.0
ENDLESS = 1_000_000_000


class Job:
    """One load on one target. `spec` is the job as stdin brought it."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._spec = spec
        self._totals = Totals()
        self._groups = {name: tuple(pids) for name, pids in spec["groups"].items()}
        self._live: set[Load] = set()
        self._stopped = False
        self._empty = asyncio.Event()
        self._request = b""
        self._every = spec["connections"] / spec["rate"] if spec["kind"] == "closed" and spec.get("rate") else 0.0
        self._due: dict[Load, float] = {}

    async def run(self) -> dict[str, Any]:
        """The result: the window, the totals of the whole job, memory at its ends."""
        spec = self._spec
        idle = procstat.rss_of(self._groups)
        await (self._closed() if spec["kind"] == "closed" else self._streams())
        await asyncio.sleep(spec["warm_s"])
        window = await self._window(spec["window_s"])
        self._stopped = True
        if spec["kind"] == "streams":
            await _end_streams(spec["origin"])
        if self._live:
            await self._drained()
        return {"window": window, "rss_before": idle, **as_json(self._totals)}

    async def _drained(self) -> None:
        """Wait until every answer is over; what an overloaded target has in its buffers takes a while."""
        try:
            await asyncio.wait_for(self._empty.wait(), GRACE_S)
        except TimeoutError:
            unfinished = f"{len(self._live)} answers were not over {GRACE_S:.0f} s after the upstream had ended them"
            self._totals.errors[unfinished] += 1

    async def _window(self, seconds: float) -> dict[str, Any]:
        """Read, wait, read again."""
        totals = self._totals
        began, cpu, own = time.monotonic(), procstat.cpu_of(self._groups), time.process_time()
        finished, events, reads = totals.finished, totals.events, totals.reads
        await asyncio.sleep(seconds)
        used = procstat.difference(procstat.cpu_of(self._groups), cpu)
        return {
            "seconds": time.monotonic() - began,
            "cpu": used | {"load": time.process_time() - own},
            "rss": procstat.rss_of(self._groups),
            "requests": totals.finished - finished,
            "events": totals.events - events,
            "reads": totals.reads - reads,
        }

    async def _connect(self) -> Load:
        loop = asyncio.get_running_loop()
        exact = bool(self._spec["exact"])
        _, load = await loop.create_connection(
            lambda: Load(self._totals, self._ended, exact=exact), "127.0.0.1", self._spec["port"]
        )
        self._live.add(load)
        return load

    async def _closed(self) -> None:
        spec = self._spec
        plan = f"chunks={spec['chunks']} rate=0" if spec["stream"] else ""
        self._request = wire.request(spec["port"], spec["key"], plan=plan, stream=spec["stream"], model=spec["model"])
        for number in range(spec["connections"]):
            load = await self._connect()
            if self._every:
                self._turn(load, asyncio.get_running_loop().time() + self._every * number / spec["connections"])
            else:
                self._ask(load)

    def _ask(self, load: Load) -> None:
        load.send(wire.asked_anew(self._request, self._totals.sent))

    def _turn(self, load: Load, due: float) -> None:
        """Send at `due` (loop time), and then once in every interval, later only where an answer is."""
        if self._stopped or not load.open:
            self._drop(load)
            return
        self._due[load] = due
        asyncio.get_running_loop().call_at(due, self._send, load)

    def _send(self, load: Load) -> None:
        if self._stopped or not load.open:
            self._drop(load)
        else:
            self._ask(load)

    async def _streams(self) -> None:
        spec = self._spec
        loop = asyncio.get_running_loop()
        began = loop.time()
        plan = f"chunks={ENDLESS} rate={spec['rate']}"
        request = wire.request(spec["port"], spec["key"], plan=plan, stream=True, model=spec["model"])
        for number in range(spec["streams"]):
            wait = began + spec["ramp_s"] * number / spec["streams"] - loop.time()
            if wait > 0:
                await asyncio.sleep(wait)
            (await self._connect()).send(request)
        while self._totals.begun < spec["streams"] and not self._totals.errors:
            if loop.time() > began + GRACE_S:
                raise TimeoutError(f"only {self._totals.begun} of {spec['streams']} streams began")
            await asyncio.sleep(0.05)

    def _ended(self, load: Load) -> None:
        if self._every:
            self._turn(load, self._due[load] + self._every)
        elif self._request and not self._stopped and load.open:
            self._ask(load)
        else:
            self._drop(load)

    def _drop(self, load: Load) -> None:
        load.close()
        self._live.discard(load)
        if not self._live:
            self._empty.set()


async def _end_streams(port: int) -> None:
    """Tell the upstream that every stream is to end with its next chunk."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(wire.request(port, "", plan=wire.END))
    await reader.read(1)
    writer.close()


async def latency(spec: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds to the first content of each request, by target, one at a time and the targets in turn."""
    totals = {name: Totals() for name in spec["ports"]}
    over = asyncio.Event()
    loop = asyncio.get_running_loop()
    targets: list[tuple[str, Load, bytes]] = []
    for name, port in spec["ports"].items():
        load = Load(totals[name], lambda _: over.set(), exact=name != "nginx")
        await loop.create_connection(functools.partial(_same, load), "127.0.0.1", port)
        request = wire.request(port, spec["key"], plan="chunks=2 rate=0", stream=True)
        targets.append((name, load, request))
    taken: dict[str, list[float]] = {name: [] for name, _, _ in targets}
    for number in range(spec["warm"] + spec["count"]):
        for name, load, request in targets:
            over.clear()
            load.send(request)
            await asyncio.wait_for(over.wait(), 10)
            if number >= spec["warm"]:
                taken[name].append((load.first_at - load.sent_at) / 1e6)
    return {"ms": taken, "totals": {name: as_json(each) for name, each in totals.items()}}


def _same(load: Load) -> Load:
    return load


def main() -> None:
    """One job."""
    spec = json.loads(sys.stdin.readline())

    async def work() -> dict[str, Any]:
        return await (latency(spec) if spec["kind"] == "latency" else Job(spec).run())

    json.dump(uvloop.run(work()), sys.stdout)


if __name__ == "__main__":
    main()
