"""A replica takes over, as an operator or a sentinel would have it: promoted, gateways led to it, the old one behind.

The `Link` of each gateway to Valkey stands for whatever leads it to the primary (a name, a virtual address). Must not:
tell a gateway anything: it sees a connection that ends and another server behind the same address.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence

from redis.exceptions import RedisError

from loadtests.chaos.servers import ChaosError, Valkey
from loadtests.chaos.world import Gateway, World, client_of, until

FOLLOWING_S = 30.0


async def follows(world: World) -> bool:
    """Whether the replica has everything, as both servers see it."""
    async with contextlib.aclosing(client_of(world.replica)) as store:
        with contextlib.suppress(RedisError, OSError):
            found = await store.info("replication")
            return bool(found["role"] == "slave" and found["master_link_status"] == "up")
    return False


async def promote(server: Valkey) -> None:
    """Make it a primary."""
    async with contextlib.aclosing(client_of(server)) as store:
        await store.replicaof("NO", "ONE")


def lead(gateways: Sequence[Gateway], server: Valkey) -> int:
    """These gateways' connections to Valkey end, and new ones reach the server. How many connections ended."""
    ended = 0
    for gateway in gateways:
        link = gateway.links["valkey"]
        link.target = server.port
        ended += link.cut(reset=True)
    return ended


def swap(world: World) -> None:
    """What was the replica is the world's primary from now on, and the other way round; the old one has to `rejoin`."""
    world.valkey, world.replica = world.replica, world.valkey
    world.valkey.primary_port, world.replica.primary_port = 0, world.replication.port
    world.replication.target = world.valkey.port


async def rejoin(world: World) -> None:
    """The old primary is told to follow the new one, whatever it has."""
    world.replication.cut(reset=True)
    world.replication.calm()
    old = world.replica
    if old.process is None or old.process.poll() is not None:
        await asyncio.to_thread(old.start)
    else:
        async with contextlib.aclosing(client_of(old)) as store:
            await store.replicaof("127.0.0.1", str(old.primary_port))


async def until_following(world: World) -> None:
    """Until the old primary has what the new one has. Raises ChaosError."""
    await until(lambda: follows(world), FOLLOWING_S, "the old primary follows the new one")


async def errors(server: Valkey, code: str) -> int:
    """How often the server has answered with this error since it started."""
    async with contextlib.aclosing(client_of(server)) as store:
        found = await store.info("errorstats")
    return int(found.get(f"errorstat_{code}", {}).get("count", 0))


async def stops_writing(server: Valkey, seconds: float) -> float:
    """Until it refuses a write for want of replicas: when that was, of the monotonic clock. Raises ChaosError."""

    async def refuses() -> float:
        async with contextlib.aclosing(client_of(server)) as store:
            try:
                await store.set("chaos:probe", "1")
            except RedisError as error:
                if "NOREPLICAS" not in str(error):
                    raise ChaosError(f"the old primary answers {error}") from error
                return time.monotonic()
        return 0.0

    return float(await until(refuses, seconds, "the old primary stops taking writes", every_s=0.05))
