"""The configuration of gateways whose routes continue streams and hedge calls; providers are at one scripted server.

Prices and costs are micros a token, different at each provider, so that a sum tells who was paid for what.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from tests.support.ports import free_port

PORT = free_port()
"""Where every provider is; each has a path of its own."""
PRICES = {"a": (10, 100), "b": (20, 300), "c": (30, 700)}
COSTS = {"a": (1, 2), "b": (3, 4), "c": (5, 6)}
MODELS = {"a": "gpt-4o-mini", "b": "gpt-4o", "c": "gpt-4.1"}
WIRES = {"ollama": "llama3", "mistral": "mistral-small", "vllm": "qwen", "claude": "claude-3-5-sonnet-20241022"}
KINDS = {"a": "openai", "b": "openai", "c": "openai", "claude": "anthropic"}

BASE = """
[bounds]
connect_ms = 1000
headers_ms = 2500
first_content_ms = 2500
idle_ms = 600
commit_after_ms = 600
keepalive_ms = 400
client_write_ms = 1500
drain_s = 1

[metering]
lease_ms = 6000
sweep_every_ms = 200
flush_every_ms = 20
progress_ms = 100

[breaker]  # what breakers do has gateways of its own
consecutive_max = 1000000
calls_min = 1000000
"""
HEDGED = 12
HEDGE = "hedge = { percentile = 50, delay_ms_min = 60, samples_min = 3 }\n"


def provider(name: str, kind: str, more: str = "") -> str:
    """A provider at the scripted server."""
    return f'[providers.{name}]\nkind = "{kind}"\nbase_url = "http://127.0.0.1:{PORT}/{name}/v1"\n{more}\n'


def route(name: str, candidates: dict[str, str], more: str) -> str:
    """A route with these providers and models, in this order."""
    listed = ", ".join(f'{{ provider = "{each}", model = "{model}" }}' for each, model in candidates.items())
    return f"[routes.{name}]\ncandidates = [{listed}]\n{more}\n"


def priced(name: str, model: str, like: str, request: str = "0") -> str:
    """Prices and costs of a candidate."""
    (given, made), (given_cost, made_cost) = PRICES[like], COSTS[like]
    return (
        f'[prices."{name}/{model}"]\ninput = "{given}"\noutput = "{made}"\nrequest = "{request}"\n'
        f'[costs."{name}/{model}"]\ninput = "{given_cost}"\noutput = "{made_cost}"\n'
    )


def charged_in(credits: Any) -> int:
    """Micros of an amount in credits as the client reads it."""
    return int(Decimal(str(credits)) * 1_000_000)


def _config() -> str:
    lines = [BASE]
    for name, model in {**MODELS, **WIRES}.items():
        lines.append(provider(name, KINDS.get(name, name), "limits = { concurrent = 100 }"))
        like, request = (name, "0") if name in PRICES else ("b", "0.00005")
        lines.append(priced(name, model, like, request))
    on, once = "continuation = true\n", "retry = { retries = 0 }\n"
    lines.append(route("on", MODELS, on + once))
    lines.append(route("on-b", {name: MODELS[name] for name in "ab"}, on + once))
    lines.append(route("on-two", MODELS, on + "retry = { retries = 0, attempts_max = 2 }\n"))
    lines.append(route("off", MODELS, once))
    lines.append(route("on-hidden", MODELS, on + once + "hidden_reasoning = true\n"))
    lines.append(route("kept", MODELS, on + once + "[routes.kept.cache]\n"))
    for at in range(HEDGED):  # a route for each test: what is known of its candidates is its own
        candidates = {name: f"{MODELS[name]}-{at}" for name in "abc"}
        lines += [priced(name, model, name) for name, model in candidates.items()]
        lines.append(route(f"hedged-{at}", candidates, HEDGE + once))
    lines.append(route("hedged-tight", {"a": "gpt-4o-mini-tight", "tight": "gpt-4o-tight"}, HEDGE + once))
    lines.append(route("tight", {"tight": "gpt-4o-tight"}, once))
    lines += [provider("tight", "openai", "limits = { concurrent = 1 }"), priced("tight", "gpt-4o-tight", "b")]
    lines.append(priced("a", "gpt-4o-mini-tight", "a"))
    for name, model in WIRES.items():
        lines.append(route(f"on-{name}", {"a": MODELS["a"], name: model}, on + once))
    return "\n".join(lines)


CONFIG = _config()
