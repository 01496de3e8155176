"""How much a running gateway has under way at a provider: its places and budgets, the queue before them, who leaves it.

Who waits holds credit already, so whatever ends the wait has to give back the place and the hold.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import pytest

from tests.support.gateway import Gateway, Key, until
from tests.support.ports import free_port
from tests.support.raw_client import ask, post
from tests.support.routed import (
    GRANTED,
    OUTPUT,
    PROMPT,
    Asked,
    Routed,
    Script,
    counted,
    error_of,
    fails,
    hangs,
    provider_table,
    route_table,
    routed,
    says,
)

PORT = free_port()
ONCE = "retry = { retries = 0 }"
MIXED = 200
PLACES = 20
WAIT_S = 2.4


def _limited(name: str, limits: str, queue: str, *more: str) -> str:
    limited = f"limits = {{ {limits} }}" if limits else ""
    return provider_table(name, PORT, limited, f"queue = {{ {queue} }}", *more)


PROVIDERS = "".join(
    (
        _limited("ltwo", "concurrent = 2", f"length_max = 50, wait_ms = {WAIT_S * 1000:.0f}"),
        _limited(
            "lmodels",
            "",
            f"wait_ms = {WAIT_S * 1000:.0f}",
            "models = { m = { concurrent = 1 }, n = { concurrent = 2 } }",
        ),
        _limited("lshort", "concurrent = 1", "length_max = 2, wait_ms = 400"),
        _limited("lone", "concurrent = 1", f"wait_ms = {WAIT_S * 1000:.0f}"),
        _limited("ltokens", "tokens_per_minute = 1000", "wait_ms = 100"),
        _limited("lrequests", "requests_per_minute = 3", "wait_ms = 200"),
        _limited("lmixed", f"concurrent = {PLACES}", f"length_max = 300, wait_ms = {WAIT_S * 1000:.0f}"),
        provider_table("lfree", PORT),
        *(route_table(f"l-{name}", f"l{name}", lines=(ONCE,)) for name in ("two", "models", "short", "one", "tokens")),
        *(route_table(f"l-{name}", f"l{name}", lines=(ONCE,)) for name in ("requests", "mixed")),
        route_table("l-models-n", 'lmodels, model = "n"', lines=(ONCE,)),
        route_table("l-spare", "lone", "lfree", lines=(ONCE,)),
    )
)


@pytest.fixture
async def on(gateway: Gateway) -> AsyncIterator[Routed]:
    """The session's gateway with this module's providers."""
    async with routed(gateway, PORT) as found:
        yield found


@contextlib.asynccontextmanager
async def occupied(on: Routed, provider: str, model: str) -> AsyncIterator[asyncio.Event]:
    """The provider's one place is taken until the event is set, at the latest at the end."""
    gate = asyncio.Event()
    on.farm[provider].script = says(gate=gate)
    running = asyncio.create_task(on.call(model, key=await on.gateway.key(GRANTED)))
    await counted(on.farm[provider], 1)
    try:
        yield gate
    finally:
        gate.set()
        assert (await running).status_code == 200


async def waiting(on: Routed, provider: str, count: int) -> None:
    """Until so many wait for a place at the provider."""
    await until(lambda: on.shows(count, "tollgate_places_waiting", provider=provider))


async def free(on: Routed, provider: str) -> None:
    """Until nobody has a place or waits for one."""
    await waiting(on, provider, 0)
    await until(lambda: on.shows(0, "tollgate_places_in_use", provider=provider))


# -- concurrency -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
async def test_a_provider_has_no_more_calls_at_once_than_its_places(on: Routed, stream: bool) -> None:
    on.farm["ltwo"].script = says(after_s=0.02)
    assert await on.shares("l-two", 12, stream=stream) == {"ltwo": 12}
    assert on.farm["ltwo"].most == 2
    await free(on, "ltwo")


async def test_each_model_has_places_of_its_own(on: Routed) -> None:
    gate = asyncio.Event()
    on.farm["lmodels"].script = says(gate=gate)
    calls = [asyncio.create_task(on.call(model)) for model in ["l-models"] * 3 + ["l-models-n"] * 3]
    await waiting(on, "lmodels", 3)
    assert sorted(asked.body["model"] for asked in on.farm["lmodels"].asked) == ["m", "n", "n"]
    gate.set()
    assert {answer.status_code for answer in await asyncio.gather(*calls)} == {200}
    await free(on, "lmodels")


# -- the queue ---------------------------------------------------------------------------------------------------------


async def test_a_full_queue_refuses_at_once_and_who_waits_too_long_is_refused_then_and_neither_pays(on: Routed) -> None:
    keys = [await on.gateway.key(GRANTED) for _ in range(3)]
    async with occupied(on, "lshort", "l-short"):
        began = time.monotonic()
        waiters = [asyncio.create_task(on.call("l-short", key=key)) for key in keys[:2]]
        await waiting(on, "lshort", 2)
        third = await on.call("l-short", key=keys[2])
        assert not any(waiter.done() for waiter in waiters)
        late = await asyncio.gather(*waiters)
        assert 0.4 <= time.monotonic() - began < 2
    for answer, key in zip((third, *late), (keys[2], *keys[:2]), strict=True):
        assert error_of(answer) == (503, "provider_busy")
        assert int(answer.headers["retry-after"]) >= 1
        await on.all_back(key)
        assert await on.untouched(key)
    assert on.farm["lshort"].count == 1


async def test_a_place_at_another_candidate_is_preferred_to_a_queue(on: Routed) -> None:
    async with occupied(on, "lone", "l-spare"):
        assert await on.shares("l-spare", 5) == {"lfree": 5}
        assert await on.metric("tollgate_places_waiting", provider="lone") == 0
    assert await on.answered_by("l-spare") == "lone"


async def test_calls_that_come_together_take_the_others_places_rather_than_wait(on: Routed) -> None:
    gate = asyncio.Event()
    on.farm["lone"].script = on.farm["lfree"].script = says(gate=gate)
    calls = asyncio.create_task(on.together("l-spare", 8))
    await until(lambda: on.farm["lone"].running + on.farm["lfree"].running == 8, WAIT_S / 2, every=0.005)
    gate.set()
    assert await calls == {"lone": 1, "lfree": 7}


async def test_who_falls_back_on_a_full_candidate_waits_there(on: Routed) -> None:
    on.farm["lfree"].script = fails(500)
    async with occupied(on, "lone", "l-one") as gate:
        calling = asyncio.create_task(on.call("l-spare"))
        await waiting(on, "lone", 1)
        gate.set()
        assert (await calling).headers["x-tollgate-provider"] == "lone"


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_the_queue_frees_its_place_and_its_hold_at_once(on: Routed, stream: bool) -> None:
    leaver, patient = await on.gateway.key(GRANTED), await on.gateway.key(GRANTED)
    async with occupied(on, "lone", "l-one") as gate:
        async with post(on.gateway, leaver, ask(model="l-one", stream=stream, max_tokens=20)) as call:
            await waiting(on, "lone", 1)
            assert (await on.balance(leaver)).held > 0
            call.leave()
            left = time.monotonic()
            await until(lambda: on.untouched(leaver), every=0.005)
            assert time.monotonic() - left < 1  # not when its patience ends
        await waiting(on, "lone", 0)
        behind = asyncio.create_task(on.call("l-one", key=patient))
        await waiting(on, "lone", 1)
        gate.set()
        assert (await behind).status_code == 200
    assert on.farm["lone"].count == 2
    await free(on, "lone")


async def test_who_came_first_is_served_first(on: Routed) -> None:
    names = [f"number {number}" for number in range(5)]
    async with occupied(on, "lone", "l-one") as gate:
        calls = []
        for place, name in enumerate(names, 1):
            calls.append(asyncio.create_task(on.call("l-one", messages=[{"role": "user", "content": name}])))
            await waiting(on, "lone", place)
        gate.set()
        await asyncio.gather(*calls)
    assert [asked.said for asked in on.farm["lone"].asked[1:]] == names
    assert on.farm["lone"].most == 1


# -- budgets -----------------------------------------------------------------------------------------------------------


async def test_tokens_that_a_call_did_not_use_return_to_the_budget(on: Routed) -> None:
    for stream in (True, False, True, False):
        answer = await on.call("l-tokens", stream=stream, max_tokens=900)  # takes nearly all of the minute's tokens
        assert answer.status_code == 200
        await free(on, "ltokens")
    on.farm["ltokens"].script = says(tokens=(PROMPT, 880))
    assert (await on.call("l-tokens", max_tokens=880)).status_code == 200
    spent = (await on.all_back()).charged
    answer = await on.call("l-tokens", max_tokens=900)
    assert error_of(answer) == (503, "provider_busy")
    assert 30 <= int(answer.headers["retry-after"]) <= 60
    assert (await on.all_back()).charged == spent
    assert on.farm["ltokens"].count == 5


async def test_requests_per_minute_are_not_exceeded(on: Routed) -> None:
    assert await on.shares("l-requests", 3) == {"lrequests": 3}
    key = await on.gateway.key(GRANTED)
    answer = await on.call("l-requests", key=key)
    assert error_of(answer) == (503, "provider_busy")
    assert 10 <= int(answer.headers["retry-after"]) <= 20
    await on.all_back(key)
    assert await on.untouched(key)
    assert on.farm["lrequests"].count == 3


# -- whatever ends a call ----------------------------------------------------------------------------------------------


def mixed() -> Script:
    """What the call's own words say."""
    scripts = {
        "ends": says(),
        "fails": fails(500),
        "waits": fails(429, "retry-after: 1"),
        "cut": says(cut=True),
        "hangs": hangs(),
        "stalls": hangs(headed=True),
    }

    async def garbage(asked: Asked) -> bool:
        await asked.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 4\r\n\r\n<ok>")
        return False

    async def script(asked: Asked) -> bool:
        return await scripts.get(asked.said, garbage)(asked)

    return script


async def _one_of_many(on: Routed, key: Key, number: int) -> None:
    """A call that ends in one of many ways; who would hang leaves."""
    kinds = ("ends", "fails", "cut", "hangs", "garbage", "stalls", "waits", "left")
    kind, stream = kinds[number % len(kinds)], number // len(kinds) % 2 == 0
    async with post(on.gateway, key, ask(kind, model="l-mixed", stream=stream, max_tokens=20)) as call:
        if kind in ("hangs", "stalls", "left"):
            await asyncio.sleep(0 if kind == "left" else 0.05)  # no wait for anything: the moment at which it leaves
            call.leave("rst" if number % 3 else "fin")
        else:
            await call.head()
            await call.body()


async def test_no_place_is_lost_whatever_ends_a_call(on: Routed) -> None:
    on.farm["lmixed"].script = mixed()
    await asyncio.gather(*(_one_of_many(on, on.key, number) for number in range(MIXED)))
    balance = await on.all_back()
    assert 0 < balance.charged < MIXED * (PROMPT + OUTPUT) * 2
    await free(on, "lmixed")
    gate = asyncio.Event()
    on.farm["lmixed"].script = says(gate=gate)
    calls = asyncio.create_task(on.shares("l-mixed", PLACES + 1))
    await until(lambda: on.farm["lmixed"].running == PLACES, every=0.005)  # every place can be taken
    await waiting(on, "lmixed", 1)  # and not one more
    gate.set()
    assert await calls == {"lmixed": PLACES + 1}
    await free(on, "lmixed")
