"""A client on a bare socket: it sees each frame and comment when it comes, and can leave or stop reading at any point.

Must not: be forgiving. What is not HTTP/1.1 with whole SSE frames fails the test.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from tests.support.gateway import Gateway, Key

READ_S = 30.0
COMMENT = "comment"
DONE = "[DONE]"


def ask(say: str = "Say something short.", model: str = "gpt-4o-mini", **fields: Any) -> dict[str, Any]:
    """A chat request's fields."""
    return {"model": model, "messages": [{"role": "user", "content": say}], **fields}


@dataclass
class Frame:
    """One SSE frame: `kind` is data, comment or [DONE]; `at` the monotonic second it was read."""

    kind: str
    at: float
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def content(self) -> str:
        """The text that this frame carries for all its choices."""
        choices = self.data.get("choices") or []
        return "".join((each.get("delta") or {}).get("content") or "" for each in choices)

    @property
    def finishes(self) -> list[tuple[int, str]]:
        """(choice, finish_reason) of the choices that end in this frame."""
        choices = self.data.get("choices") or []
        return [(each["index"], each["finish_reason"]) for each in choices if each.get("finish_reason")]


@dataclass
class RawCall:
    """One POST on its own connection. `status` and `headers` (lower case) are there after `head()`."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    frames: list[Frame] = field(default_factory=list)
    unread: bytes = b""

    async def head(self) -> None:
        """Read the status line and the headers."""
        raw = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), READ_S)
        first, *lines = raw.decode("latin-1").rstrip("\r\n").split("\r\n")
        self.status = int(first.split()[1])
        self.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}

    async def body(self) -> bytes:
        """The rest of the response's body."""
        length = self.headers.get("content-length")
        if length is not None:
            return await asyncio.wait_for(self.reader.readexactly(int(length)), READ_S)
        return b"".join([part async for part in self._chunks()])

    async def _chunks(self) -> AsyncIterator[bytes]:
        assert self.headers["transfer-encoding"] == "chunked"
        while True:
            size = int(await asyncio.wait_for(self.reader.readline(), READ_S), 16)
            data = await asyncio.wait_for(self.reader.readexactly(size + 2), READ_S)
            assert data.endswith(b"\r\n")
            if not size:
                return
            yield data[:-2]

    async def events(self) -> AsyncIterator[Frame]:
        """Frames as they come, to the end of the body; every one also stays in `frames`."""
        for frame in self._unseen():
            yield frame
        async with contextlib.aclosing(self._chunks()) as chunks:  # type: ignore[type-var]
            async for data in chunks:
                self.unread += data
                for frame in self._unseen():
                    yield frame
        assert self.unread == b""

    def _unseen(self) -> Iterator[Frame]:
        """The frames at hand; who stops in their midst finds the others later."""
        while b"\n\n" in self.unread:
            frame, _, self.unread = self.unread.partition(b"\n\n")
            self.frames.append(_frame(frame))
            yield self.frames[-1]

    async def rest(self) -> list[Frame]:
        """Read to the end; all frames."""
        async for _ in self.events():
            pass
        return self.frames

    async def until_content(self, count: int = 1) -> None:
        """Read until so many frames with content have come."""
        async for _ in self.events():
            if sum(bool(frame.content) for frame in self.frames) >= count:
                return
        raise AssertionError("the stream ended first")

    @property
    def text(self) -> str:
        """All content read so far."""
        return "".join(frame.content for frame in self.frames)

    def leave(self, how: str = "fin") -> int:
        """Close the connection with a FIN or a RST; the moment, in ms of the wall clock."""
        connected = self.writer.get_extra_info("socket")
        if how == "rst":
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        at = time.time_ns() // 1_000_000
        self.writer.transport.abort() if how == "rst" else self.writer.close()
        return at


def _frame(raw: bytes) -> Frame:
    now = time.monotonic()
    if raw.startswith(b":"):
        return Frame(COMMENT, now)
    assert raw.startswith(b"data: "), raw
    payload = raw.removeprefix(b"data: ")
    if payload == b"[DONE]":
        return Frame(DONE, now)
    return Frame("data", now, json.loads(payload))


def request_bytes(gateway: Gateway, key: Key, body: bytes) -> bytes:
    """The HTTP request of a chat call."""
    host = urlsplit(gateway.url).netloc
    return (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {key.text}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    ).encode() + body


@contextlib.asynccontextmanager
async def post(gateway: Gateway, key: Key, fields: dict[str, Any] | bytes) -> AsyncIterator[RawCall]:
    """Send a chat call; nothing of the answer is read yet. The connection is closed at the end."""
    body = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    try:
        writer.write(request_bytes(gateway, key, body))
        await writer.drain()
        yield RawCall(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def connected_from(gateway: Gateway, port: int) -> bool:
    """Whether a process of this instance still has the connection from that port of this machine."""
    return connected_to(gateway, port) is not None


def connected_to(gateway: Gateway, port: int) -> int | None:
    """The process of this instance that has the connection from that port of this machine."""
    for each in psutil.net_connections("tcp4"):
        if each.raddr and each.raddr[1] == port and each.laddr and each.laddr[1] == gateway.port:
            return each.pid
    return None


class Lateness:
    """How late this process and machine were at the worst while it was entered, in ms: the noise of a measurement.

    With a gateway also what its processes waited for a free core (Linux says so), which is the machine's doing.
    """

    def __init__(self, gateway: Gateway | None = None) -> None:
        self._pids: list[int] = []
        if gateway is not None:
            for module in ("gateway.worker", "loadtests.simulated_provider"):
                self._pids += gateway.children(module)

    async def __aenter__(self) -> Lateness:
        self.ms = 0.0
        self._waited_ms = sum(map(_waited_ms, self._pids))
        self._task = asyncio.create_task(self._watch())
        return self

    async def _watch(self) -> None:
        while True:
            due = time.monotonic() + 0.005
            await asyncio.sleep(0.005)
            self.ms = max(self.ms, (time.monotonic() - due) * 1000)

    async def __aexit__(self, *exc: object) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self.ms += max(0.0, sum(map(_waited_ms, self._pids)) - self._waited_ms)


def _waited_ms(pid: int) -> float:
    """How long the process was ready to run without a core, since it began; 0 where the system does not say."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1_000_000
    except (OSError, IndexError):
        return 0.0
