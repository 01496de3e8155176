"""What a price is once compiled: integers only, so that no money ever passes through a float.

Token rates are micros per million tokens (1 credit per million = 1,000,000 here); per-unit prices are micros.
Must not: import anything but msgspec (the pure core of metering reads these types), or compute a cost.
"""

from __future__ import annotations

import msgspec


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """Micros per million tokens of each class."""

    input: int
    cached_input: int
    cache_write: int
    cache_write_1h: int
    output: int
    reasoning: int
    audio_input: int
    audio_output: int
    image_output: int


class TierRates(Rates, frozen=True, kw_only=True):
    """The rates of every token of a request whose prompt has more than `above` tokens."""

    above: int


class CompiledPrice(Rates, frozen=True, kw_only=True):
    """A model's price: its rates, the tiers of long prompts in rising order, and micros per unit."""

    tiers: tuple[TierRates, ...] = ()
    image: int = 0
    second: int = 0
    character: int = 0
    request: int = 0
