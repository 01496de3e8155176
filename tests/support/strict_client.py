"""A client that hides nothing: HTTP/1.1 over a bare socket, and the rules that every stream of ours keeps.

It reads exactly one answer a call and leaves the connection where that answer ended, so that a byte too many or too few
shows at the next request on it.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

SECONDS = 30.0
REQUEST_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
ERROR_FIELDS = ["message", "type", "param", "code"]
INSIDES = ("Traceback", "site-packages", ".py", "asyncio", "SELECT ", "msgspec", "redis", "postgres", "litestar")


@dataclass
class Answer:
    """One HTTP answer. `parts` are the chunks of a chunked body as they were framed."""

    status: int
    headers: dict[str, str]
    body: bytes = b""
    parts: list[bytes] = field(default_factory=list)

    @property
    def request_id(self) -> str:
        """The request's id, which every answer under /v1 has and which is always ours."""
        assert REQUEST_ID.fullmatch(self.headers["x-request-id"])
        return self.headers["x-request-id"]

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    def error(self) -> dict[str, Any]:
        """The error object, after the checks that every error answer of ours passes."""
        assert self.headers["content-type"].startswith("application/json")
        assert len(self.headers["x-request-id"]) == 36
        body = self.json()
        assert list(body) == ["error"]
        return well_formed(body["error"])


def well_formed(error: dict[str, Any]) -> dict[str, Any]:
    """An error object with OpenAI's four fields (and `metadata` at most) that shows nothing of our insides."""
    assert [name for name in error if name != "metadata"] == ERROR_FIELDS
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    assert error["param"] is None or isinstance(error["param"], str)
    assert error["code"] is None or isinstance(error["code"], str)
    assert not [word for word in INSIDES if word.lower() in error["message"].lower()]
    return error


class StrictClient:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, data: bytes) -> None:
        """Write bytes as they are."""
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self, method: str = "GET") -> Answer:
        """Read one answer. Raises IncompleteReadError when the connection ends inside it."""
        async with asyncio.timeout(SECONDS):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            pairs = [line.split(": ", 1) for line in head[1:] if line]
            headers = {name.lower(): value for name, value in pairs}
            assert len(headers) == len(pairs), "a header was sent twice"
            found = Answer(int(head[0].split(" ", 2)[1]), headers)
            if method == "HEAD" or found.status in (204, 304):
                return found
            if headers.get("transfer-encoding") == "chunked":
                while part := await self._chunk():
                    found.parts.append(part)
                found.body = b"".join(found.parts)
            else:
                found.body = await self.reader.readexactly(int(headers["content-length"]))
            return found

    async def _chunk(self) -> bytes:
        size = int((await self.reader.readuntil(b"\r\n"))[:-2], 16)
        data = await self.reader.readexactly(size + 2)
        assert data.endswith(b"\r\n")
        return data[:-2]

    async def request(self, method: str, path: str, key: str | None = None, body: bytes = b"", **more: str) -> Answer:
        """Send one request and read its answer. `more` are headers, with `_` for `-`."""
        headers = {"host": "gateway", **{name.replace("_", "-"): value for name, value in more.items()}}
        if key is not None:
            headers["authorization"] = f"Bearer {key}"
        if body:
            headers["content-length"] = str(len(body))
            headers.setdefault("content-type", "application/json")
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        await self.send(f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode("latin-1") + body)
        return await self.answer(method)

    async def chat(self, key: str | None, body: dict[str, Any] | bytes, **more: str) -> Answer:
        """POST /v1/chat/completions."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.request("POST", "/v1/chat/completions", key, data, **more)

    async def rest(self, seconds: float = 5.0) -> bytes:
        """What still comes until the server closes the connection. Raises TimeoutError when it does not."""
        async with asyncio.timeout(seconds):
            try:
                return await self.reader.read()
            except ConnectionError:
                return b""


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[StrictClient]:
    """A connection to a port of this machine, closed at the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=64 * 1024 * 1024)
    try:
        yield StrictClient(reader, writer)
    finally:
        writer.transport.abort()


@dataclass
class Stream:
    """A chat stream's frames: the payloads in order, the chunks among them, the usage and the error."""

    payloads: list[bytes]
    chunks: list[dict[str, Any]]
    usage: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    comments: int = 0

    def finishes(self) -> dict[int, str]:
        """The finish_reason of each choice."""
        return {
            choice["index"]: choice["finish_reason"]
            for chunk in self.chunks
            for choice in chunk["choices"]
            if choice.get("finish_reason")
        }

    def text(self, name: str = "content") -> str:
        """The text of one channel, all choices."""
        deltas = [choice.get("delta") or {} for chunk in self.chunks for choice in chunk["choices"]]
        return "".join(delta.get(name) or "" for delta in deltas)


def stream_of(answer: Answer, *, usage_wanted: bool) -> Stream:
    """The stream in an answer, after checking every rule of the wire on it."""
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert "content-encoding" not in answer.headers
    assert answer.headers["transfer-encoding"] == "chunked"
    assert answer.body.endswith(b"data: [DONE]\n\n")
    found = Stream([], [])
    *blocks, done, last = answer.body.split(b"\n\n")
    assert (done, last) == (b"data: [DONE]", b"")
    for block in blocks:
        assert b"\n" not in block
        assert b"\r" not in block
        if block.startswith(b":"):
            found.comments += 1
            continue
        assert block.startswith(b"data: "), block[:80]
        assert block != b"data: [DONE]"
        found.payloads.append(block[6:])
    for position, payload in enumerate(found.payloads):
        _read(found, json.loads(payload), position == len(found.payloads) - 1, usage_wanted)
    _roles_and_indexes(found.chunks)
    if found.error is None:
        begun = {choice["index"] for chunk in found.chunks for choice in chunk["choices"]}
        assert begun
        assert set(found.finishes()) == begun
        assert (found.usage is not None) == usage_wanted
    return found


def _read(found: Stream, value: dict[str, Any], is_last: bool, usage_wanted: bool) -> None:
    if "error" in value:
        assert is_last
        found.error = well_formed(value["error"])
        return
    found.chunks.append(value)
    usage = value.get("usage")
    if usage is not None:
        assert usage_wanted
        assert found.usage is None, "usage came twice"
        assert value["choices"] == []
        found.usage = usage
    else:
        assert found.usage is None, "a chunk came after usage"
        assert value["choices"] or usage_wanted


def _roles_and_indexes(chunks: list[dict[str, Any]]) -> None:
    begun: set[int] = set()
    for chunk in chunks:
        for choice in chunk["choices"]:
            delta = choice.get("delta") or {}
            if choice["index"] not in begun:
                begun.add(choice["index"])
                assert delta.get("role") == "assistant"
            assert all(isinstance(call["index"], int) for call in delta.get("tool_calls") or [])
