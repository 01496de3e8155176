"""The bench's provider: a raw protocol on uvloop that writes prepared bytes, cheap enough never to be the bottleneck.

Streams of one pace share one timer: a wheel whose slots spread them evenly over the interval, one slot a tick. A stream
whose reader lags is skipped, so that an overloaded gateway is seen as a lower pace instead of as a growing buffer.
Must not: parse more of a request than its length, `stream` and the plan in `user`.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import sys
from typing import cast

import uvloop

from loadtests.bench import wire

_LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.IGNORECASE)
_PLAN = re.compile(rb'"user":\s*"chunks=(\d+) rate=(\d+)"')
_END = b'"user":"%b"' % wire.END.encode()
_STREAM = re.compile(rb'"stream":\s*true')
TICK_S = 0.001
BUFFER_BYTES = 16 * 1024
SEND_BUFFER_BYTES = 32 * 1024


class Wheel:
    """All streams of one pace. `rate` in chunks per second and stream; 0: one chunk a turn of the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, rate: int) -> None:
        self._loop = loop
        count = max(1, round(1 / rate / TICK_S)) if rate else 1
        self._slots: list[dict[Connection, None]] = [{} for _ in range(count)]
        self._every = 1 / rate / count if rate else 0.0
        self._next = self._at = self._size = 0
        self._due = 0.0
        self._turning = False

    def add(self, stream: Connection) -> None:
        """Put a stream into the slot whose turn it is to get one."""
        slot = self._slots[self._next % len(self._slots)]
        self._next += 1
        slot[stream] = None
        stream.slot = slot
        self._size += 1
        if not self._turning:
            self._turning = True
            self._due = self._loop.time()
            self._again()

    def remove(self, stream: Connection) -> None:
        """The stream is over."""
        if stream.slot is not None:
            del stream.slot[stream]
            stream.slot = None
            self._size -= 1

    def end(self) -> None:
        """Every stream ends when its turn comes."""
        for slot in self._slots:
            for stream in slot:
                stream.end()

    def _again(self) -> None:
        if self._every:
            self._due += self._every
            self._loop.call_at(self._due, self._tick)
        else:
            self._loop.call_soon(self._tick)

    def _tick(self) -> None:
        slot = self._slots[self._at % len(self._slots)]
        self._at += 1
        for stream in list(slot):
            stream.step()
        self._turning = self._size > 0
        if self._turning:
            self._again()


class Connection(asyncio.Protocol):
    """One connection of the gateway: requests in, answers out, one at a time."""

    def __init__(self, wheels: dict[int, Wheel], loop: asyncio.AbstractEventLoop) -> None:
        self._wheels, self._loop = wheels, loop
        self._buffer = b""
        self._paused = False
        self._wheel: Wheel | None = None
        self._index = self._chunks = 0
        self.slot: dict[Connection, None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but its class
        self._transport.set_write_buffer_limits(high=BUFFER_BYTES)
        self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._wheel is not None:
            self._wheel.remove(self)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False

    def data_received(self, data: bytes) -> None:
        self._buffer = self._buffer + data if self._buffer else data
        while self._wheel is None and self._request():
            pass

    def _request(self) -> bool:
        """Answer one request, if it is whole."""
        end = self._buffer.find(b"\r\n\r\n") + 4
        length = _LENGTH.search(self._buffer, 0, end) if end > 3 else None
        if length is None or len(self._buffer) < end + int(length[1]):
            return False
        body = self._buffer[end : end + int(length[1])]
        self._buffer = self._buffer[end + len(body) :]
        if _END in body:
            for wheel in self._wheels.values():
                wheel.end()
        if _STREAM.search(body) is None:
            self._transport.write(wire.ANSWER)
            return True
        plan = _PLAN.search(body)
        self._chunks, rate = (int(plan[1]), int(plan[2])) if plan else (2, 0)
        self._index = 1
        self._transport.write(wire.STREAM_HEAD + wire.ROLE + wire.CHUNKS[0])
        self._wheel = self._wheels.get(rate) or self._wheels.setdefault(rate, Wheel(self._loop, rate))
        self._wheel.add(self)
        return False

    def end(self) -> None:
        """Let the next step be the last."""
        self._chunks = 0

    def step(self) -> None:
        """Write the next chunk, or the end."""
        if self._paused:
            return
        index = self._index
        if index < self._chunks:
            self._transport.write(wire.CHUNKS[index % len(wire.CHUNKS)])
            self._index = index + 1
            return
        assert self._wheel is not None
        self._wheel.remove(self)
        self._wheel = None
        self._transport.write(wire.last(index))
        if self._buffer:
            self._request()


async def serve(certificate: str = "", key: str = "") -> None:
    """Listen on a free port, and with a certificate on another for TLS; say which on stdout; serve until stdin ends
    (its owner is gone)."""
    loop = asyncio.get_running_loop()
    wheels: dict[int, Wheel] = {}
    contexts: list[ssl.SSLContext | None] = [None]
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        contexts.append(context)
    servers = [
        await loop.create_server(lambda: Connection(wheels, loop), "127.0.0.1", 0, backlog=4096, ssl=context)
        for context in contexts
    ]
    print(*(server.sockets[0].getsockname()[1] for server in servers), flush=True)
    over = asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), over.set)
    await over.wait()


if __name__ == "__main__":
    uvloop.run(serve(*sys.argv[1:]))
