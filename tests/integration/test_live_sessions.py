"""The registry of running sessions: one that makes the tick fail does not take others with it; a drain waits."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from config.price import CompiledPrice
from config.settings import Bounds, Metering
from metering.keys import shard_of
from metering.ledger import AccountRef, SessionRef
from metering.meter import Meter
from metering.ranks import encoding
from metering.redis_ledger import RedisLedger
from metering.status import Outbox
from proxy import telemetry
from proxy.errors import Overloaded
from proxy.live_session import LiveSession, boot_ms
from proxy.live_sessions import LiveSessions
from proxy.session import Ending, Phase
from storage.redis_client import RedisClient
from tests.support.gateway import until
from tests.support.redis_server import RedisServer
from tests.support.valkey import stand_on

FREE = CompiledPrice(
    input=0, cached_input=0, cache_write=0, cache_write_1h=0, output=0, reasoning=0, audio_input=0, audio_output=0,
    image_output=0,
)  # fmt: skip


class Panic(BaseException):
    """What a library in Rust raises when it panics: no Exception."""


class PanickingMeter(Meter):
    """A meter that met a text which its tokenizer cannot stand."""

    def checkpoint(self) -> int:
        raise Panic


@pytest.fixture
async def live(tmp_path: Path) -> AsyncIterator[LiveSessions]:
    server = RedisServer(tmp_path)
    server.start()
    redis = RedisClient(server.url, call_ms=2000, connect_ms=2000, pending_max=10_000)
    await redis.start()
    ledger = RedisLedger(redis)
    await ledger.start()
    live = LiveSessions(ledger, Metering(progress_ms=100), Bounds())
    live.start()
    yield live
    await live.drain(0.0)
    await redis.aclose()
    server.kill()


def unused() -> RedisClient:
    """Of a server that nobody asks."""
    return RedisClient("redis://127.0.0.1:1/0", call_ms=1, connect_ms=1, pending_max=1)


def session(name: str, meter: Meter, *, lease_ms: int = 60_000) -> LiveSession:
    account = AccountRef("acct", shard_of("acct"))
    return LiveSession(
        ref=SessionRef(name, account, "KEY", 1),
        request_id=name,
        route="r",
        stream=True,
        held=1,
        hold_max=1,
        slice_cost=1,
        slice_low_cost=1,
        fence_ms=boot_ms() + lease_ms,
        phase=Phase.CONTENT,
        meter=meter,
        checkpoint_at=time.monotonic() - 1,
    )


async def test_a_session_that_makes_the_tick_fail_is_ended_and_the_others_are_ticked_on(live: LiveSessions) -> None:
    bad = session("bad", PanickingMeter(FREE, 1, encoding("o200k_base")))
    good = session("good", Meter(FREE, 1, encoding("o200k_base")), lease_ms=400)
    live.add(bad)
    live.add(good)
    await until(lambda: bad.ending is Ending.INTERNAL)
    await until(lambda: good.ending is Ending.LEASE_LOST)  # the fence is the tick's to watch
    live.remove(bad)
    live.remove(good)


async def test_a_loop_that_stands_still_raises_the_alarm(live: LiveSessions) -> None:
    """Counted each time, told once in a while."""

    def late() -> float:
        return REGISTRY.get_sample_value("tollgate_loop_late_total") or 0.0

    before = late()
    for times in (1, 2):
        time.sleep(0.6)  # what must never happen in a worker
        await until(lambda times=times: late() >= before + times)


async def test_a_drain_waits_for_a_call_that_is_being_admitted(live: LiveSessions) -> None:
    live.admission_begins()
    draining = asyncio.create_task(live.drain(30.0))
    await until(lambda: live.draining)
    done, _ = await asyncio.wait({draining}, timeout=0.3)
    assert not done
    live.admission_ended()
    await asyncio.wait_for(draining, 15)


async def test_what_sheds_new_sessions_is_told_once_and_each_refusal_is_counted(live: LiveSessions) -> None:
    def shed(reason: str) -> float:
        telemetry.publish()
        return REGISTRY.get_sample_value("tollgate_shed_total", {"reason": reason}) or 0.0

    before = shed("journal_age"), shed("journal_memory")
    live.admit()
    with capture_logs() as lines:
        live.outbox_changed("journal_age", Outbox(7_300_000, 3))
        for _ in range(3):
            with pytest.raises(Overloaded) as caught:
                live.admit()
        live.outbox_changed("journal_memory", Outbox(6_000_000, 26))
        with pytest.raises(Overloaded):
            live.admit()
        live.outbox_changed(None, Outbox(0, 3))
    live.admit()
    assert caught.value.retry_after_ms == 5_000
    assert (shed("journal_age") - before[0], shed("journal_memory") - before[1]) == (3, 1)
    closed, opened = lines
    assert (closed["event"], opened["event"]) == (
        "new calls are shed: the journal is over its bound",
        "new calls are admitted again",
    )
    figures = [closed[name] for name in ("reason", "oldest_age_s", "age_s_max", "memory_percent", "memory_percent_max")]
    assert figures == ["journal_age", 7_300, 7_200, 3, 25]
    assert (opened["reason"], opened["oldest_age_s"]) == ("journal_memory", 0)


async def test_a_worker_that_is_full_sheds_too(live: LiveSessions) -> None:
    full = LiveSessions(RedisLedger(unused()), Metering(), Bounds(live_sessions_max=1))
    full.admission_begins()
    full.admit()
    full.admission_begins()
    with pytest.raises(Overloaded) as caught:
        full.admit()
    assert caught.value.retry_after_ms == 1_000


async def test_a_hold_is_extended_once_the_ledger_answers_again(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    server.start()
    async with stand_on(server) as stand:
        await stand.grant("g", 10_000)
        ref = await stand.hold("s1", 100)
        hasty = RedisClient(server.url, call_ms=100, connect_ms=2_000, pending_max=1_000)
        await hasty.start()
        ledger = RedisLedger(hasty, loaded=stand.scripts)
        await ledger.start()
        live = LiveSessions(ledger, Metering(), Bounds())
        held = session("s1", Meter(FREE, 1, encoding("o200k_base")))
        held.ref, held.held, held.hold_max, held.slice_cost = ref, 100, 1_000, 50
        server.signal(signal.SIGSTOP)
        extending = asyncio.create_task(live.extend(held))
        try:
            await until(lambda: held.unanswered)
            assert not extending.done()
        finally:
            server.signal(signal.SIGCONT)
        await asyncio.wait_for(extending, 15)
        assert (held.held, held.exhausted, held.unanswered) == (150, False, False)
        await hasty.aclose()
    server.kill()
