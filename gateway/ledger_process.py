"""The ledger process: flusher, sweeper, expirer, pending grants and changes, recovery, online audit, the journal's
published state. One per instance.

Must not: serve clients. It may be killed at any moment: everything it does is resumed by the next one.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import msgspec
import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server
from prometheus_client.multiprocess import MultiProcessCollector

from config import logs, run, settings
from gateway import auditing
from gateway.children import tell_ready, watch_parent
from gateway.recovering import FROZEN, watch
from gateway.settling import open_settling
from metering import grant_changes, grants, policies
from metering.expirer import Expirer
from metering.journal import Alarm, Flusher
from metering.ledger import Expired, Swept
from metering.online_audit import OnlineAudit
from metering.outbox_watch import memory_percent
from metering.recovery import Recovery
from metering.redis_ledger import RedisLedger
from metering.status import STATUS_KEY, STATUS_TTL_S, JournalReport
from metering.sweeper import Sweeper
from storage.database import FAILED, connect_pool
from storage.redis_client import RedisError
from storage.redis_open import Redis, open_redis

log = structlog.get_logger()

STATUS_EVERY_S = 1.0
GRANTS_EVERY_S = 2.0

BEHIND = Gauge(
    "tollgate_journal_entries_behind", "Journal entries not in Postgres yet.", multiprocess_mode="mostrecent"
)
AGE = Gauge("tollgate_journal_oldest_age_seconds", "Age of the oldest such entry.", multiprocess_mode="mostrecent")
DEAD = Gauge(
    "tollgate_journal_dead_entries", "Entries set aside because they could not be read.", multiprocess_mode="mostrecent"
)
STOPPED = Gauge(
    "tollgate_journal_stopped_shards", "Shards whose journal is stopped by an alarm.", multiprocess_mode="mostrecent"
)
DELIVERED = Counter("tollgate_journal_entries_total", "Journal entries written to Postgres.")
SWEPT = Counter("tollgate_swept_sessions_total", "Sessions settled on behalf of a dead owner.")
EXPIRED = Counter("tollgate_expired_grants_total", "Grants that expired with credit left.")
EXPIRED_MICROS = Counter("tollgate_expired_micros_total", "Credit that expired while nobody held it.")
ALARMS = Counter("tollgate_journal_alarms_total", "Alarms of the journal, by kind.", ["kind"])


def _alarm(alarm: Alarm) -> None:
    ALARMS.labels(alarm.kind).inc()
    log.error("journal alarm", kind=alarm.kind, shard=alarm.shard, detail=alarm.detail)


def _swept(one: Swept) -> None:
    SWEPT.inc()
    log.warning("session swept", session=one.session, account=one.account.id, charged_micros=one.charged)


def _expired(one: Expired) -> None:
    EXPIRED.inc()
    EXPIRED_MICROS.inc(one.amount)
    log.info("grant expired", grant=one.grant, account=one.account.id, expired_micros=one.amount)


async def serve() -> None:
    """Run until SIGTERM or until the supervisor is gone; then flush what is there, within a bound."""
    this_run = run.read_run()
    config = settings.with_metrics_listen(settings.load(Path(this_run.config_path)), os.environ)
    logs.configure(config.server.log_level, "ledger")
    redis = await open_redis(
        this_run.redis_url,
        call_ms=config.redis.call_ms,
        connect_ms=config.redis.connect_ms,
        pending_max=config.redis.pending_max,
    )
    settling = await open_settling(this_run.redis_url, config.redis)
    ledger = RedisLedger(redis, lease_ms=config.metering.lease_ms, settling=settling)
    await ledger.start()
    recovery = watch(redis, this_run.database_url, config.metering.lease_ms)
    flusher = Flusher(
        redis,
        this_run.database_url,
        fit=recovery.fit,
        batch_max=config.metering.flush_batch_max,
        every_ms=config.metering.flush_every_ms,
        on_alarm=_alarm,
    )
    recovery.stopped = flusher.stopped
    sweeper = Sweeper(ledger, every_ms=config.metering.sweep_every_ms, on_swept=_swept)
    expirer = Expirer(ledger, every_ms=config.metering.sweep_every_ms, on_expired=_expired)
    audit = auditing.watch(
        redis, ledger, this_run.database_url, config.metering.audit_every_ms, stopped=flusher.stopped
    )
    if not settings.is_loopback(this_run.host):
        _serve_metrics(config.server.metrics_listen)
    jobs: list[asyncio.Task[None]] = [
        asyncio.create_task(job)
        for job in (
            recovery.run(),
            flusher.run(),
            sweeper.run(),
            expirer.run(),
            _publish(redis, flusher, recovery, audit),
            _apply_grants(this_run.database_url, ledger),
            *([] if audit is None else [audit.run()]),
        )
    ]
    await _until_asked(jobs)
    for job in jobs:
        job.cancel()
    await asyncio.wait(jobs)
    await flusher.aclose()
    if settling is not None:
        await settling.aclose()
    await redis.aclose()


async def _until_asked(jobs: list[asyncio.Task[None]]) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    watch_parent(loop, stop.set)
    tell_ready()
    asked = asyncio.create_task(stop.wait())
    await asyncio.wait([asked, *jobs], return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    for job in jobs:
        if job.done():
            await job  # a job never ends by itself: let its error end the process, the supervisor starts it again


async def _publish(redis: Redis, flusher: Flusher, recovery: Recovery, audit: OnlineAudit | None) -> None:
    """Tell the workers and the metrics how the journal stands."""
    delivered = 0
    while True:
        status = flusher.status
        DELIVERED.inc(flusher.delivered - delivered)
        delivered = flusher.delivered
        BEHIND.set(status.entries_behind)
        AGE.set(status.oldest_age_ms / 1000)
        DEAD.set(status.dead)
        STOPPED.set(len(status.stopped_shards))
        FROZEN.set(recovery.frozen)
        auditing.publish(audit)
        try:
            report = JournalReport(
                entries_behind=status.entries_behind,
                oldest_age_ms=status.oldest_age_ms,
                dead=status.dead,
                stopped_shards=len(status.stopped_shards),
                memory_percent=await memory_percent(redis),
                frozen_shards=recovery.frozen,
            )
            await redis.call("SET", STATUS_KEY, msgspec.json.encode(report), "EX", STATUS_TTL_S)
        except RedisError:
            log.warning("the journal's state could not be published: redis is unavailable")
        await asyncio.sleep(STATUS_EVERY_S)


async def _apply_grants(database_url: str, ledger: RedisLedger) -> None:
    """Grants and changes written to Postgres whose way to Redis was cut, and grants that become effective now."""
    pool = None
    while True:
        try:
            if pool is None:
                pool = await connect_pool(database_url)
            await grants.apply_pending(pool, ledger)
            await grant_changes.apply_pending(pool, ledger)
            await policies.apply_pending(pool, ledger)
        except FAILED:
            log.warning("pending grants and changes could not be read: postgres is unavailable")
        await asyncio.sleep(GRANTS_EVERY_S)


def _serve_metrics(listen: str) -> None:
    """Metrics of all processes, on a port of their own when the main port is not loopback. Raises ConfigError."""
    host, port = settings.listen_address(listen)
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    try:
        start_http_server(port, host, registry)
    except OSError as error:
        raise settings.ConfigError(f"server.metrics_listen: '{listen}' cannot be used: {error.strerror}.") from None


def main() -> int:
    """Entry of `python -m gateway.ledger_process`."""
    import uvloop

    try:
        uvloop.run(serve())
    except settings.ConfigError as error:
        print(f"tollgate: {error}", file=sys.stderr)  # noqa: T201 - before there is a log
        return 2
    return 0


if __name__ == "__main__":
    os.umask(0o077)
    sys.exit(main())
