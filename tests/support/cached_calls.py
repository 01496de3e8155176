"""Calls on routes with a response cache: their configuration, the calls, and what the provider saw of them."""

from __future__ import annotations

import time
from typing import Any

import httpx2
from openai import AsyncOpenAI

from tests.support.gateway import Gateway, until
from tests.support.provider_log import provider_log

ROUTE = """
[routes.{name}]
candidates = [{{ provider = "sim", model = "{model}" }}]
{more}
cache = {{ {cache} }}

[prices.{name}]
input = "1"
output = "1"
"""

CONTINUED = """
[routes.kept-continued]
candidates = [{ provider = "sim", model = "sim-cut:after=3" }, { provider = "sim", model = "gpt-4o-mini" }]
continuation = true
retry = { retries = 0 }
cache = {}

[prices.kept-continued]
input = "1"
output = "1"
"""


def route(name: str, cache: str, model: str = "gpt-4o-mini", more: str = "") -> str:
    return ROUTE.format(name=name, cache=cache, model=model, more=more)


PROVIDERS = (
    route("kept", "ttl_s = 600")
    + route("kept-tools", "ttl_s = 600", "sim-tools")
    + route("kept-cut", "ttl_s = 600", "sim-cut:after=3")
    + route("kept-asked", 'mode = "allow"')
    + route("kept-second", "ttl_s = 1")
    + route("kept-small", "bytes_max = 2000")
    + route("kept-shared", 'scope = "shared", price = "0.3"')
    + route("kept-large", "bytes_max = 16_777_216")
    + route("kept-impatient", "wait_ms = 200")
    + CONTINUED
    + route("kept-worst", "ttl_s = 600", more="hidden_reasoning = true\nmax_output_tokens = 1000")
)
HEADER = "x-tollgate-cache"
WORDS = iter(range(10_000))


def fresh(words: str = "") -> list[Any]:
    """A prompt that no other test has asked."""
    return [{"role": "user", "content": f"{words} Number {next(WORDS)}, {time.monotonic_ns()}."}]


class Call:
    """What a client has of one call."""

    def __init__(self, headers: httpx2.Headers, chunks: list[Any]) -> None:
        self.headers = headers
        self.chunks = chunks
        self.last = chunks[-1]

    @property
    def cache(self) -> str | None:
        """What became of it; one that began while it waited says so with its bill."""
        told = self.headers.get(HEADER)
        return self.bill.get("cache", "miss") if told == "wait" else told

    @property
    def request_id(self) -> str:
        return self.headers["x-request-id"]

    @property
    def session(self) -> str:
        return self.headers.get("x-tollgate-session") or str(self.bill["session"])

    @property
    def bill(self) -> dict[str, Any]:
        bill: dict[str, Any] = self.last.x_tollgate
        return bill

    def content(self) -> list[Any]:
        """All that is the answer: everything but usage and bill."""
        return [each.model_dump(exclude={"usage", "x_tollgate"}) for each in self.chunks]

    def text(self) -> str:
        said = [getattr(choice, "delta", None) or choice.message for each in self.chunks for choice in each.choices]
        return "".join(each.content or "" for each in said)


async def ask(
    client: AsyncOpenAI, model: str, messages: list[Any], headers: dict[str, str] | None = None, **fields: Any
) -> Call:
    """One whole call; a stream asks for usage unless it says otherwise."""
    if fields.get("stream"):
        fields = {"stream_options": {"include_usage": True}, **fields}
    raw = await client.chat.completions.with_raw_response.create(
        model=model, messages=messages, extra_headers=headers, **fields
    )
    parsed: Any = raw.parse()
    return Call(raw.headers, [each async for each in parsed] if fields.get("stream") else [parsed])


async def stored(gateway: Gateway) -> None:
    """Until nothing is being stored: answers are stored when their client has them already."""
    async with gateway.stores() as stores:

        async def unclaimed() -> bool:
            return not await stores.redis.call("KEYS", "cl:*")

        await until(unclaimed)


async def asked(gateway: Gateway, calls: list[Call]) -> list[str]:
    """The request ids that the provider has seen."""
    async with httpx2.AsyncClient(verify=False) as http:
        seen = {entry["request_id"] for entry in await provider_log(gateway.provider).entries(http)}
    return [call.request_id for call in calls if call.request_id in seen]
