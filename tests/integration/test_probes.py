"""Probes of providers' model lists against scripted servers: what a list tells the candidates."""

from __future__ import annotations

import json

import pytest
from structlog.testing import capture_logs

from providers.breaker import State
from providers.breaker_record import Reason
from providers.model_lists import MODELS_MAX, PAGES_MAX
from proxy.http_request import Origin
from proxy.httpx_exchange import HttpxPool
from proxy.transport import TransportLimits
from tests.support.ports import free_port
from tests.support.probing import LATER_S, World, listed, once, probing, reply
from tests.support.rawserver import RawServer, answers, both_loops, until


@both_loops
async def test_the_list_is_asked_for_at_once_with_our_key_and_nothing_else() -> None:
    world = World()
    server = await once(world, answers(listed("a")), "ok")
    head = server.requests[0].decode()
    assert head.startswith("GET /v1/models HTTP/1.1\r\n")
    assert "authorization: Bearer k\r\n" in head
    assert "content-length" not in head


@both_loops
async def test_a_model_that_is_not_listed_is_missing_until_a_list_has_it() -> None:
    world = World("a", "b")
    without, both = listed("a", "c"), listed("a", "b")
    with capture_logs() as lines:
        async with (
            RawServer(answers(without, without, both, both)) as server,
            probing(world, world.target(server.origin, every_s=0.02)),
        ):
            await until(lambda: world.lives["b"].missing_until > 0)
            assert world.lives["b"].missing_until == pytest.approx(world.now + 2.5 * 0.02)
            assert world.shown_missing("b") == 1
            await until(lambda: world.counted("ok") >= 4)
        assert [live.missing_until for live in world.lives.values()] == [0, 0]
        assert world.shown_missing("b") == 0
        assert world.shown_missing("a") is None
    told = [(line["event"], line["model"]) for line in lines if "model" in line]
    assert told == [("model missing", "b"), ("model no longer missing", "b")]
    assert all(line["provider"] == world.name for line in lines if "model" in line)


@both_loops
async def test_a_model_is_no_longer_missing_when_lists_fail_to_come() -> None:
    world = World("b")
    down = reply(b"{}", "503 Busy")
    async with (
        RawServer(answers(listed("a"), *[down] * 1000)) as server,
        probing(world, world.target(server.origin, every_s=0.02)),
    ):
        await until(lambda: world.shown_missing("b") == 1)
        world.now += 1.0
        await until(lambda: world.shown_missing("b") == 0)
    assert world.live.missing_until <= world.now


@both_loops
async def test_a_list_of_many_pages_is_read_to_its_end() -> None:
    world = World("a", "b", "c", kind="anthropic")
    script = answers(listed("a", has_more=True, last_id="a"), listed("b", has_more=False, last_id="b"))
    server = await once(world, script, "ok")
    targets = [request.split(b" ")[1] for request in server.requests]
    assert targets == [b"/v1/models?limit=1000", b"/v1/models?limit=1000&after_id=a"]
    assert [live.missing_until > 0 for live in world.lives.values()] == [False, False, True]


UNENDING = {
    "pages without an end": (answers(*[listed("a", has_more=True, last_id="a")] * 100), PAGES_MAX),
    "too many models": (answers(listed(*(f"m{number}" for number in range(MODELS_MAX + 1)))), 1),
}


@pytest.mark.parametrize("name", UNENDING)
@both_loops
async def test_of_a_list_beyond_the_bounds_nothing_is_missing(name: str) -> None:
    script, asked = UNENDING[name]
    world = World("b")
    server = await once(world, script, "ok")
    assert len(server.requests) == asked
    assert world.live.missing_until == 0


@both_loops
async def test_a_list_closes_the_breaker_of_a_provider_that_failed() -> None:
    world = World("a")
    world.open_breaker()
    await once(world, answers(listed("a")), "ok")
    assert world.live.breaker.state is State.CLOSED
    assert [(name, change.state) for name, change in world.changes] == [(f"{world.name}/a", State.CLOSED)]


@both_loops
async def test_a_list_does_not_count_as_a_success_of_a_closed_breaker() -> None:
    world = World("a")
    breaker = world.live.breaker

    def fail() -> None:
        permit = breaker.try_pass(world.now)
        assert permit is not None
        breaker.failed(permit, world.now)

    fail()
    await once(world, answers(listed("a")), "ok")
    fail()
    assert breaker.state is State.OPEN


@both_loops
async def test_a_breaker_that_is_open_for_longer_stays_open() -> None:
    world = World("a")
    world.open_breaker()
    world.now -= LATER_S
    await once(world, answers(listed("a")), "ok")
    assert (world.live.breaker.state, world.changes) == (State.OPEN, [])


@pytest.mark.parametrize(
    ("kind", "key", "state"),
    [("openai", "k", State.CLOSED), ("openai", None, State.OPEN), ("openrouter", "k", State.OPEN)],
)
@both_loops
async def test_a_refused_key_is_forgiven_only_by_a_list_that_needs_it(kind: str, key: str | None, state: State) -> None:
    world = World("a", kind=kind, key=key)
    world.open_breaker(key_refused=True)
    await once(world, answers(listed("a")), "ok")
    assert world.live.breaker.state is state


@both_loops
async def test_a_refused_key_opens_the_breakers_with_an_alert() -> None:
    world = World("a", "b")
    await once(world, answers(reply(b'{"error":{"message":"Incorrect API key"}}', "401 Unauthorized")), "refused")
    assert [name for name, _ in world.changes] == [f"{world.name}/a", f"{world.name}/b"]
    assert all(change.alert and change.reason is Reason.KEY_REFUSED for _, change in world.changes)


@both_loops
async def test_googles_400_to_a_bad_key_is_a_refused_key() -> None:
    world = World("a", kind="gemini")
    error = {"code": 400, "status": "INVALID_ARGUMENT", "message": "API key not valid. Please pass a valid API key."}
    await once(world, answers(reply(json.dumps({"error": error}).encode(), "400 Bad Request")), "refused")
    assert world.live.breaker.state is State.OPEN


@both_loops
async def test_a_provider_with_a_way_of_its_own_is_asked_there() -> None:
    world = World("b")
    async with RawServer(answers(listed("a", "c"))) as server:
        pool = HttpxPool(server.origin, TransportLimits())
        nowhere = Origin("http", "127.0.0.1", free_port())
        try:
            async with probing(world, world.target(nowhere, pool)):
                await until(lambda: world.counted("ok") == 1)
        finally:
            await pool.aclose()
    assert world.live.missing_until > 0
    assert b"authorization: bearer k\r\n" in server.requests[0].lower()


@both_loops
async def test_a_kind_without_lists_is_not_asked() -> None:
    world, other = World("a", kind="bedrock"), World("a")
    async with (
        RawServer(answers(listed("a"))) as server,
        RawServer(answers(listed("a"))) as lists,
        probing(world, world.target(server.origin), other.target(lists.origin)),
    ):
        await until(lambda: other.counted("ok") == 1)
        assert server.peers == []
