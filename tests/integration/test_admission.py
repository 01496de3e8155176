"""Admission on a real ledger: slices priced as their prompt is, and threads that end with the process."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from config.price import CompiledPrice, TierRates
from config.settings import Bounds, Metering
from metering.keys import shard_of
from metering.ledger import AccountRef, Granted, GrantRequest, KeyLimits, SessionRef
from metering.redis_ledger import RedisLedger
from providers.codec import Upstream
from proxy.admission import Admission, Caller
from proxy.candidates import Candidate, Route
from proxy.http_request import Origin
from proxy.live_session import LiveSession
from proxy.live_sessions import LiveSessions
from proxy.request import read_chat
from storage.redis_client import RedisClient
from tests.support.redis_server import RedisServer

ROOT = Path(__file__).resolve().parents[2]
ACCOUNT = AccountRef("acct", shard_of("acct"))
MILLION = 1_000_000
RATES = {"input": 1, "cached_input": 1, "cache_write": 1, "output": 2, "reasoning": 2, "audio_input": 1}
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


def route(price: CompiledPrice, *, hidden: bool = False) -> Route:
    origin = Origin.from_url("http://127.0.0.1:1/v1")
    candidate = Candidate(Upstream("p", "openai", b"/v1"), origin, "gpt-4o", price, None, "o200k_base", False)
    return Route("m", (candidate,), 1_000, rename_model=False, hidden_reasoning=hidden)


@pytest.fixture
async def ledger() -> AsyncIterator[RedisLedger]:
    with tempfile.TemporaryDirectory(prefix="tg-", dir="/tmp") as folder:
        server = RedisServer(Path(folder))
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
    body = {"model": "m", "messages": [{"role": "user", "content": "word " * words}], "stream": True, **fields}
    try:
        request = read_chat(msgspec.json.encode(body), Bounds())
        session, _ = await admission.admit(Caller(ACCOUNT, "KEY", KeyLimits()), request, "r")
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
