"""Hedged calls: a second attempt beside a slow one, the first content wins, the client pays for the winner alone."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx2
import pytest

from proxy.ids import session_id
from tests.support.continuing import CONFIG, HEDGED, PORT, PRICES
from tests.support.gateway import Gateway, Key, Stores, running, until
from tests.support.raw_client import DONE, RawCall, post
from tests.support.scripted_providers import Script, Turn, scripted

GRANTED = 1_000_000
CANCEL_S = 0.25
WORDS = "One two three."
numbers = itertools.count()


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    config = CONFIG.replace("consecutive_max = 1000000", "consecutive_max = 2")
    assert config != CONFIG
    with running(tmp_path_factory.mktemp("hedging"), config) as gateway:
        yield gateway


@pytest.fixture
async def stores(gateway: Gateway) -> AsyncIterator[Stores]:
    async with gateway.connected() as stores:
        yield stores


@pytest.fixture
async def key(gateway: Gateway, stores: Stores) -> Key:
    return await gateway.key(GRANTED)


@pytest.fixture
def route() -> str:
    """A route of its own, whose candidates nobody has asked."""
    at = next(numbers)
    assert at < HEDGED
    return f"hedged-{at}"


async def quick(turn: Turn) -> None:
    await turn.say(WORDS)
    await turn.finish(30, 4)


async def answered_slowly(turn: Turn) -> None:
    """A 2xx, and nothing else until it is let go."""
    await turn.raw(b": wait\n\n")
    await turn.left.wait()


async def silent(turn: Turn) -> None:
    await turn.left.wait()


def after(event: asyncio.Event, then: Script) -> Script:
    """Wait for this, and answer."""

    async def script(turn: Turn) -> None:
        await turn.raw(b": wait\n\n")
        await event.wait()
        await then(turn)

    return script


async def breaks(turn: Turn) -> None:
    """The connection ends before there is content."""


async def fails(turn: Turn) -> None:
    await turn.status(500, {"error": {"message": "boom"}})


def asked(model: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"Count, {session_id()}."}]
    return {"model": model, "stream": True, "messages": messages, "stream_options": {"include_usage": True}}


async def ask(gateway: Gateway, key: Key, model: str) -> RawCall:
    """A whole call."""
    async with post(gateway, key, asked(model)) as call:
        await call.head()
        await call.rest()
    return call


async def warmed(gateway: Gateway, stores: Stores, model: str, provider: str = "a") -> None:
    """So many quick first contents of the first candidate as a hedge needs."""
    key = await gateway.key(GRANTED)
    async with scripted(PORT, **{provider: quick}) as turns:
        for _ in range(3):
            assert (await ask(gateway, key, model)).text == WORDS
        assert len(turns) == 3
    await gateway.idle(key)


async def row_of(gateway: Gateway, key: Key) -> dict[str, Any]:
    """The one session's row, once nothing is held, and no place at any provider is in use."""
    (row,) = await gateway.sessions(key, 1)
    if isinstance(row["metadata"], str):
        row["metadata"] = json.loads(row["metadata"])
    assert (await gateway.idle(key)).available == GRANTED - row["charged"]
    await until(lambda: no_place_in_use(gateway))
    return row


async def no_place_in_use(gateway: Gateway) -> bool:
    return not any([await gauge(gateway, name) for name in ("tollgate_places_in_use", "tollgate_places_waiting")])


async def gauge(gateway: Gateway, name: str, labels: str = "") -> float:
    """The sum of a metric's samples whose labels have this in them."""
    async with httpx2.AsyncClient(verify=False) as client:
        page = (await client.get(f"{gateway.url}/metrics")).text
    lines = [line for line in page.splitlines() if line.startswith(name + "{") and labels in line]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def paid(row: dict[str, Any], provider: str) -> None:
    """The client has paid for this provider's answer, at its price."""
    given, made = PRICES[provider]
    assert row["charged"] == 30 * given + 4 * made
    assert row["metadata"]["provider"] == provider


async def test_without_enough_first_contents_no_second_attempt_begins(
    gateway: Gateway, stores: Stores, key: Key, route: str
) -> None:
    async def slow(turn: Turn) -> None:
        await asyncio.sleep(0.3)
        await quick(turn)

    async with scripted(PORT, a=slow) as turns:
        call = await ask(gateway, key, route)
        assert len(turns) == 1
    assert (call.text, call.headers["x-tollgate-attempts"]) == (WORDS, "1")
    paid(await row_of(gateway, key), "a")


@pytest.mark.parametrize("slow", [answered_slowly, silent])
async def test_the_rival_of_a_slow_attempt_wins_and_the_loser_is_the_houses(
    gateway: Gateway, stores: Stores, key: Key, route: str, slow: Script
) -> None:
    await warmed(gateway, stores, route)
    async with scripted(PORT, a=slow, b=quick) as turns:
        call = await ask(gateway, key, route)
        ended = time.monotonic()
        assert [turn.provider for turn in turns] == ["a", "b"]
        await asyncio.wait_for(turns[0].left.wait(), 5)
        assert turns[0].left_at - ended <= CANCEL_S
    assert call.text == WORDS
    assert call.frames[-1].kind == DONE
    assert (call.headers["x-tollgate-provider"], call.headers["x-tollgate-attempts"]) == ("b", "2")
    bill = next(frame.data for frame in call.frames if frame.data.get("usage"))
    assert (bill["x_tollgate"]["provider"], bill["x_tollgate"]["attempts"]) == ("b", 2)
    row = await row_of(gateway, key)
    paid(row, "b")
    lost, won = row["metadata"]["attempts"]
    assert (lost["provider"], lost["outcome"]) == ("a", "hedge_lost")
    assert (won["provider"], won["outcome"], won["cost"]) == ("b", "completed", 30 * 3 + 4 * 4)
    known = row["metadata"]["counted_prompt"] if slow is answered_slowly else 0
    assert (lost["prompt"], lost["output"], lost["cost"]) == (known, 0, known or None)
    assert row["metadata"]["house_cost"] == won["cost"] + known
    assert await gauge(gateway, "tollgate_hedges_total", f'route="{route}"') == 1
    assert await gauge(gateway, "tollgate_attempts_total", 'outcome="hedge_lost"') >= 1


async def test_losing_does_not_count_as_a_failure_of_the_candidate(
    gateway: Gateway, stores: Stores, key: Key, route: str
) -> None:
    await warmed(gateway, stores, route)
    for _ in range(3):  # two failures in a row would open its breaker
        async with scripted(PORT, a=silent, b=quick) as turns:
            assert (await ask(gateway, key, route)).headers["x-tollgate-provider"] == "b"
            assert [turn.provider for turn in turns] == ["a", "b"]


async def test_the_first_attempt_may_still_win(gateway: Gateway, stores: Stores, key: Key, route: str) -> None:
    await warmed(gateway, stores, route)
    second = asyncio.Event()

    async def waits(turn: Turn) -> None:
        second.set()
        await answered_slowly(turn)

    async with scripted(PORT, a=after(second, quick), b=waits) as turns:
        call = await ask(gateway, key, route)
        await asyncio.wait_for(turns[1].left.wait(), 5)
    assert call.text == WORDS
    assert (call.headers["x-tollgate-provider"], call.headers["x-tollgate-attempts"]) == ("a", "2")
    row = await row_of(gateway, key)
    paid(row, "a")
    outcomes = {each["provider"]: each["outcome"] for each in row["metadata"]["attempts"]}
    assert outcomes == {"a": "completed", "b": "hedge_lost"}


@pytest.mark.parametrize("how", [breaks, fails])
async def test_when_the_first_fails_the_second_answers(
    gateway: Gateway, stores: Stores, key: Key, route: str, how: Script
) -> None:
    await warmed(gateway, stores, route)
    second, failed = asyncio.Event(), asyncio.Event()

    async def waits(turn: Turn) -> None:
        second.set()
        await failed.wait()
        await asyncio.sleep(0.1)  # so that the first one's end comes before this
        await quick(turn)

    async def breaks_then(turn: Turn) -> None:
        await second.wait()
        await how(turn)
        failed.set()

    async with scripted(PORT, a=breaks_then, b=waits):
        call = await ask(gateway, key, route)
    assert call.text == WORDS
    row = await row_of(gateway, key)
    paid(row, "b")
    outcomes = [(each["provider"], each["outcome"]) for each in row["metadata"]["attempts"]]
    assert outcomes == [("a", "closed" if how is breaks else "server"), ("b", "completed")]


async def test_when_both_fail_the_next_candidate_is_asked(
    gateway: Gateway, stores: Stores, key: Key, route: str
) -> None:
    await warmed(gateway, stores, route)
    second = asyncio.Event()

    async def both(turn: Turn) -> None:
        second.set()

    async with scripted(PORT, a=after(second, breaks), b=both, c=quick) as turns:
        call = await ask(gateway, key, route)
        assert [turn.provider for turn in turns] == ["a", "b", "c"]
    assert (call.text, call.headers["x-tollgate-attempts"]) == (WORDS, "3")
    paid(await row_of(gateway, key), "c")


async def test_when_all_fail_the_client_gets_the_error_and_pays_nothing(
    gateway: Gateway, stores: Stores, key: Key, route: str
) -> None:
    await warmed(gateway, stores, route)
    second = asyncio.Event()

    async def both(turn: Turn) -> None:
        second.set()

    async with scripted(PORT, a=after(second, breaks), b=both, c=fails), post(gateway, key, asked(route)) as call:
        await call.head()
        assert call.status == 500  # as the last one said
        assert json.loads(await call.body())["error"]["type"]
    row = await row_of(gateway, key)
    assert (row["charged"], row["outcome"]) == (0, "void")


@pytest.mark.parametrize("answered", [False, True])
async def test_a_client_that_leaves_while_both_run_lets_both_go(
    gateway: Gateway, stores: Stores, key: Key, route: str, answered: bool
) -> None:
    await warmed(gateway, stores, route)
    slow: Script = answered_slowly if answered else silent
    async with scripted(PORT, a=slow, b=answered_slowly) as turns:
        async with post(gateway, key, asked(route)) as call:
            await until(lambda: len(turns) == 2, every=0.002)
            await asyncio.sleep(0.05)  # the second's head reaches the gateway, too
            left_at = time.monotonic()
            call.leave("rst")
            for turn in turns:
                await asyncio.wait_for(turn.left.wait(), 5)
        assert max(turn.left_at for turn in turns) - left_at <= CANCEL_S
        row = await row_of(gateway, key)
    given = row["metadata"]["counted_prompt"]
    assert (row["charged"], row["outcome"]) == ((given * 10, "aborted") if answered else (0, "void"))
    attempts = {each["provider"]: each for each in row["metadata"]["attempts"]}
    assert {each["outcome"] for each in attempts.values()} == {"client_gone"}
    assert (attempts["b"]["prompt"], attempts["b"]["cost"]) == (given, given * 3)
    assert (attempts["a"]["prompt"], attempts["a"]["cost"]) == ((given, given) if answered else (0, None))
    assert row["metadata"]["provider"] == "a"


async def test_a_rival_does_not_queue_for_a_place(gateway: Gateway, stores: Stores, key: Key) -> None:
    await warmed(gateway, stores, "hedged-tight")
    taken, free = asyncio.Event(), asyncio.Event()

    async def holds(turn: Turn) -> None:
        taken.set()
        await after(free, quick)(turn)

    async def slow(turn: Turn) -> None:
        await asyncio.sleep(0.4)
        await quick(turn)

    async with scripted(PORT, a=slow, tight=holds) as turns:
        holder = asyncio.create_task(ask(gateway, await gateway.key(GRANTED), "tight"))
        await taken.wait()
        call = await asyncio.wait_for(ask(gateway, key, "hedged-tight"), 5)
        assert [turn.provider for turn in turns] == ["tight", "a"]
        assert (call.text, call.headers["x-tollgate-attempts"]) == (WORDS, "1")
        free.set()
        assert (await holder).text == WORDS
    paid(await row_of(gateway, key), "a")


async def test_the_last_candidate_has_all_its_time_and_not_the_rest_of_anothers_share(
    gateway: Gateway, stores: Stores, key: Key
) -> None:
    async def late(turn: Turn) -> None:
        for _ in range(4):  # 1.6 s: more than half of the 2.5 s that are shared while another is left
            await turn.raw(b": wait\n\n")
            await asyncio.sleep(0.4)
        await quick(turn)

    async with scripted(PORT, a=fails, b=late):
        call = await ask(gateway, key, "on-b")
    assert call.text == WORDS
    paid(await row_of(gateway, key), "b")
