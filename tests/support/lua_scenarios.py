"""Deterministic histories over the ledger's scripts: what they share, and the list of them.

A scenario gets an empty `Stand`, does one short history and asserts every figure that matters. On the real scripts all
of them pass; tests/integration/test_lua_mutants.py shows that each mutant of `mutants.py` fails one. Must not: look at
the clock, draw a random number, or assert more of a hash than the fields that the scenario is about.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from metering.keys import SHARDS
from metering.redis_ledger import RedisLedger
from metering.scripts import Script
from storage.redis_client import RedisClient, RedisReplyError
from tests.support.valkey import SHARD, WALL, Stand

LEASE_MS = 15_000
DAY_MS = 86_400_000
Scenario = Callable[[Stand], Awaitable[None]]
SCENARIOS: dict[str, Scenario] = {}
"""Every scenario by its name, in the order of definition; the modules that define them are imported by the test."""


def scenario(function: Scenario) -> Scenario:
    """Put a scenario on the list under its function's name."""
    name = getattr(function, "__name__", "")
    assert name not in SCENARIOS, name
    SCENARIOS[name] = function
    return function


async def fresh(client: RedisClient, loaded: dict[str, Script]) -> Stand:
    """An empty ledger of one shard with these scripts; the server keeps what it has compiled."""
    await client.call("FLUSHALL", "SYNC")
    stand = Stand(client, RedisLedger(client, loaded=loaded), loaded)
    await stand.wall(WALL)
    await stand.ledger.init_shards([SHARD])
    return stand


async def account(stand: Stand, uid: str = "acc") -> dict[str, int]:
    """The account's figures; a missing one is 0."""
    row = await stand.hash(stand.at.account + uid)
    return {name: int(row.get(name, 0)) for name in ("av", "hd", "db", "tc", "ns", "hc")}


async def grant_of(stand: Stand, gid: str, uid: str = "acc") -> dict[str, int]:
    """The parts of a grant."""
    row = await stand.hash(stand.at.grants + uid)
    return {part: int(row.get(f"{gid}:{part}", 0)) for part in "iahcxv"}


async def session(stand: Stand, sid: str, *fields: str) -> list[str | None]:
    """Fields of a session's hash."""
    row = await stand.hash(stand.at.session + sid)
    return [row.get(name) for name in fields]


async def last_entry(stand: Stand) -> dict[str, str]:
    """The newest journal entry's fields."""
    return (await stand.entries())[-1][1]


async def lease(stand: Stand, sid: str) -> int | None:
    """When the lease of a session of the test account ends, in ms."""
    score = await stand.client.call("ZSCORE", stand.at.leases, f"acc|{sid}")
    return None if score is None else int(score)


async def saved_clock(stand: Stand) -> int:
    """The shard's saved clock, in ms."""
    return int(await stand.client.call("HGET", stand.at.meta, "clk"))


async def unchanged(stand: Stand, script: str, expected: list[Any], **changes: Any) -> None:
    """A call that must answer `expected` (as far as that goes) and leave every byte as it was."""
    before = await stand.state()
    reply = await stand.run(script, **changes)
    assert reply[: len(expected)] == expected, reply
    assert await stand.state() == before


async def adds_up(stand: Stand, uid: str = "acc") -> None:
    """The invariants of one account's figures, I1 to I5, and of the shard's journal, I8 (metering.md 1.5)."""
    row, figures = await stand.hash(stand.at.grants + uid), await account(stand, uid)
    gids = [name.removesuffix(":i") for name in row if name.endswith(":i")]
    parts = {gid: await grant_of(stand, gid, uid) for gid in gids}
    for gid, one in parts.items():
        assert one["i"] == sum(one[part] for part in "ahcxv"), (gid, one)
    assert figures["av"] == sum(one["a"] for one in parts.values())
    assert figures["hd"] == sum(one["h"] for one in parts.values()) + figures["hc"]
    assert sum(one["c"] for one in parts.values()) == figures["tc"] - figures["db"]
    leases = await stand.client.call("ZRANGE", stand.at.leases, 0, -1)
    mine = [name for name in leases if name.startswith(f"{uid}|".encode())]
    assert figures["ns"] == len(mine)
    ids = [name for name, _ in await stand.entries()]
    assert ids == [f"1-{n}" for n in range(1, len(ids) + 1)]
    assert int(await stand.client.call("HGET", SHARDS[SHARD].meta, "n")) == len(ids)


async def stops(stand: Stand, script: str, word: str, **changes: Any) -> None:
    """A call that must end in an error with `word`, and leave every byte as it was."""
    before, said = await stand.state(), ""
    try:
        await stand.run(script, **changes)
    except RedisReplyError as error:
        said = str(error)
    assert word in said
    assert await stand.state() == before
