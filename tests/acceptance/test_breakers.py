"""Breakers and probes of a running gateway with two workers: who is left alone, for how long, and who hears of it.

A gateway of its own, whose breakers open soon and not for long. Each test has providers of its own, so that what one
opened is no other's. A connection belongs to one worker, so a test says which worker it asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import httpx2
import pytest

from tests.support.gateway import Gateway, running, until
from tests.support.ports import free_port
from tests.support.routed import Routed, Script, error_of, fails, provider_table, route_table, routed, says, turns

PORT = free_port()
CANARY = "canaryBreaker0123456789"
IN_A_ROW = 4
OPEN_S, REFUSED_S = 0.6, 1.2
SHARED_S = 2.0
"""What one worker found the others know within this."""
LINES = 4
"""Connections to each worker."""
ONCE = "retry = { retries = 0 }"
CONFIG = f"""
[bounds]
connect_ms = 1000
headers_ms = 3000
headers_nonstream_ms = 3000
first_content_ms = 3000
drain_s = 3

[metering]
flush_every_ms = 50

[breaker]
consecutive_max = {IN_A_ROW}
calls_min = 10
error_percent = 50
open_ms = {OPEN_S * 1000:.0f}
open_ms_max = {OPEN_S * 1000:.0f}
key_refused_ms = {REFUSED_S * 1000:.0f}
share_every_ms = 200
"""
NAMES = ("brow", "bhalf", "brate", "bpause", "bshared", "bkept", "bspare", "bback", "bmiss")
TABLES = "".join(
    (
        *(provider_table(name, PORT) for name in NAMES),
        provider_table("bkey", PORT, 'api_key_env = "BREAKER_KEY"'),
        provider_table("blisted", PORT, "probe = { every_ms = 200, timeout_ms = 500 }"),
        *(route_table(f"{name}-alone", name, lines=(ONCE,)) for name in (*NAMES, "bkey", "blisted")),
        *(
            route_table(f"{name}-spare", name, "bspare", lines=(ONCE,))
            for name in ("brow", "bpause", "bkey", "blisted", "bmiss")
        ),
        route_table("bkey-second", 'bkey, model = "second"', "bspare", lines=(ONCE,)),
        route_table("bmiss-second", 'bmiss, model = "second"', lines=(ONCE,)),
        route_table("bback-moving", "bback", "bspare", lines=('strategy = "least_busy"', ONCE)),
    )
)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway with two workers."""
    folder = tmp_path_factory.mktemp("breakers")
    with running(folder, CONFIG + TABLES, workers=2, environ={"BREAKER_KEY": CANARY}) as gateway:
        yield gateway


@dataclass
class Breakers(Routed):
    """A gateway whose workers a test asks one by one."""

    workers: list[list[httpx2.AsyncClient]]

    async def ask(self, model: str, worker: int = 0, line: int = 0, **fields: object) -> httpx2.Response:
        """A call to one worker."""
        body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 20, **fields}
        headers = {"authorization": f"Bearer {self.key.text}"}
        return await self.workers[worker][line].post("/v1/chat/completions", json=body, headers=headers)

    async def asks(self, model: str, worker: int = 0) -> list[httpx2.Response]:
        """Calls at once, on all connections to the worker but the last."""
        return await asyncio.gather(*(self.ask(model, worker, line) for line in range(LINES - 1)))

    async def opened(self, name: str, model: str, worker: int = 0) -> None:
        """Let the candidate fail until this worker's breaker opens."""
        provider = self.farm[name]
        before = provider.count
        provider.script = fails(500)
        for _ in range(IN_A_ROW):
            assert (await self.ask(model, worker)).status_code == 500
        assert provider.count == before + IN_A_ROW

    async def left_alone(self, name: str, model: str, worker: int = 0) -> httpx2.Response:
        """A call's refusal; the provider is not asked."""
        before = self.farm[name].count
        answer = await self.ask(model, worker)
        assert error_of(answer) == (503, "provider_unavailable")
        assert int(answer.headers["retry-after"]) >= 1
        assert self.farm[name].count == before
        return answer

    async def changes(self, provider: str, state: str, reason: str, model: str = "m") -> float:
        """How often a breaker changed so."""
        names = {"provider": provider, "model": model, "state": state, "reason": reason}
        return await self.metric("tollgate_breaker_changes_total", **names)

    async def heard(self, provider: str, state: str = "open", model: str = "m", times: int = 1) -> None:
        """Until the other worker has heard of the change."""

        async def known() -> bool:
            return await self.changes(provider, state, "heard", model) >= times

        await until(known, SHARED_S)


@contextlib.asynccontextmanager
async def lines(gateway: Gateway) -> AsyncIterator[list[list[httpx2.AsyncClient]]]:
    """Connections to each worker."""
    pids = gateway.children("gateway.worker")
    assert len(pids) == 2
    async with contextlib.AsyncExitStack() as stack:
        found: dict[int, list[httpx2.AsyncClient]] = {pid: [] for pid in pids}
        for pid, other in zip(pids, reversed(pids), strict=True):
            os.kill(other, signal.SIGSTOP)  # both accept on one socket: so it is known who does
            try:
                for _ in range(LINES):
                    one = httpx2.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=60)
                    client = httpx2.AsyncClient(verify=False, base_url=gateway.url, timeout=30, limits=one)
                    await stack.enter_async_context(client)
                    assert (await client.get("/health/live")).status_code == 200
                    found[pid].append(client)
            finally:
                os.kill(other, signal.SIGCONT)
        yield list(found.values())


@pytest.fixture
async def on(own: Gateway) -> AsyncIterator[Breakers]:
    """The module's gateway, its providers and connections to its workers."""
    async with routed(own, PORT) as found, lines(own) as workers:
        yield Breakers(found.gateway, found.farm, found.http, found.key, workers)


# -- opening -----------------------------------------------------------------------------------------------------------


async def test_failures_in_a_row_open_a_breaker_and_nobody_asks_the_provider(on: Breakers) -> None:
    await on.opened("brow", "brow-alone")
    charged = await on.all_back()
    await on.left_alone("brow", "brow-alone")
    assert await on.all_back() == charged
    spare = await on.ask("brow-spare")
    assert (spare.headers["x-tollgate-provider"], spare.headers["x-tollgate-attempts"]) == ("bspare", "1")
    await until(lambda: on.shows(1, "tollgate_breaker_open", provider="brow", model="m"))
    assert await on.changes("brow", "open", "consecutive") == 1
    assert on.told("breaker opened", provider="brow", model="m", reason="consecutive", heard=False)


async def test_a_model_that_a_provider_does_not_have_is_left_alone(on: Breakers) -> None:
    missing = on.farm["bmiss"]
    missing.script = fails(404, message="no such model", code="model_not_found")
    for attempts in ("2", "1", "1"):
        answer = await on.ask("bmiss-spare")
        assert (answer.headers["x-tollgate-provider"], answer.headers["x-tollgate-attempts"]) == ("bspare", attempts)
    assert missing.count == 1
    assert (await on.ask("bmiss-second")).status_code == 404  # another model of that provider is still asked
    answer = await on.ask("bmiss-second")
    assert error_of(answer) == (503, "provider_unavailable")
    assert 50 <= int(answer.headers["retry-after"]) <= 60
    assert missing.count == 2


async def test_an_answer_between_failures_keeps_a_breaker_closed_until_half_of_the_calls_failed(on: Breakers) -> None:
    on.farm["brate"].script = turns(*(says(), fails(500)) * 5)
    assert [(await on.ask("brate-alone")).status_code for _ in range(10)] == [200, 500] * 5
    await on.left_alone("brate", "brate-alone")
    assert on.told("breaker opened", provider="brate", reason="error_rate")


async def test_after_a_while_one_probe_passes_and_its_success_lets_all_pass(on: Breakers) -> None:
    await on.opened("bhalf", "bhalf-alone")
    gate = asyncio.Event()
    on.farm["bhalf"].script = says(gate=gate)
    probing = asyncio.create_task(_first_sent(on, "bhalf"))
    await until(lambda: on.farm["bhalf"].running == 1, every=0.005)
    refused = await on.asks("bhalf-alone")
    assert {error_of(answer) for answer in refused} == {(503, "provider_unavailable")}
    assert on.farm["bhalf"].count == IN_A_ROW + 1
    gate.set()
    assert (await probing).status_code == 200
    assert {answer.status_code for answer in await on.asks("bhalf-alone")} == {200}
    assert await on.changes("bhalf", "closed", "healed") == 1
    await until(lambda: on.shows(0, "tollgate_breaker_open", provider="bhalf", model="m"))


async def _first_sent(on: Breakers, name: str) -> httpx2.Response:
    """Ask until a call is let through; its answer. On the connection that `asks` does not use."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        answer = await on.ask(f"{name}-alone", 0, LINES - 1)
        if answer.status_code != 503:
            return answer
        await asyncio.sleep(0.02)
    raise AssertionError("no call was let through")


async def test_a_failed_probe_opens_again(on: Breakers) -> None:
    await on.opened("bback", "bback-alone")
    assert (await _first_sent(on, "bback")).status_code == 500
    assert on.farm["bback"].count == IN_A_ROW + 1
    await on.left_alone("bback", "bback-alone")
    on.farm["bback"].script = says()
    assert (await _first_sent(on, "bback")).status_code == 200
    assert (await on.ask("bback-moving")).headers["x-tollgate-provider"] == "bback"


# -- what a provider says ----------------------------------------------------------------------------------------------


async def test_a_pause_that_a_provider_asks_for_is_kept_by_all_clients_and_workers(on: Breakers) -> None:
    on.farm["bpause"].script = fails(429, "retry-after: 2", message="Slow down.")
    answer = await on.ask("bpause-alone")
    asked = time.monotonic()
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "2"
    on.farm["bpause"].script = says()
    assert int((await on.left_alone("bpause", "bpause-alone")).headers["retry-after"]) <= 2
    assert (await on.ask("bpause-spare")).headers["x-tollgate-provider"] == "bspare"
    await on.heard("bpause")
    await on.left_alone("bpause", "bpause-alone", worker=1)
    await _until_sent(on, "bpause-alone", 0)
    assert time.monotonic() - asked >= 1.95
    on.farm["bpause"].script = says(after_s=0.1)
    assert {each.status_code for each in await on.asks("bpause-alone", 1)} == {200}  # all, not one at a time


async def _until_sent(on: Breakers, model: str, worker: int) -> None:
    async def answered() -> bool:
        return (await on.ask(model, worker)).status_code == 200

    await until(answered, 10)


async def test_a_refused_key_trips_all_models_of_the_provider_alerts_and_stays_a_secret(on: Breakers) -> None:
    on.farm["bkey"].script = fails(401, message=f"Incorrect API key provided: {CANARY}.", code="invalid_api_key")
    answers = [await on.ask("bkey-spare")]
    assert answers[0].headers["x-tollgate-provider"] == "bspare"
    assert answers[0].headers["x-tollgate-attempts"] == "2"
    assert f"Bearer {CANARY}" == on.farm["bkey"].asked[0].headers["authorization"]
    answers.append(await on.ask("bkey-second"))
    assert answers[1].headers["x-tollgate-provider"] == "bspare"
    answers.append(await on.left_alone("bkey", "bkey-alone"))
    assert on.farm["bkey"].count == 1
    await on.heard("bkey")
    await on.heard("bkey", model="second")
    answers.append(await on.left_alone("bkey", "bkey-alone", worker=1))
    alerts = on.told("the provider refuses our key", provider="bkey")
    assert {alert["model"] for alert in alerts} == {"m", "second"}
    assert {alert["level"] for alert in alerts} == {"error"}
    refused = await _refused_again(on)
    assert error_of(refused) == (502, "upstream_key_refused")
    for answer in (*answers, refused):
        assert CANARY not in answer.text
        assert CANARY not in str(answer.headers)
    assert CANARY not in on.gateway.log.read_text()
    (row, *_) = await on.gateway.sessions(on.key, 2)
    assert CANARY not in str(row)


async def _refused_again(on: Breakers) -> httpx2.Response:
    """The answer to the first call that is sent again, with nobody to fall back on."""
    asked = on.farm["bkey"].count
    while on.farm["bkey"].count == asked:
        answer = await on.ask("bkey-alone")
        await asyncio.sleep(0.02)
    return answer


# -- who hears of it ---------------------------------------------------------------------------------------------------


async def test_what_one_worker_opened_the_other_leaves_alone(on: Breakers) -> None:
    await on.opened("bshared", "bshared-alone")
    began = time.monotonic()
    await on.heard("bshared")
    assert time.monotonic() - began < SHARED_S
    await on.left_alone("bshared", "bshared-alone", worker=1)
    on.farm["bshared"].script = says()
    await _until_sent(on, "bshared-alone", 1)  # its probe heals it for the other one too
    await on.heard("bshared", "closed")
    assert (await on.ask("bshared-alone", 0)).status_code == 200


# -- probes -----------------------------------------------------------------------------------------------------------


async def test_a_provider_whose_list_lacks_the_model_is_passed_over_until_it_has_it(on: Breakers) -> None:
    listed = on.farm["blisted"]
    listed.models = ("m", "x")
    await _answers(on, "blisted")
    listed.models = ("x", "y")
    await _answers(on, "bspare")
    await until(lambda: on.shows(1, "tollgate_model_missing", provider="blisted", model="m"))
    await on.left_alone("blisted", "blisted-alone")
    listed.models = ("m", "y")
    await _answers(on, "blisted")


async def _answers(on: Breakers, name: str) -> None:
    async def by() -> bool:
        return (await on.ask("blisted-spare")).headers.get("x-tollgate-provider") == name

    await until(by, 10)


async def test_a_probe_heals_an_open_breaker_without_a_call(on: Breakers) -> None:
    listed = on.farm["blisted"]
    listed.models = ("m", "x")
    await _until_sent(on, "blisted-alone", 0)
    listed.script = fails(500)

    async def opened() -> bool:
        return (await on.ask("blisted-alone")).status_code == 503

    await until(opened)
    healed, calls, lists = await on.changes("blisted", "closed", "healed"), listed.count, listed.lists
    listed.script = says()

    async def closed() -> bool:
        return await on.changes("blisted", "closed", "healed") > healed

    await until(closed, 10)
    await until(lambda: on.shows(0, "tollgate_breaker_open", provider="blisted", model="m"), 10)
    assert listed.count == calls
    assert listed.lists > lists
    assert (await on.ask("blisted-alone")).status_code == 200


# -- remembering -------------------------------------------------------------------------------------------------------


async def test_a_gateway_that_starts_again_remembers_who_asked_for_a_pause(own: Gateway) -> None:
    script: Script = fails(429, "retry-after: 60")
    async with routed(own, PORT) as before:
        before.farm["bkept"].script = script
        assert (await before.call("bkept-alone")).status_code == 429
    await asyncio.to_thread(own.stop)
    await asyncio.to_thread(own.start)
    async with routed(own, PORT) as after, lines(own) as workers:
        on = Breakers(after.gateway, after.farm, after.http, after.key, workers)
        for worker in (0, 1):
            told = await on.left_alone("bkept", "bkept-alone", worker)
            assert 20 <= int(told.headers["retry-after"]) <= 60
        assert after.farm["bkept"].count == 0
