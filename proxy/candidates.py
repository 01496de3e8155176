"""Routes as the data plane uses them: each candidate with its provider, address, prices and limits resolved once.

Must not: read the environment or a file; `gateway` hands in settings, secrets and the compiled catalog.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol
from urllib.parse import urlsplit

import msgspec

from config import kinds
from config.catalog import Catalog, PricedCandidate, PricedRoute
from config.price import CompiledPrice
from config.providers import Provider
from config.routing import Hedge
from config.routing import Route as RouteTable
from config.settings import Bounds, Secrets, Settings
from metering.pricing import HoldRates, TokenUsage, cost, hold_rates
from metering.token_counter import encoding_name
from providers.breaker import Breaker, BreakerPolicy
from providers.codec import Upstream, UpstreamRequest
from providers.latency import PeakEwma, RecentQuantiles
from providers.registry import Wire, wire
from providers.retry import RetryPolicy
from providers.routing import Live, Strategy, Target
from providers.seam import Style
from proxy.exchange import Deadlines, Exchange
from proxy.http_request import Origin
from proxy.lives import LATENCY_HALF_LIFE_S, Lives
from proxy.places import Places


class Pool(Protocol):
    """A way of its own to one provider."""

    def open(self, out: UpstreamRequest, deadlines: Deadlines) -> Exchange: ...


def _alone() -> Live:
    """The live state of a candidate that nobody else knows."""
    return Live(Breaker(BreakerPolicy(), random.random), PeakEwma(LATENCY_HALF_LIFE_S), PeakEwma(LATENCY_HALF_LIFE_S))


def _nameless() -> Target:
    return Target("", "")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One provider and model that may answer a route. `cost` is what the house pays, where known; `pool` the way to a
    provider with HTTP/2 or a proxy, None for the worker's own transport. `target` is how routing sees it, `live` what
    is known of it now, `places` the bounds of its provider, `siblings` all that share its key."""

    upstream: Upstream
    wire: Wire
    origin: Origin
    model: str
    price: CompiledPrice
    cost: CompiledPrice | None
    encoding: str
    finish_on_disconnect: bool
    pool: Pool | None = None
    continuation: Style = "instruction"
    target: Target = field(default_factory=_nameless)
    live: Live = field(default_factory=_alone, compare=False)
    places: Places | None = field(default=None, compare=False)
    siblings: tuple[tuple[str, Live], ...] = field(default=(), compare=False)

    def prompt_cost(self, prompt_tokens: int) -> int:
        """Micros of the prompt alone."""
        return cost(self.price, TokenUsage(prompt_tokens, 0, 0, 0, 0))


@dataclass(frozen=True, slots=True)
class Route:
    """A public model name and its ordered candidates."""

    name: str
    candidates: tuple[Candidate, ...]
    max_output_tokens: int
    rename_model: bool
    hidden_reasoning: bool
    strategy: Strategy = "ordered"
    policy: RetryPolicy = field(default_factory=RetryPolicy)
    whole_policy: RetryPolicy = field(default_factory=RetryPolicy)
    hedge: Hedge | None = None
    plain: bool = field(init=False, repr=False, compare=False)
    """Whether its candidates are tried in the order they stand, as far as nothing is wrong with them."""
    timed: bool = field(init=False, repr=False, compare=False)
    """Whether somebody asks how long its candidates take."""
    context_least: float = field(init=False, repr=False, compare=False)
    """Every candidate takes a prompt of so many tokens."""
    _flat: HoldRates | None = field(init=False, repr=False, compare=False)
    """The rates of every prompt, where no candidate has tiers."""

    def __post_init__(self) -> None:
        prices = [each.price for each in self.candidates]
        flat = None if any(price.tiers for price in prices) else hold_rates(prices, 0)
        targets = [each.target for each in self.candidates]
        known = [each.context_tokens for each in targets if each.context_tokens is not None]
        picky = any(each.features is not None for each in targets)
        for name, value in (
            ("_flat", flat),
            ("plain", self.strategy == "ordered" and not picky),
            ("timed", self.strategy == "least_latency" or self.hedge is not None),
            ("context_least", min(known, default=float("inf"))),
        ):
            object.__setattr__(self, name, value)

    def hold_rates(
        self, prompt_tokens: int, plan: tuple[Candidate, ...], *, audio: bool = False, cache_1h: bool = False
    ) -> HoldRates:
        """Rates that cover any candidate of `plan` beside this prompt; `audio`: also where some tokens are priced as
        audio; `cache_1h`: also where the prompt is written to a cache for an hour."""
        if self._flat is not None and not (audio or cache_1h) and len(plan) == len(self.candidates):
            return self._flat
        return hold_rates((each.price for each in plan), prompt_tokens, audio=audio, cache_1h=cache_1h)


Siblings = tuple[tuple[str, Live], ...]


class _Made(NamedTuple):
    """A provider, once for all its candidates."""

    upstream: Upstream
    wire: Wire
    origin: Origin
    places: Places | None
    tags: frozenset[str]
    sticky: bool


def build_routes(
    settings: Settings,
    secrets: Secrets,
    catalog: Catalog,
    base_urls: Mapping[str, str],
    ways: tuple[Mapping[str, Pool], Lives] | None = None,
) -> dict[str, Route]:
    """All routes of the catalog. `base_urls` replaces addresses of providers that the supervisor started itself;
    `ways` are the providers' own pools, and what is known of the candidates."""
    pools, lives = ways or ({}, Lives(settings.breaker))
    made: dict[str, _Made] = {}
    for name in {each.provider for entry in catalog.routes.values() for each in entry.candidates}:
        provider = settings.providers[name]
        base_url = base_urls.get(name, provider.base_url)
        origin = Origin.from_url(base_url)
        upstream = _upstream(name, provider, base_url, origin, secrets.provider_keys.get(name))
        made[name] = _Made(
            upstream,
            wire(kinds.speaks(provider.kind)),
            origin,
            lives.provider(name, provider),
            frozenset(provider.tags),
            provider.sticky,
        )
    for entry in catalog.routes.values():
        for each in entry.candidates:
            lives.of(each.provider, each.model)
    siblings = {name: lives.named(name) for name in made}
    routes = {}
    for name, entry in catalog.routes.items():
        candidates = tuple(
            _candidate(settings, made[each.provider], each, (pools, lives, siblings)) for each in entry.candidates
        )
        table = settings.routes.get(name)
        routes[name] = _route(name, candidates, entry, (table, settings.bounds))
    return routes


def _route(
    name: str, candidates: tuple[Candidate, ...], entry: PricedRoute, table: tuple[RouteTable | None, Bounds]
) -> Route:
    configured, bounds = table
    policy, hedge = RetryPolicy(), None
    strategy: Strategy = "ordered"
    if configured is not None:
        policy, hedge, strategy = retry_policy(configured, bounds), configured.hedge, configured.strategy
    longest_s = bounds.headers_nonstream_ms / 1000
    given = configured is not None and configured.retry.deadline_ms is not None
    whole_policy = policy if given else msgspec.structs.replace(policy, deadline_s=longest_s)
    route = Route(
        name,
        candidates,
        entry.max_output_tokens,
        entry.rename_model,
        entry.hidden_reasoning,
        strategy,
        policy,
        whole_policy,
        hedge,
    )
    if route.hedge is not None:
        for candidate in candidates:
            candidate.live.recent = candidate.live.recent or RecentQuantiles()
    return route


def retry_policy(route: RouteTable, bounds: Bounds) -> RetryPolicy:
    """A route's bounds of trying again, in seconds."""
    retry = route.retry
    longest_ms = bounds.first_content_hidden_ms if route.hidden_reasoning else bounds.first_content_ms
    return RetryPolicy(
        retries=retry.retries,
        attempts_max=retry.attempts_max,
        deadline_s=(retry.deadline_ms or longest_ms) / 1000,
        backoff_s=retry.backoff_ms / 1000,
        backoff_s_max=retry.backoff_ms_max / 1000,
        retry_after_s_max=retry.retry_after_ms_max / 1000,
        falls_back_on=frozenset(route.fall_back_on),
        continuation=route.continuation,
    )


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
        refused=frozenset(provider.refuse or ()),
        caseless=kinds.caseless(provider.kind),
        options=options,
        key_style=kinds.key_style(provider),
    )


def _candidate(
    settings: Settings,
    made: _Made,
    entry: PricedCandidate,
    ways: tuple[Mapping[str, Pool], Lives, Mapping[str, Siblings]],
) -> Candidate:
    pools, lives, siblings = ways
    features = None if entry.features is None else frozenset(entry.features)
    return Candidate(
        upstream=made.upstream,
        wire=made.wire,
        origin=made.origin,
        model=entry.model,
        price=entry.price,
        cost=entry.cost,
        encoding=encoding_name(entry.model),
        finish_on_disconnect=settings.providers[entry.provider].on_disconnect == "finish",
        pool=pools.get(entry.provider),
        continuation=settings.providers[entry.provider].continuation or "instruction",
        target=Target(
            entry.provider,
            entry.model,
            entry.weight,
            context_tokens=entry.context_tokens,
            features=features,
            tags=made.tags,
            sticky=made.sticky,
        ),
        live=lives.of(entry.provider, entry.model),
        places=made.places,
        siblings=siblings[entry.provider],
    )
