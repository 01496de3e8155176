"""`[prices.…]` and `[costs.…]`: amounts as the configuration file writes them. `config.catalog` compiles them.

Must not: turn a missing amount into 0.
"""

from __future__ import annotations

from config.tables import Table


class TokenPrices(Table, frozen=True):
    """Credits per million tokens of each class, as decimal strings; `config.catalog` knows what a missing one is."""

    input: str
    output: str
    cached_input: str | None = None
    cache_write: str | None = None
    cache_write_1h: str | None = None
    reasoning: str | None = None
    audio_input: str | None = None
    audio_output: str | None = None
    image_output: str | None = None


class PriceTier(TokenPrices, frozen=True, kw_only=True):
    """Prices of every token of a request whose prompt has more than `above` tokens."""

    above: int


class Price(TokenPrices, frozen=True, kw_only=True):
    """Prices of tokens, and per unit `image`, `second`, `character`, `request`."""

    image: str | None = None
    second: str | None = None
    character: str | None = None
    request: str | None = None
    tiers: tuple[PriceTier, ...] = ()
