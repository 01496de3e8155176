"""Admission on a real ledger: slices priced as their prompt is, what is shed, a reserve whose reply is lost, and
threads that end with the process."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from config.price import CompiledPrice, TierRates
from config.settings import Bounds, Metering
from loadtests.chaos.proxy import Link, Toxic
from metering.keys import shard_of
from metering.ledger import AccountRef, Granted, GrantRequest, KeyLimits, SessionRef, Settled
from metering.redis_ledger import RedisLedger
from metering.status import Outbox
from providers.codec import Upstream
from providers.registry import wire
from proxy.admission import Admission, Caller
from proxy.candidates import Candidate, Route
from proxy.errors import LedgerDown, Overloaded
from proxy.http_request import Origin
from proxy.live_session import LiveSession
from proxy.live_sessions import LiveSessions
from proxy.request import ChatRequest, read_chat
from storage.redis_client import RedisClient
from tests.support.gateway import until
from tests.support.ports import free_port
from tests.support.redis_server import RedisServer

ROOT = Path(__file__).resolve().parents[2]
ACCOUNT = AccountRef("acct", shard_of("acct"))
MILLION = 1_000_000
INPUTS, OUTPUTS = ("input", "cached_input", "cache_write", "audio_input"), ("output", "reasoning", "image_output")
RATES = {**dict.fromkeys(INPUTS, 1), "cache_write_1h": 4, **dict.fromkeys(OUTPUTS, 2)}
PRICE = CompiledPrice(
    **{name: rate * MILLION for name, rate in RATES.items()},
    audio_output=20 * MILLION,
    tiers=(
        TierRates(
            above=1_000,
            **{name: 3 * rate * MILLION for name, rate in RATES.items()},
            audio_output=60 * MILLION,
        ),
    ),
    request=7,
)
METERING = Metering(slice_tokens=100, slice_low_tokens=50)
CALLER = Caller(ACCOUNT, "KEY", KeyLimits())
DEAD_S = 1.0
"""How long a link is dead: `RedisLedger.void` by itself gives up after 0.35 s."""


def route(price: CompiledPrice, *, hidden: bool = False) -> Route:
    origin = Origin.from_url("http://127.0.0.1:1/v1")
    candidate = Candidate(
        Upstream("p", "openai", b"/v1"), wire("openai"), origin, "gpt-4o", price, None, "o200k_base", False
    )
    return Route("m", (candidate,), 1_000, rename_model=False, hidden_reasoning=hidden)


def request(words: int = 10, **fields: Any) -> ChatRequest:
    """A streamed call with a prompt of so many words."""
    body = {"model": "m", "messages": [{"role": "user", "content": "word " * words}], "stream": True, **fields}
    return read_chat(msgspec.json.encode(body), Bounds())


@pytest.fixture
def port() -> int:
    """Where the ledger's server listens, beside its socket."""
    return free_port()


@pytest.fixture
async def ledger(port: int) -> AsyncIterator[RedisLedger]:
    with tempfile.TemporaryDirectory(prefix="tg-", dir="/tmp") as folder:
        server = RedisServer(Path(folder), port=port)
        server.start()
        redis = RedisClient(server.url, call_ms=2_000, connect_ms=2_000, pending_max=1_000)
        await redis.start()
        try:
            ledger = RedisLedger(redis)
            await ledger.start()
            await ledger.init_shards([ACCOUNT.shard])
            assert isinstance(await ledger.grant(GrantRequest("g1", ACCOUNT, 10**12)), Granted)
            yield ledger
        finally:
            await redis.aclose()
            server.kill()


async def admitted(ledger: RedisLedger, asked: Route, words: int, **fields: Any) -> LiveSession:
    """The session of a call with a prompt of so many words."""
    live = LiveSessions(ledger, METERING, Bounds())
    admission = Admission(ledger, live, {"m": asked}, "pv", "owner", (METERING, Bounds()))
    try:
        session, _ = await admission.admit(CALLER, request(words, **fields), "r")
        await ledger.void(SessionRef(session.id, ACCOUNT, "KEY", session.ref.fence))
        return session
    finally:
        await admission.aclose()


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize(
    ("words", "fields", "rate"),
    [
        (10, {}, 2),
        (10, {"modalities": ["text", "audio"]}, 20),
        (2_000, {}, 6),  # beyond the tier's start
        (2_000, {"modalities": ["text", "audio"]}, 60),
    ],
)
async def test_slices_have_the_rates_of_their_prompt(
    ledger: RedisLedger, words: int, fields: dict[str, Any], rate: int, hidden: bool
) -> None:
    session = await admitted(ledger, route(PRICE, hidden=hidden), words, **fields)
    assert (session.slice_cost, session.slice_low_cost) == (100 * rate, 50 * rate)


@pytest.mark.parametrize(("fields", "rate"), [({}, 2), ({"modalities": ["text", "audio"]}, 20)])
async def test_without_tiers_a_prompt_of_any_length_has_the_same_rates(
    ledger: RedisLedger, fields: dict[str, Any], rate: int
) -> None:
    price = msgspec.structs.replace(PRICE, tiers=())
    for words in (10, 2_000):
        session = await admitted(ledger, route(price), words, **fields)
        assert (session.slice_cost, session.slice_low_cost) == (100 * rate, 50 * rate)


@pytest.mark.parametrize("hour", ["1h", "\\u0031h", "1\\u0068", "\\u0031\\u0068"])
async def test_a_cache_for_an_hour_is_held_for_however_json_writes_it(ledger: RedisLedger, hour: str) -> None:
    live = LiveSessions(ledger, METERING, Bounds())
    admission = Admission(ledger, live, {"m": route(PRICE)}, "pv", "owner", (METERING, Bounds()))
    held = []
    for ttl in ("5m", hour):
        body = request(metadata={"ttl": "0"}).root.body.replace(b'"0"', f'"{ttl}"'.encode())
        session, call = await admission.admit(CALLER, read_chat(body, Bounds()), "r")
        held.append(session.held)
        await ledger.void(session.ref)
    await admission.aclose()
    assert held[1] - held[0] == call.prompt_tokens * (RATES["cache_write_1h"] - RATES["cache_write"])


async def test_a_call_that_is_shed_holds_nothing_and_what_runs_is_checkpointed_extended_and_settled(
    ledger: RedisLedger,
) -> None:
    live = LiveSessions(ledger, METERING, Bounds())
    admission = Admission(ledger, live, {"m": route(PRICE)}, "pv", "owner", (METERING, Bounds()))
    session, _ = await admission.admit(CALLER, request(), "r1")
    live.outbox_changed("journal_age", Outbox(8_000_000, 1))
    before = await ledger.balance(ACCOUNT)
    with pytest.raises(Overloaded):
        await admission.admit(CALLER, request(), "r2")
    assert await ledger.balance(ACCOUNT) == before
    held = session.held
    await live.extend(session)
    assert (session.held, session.unanswered) == (held + session.slice_cost, False)
    settled = await ledger.settle(session.ref, 9, "completed")
    assert isinstance(settled, Settled)
    assert (settled.charged, (await ledger.balance(ACCOUNT)).held) == (9, before.held - held)
    live.outbox_changed(None, Outbox(0, 1))
    again, _ = await admission.admit(CALLER, request(), "r3")
    await ledger.void(again.ref)
    await admission.aclose()


@asynccontextmanager
async def linked(port: int) -> AsyncIterator[tuple[Link, RedisLedger]]:
    """A ledger whose every byte goes over a link that can be spoilt."""
    link = Link("valkey", port)
    await link.start()
    redis = RedisClient(f"redis://127.0.0.1:{link.port}/0", call_ms=2_000, connect_ms=2_000, pending_max=1_000)
    try:
        await redis.start()
        ledger = RedisLedger(redis)
        await ledger.start()
        yield link, ledger
    finally:
        await redis.aclose()
        await link.aclose()


async def test_a_reserve_whose_reply_is_lost_is_voided_as_soon_as_the_ledger_can_be_reached(
    ledger: RedisLedger, port: int
) -> None:
    """The reserve has run, its reply is lost, and then the link is dead for longer than one void is tried."""
    async with linked(port) as (link, behind):
        live = LiveSessions(behind, Metering(), Bounds())
        admission = Admission(behind, live, {"m": route(PRICE)}, "pv", "owner", (Metering(), Bounds()))
        link.spoil(Toxic(lose_replies=True))
        asking = asyncio.create_task(admission.admit(CALLER, request(), "r"))
        await until(lambda: sessions(ledger, 1))
        link.spoil(Toxic(refuse=True))
        link.cut(reset=True)
        dead = time.monotonic()
        with pytest.raises(LedgerDown) as caught:
            await asking
        assert caught.value.retry_after_ms == 1_000
        await until(lambda: time.monotonic() > dead + DEAD_S)
        assert await sessions(ledger, 1)
        link.calm()
        await until(lambda: sessions(ledger, 0), seconds=5.0)  # a third of the lease, which would free it too
        balance = await ledger.balance(ACCOUNT)
        assert (balance.available, balance.held, balance.charged) == (10**12, 0, 0)
        await live.drain(0.0)  # the task that gave it up is over
        await admission.aclose()


async def sessions(ledger: RedisLedger, number: int) -> bool:
    """Whether the account has so many sessions open."""
    return (await ledger.balance(ACCOUNT)).sessions == number


LEAVING = """
import asyncio, sys, threading, time
import uvloop
from proxy.threads import Threads

running = threading.Event()

def work():
    running.set()
    time.sleep(0.3)

async def main():
    threads = Threads()
    for _ in range(200):
        threads.run(work)
    await asyncio.get_running_loop().run_in_executor(None, running.wait)
    began = time.monotonic()
    await threads.aclose()
    print(time.monotonic() - began)

uvloop.run(main())
"""


def test_waiting_work_ends_with_the_gateway_and_the_loop_is_not_held_up() -> None:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", LEAVING], cwd=ROOT, capture_output=True, text=True, check=False, timeout=20
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.2
    assert time.monotonic() - began < 15  # 200 of them take 30 s
