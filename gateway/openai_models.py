"""OpenAI's own model list, offered as routes when OPENAI_API_KEY is set.

Must not: stop a start. When the list cannot be had the gateway says so and serves what the configuration names.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping

import httpx2
import msgspec
import structlog

from config.routing import Candidate, Route
from config.settings import OPENAI, Secrets, Settings

ASK_S = 10.0
MODELS_MAX = 2_000
_REASONING = re.compile(r"(?:o[1-9]|gpt-[56]).*")
"""Model families that think before their first token, and do not show it."""

_NO_CHAT = re.compile(
    r"(?:^|-)(?:babbage|codex|computer-use|curie|dall-e|davinci|deep-research|embedding|image|instruct|live"
    r"|moderation|pro|realtime|similarity|sora|text|transcribe|translate|tts|whisper)(?:-|$)|^ada$"
)
"""Words in the names of models that /v1/chat/completions does not serve: neither OpenAI's list nor the price table
tells a model's kind. Other tasks (embeddings, images, speech, moderation), other APIs (realtime, legacy completions),
and the models that only the Responses API has (codex, computer-use, deep-research, pro)."""

log = structlog.get_logger()


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


async def offered_routes(settings: Settings, secrets: Secrets) -> dict[str, Route]:
    """A route for every chat model that the provider `openai` lists; empty without that provider or its key."""
    provider, key = settings.providers.get(OPENAI), secrets.provider_keys.get(OPENAI)
    if provider is None or key is None or provider.kind != OPENAI:
        return {}
    try:
        async with asyncio.timeout(ASK_S), httpx2.AsyncClient(timeout=ASK_S, trust_env=False) as client:
            answer = await client.get(
                f"{provider.base_url.rstrip('/')}/models", headers={"authorization": f"Bearer {key}"}
            )
            answer.raise_for_status()
            listed = msgspec.json.decode(answer.content, type=_Models).data[:MODELS_MAX]
    except (httpx2.HTTPError, msgspec.DecodeError, TimeoutError) as error:
        log.warning(
            "OpenAI's models could not be listed; only configured routes are served", error=type(error).__name__
        )
        return {}
    names = sorted(model.id for model in listed if 0 < len(model.id) <= 128 and model.id.isprintable())
    return {name: _route(name) for name in names if _chats(name)}


def _chats(model: str) -> bool:
    """Whether /v1/chat/completions serves the model, by its name; of a fine-tune (`ft:base:...`) by its base."""
    return _NO_CHAT.search(model.removeprefix("ft:").partition(":")[0]) is None


def _route(model: str) -> Route:
    candidates = (Candidate(provider=OPENAI, model=model),)
    return Route(candidates=candidates, hidden_reasoning=_REASONING.fullmatch(model) is not None)


def without_simulated(settings: Settings, offered: Mapping[str, Route]) -> Settings:
    """The settings without the demo routes that OpenAI serves for real: who has a key expects no simulated answer."""
    simulate = settings.embedded.simulate
    kept = {
        name: route
        for name, route in settings.routes.items()
        if name not in offered or any(candidate.provider != simulate for candidate in route.candidates)
    }
    return msgspec.structs.replace(settings, routes=kept)
