"""The official OpenAI client against providers that speak their own wires: what they are asked, what comes back, and
what it costs, each class of tokens by its own price."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from providers.sigv4 import Credentials, Unsigned, signing_headers
from tests.support import native_providers
from tests.support.gateway import Gateway, Key
from tests.support.native_providers import ASK, CANARY, GRANTED, PORT, SIGNING, TOOLS, Used, counts, stream
from tests.support.native_servers import (
    AMAZON,
    ANTHROPIC_ANSWER,
    BEDROCK_ANSWER,
    GEMINI_ANSWER,
    OPENAI_ANSWER,
    Asked,
    chat,
    native_server,
    replayed,
    streamed,
    whole,
)

PROVIDERS, ENVIRON = native_providers.PROVIDERS, native_providers.ENVIRON


async def charged(gateway: Gateway, key: Key, usage: Any, bill: Any, used: Used) -> None:
    """Client, journal and balance have the same charge: that of `used`."""
    assert counts(usage) == used
    assert Decimal(str(usage.cost)) * 1_000_000 == used.micros
    row = await gateway.session(bill["session"])
    assert (row["charged"], row["outcome"], row["source"]) == (used.micros, "completed", "provider")
    assert row["absorbed"] == 0
    assert (await gateway.idle(key)).available == GRANTED - used.micros


def drawn_by_gemini() -> dict[str, Any]:
    """A frame of Gemini's that says and draws."""
    image = {"inlineData": {"mimeType": "image/png", "data": "iVBORw0KGgo="}}
    counts = {"promptTokenCount": 3, "candidatesTokenCount": 134, "totalTokenCount": 137}
    drawn = [{"modality": "IMAGE", "tokenCount": 129}]
    content = {"role": "model", "parts": [{"text": "Here:"}, image]}
    return {
        "candidates": [{"content": content, "finishReason": "STOP", "index": 0}],
        "usageMetadata": {**counts, "candidatesTokensDetails": drawn},
    }


STREAMS: dict[str, tuple[str, bytes, str, str, Used]] = {
    # what -> (provider, stream, text, reasoning, usage)
    "anthropic, cache written and read": (
        "claude",
        replayed("anthropic/cache"),
        "Hi",
        "",
        Used(1305, 7, cached=1000, written=300, hour=200),
    ),
    "anthropic, thinking": (
        "claude",
        replayed("anthropic/thinking"),
        "Yes!",
        "Let me see.",
        Used(10, 30, reasoning=20),
    ),
    "gemini, cached": ("gemini", replayed("gemini/plain"), "Hello \u2028é!", "", Used(9, 3, cached=4)),
    "gemini, thoughts": ("gemini", replayed("gemini/thoughts"), "Ja", "Let me think.", Used(5, 13, reasoning=12)),
    "gemini, text and an image": (
        "gemini",
        streamed(b"data: %b\n\n" % json.dumps(drawn_by_gemini()).encode()),
        "Here:",
        "",
        Used(3, 134, drawn=129),
    ),
    "vertex": ("vertex", replayed("gemini/plain"), "Hello \u2028é!", "", Used(9, 3, cached=4)),
    "bedrock, cache written and read": (
        "bedrock",
        replayed("bedrock/cached"),
        "Yes.",
        "",
        Used(135, 2, cached=100, written=30, hour=20),
    ),
    "bedrock, reasoning": ("bedrock", replayed("bedrock/reasoning"), "Hi!", "The user greets.", Used(12, 20)),
    "azure": ("azure", replayed("openai/azure"), "a", "", Used(9, 2, cached=3, reasoning=1)),
    "azure by deployment": ("azure-deployments", replayed("openai/azure"), "a", "", Used(9, 2, cached=3, reasoning=1)),
    "azure, filters": (
        "azure",
        chat(
            {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11},
            {},
            {
                "choices": [
                    {"index": 0, "finish_reason": None, "content_filter_results": {}, "content_filter_offsets": {}}
                ]
            },
        ),
        "a",
        "",
        Used(9, 2),
    ),
    "groq": ("groq", replayed("openai/groq"), "a", "", Used(9, 2, cached=3, reasoning=1)),
    "ollama": (
        "ollama",
        chat({"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}),
        "ab",
        "",
        Used(9, 2),
    ),
    "mistral, usage with the finish": (
        "mistral",
        chat({}, {}, {}, {"usage": {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}}),
        "ab",
        "",
        Used(9, 2),
    ),
    "xai, reasoning beside the completion": (
        "xai",
        chat(
            {
                "prompt_tokens": 32,
                "completion_tokens": 9,
                "total_tokens": 135,
                "completion_tokens_details": {"reasoning_tokens": 94},
            }
        ),
        "ab",
        "",
        Used(32, 103, reasoning=94),
    ),
}


@pytest.mark.parametrize("what", STREAMS)
async def test_a_native_stream_is_openais_and_each_class_of_tokens_has_its_price(
    gateway: Gateway, key: Key, client: AsyncOpenAI, what: str
) -> None:
    provider, answer, text, reasoning, used = STREAMS[what]
    async with native_server(PORT, answer):
        seen = await stream(client, f"n-{provider}")
    assert (seen.text, seen.reasoning, seen.finish) == (text, reasoning, "stop")
    assert (seen.bill["provider"], seen.bill["attempts"]) == (provider, 1)
    await charged(gateway, key, seen.usage, seen.bill, used)


WHOLE: dict[str, tuple[dict[str, Any], Used]] = {
    "claude": (ANTHROPIC_ANSWER, Used(1305, 30, cached=1000, written=300, reasoning=20)),
    "gemini": (GEMINI_ANSWER, Used(20, 12, cached=8, reasoning=7)),
    "vertex": (GEMINI_ANSWER, Used(20, 12, cached=8, reasoning=7)),
    "bedrock": (BEDROCK_ANSWER, Used(135, 6, cached=100, written=30)),
    "azure": (OPENAI_ANSWER, Used(9, 4, cached=3, reasoning=1)),
    "azure-deployments": (OPENAI_ANSWER, Used(9, 4, cached=3, reasoning=1)),
    "groq": (OPENAI_ANSWER, Used(9, 4, cached=3, reasoning=1)),
    "ollama": (OPENAI_ANSWER, Used(9, 4, cached=3, reasoning=1)),
}


@pytest.mark.parametrize("provider", WHOLE)
async def test_a_native_answer_is_openais_too(gateway: Gateway, key: Key, client: AsyncOpenAI, provider: str) -> None:
    answer, used = WHOLE[provider]
    async with native_server(PORT, whole(answer)):
        given: Any = await client.chat.completions.create(model=f"n-{provider}", messages=ASK, max_tokens=100)
    message = given.choices[0].message
    assert message.content == "Hello."
    if answer is not OPENAI_ANSWER:
        assert given.choices[0].finish_reason == "tool_calls"
        (call,) = message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Köln"})
        assert given.created > 1_700_000_000
    await charged(gateway, key, given.usage, given.x_tollgate, used)


def claude(asked: Asked) -> None:
    assert asked.target == "/claude/v1/messages"
    assert asked.headers["x-api-key"] == CANARY
    assert asked.headers["anthropic-version"] == "2023-06-01"
    assert asked.body["system"] == [{"type": "text", "text": "Be brief."}]
    assert (asked.body["model"], asked.body["max_tokens"], asked.body["stream"]) == ("m-claude", 100, True)
    assert asked.body["tools"][0]["input_schema"]["properties"] == {"city": {"type": "string"}}


def gemini(asked: Asked) -> None:
    assert asked.target == "/gemini/v1beta/models/m-gemini:streamGenerateContent?alt=sse"
    assert asked.headers["x-goog-api-key"] == CANARY
    assert asked.body["systemInstruction"]["parts"] == [{"text": "Be brief."}]
    assert asked.body["generationConfig"]["maxOutputTokens"] == 100
    assert asked.body["tools"][0]["functionDeclarations"][0]["name"] == "weather"


def vertex(asked: Asked) -> None:
    base = "/vertex/v1/projects/p/locations/global/publishers/google"
    assert asked.target == f"{base}/models/m-vertex:streamGenerateContent?alt=sse"
    assert asked.headers["authorization"] == f"Bearer {CANARY}"


def bedrock(asked: Asked) -> None:
    assert asked.target == "/bedrock/model/m-bedrock/converse-stream"
    assert asked.headers["authorization"] == f"Bearer {CANARY}"
    assert asked.headers["accept"] == AMAZON
    assert asked.body["system"] == [{"text": "Be brief."}]
    assert asked.body["inferenceConfig"]["maxTokens"] == 100
    assert asked.body["toolConfig"]["tools"][0]["toolSpec"]["name"] == "weather"


def signed(asked: Asked) -> None:
    at = datetime.strptime(asked.headers["x-amz-date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    assert abs((datetime.now(UTC) - at).total_seconds()) < 60
    host = asked.headers["host"].encode()
    unsigned = Unsigned(
        b"POST", asked.target.encode(), ((b"host", host), (b"content-type", b"application/json")), asked.raw
    )
    credentials = Credentials.read(SIGNING)
    assert credentials is not None
    wanted = dict(
        signing_headers(unsigned, credentials, region="eu-central-1", service="bedrock", epoch_s=int(at.timestamp()))
    )
    assert asked.headers["authorization"].encode() == wanted[b"authorization"]


def azure(asked: Asked) -> None:
    assert asked.target == "/openai/v1/chat/completions"
    assert asked.headers["api-key"] == CANARY
    assert "authorization" not in asked.headers
    assert asked.body["model"] == "m-azure"


def azure_deployments(asked: Asked) -> None:
    assert asked.target == "/openai/deployments/m-azure-deployments/chat/completions?api-version=2024-10-21"
    assert asked.headers["api-key"] == CANARY


def ollama(asked: Asked) -> None:
    assert asked.target == "/ollama/v1/chat/completions"
    assert "authorization" not in asked.headers
    assert asked.body["max_tokens"] == 100


def mistral(asked: Asked) -> None:
    assert asked.headers["authorization"] == f"Bearer {CANARY}"
    assert asked.body["max_tokens"] == 100
    assert not {"max_completion_tokens", "stream_options", "store"} & set(asked.body)


REQUESTS: dict[str, tuple[bytes, Callable[[Asked], None]]] = {
    "claude": (replayed("anthropic/plain"), claude),
    "gemini": (replayed("gemini/plain"), gemini),
    "vertex": (replayed("gemini/plain"), vertex),
    "bedrock": (replayed("bedrock/plain"), bedrock),
    "bedrock-signed": (replayed("bedrock/plain"), signed),
    "azure": (replayed("openai/azure"), azure),
    "azure-deployments": (replayed("openai/azure"), azure_deployments),
    "ollama": (chat({}), ollama),
    "mistral": (chat({}), mistral),
}


@pytest.mark.parametrize("provider", REQUESTS)
async def test_a_provider_is_asked_in_its_own_words(client: AsyncOpenAI, provider: str) -> None:
    answer, check = REQUESTS[provider]
    more: dict[str, Any] = {"tools": TOOLS, "store": False} if provider != "mistral" else {"store": False}
    limit: dict[str, Any] = {"max_tokens": openai.omit, "max_completion_tokens": 100}
    async with native_server(PORT, answer) as asked:
        await stream(client, f"n-{provider}", **more, **limit)
    check(asked[0])


CALLS = {
    "claude": ("anthropic/tools", [["toolu_1", "weather", '{"city": "Köln"}'], ["toolu_2", "now", "{}"]]),
    "gemini": ("gemini/tools", [["id1", "f", '{"a":1.5,"b":"é"}'], ["id2", "g", "{}"]]),
    "bedrock": (
        "bedrock/tools",
        [["tooluse_a1", "get_weather", '{"city": "Paris"}'], ["tooluse_b2", "get_time", "{}"]],
    ),
}


@pytest.mark.parametrize("provider", CALLS)
async def test_tool_calls_come_back_as_openais_and_their_results_go_up_natively(
    client: AsyncOpenAI, provider: str
) -> None:
    transcript, calls = CALLS[provider]
    async with native_server(PORT, replayed(transcript)) as asked:
        seen = await stream(client, f"n-{provider}", tools=TOOLS)
        found = [[call_id, name, json.loads(arguments)] for call_id, name, arguments in seen.calls.values()]
        assert found == [[call_id, name, json.loads(arguments)] for call_id, name, arguments in calls]
        assert seen.finish == "tool_calls"
        said = [
            {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
            for call_id, name, arguments in seen.calls.values()
        ]
        results = [{"role": "tool", "tool_call_id": call["id"], "content": "result-text"} for call in said]
        history = [*ASK, {"role": "assistant", "content": None, "tool_calls": said}, *results]
        await stream(client, f"n-{provider}", tools=TOOLS, messages=history)
    again = json.dumps(asked[1].body)
    assert again.count("result-text") == len(calls)
    assert all(name in again for _, name, _ in calls)
