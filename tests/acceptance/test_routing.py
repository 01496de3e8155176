"""Which candidate a running gateway asks: strategies, stickiness, hints and preferences, what a model takes, the hold.

The session's gateway and its breakers, which never open: who fails here is asked again by the next call.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest

from accounts.preference_admin import prefer_account, prefer_key
from tests.support.gateway import Gateway, until
from tests.support.ports import free_port
from tests.support.routed import (
    OUTPUT,
    PROMPT,
    Routed,
    error_of,
    fails,
    hangs,
    provider_table,
    route_table,
    routed,
    says,
    turns,
)

PORT = free_port()
ONCE = "retry = { retries = 0 }"
EU, US = 'tags = ["eu", "no-training"]', 'tags = ["us"]'
WINDOW = 200
LONG = "word " * 400
TOOL: Any = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
SCHEMA: Any = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}}
IMAGE: Any = [{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}, {"type": "text", "text": "Hi"}]
PROVIDERS = "".join(
    (
        *(provider_table(name, PORT) for name in ("ra", "rb", "rc", "rin", "rout")),
        provider_table("reu", PORT, EU),
        provider_table("rus", PORT, US),
        provider_table("rdull", PORT, "sticky = false"),
        route_table(
            "r-weighted", "ra, weight = 3", "rb, weight = 1", "rc, weight = 0", lines=('strategy = "weighted"', ONCE)
        ),
        route_table(
            "r-quick", 'ra, model = "quick"', 'rb, model = "quick"', lines=('strategy = "least_latency"', ONCE)
        ),
        route_table("r-unknown", 'ra, model = "new"', 'rb, model = "new"', lines=('strategy = "least_latency"', ONCE)),
        route_table("r-cheapest", "rin", "rout", lines=('strategy = "cheapest"', ONCE)),
        route_table("r-busy", "ra", "rb", "rc", lines=('strategy = "least_busy"', ONCE)),
        route_table("r-ordered", "ra", "rb", "rc", lines=(ONCE,)),
        route_table("r-sticky-weighted", "ra", "rb", "rc", lines=('strategy = "weighted"', ONCE)),
        route_table("r-sticky-least_busy", "ra", "rb", "rc", lines=('strategy = "least_busy"', ONCE)),
        route_table("r-dull", "rdull", "ra", lines=('strategy = "least_busy"', ONCE)),
        route_table("r-hinted", "ra", "reu", "rus", lines=(ONCE,)),
        route_table("r-window", f"ra, context_tokens = {WINDOW}", "rb, context_tokens = 300", lines=(ONCE,)),
        route_table("r-open", f"ra, context_tokens = {WINDOW}", "rb", lines=(ONCE,)),
        route_table("r-able", 'ra, features = ["tools"]', 'rb, features = ["image", "json_schema"]', lines=(ONCE,)),
        route_table("r-dear", 'rin, model = "cheap"', 'rout, model = "dear"', lines=(ONCE,)),
        route_table("r-dear-of-three", 'rin, model = "cheap"', 'rout, model = "dear"', "ra", lines=(ONCE,)),
        route_table("r-share", "ra", "rb", "rc", lines=("retry = { retries = 0, deadline_ms = 1500 }",)),
        route_table(
            "r-again",
            "ra",
            lines=(
                "retry = { retries = 90, attempts_max = 99, deadline_ms = 800, backoff_ms = 60, backoff_ms_max = 60 }",
            ),
        ),
        '\n[prices."rin/m"]\ninput = "1"\noutput = "20"\n[prices."rout/m"]\ninput = "20"\noutput = "1"\n',
        '\n[prices."rin/cheap"]\ninput = "1"\noutput = "1"\n[prices."rout/dear"]\ninput = "100"\noutput = "100"\n',
    )
)
CHEAP_HOLD = 400
"""A balance that covers a call at the cheap candidate, and none at the dear one."""


@pytest.fixture
async def on(gateway: Gateway) -> AsyncIterator[Routed]:
    """The session's gateway with this module's providers."""
    async with routed(gateway, PORT) as found:
        yield found


# -- strategies ------------------------------------------------------------------------------------------------------


async def test_weighted_candidates_get_their_share_of_the_calls_and_one_without_weight_gets_none(on: Routed) -> None:
    shares = await on.shares("r-weighted", 300)
    assert set(shares) == {"ra", "rb"}
    assert 185 <= shares["ra"] <= 265  # 225 expected, five standard deviations of 7.5 either side


async def test_a_candidate_without_weight_answers_when_the_others_fail(on: Routed) -> None:
    on.farm["ra"].script = on.farm["rb"].script = fails(500)
    answer = await on.call("r-weighted")
    assert (answer.headers["x-tollgate-provider"], answer.headers["x-tollgate-attempts"]) == ("rc", "3")


async def test_the_quick_candidate_is_preferred_once_known_and_the_slow_one_is_looked_at_again(on: Routed) -> None:
    slow, quick = on.farm["ra"], on.farm["rb"]
    slow.script = says(after_s=0.25)
    first = [await on.answered_by("r-quick", stream=True) for _ in range(2)]
    assert sorted(first) == ["ra", "rb"]  # unknown ones first, each once
    assert [await on.answered_by("r-quick", stream=True) for _ in range(8)] == ["rb"] * 8
    quick.script = says(after_s=0.22)  # still quicker: only forgetting brings the other one back
    await on.answered_by("r-quick", stream=True)
    asked = slow.count
    slow.script = says()

    async def looked_at_again() -> bool:
        return await on.answered_by("r-quick", stream=True) == "ra"

    await until(looked_at_again, 15)
    assert slow.count == asked + 1


async def test_the_cheapest_candidate_depends_on_what_the_call_is_estimated_to_use(on: Routed) -> None:
    reads = {"messages": [{"role": "user", "content": LONG}], "max_tokens": 5}
    writes = {"max_tokens": 500}
    assert [await on.answered_by("r-cheapest", **fields) for fields in (reads, writes, reads)] == ["rin", "rout", "rin"]


async def test_the_least_busy_candidates_share_calls_that_run_at_once(on: Routed) -> None:
    gate = asyncio.Event()
    names = ("ra", "rb", "rc")
    for name in names:
        on.farm[name].script = says(gate=gate)
    calls = asyncio.create_task(on.together("r-busy", 9))
    await until(lambda: sum(on.farm[name].running for name in names) == 9, every=0.005)
    gate.set()
    assert await calls == Counter(dict.fromkeys(names, 3))
    assert [await on.answered_by("r-busy") for _ in range(3)] == ["ra"] * 3  # nothing is counted as under way any more


async def test_candidates_of_unknown_latency_share_the_calls_that_come_before_their_first_answer(on: Routed) -> None:
    gate = asyncio.Event()
    on.farm["ra"].script = on.farm["rb"].script = says(gate=gate)
    calls = asyncio.create_task(on.together("r-unknown", 10, stream=True))
    await until(lambda: on.farm["ra"].running + on.farm["rb"].running == 10, every=0.005)
    gate.set()
    assert await calls == {"ra": 5, "rb": 5}


async def test_ordered_candidates_stay_in_order(on: Routed) -> None:
    assert await on.shares("r-ordered", 20) == {"ra": 20}
    on.farm["ra"].script = fails(500)
    assert await on.shares("r-ordered", 5, prompt_cache_key="k") == {"rb": 5}


# -- stickiness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["weighted", "least_busy"])
async def test_a_cache_key_stays_with_its_candidate_and_only_keys_of_one_that_is_down_move(
    on: Routed, strategy: str
) -> None:
    model = f"r-sticky-{strategy}"
    keys = [f"conversation-{number}" for number in range(30)]

    async def homes() -> list[str]:
        return await asyncio.gather(*(on.answered_by(model, prompt_cache_key=key) for key in keys))

    before = await homes()
    assert await homes() == before
    assert set(before) == {"ra", "rb", "rc"}
    down = before[0]
    on.farm[down].script = fails(500)
    moved = await homes()
    assert {after for home, after in zip(before, moved, strict=True) if home == down} <= {"ra", "rb", "rc"} - {down}
    assert all(after == home for home, after in zip(before, moved, strict=True) if home != down)
    on.farm[down].script = says()
    assert await homes() == before


async def test_calls_without_a_cache_key_go_by_the_strategy(on: Routed) -> None:
    assert len(await on.shares("r-sticky-weighted", 60)) == 3
    assert len(await on.shares("r-sticky-weighted", 60, prompt_cache_key=None)) == 3


async def test_a_provider_that_does_not_profit_keeps_no_key(on: Routed) -> None:
    keys = [f"conversation-{number}" for number in range(12)]
    homes = await asyncio.gather(*(on.answered_by("r-dull", prompt_cache_key=key) for key in keys))
    assert set(homes) == {"ra"}  # though the other is first and as busy


# -- hints and preferences ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hint", "provider"),
    [
        ("providers=rus", "rus"),
        ("providers=reu/m", "reu"),
        ("exclude=ra", "reu"),
        ("exclude=ra,reu/m", "rus"),
        ("prefer=rus", "rus"),
        ("rus,reu", "rus"),
        ("tags=eu", "reu"),
        ("tags=us; prefer=ra", "rus"),
        ("prefer=nobody", "ra"),
        ("", "ra"),
    ],
)
async def test_a_hint_says_who_may_answer_and_who_first(on: Routed, hint: str, provider: str) -> None:
    assert await on.answered_by("r-hinted", hint=hint) == provider
    assert await on.answered_by("r-hinted", hint=hint, stream=True) == provider


async def test_what_a_hint_prefers_falls_back_on_the_others(on: Routed) -> None:
    on.farm["rus"].script = fails(500)
    assert await on.answered_by("r-hinted", hint="prefer=rus") == "ra"


@pytest.mark.parametrize("hint", ["providers=nobody", "providers=ra; exclude=ra", "tags=eu,us"])
async def test_a_hint_that_nobody_meets_is_refused_and_costs_nothing(on: Routed, hint: str) -> None:
    answer = await on.call("r-hinted", hint=hint)
    assert error_of(answer) == (403, "provider_not_allowed")
    assert answer.headers["x-should-retry"] == "false"
    assert await on.untouched()
    assert all(on.farm[name].count == 0 for name in ("ra", "reu", "rus"))


@pytest.mark.parametrize("hint", ["only=ra", "providers=", "providers=ra; providers=rb", "prefer=a b"])
async def test_a_hint_that_is_wrong_is_the_callers_fault_and_names_the_header(on: Routed, hint: str) -> None:
    answer = await on.call("r-hinted", hint=hint)
    assert error_of(answer) == (400, "invalid_value")
    assert answer.json()["error"]["param"] == "x-tollgate-route"
    assert await on.untouched()


async def test_a_hint_never_widens_what_the_account_and_the_key_allow(on: Routed) -> None:
    async with on.gateway.stores() as stores:
        await prefer_account(stores.pool, stores.redis, on.key.account.id, {"allowed": ["reu", "rus"]})
        await prefer_key(stores.pool, stores.redis, on.key.id, {"excluded": ["reu"]})

    async def follows() -> bool:
        return (await on.call("r-hinted")).headers.get("x-tollgate-provider") == "rus"

    await until(follows)
    charged = (await on.all_back()).charged
    for hint in ("providers=ra", "providers=reu", "prefer=ra; exclude=rus", "tags=eu"):
        assert error_of(await on.call("r-hinted", hint=hint)) == (403, "provider_not_allowed")
    assert await on.answered_by("r-hinted", hint="providers=ra,rus") == "rus"
    assert await on.answered_by("r-hinted", hint="prefer=ra,reu") == "rus"
    assert (await on.all_back()).charged == charged + 2 * (PROMPT + OUTPUT)
    assert on.farm["reu"].count == 0


async def test_the_command_line_sets_what_an_account_and_a_key_prefer(on: Routed) -> None:
    assert await on.answered_by("r-hinted") == "ra"
    for words in (
        ("accounts", "prefer", on.key.account.id, "--prefer", "rus,reu"),
        ("keys", "prefer", on.key.id, "--prefer", "reu", "--exclude", "ra"),
    ):
        done = await asyncio.to_thread(on.gateway.tollgate, *words, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["unknown"] == []

    async def follows() -> bool:
        return await on.answered_by("r-hinted") == "reu"

    await until(follows)
    on.farm["reu"].script = fails(500)
    assert await on.answered_by("r-hinted") == "rus"
    on.farm["rus"].script = fails(500)
    assert (await on.call("r-hinted")).status_code == 500  # the last one is excluded


# -- what a model takes ----------------------------------------------------------------------------------------------


async def test_a_prompt_too_long_for_a_candidate_passes_it_over(on: Routed) -> None:
    said = [{"role": "user", "content": "word " * (WINDOW + 40)}]
    assert await on.answered_by("r-window") == "ra"
    assert await on.answered_by("r-window", messages=said) == "rb"
    assert await on.answered_by("r-open", messages=[{"role": "user", "content": LONG}]) == "rb"
    assert on.farm["ra"].count == 1


@pytest.mark.parametrize("stream", [True, False])
async def test_a_prompt_too_long_for_all_is_refused_and_costs_nothing(on: Routed, stream: bool) -> None:
    answer = await on.call("r-window", messages=[{"role": "user", "content": LONG}], stream=stream)
    assert error_of(answer) == (400, "context_length_exceeded")
    assert await on.untouched()
    assert (on.farm["ra"].count, on.farm["rb"].count) == (0, 0)


@pytest.mark.parametrize(
    ("fields", "provider"),
    [
        ({"tools": TOOL}, "ra"),
        ({"response_format": SCHEMA}, "rb"),
        ({"messages": [{"role": "user", "content": IMAGE}]}, "rb"),
        ({}, "ra"),
    ],
)
async def test_a_candidate_that_lacks_a_feature_is_passed_over(
    on: Routed, fields: dict[str, Any], provider: str
) -> None:
    assert await on.answered_by("r-able", **fields) == provider
    assert on.farm["ra"].count + on.farm["rb"].count == 1


async def test_features_that_no_candidate_has_together_are_refused_and_cost_nothing(on: Routed) -> None:
    answer = await on.call("r-able", tools=TOOL, response_format=SCHEMA)
    assert error_of(answer) == (400, "unsupported_parameter")
    assert await on.untouched()
    assert (on.farm["ra"].count, on.farm["rb"].count) == (0, 0)


# -- the hold --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
async def test_the_hold_covers_the_dearest_candidate_that_may_answer(on: Routed, stream: bool) -> None:
    poor = await on.gateway.key(CHEAP_HOLD)
    fields: dict[str, Any] = {"key": poor, "stream": stream, "max_tokens": 100}
    for model, hint in (("r-dear", None), ("r-dear-of-three", "exclude=ra")):  # all candidates, and some of them
        assert error_of(await on.call(model, hint=hint, **fields)) == (402, "insufficient_quota")
    assert await on.untouched(poor, CHEAP_HOLD)
    assert (on.farm["rin"].count, on.farm["rout"].count) == (0, 0)
    assert await on.answered_by("r-dear", hint="exclude=rout", **fields) == "rin"
    assert (await on.all_back(poor)).charged == PROMPT + OUTPUT


@pytest.mark.parametrize("stream", [True, False])
async def test_who_falls_back_on_a_dearer_candidate_pays_its_price_within_the_hold(on: Routed, stream: bool) -> None:
    on.farm["rin"].script = fails(503)
    gate = asyncio.Event()
    on.farm["rout"].script = says(gate=gate)
    calling = asyncio.create_task(on.call("r-dear", stream=stream))
    await until(lambda: on.farm["rout"].running, every=0.005)
    held = (await on.balance()).held
    gate.set()
    answer = await calling
    due = 100 * (PROMPT + OUTPUT)
    assert answer.headers["x-tollgate-provider"] == "rout"
    assert held >= due
    assert (await on.all_back()).charged == due
    (row,) = await on.gateway.sessions(on.key, 1)
    told = json.loads(row["metadata"]) if isinstance(row["metadata"], str) else row["metadata"]
    assert [each["outcome"] for each in told["attempts"]] == ["overloaded", "completed"]
    assert row["charged"] == due


# -- the deadline ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("headed", [True, False])
async def test_candidates_behind_one_that_hangs_have_their_share_of_the_deadline(on: Routed, headed: bool) -> None:
    on.farm["ra"].script = on.farm["rb"].script = hangs(headed=headed)
    began = time.monotonic()
    answer = await on.call("r-share", stream=True)
    assert answer.text.endswith("data: [DONE]\n\n")
    second, third = on.farm["rb"].asked[0].at - began, on.farm["rc"].asked[0].at - began
    assert 0.5 <= second < third < 1.5  # a third of 1.5 s, then half of what is left
    assert third >= 1.0
    assert on.farm["ra"].count == on.farm["rb"].count == 1


async def test_tries_again_come_at_different_times_and_end_before_the_deadline(on: Routed) -> None:
    on.farm["ra"].script = fails(500)
    answer = await on.call("r-again")
    assert answer.status_code == 500
    times = [asked.at for asked in on.farm["ra"].asked]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert len(times) > 8
    assert times[-1] - times[0] < 0.9
    assert max(gaps) - min(gaps) > 0.02
    assert int(answer.headers["x-tollgate-attempts"]) == len(times)
    await on.all_back()
    assert await on.untouched()


async def test_a_failing_provider_is_tried_again_where_nobody_else_is_left(on: Routed) -> None:
    on.farm["ra"].script = turns(fails(500), fails(500), says())
    assert (await on.call("r-again")).headers["x-tollgate-attempts"] == "3"
