"""A Redis Cluster behind the interface of `RedisClient`: one connection per primary, each command to its slot's owner.

A redirected command has not run, so it is sent once more where it belongs; other failures are the caller's to judge.
Must not: retry anything else, decode replies, know what a command means beyond where its key stands, or ask a replica.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from hashlib import sha1
from typing import Any, Protocol

from storage.redis_client import RedisClient, RedisError, RedisReplyError, RedisUnavailable
from storage.redis_cluster_channel import ClusterSubscription
from storage.redis_cluster_map import MapSource, unsent
from storage.redis_connection import Word
from storage.redis_slots import SLOTS, Place, Range, key_of, read_redirect, slot_of

log = logging.getLogger(__name__)

BACKOFF_FIRST_S = 0.05
BACKOFF_MAX_S = 1.0
"""Between two looks at the map while something is wrong. This often, too, whether connections stand, by no command."""

_RUN_ID = re.compile(rb"^run_id:(\w+)", re.MULTILINE)
_REDIRECTS = frozenset({"MOVED", "ASK"})


class Node(Protocol):
    """The connection to one primary."""

    @property
    def connected(self) -> bool:
        """Whether a call made now would be written."""

    def on_lost(self, callback: Callable[[], None]) -> None:
        """Call it whenever the connection is lost."""

    async def start(self) -> None:
        """Connect. Raises RedisError; may be tried again."""

    def call(self, *args: Word) -> asyncio.Future[Any]:
        """Send one command; the awaited result is its reply."""

    async def aclose(self) -> None:
        """Close; pending calls get RedisUnavailable."""


class _Server:
    """A place and its connection. `opened`: it was connected once, and reconnects by itself from then on. `run_id` as
    it last told it."""

    __slots__ = ("node", "opened", "place", "run_id")

    def __init__(self, place: Place, node: Node) -> None:
        self.place = place
        self.node = node
        self.opened = False
        self.run_id = b""


class _Call:
    """One call of a caller's, on its way. `again` once it was redirected; `target` says where to."""

    __slots__ = ("again", "answer", "asking", "slot", "target", "words")

    def __init__(self, words: tuple[Word, ...], slot: int, answer: asyncio.Future[Any]) -> None:
        self.words = words
        self.slot = slot
        self.answer = answer
        self.again = False
        self.asking = False
        self.target: Place | None = None

    def fail(self, error: BaseException) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


class ClusterClient:
    """The process's connections to a cluster; all methods belong to the loop that called `start`.

    `url` names any server of it; database and credentials count for all. `call_ms` and `pending_max` hold per primary,
    `connect_ms` for one attempt to connect. A redirected call waits up to `call_ms` a second time, and before it for
    the map where its new owner is not connected yet. `open_node` makes the connection to one primary of its URL.
    """

    def __init__(
        self,
        url: str,
        *,
        call_ms: int,
        connect_ms: int,
        pending_max: int,
        open_node: Callable[[str], Node] | None = None,
    ) -> None:
        """Raises RedisUrlError for a URL that cannot be read."""
        self._source = MapSource(url, call_ms=call_ms, connect_ms=connect_ms)
        self._open_node: Callable[[str], Node] = open_node or partial(
            RedisClient, call_ms=call_ms, connect_ms=connect_ms, pending_max=pending_max
        )
        self._call_s = call_ms / 1000
        self._connect_s = connect_ms / 1000
        self._pending_max = pending_max
        self._owners: list[_Server | None] = [None] * SLOTS
        self._mapped: list[_Server] = []
        self._covered = False
        self._servers: dict[Place, _Server] = {}
        self._retired: set[asyncio.Task[None]] = set()
        self._waiting: list[_Call] = []
        self._doubted = asyncio.Event()
        self._awaited = asyncio.Event()
        self._subscriptions: list[ClusterSubscription] = []
        self._on_lost: list[Callable[[], None]] = []
        self._keeper: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    @property
    def connected(self) -> bool:
        """Whether a call made now would be written, whichever its key."""
        return self._covered and all(server.node.connected for server in self._mapped)

    def on_lost(self, callback: Callable[[], None]) -> None:
        """Call `callback` (it must not raise) whenever a primary's connection is lost or others are primaries now: who
        has its slots then may be another server, or the same one without its last writes."""
        self._on_lost.append(callback)

    async def start(self) -> None:
        """Ask for the map and connect to every primary. Raises RedisUnavailable, RedisReplyError."""
        self._loop = asyncio.get_running_loop()
        self._closed = False
        try:
            await self._learn(set())
        except BaseException:
            await self._close_servers()
            raise
        self._keeper = asyncio.create_task(self._keep(), name="redis cluster map")

    def primaries(self) -> list[Node]:
        """The connection to each primary, for what each has to be asked. Raises RedisUnavailable for an unknown one."""
        if not self._covered:
            raise unsent("not every slot has a server")
        return [server.node for server in self._mapped]

    def call(self, *args: Word) -> asyncio.Future[Any]:
        """Send one command to the primary that has its key.

        SCRIPT goes to all, and the first one's reply comes back; INFO too, and brings the texts of all behind a run_id
        that is another one whenever a primary is another one, or was started again. One that does not answer counts
        with the run_id it had: others' shards need not wait for it, and its own are lost with its connection.

        Raises (when awaited) RedisReplyError or RedisUnavailable, at once ValueError for a command that means one
        server: it goes through `primaries`. Cancelling does not unsend the command.
        """
        assert self._loop is not None, "start() comes first"
        key = key_of(args)
        if key is not None:
            slot = slot_of(key)
            server = self._owners[slot]
        elif args[0] == "SCRIPT":
            return asyncio.ensure_future(self._everywhere(args))
        elif args[0] == "INFO":
            return asyncio.ensure_future(self._told_by_all(args))
        else:
            slot, server = 0, self._any_server()
        call = _Call(args, slot, self._loop.create_future())
        self._send(call, server)
        return call.answer

    async def subscribe(
        self, channel: str, on_message: Callable[[bytes], None], on_gap: Callable[[], None] = lambda: None
    ) -> ClusterSubscription:
        """As `RedisClient.subscribe`. Messages published anywhere in the cluster arrive."""
        subscription = ClusterSubscription(self._places, self._source.url, channel, on_message, on_gap)
        self._subscriptions.append(subscription)
        await subscription.start(self._connect_s)
        return subscription

    async def aclose(self) -> None:
        """Close every connection and subscription; pending calls get RedisUnavailable."""
        self._closed = True
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
        for subscription in self._subscriptions:
            await subscription.aclose()
        self._subscriptions.clear()
        waiting, self._waiting = self._waiting, []
        for call in waiting:
            call.fail(unsent("closed"))
        await self._close_servers()

    async def _close_servers(self) -> None:
        for task in self._retired:
            task.cancel()
        if self._retired:
            await asyncio.wait(self._retired)
        for server in self._servers.values():
            await server.node.aclose()

    # --- calls

    def _send(self, call: _Call, server: _Server | None) -> None:
        if server is None:
            self._doubted.set()
            call.fail(unsent(f"slot {call.slot} has no server"))
        else:
            server.node.call(*call.words).add_done_callback(partial(self._answered, call, server))

    def _answered(self, call: _Call, server: _Server, reply: asyncio.Future[Any]) -> None:
        error = reply.exception()
        if error is None:
            if not call.answer.done():
                call.answer.set_result(reply.result())
            return
        if isinstance(error, RedisReplyError):
            if error.code in _REDIRECTS:
                self._redirected(call, server, error)
                return
            if error.code == "CLUSTERDOWN":
                self._doubted.set()
        elif isinstance(error, RedisUnavailable) and (error.sent or not server.node.connected):
            self._doubted.set()
        call.fail(error)

    def _redirected(self, call: _Call, server: _Server, error: RedisReplyError) -> None:
        """Send it once more: at once where the named server is connected, else when the map has been renewed, unless
        that says that a primary was replaced: what the new one has is for the caller to look at first."""
        self._doubted.set()
        if call.again:
            call.fail(unsent(f"slot {call.slot} moved twice"))
            return
        try:
            place = read_redirect(error, server.place.host)
        except ValueError as unreadable:
            call.fail(unsent(str(unreadable)))
            return
        call.again, call.asking, call.target = True, error.code == "ASK", place
        named = self._servers.get(place)
        if named is not None and named.node.connected:
            if not call.asking:
                self._owners[call.slot] = named
            self._send_again(call)
        elif len(self._waiting) >= self._pending_max:
            call.fail(unsent(f"{self._pending_max} calls wait for the map"))
        else:
            self._waiting.append(call)
            self._awaited.set()

    def _send_again(self, call: _Call) -> None:
        """An ASK holds for the next command of the connection only: ASKING and the command are written together."""
        server = self._servers.get(call.target) if call.target is not None else None
        if server is None or self._closed:
            call.fail(unsent("closed" if self._closed else f"{call.target} has slot {call.slot}: not connected"))
            return
        if call.asking:
            server.node.call("ASKING").add_done_callback(_forget)
        self._send(call, server)

    def _any_server(self) -> _Server | None:
        return next((server for server in self._mapped if server.node.connected), next(iter(self._mapped), None))

    async def _everywhere(self, words: tuple[Word, ...]) -> Any:
        replies = await asyncio.gather(*(node.call(*words) for node in self.primaries()))
        return replies[0]

    async def _told_by_all(self, words: tuple[Word, ...]) -> bytes:
        asked = self._mapped
        replies = await asyncio.gather(*(server.node.call(*words) for server in asked), return_exceptions=True)
        told = []
        for server, reply in zip(asked, replies, strict=True):
            if not isinstance(reply, BaseException):
                told.append(reply)
                server.run_id = next(iter(_RUN_ID.findall(reply)), server.run_id)
            elif not server.run_id or not isinstance(reply, RedisUnavailable):
                raise reply
        ids = b" ".join(sorted(server.run_id for server in asked))
        together = sha1(ids, usedforsecurity=False).hexdigest().encode()
        return b"# Cluster\r\nrun_id:%s\r\n" % together + b"\r\n".join(told)

    # --- the map

    async def _keep(self) -> None:
        """Renew the map whenever a call doubts it or a primary is not connected; with growing pauses, but for calls
        that wait."""
        delay_s = BACKOFF_FIRST_S
        while True:
            if self.connected and not await _set_within(self._doubted, BACKOFF_MAX_S):
                delay_s = BACKOFF_FIRST_S
                continue
            await self._renew()
            await asyncio.sleep(_jittered(BACKOFF_FIRST_S))
            await _set_within(self._awaited, _jittered(delay_s))
            delay_s = min(delay_s * 2, BACKOFF_MAX_S)

    async def _renew(self) -> None:
        waiting, self._waiting = self._waiting, []
        self._doubted.clear()
        self._awaited.clear()
        before = self._mapped
        try:
            await self._learn({call.target for call in waiting if call.target is not None})
        except RedisError as error:
            log.debug("the map of the cluster: %s", error)
        finally:
            replaced = any(server not in self._mapped for server in before)
            for call in waiting:
                if replaced and not call.asking:
                    call.fail(unsent(f"slot {call.slot} has another primary"))
                else:
                    self._send_again(call)

    async def _learn(self, named: set[Place]) -> None:
        """Ask for the map, connect to its primaries and to the places `named`, let go of the others. What cannot be
        connected keeps its slots and is tried again at the next call; raises the first such error, a RedisError."""
        ranges = await self._source.ask(named, self._places())
        places = {place for _, _, place in ranges}
        wanted = places | named
        for place in wanted:
            if place not in self._servers:
                self._servers[place] = self._new_server(place)
        unopened = [server for server in self._servers.values() if not server.opened and server.place in wanted]
        opened = await asyncio.gather(*(_open(server) for server in unopened), return_exceptions=True)
        self._adopt(ranges, [self._servers[place] for place in sorted(places, key=str)])
        for place in self._servers.keys() - wanted:
            self._retire(self._servers.pop(place))
        for failed in opened:
            if isinstance(failed, BaseException):
                raise failed

    def _new_server(self, place: Place) -> _Server:
        server = _Server(place, self._open_node(self._source.url(place)))
        server.node.on_lost(partial(self._lost, server))
        return server

    def _lost(self, server: _Server) -> None:
        if server in self._mapped:
            self._doubted.set()
            self._tell_lost()

    def _tell_lost(self) -> None:
        for callback in self._on_lost:
            callback()

    def _adopt(self, ranges: Sequence[Range], mapped: list[_Server]) -> None:
        owners: list[_Server | None] = [None] * SLOTS
        for first, last, place in ranges:
            owners[first : last + 1] = [self._servers[place]] * (last + 1 - first)
        changed = mapped != self._mapped
        self._owners, self._mapped, self._covered = owners, mapped, None not in owners
        if changed:
            log.info("the cluster's primaries: %s", ", ".join(str(server.place) for server in mapped))
            self._tell_lost()

    def _retire(self, server: _Server) -> None:
        """Close a connection that nobody needs any more, once its calls have had their time."""
        task = asyncio.create_task(_close_later(server.node, self._call_s), name=f"redis cluster leaves {server.place}")
        self._retired.add(task)
        task.add_done_callback(self._retired.discard)

    def _places(self) -> list[Place]:
        """The primaries that are connected now."""
        return [server.place for server in self._mapped if server.node.connected]


async def _open(server: _Server) -> None:
    await server.node.start()
    server.opened = True


async def _close_later(node: Node, after_s: float) -> None:
    try:
        await asyncio.sleep(after_s)
    finally:
        await node.aclose()


async def _set_within(event: asyncio.Event, seconds: float) -> bool:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()


def _forget(reply: asyncio.Future[Any]) -> None:
    """An ASKING that fails fails the command behind it too: nobody needs to be told twice."""
    reply.exception()


def _jittered(delay_s: float) -> float:
    """Between half and the whole delay, so that the workers of a host do not ask in one instant."""
    return delay_s * random.uniform(0.5, 1.0)  # noqa: S311  (no secret)
