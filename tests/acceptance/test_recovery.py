"""A running gateway loses its whole Redis under load: it says 503, comes back by itself, and owes nobody anything."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import httpx2
import pytest

from tests.support.gateway import Gateway, Key, Stores, running, until
from tests.support.outages import DONE, ask, audited, bearer, outage_config, ready, streams

RECOVERED_S = 10.0


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway whose Redis may suffer."""
    with running(tmp_path_factory.mktemp("recovery"), outage_config(lease_ms=15_000, margin_ms=2_000)) as gateway:
        yield gateway


class Load:
    """Calls without a pause, each answered with 200 and its charge or with 503."""

    def __init__(self, gateway: Gateway, key: Key) -> None:
        self._gateway = gateway
        self._key = key
        self.charges: dict[str, int] = {}
        self.refused: list[httpx2.Response] = []
        self.answered_at = 0.0

    async def run(self) -> None:
        """Until cancelled."""
        headers = bearer(self._key)
        async with httpx2.AsyncClient(verify=False, base_url=self._gateway.url, headers=headers, timeout=20) as client:
            while True:
                answer = await client.post("/v1/chat/completions", json=ask(5, stream=False))
                if answer.status_code == 200:
                    charge = Decimal(answer.headers["x-tollgate-charge"]) * 1_000_000
                    self.charges[answer.headers["x-tollgate-session"]] = int(charge)
                    self.answered_at = time.monotonic()
                else:
                    self.refused.append(answer)


async def epochs_above(stores: Stores, epoch: int) -> bool:
    """Whether every shard was rebuilt since the epoch."""
    return bool(await stores.pool.fetchval("SELECT min(ep) FROM shard_cursor") > epoch)


async def test_a_wiped_redis_is_made_anew_under_load_and_every_charge_arrives(gateway: Gateway) -> None:
    await ready(gateway)
    key = await gateway.key()
    load = Load(gateway, key)
    async with streams(gateway, key, 2, tokens=600, interval_ms=10) as made:
        for stream in made:
            await stream.flowing(30)
        tasks = [asyncio.create_task(load.run()) for _ in range(4)]
        try:
            await until(lambda: len(load.charges) >= 20)
            async with gateway.stores() as stores:
                before = await stores.pool.fetchval("SELECT max(ep) FROM shard_cursor")
                wiped = time.monotonic()
                await stores.redis.call("FLUSHALL")
                await until(lambda: epochs_above(stores, before), RECOVERED_S)
            made_anew = time.monotonic()
            await until(lambda: load.answered_at > made_anew, RECOVERED_S)
            assert time.monotonic() - wiped < RECOVERED_S
            enough = len(load.charges) + 20
            await until(lambda: len(load.charges) >= enough)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for stream in made:
            await stream.ended()
            assert stream.whole
            assert stream.data.endswith(DONE)
            assert stream.error is None
            assert stream.tokens == 600
    # Who had his hold when Redis was wiped waits for it; only calls that came between are refused.
    assert {answer.status_code for answer in load.refused} <= {503}
    assert {answer.json()["error"]["code"] for answer in load.refused} <= {"ledger_unavailable"}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in load.refused)
    await gateway.idle(key)
    ended = {*load.charges, *(stream.session for stream in made)}
    async with gateway.stores() as stores:

        async def arrived() -> dict[str, Any] | None:
            query = "SELECT sid, charged, outcome FROM session WHERE sid = ANY($1)"
            found = await stores.pool.fetch(query, list(ended))
            return {row["sid"]: row for row in found} if len(found) == len(ended) else None

        rows = await until(arrived)
    assert {sid: rows[sid]["charged"] for sid in load.charges} == load.charges
    assert {rows[stream.session]["outcome"] for stream in made} == {"completed"}
    await ready(gateway)
    audited(gateway)


async def test_a_rebuild_by_hand_lets_streams_go_on_and_changes_no_balance(gateway: Gateway) -> None:
    await ready(gateway)
    key = await gateway.key()
    async with streams(gateway, key, 1, tokens=300, interval_ms=10) as (stream,):
        await stream.flowing(30)
        done = await asyncio.to_thread(gateway.tollgate, "rebuild", "--yes", "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        await stream.ended()
        assert stream.tokens == 300
        assert stream.data.endswith(DONE)
    balance = await gateway.idle(key)
    (row,) = await gateway.sessions(key, 1)
    assert (row["outcome"], row["charged"]) == ("completed", 1_000_000 - balance.available)
    await ready(gateway)  # readiness is from memory, a second old at most
    audited(gateway)
