"""The composition of a data worker: every part made once, opened in order, closed in reverse.

Must not: be imported by anything but the worker and tests.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from accounts.key_lookup import PostgresKeys
from accounts.key_store import KeyStore
from accounts.keys import fingerprint
from config import catalog as catalogs
from config.run import Run
from config.settings import Bounds, Secrets, Settings, is_loopback
from gateway import errors
from gateway.app import Front, create_app
from gateway.health import Health
from gateway.routing import open_breakers, probe_targets
from gateway.settling import open_settling
from metering.outbox_watch import OutboxWatch
from metering.ranks import encoding
from metering.receipts import Keeper
from metering.redis_ledger import RedisLedger
from metering.server_check import inspect
from proxy.admission import Admission
from proxy.candidates import Route, build_routes
from proxy.httpx_upstreams import open_pools
from proxy.live_sessions import LiveSessions
from proxy.lives import Lives
from proxy.probes import Probes
from proxy.relay import StreamRelay
from proxy.response_cache import ResponseCache, cached_routes
from proxy.response_cache_relay import CachedRelay
from proxy.routes import DataPlane
from proxy.sending import Sender
from proxy.settlement import Settler
from proxy.shared_breakers import SharedBreakers
from proxy.transport import Transport, TransportLimits
from proxy.upstream import Upstreams
from proxy.whole_relay import WholeRelay
from storage.redis_open import Redis, open_redis
from storage.response_store import ResponseStore


@dataclass(frozen=True, slots=True)
class Worker:
    """What the process needs of its parts: the application, and the sessions to drain."""

    app: Front
    live: LiveSessions
    bounds: Bounds


@asynccontextmanager
async def open_worker(
    run: Run, settings: Settings, secrets: Secrets, pepper: bytes, number: int = 0
) -> AsyncIterator[Worker]:
    """Open every part; `number` is this worker's among the instance's. Raises ConfigError, RedisUnavailable,
    LedgerUnavailable."""
    catalog = catalogs.read(Path(run.catalog_path))
    limits = _limits(settings.bounds)
    pools = open_pools(settings, secrets, run.simulated, limits)
    lives = Lives(settings.breaker, (number, run.workers))
    routes = build_routes(settings, secrets, catalog, run.simulated, (pools, lives))
    for name in {each.encoding for route in routes.values() for each in route.candidates}:
        encoding(name)  # loaded before the first request, not in it
    async with AsyncExitStack() as stack:
        for pool in pools.values():
            stack.push_async_callback(pool.aclose)
        redis = await open_redis(
            run.redis_url,
            call_ms=settings.redis.call_ms,
            connect_ms=settings.redis.connect_ms,
            pending_max=settings.redis.pending_max,
        )
        stack.push_async_callback(redis.aclose)
        settling = await open_settling(run.redis_url, settings.redis)
        if settling is not None:
            stack.push_async_callback(settling.aclose)
        ledger = RedisLedger(redis, lease_ms=settings.metering.lease_ms, settling=settling)
        await ledger.start()
        lookup = PostgresKeys(run.database_url)
        stack.push_async_callback(lookup.aclose)
        keys = KeyStore(redis, lookup, pepper, fingerprint(pepper))
        await keys.start()
        stack.push_async_callback(keys.aclose)
        transport = Transport(limits)
        stack.push_async_callback(transport.aclose)
        live = LiveSessions(ledger, settings.metering, settings.bounds)
        live.start()
        outbox = OutboxWatch(redis, settings.metering, live.outbox_changed)
        await outbox.start()
        stack.push_async_callback(outbox.aclose)
        for places in lives.places.values():
            stack.push_async_callback(places.aclose)
            live.ticked.append(places.publish)
        breakers = await open_breakers(settings, lives, redis, routes)
        stack.push_async_callback(breakers.aclose)
        probes = Probes(probe_targets(settings, routes), transport, breakers.changed)
        probes.start()
        stack.push_async_callback(probes.aclose)
        settler = Settler(ledger, live, catalog.version, settings.bounds.settle_reply_ms)
        owner = f"{os.getpid()}-{os.urandom(4).hex()}"
        keeper = Keeper(redis, run.database_url, settler.receipts, live.holds, owner)
        keeper.start()
        stack.push_async_callback(keeper.aclose)
        parts = ledger, live, keys, transport, breakers
        plane = _plane(settings, routes, catalog.version, parts, (settler, owner), redis)
        stack.push_async_callback(plane.aclose)
        health = Health(redis, run.database_url, live, outbox)
        health.old_server = (await inspect(redis)).old
        health.replicas = settings.redis.replicas
        app = create_app(plane, health, with_metrics=is_loopback(run.host))
        yield Worker(app, live, settings.bounds)


def _plane(
    settings: Settings,
    routes: dict[str, Route],
    price_version: str,
    parts: tuple[RedisLedger, LiveSessions, KeyStore, Transport, SharedBreakers],
    settling: tuple[Settler, str],
    redis: Redis,
) -> DataPlane:
    ledger, live, keys, transport, breakers = parts
    bounds, metering = settings.bounds, settings.metering
    settler, owner = settling
    admission = Admission(ledger, live, routes, price_version, owner, (metering, bounds))
    sender = Sender(transport, bounds, admission.threads)
    upstreams = Upstreams(sender, bounds, live.confirm, breakers.changed)
    stream_relay = StreamRelay(upstreams, live, settler, bounds, errors.sse_payload)
    whole_relay = WholeRelay(upstreams, settler, bounds)
    plane = DataPlane(keys, admission, live, (stream_relay, whole_relay, settler), routes, bounds)
    cached = cached_routes(settings, routes, price_version)
    if cached:
        store = ResponseStore(redis, bounds.cache_total_bytes_max)
        relays = stream_relay, whole_relay, CachedRelay(settler, errors.sse_payload)
        plane.cache = ResponseCache(store, live, admission.threads, cached, bounds, relays)
    return plane


def _limits(bounds: Bounds) -> TransportLimits:
    return TransportLimits(
        connect_ms=bounds.connect_ms, head_ms=bounds.headers_ms, idle_ms=bounds.idle_ms, total_ms=bounds.total_ms
    )
