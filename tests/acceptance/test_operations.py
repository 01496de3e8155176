"""What whoever runs the gateway sees: health, metrics, log lines and the command line on the running instance."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from accounts import keys
from gateway.http_protocol import HEAD_BYTES_MAX
from tests.support.gateway import Gateway, Key, until
from tests.support.strict_client import Answer, connected, stream_of

ASK: list[Any] = [{"role": "user", "content": "Say something short."}]
CANARY = "zq-canary-prompt-7d1f"


async def get(gateway: Gateway, path: str) -> Answer:
    async with connected(gateway.port) as client:
        return await client.request("GET", path)


async def chat(gateway: Gateway, key: str, **fields: Any) -> Answer:
    async with connected(gateway.port) as client:
        return await client.chat(key, {"model": "gpt-4o-mini", "messages": ASK, **fields})


async def test_live_says_so_without_asking_anyone(gateway: Gateway) -> None:
    answer = await get(gateway, "/health/live")
    assert (answer.status, answer.json()) == (200, {"status": "ok"})


async def test_ready_names_each_part(gateway: Gateway) -> None:
    async def all_well() -> dict[str, Any] | None:
        answer = await get(gateway, "/health/ready")
        assert answer.status == 200
        found: dict[str, Any] = answer.json()
        return found if found["parts"]["journal"] == "ok" else None

    ready = await until(all_well)
    parts = {"gateway": "ok", "redis": "ok", "postgres": "ok", "journal": "ok"}
    assert ready == {"status": "ok", "parts": parts}


@pytest.mark.parametrize("path", ["/health/live", "/health/ready", "/metrics"])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
async def test_operations_are_only_read(gateway: Gateway, path: str, method: str) -> None:
    async with connected(gateway.port) as client:
        answer = await client.request(method, path)
    assert (answer.status, answer.error()["message"]) == (404, f"Invalid URL ({method} {path})")


def samples(text: str) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Every sample of a metrics page: name -> labels -> value."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


async def test_metrics_of_all_processes_come_in_one_answer(gateway: Gateway, key: Key) -> None:
    before = samples((await get(gateway, "/metrics")).body.decode())
    answer = await chat(gateway, key.text)
    row = await gateway.session(answer.headers["x-tollgate-session"])
    page = await get(gateway, "/metrics")
    assert (page.status, page.headers["content-type"].partition(";")[0]) == (200, "text/plain")
    after = samples(page.body.decode())

    def grown(name: str, **labels: str) -> float:
        place = tuple(sorted(labels.items()))
        return after[name][place] - before.get(name, {}).get(place, 0)

    route = "gpt-4o-mini"
    assert grown("tollgate_charged_micros_total", route=route) == row["charged"]
    assert grown("tollgate_sessions_total", route=route, ending="completed", outcome="completed") == 1
    assert grown("tollgate_tokens_total", **{"route": route, "class": "output"}) == row["output_tokens"]
    assert grown("tollgate_requests_total", status="200", code="") >= 1
    assert after["tollgate_live_sessions"] == {(): 0}
    ledgers = [name for name in after if re.match(r"tollgate_(journal|outbox|flush|sweep)", name)]
    assert ledgers, sorted(after)


async def test_a_providers_own_error_code_is_no_label(gateway: Gateway, key: Key) -> None:
    theirs, ours = (
        (("code", "context_length_exceeded"), ("status", "400")),
        (("code", "provider_error"), ("status", "400")),
    )

    async def counted() -> tuple[float, float]:
        found = samples((await get(gateway, "/metrics")).body.decode()).get("tollgate_requests_total", {})
        return found.get(theirs, 0), found.get(ours, 0)

    before = await counted()  # our own refusal of a prompt that is too long has that code too
    answer = await chat(gateway, key.text, model="sim-context-length")
    assert (answer.status, answer.error()["code"]) == (400, "context_length_exceeded")
    assert await counted() == (before[0], before[1] + 1)


async def test_no_label_names_an_account_a_key_or_a_session(gateway: Gateway, key: Key) -> None:
    answer = await chat(gateway, key.text)
    for model in ("zq-no-such-model", "x" * 5_000):
        assert (await chat(gateway, key.text, model=model)).status == 404
    for path in ("/v1/zq-no-such-path", "/v1/models/zq-no-such-model"):
        assert (await get(gateway, path)).status in (401, 404)
    page = (await get(gateway, "/metrics")).body.decode()
    for secret in (
        key.text,
        key.id,
        key.account.id,
        answer.headers["x-tollgate-session"],
        answer.request_id,
        "zq-no-such",
    ):
        assert secret not in page
    labels = {name for each in samples(page).values() for place in each for name, _ in place}
    assert labels <= {"status", "code", "route", "ending", "outcome", "class", "provider", "source", "limit", "le",
                      "shard", "pid", "reason", "kind", "state", "type", "model", "fault", "first",
                      "result"}  # fmt: skip


def log_lines(gateway: Gateway) -> list[dict[str, Any]]:
    """The log as far as it is written; the processes' own prints to people (the ready message) are not in it."""
    *lines, _ = gateway.log.read_text().split("\n")  # what has no line end yet is still being written
    return [json.loads(line) for line in lines if line.startswith("{")]


async def logged(gateway: Gateway, request_id: str) -> dict[str, Any]:
    """The one line of a request with this id, once it is written; attempts have lines of their own."""

    def find() -> list[dict[str, Any]]:
        lines = [line for line in log_lines(gateway) if line.get("request_id") == request_id]
        return [line for line in lines if line["event"] in ("chat", "refused")]

    (line,) = await until(find)
    return dict(line)


async def test_every_request_is_one_json_line_with_its_id(gateway: Gateway, key: Key) -> None:
    whole = await chat(gateway, key.text)
    streamed = await chat(gateway, key.text, stream=True)
    failed = await chat(gateway, key.text, model="sim-500")
    refused = await chat(gateway, key.text, n=-1)
    unknown = await get(gateway, "/v1/foo")
    for answer in (whole, streamed):
        line = await logged(gateway, answer.request_id)
        assert (line["event"], line["session"]) == ("chat", answer.headers["x-tollgate-session"])
        row = await gateway.session(line["session"])
        assert (line["prompt"], line["output"]) == (row["prompt_tokens"], row["output_tokens"])
        assert float(line["charge"]) == row["charged"] / 1_000_000
        assert (line["account"], line["key"]) == (key.account.id, key.id)
        assert row["metadata"]["request_id"] == answer.request_id
    for answer, status in ((failed, 500), (refused, 400), (unknown, 404)):
        line = await logged(gateway, answer.request_id)
        assert (line["event"], line["status"]) == ("refused", status)


@pytest.mark.parametrize(("model", "credit", "ending"), [
    ("gpt-4o-mini", 1_000_000, "completed"),
    ("gpt-4o-mini", 15, "credit_cut"),
    ("sim-cut", 1_000_000, "upstream_failed"),
])  # fmt: skip
async def test_the_line_of_a_stream_says_how_it_ended(gateway: Gateway, model: str, credit: int, ending: str) -> None:
    key = await gateway.key(credit)
    answer = await chat(gateway, key.text, model=model, stream=True)
    line = await logged(gateway, answer.request_id)
    row = await gateway.session(line["session"])
    assert (line["ending"], row["metadata"]["ending"]) == (ending, ending)


async def test_a_stream_that_breaks_after_content_leaves_a_line_with_its_fault(gateway: Gateway, key: Key) -> None:
    answer = await chat(gateway, key.text, model="sim-cut", stream=True)
    await logged(gateway, answer.request_id)
    mine = [line for line in log_lines(gateway) if line.get("request_id") == answer.request_id]
    (line,) = [each for each in mine if each["event"] == "attempt failed"]
    assert (line["route"], line["provider"], line["outcome"], line["when"]) == (
        "sim-cut", "sim", "closed", "after_content",
    )  # fmt: skip
    assert (line["status"], line["ms"] >= 0, line["session"]) == (200, True, answer.headers["x-tollgate-session"])


async def test_the_log_is_json_but_for_the_one_greeting(gateway: Gateway) -> None:
    await chat(gateway, "x")
    *lines, _ = gateway.log.read_text().split("\n")
    plain = [number for number, line in enumerate(lines) if not line.startswith("{")]
    assert lines[plain[0]].startswith("Tollgate serves on ")
    assert plain == list(range(plain[0], plain[0] + len(plain)))
    for line in log_lines(gateway):
        assert {"event", "level", "timestamp", "process"} <= set(line)


async def test_request_ids_are_ours_always(gateway: Gateway, key: Key) -> None:
    theirs = "11111111-2222-4333-8444-555555555555"
    seen = set()
    async with connected(gateway.port) as client:
        for method, path in (("GET", "/v1/models"), ("GET", "/v1/models/gpt-4o-mini"), ("GET", "/v1/foo"),
                             ("POST", "/v1/chat/completions"), ("GET", "/health/live"),
                             ("GET", "/metrics")):  # fmt: skip
            answer = await client.request(method, path, key.text, x_request_id=theirs)
            seen.add(answer.request_id)
    assert len(seen) == 6
    assert theirs not in seen


async def test_models_have_openais_shape(gateway: Gateway, key: Key) -> None:
    async with connected(gateway.port) as client:
        listed = await client.request("GET", "/v1/models", key.text)
        one = await client.request("GET", "/v1/models/falls-back", key.text)
        nobody = await client.request("GET", "/v1/models")
    assert nobody.status == 401
    body = listed.json()
    assert (list(body), body["object"]) == (["object", "data"], "list")
    for model in body["data"]:
        assert list(model) == ["id", "object", "created", "owned_by"]
        assert (model["object"], type(model["created"]), type(model["owned_by"])) == ("model", int, str)
    assert one.json() in body["data"]
    assert len({model["id"] for model in body["data"]}) == len(body["data"])


def tollgate(gateway: Gateway, *arguments: str) -> Any:
    """A command's JSON answer."""
    done = gateway.tollgate(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


async def test_an_account_lives_on_the_command_line(gateway: Gateway) -> None:
    name = f"cli-{keys.mint().id}"
    account = tollgate(gateway, "accounts", "create", name)
    granted = tollgate(gateway, "credits", "grant", name, "2.5", "--notes", "trial")
    made = tollgate(gateway, "keys", "create", "--account", name, "--name", "laptop")
    assert re.fullmatch(keys.SCANNER_PATTERN, made["key"])
    assert granted
    answer = await chat(gateway, made["key"], stream=True, stream_options={"include_usage": True})
    stream = stream_of(answer, usage_wanted=True)
    row = await gateway.session(answer.headers["x-tollgate-session"])
    listed = tollgate(gateway, "sessions", "list", "--account", name)["sessions"]
    (session,) = listed
    assert (session["id"], session["charged_micros"]) == (row["sid"], row["charged"])
    assert stream.usage is not None
    assert session["prompt_tokens"] == stream.usage["prompt_tokens"]
    assert session["output_tokens"] == stream.usage["completion_tokens"]
    assert session["metadata"]["request_id"] == answer.request_id
    shown = tollgate(gateway, "accounts", "show", name)
    assert (shown["id"], shown["keys"]) == (account["id"], [made["id"]])
    assert shown["balance"]["available_micros"] == 2_500_000 - row["charged"]
    assert shown["balance"]["held_micros"] == 0
    assert str(row["charged"]) in json.dumps(tollgate(gateway, "credits", "show", name))
    assert made["key"] not in json.dumps(tollgate(gateway, "keys", "list", "--account", name))


async def test_a_revoked_key_is_refused_within_five_seconds(gateway: Gateway, key: Key) -> None:
    assert (await chat(gateway, key.text, max_tokens=1)).status == 200  # it is in the worker's cache now
    assert tollgate(gateway, "keys", "revoke", key.id)["changed"] is True
    began = time.monotonic()

    async def refused() -> bool:
        return (await chat(gateway, key.text, max_tokens=1)).status == 401

    await until(refused, 5)
    assert time.monotonic() - began < 5
    (listed,) = tollgate(gateway, "keys", "list", "--account", key.account.id)["keys"]
    assert listed["state"] == "revoked"


async def test_nothing_of_a_prompt_or_a_key_is_kept_anywhere(gateway: Gateway, key: Key) -> None:
    """Canaries through every door: prompt, fields, model, headers, address and query, served, refused and failed."""
    bearer = f"sk-{CANARY}-0123456789"
    broken = key.text[:-1] + ("0" if key.text[-1] != "0" else "1")
    asks: list[Any] = [{"role": "user", "content": f"{CANARY} [[say={CANARY}]]"}]
    for fields in ({}, {"stream": True}, {"model": "sim-500"}, {"model": "sim-context-length"},
                   {"model": "sim-cut", "stream": True},
                   {"model": "sim-garbage"}, {"model": CANARY}, {"n": CANARY}, {CANARY: 1, "max_tokens": [CANARY]},
                   {"user": CANARY, "metadata": {"k": CANARY}, "messages": [CANARY]}, {"api_key": CANARY}):  # fmt: skip
        await chat(gateway, key.text, **{"messages": asks, **fields})
    async with connected(gateway.port) as client:
        await client.chat(key.text, f'{{"model":"gpt-4o-mini","messages":"{CANARY}'.encode())
        await client.chat(bearer, b"{}")
        await client.chat(broken, b"{}")
        await client.request("GET", f"/v1/models?key={key.text}&q={CANARY}", key.text, cookie=CANARY, user_agent=CANARY)
        await client.request("GET", f"/v1/{key.text}", key.text)
        await client.request("GET", f"/v1/models/{key.text}", key.text)
    async with connected(gateway.port) as client:
        await client.send(f"GET /x HTTP/1.1\r\nx-{CANARY}: {'a' * HEAD_BYTES_MAX}\r\n bad {key.text}\r\n\r\n".encode())
        await client.rest()
    await gateway.idle(key)
    await gateway.sessions(key, 6)
    secret = key.text.split("_")[3]
    page = (await get(gateway, "/metrics")).body.decode()
    rows = await postgres_text(gateway)
    for canary in (CANARY, bearer, secret, broken):
        assert canary not in gateway.log.read_text()
        assert canary not in page
        assert canary not in rows


async def postgres_text(gateway: Gateway) -> str:
    """Every row of every table, as text."""
    async with gateway.stores() as stores:
        tables = await stores.pool.fetch(
            "SELECT format('%I.%I', schemaname, tablename) FROM pg_tables"
            " WHERE schemaname NOT IN ('pg_catalog', 'information_schema')"
        )
        assert len(tables) > 5
        found = [await stores.pool.fetch(f"SELECT t::text FROM {name} t") for (name,) in tables]
    return "\n".join(row[0] for rows in found for row in rows)


async def test_what_fails_in_the_gateway_shows_no_insides(gateway: Gateway, key: Key) -> None:
    async with httpx2.AsyncClient(
        verify=False, base_url=gateway.url, headers={"authorization": f"Bearer {key.text}"}
    ) as client:
        for method, path in (("GET", "/v1/models/%00"), ("POST", "/v1/chat/completions"), ("GET", "/health/x")):
            answer = await client.request(method, path)
            assert answer.status_code in (400, 404)
            assert set(answer.json()) == {"error"}
