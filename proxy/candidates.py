"""Routes as the data plane uses them: each candidate with its provider, address, prices and limits resolved once.

Must not: read the environment or a file; `gateway` hands in settings, secrets and the compiled catalog.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from config.catalog import Catalog, PricedCandidate, PricedRoute
from config.price import CompiledPrice
from config.settings import Provider, Secrets, Settings
from metering.pricing import TokenUsage, cost, hold_cost, output_cost
from metering.token_counter import encoding_name
from providers.codec import Upstream
from proxy.http_request import Origin


@dataclass(frozen=True, slots=True)
class Candidate:
    """One provider and model that may answer a route. `cost` is what the house pays, where known."""

    upstream: Upstream
    origin: Origin
    model: str
    price: CompiledPrice
    cost: CompiledPrice | None
    encoding: str
    finish_on_disconnect: bool


@dataclass(frozen=True, slots=True)
class Route:
    """A public model name and its ordered candidates."""

    name: str
    candidates: tuple[Candidate, ...]
    max_output_tokens: int
    rename_model: bool
    hidden_reasoning: bool

    def hold_cost(self, prompt_tokens: int, output_tokens: int, *, audio: bool) -> int:
        """Micros that cover these tokens at the dearest candidate; `audio`: also where some are priced as audio."""
        if len(self.candidates) == 1:
            return hold_cost(self.candidates[0].price, prompt_tokens, output_tokens, audio=audio)
        return max(hold_cost(each.price, prompt_tokens, output_tokens, audio=audio) for each in self.candidates)

    def slice_cost(self, prompt_tokens: int, output_tokens: int, *, audio: bool) -> int:
        """Micros that cover so much further output beside this prompt at the dearest candidate."""
        if len(self.candidates) == 1:
            return output_cost(self.candidates[0].price, prompt_tokens, output_tokens, audio=audio)
        return max(output_cost(each.price, prompt_tokens, output_tokens, audio=audio) for each in self.candidates)

    def prompt_cost(self, prompt_tokens: int) -> int:
        """Micros of the prompt alone at the first candidate."""
        return cost(self.candidates[0].price, TokenUsage(prompt_tokens, 0, 0, 0, 0))


def build_routes(
    settings: Settings, secrets: Secrets, catalog: Catalog, base_urls: Mapping[str, str]
) -> dict[str, Route]:
    """All routes of the catalog. `base_urls` replaces addresses of providers that the supervisor started itself."""
    made: dict[str, tuple[Upstream, Origin]] = {}
    for name, provider in settings.providers.items():
        base_url = base_urls.get(name, provider.base_url)
        made[name] = _upstream(name, provider, base_url, secrets.provider_keys.get(name)), Origin.from_url(base_url)
    routes = {}
    for name, entry in catalog.routes.items():
        candidates = tuple(_candidate(settings, made, each) for each in entry.candidates)
        routes[name] = _route(name, candidates, entry)
    return routes


def _route(name: str, candidates: tuple[Candidate, ...], entry: PricedRoute) -> Route:
    return Route(name, candidates, entry.max_output_tokens, entry.rename_model, entry.hidden_reasoning)


def _upstream(name: str, provider: Provider, base_url: str, key: str | None) -> Upstream:
    return Upstream(
        name=name,
        kind=provider.kind,
        target=urlsplit(base_url).path.rstrip("/").encode(),
        key=key,
        include_usage=provider.include_usage,
        clean_eof=provider.clean_eof,
        limit_field=provider.limit_field,
    )


def _candidate(settings: Settings, made: Mapping[str, tuple[Upstream, Origin]], entry: PricedCandidate) -> Candidate:
    upstream, origin = made[entry.provider]
    return Candidate(
        upstream=upstream,
        origin=origin,
        model=entry.model,
        price=entry.price,
        cost=entry.cost,
        encoding=encoding_name(entry.model),
        finish_on_disconnect=settings.providers[entry.provider].on_disconnect == "finish",
    )
