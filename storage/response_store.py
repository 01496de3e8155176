"""Answers kept in Redis for identical requests, and who is fetching one now: the response cache's only way to Redis.

Keys, by the first hex digit of an answer's name, so that what belongs together is in one slot of a cluster:
`c:{c0}:<name>` the answer, with its expiry; `cl:{c0}:<name>` the claim of who fetches it; `ci:{c0}` a zset of names by
expiry (ms) and `cs:{c0}` a hash of their sizes, with the sum under "": what bounds the bytes, since the server itself
never evicts. A name is 64 hex digits of a hash, so no key tells what was asked.
Must not: know what an answer is, touch the ledger's keys, or let the cache grow over its bound.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable
from typing import Any, NamedTuple, Protocol

from storage.redis_connection import Word

PARTS = 16
OVERHEAD_BYTES = 512
"""What Redis needs for an answer beside its bytes: key, expiry, and its places in zset and hash."""
EVICTED_MAX = 256
"""Answers dropped for one: more would keep the server from everything else."""

_NAME = re.compile(r"[0-9a-f]{64}")

_STORE = """#!lua
-- Keeps an answer for `ttl` ms, dropping those that expire first while there is no room. Kept again, it is replaced.
-- KEYS: answer index sizes
-- ARGV: name value ttl cost most evicted_max
-- RETURN: 1 or 0 (kept or not) evicted
local answer, index, sizes = unpack(KEYS)
local name, value, ttl, cost, most, evicted_max = unpack(ARGV)
ttl, cost, most, evicted_max = ttl + 0, cost + 0, most + 0, evicted_max + 0
local prefix = string.sub(answer, 1, #answer - #name)
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local total = (redis.call('HGET', sizes, '') or 0) + 0
local function forget(other)
  total = total - (redis.call('HGET', sizes, other) or 0)
  redis.call('HDEL', sizes, other)
  redis.call('ZREM', index, other)
end
for _, other in ipairs(redis.call('ZRANGEBYSCORE', index, '-inf', now, 'LIMIT', 0, evicted_max)) do forget(other) end
forget(name)
redis.call('DEL', answer)
local evicted = 0
while total + cost > most and evicted < evicted_max do
  local first = redis.call('ZRANGE', index, 0, 0)[1]
  if not first then total = 0 break end
  redis.call('DEL', prefix .. first)
  forget(first)
  evicted = evicted + 1
end
local kept = 0
if total + cost <= most then
  redis.call('SET', answer, value, 'PX', ttl)
  redis.call('ZADD', index, now + ttl, name)
  redis.call('HSET', sizes, name, cost)
  total, kept = total + cost, 1
end
if redis.call('EXISTS', index) == 0 then
  redis.call('DEL', sizes)
else
  redis.call('HSET', sizes, '', string.format('%.0f', total))
  local last = redis.call('ZRANGE', index, -1, -1, 'WITHSCORES')[2] - now
  for _, key in ipairs({ index, sizes }) do redis.call('PEXPIRE', key, string.format('%.0f', math.max(1, last))) end
end
return { kept, evicted }
"""

_RENEW = """#!lua
-- KEYS: claim
-- ARGV: token ms
-- RETURN: 1 while the claim is the caller's, else 0
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""

_RELEASE = """#!lua
-- KEYS: claim
-- ARGV: token
-- RETURN: 1 if the claim was the caller's, else 0
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
"""


class Calls(Protocol):
    """What serves calls to Redis: a client of one server or of a cluster."""

    def call(self, *args: Word) -> Awaitable[Any]: ...


class Found(NamedTuple):
    """What is kept under a name, and whether somebody has claimed to fetch it."""

    value: bytes | None
    claimed: bool


class Kept(NamedTuple):
    """Whether an answer was kept, and how many others were dropped for it."""

    kept: bool
    evicted: int


class ResponseStore:
    """The answers of all workers and gateways on one Redis. Names are 64 hex digits. Every method raises RedisError."""

    def __init__(self, redis: Calls, bytes_max: int) -> None:
        """`bytes_max` bounds all answers together, with what Redis needs beside their bytes: each of the parts holds an
        equal share, so an answer is never larger than that."""
        self._redis = redis
        self._part_bytes_max = bytes_max // PARTS

    async def find(self, name: str) -> Found:
        """What is kept, and whether it is being fetched."""
        value, claim = await self._redis.call("MGET", _key("c", name), _key("cl", name))
        return Found(value, claim is not None)

    async def keep(self, name: str, value: bytes, ttl_ms: int) -> Kept:
        """Keep an answer for so long, if it fits."""
        cost = len(value) + OVERHEAD_BYTES
        if cost > self._part_bytes_max:
            return Kept(kept=False, evicted=0)
        tag = _tag(name)
        kept, evicted = await self._redis.call(
            "EVAL", _STORE, 3, _key("c", name), f"ci:{tag}", f"cs:{tag}",
            name, value, ttl_ms, cost, self._part_bytes_max, EVICTED_MAX,
        )  # fmt: skip
        return Kept(kept=kept == 1, evicted=evicted)

    async def claim(self, name: str, token: str, ms: int) -> Found:
        """Claim to fetch it, unless somebody else does. `claimed` says whether the claim is the caller's now, `value`
        what was kept before: in one write, since who had it may have kept an answer a moment ago."""
        claiming = self._redis.call("SET", _key("cl", name), token, "NX", "PX", ms)
        finding = self._redis.call("GET", _key("c", name))
        try:
            claimed = await claiming is not None
        finally:
            value = await finding
        return Found(value, claimed)

    async def renew(self, name: str, token: str, ms: int) -> bool:
        """Whether the claim is still the caller's; then for another `ms`."""
        return bool(await self._redis.call("EVAL", _RENEW, 1, _key("cl", name), token, ms))

    async def release(self, name: str, token: str) -> bool:
        """Give the claim up; whether it was the caller's."""
        return bool(await self._redis.call("EVAL", _RELEASE, 1, _key("cl", name), token))


def _tag(name: str) -> str:
    if _NAME.fullmatch(name) is None:
        raise ValueError("an answer's name is 64 hex digits")
    return f"{{c{name[0]}}}"


def _key(kind: str, name: str) -> str:
    return f"{kind}:{_tag(name)}:{name}"
