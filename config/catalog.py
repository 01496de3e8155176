"""The price catalog: every route's candidates with their prices, compiled once to integers and handed to the workers.

The supervisor compiles it (only there is genai-prices imported, and only when a price is looked up) and writes it as
JSON; workers read that file. Its version is the hash of its content, so a session's price can be shown years later.
Must not: be changed after it was compiled, match a model across providers, or turn a missing price into 0.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from config.price import CompiledPrice, Rates, TierRates
from config.prices import Price, PriceTier
from config.routing import Candidate, Feature, Route
from config.settings import ConfigError, Settings

if TYPE_CHECKING:
    from genai_prices.types import ModelInfo, ModelPrice, TieredPrices

_DECIMAL = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,12})?")
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_MICROS: Final = 1_000_000
_TOKEN_CLASSES: Final = (
    ("input", "input_mtok"),
    ("cached_input", "cache_read_mtok"),
    ("cache_write", "cache_write_mtok"),
    ("cache_write_1h", "cache_write_1h_mtok"),
    ("output", "output_mtok"),
    ("reasoning", "output_reasoning_mtok"),
    ("audio_input", "input_audio_mtok"),
    ("audio_output", "output_audio_mtok"),
    ("image_output", "output_image_mtok"),
)
"""Our token classes and the names that genai-prices gives them (USD per million tokens there)."""

_UNITS: Final = ("image", "second", "character", "request")
_PARENT: Final = {
    "cached_input": "input",
    "cache_write": "input",
    "audio_input": "input",
    "reasoning": "output",
    "audio_output": "output",
    "image_output": "output",
}
"""Whose price a class takes when it has none (contract 2). `cache_write_1h` is reckoned: see `_hour`."""
_HOUR_BY_WRITE, _HOUR_BY_INPUT = Decimal("1.6"), Decimal(2)
"""What Anthropic asks for writes that last an hour: twice the input's price, where five minutes cost 1.25 times it."""


class PricedCandidate(msgspec.Struct, frozen=True, kw_only=True):
    """One upstream of a route. `price` is what the user pays, `cost` what the house pays (None: unknown); `source`
    says where the price came from: a configuration key, or `genai-prices:<provider>`. `context_tokens` is the largest
    prompt it takes, as configured or else as genai-prices lists it (None: unknown); `weight` and `features` are as
    configured."""

    provider: str
    model: str
    price: CompiledPrice
    cost: CompiledPrice | None
    source: str
    weight: float = 1.0
    context_tokens: int | None = None
    features: tuple[Feature, ...] | None = None


class PricedRoute(msgspec.Struct, frozen=True, kw_only=True):
    """A route as the data plane uses it; every candidate has a price."""

    candidates: tuple[PricedCandidate, ...]
    max_output_tokens: int
    rename_model: bool
    hidden_reasoning: bool


class Catalog(msgspec.Struct, frozen=True, kw_only=True):
    """All routes by name. `version` is the first 16 hexadecimal digits of the SHA-256 of the routes' JSON."""

    version: str
    routes: dict[str, PricedRoute]


def compile_catalog(
    settings: Settings, *, extra_routes: Mapping[str, Route] | None = None, at: datetime | None = None
) -> Catalog:
    """Price every configured route. `extra_routes` are offered beside them (a provider's own model list): one without
    a price is left out, and a configured route of that name wins. `at` picks dated prices (default: now).

    Raises ConfigError, naming the key and the fix, for a bad or misplaced price and for a configured route without one.
    """
    compiler = _Compiler(settings, at or datetime.now(UTC))
    extra = {name: route for name, route in (extra_routes or {}).items() if name not in settings.routes}
    _check_keys(settings, extra)
    routes = {name: compiler.route(name, route) for name, route in settings.routes.items()}
    for name, route in extra.items():
        if all(compiler.price(name, candidate) for candidate in route.candidates):
            routes[name] = compiler.route(name, route)
    ordered = dict(sorted(routes.items()))
    return Catalog(version=_version(ordered), routes=ordered)


def priced_models(settings: Settings, provider: str, models: Iterable[str], *, at: datetime | None = None) -> list[str]:
    """Those of a provider's models that have a user price, in the order given. Raises ConfigError for a bad price."""
    compiler = _Compiler(settings, at or datetime.now(UTC))
    return [model for model in models if compiler.price(model, Candidate(provider=provider, model=model))]


def write(catalog: Catalog, path: Path) -> None:
    """Write the catalog as JSON, whole or not at all."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}.new")
    fresh.write_bytes(msgspec.json.encode(catalog))
    fresh.replace(path)


def read(path: Path) -> Catalog:
    """Read what `write` wrote. Raises ConfigError when the file is missing, damaged, or not of its own version."""
    try:
        catalog = msgspec.json.decode(path.read_bytes(), type=Catalog)
    except OSError as error:
        raise ConfigError(f"{path}: the price catalog cannot be read: {error.strerror}. Restart the gateway.") from None
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path}: not a price catalog: {error}. Restart the gateway.") from None
    if catalog.version != _version(catalog.routes):
        raise ConfigError(f"{path}: the price catalog was altered after it was compiled. Restart the gateway.")
    return catalog


def _version(routes: dict[str, PricedRoute]) -> str:
    return hashlib.sha256(msgspec.json.encode(routes, order="deterministic")).hexdigest()[:16]


def _check_keys(settings: Settings, extra: Mapping[str, Route]) -> None:
    for table, prices in (("prices", settings.prices), ("costs", settings.costs)):
        for key, price in prices.items():
            provider, slash, _ = key.partition("/")
            if key not in settings.routes and key not in extra and not (slash and provider in settings.providers):
                raise ConfigError(
                    f'{table}."{key}": neither a route nor "<provider>/<model>" of a configured provider. '
                    "Correct the name, or add the route or the provider."
                )
            _from_settings(price, _shown(table, key))


class _Compiler:
    """Looks prices up in the order of contract 2."""

    def __init__(self, settings: Settings, at: datetime) -> None:
        self._settings = settings
        self._at = at
        self._per_usd = _factor(settings.billing.credits_per_usd, "billing.credits_per_usd")
        self._markup = _factor(settings.billing.markup, "billing.markup")

    def route(self, name: str, route: Route) -> PricedRoute:
        most = route.max_output_tokens
        if most is not None and most < 1:
            raise ConfigError(f"routes.{name}.max_output_tokens: {most} is below 1.")
        return PricedRoute(
            candidates=tuple(self._candidate(name, candidate) for candidate in route.candidates),
            max_output_tokens=most or self._settings.bounds.max_output_tokens_default,
            rename_model=route.rename_model,
            hidden_reasoning=route.hidden_reasoning,
        )

    def price(self, route: str, candidate: Candidate) -> tuple[CompiledPrice, str] | None:
        """The user's price and its source, or None when there is none."""
        configured = _configured(self._settings.prices, "prices", route, candidate)
        if configured is not None:
            return configured
        listed = self._listed(candidate, self._per_usd * self._markup)
        return (listed, f"genai-prices:{self._price_provider(candidate)}") if listed else None

    def _candidate(self, route: str, candidate: Candidate) -> PricedCandidate:
        found = self.price(route, candidate)
        if found is None:
            raise ConfigError(
                f"routes.{route}: '{candidate.model}' of provider '{candidate.provider}' has no price, "
                f"and {self._unlisted(candidate)}. "
                f'Add [prices."{candidate.provider}/{candidate.model}"] or [prices."{route}"] with input and output.'
            )
        cost = _configured(self._settings.costs, "costs", route, candidate)
        return PricedCandidate(
            provider=candidate.provider,
            model=candidate.model,
            price=found[0],
            cost=cost[0] if cost else self._listed(candidate, self._per_usd),
            source=found[1],
            weight=candidate.weight,
            context_tokens=candidate.context_tokens or self._context(candidate),
            features=candidate.features,
        )

    def _price_provider(self, candidate: Candidate) -> str | None:
        """Whose list has its price: None for servers of one's own."""
        return self._settings.providers[candidate.provider].price_provider

    def _unlisted(self, candidate: Candidate) -> str:
        name = self._price_provider(candidate)
        kind = self._settings.providers[candidate.provider].kind
        return f"genai-prices has none for '{name}'" if name else f"there is no list of prices for the kind '{kind}'"

    def _context(self, candidate: Candidate) -> int | None:
        """The context window that genai-prices lists."""
        model = self._model(candidate)
        return model.context_window if model and (model.context_window or 0) > 0 else None

    def _model(self, candidate: Candidate) -> ModelInfo | None:
        """The model in genai-prices, or None when it does not know it."""
        name = self._price_provider(candidate)
        if name is None:
            return None
        from genai_prices import data_snapshot

        provider = next((one for one in data_snapshot.get_snapshot().providers if one.id == name), None)
        if provider is None:
            raise ConfigError(
                f"providers.{candidate.provider}.price_provider: genai-prices has no provider '{name}'. "
                "Correct the name, or remove the key."
            )
        return provider.find_model(candidate.model)  # without all_providers: never another provider's price

    def _listed(self, candidate: Candidate, factor: Fraction) -> CompiledPrice | None:
        """The price in genai-prices, times `factor`; None without both an input and an output price."""
        model = self._model(candidate)
        if model is None:
            return None
        # Some prices change with the hour; one catalog serves all hours, so the dearest one counts.
        hours = (self._at.replace(hour=hour) for hour in range(24)) if isinstance(model.prices, list) else (self._at,)
        options = [_from_genai(model.get_prices(hour), factor) for hour in hours]
        return max(
            (option for option in options if option), key=lambda option: (option.output, option.input), default=None
        )


def _configured(
    table: Mapping[str, Price], name: str, route: str, candidate: Candidate
) -> tuple[CompiledPrice, str] | None:
    for key in (f"{candidate.provider}/{candidate.model}", route):
        if key in table:
            return _from_settings(table[key], _shown(name, key))
    return None


def _shown(table: str, key: str) -> str:
    """A key as TOML writes it."""
    return f"{table}.{key}" if _BARE.fullmatch(key) else f'{table}."{key}"'


def _from_settings(price: Price, key: str) -> tuple[CompiledPrice, str]:
    units = {name: _unit(getattr(price, name), f"{key}.{name}") for name in _UNITS}
    tiers: list[TierRates] = []
    for number, tier in enumerate(price.tiers):
        if tier.above <= (tiers[-1].above if tiers else 0):
            raise ConfigError(f"{key}.tiers[{number}].above: {tier.above} must rise from tier to tier, above 0.")
        rates = _rates(_amounts(tier, f"{key}.tiers[{number}]"), Fraction(1))
        tiers.append(TierRates(above=tier.above, **msgspec.structs.asdict(rates)))
    rates = _rates(_amounts(price, key), Fraction(1))
    return CompiledPrice(**msgspec.structs.asdict(rates), tiers=tuple(tiers), **units), key


def _amounts(price: Price | PriceTier, key: str) -> dict[str, Decimal]:
    values = ((name, getattr(price, name)) for name, _ in _TOKEN_CLASSES)
    return {name: _decimal(value, f"{key}.{name}") for name, value in values if value is not None}


def _unit(value: str | None, key: str) -> int:
    return 0 if value is None else math.ceil(Fraction(_decimal(value, key)) * _MICROS)


def _decimal(value: str, key: str) -> Decimal:
    if not _DECIMAL.fullmatch(value):
        raise ConfigError(
            f'{key}: "{value}" is not an amount. Write a decimal string such as "0.15": 0 or more, '
            "at most 9 digits before the point and 12 after it."
        )
    return Decimal(value)


def _factor(value: str, key: str) -> Fraction:
    factor = Fraction(_decimal(value, key))
    if factor <= 0:
        raise ConfigError(f"{key}: must be above 0.")
    return factor


def _rates(amounts: Mapping[str, Decimal], factor: Fraction) -> Rates:
    """Credits per million (times `factor`) to micros per million, rounded up. `input` and `output` must be there."""
    defaults = {name: amounts[parent] for name, parent in _PARENT.items()}
    filled = {**defaults, "cache_write_1h": _hour(amounts), **amounts}
    return Rates(**{name: math.ceil(Fraction(amount) * factor * _MICROS) for name, amount in filled.items()})


def _hour(amounts: Mapping[str, Decimal]) -> Decimal:
    """The price of a cache write that lasts an hour, where none is given: never below what Anthropic would ask."""
    written = amounts.get("cache_write")
    return amounts["input"] * _HOUR_BY_INPUT if written is None else written * _HOUR_BY_WRITE


def _from_genai(price: ModelPrice, factor: Fraction) -> CompiledPrice | None:
    """Compile a listed price. Zeros are left out: 0 is a price only when configured."""
    listed: dict[str, Decimal | TieredPrices] = {}
    for name, key in _TOKEN_CLASSES:
        value = getattr(price, key)
        if value is not None and _at(value, 0) > 0:
            listed[name] = value
    if "input" not in listed or "output" not in listed:
        return None
    starts = sorted({tier.start for value in listed.values() for tier in getattr(value, "tiers", ())})

    def rates(prompt_tokens: int) -> dict[str, int]:
        amounts = {name: _at(value, prompt_tokens) for name, value in listed.items()}
        return msgspec.structs.asdict(_rates(amounts, factor))

    request = price.requests_kcount
    fee = math.ceil(Fraction(_at(request, 0)) * factor * _MICROS / 1000) if request is not None else 0
    tiers = tuple(TierRates(above=start, **rates(start + 1)) for start in starts)
    return CompiledPrice(**rates(0), tiers=tiers, request=fee)


def _at(value: Decimal | TieredPrices, prompt_tokens: int) -> Decimal:
    """The amount in force for a prompt of this size (genai-prices: strictly above a tier's start)."""
    if isinstance(value, Decimal):
        return value
    amount = value.base
    for tier in value.tiers:
        if prompt_tokens > tier.start:
            amount = tier.price
    return amount
