"""`[prices.…]` and `[costs.…]`: amounts as the configuration file writes them. `config.catalog` compiles them.

Must not: turn a missing amount into 0.
"""

from __future__ import annotations

from config.tables import Table


class PriceTier(Table, frozen=True):
    """Prices of every token of a request whose prompt has more than `above` tokens; defaults as in `Price`."""

    above: int
    input: str
    output: str
    cached_input: str | None = None
    cache_write: str | None = None
    cache_write_1h: str | None = None
    reasoning: str | None = None
    audio_input: str | None = None
    audio_output: str | None = None
    image_output: str | None = None


class Price(Table, frozen=True):
    """Credits per million tokens as decimal strings; `image`, `second`, `character`, `request` are per unit."""

    input: str
    output: str
    cached_input: str | None = None
    cache_write: str | None = None
    cache_write_1h: str | None = None
    reasoning: str | None = None
    audio_input: str | None = None
    audio_output: str | None = None
    image_output: str | None = None
    image: str | None = None
    second: str | None = None
    character: str | None = None
    request: str | None = None
    tiers: tuple[PriceTier, ...] = ()
