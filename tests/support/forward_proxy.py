"""A forward proxy for tests: CONNECT tunnels and absolute-form requests, with Basic authentication."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import re
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

USER, PASSWORD = "gate way", "p:w@1%"
ENCODED = "gate%20way:p%3Aw%401%25"
_LENGTH = re.compile(rb"\r\ncontent-length: (\d+)\r\n", re.IGNORECASE)
_AUTHORIZATION = re.compile(rb"\r\nproxy-authorization: ([^\r\n]*)", re.IGNORECASE)
REFUSED = b"HTTP/1.1 407 Proxy Authentication Required\r\nproxy-authenticate: Basic\r\ncontent-length: 0\r\n\r\n"


class ForwardProxy:
    """`async with ForwardProxy() as proxy`: `port`, `url`, `targets` (of all requests), `connections`."""

    def __init__(self, port: int = 0, hosts: dict[str, int] | None = None) -> None:
        """`hosts`: names that only the proxy knows, and their ports here."""
        self.port = port
        self._hosts = hosts or {}
        self.targets: list[str] = []
        self.connections = self.open = 0
        self.silent = False
        """Whether it takes connections and answers nothing."""
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://{ENCODED}@127.0.0.1:{self.port}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        self.open += 1
        try:
            await self._requests(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self.open -= 1
            self._tasks.discard(task)
            writer.transport.abort()

    async def _requests(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        wanted = b"Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode())
        back: asyncio.Task[None] | None = None
        onward: asyncio.StreamWriter | None = None
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                first, _, rest = head.partition(b"\r\n")
                method, target, _ = first.decode("ascii").split(" ")
                self.targets.append(target)
                if self.silent:
                    await reader.read(-1)
                    return
                given = _AUTHORIZATION.search(head)
                if given is None or given[1] != wanted:
                    writer.write(REFUSED)
                    continue
                url = urlsplit(f"//{target}" if method == "CONNECT" else target)
                if onward is None:
                    from_there, onward = await self._reach(url.hostname or "", url.port or 80)
                    back = asyncio.create_task(_pump(from_there, writer, onward))
                if method == "CONNECT":
                    writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
                    await _pump(reader, onward, writer)
                    return
                length = _LENGTH.search(head)
                body = await reader.readexactly(int(length[1])) if length else b""
                onward.write(f"{method} {url.path} HTTP/1.1\r\n".encode() + _AUTHORIZATION.sub(b"", b"\r\n" + rest)[2:])
                onward.write(body)
                await onward.drain()
        finally:
            if onward is not None:
                onward.transport.abort()
            if back is not None:
                back.cancel()
                await asyncio.gather(back, return_exceptions=True)

    async def _reach(self, host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if host in self._hosts:
            host, port = "127.0.0.1", self._hosts[host]
        return await asyncio.open_connection(host, port)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, other: asyncio.StreamWriter) -> None:
    """Carry bytes until one side ends; then both are closed."""
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    for each in (writer, other):
        each.close()
