"""How Redis is opened: whether a server belongs to a cluster is asked once, and decides which client speaks to it.

Must not: speak to Redis in any other way than through those clients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from storage.redis_client import RedisClient, RedisReplyError, Subscription
from storage.redis_cluster import ClusterClient, Node
from storage.redis_cluster_channel import ClusterSubscription
from storage.redis_connection import Word
from storage.redis_replicated import MARK, ReplicatedClient
from storage.redis_slots import key_of

Redis = RedisClient | ClusterClient
"""What serves calls to Redis, one server or many."""

Listening = Subscription | ClusterSubscription

Server = RedisClient | ClusterClient | Node
"""What can be asked for its INFO."""

Caller = TypeVar("Caller")


async def open_redis(url: str, *, call_ms: int, connect_ms: int, pending_max: int) -> Redis:
    """A connected client of the server or of its cluster. Raises RedisUrlError, RedisUnavailable, RedisReplyError."""
    client = RedisClient(url, call_ms=call_ms, connect_ms=connect_ms, pending_max=pending_max)
    await client.start()
    if not await _in_a_cluster(client):
        return client
    await client.aclose()
    cluster = ClusterClient(url, call_ms=call_ms, connect_ms=connect_ms, pending_max=pending_max)
    await cluster.start()
    return cluster


async def open_replicated(
    url: str,
    *,
    call_ms: int,
    connect_ms: int,
    pending_max: int,
    on_unconfirmed: Callable[[int], None],
    mark_beside: Callable[[str], str],
) -> ReplicatedClient | ClusterClient:
    """A connected client whose answers wait for a replica; in a cluster each primary's for one of its own replicas.

    `mark_beside` names a key of the same slot as another key: what is written there before each WAIT, since the
    servers of a cluster do not replicate messages. Raises as `open_redis` does.
    """

    def open_node(at: str, in_cluster: bool = True) -> ReplicatedClient:
        return ReplicatedClient(
            at,
            call_ms=call_ms,
            connect_ms=connect_ms,
            pending_max=pending_max,
            on_unconfirmed=on_unconfirmed,
            mark=(lambda words: _mark(words, mark_beside)) if in_cluster else None,
        )

    asking = RedisClient(url, call_ms=call_ms, connect_ms=connect_ms, pending_max=pending_max)
    try:
        await asking.start()
        in_cluster = await _in_a_cluster(asking)
    finally:
        await asking.aclose()
    client: ReplicatedClient | ClusterClient = open_node(url, in_cluster=False)
    if in_cluster:
        client = ClusterClient(
            url, call_ms=call_ms, connect_ms=connect_ms, pending_max=pending_max, open_node=open_node
        )
    await client.start()
    return client


def servers(redis: Caller) -> Sequence[Caller | Node]:
    """Every server that has keys, for what each has to be asked: the client itself where it has one server.

    Raises RedisUnavailable when a part of a cluster has no known server.
    """
    return redis.primaries() if isinstance(redis, ClusterClient) else [redis]


async def _in_a_cluster(client: RedisClient) -> bool:
    """A server that does not tell is taken for a single one."""
    try:
        return b"cluster_enabled:1" in await client.call("INFO", "cluster")
    except RedisReplyError:
        return False


def _mark(batch: Sequence[tuple[Word, ...]], mark_beside: Callable[[str], str]) -> tuple[Word, ...]:
    keys = (key_of(words) for words in batch if words[0] != "ASKING")
    key = next((key for key in keys if key is not None), None)
    return MARK if key is None else ("SET", mark_beside(str(key)), "")
