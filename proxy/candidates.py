"""Routes as the data plane uses them: each candidate with its provider, address, prices and limits resolved once.

Must not: read the environment or a file; `gateway` hands in settings, secrets and the compiled catalog.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import urlsplit

from config import kinds
from config.catalog import Catalog, PricedCandidate, PricedRoute
from config.price import CompiledPrice
from config.providers import Provider
from config.settings import Secrets, Settings
from metering.pricing import HoldRates, TokenUsage, cost, hold_rates
from metering.token_counter import encoding_name
from providers.codec import Upstream, UpstreamRequest
from providers.registry import Wire, wire
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
    wire: Wire
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


_Made = tuple[Upstream, Wire, Origin]


def build_routes(
    settings: Settings,
    secrets: Secrets,
    catalog: Catalog,
    base_urls: Mapping[str, str],
    pools: Mapping[str, Pool] | None = None,
) -> dict[str, Route]:
    """All routes of the catalog. `base_urls` replaces addresses of providers that the supervisor started itself;
    `pools` are the providers' own ways."""
    made: dict[str, _Made] = {}
    for name in {each.provider for entry in catalog.routes.values() for each in entry.candidates}:
        provider = settings.providers[name]
        base_url = base_urls.get(name, provider.base_url)
        origin = Origin.from_url(base_url)
        upstream = _upstream(name, provider, base_url, origin, secrets.provider_keys.get(name))
        made[name] = upstream, wire(kinds.speaks(provider.kind)), origin
    routes = {}
    for name, entry in catalog.routes.items():
        candidates = tuple(_candidate(settings, made, each, pools or {}) for each in entry.candidates)
        routes[name] = _route(name, candidates, entry)
    return routes


def _route(name: str, candidates: tuple[Candidate, ...], entry: PricedRoute) -> Route:
    return Route(name, candidates, entry.max_output_tokens, entry.rename_model, entry.hidden_reasoning)


def _upstream(name: str, provider: Provider, base_url: str, origin: Origin, key: str | None) -> Upstream:
    options = dict(provider.options)
    if kinds.speaks(provider.kind) == "bedrock":
        options["host"] = origin.authority.decode()  # it is signed
    return Upstream(
        name=name,
        kind=provider.kind,
        target=urlsplit(base_url).path.rstrip("/").encode(),
        key=key,
        include_usage=bool(provider.include_usage),
        clean_eof=bool(provider.clean_eof),
        limit_field=provider.limit_field,
        drop=frozenset(provider.drop_unsupported or ()),
        options=options,
        key_style=kinds.key_style(provider),
    )


def _candidate(
    settings: Settings,
    made: Mapping[str, _Made],
    entry: PricedCandidate,
    pools: Mapping[str, Pool],
) -> Candidate:
    upstream, spoken, origin = made[entry.provider]
    return Candidate(
        upstream=upstream,
        wire=spoken,
        origin=origin,
        model=entry.model,
        price=entry.price,
        cost=entry.cost,
        encoding=encoding_name(entry.model),
        finish_on_disconnect=settings.providers[entry.provider].on_disconnect == "finish",
        pool=pools.get(entry.provider),
    )
