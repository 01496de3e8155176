"""Continuations that end before their answer, and what is not continued: what was delivered is charged."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from metering.keys import SHARDS
from tests.support.continued_calls import (
    CANCEL_S,
    FIRST,
    GRANTED,
    REST,
    Scene,
    asked,
    begins,
    closes,
    errs,
    goes_on,
    tokens,
    whole,
)
from tests.support.continuing import CONFIG, PORT, charged_in
from tests.support.gateway import Gateway, Stores, running, until
from tests.support.raw_client import DONE, post
from tests.support.scripted_providers import Turn, scripted


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with running(tmp_path_factory.mktemp("continuation"), CONFIG) as gateway:
        yield gateway


@pytest.fixture
async def stores(gateway: Gateway) -> AsyncIterator[Stores]:
    async with gateway.connected() as stores:
        yield stores


@pytest.fixture
async def scene(gateway: Gateway, stores: Stores) -> Scene:
    return Scene(gateway, await gateway.key(GRANTED, parallel=1))


async def test_credit_that_ends_while_the_second_writes_cuts_cleanly(gateway: Gateway, stores: Stores) -> None:
    scene = Scene(gateway, await gateway.key(12_000, parallel=1))

    async def writes(turn: Turn) -> None:
        await turn.say(turn.anchor)
        while not turn.left.is_set():
            await turn.say(" red")
            await asyncio.sleep(0)

    async with scripted(PORT, a=begins(scene, closes), b=writes) as turns:
        await scene.run()
        await asyncio.wait_for(turns[1].left.wait(), 5)
    assert scene.error is not None
    assert scene.error["metadata"]["limit"] == "balance"
    new = scene.text.removeprefix(FIRST)
    assert set(new.split()) == {"red"}
    (row,) = await gateway.sessions(scene.key, 1)
    assert row["charged"] == row["prompt_tokens"] * 10 + tokens(FIRST) * 100 + tokens(new) * 300 <= 12_000
    assert row["charged"] > 12_000 - 2 * 300
    assert (row["outcome"], row["absorbed"]) == ("cut", 0)
    assert [each for frame in scene.frames for each in frame.finishes] == [(0, "length")]
    assert {frame.data["id"] for frame in scene.frames if "id" in frame.data} == {"id-a"}


@pytest.mark.parametrize("content", [False, True])
async def test_a_client_that_leaves_pays_what_both_delivered_and_the_second_is_let_go(
    scene: Scene, content: bool
) -> None:
    middle = " runs off," if content else ""
    begun = asyncio.Event()

    async def writes(turn: Turn) -> None:
        await turn.raw(b": hello\n\n")
        if content:
            await turn.say(turn.anchor + middle)
        begun.set()
        await turn.left.wait()

    async with scripted(PORT, a=begins(scene, closes), b=writes) as turns:
        async with post(scene.gateway, scene.key, asked("on")) as scene.call:
            await scene.call.head()
            reading = asyncio.create_task(scene.call.until_content(2 if not content else 3))
            await begun.wait()
            await reading
            await scene.has(FIRST + middle)
            left_at = time.monotonic()
            scene.call.leave("rst")
            await asyncio.wait_for(turns[1].left.wait(), 5)
        assert turns[1].left_at - left_at <= CANCEL_S
        row = await scene.row()
    assert row["charged"] == row["prompt_tokens"] * 10 + tokens(FIRST) * 100 + tokens(middle) * 300
    assert (row["outcome"], row["metadata"]["ending"]) == ("aborted", "client_gone")
    first, second = row["metadata"]["attempts"]
    assert (first["outcome"], second["outcome"]) == ("closed", "client_gone")
    if content:
        assert (second["prompt"], second["output"]) == (row["prompt_tokens"] + tokens(FIRST), tokens(middle))


@pytest.mark.parametrize("content", [False, True])
async def test_a_lease_lost_in_a_continuation_ends_it_and_what_was_delivered_is_charged_once(
    scene: Scene, stores: Stores, content: bool
) -> None:
    middle = " runs off," if content else ""
    begun = asyncio.Event()

    async def writes(turn: Turn) -> None:
        await turn.raw(b": hello\n\n")
        if content:
            await turn.say(turn.anchor + middle)
            await scene.has(FIRST + middle)
        begun.set()
        while not turn.left.is_set():
            await turn.raw(b": here\n\n")
            await asyncio.sleep(0.05)

    async with scripted(PORT, a=begins(scene, closes), b=writes, c=writes) as turns:
        running = asyncio.create_task(scene.run())
        await begun.wait()
        leases = SHARDS[scene.key.account.shard].leases
        assert scene.call is not None
        member = f"{scene.key.account.id}|{scene.call.headers['x-tollgate-session']}"

        async def swept() -> bool:
            await stores.redis.call("ZADD", leases, "XX", "1", member)  # over, as far as the sweeper knows
            return running.done()

        await until(swept)  # a checkpoint may renew it before the sweeper comes
        with pytest.raises(ValueError, match="base 16"):  # the response breaks off
            await running
        await asyncio.wait_for(turns[-1].left.wait(), 5)
    assert scene.text == FIRST + middle
    assert not any(frame.kind == DONE or "error" in frame.data for frame in scene.call.frames)
    row = await scene.gateway.session(scene.call.headers["x-tollgate-session"])
    assert row["outcome"] == "swept"
    due: int = row["metadata"]["counted_prompt"] * 10 + tokens(FIRST) * 100 + tokens(middle) * 300

    async def corrected() -> bool:
        available: int = (await scene.gateway.idle(scene.key)).available
        return available == GRANTED - due

    await until(corrected)


# -- What is not continued --------------------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
EXCLUDED: dict[str, tuple[str, dict[str, Any]]] = {
    "continuation off": ("off", {}),
    "tools": ("on", {"tools": [TOOL]}),
    "a schema": ("on", {"response_format": SCHEMA}),
    "two choices": ("on", {"n": 2}),
    "logprobs": ("on", {"logprobs": True}),
    "hidden reasoning": ("on-hidden", {"max_tokens": 100}),
    "an unfinished message": ("on", {"messages": [{"role": "assistant", "content": "Once"}]}),
}


@pytest.mark.parametrize("what", EXCLUDED)
async def test_what_cannot_be_continued_ends_with_its_error_in_the_stream(scene: Scene, what: str) -> None:
    model, fields = EXCLUDED[what]
    async with scripted(PORT, a=begins(scene, errs)) as turns:
        await scene.run(model, **fields)
        assert [turn.provider for turn in turns] == ["a"]
    assert scene.error is not None
    assert scene.text == FIRST
    row = await scene.row()
    assert (row["charged"], row["outcome"]) == (row["prompt_tokens"] * 10 + tokens(FIRST) * 100, "error")


async def test_reasoning_that_was_delivered_is_not_continued(scene: Scene) -> None:
    async def thinks(turn: Turn) -> None:
        await turn.chunk({"role": "assistant", "reasoning_content": "Hm."})
        await turn.say(FIRST)
        await scene.has(FIRST)

    async with scripted(PORT, a=thinks) as turns:
        await scene.run()
        assert len(turns) == 1
    assert scene.error is not None
    assert (await scene.row())["outcome"] == "error"


async def test_a_continued_answer_is_not_kept_for_others(scene: Scene) -> None:
    fields = asked("kept")

    async def tells(turn: Turn) -> None:
        await turn.say(FIRST + REST)
        await turn.finish()

    async with scripted(PORT, a=begins(scene, closes), b=goes_on()):
        await scene.run("kept", messages=fields["messages"])
    whole(scene)
    await scene.row()
    async with scripted(PORT, a=tells) as turns:
        for expected in (1, 1):  # an answer of one provider is kept
            await scene.run("kept", messages=fields["messages"])
            assert len(turns) == expected
            await scene.gateway.idle(scene.key)


async def test_a_gateway_that_stops_ends_a_continuation_in_band_for_what_was_delivered(gateway: Gateway) -> None:
    """The last one here: the module's gateway is gone after it."""
    scene = Scene(gateway, await gateway.key(GRANTED, parallel=1))
    process = gateway.process
    assert process is not None

    async def writes(turn: Turn) -> None:
        await turn.say(turn.anchor)
        process.send_signal(signal.SIGTERM)
        while not turn.left.is_set():
            await turn.say(" red")
            await asyncio.sleep(0.05)

    async with scripted(PORT, a=begins(scene, closes), b=writes):
        await scene.run()
    middle = scene.text.removeprefix(FIRST)
    assert set(middle.split()) == {"red"}
    assert scene.error is not None
    assert scene.error["code"] == "shutting_down"
    assert scene.frames[-1].kind == DONE
    assert await asyncio.to_thread(process.wait, 60) == 0
    told = await asyncio.to_thread(
        scene.gateway.tollgate, "sessions", "list", "--account", scene.key.account.id, "--json"
    )
    assert told.returncode == 0, told.stderr
    (row,) = json.loads(told.stdout)["sessions"]
    due = row["prompt_tokens"] * 10 + tokens(FIRST) * 100 + tokens(middle) * 300
    assert (charged_in(row["charged"]), row["state"]) == (due, "error")
