"""What the hot verbs cost the server: microseconds of a whole script call, as the server itself counts them.

`python -m tests.support.lua_cost` prints the figures. A verb is called for some sessions in a row and the server's own
`commandstats` of EVALSHA is read: parsing and the socket are not in it, everything inside the script is. That is wall
time, to which others on the machine can only add: the figures are the median and the best of many such turns.
Must not: decide what is too slow.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass

from metering import scripts
from metering.ledger import AccountRef, GrantRequest, Held, HoldRequest, KeyLimits, SessionRef
from metering.redis_ledger import RedisLedger
from storage.redis_client import RedisClient
from tests.support.valkey import SHARD, valkey

SESSIONS = 20
TURNS = 100
GRANTS = 64
BOUND_US = 30
AMPLE = 10**9
ACCOUNT = AccountRef("acc", SHARD)


@dataclass(frozen=True, slots=True)
class Shape:
    """An account and what is asked of it: open grants, micros in each, micros of a hold and of its extension, and how
    many sessions go through a verb before the next verb's turn."""

    name: str
    grants: int
    each: int
    hold: int
    extension: int
    sessions: int = SESSIONS
    newest_first: bool = False
    """Whether the grant that was stored last burns first: the server keeps small hashes as lists, which it walks."""


SHAPES = (
    Shape("1 grant", 1, AMPLE, 100, 200),
    Shape("64 grants, the oldest pays", GRANTS, AMPLE, 100, 200),
    Shape("64 grants, the newest pays", GRANTS, AMPLE, 100, 200, newest_first=True),
    Shape("64 grants, a hold takes 3, its extension 1", GRANTS, 1_000, 3_000, 1_000, 1),
    Shape("64 grants, a hold takes 63 or 64", GRANTS, 1_000, 63_000, 0, 1),
)
MEASURED = SHAPES[2]
"""The shape that the bound is about: 64 open grants, and the usual call at its dearest."""


async def _spent(client: RedisClient, calls: Iterable[Awaitable[object]]) -> int:
    """Microseconds of server time that script calls, made together, took in all."""
    await client.call("CONFIG", "RESETSTAT")
    await asyncio.gather(*calls)
    report: bytes = await client.call("INFO", "commandstats")
    line = next(line for line in report.decode().splitlines() if line.startswith("cmdstat_evalsha:"))
    return int(dict(part.split("=") for part in line.partition(":")[2].split(","))["usec"])


def _request(sid: str, shape: Shape) -> HoldRequest:
    return HoldRequest(
        session=sid,
        account=ACCOUNT,
        key="key",
        want=shape.hold,
        minimum=shape.hold,
        prompt_cost=1,
        body_hash="a" * 64,
        owner="owner",
        price_version="price",
        metadata=b'{"model":"m"}' * 8,
        limits=KeyLimits(600_000, 10_000),
        idempotency="",
    )


async def _walk(client: RedisClient, ledger: RedisLedger, shape: Shape, turn: int) -> dict[str, int]:
    """As many sessions as the shape says, each verb for all of them before the next: microseconds in all."""
    sids = [f"session-{turn}-{number}" for number in range(shape.sessions)]
    held: list[Held] = []

    async def reserve(sid: str) -> None:
        answer = await ledger.reserve(_request(sid, shape))
        assert isinstance(answer, Held), answer
        held.append(answer)

    out = {"reserve": await _spent(client, (reserve(sid) for sid in sids))}
    refs = [SessionRef(sid, ACCOUNT, "key", one.fence) for sid, one in zip(sids, held, strict=True)]
    want = shape.hold + shape.extension
    out["progress"] = await _spent(client, (ledger.progress(ref, 1, 5, 0) for ref in refs))
    out["extend"] = await _spent(client, (ledger.progress(ref, 2, 9, want) for ref in refs))
    out["settle"] = await _spent(client, (ledger.settle(ref, 9, "completed", b"{}" * 100) for ref in refs))
    return out


async def turns_of(client: RedisClient, shape: Shape, turns: int = TURNS) -> dict[str, list[float]]:
    """Turns on an empty server: of each verb the microseconds per call, sorted."""
    await client.call("FLUSHALL", "SYNC")
    ledger = RedisLedger(client, loaded=scripts.load())
    await ledger.start()
    await ledger.init_shards([SHARD])
    for number in range(shape.grants):
        priority = shape.grants - number if shape.newest_first else number
        await ledger.grant(GrantRequest(f"grant-{number:02d}", ACCOUNT, shape.each, priority, 0, created_ms=1))
    walks = [await _walk(client, ledger, shape, turn) for turn in range(turns)]
    return {verb: sorted(walk[verb] / shape.sessions for walk in walks) for verb in walks[0]}


async def _print_all(url: str) -> None:
    client = RedisClient(url, call_ms=30_000, connect_ms=2_000, pending_max=50_000)
    await client.start()
    try:
        for shape in SHAPES:
            turns = await turns_of(client, shape, 50 if shape.sessions == 1 else TURNS)
            figures = (f"{verb} {cost[len(cost) // 2]:.1f} ({cost[0]:.1f})" for verb, cost in turns.items())
            print(f"{shape.name:44}", "  ".join(figures))
    finally:
        await client.aclose()


if __name__ == "__main__":
    print("Server time per call in microseconds: median (best)")
    with valkey() as running:
        asyncio.run(_print_all(running.url))
    print(f"The bound: reserve, progress and settle at most {BOUND_US} each with {GRANTS} open grants.")
