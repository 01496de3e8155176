"""Many scripted providers behind one port, the tables of their routes, and calls to a gateway that routes among them.

Each provider has a path of its own; a test says what it answers, now, and reads what it was asked. All speak OpenAI's
wire. Must not: choose, or know what the gateway thinks of a provider.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Self

import httpx2
from prometheus_client.parser import text_string_to_metric_families

from metering.ledger import Balance
from tests.support.gateway import Gateway, Key, until
from tests.support.raw_client import RawCall, ask, request_bytes

GRANTED = 1_000_000
PROMPT, OUTPUT = 10, 4
"""Tokens that every answer here reports."""
ROUTE_HINT = "x-tollgate-route"


@dataclass
class Asked:
    """One request at a provider. `at`: monotonic seconds."""

    headers: dict[str, str]
    raw: bytes
    writer: asyncio.StreamWriter
    reader: asyncio.StreamReader
    at: float

    @property
    def body(self) -> dict[str, Any]:
        """The JSON in it."""
        found: dict[str, Any] = json.loads(self.raw)
        return found

    @property
    def said(self) -> str:
        """What its last message says."""
        return str(self.body["messages"][-1]["content"])

    async def send(self, data: bytes) -> None:
        """Write bytes of the answer."""
        self.writer.write(data)
        await self.writer.drain()

    async def until_gone(self) -> None:
        """Until the gateway has closed the connection."""
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(65536):
                pass


Script = Callable[[Asked], Awaitable[bool]]
"""Answers a request; whether the connection may carry another."""


@dataclass
class Provider:
    """One scripted provider. `most` is the highest number of requests it had at once; `models` what its list has."""

    script: Script
    asked: list[Asked] = field(default_factory=list)
    running: int = 0
    most: int = 0
    models: tuple[str, ...] | None = None
    lists: int = 0

    @property
    def count(self) -> int:
        """Calls so far."""
        return len(self.asked)


class Farm:
    """All providers of a test: `farm["name"]` is the one whose base URL ends with /name."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._providers: dict[str, Provider] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    def __getitem__(self, name: str) -> Provider:
        return self._providers.setdefault(name, Provider(says()))

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port, backlog=1024)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while await self._answer(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the gateway closed it, or the test is over
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        raw = await reader.readexactly(int(headers.get("content-length", "0")))
        method, target, _ = first.split(" ")
        provider = self[target.split("/")[1]]
        asked = Asked(headers, raw, writer, reader, time.monotonic())
        if method == "GET":
            provider.lists += 1
            return await _list(asked, provider.models)
        provider.asked.append(asked)
        provider.running += 1
        provider.most = max(provider.most, provider.running)
        try:
            return await provider.script(asked)
        finally:
            provider.running -= 1


async def _list(asked: Asked, models: tuple[str, ...] | None) -> bool:
    listed = [{"id": name, "object": "model"} for name in models or ()]
    value: dict[str, Any] = {"object": "list", "data": listed}
    await asked.send(_whole(value, 503 if models is None else 200))
    return True


def _whole(value: Any, status: int = 200, *headers: str) -> bytes:
    body = json.dumps(value).encode()
    more = "".join(f"{header}\r\n" for header in headers)
    return (
        f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n{more}content-length: {len(body)}\r\n\r\n".encode()
        + body
    )


def _event(value: Any) -> bytes:
    data = b"data: %b\n\n" % (value.encode() if isinstance(value, str) else json.dumps(value).encode())
    return b"%x\r\n%b\r\n" % (len(data), data)


def _chunk(delta: dict[str, Any], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return _event({"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]})


def _head() -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def usage(prompt: int, output: int) -> dict[str, int]:
    """A provider's report."""
    return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}


def says(
    text: str = "Hello.",
    *,
    after_s: float = 0.0,
    gate: asyncio.Event | None = None,
    tokens: tuple[int, int] = (PROMPT, OUTPUT),
    cut: bool = False,
) -> Script:
    """An answer, streamed or whole as it was asked, after so long and once `gate` is open. `cut`: a stream ends after
    its text without its end, a whole answer in its midst."""
    used = usage(*tokens)

    async def script(asked: Asked) -> bool:
        if after_s:
            await asyncio.sleep(after_s)
        if gate is not None:
            await gate.wait()
        if not asked.body.get("stream"):
            message = {"role": "assistant", "content": text}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            told = {"id": "c1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
            answer = _whole({**told, "usage": used})
            await asked.send(answer[:-20] if cut else answer)
            return not cut
        await asked.send(_head() + _chunk({"role": "assistant", "content": text}))
        if cut:
            return False
        last = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [], "usage": used}
        await asked.send(_chunk({}, "stop") + _event(last) + _event("[DONE]") + b"0\r\n\r\n")
        return True

    return script


def fails(status: int = 500, *headers: str, message: str = "It failed.", code: str | None = None) -> Script:
    """An error in OpenAI's words."""

    async def script(asked: Asked) -> bool:
        error = {"message": message, "type": "server_error", "code": code, "param": None}
        await asked.send(_whole({"error": error}, status, *headers))
        return True

    return script


def hangs(*, headed: bool = False) -> Script:
    """Nothing at all, or nothing after the head, until the gateway leaves."""

    async def script(asked: Asked) -> bool:
        if headed:
            await asked.send(_head())
        await asked.until_gone()
        return False

    return script


def turns(*scripts: Script) -> Script:
    """One script after the other; the last one again and again."""
    done = 0

    async def script(asked: Asked) -> bool:
        nonlocal done
        done += 1
        return await scripts[min(done, len(scripts)) - 1](asked)

    return script


# -- tables ------------------------------------------------------------


def provider_table(name: str, port: int, *lines: str) -> str:
    """`[providers.<name>]`, at the farm on that port."""
    return "\n".join(
        (f"\n[providers.{name}]", 'kind = "openai"', f'base_url = "http://127.0.0.1:{port}/{name}"', *lines, "")
    )


def route_table(name: str, *candidates: str, lines: tuple[str, ...] = (), price: tuple[str, str] = ("1", "1")) -> str:
    """`[routes.<name>]` and its price. A candidate is `provider`, or `provider, key = value ...`; its model is m."""
    tables = []
    for each in candidates:
        upstream, _, more = each.partition(",")
        keys = [f'provider = "{upstream}"', "" if "model =" in more else 'model = "m"', more.strip()]
        tables.append(f"{{ {', '.join(filter(None, keys))} }}")
    listed = ",\n  ".join(tables)
    return "\n".join(
        (
            f'\n[routes."{name}"]',
            f"candidates = [\n  {listed},\n]",
            *lines,
            f'\n[prices."{name}"]\ninput = "{price[0]}"\noutput = "{price[1]}"\n',
        )
    )


# -- calls ------------------------------------------------------------


@dataclass
class Routed:
    """A gateway, its providers, and a client with a key."""

    gateway: Gateway
    farm: Farm
    http: httpx2.AsyncClient
    key: Key

    async def call(
        self, model: str, *, hint: str | None = None, key: Key | None = None, **fields: Any
    ) -> httpx2.Response:
        """One call, whole unless it says `stream`; the body is read."""
        headers = {} if hint is None else {ROUTE_HINT: hint}
        headers["authorization"] = f"Bearer {(key or self.key).text}"
        body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 20, **fields}
        return await self.http.post("/v1/chat/completions", json=body, headers=headers)

    async def answered_by(self, model: str, **more: Any) -> str:
        """Who answered a call; it has to succeed."""
        answer = await self.call(model, **more)
        assert answer.status_code == 200, answer.text
        return answer.headers["x-tollgate-provider"]

    async def shares(self, model: str, calls: int, **more: Any) -> Counter[str]:
        """Who answered so many calls at once."""
        return Counter(await asyncio.gather(*(self.answered_by(model, **more) for _ in range(calls))))

    async def together(self, model: str, calls: int, **fields: Any) -> Counter[str]:
        """Who answered so many calls that arrived in the same moment: each is sent on a connection made before."""
        async with contextlib.AsyncExitStack() as stack:
            sent = [await stack.enter_async_context(connected(self.gateway)) for _ in range(calls)]
            body = json.dumps(ask(model=model, max_tokens=20, **fields)).encode()
            for call in sent:
                call.writer.write(request_bytes(self.gateway, self.key, body))
            found: Counter[str] = Counter()
            for call in sent:
                await call.head()
                assert call.status == 200
                await call.body()
                found[call.headers["x-tollgate-provider"]] += 1
            return found

    async def balance(self, key: Key | None = None) -> Balance:
        """The account now."""
        return await self.gateway.balance(key or self.key)

    async def untouched(self, key: Key | None = None, granted: int = GRANTED) -> bool:
        """Whether nothing is held and nothing was charged."""
        now = await self.balance(key)
        return (now.available, now.held, now.sessions, now.charged) == (granted, 0, 0, 0)

    async def all_back(self, key: Key | None = None) -> Balance:
        """The balance once nothing is held."""
        return await self.gateway.idle(key or self.key)

    async def metric(self, name: str, **labels: str) -> float:
        """One sample of /metrics; 0 before it exists."""
        page = (await self.http.get("/metrics")).text
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                if (sample.name, sample.labels) == (name, labels):
                    return float(sample.value)
        return 0.0

    async def shows(self, value: float, name: str, **labels: str) -> bool:
        """Whether /metrics has the sample with this value."""
        return await self.metric(name, **labels) == value

    def told(self, event: str, **fields: Any) -> list[dict[str, Any]]:
        """The gateway's log lines of this event with these fields."""
        lines = [json.loads(line) for line in self.gateway.log.read_text().splitlines() if f'"{event}"' in line]
        return [line for line in lines if line.get("event") == event and fields.items() <= line.items()]


@contextlib.asynccontextmanager
async def connected(gateway: Gateway) -> AsyncIterator[RawCall]:
    """A connection on which nothing was sent yet."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    try:
        yield RawCall(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


@contextlib.asynccontextmanager
async def routed(gateway: Gateway, port: int) -> AsyncIterator[Routed]:
    """A gateway with a farm on `port`, and a fresh account's key."""
    async with Farm(port) as farm, gateway.connected():
        limits = httpx2.Limits(max_connections=400)
        async with httpx2.AsyncClient(verify=False, base_url=gateway.url, timeout=30, limits=limits) as http:
            yield Routed(gateway, farm, http, await gateway.key(GRANTED))


def error_of(answer: httpx2.Response) -> tuple[int, str | None]:
    """Status and code of a refusal."""
    return answer.status_code, answer.json()["error"]["code"]


async def counted(provider: Provider, count: int) -> None:
    """Until a provider was asked so often."""
    await until(lambda: provider.count >= count, every=0.005)
