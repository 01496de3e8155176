"""What a worker shares and asks about its candidates: their breakers through Redis, and the providers' own word.

Must not: choose among candidates (`proxy.plans` does).
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b

from config.settings import Settings
from proxy.candidates import Candidate, Route
from proxy.lives import Lives
from proxy.probes import ProbeTarget
from proxy.shared_breakers import SharedBreakers, breaker_policy, record_ttl_s
from storage.breaker_store import BreakerStore
from storage.redis_open import Redis


async def open_breakers(settings: Settings, lives: Lives, redis: Redis, routes: Mapping[str, Route]) -> SharedBreakers:
    """The breakers of all candidates, with what others with the same key know of them. The caller closes them."""
    policy, every_s = breaker_policy(settings.breaker), settings.breaker.share_every_ms / 1000
    breakers = SharedBreakers(BreakerStore(redis, _marks(routes)), every_s, record_ttl_s(policy))
    for (provider, model), live in lives.known.items():
        breakers.register(f"{provider}/{model}", live.breaker)
    await breakers.start()
    return breakers


def _marks(routes: Mapping[str, Route]) -> dict[str, str]:
    """For each candidate a hash of its provider's key: what was found with an old key says nothing about a new one."""
    candidates = [each for route in routes.values() for each in route.candidates if each.upstream.key]
    return {
        each.target.name: blake2b((each.upstream.key or "").encode(), digest_size=6, person=b"breaker").hexdigest()
        for each in candidates
    }


def probe_targets(settings: Settings, routes: Mapping[str, Route]) -> list[ProbeTarget]:
    """The providers that are to be asked actively, each with its candidates' models."""
    found: dict[str, tuple[Candidate, dict[str, Candidate]]] = {}
    for route in routes.values():
        for each in route.candidates:
            _, models = found.setdefault(each.upstream.name, (each, {}))
            models[each.model] = each
    targets = []
    for name, (first, models) in found.items():
        probe = settings.providers[name].probe
        if probe is not None:
            lives = [(model, each.live) for model, each in models.items()]
            every_s, timeout_s = probe.every_ms / 1000, probe.timeout_ms / 1000
            targets.append(ProbeTarget(first.upstream, first.origin, first.pool, every_s, timeout_s, lives))
    return targets
