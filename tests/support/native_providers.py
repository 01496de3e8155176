"""Providers of every kind at one scripted server, and what a test sees of a call: its stream and what it was to cost.

For acceptance tests: their modules take `PROVIDERS` and `ENVIRON` from here, and all have `PORT`.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from openai import AsyncOpenAI

from tests.support.ports import free_port

CANARY = "canaryNative0123456789"
SIGNING = f"AKIDEXAMPLE:{CANARY}"
GRANTED = 1_000_000
PORT = free_port()
"""Where every provider is; each has a path of its own."""
TABLES = {
    "claude": 'kind = "anthropic"\nbase_url = "{at}/claude/v1"',
    "claude-drops": 'kind = "anthropic"\nbase_url = "{at}/claude/v1"\ndrop_unsupported = ["seed"]',
    "gemini": 'kind = "gemini"\nbase_url = "{at}/gemini/v1beta"',
    "vertex": 'kind = "vertex"\nbase_url = "{at}/vertex/v1/projects/p/locations/global/publishers/google"',
    "bedrock": 'kind = "bedrock"\nbase_url = "{at}/bedrock"\noptions = {{ region = "eu-central-1" }}',
    "bedrock-signed": 'kind = "bedrock"\nbase_url = "{at}/bedrock"\noptions = {{ region = "eu-central-1" }}',
    "azure": 'kind = "azure"\nbase_url = "{at}"',
    "azure-deployments": 'kind = "azure"\nbase_url = "{at}"\noptions = {{ api_version = "2024-10-21" }}',
    "groq": 'kind = "groq"\nbase_url = "{at}/groq/openai/v1"',
    "ollama": 'kind = "ollama"\nbase_url = "{at}/ollama/v1"',
    "mistral": 'kind = "mistral"\nbase_url = "{at}/mistral/v1"',
    "xai": 'kind = "xai"\nbase_url = "{at}/xai/v1"',
}
KEYLESS = {"ollama"}
ROUTES = {f"n-{name}": [name] for name in TABLES} | {
    "n-claude-then-ollama": ["claude", "ollama"],
    "n-ollama-then-claude": ["ollama", "claude"],
    "n-claude-then-gemini": ["claude", "gemini"],
}
PRICE = """
input = "10"
cached_input = "1"
cache_write = "20"
cache_write_1h = "40"
output = "100"
reasoning = "1000"
image_output = "900"
"""


def _tables() -> str:
    lines = []
    for name, text in TABLES.items():
        secret = "" if name in KEYLESS else f'api_key_env = "NATIVE_{"SIGNING" if name == "bedrock-signed" else "KEY"}"'
        lines.append(f"\n[providers.{name}]\n{text.format(at=f'http://127.0.0.1:{PORT}')}\n{secret}")
    for name, candidates in ROUTES.items():
        listed = ", ".join(f'{{ provider = "{each}", model = "m-{each}" }}' for each in candidates)
        lines.append(f"\n[routes.{name}]\ncandidates = [{listed}]\n\n[prices.{name}]\n{PRICE}")
    return "\n".join(lines)


PROVIDERS = _tables()
ENVIRON = {"NATIVE_KEY": CANARY, "NATIVE_SIGNING": SIGNING}
ASK: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


@dataclass(frozen=True)
class Used:
    """Tokens as OpenAI counts them: cached and written ones are among the prompt's, those written for an hour among the
    written ones, reasoning and images among the output's."""

    prompt: int
    output: int
    cached: int = 0
    written: int = 0
    reasoning: int = 0
    hour: int = 0
    drawn: int = 0

    @property
    def micros(self) -> int:
        """What they cost at `PRICE`."""
        given = (self.prompt - self.cached - self.written) * 10 + self.cached
        written = (self.written - self.hour) * 20 + self.hour * 40
        said = self.output - self.reasoning - self.drawn
        return given + written + said * 100 + self.reasoning * 1000 + self.drawn * 900


@dataclass
class Seen:
    """A stream as its client saw it. `spoke` is set once there is text."""

    begun: bool = False
    text: str = ""
    reasoning: str = ""
    calls: dict[int, list[str]] = field(default_factory=dict)
    finish: str | None = None
    usage: Any = None
    bill: Any = None
    spoke: asyncio.Event = field(default_factory=asyncio.Event)


def read(seen: Seen, chunk: Any) -> None:
    """Take a chunk in."""
    for choice in chunk.choices:
        assert seen.finish is None
        seen.begun = True
        delta = choice.delta
        seen.text += getattr(delta, "content", None) or ""
        seen.reasoning += getattr(delta, "reasoning_content", None) or ""
        for call in getattr(delta, "tool_calls", None) or ():
            if call.id:
                seen.calls[call.index] = [call.id, call.function.name, ""]
            seen.calls[call.index][2] += call.function.arguments or ""
        seen.finish = choice.finish_reason or seen.finish
    if seen.text:
        seen.spoke.set()
    if chunk.usage is not None:
        assert seen.usage is None
        seen.usage, seen.bill = chunk.usage, chunk.x_tollgate


async def stream(client: AsyncOpenAI, model: str, seen: Seen | None = None, **more: Any) -> Seen:
    """A whole stream with usage; in `seen` as far as it came when it fails."""
    seen = seen or Seen()
    fields = {"max_tokens": 100, "messages": ASK, **more}
    chunks = await client.chat.completions.create(
        model=model, stream=True, stream_options={"include_usage": True}, **fields
    )
    async for chunk in chunks:
        if chunk.choices and not seen.begun:
            assert chunk.choices[0].delta.role == "assistant"
        read(seen, chunk)
    return seen


def counts(usage: Any) -> Used:
    """The usage that a client was told."""
    given, made = usage.prompt_tokens_details, usage.completion_tokens_details
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    return Used(
        usage.prompt_tokens,
        usage.completion_tokens,
        (given and given.cached_tokens) or 0,
        getattr(given, "cache_write_tokens", None) or 0,
        (made and made.reasoning_tokens) or 0,
        (getattr(given, "cache_write_tokens_details", None) or {}).get("ttl_1h_tokens", 0),
        getattr(made, "image_tokens", None) or 0,
    )
