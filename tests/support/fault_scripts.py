"""Every fault of `tests.support.fault_table` as bytes of a provider's, and when they come.

Must not: know the gateway, but for the size of the frames that it takes.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from tests.support.fault_table import Form, Point

FRAME_BYTES_MAX = 65_536
"""Of the gateway that calls."""
PACE_S = 0.15
"""Between two pieces of what comes slowly."""
ANSWER = {
    "id": "c1",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello world"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13},
}
TEXT = "Hello world"


def _frame(delta: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
    choices = [] if more else [{"index": 0, "delta": delta, "finish_reason": finish}]
    chunk = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": choices, **more}
    return b"data: %b\n\n" % json.dumps(chunk).encode()


ROLE = _frame({"role": "assistant", "content": ""})
WORDS = _frame({"content": "Hello"}) + _frame({"content": " world"})
END = _frame({}, "stop") + _frame({}, usage=ANSWER["usage"]) + b"data: [DONE]\n\n"
WHOLE = json.dumps(ANSWER).encode()


@dataclass
class Call:
    """One request of the gateway's, and the means to answer it. `heard` is set once the client has the words."""

    form: Form
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    heard: asyncio.Event

    async def raw(self, data: bytes) -> None:
        """These bytes."""
        self.writer.write(data)
        await self.writer.drain()

    async def head(self, kind: str = "") -> None:
        """A 200 of the right type (or `kind`), whose body comes in chunks."""
        kind = kind or ("text/event-stream" if self.form == "stream" else "application/json")
        head = b"HTTP/1.1 200 OK\r\nconnection: close\r\ntransfer-encoding: chunked\r\ncontent-type: %b\r\n\r\n"
        await self.raw(head % kind.encode())

    async def part(self, data: bytes) -> None:
        """A part of the body."""
        await self.raw(b"%x\r\n%b\r\n" % (len(data), data))

    async def end(self) -> None:
        """The body's end."""
        await self.raw(b"0\r\n\r\n")

    async def begin(self, point: Point) -> None:
        """All that comes before the fault."""
        if point == "headers":
            return
        await self.head()
        if self.form == "whole":
            await self.part(WHOLE[:60])
            return
        await self.part(ROLE)
        if point == "after":
            await self.part(WORDS)
            await self.heard.wait()

    async def hang(self) -> None:
        """Nothing, until the gateway has had enough."""
        await self.reader.read()

    async def drip(self, write: Callable[[bytes], Awaitable[None]], data: bytes) -> None:
        """The same a few times a second, until the gateway has had enough."""
        gone = asyncio.ensure_future(self.reader.read())
        try:
            while not (await asyncio.wait({gone}, timeout=PACE_S))[0]:
                await write(data)
        finally:
            gone.cancel()

    def reset(self) -> None:
        """Close with a TCP reset."""
        raw = self.writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def answer(self) -> None:
        """What a good provider says."""
        await self.head()
        await self.part(ROLE + WORDS + END if self.form == "stream" else WHOLE)
        await self.end()


Script = Callable[[Call, Point], Awaitable[None]]


def _status(line: str, code: str | None = None, *headers: str) -> Script:
    """A refusal."""
    body = json.dumps({"error": {"message": "No.", "type": "some_error", "code": code}})
    more = "".join(f"{header}\r\n" for header in headers)
    more += f"connection: close\r\ncontent-length: {len(body)}\r\n"
    head = f"HTTP/1.1 {line}\r\ncontent-type: application/json\r\n{more}\r\n"

    async def script(call: Call, point: Point) -> None:
        await call.raw((head + body).encode())

    return script


def _in_band(code: int | None = None) -> Script:
    """An error inside a 200."""
    body = json.dumps({"error": {"message": "No.", "type": "some_error", "code": code}}).encode()

    async def script(call: Call, point: Point) -> None:
        if call.form == "whole":
            await call.head()
            await call.part(body)
        else:
            await call.begin(point)
            await call.part(b"data: %b\n\n" % body)
        await call.end()

    return script


async def _hang(call: Call, point: Point) -> None:
    await call.begin(point)
    await call.hang()


async def _cut(call: Call, point: Point) -> None:
    await call.begin(point)


async def _reset(call: Call, point: Point) -> None:
    await call.begin(point)
    call.reset()


async def _ends_early(call: Call, point: Point) -> None:
    await call.begin(point)
    await call.end()


async def _empty(call: Call, point: Point) -> None:
    await call.head()
    await call.end()


async def _wrong_type(call: Call, point: Point) -> None:
    await call.head("text/html")
    await call.part(b"<html>Sign in</html>")
    await call.end()


async def _garbage(call: Call, point: Point) -> None:
    if point == "headers":
        await call.raw(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
        return
    await call.begin(point)
    await call.part(b'data: {"choices": [}\n\n')
    await call.end()


async def _huge_head(call: Call, point: Point) -> None:
    await call.raw(b"HTTP/1.1 200 OK\r\nx-filler: " + b"x" * 1_000_000)
    await call.hang()


async def _huge_frame(call: Call, point: Point) -> None:
    """In two pieces: the first, with what came before it, is above the bound, and the frame itself is not yet."""
    data = b'data: {"x": "' + b"x" * 3 * FRAME_BYTES_MAX
    await call.begin(point)
    await call.part(data[: FRAME_BYTES_MAX - 9])
    await asyncio.sleep(PACE_S)
    await call.part(data[FRAME_BYTES_MAX - 9 :])
    await call.hang()


async def _drip(call: Call, point: Point) -> None:
    if point == "headers":
        await call.raw(b"HTTP/1.1 200 OK\r\nx-filler: ")
        await call.drip(call.raw, b"x")
        return
    await call.begin(point)
    await call.drip(call.part, b": still here\n\n" if call.form == "stream" else b" ")


async def _drip_in_time(call: Call, point: Point) -> None:
    if call.form == "stream":
        await call.begin(point)
    else:
        await call.head()
    rest = WHOLE if call.form == "whole" else END if point == "after" else WORDS + END
    for at in range(0, len(rest), 40):
        await call.part(rest[at : at + 40])
        await asyncio.sleep(0.02)  # a drip is what it is
    await call.end()


SCRIPTS: dict[str, Script] = {
    "400": _status("400 Bad Request"),
    "401": _status("401 Unauthorized"),
    "402": _status("402 Payment Required"),
    "403": _status("403 Forbidden"),
    "404": _status("404 Not Found", "model_not_found"),
    "408": _status("408 Request Timeout"),
    "422": _status("422 Unprocessable Content"),
    "429": _status("429 Too Many Requests"),
    "429, retry-after 2 s": _status("429 Too Many Requests", None, "retry-after: 2"),
    "429, retry-after 30 s": _status("429 Too Many Requests", None, "retry-after: 30"),
    "500": _status("500 Internal Server Error"),
    "503": _status("503 Service Unavailable"),
    "503, retry-after 30 s": _status("503 Service Unavailable", None, "retry-after: 30"),
    "prompt too long": _status("400 Bad Request", "context_length_exceeded"),
    "prompt too long, route falls back on it": _status("400 Bad Request", "context_length_exceeded"),
    "content refused": _status("400 Bad Request", "content_filter"),
    "content refused, route falls back on it": _status("400 Bad Request", "content_filter"),
    "redirect": _status("302 Found", None, "location: http://127.0.0.1:1/"),
    "hang": _hang,
    "cut": _cut,
    "reset": _reset,
    "ends early": _ends_early,
    "empty 200": _empty,
    "garbage": _garbage,
    "wrong content type": _wrong_type,
    "in-band error": _in_band(),
    "in-band error, 429": _in_band(429),
    "in-band error, 401": _in_band(401),
    "in-band error, 400": _in_band(400),
    "huge head": _huge_head,
    "huge frame": _huge_frame,
    "slow drip without end": _drip,
    "slow drip, in time": _drip_in_time,
}
