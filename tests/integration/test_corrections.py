"""What the gateway does when a sweep ended its session: one correction, tried again until the ledger answers."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from prometheus_client import REGISTRY

from config.price import CompiledPrice
from config.settings import Bounds, Metering
from metering.keys import SHARDS, shard_of
from metering.ledger import AccountRef, Balance, Gone, Granted, GrantRequest, KeyLimits
from metering.meter import Channel, Meter
from metering.ranks import encoding
from metering.redis_ledger import RedisLedger
from providers.codec import Upstream
from providers.registry import wire
from proxy.admission import Admission, Caller
from proxy.candidates import Candidate, Route
from proxy.http_request import Origin
from proxy.live_session import LiveSession
from proxy.live_sessions import LiveSessions
from proxy.prepared import PreparedCall
from proxy.request import read_chat
from proxy.session import Ending, Phase
from proxy.settlement import Settler
from storage.redis_client import RedisClient
from tests.support.gateway import until
from tests.support.redis_server import RedisServer

ACCOUNT = AccountRef("acct", shard_of("acct"))
GRANTED = 100_000
ONE = 1_000_000
PRICE = CompiledPrice(
    input=ONE, cached_input=ONE, cache_write=ONE, cache_write_1h=ONE, output=ONE, reasoning=ONE, audio_input=ONE,
    audio_output=ONE, image_output=ONE,
)  # fmt: skip


@dataclass
class Worker:
    """A worker's parts on a Valkey of their own, with leases of 200 ms."""

    redis: RedisClient
    ledger: RedisLedger
    live: LiveSessions
    admission: Admission
    settler: Settler

    async def swept(self, words: int, *, stream: bool = True) -> tuple[LiveSession, PreparedCall]:
        """A session whose provider sent so many words, ended by a sweep that knew of nothing."""
        body = {"model": "m", "messages": [{"role": "user", "content": "Hi."}], "stream": stream}
        request = read_chat(msgspec.json.encode(body), Bounds())
        session, call = await self.admission.admit(Caller(ACCOUNT, "KEY", KeyLimits()), request, "r")
        session.price, session.meter = PRICE, Meter(PRICE, call.prompt_tokens, encoding("o200k_base"))
        for phase in (Phase.SENT, Phase.ANSWERED, Phase.CONTENT):
            session.advance(phase)
        session.meter.add(0, Channel.CONTENT, "word " * words)
        await until(lambda: self.ledger.sweep_due(ACCOUNT.shard, 5))
        return session, call

    async def balance(self) -> Balance:
        return await self.ledger.balance(ACCOUNT)


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    with tempfile.TemporaryDirectory(prefix="tg-", dir="/tmp") as folder:
        server = RedisServer(Path(folder))
        server.start()
        redis = RedisClient(server.url, call_ms=2_000, connect_ms=2_000, pending_max=1_000)
        await redis.start()
        ledger = RedisLedger(redis, lease_ms=200)
        await ledger.start()
        await ledger.init_shards([ACCOUNT.shard])
        assert isinstance(await ledger.grant(GrantRequest("g1", ACCOUNT, GRANTED)), Granted)
        live = LiveSessions(ledger, Metering(), Bounds())  # does not tick: the session's lease is not renewed
        candidate = Candidate(
            Upstream("p", "openai", b"/v1"),
            wire("openai"),
            Origin.from_url("http://127.0.0.1:1/v1"),
            "m",
            PRICE,
            None,
            "o200k_base",
            False,
        )
        route = Route("m", (candidate,), 1_000, rename_model=False, hidden_reasoning=False)
        admission = Admission(ledger, live, {"m": route}, "pv", "owner", (Metering(), Bounds()))
        try:
            yield Worker(redis, ledger, live, admission, Settler(ledger, live, "pv", 1_000))
        finally:
            await admission.aclose()
            await live.drain(0.0)
            await redis.aclose()
            server.kill()


def corrections(result: str) -> float:
    return REGISTRY.get_sample_value("tollgate_corrections_total", {"result": result}) or 0.0


async def test_a_swept_session_is_charged_what_its_owner_knows(worker: Worker) -> None:
    session, call = await worker.swept(40)
    before, micros = corrections("corrected"), REGISTRY.get_sample_value("tollgate_corrected_micros_total") or 0.0
    due, settling = worker.settler.begin(session, call, Ending.LEASE_LOST)
    assert await settling == Gone("final", 0)
    await until(lambda: corrections("corrected") > before)
    balance = await worker.balance()
    assert balance.charged == due.micros > 40
    assert (balance.available, balance.held) == (GRANTED - due.micros, 0)
    assert REGISTRY.get_sample_value("tollgate_corrected_micros_total") == micros + due.micros
    assert corrections("corrected") == before + 1


@pytest.mark.parametrize("delivered", [False, True])
async def test_a_whole_answer_that_was_kept_back_is_not_charged_afterwards(worker: Worker, delivered: bool) -> None:
    """Its client was told that the lease is lost; one that was answered before the ledger was pays."""
    session, call = await worker.swept(50, stream=False)
    before = await worker.balance()
    session.delivered = delivered
    due, settling = worker.settler.begin(session, call, Ending.COMPLETED)
    assert isinstance(await settling, Gone)
    await worker.live.drain(2.0)  # waits for what the settlement started
    assert (await worker.balance()).charged - before.charged == (due.micros if delivered else 0)
    assert due.micros > 50


async def test_a_correction_is_tried_again_until_the_ledger_takes_it(worker: Worker) -> None:
    session, call = await worker.swept(40)
    before = corrections("corrected")
    # Out of memory the server still answers settlements, and refuses what frees nothing.
    await worker.redis.call("CONFIG", "SET", "maxmemory", "1")
    due, settling = worker.settler.begin(session, call, Ending.LEASE_LOST)
    assert await settling == Gone("final", 0)

    async def refused() -> bool:
        stats = await worker.redis.call("INFO", "errorstats")
        return b"errorstat_OOM" in stats

    await until(refused)
    assert (await worker.balance()).charged == 0
    await worker.redis.call("CONFIG", "SET", "maxmemory", "0")
    await until(lambda: corrections("corrected") > before)
    assert (await worker.balance()).charged == due.micros


async def test_a_session_that_owes_nothing_more_is_not_corrected(worker: Worker) -> None:
    session, call = await worker.swept(40)
    session.phase = Phase.SENT
    lower = corrections("lower")
    before = await worker.redis.call("XLEN", SHARDS[ACCOUNT.shard].outbox)
    due, settling = worker.settler.begin(session, call, Ending.CLIENT_GONE)
    assert (due.micros, await settling) == (0, Gone("final", 0))
    await worker.live.drain(1.0)
    assert await worker.redis.call("XLEN", SHARDS[ACCOUNT.shard].outbox) == before
    assert corrections("lower") == lower  # it was not even asked for
