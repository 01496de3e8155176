"""Breakers' records in Redis, where all gateways leave and find them: the only way of breakers to Redis.

Keys: `br:{breakers}:<name>`, a string that expires. All are in one slot, so that one command reads many. A name is a
provider and model from the configuration, percent-encoded: no byte of it can end the hash tag or need quoting.
Must not: know what a record means (the greater string of bytes is the one that holds), or keep one without an expiry.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol
from urllib.parse import quote

from storage.redis_connection import Word

BATCH = 256
"""Records of one command: the server does nothing else meanwhile."""

_RAISE = """#!lua
-- Sets each record that is greater than what is there. Bytes are compared one by one: Lua's own order of strings is
-- that of the server's locale.
-- KEYS: record...
-- ARGV: ttl value...
-- RETURN: how many were set
local function greater(a, b)
  for i = 1, math.min(#a, #b) do
    local x, y = string.byte(a, i), string.byte(b, i)
    if x ~= y then return x > y end
  end
  return #a > #b
end
local set = 0
for i, key in ipairs(KEYS) do
  local there = redis.call('GET', key)
  if not there or greater(ARGV[i + 1], there) then
    redis.call('SET', key, ARGV[i + 1], 'PX', ARGV[1])
    set = set + 1
  end
end
return set
"""


class Calls(Protocol):
    """What serves calls to Redis: a client of one server or of a cluster."""

    def call(self, *args: Word) -> Awaitable[Any]: ...


class BreakerStore:
    """The records of all gateways on one Redis. Every method raises RedisError."""

    def __init__(self, redis: Calls, marks: Mapping[str, str] | None = None) -> None:
        """`marks` tells records of one name apart: whoever has another mark knows nothing of them."""
        self._redis = redis
        self._marks = marks or {}

    async def read(self, names: Sequence[str]) -> list[bytes | None]:
        """Each name's record, None where there is none, in the order of the names."""
        found: list[bytes | None] = []
        for begin in range(0, len(names), BATCH):
            found += await self._redis.call("MGET", *map(self._key, names[begin : begin + BATCH]))
        return found

    async def raise_to(self, records: Mapping[str, bytes], ttl_ms: int) -> int:
        """Set, for `ttl_ms`, the record of each name where it is greater than what is there; how many were set. What is
        greater or equal there stays as it is, with its own expiry. After an error some may have been set."""
        rest = iter(records.items())
        done = 0
        while batch := dict(islice(rest, BATCH)):
            done += await self._redis.call("EVAL", _RAISE, len(batch), *map(self._key, batch), ttl_ms, *batch.values())
        return done

    def _key(self, name: str) -> str:
        mark = self._marks.get(name)
        return f"br:{{breakers}}:{quote(name, safe='/:@')}" + (f"#{mark}" if mark else "")
