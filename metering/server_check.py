"""Whether a Redis or Valkey server is fit to hold credit: nothing evicted, writes logged, scripts refused whole, and
our user allowed to write what they write.

Must not: change the server. All is read from INFO and by scripts that only read, which needs no special right.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from metering.keys import SHARDS
from storage.redis_client import RedisReplyError
from storage.redis_open import Redis, Server, servers

VERIFIED_KEY = "server:verified"
"""The run id of the server whose contents were compared with the journal. It lies in the server itself, so a restart
and a promoted replica show another run id than the one that is written here: then nothing may be used before it was
compared again. Without the key nothing is claimed (a new server; meta keys tell a loss)."""

VALKEY_LEAST = (8, 0, 0)
REDIS_LEAST = (8, 6, 3)
"""Older ones have known faults in their Lua engine or lack what the scripts rely on."""


_AT = SHARDS[0]
_WRITES = {
    "HSET": (_AT.meta, *(f"{prefix}x" for prefix in (_AT.account, _AT.grants, _AT.session, _AT.limits))),
    "HDEL": (f"{_AT.limits}x",),
    "DEL": (f"{_AT.session}x",),
    "PEXPIRE": (f"{_AT.session}x",),
    "SET": (f"{_AT.idempotency}x",),
    "ZADD": (f"{_AT.order}x", _AT.leases, _AT.expiries),
    "ZREM": (f"{_AT.order}x", _AT.leases, _AT.expiries),
    "XADD": (_AT.outbox,),
}
"""The scripts' writing commands, each with a key of each kind that it is for."""
_RIGHTS = """#!lua flags=no-writes
local lacking = {}
for i = 1, #ARGV, 2 do
  if not redis.acl_check_cmd(ARGV[i], ARGV[i + 1]) then lacking[#lacking + 1] = ARGV[i] .. ' ' .. ARGV[i + 1] end
end
return lacking"""


@dataclass(frozen=True, slots=True)
class ServerReport:
    """`faults` must stop a start; `old` is the version's text when it is below the least that is supported."""

    faults: tuple[str, ...]
    old: str | None


async def inspect(redis: Redis) -> ServerReport:
    """Ask the server; of a cluster every primary, and each fault once. Raises RedisUnavailable."""
    reports = await asyncio.gather(*(_inspect(server) for server in servers(redis)))
    faults = dict.fromkeys(fault for report in reports for fault in report.faults)
    return ServerReport(tuple(faults), next((report.old for report in reports if report.old is not None), None))


async def _inspect(redis: Server) -> ServerReport:
    fields: dict[str, str] = {}
    for section in ("server", "memory", "persistence"):
        fields |= await _info(redis, section)
    faults = []
    policy = fields.get("maxmemory_policy", "unknown")
    if policy != "noeviction":
        faults.append(f"its maxmemory-policy is {policy}, which drops holds under memory pressure: set noeviction")
    if fields.get("aof_enabled") != "1":
        faults.append("its append-only file is off, so a restart would lose holds: set appendonly yes")
    if not await _knows_headers(redis):
        faults.append("it does not know #!lua script headers, so a refused script could write half: use Valkey 8")
    elif lacking := await _rights_lacking(redis):
        faults.append(f"its ACL does not let this user run {', '.join(lacking)}: the ledger's scripts write with them")
    return ServerReport(tuple(faults), old_version(fields))


async def replicas_word(redis: Redis, replicas: int) -> str:
    """Readiness' word for the replicas: ok, unknown, or degraded and what keeps settlements from being on `replicas`.
    Of a cluster's primaries the first that is not ok has the word.

    Raises RedisUnavailable. INFO has `min_slaves_good_slaves` exactly when min-replicas-to-write is in force: it counts
    the replicas that answered within min-replicas-max-lag.
    """
    words = await asyncio.gather(*(_replicas_word(server, replicas) for server in servers(redis)))
    return next((word for word in words if word != "ok"), "ok")


async def _replicas_word(redis: Server, replicas: int) -> str:
    try:
        fields = await _info(redis, "replication")
    except RedisReplyError:
        return "unknown"
    fault = _replica_fault(fields, replicas)
    return "ok" if fault is None else f"degraded: {fault}"


def _replica_fault(fields: dict[str, str], replicas: int) -> str | None:
    role = fields.get("role", "unknown")
    if role != "master":
        return f"the server's role is {role}"
    connected, good = fields.get("connected_slaves", "0"), fields.get("min_slaves_good_slaves")
    following = min(int(connected), int(good or connected))
    if following < replicas:
        return f"{following} of {replicas} replicas follow"
    return "min-replicas-to-write is not in force" if good is None else None


def run_id(info: bytes) -> bytes:
    """The server's run id in its INFO: another one after each start."""
    return next((line[7:].strip() for line in info.splitlines() if line.startswith(b"run_id:")), b"")


async def verified(redis: Redis) -> bool:
    """Whether the server is the one that was compared with the journal. Raises RedisError."""
    info, known = await asyncio.gather(redis.call("INFO", "server"), redis.call("GET", VERIFIED_KEY))
    return known is None or known == run_id(info)


async def _info(redis: Server, section: str) -> dict[str, str]:
    text = (await redis.call("INFO", section)).decode("utf-8", "replace")
    return dict(line.split(":", 1) for line in text.splitlines() if ":" in line)


async def _knows_headers(redis: Server) -> bool:
    try:
        return bool(await redis.call("EVAL", "#!lua flags=no-writes\nreturn 1", 0) == 1)
    except RedisReplyError:
        return False


async def _rights_lacking(redis: Server) -> list[str]:
    """What the ledger's scripts write with and this user may not run, as `command key`. The scripts ask again, each
    time (decision 0009); a user who lacks a right from the start is told so before the first call."""
    words = [word for command, keys in _WRITES.items() for key in keys for word in (command, key)]
    return [name.decode() for name in await redis.call("EVAL", _RIGHTS, 0, *words)]


def old_version(fields: dict[str, str]) -> str | None:
    """Valkey reports redis_version 7.2.4 for compatibility, so its own version counts where it has one."""
    valkey, redis = fields.get("valkey_version"), fields.get("redis_version", "0")
    if valkey is not None:
        return None if _number(valkey) >= VALKEY_LEAST else f"Valkey {valkey}"
    return None if _number(redis) >= REDIS_LEAST else f"Redis {redis}"


def _number(version: str) -> tuple[int, ...]:
    parts = [int(part) if part.isdigit() else 0 for part in version.strip().split(".")[:3]]
    return (*parts, 0, 0, 0)[:3]
