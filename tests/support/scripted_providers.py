"""Providers that behave to the byte and to the moment as a test says: one server, a script for each by the path's name.

A script is a coroutine that gets one request (`Turn`); when it returns, the connection is closed. Must not: know the
gateway, but that it closes a connection that it does not want any more (`Turn.left`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from providers.seam import TAG

CLOSES = "connection: close\r\n"
"""On every answer: no request shall meet a connection that is about to end."""
EVENT_HEAD = (
    f"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n{CLOSES}transfer-encoding: chunked\r\n\r\n".encode()
)
ANCHOR = re.compile(f"<{TAG}>(.*)</{TAG}>", re.DOTALL)


@dataclass(eq=False)
class Turn:
    """One request at one provider, and its answer as the script gives it. `left_at`: monotonic seconds when the gateway
    had closed the connection."""

    provider: str
    target: str
    body: dict[str, Any]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    left: asyncio.Event = field(default_factory=asyncio.Event)
    left_at: float = 0.0
    said: str = ""
    _begun: bool = False

    async def raw(self, data: bytes) -> None:
        """A piece of a chunked event stream; the head goes before the first."""
        if not self._begun:
            self._begun = True
            self.writer.write(EVENT_HEAD)
        if data:
            self.writer.write(b"%x\r\n%b\r\n" % (len(data), data))
        with contextlib.suppress(ConnectionError):
            await self.writer.drain()

    async def event(self, value: dict[str, Any], name: str = "") -> None:
        """One event of a stream."""
        line = f"event: {name}\n" if name else ""
        await self.raw(f"{line}data: {json.dumps(value)}\n\n".encode())

    async def chunk(self, delta: dict[str, Any], finish: str | None = None, **more: Any) -> None:
        """A chunk of OpenAI's wire."""
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        head = {"id": f"id-{self.provider}", "object": "chat.completion.chunk", "created": 1 + len(self.provider)}
        await self.event({**head, "model": f"model-{self.provider}", "choices": [choice], **more})

    async def say(self, *texts: str, **more: Any) -> None:
        """Chunks with text, the first with the role."""
        for text in texts:
            role = {} if self.said else {"role": "assistant"}
            self.said += text
            await self.chunk({**role, "content": text}, **more)

    async def finish(self, prompt: int = 1000, output: int = 500) -> None:
        """The finish, usage, `[DONE]` and the body's end."""
        await self.chunk({}, "stop")
        usage = {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}
        await self.event({"id": "u", "object": "chat.completion.chunk", "choices": [], "usage": usage})
        await self.raw(b"data: [DONE]\n\n")
        self.writer.write(b"0\r\n\r\n")

    async def status(self, status: int, value: dict[str, Any]) -> None:
        """An answer that is no stream."""
        body = json.dumps(value).encode()
        head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n{CLOSES}content-length: {len(body)}\r\n\r\n"
        self.writer.write(head.encode() + body)
        await self.writer.drain()

    def reset(self) -> None:
        """End the connection with a TCP reset."""
        raw = self.writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    @property
    def anchor(self) -> str:
        """The words that a continuation by instruction was asked to begin with."""
        found = ANCHOR.search(self.body["messages"][-1]["content"])
        assert found is not None, self.body["messages"][-1]
        return found[1]

    async def watch(self) -> None:
        """Note when the gateway closes the connection."""
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(65536):
                pass
        self.left_at = time.monotonic()
        self.left.set()


Script = Callable[[Turn], Awaitable[None]]


@contextlib.asynccontextmanager
async def scripted(port: int, **scripts: Script) -> AsyncIterator[list[Turn]]:
    """Serve each provider by its script at `/<name>/v1/...`; yields the requests as they come. A script that fails, and
    a provider without one that is asked, fail the test."""
    turns: list[Turn] = []
    failures: list[BaseException] = []
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await answer(reader, writer)
        except (asyncio.CancelledError, asyncio.IncompleteReadError, ConnectionError):
            pass  # the test is over, or the gateway let a connection go that it had no use for
        except (AssertionError, KeyError, IndexError, TypeError) as failure:
            failures.append(failure)
        finally:
            tasks.discard(task)
            writer.transport.abort() if writer.transport.is_closing() else writer.close()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.removesuffix("\r\n\r\n").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        body = await reader.readexactly(int(headers["content-length"]))
        target = first.split(" ")[1]
        provider = target.split("/")[1]
        turn = Turn(provider, target, json.loads(body), reader, writer)
        turns.append(turn)
        watching = asyncio.create_task(turn.watch())
        try:
            await scripts[provider](turn)
            with contextlib.suppress(ConnectionError):
                await writer.drain()
        finally:
            watching.cancel()

    server = await asyncio.start_server(serve, "127.0.0.1", port)
    try:
        yield turns
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if failures:
        raise failures[0]
