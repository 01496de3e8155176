"""Scenarios of who may write what: an ACL user without a right, and keys that belong to somebody else.

Must not: hold anything but scenarios; `lua_scenarios` says what one is.
"""

from __future__ import annotations

from typing import Any

from metering.scripts import Word
from tests.support.lua_scenarios import LEASE_MS, scenario, stops
from tests.support.valkey import WALL, Stand


async def _barred(stand: Stand, script: str, *commands: str, **changes: Any) -> None:
    """Without any one of the commands the script must stop before its first write."""
    for command in commands:
        await stand.client.call("ACL", "SETUSER", "default", f"-{command}")
        try:
            await stops(stand, script, "no permissions", **changes)
        finally:
            await stand.client.call("ACL", "SETUSER", "default", f"+{command}")


@scenario
async def a_hold_is_refused_to_a_user_who_may_not_write_all_of_it(stand: Stand) -> None:
    await stand.grant("g", 100)
    await stand.client.call("HSET", stand.at.limits + "key", "q", "9", "lo", "0")
    await _barred(stand, "reserve", "ZADD", "HSET", "SET", "HDEL", rpm="5")
    await _barred(stand, "reassert", "ZADD", "HSET")
    await stand.hold("s1", 50)
    await stand.tick(1)
    await _barred(stand, "progress", "ZADD", "HSET", want="70")


@scenario
async def a_session_ends_whole_or_not_at_all(stand: Stand) -> None:
    await stand.grant("g", 100)
    await stand.hold("s1", 100)
    await _barred(stand, "settle", "XADD", "HSET", "DEL", "PEXPIRE", "ZREM", charge="100")
    await _barred(stand, "void", "XADD", "HSET", "DEL", "PEXPIRE", "ZREM")
    await _barred(stand, "void", "HSET", "PEXPIRE", sid="never", fence="0")
    await stand.tick(LEASE_MS)
    await stand.run("sweep")
    await _barred(stand, "correct", "XADD", "HSET", "ZREM")


@scenario
async def credit_comes_and_goes_whole_or_not_at_all(stand: Stand) -> None:
    await stand.grant("g0", 100, expires_ms=WALL + 10)
    await _barred(stand, "grant", "XADD", "HSET", "ZADD", expiry=str(WALL + 99))
    await _barred(stand, "revoke", "XADD", "HSET", "ZREM", gid="g0")
    await _barred(stand, "take", "XADD", "HSET", "ZREM", debit="100")
    await _barred(stand, "policy", "XADD", "HSET")
    await stand.tick(10)
    await _barred(stand, "expire", "XADD", "HSET", "ZREM", gid="g0")


@scenario
async def a_hold_is_made_only_under_keys_of_its_own(stand: Stand) -> None:
    await stand.grant("g", 100)
    await stand.grant("theirs", 100, uid="other")
    before = await stand.state()
    others = stand.keys("reassert", sid="s2", uid="other", kid="else") | stand.keys("reserve", "s2", "other", "else")
    for script in ("reserve", "reassert"):
        for name in ("account", "order", "grants", "session", "limits"):
            keys: dict[str, Word | list[Word]] = stand.keys(script) | {name: others[name]}
            chosen = stand.scripts[script]
            reply = await stand.client.call("EVAL", chosen.text, *chosen.place(keys, stand.args(script)))
            assert reply == [b"BOUNDS", b"keys"], (script, name)
    assert await stand.state() == before
