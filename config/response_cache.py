"""`[routes.<model>.cache]`: whether a route keeps its answers for identical requests, for whom, and at which price.

Must not: read the environment, or know the other tables of the configuration file.
"""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Literal

import msgspec


class ResponseCache(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`mode`: `on` keeps and gives every answer that may be, `allow` only where the request's header asks for it.
    `bytes_max` is an answer's size before it is compressed; `price` the share of the first answer's charge that each
    later one costs; `wait_ms` how long a call waits for an identical one that is already under way."""

    mode: Literal["on", "allow"] = "on"
    ttl_s: int = 300
    bytes_max: int = 1024 * 1024
    scope: Literal["account", "shared"] = "account"
    price: str = "0"
    wait_ms: int = 30_000


TTL_S_MAX = 30 * 86_400
BYTES_MAX = 16 * 1024 * 1024


def share(text: str) -> Fraction:
    """The share that `price` names, 0 to 1. Raises ValueError."""
    try:
        value = Decimal(text)
    except InvalidOperation:
        value = Decimal("nan")
    if not value.is_finite() or not 0 <= value <= 1 or len(text) > 16:
        raise ValueError(f'price: "{text[:16]}" is not a decimal share of the charge from "0" to "1".')
    return Fraction(value)


def check(cache: ResponseCache) -> None:
    """Raises ValueError, which begins with the key at fault."""
    for name, least, most in (("ttl_s", 1, TTL_S_MAX), ("bytes_max", 1, BYTES_MAX), ("wait_ms", 0, 600_000)):
        value = getattr(cache, name)
        if not least <= value <= most:
            raise ValueError(f"{name}: {value} is not from {least} to {most}.")
    share(cache.price)
