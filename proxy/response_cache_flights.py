"""Who fetches which answer now: of identical calls one goes to the provider, the others wait for it.

In a worker they wait for the first one's word; between workers for its claim in Redis, which expires when its owner
dies. Whoever has waited long enough, or is told that there will be no answer to share, goes his own way: nobody ever
waits for a call that waits for him.
Must not: know what an answer is, or keep anyone waiting without an end.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from enum import Enum
from typing import Any

from config.settings import Bounds
from proxy import telemetry
from proxy.response_cache_entry import Kept, unpack
from proxy.response_cache_waiting import Wait
from proxy.threads import Threads
from storage.redis_connection import RedisError
from storage.response_store import ResponseStore

POLL_FIRST_S, POLL_MAX_S = 0.02, 0.25
INLINE_BYTES = 32 * 1024
"""Packed; more is unpacked beside the event loop."""
BYTES_MAX = 64 * 1024 * 1024
"""Unpacked: far beyond what is ever kept."""


class Told(Enum):
    """What those who wait are told when there is no answer for them."""

    AGAIN = "again"
    """The first one left before he could know: another may be the first."""
    ALONE = "alone"
    """The answer cannot be shared, or there is none: each asks for himself."""


class Flight:
    """One answer that is being fetched in this worker. `claimed`: other workers know of it."""

    __slots__ = ("claimed", "name", "token", "waiters")

    def __init__(self, name: str) -> None:
        self.name = name
        self.token = os.urandom(12).hex()
        self.claimed = False
        self.waiters: dict[asyncio.Future[Kept | Told], None] = {}
        """Who waits now, the longest first."""


class Flights:
    """Those of one worker."""

    def __init__(
        self,
        store: ResponseStore,
        detach: Callable[[Coroutine[Any, Any, Any]], object],
        threads: Threads,
        bounds: Bounds,
    ) -> None:
        """`detach` runs work that outlives its request."""
        self._store = store
        self._detach = detach
        self._claim_ms = bounds.cache_claim_ms
        self._waiting_max = bounds.cache_waiting_max
        self._per_answer_max = bounds.cache_waiting_per_answer_max
        self._threads = threads
        self.waiting = 0
        """Calls that wait now, for this worker's or for another one's."""
        self._flights: dict[str, Flight] = {}
        self._renewing = False

    async def find(self, name: str, wait: Wait) -> tuple[Kept | None, Flight | None]:
        """The answer, or the flight that the caller now has to bring to its end (`over`), or neither: then the caller
        asks for himself. `wait` bounds the waiting; it ends too when the client leaves."""
        while True:
            flight = self._flights.get(name)
            if flight is None:
                return await self._lead(Flight(name), wait)
            if self.waiting >= self._waiting_max or len(flight.waiters) >= self._per_answer_max:
                return None, None
            told = await self._wait(flight, wait)
            if isinstance(told, Kept):
                return told, None
            if told is Told.ALONE or wait.connection.disconnected or not wait.left_s():
                return None, None

    def over(self, flight: Flight, told: Kept | Told, stored: Coroutine[Any, Any, Any] | None = None) -> None:
        """The flight has landed: those who wait are told, and the claim is given up once `stored` is done."""
        if self._flights.get(flight.name) is flight:
            del self._flights[flight.name]
        for waiter in flight.waiters:
            if not waiter.done():
                waiter.set_result(told)
        if flight.claimed or stored is not None:
            self._detach(self._land(flight, stored))

    async def _land(self, flight: Flight, stored: Coroutine[Any, Any, Any] | None) -> None:
        try:
            if stored is not None:
                await stored
        finally:
            if flight.claimed:
                flight.claimed = False
                try:
                    await self._store.release(flight.name, flight.token)
                except RedisError as error:  # it expires
                    telemetry.log.warning("a claim of the response cache could not be given up", reason=str(error))

    async def _wait(self, flight: Flight, wait: Wait) -> Kept | Told:
        waiter: asyncio.Future[Kept | Told] = asyncio.get_running_loop().create_future()
        connection = wait.connection
        flight.waiters[waiter] = None
        self.waiting += 1
        wait.begin()

        def gone() -> None:
            if not waiter.done():
                waiter.set_result(Told.ALONE)

        connection.on_gone = gone
        if connection.disconnected:
            gone()
        try:
            async with asyncio.timeout(wait.left_s()):
                return await waiter
        except TimeoutError:
            return Told.ALONE
        finally:
            connection.on_gone = None
            self.waiting -= 1
            del flight.waiters[waiter]
            waiter.cancel()

    async def _lead(self, flight: Flight, wait: Wait) -> tuple[Kept | None, Flight | None]:
        """The first of this worker looks into Redis for all of them, and waits there for other workers."""
        self._flights[flight.name] = flight
        told: Kept | Told = Told.AGAIN
        landed = True
        try:
            found = await self._claimed(flight, wait)
            if found is None:
                landed = False
                return None, flight
            told = found
            return (found, None) if isinstance(found, Kept) else (None, None)
        except RedisError as error:
            telemetry.log.warning("the response cache could not be asked", reason=str(error))
            landed = False
            return None, flight  # this worker's others are served all the same
        finally:
            if landed:
                self.over(flight, told)

    async def _claimed(self, flight: Flight, wait: Wait) -> Kept | Told | None:
        """The answer in Redis; None when it is ours to fetch; else another worker is too slow with it."""
        found = await self._asked(flight)
        if found is not Told.AGAIN:
            return found
        if self.waiting >= self._waiting_max:
            return Told.ALONE
        self.waiting += 1
        wait.begin()
        try:
            return await self._polled(flight, wait)
        finally:
            self.waiting -= 1

    async def _polled(self, flight: Flight, wait: Wait) -> Kept | Told | None:
        pause_s = POLL_FIRST_S
        while True:
            if wait.connection.disconnected:
                return Told.AGAIN
            if not wait.left_s():
                return Told.ALONE
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 1.5, POLL_MAX_S)
            found = await self._asked(flight)
            if found is not Told.AGAIN:
                return found

    async def _asked(self, flight: Flight) -> Kept | Told | None:
        """As `_claimed`, at this moment: AGAIN while another worker fetches it."""
        value, taken = await self._store.find(flight.name)
        kept = await self._unpacked(value)
        if kept is None and not taken:
            value, flight.claimed = await self._store.claim(flight.name, flight.token, self._claim_ms)
            kept = await self._unpacked(value)
        if kept is not None:
            return kept
        if flight.claimed:
            self._keep_claims()
            return None
        return Told.AGAIN

    async def _unpacked(self, value: bytes | None) -> Kept | None:
        """A large answer is unpacked beside the event loop; a damaged one is none."""
        if value is None:
            return None
        if len(value) <= INLINE_BYTES:
            return unpack(value, BYTES_MAX)
        return await self._threads.run(lambda: unpack(value, BYTES_MAX))

    def _keep_claims(self) -> None:
        if not self._renewing:
            self._renewing = True
            self._detach(self._renew())

    async def _renew(self) -> None:
        """While a flight of ours is claimed, its claim lives on."""
        try:
            while claimed := [each for each in self._flights.values() if each.claimed]:
                await asyncio.sleep(self._claim_ms / 3000)
                for flight in claimed:
                    if flight.claimed and self._flights.get(flight.name) is flight:
                        await self._store.renew(flight.name, flight.token, self._claim_ms)
        except RedisError as error:  # claims expire: others fetch the answer too
            telemetry.log.warning("claims of the response cache could not be renewed", reason=str(error))
        finally:
            self._renewing = False
