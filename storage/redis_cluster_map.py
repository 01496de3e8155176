"""Where the map of a Redis Cluster comes from: which primary has which slots, as one of its servers tells it.

Must not: keep a map or a connection. A server is asked on a connection of its own: those that serve may be stuck.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from urllib.parse import quote

from storage.redis_client import RedisClient, RedisError, RedisUnavailable
from storage.redis_connection import Address
from storage.redis_slots import Place, Range, read_slots

ASKED_AT_ONCE = 3
"""Servers that are asked at once; the first that answers is believed."""


class MapSource:
    """The servers of the cluster that `url` names one of; its credentials, database and TLS count for all."""

    def __init__(self, url: str, *, call_ms: int, connect_ms: int) -> None:
        """Raises RedisUrlError for a URL that cannot be read."""
        self._seed_url = url
        self._seed = Address.parse(url)
        self._client = partial(RedisClient, call_ms=call_ms, connect_ms=connect_ms, pending_max=8)

    def url(self, place: Place) -> str:
        """How a server of the cluster is reached."""
        seed = self._seed
        user = f"{quote(seed.username or '', safe='')}:{quote(seed.password, safe='')}@" if seed.password else ""
        host = f"[{place.host}]" if ":" in place.host else place.host
        return f"{'rediss' if seed.tls else 'redis'}://{user}{host}:{place.port}/{seed.db}"

    async def ask(self, named: set[Place], known: list[Place]) -> list[Range]:
        """Ask whom redirections named and some that are known, at last the one that the configuration has.

        Takes at most twice the times of a connection and a call. Raises RedisUnavailable, RedisReplyError.
        """
        others = [place for place in known if place not in named]
        random.shuffle(others)
        asked = [*named, *others][:ASKED_AT_ONCE]
        if asked:
            with suppress(RedisError):
                return await self._first_answer(map(self.url, asked))
        return await self._first_answer([self._seed_url])

    async def _first_answer(self, urls: Iterable[str]) -> list[Range]:
        asking = [asyncio.create_task(self._slots_at(url)) for url in urls]
        failed: RedisError | None = None
        try:
            for answer in asyncio.as_completed(asking):
                try:
                    return await answer
                except RedisError as error:
                    failed = error
                except ValueError as error:
                    failed = unsent(str(error))
        finally:
            for task in asking:
                task.cancel()
            await asyncio.wait(asking)
        assert failed is not None
        raise failed

    async def _slots_at(self, url: str) -> list[Range]:
        """On a connection of its own: the others may be stuck. Raises RedisError, ValueError."""
        client = self._client(url)
        try:
            await client.start()
            ranges = read_slots(await client.call("CLUSTER", "SLOTS"), Address.parse(url).host or "127.0.0.1")
        finally:
            await client.aclose()
        if not ranges:
            raise ValueError("CLUSTER SLOTS: no slot has a server")
        return ranges


def unsent(reason: str) -> RedisUnavailable:
    """What a caller gets whose command did not run."""
    return RedisUnavailable(f"Redis Cluster: {reason}", sent=False)
