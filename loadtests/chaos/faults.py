"""Faults of gateways, clients and providers. Those of the stores are in `store_faults`. Row numbers are in each class.

Must not: leave anything spoilt behind when `strike` has returned.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from typing import ClassVar

import psutil

from loadtests.chaos.check import UNBILLED_TOKENS, ChaosVerdict, Evidence
from loadtests.chaos.load import Mix, body, latest_content_s, one_call
from loadtests.chaos.proxy import Toxic
from loadtests.chaos.stage import Fault, Stage
from loadtests.chaos.world import TROUBLES, Account, Gateway
from loadtests.users.calls import Call, Manner

LONG = Mix(whole=0.1, leaving=0.05, unlucky=0.0, tokens=(60, 150, 300))
EXHAUSTION_STREAMS = 100
EXHAUSTION_TOKENS = 1_500
EXHAUSTION_CREDITS = "0.006"
"""Six thousand tokens: enough to let some ten streams begin, and none of them end."""


class GatewayKilled(Fault):
    """Row 1."""

    number, name, title = 1, "gateway-kill", "a gateway is killed with kill -9 in the middle of its streams"
    mix, unbilled_bound = LONG, UNBILLED_TOKENS
    FREED_S: ClassVar[float] = 20.0

    def __init__(self) -> None:
        self._killed = 0.0

    async def strike(self, stage: Stage) -> None:
        gateway = stage.gateway()
        await stage.rest(1.5, 3.0)
        stage.counts["connections cut"] += gateway.front.open
        self._killed = time.time()
        await asyncio.to_thread(gateway.kill)
        stage.counts["gateways killed"] += 1
        await stage.rest(1.0, 3.0)
        gateway.start()
        await stage.world.ready()

    async def judge(self, stage: Stage, evidence: Evidence, verdict: ChaosVerdict) -> None:
        swept = [row["ended_s"] - self._killed for row in evidence.sessions if row["outcome"] == "swept"]
        stage.freed_s = max(swept, default=0.0)
        verdict.expect(swept != [], "no session was under way when the gateway was killed")
        verdict.expect(stage.freed_s <= self.FREED_S, f"the last hold was freed {stage.freed_s:.1f} s after the kill")


class RollingStop(Fault):
    """Row 2. Streams that run are finished; only new connections are turned away."""

    number, name, title = 2, "rolling-stop", "every gateway in turn is stopped with SIGTERM and started again"
    mix = Mix(leaving=0.0, unlucky=0.0)

    async def strike(self, stage: Stage) -> None:
        for gateway in stage.world.gateways:
            await stage.rest(0.5, 1.5)
            stage.counts[f"exit code {await asyncio.to_thread(gateway.terminate)}"] += 1
            gateway.start()
            await stage.world.ready()

    async def judge(self, stage: Stage, evidence: Evidence, verdict: ChaosVerdict) -> None:
        broken = [call for call in stage.load.calls if call.status == 200 and call.ending in ("failed", "broken")]
        verdict.same("streams broken by a stop", [f"{call.session} {call.error}" for call in broken[:3]], [])
        swept = sum(row["outcome"] == "swept" for row in evidence.sessions)
        verdict.same("sessions swept after a stop", swept, 0)
        verdict.same("exit codes of stopped gateways", dict(stage.counts), {"exit code 0": len(stage.world.gateways)})


class GatewayFrozen(Fault):
    """Row 3. The frozen gateway's sessions are swept; when it wakes it must say nothing more about them."""

    number, name, title = 3, "gateway-freeze", "a gateway is stopped with SIGSTOP past its leases, then continued"
    mix = LONG

    def __init__(self) -> None:
        self._woken = 0.0

    async def strike(self, stage: Stage) -> None:
        gateway = stage.gateway()
        await stage.rest(1.5, 3.0)
        family = gateway.family()
        try:
            for one in family:
                one.send_signal(signal.SIGSTOP)
            stage.counts["processes stopped"] += len(family)
            await asyncio.sleep(stage.world.lease_s + stage.random.uniform(3.0, 5.0))
        finally:
            self._woken = time.time()
            for one in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.send_signal(signal.SIGCONT)

    async def judge(self, stage: Stage, evidence: Evidence, verdict: ChaosVerdict) -> None:
        swept = {row["sid"] for row in evidence.sessions if row["outcome"] == "swept"}
        stage.counts["sessions swept"] += len(swept)
        stage.counts["sessions corrected"] += sum(row["corrected"] for row in evidence.sessions)
        late = [one.session for one in stage.load.calls if one.session in swept and latest_content_s(one) > self._woken]
        verdict.same("swept sessions that a woken gateway went on to serve", late[:5], [])


class Disconnects(Fault):
    """Row 4."""

    number, name, title = 4, "disconnects", "clients leave at any byte, with FIN, RST or half a close"
    mix = Mix(whole=0.1, leaving=0.8, unlucky=0.0)

    async def strike(self, stage: Stage) -> None:
        for _ in range(12):
            await stage.rest(0.2, 0.6)
            front = stage.gateway().front
            kind = stage.random.choice(("fin", "rst", "half"))
            many = front.half_close("server") if kind == "half" else front.cut(reset=kind == "rst")
            stage.counts[f"connections ended by {kind}"] += many

    async def judge(self, stage: Stage, evidence: Evidence, verdict: ChaosVerdict) -> None:
        by_session = {row["sid"]: row["outcome"] for row in evidence.sessions}
        stage.counts["calls left"] += sum(by_session.get(call.session or "") == "aborted" for call in stage.load.calls)


class SlowReaders(Fault):
    """Row 5. Two kinds: those who read a few bytes at a time, and those who stop reading for good."""

    number, name, title = 5, "slow-readers", "clients read a few bytes at a time, or stop reading"
    mix = Mix(slow=0.5, leaving=0.0, unlucky=0.0)
    RSS_MIB_MAX: ClassVar[int] = 300

    async def strike(self, stage: Stage) -> None:
        gateways, key = stage.world.gateways, stage.world.customers[0].key
        fields = body("gpt-4o-mini", 20_000, stream=True, random=stage.random)
        fields["messages"][0]["content"] += "[[interval_ms=0]]"
        stuck = Manner(read_bytes=256, rest_s=8.0, receive_bytes=4_096, leave_after_s=12)
        calls = [
            asyncio.to_thread(one_call, gateways[number % len(gateways)].port, key, fields, stuck, "stuck reader")
            for number in range(6)
        ]
        stage.extra_calls += await asyncio.gather(*calls)
        most = max(one.memory_info().rss for gateway in gateways for one in gateway.family("gateway.worker"))
        stage.counts["MiB of the largest worker"] = most // 2**20

    async def judge(self, stage: Stage, evidence: Evidence, verdict: ChaosVerdict) -> None:
        most = stage.counts["MiB of the largest worker"]
        verdict.expect(most <= self.RSS_MIB_MAX, f"a worker grew to {most} MiB")


class ProviderTrouble(Fault):
    """Row 6. Scripts of the provider, and its links cut, reset, stalled and dripping."""

    number, name, title = 6, "provider-trouble", "providers fail, stall, break off, lie about usage; their links break"
    mix = Mix(whole=0.1, leaving=0.0, unlucky=0.7, models=(*TROUBLES, "falls-back"))

    async def strike(self, stage: Stage) -> None:
        for _ in range(10):
            await stage.rest(0.3, 0.8)
            link = stage.random.choice([*stage.world.links("a"), *stage.world.links("b")])
            kind = stage.random.choice(("cut", "reset", "stall", "drip", "refuse"))
            stage.counts[f"provider links: {kind}"] += 1
            if kind in ("cut", "reset"):
                link.cut(reset=kind == "reset")
                continue
            link.spoil(Toxic(stalled=kind == "stall", refuse=kind == "refuse", drip_bytes=400 * (kind == "drip")))
            await stage.rest(0.3, 1.0)
            link.calm()


class Exhaustion(Fault):
    """Row 23. Many streams on credit for a few: every one ends with a word, and nobody pays more than there was."""

    number, name, title = 23, "exhaustion", "100 streams at once on credit for a few"
    absorbs = True

    def __init__(self) -> None:
        self._account: Account | None = None

    async def strike(self, stage: Stage) -> None:
        account = self._account = await stage.world.account(EXHAUSTION_CREDITS)
        fields = body("gpt-4o-mini", EXHAUSTION_TOKENS, stream=True, random=stage.random)
        fields["messages"][0]["content"] += "[[interval_ms=4]]"
        patient = Manner(leave_after_s=60)
        doors = [gateway.front.port for gateway in stage.world.gateways]
        calls = [
            asyncio.to_thread(one_call, doors[number % len(doors)], account.key, fields, patient, "poor")
            for number in range(EXHAUSTION_STREAMS)
        ]
        stage.extra_calls += await asyncio.gather(*calls)

    async def judge(self, stage: Stage, evidence: Evidence, verdict: ChaosVerdict) -> None:
        assert self._account is not None
        poor = [call for call in stage.extra_calls if call.who == "poor"]
        for call in poor:
            stage.counts[f"poor streams {call.ending}"] += 1
        untyped = [call for call in poor if not _typed(call)]
        verdict.same("streams without a typed ending", [f"{one.ending} {one.error}" for one in untyped[:3]], [])
        mine = [row for row in evidence.sessions if row["account_id"] == self._account.id]
        granted = round(float(EXHAUSTION_CREDITS) * 1_000_000)
        verdict.at_most("charged on the small credit", sum(row["charged"] for row in mine), granted)
        stage.counts["micros absorbed by the house"] = sum(row["absorbed"] for row in mine)


def _typed(call: Call) -> bool:
    """A whole answer, an in-band word, or a refusal with its status."""
    if call.ending == "refused":
        return call.status == 402
    return call.ending == "completed" or (call.ending == "broken" and call.error == "insufficient_quota")


class KeyRevoked(Fault):
    """Row 24, the part of it that is a revoked key."""

    number, name, title = 24, "key-revoked", "a key is revoked in the middle of the load"
    WITHIN_S: ClassVar[float] = 5.0

    async def strike(self, stage: Stage) -> None:
        world = stage.world
        account = await world.account()
        for gateway in world.gateways:
            assert (await self._ask(stage, gateway, account.key)).status == 200
        await world.tollgate("keys", "revoke", account.key_id)
        revoked = time.monotonic()
        for gateway in world.gateways:
            while (await self._ask(stage, gateway, account.key)).status != 401:
                if time.monotonic() - revoked > self.WITHIN_S:
                    stage.counts["gateways that took too long"] += 1
                    break
        stage.counts["ms until refused everywhere"] = round((time.monotonic() - revoked) * 1000)

    async def _ask(self, stage: Stage, gateway: Gateway, key: str) -> Call:
        fields = body("gpt-4o-mini", 3, stream=False, random=stage.random)
        call = await asyncio.to_thread(one_call, gateway.front.port, key, fields, Manner(leave_after_s=10), "revoked")
        stage.extra_calls.append(call)
        return call

    async def judge(self, stage: Stage, evidence: Evidence, verdict: ChaosVerdict) -> None:
        late = stage.counts["gateways that took too long"]
        verdict.same(f"gateways that served the key {self.WITHIN_S:g} s later", late, 0)


FAULTS: tuple[type[Fault], ...] = (
    GatewayKilled, RollingStop, GatewayFrozen, Disconnects, SlowReaders, ProviderTrouble, Exhaustion, KeyRevoked,
)  # fmt: skip
