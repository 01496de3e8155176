"""How providers of other wires fail, as the official client sees it: status, code, who is asked next, the charge."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from tests.support import native_providers
from tests.support.gateway import Gateway, Key
from tests.support.native_providers import ASK, CANARY, GRANTED, PORT, TOOLS, Seen, Used, stream
from tests.support.native_servers import AMAZON, OPENAI_ANSWER, Held, chat, native_server, replayed, streamed, whole

PROVIDERS, ENVIRON = native_providers.PROVIDERS, native_providers.ENVIRON


IN_BAND = {
    "claude": ("anthropic/overloaded", "He"),
    "gemini": ("gemini/error_frame", "a"),
    "groq": ("openai/event_error", "a"),
}


@pytest.mark.parametrize("provider", IN_BAND)
async def test_an_error_inside_a_native_stream_is_told_in_band_and_what_came_is_charged(
    gateway: Gateway, key: Key, client: AsyncOpenAI, provider: str
) -> None:
    transcript, text = IN_BAND[provider]
    seen = Seen()
    async with native_server(PORT, Held(replayed(transcript), seen.spoke)):
        with pytest.raises(openai.APIError):
            await stream(client, f"n-{provider}", seen)
    assert seen.text == text
    (row,) = await gateway.sessions(key, 1)
    assert (row["outcome"], row["source"], row["output_tokens"]) == ("error", "counted", 1)
    assert row["charged"] == row["prompt_tokens"] * 10 + 100


async def test_an_error_that_comes_with_the_first_content_is_a_plain_status(
    gateway: Gateway, key: Key, client: AsyncOpenAI
) -> None:
    async with native_server(PORT, replayed("anthropic/overloaded")):
        with pytest.raises(openai.InternalServerError) as caught:
            await stream(client, "n-claude")
    assert caught.value.status_code == 503
    assert (await gateway.idle(key)).available == GRANTED


@pytest.mark.parametrize("provider", ["claude", "gemini", "bedrock"])
async def test_a_cut_native_stream_is_an_error_and_no_success(
    gateway: Gateway, key: Key, client: AsyncOpenAI, provider: str
) -> None:
    wire = {"claude": "anthropic"}.get(provider, provider)
    async with native_server(PORT, replayed(f"{wire}/truncated")):
        with pytest.raises(openai.APIError) as caught:
            await stream(client, f"n-{provider}")
    assert caught.value.code == "upstream_truncated"
    (row,) = await gateway.sessions(key, 1)
    assert row["outcome"] == "error"


async def test_an_exception_before_bedrocks_first_content_keeps_its_status(
    gateway: Gateway, key: Key, client: AsyncOpenAI
) -> None:
    async with native_server(PORT, replayed("bedrock/throttled")):
        with pytest.raises(openai.RateLimitError):
            await stream(client, "n-bedrock")
    assert (await gateway.idle(key)).available == GRANTED


REFUSALS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    # provider -> (an error body by status, headers)
    "claude": ({"type": "error", "error": {"type": "{claude}", "message": f"about {CANARY}"}}, ()),
    "gemini": ({"error": {"code": 0, "message": f"about {CANARY}", "status": "{gemini}"}}, ()),
    "bedrock": ({"message": f"about {CANARY}"}, ("x-amzn-errortype: {bedrock}",)),
    "azure": ({"error": {"code": "{azure}", "message": f"about {CANARY}"}}, ()),
}
NAMES = {
    429: {
        "claude": "rate_limit_error",
        "gemini": "RESOURCE_EXHAUSTED",
        "bedrock": "ThrottlingException",
        "azure": "429",
    },
    401: {
        "claude": "authentication_error",
        "gemini": "UNAUTHENTICATED",
        "bedrock": "UnrecognizedClientException",
        "azure": "401",
    },
}


def refusal(provider: str, status: int, *headers: str) -> bytes:
    body, own = REFUSALS[provider]
    name = NAMES[status][provider]
    text = json.dumps(body).replace(f"{{{provider}}}", name).replace('"code": 0', f'"code": {status}')
    return whole(json.loads(text), f"{status} No", *(each.replace("{bedrock}", name) for each in own), *headers)


@pytest.mark.parametrize("provider", REFUSALS)
@pytest.mark.parametrize("streaming", [True, False])
async def test_a_rate_limit_is_passed_on_with_its_wait(
    gateway: Gateway, key: Key, client: AsyncOpenAI, provider: str, streaming: bool
) -> None:
    async with native_server(PORT, refusal(provider, 429, "retry-after: 7")):
        with pytest.raises(openai.RateLimitError) as caught:
            await client.chat.completions.create(model=f"n-{provider}", messages=ASK, stream=streaming, max_tokens=9)
    assert caught.value.response.headers["retry-after"] == "7"
    assert (await gateway.idle(key)).available == GRANTED


@pytest.mark.parametrize("provider", REFUSALS)
@pytest.mark.parametrize("streaming", [True, False])
async def test_our_key_refused_is_a_502_without_the_providers_words(
    gateway: Gateway, key: Key, client: AsyncOpenAI, provider: str, streaming: bool
) -> None:
    async with native_server(PORT, refusal(provider, 401)):
        with pytest.raises(openai.InternalServerError) as caught:
            await client.chat.completions.create(model=f"n-{provider}", messages=ASK, stream=streaming, max_tokens=9)
    assert (caught.value.status_code, caught.value.code) == (502, "upstream_key_refused")
    assert CANARY not in caught.value.response.text
    row = await gateway.session(caught.value.response.headers["x-tollgate-session"])
    assert (row["charged"], row["metadata"]["attempts"][0]["status"]) == (0, 401)


@pytest.mark.parametrize(("model", "field_"), [("n-claude", "seed"), ("n-gemini", "logit_bias"), ("n-bedrock", "seed")])
@pytest.mark.parametrize("streaming", [True, False])
async def test_what_a_provider_cannot_do_is_a_400_that_names_the_field(
    gateway: Gateway, key: Key, client: AsyncOpenAI, model: str, field_: str, streaming: bool
) -> None:
    value: Any = {"42": 7} if field_ == "logit_bias" else 7
    async with native_server(PORT, b"") as asked:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(
                model=model, messages=ASK, stream=streaming, max_tokens=9, extra_body={field_: value}
            )
    assert asked == []
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", field_)
    row = await gateway.session(caught.value.response.headers["x-tollgate-session"])
    assert (row["charged"], row["outcome"]) == (0, "void")
    assert row["metadata"]["attempts"] == []  # nobody was asked
    assert (await gateway.idle(key)).available == GRANTED


@pytest.mark.parametrize("streaming", [True, False])
async def test_the_next_candidate_takes_what_the_first_cannot_do(
    gateway: Gateway, client: AsyncOpenAI, streaming: bool
) -> None:
    answer = chat({}) if streaming else whole(OPENAI_ANSWER)
    async with native_server(PORT, answer) as asked:
        raw = await client.chat.completions.with_raw_response.create(
            model="n-claude-then-ollama", messages=ASK, stream=streaming, max_tokens=9, seed=7
        )
        assert raw.headers["x-tollgate-attempts"] == "1"
        await raw.http_response.aread()
    assert [each.target for each in asked] == ["/ollama/v1/chat/completions"]
    row = await gateway.session(raw.headers["x-tollgate-session"])
    assert [each["outcome"] for each in row["metadata"]["attempts"]] == ["completed"]


@pytest.mark.parametrize("streaming", [True, False])
async def test_a_failure_is_told_rather_than_that_another_candidate_could_not_be_asked(
    client: AsyncOpenAI, streaming: bool
) -> None:
    async with native_server(PORT, whole({"error": {"message": "busy"}}, "503 Busy")):
        with pytest.raises(openai.InternalServerError) as caught:
            await client.chat.completions.create(
                model="n-ollama-then-claude", messages=ASK, stream=streaming, max_tokens=9, seed=7
            )
    assert caught.value.status_code == 503
    assert caught.value.response.headers["x-tollgate-attempts"] == "1"


async def test_a_field_is_dropped_only_where_the_configuration_says_so(client: AsyncOpenAI) -> None:
    async with native_server(PORT, replayed("anthropic/plain")) as asked:
        await stream(client, "n-claude-drops", seed=7)
    assert "seed" not in asked[0].body


async def test_a_request_that_is_wrong_in_itself_asks_nobody(client: AsyncOpenAI) -> None:
    async with native_server(PORT, b"") as asked:
        with pytest.raises(openai.BadRequestError) as caught:
            await stream(client, "n-claude-then-ollama", tool_choice="sometimes", tools=TOOLS)
    assert asked == []
    assert (caught.value.code, caught.value.param) == ("invalid_value", "tool_choice")


TOO_LONG = {
    "claude": {
        "type": "error",
        "error": {"type": "invalid_request_error", "message": "prompt is too long: 9 tokens > 8 maximum"},
    },
    "gemini": {
        "error": {
            "code": 400,
            "message": "The input token count (9) exceeds the maximum number of tokens allowed (8).",
            "status": "INVALID_ARGUMENT",
        }
    },
    "bedrock": {"message": "prompt is too long: 9 tokens > 8 maximum"},
    "azure": {"error": {"code": "context_length_exceeded", "message": "too long", "type": "invalid_request_error"}},
}


@pytest.mark.parametrize("provider", TOO_LONG)
async def test_a_prompt_that_is_too_long_has_openais_code(client: AsyncOpenAI, provider: str) -> None:
    answer = whole(TOO_LONG[provider], "400 Bad Request", "x-amzn-errortype: ValidationException")
    async with native_server(PORT, answer):
        with pytest.raises(openai.BadRequestError) as caught:
            await stream(client, f"n-{provider}")
    assert (caught.value.status_code, caught.value.code) == (400, "context_length_exceeded")


async def test_a_blocked_prompt_does_not_fall_back_and_has_a_code(client: AsyncOpenAI) -> None:
    body = b'data: {"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}, "responseId": "r"}\n\n'
    azure_says = {"error": {"code": "content_filter", "message": "filtered", "type": None, "status": 400}}
    for model, answer, code in (
        ("n-gemini", streamed(body), "content_policy_violation"),
        ("n-azure", whole(azure_says, "400 Bad Request"), "content_filter"),
    ):
        async with native_server(PORT, answer) as asked:
            with pytest.raises(openai.BadRequestError) as caught:
                await stream(client, model)
        assert (caught.value.code, len(asked)) == (code, 1)


async def test_an_overloaded_provider_falls_back_to_one_of_another_wire(gateway: Gateway, client: AsyncOpenAI) -> None:
    busy = whole({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}, "529 Overloaded")
    async with native_server(PORT, busy, replayed("gemini/plain")) as asked:
        seen = await stream(client, "n-claude-then-gemini")
    assert [each.target.split("/")[1] for each in asked] == ["claude", "gemini"]
    assert (seen.bill["provider"], seen.bill["attempts"]) == ("gemini", 2)
    row = await gateway.session(seen.bill["session"])
    assert row["charged"] == Used(9, 3, cached=4).micros


async def test_an_event_stream_of_the_wrong_kind_is_a_502(client: AsyncOpenAI) -> None:
    async with native_server(PORT, streamed(b"data: {}\n\n")):
        with pytest.raises(openai.InternalServerError) as caught:
            await stream(client, "n-bedrock")
    assert (caught.value.status_code, caught.value.code) == (502, "upstream_invalid")
    async with native_server(PORT, streamed(b"data: {}\n\n", AMAZON)):
        with pytest.raises(openai.InternalServerError):
            await stream(client, "n-claude")


async def test_the_providers_keys_are_in_no_log_line(gateway: Gateway) -> None:
    assert CANARY not in gateway.log.read_text()
