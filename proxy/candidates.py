"""Routes as the data plane uses them: each candidate with its provider, address, prices and limits resolved once.

Must not: read the environment or a file; `gateway` hands in settings, secrets and the compiled catalog.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import urlsplit

from config.catalog import Catalog, PricedCandidate, PricedRoute
from config.price import CompiledPrice
from config.settings import Provider, Secrets, Settings
from metering.pricing import HoldRates, TokenUsage, cost, hold_rates
from metering.token_counter import encoding_name
from providers.codec import Upstream, UpstreamRequest
from proxy.exchange import Deadlines, Exchange
from proxy.http_request import Origin


class Pool(Protocol):
    """A way of its own to one provider."""

    def open(self, out: UpstreamRequest, deadlines: Deadlines) -> Exchange: ...


@dataclass(frozen=True, slots=True)
class Candidate:
    """One provider and model that may answer a route. `cost` is what the house pays, where known; `pool` the way to a
    provider with HTTP/2 or a proxy, None for the worker's own transport."""

    upstream: Upstream
    origin: Origin
    model: str
    price: CompiledPrice
    cost: CompiledPrice | None
    encoding: str
    finish_on_disconnect: bool
    pool: Pool | None = None


@dataclass(frozen=True, slots=True)
class Route:
    """A public model name and its ordered candidates."""

    name: str
    candidates: tuple[Candidate, ...]
    max_output_tokens: int
    rename_model: bool
    hidden_reasoning: bool
    _flat: HoldRates | None = field(init=False, repr=False, compare=False)
    """The rates of every prompt, where no candidate has tiers."""

    def __post_init__(self) -> None:
        prices = [each.price for each in self.candidates]
        flat = None if any(price.tiers for price in prices) else hold_rates(prices, 0)
        object.__setattr__(self, "_flat", flat)

    def hold_rates(self, prompt_tokens: int, *, audio: bool) -> HoldRates:
        """Rates that cover any candidate beside this prompt; `audio`: also where some tokens are priced as audio."""
        if self._flat is not None and not audio:
            return self._flat
        return hold_rates((each.price for each in self.candidates), prompt_tokens, audio=audio)

    def prompt_cost(self, prompt_tokens: int) -> int:
        """Micros of the prompt alone at the first candidate."""
        return cost(self.candidates[0].price, TokenUsage(prompt_tokens, 0, 0, 0, 0))


def build_routes(
    settings: Settings,
    secrets: Secrets,
    catalog: Catalog,
    base_urls: Mapping[str, str],
    pools: Mapping[str, Pool] | None = None,
) -> dict[str, Route]:
    """All routes of the catalog. `base_urls` replaces addresses of providers that the supervisor started itself;
    `pools` are the providers' own ways."""
    made: dict[str, tuple[Upstream, Origin]] = {}
    for name, provider in settings.providers.items():
        base_url = base_urls.get(name, provider.base_url)
        made[name] = _upstream(name, provider, base_url, secrets.provider_keys.get(name)), Origin.from_url(base_url)
    routes = {}
    for name, entry in catalog.routes.items():
        candidates = tuple(_candidate(settings, made, each, pools or {}) for each in entry.candidates)
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


def _candidate(
    settings: Settings,
    made: Mapping[str, tuple[Upstream, Origin]],
    entry: PricedCandidate,
    pools: Mapping[str, Pool],
) -> Candidate:
    upstream, origin = made[entry.provider]
    return Candidate(
        upstream=upstream,
        origin=origin,
        model=entry.model,
        price=entry.price,
        cost=entry.cost,
        encoding=encoding_name(entry.model),
        finish_on_disconnect=settings.providers[entry.provider].on_disconnect == "finish",
        pool=pools.get(entry.provider),
    )
