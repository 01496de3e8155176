"""Every fault of a provider at every point of its answer: who answers, what the client is told, who pays how much.

All rows of `tests.support.fault_table` are asked for at once, with the official client, of a gateway of their own; then
each row is a test of what was seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from openai import AsyncOpenAI, AsyncStream, DefaultAsyncHttpxClient
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.support.fault_scripts import TEXT
from tests.support.fault_table import ANSWERED, DELIVERED, PROMPT, ROWS, Form, Row
from tests.support.faulty import GOOD, SIBLINGS, FaultyProviders, Places, cases, model
from tests.support.gateway import Gateway, Key, running

GRANTED = 100_000_000
QUICK_AT_ONCE = 8
"""Rows that wait for no time limit are asked a few at a time: a busy client must not make a good answer late."""
SLOW = ("TLS handshake hangs", "hang", "slow drip without end", "429, retry-after 2 s")


@dataclass
class Seen:
    """What one call came to, for its client and in the journal."""

    status: int = 0
    error: openai.APIError | None = None
    text: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    row: dict[str, Any] = field(default_factory=dict)

    @property
    def code(self) -> str | None:
        """The error's."""
        return None if self.error is None else self.error.code

    @property
    def attempts(self) -> list[dict[str, Any]]:
        """As the session has them."""
        found: list[dict[str, Any]] = self.row["metadata"]["attempts"]
        return found

    @property
    def outcomes(self) -> list[str]:
        """Of its attempts, in order."""
        return [each["outcome"] for each in self.attempts]


@dataclass
class Case:
    """What was seen of one row in one form. `pairs` had a second candidate, and so had `later`, when they were over."""

    pairs: list[Seen]
    later: Seen
    alone: Seen
    again: Seen

    @property
    def calls(self) -> list[Seen]:
        """All of them."""
        return [*self.pairs, self.later, self.alone, self.again]


@dataclass
class World:
    """All that was seen. `openings`: reasons for which a candidate's breaker opened, by its name."""

    gateway: Gateway
    cases: dict[tuple[Row, Form], Case]
    asked: Counter[str]
    connected: Counter[str]
    openings: dict[str, list[str]]
    left: tuple[int, int]
    siblings: dict[str, Seen]


class Asker:
    """The client of all calls."""

    def __init__(self, client: AsyncOpenAI, gateway: Gateway, providers: FaultyProviders) -> None:
        self._client = client
        self._gateway = gateway
        self._heard = providers.heard

    async def ask(self, route: str, form: Form, together: asyncio.Barrier | None = None) -> Seen:
        """One call, and its session's row. What follows content waits for the content of all that are `together`."""
        seen = Seen()
        try:
            raw = await self._client.chat.completions.with_raw_response.create(
                model=route, messages=[{"role": "user", "content": "Hi"}], max_tokens=20, stream=form == "stream"
            )
            seen.status, seen.headers = raw.http_response.status_code, dict(raw.headers)
            await self._read(raw.parse(), seen, together)
        except openai.APIStatusError as error:
            seen.error, seen.status, seen.headers = error, error.status_code, dict(error.response.headers)
        except openai.APIError as error:  # in the stream
            seen.error = error
        assert "x-tollgate-session" in seen.headers, (route, seen)
        seen.row = await self._gateway.session(seen.headers["x-tollgate-session"])
        return seen

    async def _read(self, answer: Any, seen: Seen, together: asyncio.Barrier | None) -> None:
        if isinstance(answer, ChatCompletion):
            seen.text = answer.choices[0].message.content or ""
            return
        assert isinstance(answer, AsyncStream)
        async with answer:
            async for chunk in answer:
                assert isinstance(chunk, ChatCompletionChunk)
                seen.text += "".join(choice.delta.content or "" for choice in chunk.choices)
                heard = self._heard[seen.headers["x-request-id"]]
                if seen.text == TEXT and not heard.is_set():
                    if together is not None:
                        await together.wait()
                    heard.set()

    async def case(self, row: Row, form: Form) -> Case:
        """All calls of a row. Two failures in a row open a breaker, so what counts as one is met twice."""
        calls = 2 if row.left == "counted" and row.then != "retry, next" else 1

        async def paired() -> tuple[list[Seen], Seen]:
            route = model(row, form, "pair")
            if row.point == "after":  # content of one between two failures would be a sign of health
                both = asyncio.Barrier(calls)
                first = await asyncio.gather(*(self.ask(route, form, both) for _ in range(calls)))
            else:
                first = [await self.ask(route, form) for _ in range(calls)]
            return first, await self.ask(route, form)

        (pairs, later), alone, again = await asyncio.gather(
            paired(), self.ask(model(row, form, "alone"), form), self.ask(model(row, form, "again"), form)
        )
        return Case(pairs, later, alone, again)


async def ask_all(gateway: Gateway, places: Places, folder: Path) -> World:
    """Every row in every form."""
    quick = asyncio.Semaphore(QUICK_AT_ONCE)
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(gateway.connected())
        providers = await stack.enter_async_context(FaultyProviders(places, folder))
        key = await gateway.key(GRANTED)
        http = DefaultAsyncHttpxClient(verify=False, timeout=30)
        client = AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=key.text, max_retries=0, http_client=http)
        asker = Asker(await stack.enter_async_context(client), gateway, providers)

        async def case(row: Row, form: Form) -> Case:
            async with contextlib.nullcontext() if row.fault in SLOW else quick:
                return await asker.case(row, form)

        seen = await asyncio.gather(*(case(row, form) for row, form in cases()))
        siblings = {
            name: await asker.ask(name, "stream")
            for status in SIBLINGS
            for name in (f"{status}.first", f"{status}.second")  # in this order
        }
        left = await gateway.idle(key)
        charged = await _charged(gateway, key)
        figures = httpx2.get(f"{gateway.url}/metrics", verify=False).text
        found = dict(zip(cases(), seen, strict=True))
        paid = GRANTED - left.available, charged
        return World(gateway, found, providers.asked, providers.connected, openings(figures), paid, siblings)


async def _charged(gateway: Gateway, key: Key) -> int:
    async with gateway.stores() as stores:
        query = "SELECT sum(charged) FROM session WHERE account_id = $1"
        return int(await stores.pool.fetchval(query, key.account.id))


def openings(figures: str) -> dict[str, list[str]]:
    """Reasons of breakers' openings, by provider."""
    found: dict[str, list[str]] = {}
    for labels in re.findall(r"^tollgate_breaker_changes_total\{(.*?)\} [1-9]", figures, re.MULTILINE):
        named = dict(re.findall(r'(\w+)="(.*?)"', labels))
        if named["state"] == "open":
            found.setdefault(named["provider"], []).append(named["reason"])
    return found


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """A gateway that was asked for everything, and what was seen."""
    with tempfile.TemporaryDirectory(prefix="tg-faults-") as name:
        folder, places = Path(name), Places.free()
        # A name server that does not answer must not take longer to say so than a connection may.
        environ = {"RES_OPTIONS": "timeout:1 attempts:1"}
        with running(folder, places.config(), environ=environ) as gateway:
            yield asyncio.run(ask_all(gateway, places, folder))


CASES = [pytest.param(row, form, id=row.slug(form)) for row, form in cases()]


@pytest.mark.parametrize(("row", "form"), CASES)
def test_a_second_candidate_answers_where_that_helps_and_the_client_pays_its_answer(
    world: World, row: Row, form: Form
) -> None:
    for seen in world.cases[row, form].pairs:
        if row.then == "none":
            check_unanswered(seen, row, form, 1)
            continue
        tries = 2 if row.then == "retry, next" else 1
        assert (seen.status, seen.error, seen.text) == (200, None, TEXT)
        assert seen.outcomes == [row.outcome] * tries + ["completed"]
        assert seen.headers["x-tollgate-provider"] == seen.attempts[-1]["provider"] == GOOD
        assert seen.headers["x-tollgate-attempts"] == str(tries + 1)
        assert (seen.row["charged"], seen.row["outcome"]) == (ANSWERED, "completed")


@pytest.mark.parametrize(("row", "form"), CASES)
def test_without_one_the_client_is_told_what_happened_and_pays_what_it_got(world: World, row: Row, form: Form) -> None:
    check_unanswered(world.cases[row, form].alone, row, form, 1)


@pytest.mark.parametrize(("row", "form"), CASES)
def test_the_only_candidate_is_asked_again_where_that_may_help(world: World, row: Row, form: Form) -> None:
    check_unanswered(world.cases[row, form].again, row, form, row.tries)


def check_unanswered(seen: Seen, row: Row, form: Form, tries: int) -> None:
    """Nobody but the faulty candidate was asked."""
    answered = row.ending == "completed"
    assert ((seen.status, seen.code), seen.error is None) == (row.told, answered), seen.error
    assert seen.text == (TEXT if row.point == "after" or answered else "")
    assert seen.outcomes == [row.outcome] * tries
    assert seen.headers["x-tollgate-provider"] == seen.attempts[-1]["provider"] == model_of(seen)
    assert seen.headers["x-tollgate-attempts"] == str(tries)
    assert (seen.row["charged"], seen.row["outcome"], seen.row["absorbed"]) == (row.charge, row.ending, 0)
    if row.charge == 0:
        assert seen.headers["x-tollgate-charge"] == "0"
        pause = re.search(r"retry-after (\d+) s", row.fault)
        assert seen.headers.get("retry-after") == (pause[1] if pause else None)


def model_of(seen: Seen) -> str:
    """The route's, which is also the name of its faulty provider."""
    name: str = seen.row["metadata"]["route"]
    return name


@pytest.mark.parametrize(("row", "form"), CASES)
def test_a_candidate_is_passed_by_after_what_counts_against_it(world: World, row: Row, form: Form) -> None:
    later, route = world.cases[row, form].later, model(row, form, "pair")
    reasons = {"counted": ["consecutive"], "paused": ["retry_after"], "key": ["key_refused"]}
    assert world.openings.get(route, []) == reasons.get(row.left, [])
    if row.left:
        assert (later.status, later.text, later.outcomes) == (200, TEXT, ["completed"])
        assert later.headers["x-tollgate-provider"] == GOOD
    else:
        assert later.outcomes == world.cases[row, form].pairs[0].outcomes
    assert world.openings.get(GOOD, []) == []


@pytest.mark.parametrize(("row", "form"), CASES)
def test_the_house_books_the_prompt_of_each_attempt_that_had_begun_to_answer(
    world: World, row: Row, form: Form
) -> None:
    spent = {"headers": (0, 0), "content": (PROMPT, 0), "after": (PROMPT, DELIVERED)}[row.point]
    for seen in world.cases[row, form].calls:
        expected = [spent if outcome == row.outcome != "completed" else (9, 4) for outcome in seen.outcomes]
        assert [(each["prompt"], each["output"]) for each in seen.attempts] == expected
        assert (seen.row["metadata"]["house_cost"] or 0) == sum(map(sum, expected))


def test_a_401_is_the_whole_providers_and_another_refusal_of_the_key_one_models(world: World) -> None:
    outcomes = {name: seen.outcomes for name, seen in world.siblings.items()}
    refused = ["key_refused", "completed"]
    assert outcomes == {
        "401.first": refused,
        "401.second": ["completed"],
        "403.first": refused,
        "403.second": refused,
    }


def test_every_server_was_asked_as_often_as_the_sessions_say(world: World) -> None:
    sessions = Counter(each["model"] for case in world.cases.values() for seen in case.calls for each in seen.attempts)
    reached = Counter({name: len(seen.attempts) - 1 for name, seen in world.siblings.items()})
    connected: Counter[str] = Counter()
    unreached = ("connection refused", "name does not resolve", "certificate not trusted", "TLS handshake hangs")
    for row, form in cases():
        for way in ("pair", "alone", "again"):
            count = sessions[model(row, form, way)]
            (connected if row.fault in unreached else reached)[
                row.fault if row.fault in unreached else model(row, form, way)
            ] += count
    reached[GOOD] = sessions[GOOD] + len(world.siblings)
    assert world.asked == reached
    assert {fault: connected[fault] for fault in unreached[2:]} == world.connected


def test_what_all_calls_were_charged_is_what_the_account_has_paid(world: World) -> None:
    total = sum(seen.row["charged"] for case in world.cases.values() for seen in case.calls)
    total += sum(seen.row["charged"] for seen in world.siblings.values())
    assert world.left == (total, total)
    audit = world.gateway.audit()
    assert (audit.returncode, json.loads(audit.stdout)["differences"]) == (0, []), audit.stdout


def test_the_table_has_every_fault_and_each_once() -> None:
    assert len({(row.fault, row.point, form) for row, form in cases()}) == len(cases())
    assert {row.point for row in ROWS} == {"headers", "content", "after"}
