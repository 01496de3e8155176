"""Streams that break after content and go on at the next candidate: one text, one stream, one bill."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from openai import AsyncOpenAI

from tests.support.continued_calls import (
    BREAKS,
    CANCEL_S,
    FIRST,
    GRANTED,
    REST,
    Scene,
    asked,
    begins,
    closes,
    goes_on,
    tokens,
    whole,
)
from tests.support.continuing import CONFIG, PORT, PRICES, charged_in
from tests.support.gateway import Gateway, Stores, running, until
from tests.support.raw_client import DONE
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


@pytest.mark.parametrize("fault", BREAKS)
async def test_a_stream_that_breaks_after_content_goes_on_at_the_next_candidate(scene: Scene, fault: str) -> None:
    async with scripted(PORT, a=begins(scene, BREAKS[fault]), b=goes_on()) as turns:
        await scene.run()
        assert [turn.provider for turn in turns] == ["a", "b"]
        ended = time.monotonic()
        if fault in ("server", "garbage"):  # its connection is open, and nobody wants what it still says
            await asyncio.wait_for(turns[0].left.wait(), 5)
            assert turns[0].left_at - ended <= CANCEL_S
    whole(scene)
    assert scene.text == FIRST + REST
    row = await scene.row()
    given = row["metadata"]["counted_prompt"]
    due = given * PRICES["a"][0] + tokens(FIRST) * PRICES["a"][1] + tokens(REST) * PRICES["b"][1]
    usage, bill = scene.usage["usage"], scene.usage["x_tollgate"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (given, tokens(FIRST) + tokens(REST))
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert charged_in(usage["cost"]) == charged_in(bill["charge"]) == row["charged"] == due
    assert (bill["provider"], bill["attempts"]) == ("b", 2)
    assert (row["outcome"], row["source"], row["absorbed"]) == ("completed", "counted", 0)
    assert (row["prompt_tokens"], row["output_tokens"]) == (given, tokens(FIRST) + tokens(REST))
    first, second = row["metadata"]["attempts"]
    assert (first["provider"], first["model"], first["outcome"]) == ("a", "gpt-4o-mini", fault.strip())
    assert (second["provider"], second["model"], second["outcome"]) == ("b", "gpt-4o", "completed")
    assert (first["prompt"], first["output"], first["status"]) == (given, tokens(FIRST), 200)
    assert (second["prompt"], second["output"], second["status"]) == (1000, 500, 200)  # as it said itself
    assert first["ms"] >= (500 if fault == "stall" else 0)
    assert 0 <= second["ms"] <= row["metadata"]["duration_ms"]
    assert first["cost"] == given * 1 + tokens(FIRST) * 2
    assert second["cost"] == 1000 * 3 + 500 * 4
    assert row["metadata"]["house_cost"] == first["cost"] + second["cost"]


async def test_the_official_client_reads_one_answer(scene: Scene) -> None:
    said: list[str] = []
    chunks: list[Any] = []

    async def breaks(turn: Turn) -> None:
        await turn.say(FIRST)
        await until(lambda: "".join(said) == FIRST)

    async with (
        scripted(PORT, a=breaks, b=goes_on()),
        AsyncOpenAI(base_url=f"{scene.gateway.url}/v1", api_key=scene.key.text, max_retries=0) as client,
    ):
        fields = asked("on")
        async with client.chat.completions.stream(
            model="on", messages=fields["messages"], stream_options={"include_usage": True}
        ) as stream:
            async for event in stream:
                if event.type == "content.delta":
                    said.append(event.delta)
                elif event.type == "chunk":
                    chunks.append(event.chunk)
            final = await stream.get_final_completion()
    assert final.choices[0].message.content == "".join(said) == FIRST + REST
    assert final.choices[0].finish_reason == "stop"
    assert final.usage is not None
    assert final.usage.completion_tokens == tokens(FIRST) + tokens(REST)
    assert {chunk.id for chunk in chunks} == {"id-a"}


# -- The seam, and what B is asked ------------------------------------------------------------------------------------

SEAMS: dict[str, tuple[str, str, str, str]] = {
    # what -> (provider, A's text, B's reply, what is new in it)
    "prefill, white space at the seam": ("ollama", "A list:\n\n- one\n", "\n- two\n- three", "- two\n- three"),
    "prefill, a space that both have": ("ollama", "It was a dark ", " and stormy night.", "and stormy night."),
    "prefill, within an emoji's family": ("ollama", "A family: \U0001f468\u200d", "\U0001f469", "\U0001f469"),
    "prefix, all of it again": ("mistral", "Once upon a time", "Once upon a time there was.", " there was."),
    "continue_final, within a word": ("vllm", "Once upon a ti", "me there was a fox.", "me there was a fox."),
    "prefill, at Anthropic": ("claude", "Once upon a time", " there was a fox.", " there was a fox."),
}


async def speaks_claude(turn: Turn, text: str) -> None:
    """A whole answer of Anthropic's."""
    usage = {"input_tokens": 900, "output_tokens": 1}
    message = {"id": "msg_1", "model": "claude", "role": "assistant", "content": [], "usage": usage}
    await turn.event({"type": "message_start", "message": message}, "message_start")
    block = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    await turn.event(block, "content_block_start")
    for at in range(0, len(text), 5):
        delta = {"type": "text_delta", "text": text[at : at + 5]}
        await turn.event({"type": "content_block_delta", "index": 0, "delta": delta}, "content_block_delta")
    await turn.event({"type": "content_block_stop", "index": 0}, "content_block_stop")
    ended = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 33}}
    await turn.event(ended, "message_delta")
    await turn.event({"type": "message_stop"}, "message_stop")
    turn.writer.write(b"0\r\n\r\n")


@pytest.mark.parametrize("what", SEAMS)
async def test_each_wire_is_asked_its_own_way_and_no_character_is_lost_or_doubled(scene: Scene, what: str) -> None:
    provider, first, reply, new = SEAMS[what]

    async def answers(turn: Turn) -> None:
        if provider == "claude":
            await speaks_claude(turn, reply)
            return
        so_far = {"prompt_tokens": 800, "completion_tokens": 7, "total_tokens": 807}
        await turn.say(*reply, **({"usage": so_far} if provider == "vllm" else {}))
        await turn.finish()

    async with scripted(PORT, a=begins(scene, closes, first), **{provider: answers}) as turns:
        await scene.run(f"on-{provider}", max_tokens=200)
    whole(scene)
    assert scene.text == first + new
    given, spent = turns[1].body["messages"][-1], tokens(first)
    limit = {name: value for name, value in turns[1].body.items() if name.startswith("max_")}
    assert list(limit.values()) == [200 - spent]
    assert given["role"] == "assistant"
    told = given["content"] if isinstance(given["content"], str) else given["content"][0]["text"]
    assert told == first.rstrip()
    assert given.get("prefix") == (True if provider == "mistral" else None)
    assert turns[1].body.get("continue_final_message") == (True if provider == "vllm" else None)
    assert turns[1].body.get("add_generation_prompt") == (False if provider == "vllm" else None)
    row = await scene.row()
    count = row["output_tokens"] - spent
    assert row["prompt_tokens"] == row["metadata"]["counted_prompt"] == scene.usage["usage"]["prompt_tokens"]
    assert row["charged"] == row["prompt_tokens"] * 10 + spent * 100 + count * 300
    assert provider == "claude" or count == tokens(new)
    second = row["metadata"]["attempts"][1]
    said = {"claude": (900, 33)}.get(provider, (1000, 500))
    assert (second["prompt"], second["output"], second["cost"]) == (*said, said[0] * 3 + said[1] * 4)


async def test_by_instruction_the_limit_shrinks_and_the_text_stands_before_the_request(scene: Scene) -> None:
    async with scripted(PORT, a=begins(scene, closes), b=goes_on()) as turns:
        await scene.run(max_completion_tokens=300)
    assert turns[1].body["max_completion_tokens"] == 300 - tokens(FIRST)
    assert turns[1].body["messages"][:2] == turns[0].body["messages"]
    assert turns[1].body["messages"][2] == {"role": "assistant", "content": FIRST}
    assert turns[1].body["model"] == "gpt-4o"
    assert turns[1].body["messages"][3]["role"] == "user"
    assert scene.text == FIRST + REST


# -- B fails, too -----------------------------------------------------------------------------------------------------


async def rambles(turn: Turn) -> None:
    """An answer that begins anew."""
    await turn.say("Sure! Here is the story that you asked for, from its beginning: " * 6)
    await turn.finish()


async def refuses(turn: Turn) -> None:
    await turn.status(400, {"error": {"message": "no assistant message at the end", "type": "invalid_request_error"}})


async def shows_and_fails(turn: Turn) -> None:
    """Text and an error in one read: the text was never delivered."""
    first = json.dumps({"id": "x", "choices": [{"index": 0, "delta": {"content": turn.anchor + " LOST"}}]})
    await turn.raw(f'data: {first}\n\ndata: {{"error": {{"message": "boom"}}}}\n\n'.encode())


UNFIT = {"garbage": rambles, "caller": refuses, "server": shows_and_fails}


@pytest.mark.parametrize("fault", UNFIT)
async def test_a_candidate_that_does_not_go_on_is_followed_by_the_next(scene: Scene, fault: str) -> None:
    async with scripted(PORT, a=begins(scene, closes), b=UNFIT[fault], c=goes_on()) as turns:
        await scene.run()
        assert [turn.provider for turn in turns] == ["a", "b", "c"]
        assert turns[2].body["messages"][2]["content"] == FIRST
    whole(scene)
    assert scene.text == FIRST + REST
    row = await scene.row()
    due = row["prompt_tokens"] * 10 + tokens(FIRST) * 100 + tokens(REST) * 700
    assert (row["charged"], row["outcome"]) == (due, "completed")
    assert [each["outcome"] for each in row["metadata"]["attempts"]] == ["closed", fault, "completed"]
    read = row["metadata"]["attempts"][1]["prompt"]  # by whoever began to answer: the text as well as the prompt
    assert read == (0 if fault == "caller" else row["prompt_tokens"] + tokens(FIRST))
    assert scene.usage["x_tollgate"]["attempts"] == 3


@pytest.mark.parametrize("fault", UNFIT)
async def test_where_nobody_goes_on_the_first_failure_is_told_and_what_came_is_charged(
    scene: Scene, fault: str
) -> None:
    async with scripted(PORT, a=begins(scene, closes), b=UNFIT[fault]) as turns:
        await scene.run("on-b")
        assert len(turns) == 2
    assert scene.error is not None
    assert scene.error["code"] == "upstream_truncated"
    assert scene.frames[-1].kind == DONE
    assert scene.text == FIRST
    row = await scene.row()
    assert (row["charged"], row["outcome"]) == (row["prompt_tokens"] * 10 + tokens(FIRST) * 100, "error")
    assert row["output_tokens"] == tokens(FIRST)
    assert [each["outcome"] for each in row["metadata"]["attempts"]] == ["closed", fault]


async def test_a_continuation_that_breaks_is_itself_continued(scene: Scene) -> None:
    middle = " runs off,"

    async def breaks(turn: Turn) -> None:
        await turn.say(turn.anchor + middle)
        await scene.has(FIRST + middle)

    async with scripted(PORT, a=begins(scene, closes), b=breaks, c=goes_on()) as turns:
        await scene.run()
        assert turns[2].body["messages"][2]["content"] == FIRST + middle
    whole(scene)
    assert scene.text == FIRST + middle + REST
    row = await scene.row()
    given = row["prompt_tokens"]
    assert row["charged"] == given * 10 + tokens(FIRST) * 100 + tokens(middle) * 300 + tokens(REST) * 700
    first, second, third = row["metadata"]["attempts"]
    assert (first["prompt"], first["output"]) == (given, tokens(FIRST))
    assert (second["prompt"], second["output"]) == (given + tokens(FIRST), tokens(middle))
    assert second["cost"] == second["prompt"] * 3 + second["output"] * 4
    assert (third["prompt"], third["output"]) == (1000, 500)
    assert row["metadata"]["house_cost"] == first["cost"] + second["cost"] + 1000 * 5 + 500 * 6


async def test_more_candidates_than_attempts_are_allowed_are_not_asked(scene: Scene) -> None:
    async with scripted(PORT, a=begins(scene, closes), b=refuses) as turns:
        await scene.run("on-two")
        assert [turn.provider for turn in turns] == ["a", "b"]
    assert scene.error is not None
