"""The candidates of a call, best first: by the route's strategy, the account, the request and the moment.

Must not: hold credit, take places or permits. Where nobody is left, the error says why, and when to come again.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from metering.pricing import TokenUsage, cost
from metering.prompt import PromptEstimate
from providers.breaker import State
from providers.routing import Facts, Needs, Preferences, Removal, order, removals, verdict
from proxy.candidates import Candidate, Route
from proxy.errors import (
    CallError,
    ContextLengthExceeded,
    ProviderBusy,
    ProviderNotAllowed,
    ProviderUnavailable,
    UnsupportedParameter,
)
from proxy.request import ChatRequest

ASKED_TOKENS = 512
"""Output that a call without a limit is reckoned with where candidates are compared by price."""
UNSURE_PERCENT = 75
"""How much of an estimated prompt is certain, where a window is compared with it: a wrong no would be final."""
MOVING = frozenset(("least_latency", "least_busy"))
"""Strategies whose order changes with every attempt that is sent."""
PARTS = {"image_url": "image", "input_audio": "audio", "file": "file", "video_url": "video"}
"""OpenAI's content parts and the feature that each needs."""


def plan(
    route: Route,
    request: ChatRequest,
    prompt: PromptEstimate,
    preferences: Preferences | None,
    now: float,
    draw: Callable[[], float] = random.random,
) -> tuple[Candidate, ...]:
    """The candidates to try, best first. `now` is monotonic seconds. Raises CallError where none is left."""
    candidates = route.candidates
    if route.plain and preferences is None and prompt.tokens <= route.context_least:
        for candidate in candidates:
            live = candidate.live
            if live.breaker.state is not State.CLOSED or now < live.missing_until or live.bulkhead is not None:
                break
        else:
            return candidates
    facts = _facts(route, request, prompt, preferences, now)
    facts.draw = draw()
    targets = [each.target for each in candidates]
    places = order(targets, route.strategy, facts)
    if not places:
        told = verdict(removals(targets, facts))
        raise _refusal(told) if told is not None else ProviderUnavailable()
    return tuple(candidates[place] for place in places)


def latest(
    asked: tuple[Candidate, ...],
    route: Route,
    request: ChatRequest,
    prompt: PromptEstimate,
    preferences: Preferences | None,
    now: float,
) -> tuple[Candidate, ...]:
    """The plan `asked` in the order of this moment, for strategies of MOVING: while credit was held others have been
    sent, and calls that came together would all go where the first one went. Only of candidates that the hold covers;
    all of `asked` where none of them is left."""
    try:
        anew = plan(route, request, prompt, preferences, now)
    except CallError:
        return asked  # the walk through it says why
    return tuple(each for each in anew if each in asked) or asked


def _facts(
    route: Route, request: ChatRequest, prompt: PromptEstimate, preferences: Preferences | None, now: float
) -> Facts:
    certain = prompt.tokens if prompt.kind == "counted" else prompt.tokens * UNSURE_PERCENT // 100
    asked = (request.limit or ASKED_TOKENS) * request.choices
    picky = any(each.target.features is not None for each in route.candidates)
    budget = prompt.tokens + min(asked, route.max_output_tokens)  # as `sending.budget_tokens` takes it
    needs = Needs(certain, budget, features(request) if picky else frozenset())
    costs: list[int | None] = []
    if route.strategy == "cheapest":
        usage = TokenUsage(prompt.tokens, 0, 0, asked, 0)
        costs = [cost(each.price, usage) for each in route.candidates]
    sticky = None
    if route.strategy != "ordered":
        sticky = request.root.raw("prompt_cache_key")
    return Facts(
        now,
        [each.live for each in route.candidates],
        needs,
        preferences,
        costs=costs,
        whole=not request.stream,
        sticky_key=sticky if sticky not in (None, b"null", b'""') else None,
    )


def features(request: ChatRequest) -> frozenset[str]:
    """What the request needs of a model, by OpenAI's names of it."""
    found: set[str] = set()
    if request.tools or request.functions:
        found.add("tools")
    wanted = request.response_format
    if isinstance(wanted, dict) and wanted.get("type") == "json_schema":
        found.add("json_schema")
    if request.audio:
        found.add("audio")
    for message in request.messages:
        content: Any = message.get("content")
        if isinstance(content, list):
            found.update(PARTS[part["type"]] for part in content if _known(part))
    return frozenset(found)


def _known(part: Any) -> bool:
    kind = part.get("type") if isinstance(part, dict) else None
    return isinstance(kind, str) and kind in PARTS


def _refusal(told: Removal) -> CallError:
    """The named error of why nobody is left."""
    wait_ms = None if told.retry_after_s is None else int(told.retry_after_s * 1000) + 1
    if told.reason == "bulkhead_full":
        return ProviderBusy(retry_after_ms=wait_ms or 1_000)
    if told.reason == "context_length":
        return ContextLengthExceeded(f"The prompt is too long for every provider of this model: {told.detail}.")
    if told.reason == "feature":
        return UnsupportedParameter(f"No provider of this model supports what the request needs: {told.detail}.")
    if told.reason in ("preference", "data_policy"):
        why = told.detail if told.reason == "preference" else f"without the tags {told.detail}"
        return ProviderNotAllowed(
            f"No provider of this model is within the account's and the request's preferences ({why})."
        )
    return ProviderUnavailable(retry_after_ms=wait_ms)
