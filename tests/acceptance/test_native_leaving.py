"""Clients that leave once a provider has reported more than we can count: they pay what was reported."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from openai import AsyncOpenAI

from tests.support import native_providers
from tests.support.gateway import Gateway, Key
from tests.support.native_providers import ASK, GRANTED, PORT, Seen, Used, read
from tests.support.native_servers import Held, chat, native_server, streamed

PROVIDERS, ENVIRON = native_providers.PROVIDERS, native_providers.ENVIRON


def frames(*events: dict[str, Any]) -> bytes:
    """A stream of these frames."""
    return streamed(b"".join(b"data: %b\n\n" % json.dumps(event).encode() for event in events))


def claude(**usage: Any) -> bytes:
    """A stream of Anthropic's that reports `usage` at its start and says one word before its end."""
    message = {"id": "msg_1", "model": "claude-test-5", "usage": {"output_tokens": 1, **usage}}
    return frames(
        {"type": "message_start", "message": message},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hello"}},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 9}},
    )


def gemini(text: str, **usage: int) -> dict[str, Any]:
    """A frame of Gemini's."""
    parts = [{"text": text}] if text else []
    candidate = {"content": {"role": "model", "parts": parts}, "index": 0}
    return {"candidates": [candidate], "usageMetadata": {"promptTokenCount": 2000, **usage}}


SAID_SO_FAR = {"prompt_tokens": 700, "completion_tokens": 40, "total_tokens": 740}
LEFT: dict[str, tuple[str, bytes, Used]] = {
    # what -> (provider, stream whose last frame waits, what had come when the client left)
    "anthropic, a prompt that was larger": ("claude", claude(input_tokens=5000), Used(5000, 1)),
    "anthropic, a prompt of every class": (
        "claude",
        claude(
            input_tokens=5,
            cache_read_input_tokens=1000,
            cache_creation_input_tokens=300,
            cache_creation={"ephemeral_5m_input_tokens": 100, "ephemeral_1h_input_tokens": 200},
        ),
        Used(1305, 1, cached=1000, written=300, hour=200),
    ),
    "gemini, thinking that is not shown": (
        "gemini",
        frames(
            gemini("", thoughtsTokenCount=400),
            gemini("Hello", candidatesTokenCount=1, thoughtsTokenCount=500),
            gemini("!", candidatesTokenCount=2, thoughtsTokenCount=500),
        ),
        Used(2000, 501, reasoning=500),
    ),
    "usage in every chunk": ("ollama", chat({}, {"usage": SAID_SO_FAR}, {}, done=False), Used(700, 40)),
}


@pytest.mark.parametrize("what", LEFT)
async def test_who_leaves_pays_what_the_provider_had_reported(
    gateway: Gateway, key: Key, client: AsyncOpenAI, what: str
) -> None:
    provider, wire, used = LEFT[what]
    gate, seen = asyncio.Event(), Seen()
    async with native_server(PORT, Held(wire, gate)):
        chunks = await client.chat.completions.create(model=f"n-{provider}", messages=ASK, stream=True, max_tokens=100)
        async for chunk in chunks:
            read(seen, chunk)
            if seen.text:
                break
        await chunks.close()
        (row,) = await gateway.sessions(key, 1)
        gate.set()
    assert (row["outcome"], row["charged"], row["absorbed"]) == ("aborted", used.micros, 0)
    tokens = (used.prompt, used.cached, used.written, used.output, used.reasoning)
    named = ("prompt_tokens", "cached_tokens", "cache_write_tokens", "output_tokens", "reasoning_tokens")
    assert tuple(row[name] for name in named) == tokens
    assert (await gateway.idle(key)).available == GRANTED - used.micros
