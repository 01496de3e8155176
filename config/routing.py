"""`[routes.<model>]` and `[breaker]`: who may answer a model, in which order, and what happens when one fails.

Must not: know a provider's table, or compile a price.
"""

from __future__ import annotations

import math
from typing import Literal

from config import response_cache
from config.response_cache import ResponseCache
from config.tables import Table, at_least

Strategy = Literal["ordered", "weighted", "least_latency", "cheapest", "least_busy"]
Feature = Literal["image", "audio", "file", "video", "tools", "json_schema"]
FallBackOn = Literal["context_length", "content_policy"]
CANDIDATES_MAX = 64
MODEL_CHARS_MAX = 512
WEIGHT_MAX = 1_000_000


class Candidate(Table, frozen=True):
    """One provider and model that may answer. `context_tokens` (from genai-prices where that knows it) and `features`
    say what it takes; unknown ones let everything through."""

    provider: str
    model: str
    weight: float = 1.0
    context_tokens: int | None = None
    features: tuple[Feature, ...] | None = None


class Retry(Table, frozen=True):
    """`retries` of one candidate, `attempts_max` over all of them. Without content after `deadline_ms` no further
    attempt begins (None: as long as one attempt may take to its first content)."""

    retries: int = 1
    attempts_max: int = 6
    deadline_ms: int | None = None
    backoff_ms: int = 250
    backoff_ms_max: int = 4_000
    retry_after_ms_max: int = 2_000


class Hedge(Table, frozen=True):
    """A second attempt, at the next candidate, starts when the first has shown no content for longer than `percentile`
    of the candidate's recent first contents took, and at least `delay_ms_min`. Not before `samples_min` are known."""

    percentile: int = 95
    delay_ms_min: int = 50
    samples_min: int = 20


class Route(Table, frozen=True):
    """A public model name."""

    candidates: tuple[Candidate, ...]
    strategy: Strategy = "ordered"
    rename_model: bool = False
    hidden_reasoning: bool = False
    max_output_tokens: int | None = None
    cache: ResponseCache | None = None
    retry: Retry = Retry()
    fall_back_on: tuple[FallBackOn, ...] = ()
    continuation: bool = False
    hedge: Hedge | None = None


class Breaker(Table, frozen=True):
    """When a candidate is left alone, and for how long. See `providers.breaker`."""

    consecutive_max: int = 5
    error_percent: int = 50
    calls_min: int = 20
    window_ms: int = 30_000
    open_ms: int = 5_000
    open_ms_max: int = 300_000
    forget_ms: int = 600_000
    key_refused_ms: int = 60_000
    retry_after_ms_max: int = 300_000
    model_missing_ms: int = 60_000
    share_every_ms: int = 1_000


def check_route(route: Route) -> None:
    """Raises ValueError, which begins with the key at fault."""
    if not route.candidates:
        raise ValueError("candidates: name at least one { provider, model }.")
    if len(route.candidates) > CANDIDATES_MAX:
        raise ValueError(f"candidates: more than {CANDIDATES_MAX}.")
    places: dict[tuple[str, str], int] = {}
    for place, candidate in enumerate(route.candidates):
        _check_model(place, candidate.model)
        before = places.setdefault((candidate.provider, candidate.model), place)
        if before != place:
            raise ValueError(
                f"candidates[{place}]: '{candidate.model}' at '{candidate.provider}' is candidates[{before}] already. "
                "Remove one: weight gives a larger share, retry.retries further tries."
            )
        if not (math.isfinite(candidate.weight) and 0 <= candidate.weight <= WEIGHT_MAX):
            raise ValueError(f"candidates[{place}].weight: {candidate.weight} is not from 0 to {WEIGHT_MAX}.")
        _in(f"candidates[{place}]", candidate, ("context_tokens",), 1)
    _in("retry", route.retry, ("retries", "backoff_ms", "backoff_ms_max", "retry_after_ms_max"), 0)
    _in("retry", route.retry, ("attempts_max", "deadline_ms"), 1)
    if route.hedge is not None:
        _in("hedge", route.hedge, ("percentile", "delay_ms_min", "samples_min"), 1)
        if route.hedge.percentile > 100:
            raise ValueError(f"hedge.percentile: {route.hedge.percentile} is above 100.")
        if len(route.candidates) < 2:
            raise ValueError("hedge: there is no second candidate to try.")
    if route.cache is not None:
        try:
            response_cache.check(route.cache)
        except ValueError as error:
            raise ValueError(f"cache.{error}") from None


def _check_model(place: int, model: str) -> None:
    if not model or len(model) > MODEL_CHARS_MAX or not model.isprintable() or model != model.strip():
        raise ValueError(
            f"candidates[{place}].model: not 1-{MODEL_CHARS_MAX} printable characters without blanks around them."
        )


def check_breaker(breaker: Breaker) -> None:
    """Raises ValueError, which begins with the key at fault."""
    at_least(
        breaker, ("model_missing_ms", "key_refused_ms", "retry_after_ms_max", "open_ms", "open_ms_max", "forget_ms"), 0
    )
    at_least(breaker, ("consecutive_max", "error_percent", "calls_min"), 1)
    at_least(breaker, ("window_ms", "share_every_ms"), 100)
    if breaker.error_percent > 100:
        raise ValueError(f"error_percent: {breaker.error_percent} is above 100.")


def _in(key: str, table: Table, names: tuple[str, ...], least: int) -> None:
    try:
        at_least(table, names, least)
    except ValueError as error:
        raise ValueError(f"{key}.{error}") from None
