"""A TCP proxy that spoils one link: delays, stalls, cuts, resets, half-closes, drips, or loses replies only.

It forwards bytes in order like the network it stands for; it never changes, invents or reorders one. Bytes that were
taken before their sender died are still delivered, as a packet under way would be.
Must not: know what the bytes mean, or decide when to spoil what (`faults` does).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

READ_BYTES = 64 * 1024
_RESET = struct.pack("ii", 1, 0)


@dataclass(slots=True)
class Toxic:
    """What is wrong with the link now. Times in seconds, `up` is from client to server. All zero: nothing.

    `stalled`: nothing moves. `lose_replies`: what the server says is dropped, and such a connection stays broken.
    `refuse`: new connections are reset. `drip_bytes`: so many bytes per `drip_s`, 0 is all at once.
    """

    up_s: float = 0.0
    down_s: float = 0.0
    stalled: bool = False
    lose_replies: bool = False
    refuse: bool = False
    drip_bytes: int = 0
    drip_s: float = 0.01


@dataclass(eq=False, slots=True)
class _Pair:
    """One connection of the client and its connection to the server."""

    client: tuple[asyncio.StreamReader, asyncio.StreamWriter]
    server: tuple[asyncio.StreamReader, asyncio.StreamWriter]
    toxic: Toxic
    deaf: bool = False
    """Replies were dropped on it: what came after them would be no stream any more."""
    delivered: asyncio.Event = field(default_factory=asyncio.Event)
    """Not set while a direction holds bytes back which it has taken."""
    _holding: int = 0

    def hold(self, change: int) -> None:
        """A direction has taken bytes (1), or has delivered or lost them (-1)."""
        self._holding += change
        if self._holding:
            self.delivered.clear()
        else:
            self.delivered.set()


@dataclass
class Link:
    """One listening port in front of one server. `counts` tells how often the link really spoilt something."""

    name: str
    target: int
    host: str = "127.0.0.1"
    port: int = 0
    toxic: Toxic = field(default_factory=Toxic)
    counts: Counter[str] = field(default_factory=Counter)
    _server: asyncio.Server | None = None
    _pairs: set[_Pair] = field(default_factory=set)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _flowing: asyncio.Event = field(default_factory=asyncio.Event)

    async def start(self) -> None:
        """Listen on a free port of loopback."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=READ_BYTES)
        self.port = self._server.sockets[0].getsockname()[1]

    async def aclose(self) -> None:
        """Stop listening and end every connection."""
        self.calm()
        if self._server is not None:
            self._server.close()
        self.cut(reset=True)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- what can be done to the link

    def spoil(self, toxic: Toxic) -> None:
        """From now on, on every connection, old and new."""
        self.toxic = toxic
        for pair in self._pairs:
            pair.toxic = toxic
        self._set_flow()

    def spoil_open(self, toxic: Toxic) -> int:
        """On the connections that are open now, for as long as they live; new ones are sound. How many there were."""
        for pair in self._pairs:
            pair.toxic = toxic
        self._set_flow()
        return len(self._pairs)

    def calm(self) -> None:
        """Nothing is wrong any more; connections that lost replies are cut, since they cannot go on."""
        self.spoil(Toxic())
        for pair in list(self._pairs):
            if pair.deaf:
                self._end(pair, reset=True)

    def cut(self, *, reset: bool) -> int:
        """End every open connection, by FIN or RST on both sides. How many there were."""
        pairs = list(self._pairs)
        for pair in pairs:
            self._end(pair, reset=reset)
        self.counts["cut"] += len(pairs)
        return len(pairs)

    def half_close(self, side: Literal["client", "server"]) -> int:
        """Tell one side, on every open connection, that the other has nothing more to say. How many there were."""
        for pair in self._pairs:
            with contextlib.suppress(OSError, RuntimeError):
                (pair.client if side == "client" else pair.server)[1].write_eof()
        self.counts["half-closed"] += len(self._pairs)
        return len(self._pairs)

    @property
    def open(self) -> int:
        """Connections that are open now."""
        return len(self._pairs)

    # --- forwarding

    def _set_flow(self) -> None:
        """Wake what is stalled; each direction looks at its own connection again."""
        self._flowing.set()
        self._flowing = asyncio.Event()

    def _end(self, pair: _Pair, *, reset: bool) -> None:
        for _, writer in (pair.client, pair.server):
            _close(writer, reset=reset)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.counts["connections"] += 1
        with contextlib.suppress(asyncio.CancelledError):  # aclose
            if self.toxic.refuse:
                self.counts["refused"] += 1
                _close(writer, reset=True)
                return
            try:
                server = await asyncio.open_connection(self.host, self.target, limit=READ_BYTES)
            except OSError:
                _close(writer, reset=True)
                return
            await self._join(_Pair((reader, writer), server, self.toxic))

    async def _join(self, pair: _Pair) -> None:
        self._pairs.add(pair)
        try:
            up = self._pump(pair, pair.client[0], pair.server[1], up=True)
            down = self._pump(pair, pair.server[0], pair.client[1], up=False)
            await asyncio.gather(up, down)
        finally:
            self._pairs.discard(pair)
            self._end(pair, reset=False)

    async def _pump(self, pair: _Pair, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, up: bool) -> None:
        """Forward until the end of one direction, and hand that end on."""
        back = pair.client[1] if up else pair.server[1]
        while True:
            try:
                data = await reader.read(READ_BYTES)
            except OSError:  # it was reset: so is the other side
                _close(writer, reset=True)
                return
            pair.hold(1)
            try:
                kept = await self._spoilt(pair, data, up=up)
                if not data:
                    with contextlib.suppress(OSError, RuntimeError):
                        writer.write_eof()
                    return
                if kept:
                    await self._write(pair.toxic, writer, data)
            except OSError:
                break
            finally:
                pair.hold(-1)
        await pair.delivered.wait()  # the other direction may still have to deliver what it took
        _close(back, reset=True)

    async def _spoilt(self, pair: _Pair, data: bytes, *, up: bool) -> bool:
        """Wait as the link makes `data` wait; False where it is lost."""
        while pair.toxic.stalled:
            self.counts["stalled"] += 1
            await self._flowing.wait()
        delay = pair.toxic.up_s if up else pair.toxic.down_s
        if delay:
            self.counts["delayed"] += 1
            await asyncio.sleep(delay)
        if not up and data and (pair.deaf or pair.toxic.lose_replies):
            pair.deaf = True
            self.counts["replies lost"] += 1
            return False
        return True

    async def _write(self, toxic: Toxic, writer: asyncio.StreamWriter, data: bytes) -> None:
        if not toxic.drip_bytes:
            writer.write(data)
            await writer.drain()
            return
        self.counts["dripped"] += 1
        for at in range(0, len(data), toxic.drip_bytes):
            writer.write(data[at : at + toxic.drip_bytes])
            await writer.drain()
            await asyncio.sleep(toxic.drip_s)


def _close(writer: asyncio.StreamWriter, *, reset: bool) -> None:
    """Close at once, by RST, or after what is written, by FIN."""
    if not reset:
        writer.close()
        return
    plain = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()
