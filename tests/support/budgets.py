"""Counts of what a request and a chunk cost, equal on every machine: Python calls, writes, Redis commands, blocks.

`python -m tests.support.budgets` runs one real data worker in this process, on a private Valkey, between a scripted
upstream and a client that take turns, so that every chunk is alone; it prints the counts as JSON. `... core N` only
sends N chunks through the pure core, for callgrind.
Must not: time anything, or count its own calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, cast

from loadtests.bench import wire

HERE = __file__
PEPPER = "budgets-of-tollgate-are-counts-0123456789"
CONFIG = """
[providers.one]
kind = "openai"
base_url = "http://127.0.0.1:{port}/v1"

[routes."{model}"]
candidates = [{{ provider = "one", model = "{model}" }}]

[prices."{model}"]
input = "1"
output = "1"
"""
REQUESTS = 100
STREAMS = 40
CHUNKS = 400
CORE_CHUNKS = 2_000
CREDIT_MICROS = 10**12


class Calls:
    """Counts calls of Python functions while it is on, by file and name, but those of this file."""

    def __init__(self) -> None:
        self.python: Counter[tuple[str, str]] = Counter()

    @contextlib.contextmanager
    def on(self) -> Iterator[Calls]:
        """Count inside the block."""
        sys.setprofile(self._event)
        try:
            yield self
        finally:
            sys.setprofile(None)

    def _event(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            code = frame.f_code
            if code.co_filename != HERE:
                self.python[code.co_filename, code.co_qualname] += 1

    def writes(self) -> int:
        """Calls of `write` and `writelines` of asyncio's own transports."""
        names = ("write", "writelines")
        found = (
            (Path(file).parent.name, name.rpartition(".")[2], count) for (file, name), count in self.python.items()
        )
        return sum(count for folder, name, count in found if folder == "asyncio" and name in names)

    def total(self) -> int:
        """Python calls."""
        return sum(self.python.values())

    def most(self, units: int, number: int = 12) -> dict[str, float]:
        """The functions called most, per unit."""
        found = self.python.most_common(number)
        return {f"{Path(file).stem}.{name}": round(count / units, 2) for (file, name), count in found}


class Upstream(asyncio.Protocol):
    """Answers; the further chunks of a stream go out one by one when `step` is called."""

    current: Upstream

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._data = b""
        self._left = self._all = 0

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, found, body = self._data.partition(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0]) if found else 1
        if len(body) < length:
            return
        self._data = b""
        request = json.loads(body)
        if not request.get("stream"):
            self._transport.write(wire.ANSWER)
            return
        Upstream.current = self
        self._all = int(request["user"])
        self._left = self._all - 1
        self._transport.write(wire.STREAM_HEAD + wire.ROLE + wire.CHUNKS[0])

    def step(self) -> None:
        """One chunk more, or the end."""
        if self._left > 0:
            self._left -= 1
            self._transport.write(wire.CHUNKS[self._left % len(wire.CHUNKS)])
        else:
            self._transport.write(wire.last(self._all))


class Client(asyncio.Protocol):
    """Sends one request at a time; every event that arrives asks the upstream for the next."""

    def __init__(self, port: int, key: str) -> None:
        self._port, self._key = port, key
        self._over: asyncio.Future[None] | None = None
        self._answer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    async def ask(self, chunks: int = 0) -> bytes:
        """One request, a stream of so many chunks or (0) none; the raw response."""
        self._over = asyncio.get_running_loop().create_future()
        self._answer = b""
        self._transport.write(wire.request(self._port, self._key, plan=str(chunks), stream=chunks > 0))
        await self._over
        return self._answer

    def data_received(self, data: bytes) -> None:
        assert self._over is not None
        self._answer += data
        head, _, body = self._answer.partition(b"\r\n\r\n")
        if b"content-length: " in head:
            whole = len(body) >= int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
        else:
            whole = body.endswith(b"0\r\n\r\n")
        if whole:
            self._over.set_result(None)
        elif b"\n\n" in data:
            Upstream.current.step()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._over is not None and not self._over.done():
            self._over.set_exception(ConnectionError(self._answer[-300:]))


class Monitor(asyncio.Protocol):
    """A MONITOR of the Valkey: counts the commands that clients send (not those inside scripts)."""

    def __init__(self) -> None:
        self.commands = 0
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(b"MONITOR\r\n")

    def data_received(self, data: bytes) -> None:
        *lines, self._tail = (self._tail + data).split(b"\r\n")
        self.commands += sum(b" lua] " not in line and b"[" in line for line in lines)


Measure = Callable[[Client, Monitor], Awaitable[dict[str, Any]]]


async def _wait(condition: Any) -> None:
    """Poll for 20 s at most."""
    for _ in range(4000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise TimeoutError(condition)


def _listening() -> socket.socket:
    made = socket.socket()
    made.bind(("127.0.0.1", 0))
    made.listen()
    made.setblocking(False)
    return made


async def _prepare(folder: Path, redis_url: str, port: int, upstream_port: int, listen_fd: int) -> str:
    """Everything that `tollgate serve` and an administrator would have made; the key."""
    from accounts.key_store import KeyRecord, encode_record, record_key
    from accounts.keys import fingerprint, mac_of, mint
    from config import catalog, run, settings
    from metering.ledger import AccountRef, GrantRequest
    from metering.redis_ledger import RedisLedger
    from storage.redis_client import RedisClient

    config = folder / "tollgate.toml"
    config.write_text(CONFIG.format(port=upstream_port, model=wire.MODEL))
    catalog.write(catalog.compile_catalog(settings.load(config)), folder / "catalog.json")
    this = run.Run(
        redis_url=redis_url, database_url="postgresql://nobody@/none?host=/nowhere", data_dir=str(folder),
        config_path=str(config), catalog_path=str(folder / "catalog.json"), metrics_dir=str(folder),
        host="127.0.0.1", port=port, workers=1, supervisor_pid=os.getpid(),
    )  # fmt: skip
    run.write_run(folder / "run.json", this)
    os.environ |= {run.RUN_ENV: str(folder / "run.json"), run.SECRET_ENV: PEPPER, "TOLLGATE_LISTEN_FD": str(listen_fd)}
    redis = RedisClient(redis_url, call_ms=5_000, connect_ms=5_000, pending_max=10_000)
    await redis.start()
    ledger = RedisLedger(redis)
    await ledger.start()
    account = AccountRef("budget", 7)
    await ledger.init_shards([account.shard])
    await ledger.grant(GrantRequest("g_budget", account, CREDIT_MICROS, created_ms=1))
    key, pepper = mint(), PEPPER.encode()
    record = KeyRecord(
        id=key.id, mac=mac_of(pepper, key.secret), pepper=fingerprint(pepper), account=account.id,
        shard=account.shard, name="budget",
    )  # fmt: skip
    await redis.call("SET", record_key(key.id), encode_record(record))
    await redis.aclose()
    return key.text


async def _worker_counts(redis_url: str, redis_socket: Path, folder: Path, measure: Measure) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Upstream, "127.0.0.1", 0)
    listening = _listening()
    port = int(listening.getsockname()[1])
    upstream_port = int(server.sockets[0].getsockname()[1])
    key = await _prepare(folder, redis_url, port, upstream_port, listening.detach())

    from gateway import worker

    serving = loop.create_task(worker.serve())
    _, client = await loop.create_connection(lambda: Client(port, key), "127.0.0.1", port)
    assert b'"completion_tokens"' in await client.ask()
    for _ in range(5):
        await client.ask()
        await client.ask(3)
    _, monitor = await loop.create_unix_connection(Monitor, str(redis_socket))
    await _wait(lambda: serving.done() or monitor.commands == 0)
    counts = await measure(client, monitor)
    os.kill(os.getpid(), signal.SIGTERM)
    await serving
    server.close()
    return counts


async def _measure(client: Client, monitor: Monitor) -> dict[str, Any]:
    """Requests, short streams, and one long stream less a short one."""
    with Calls().on() as whole:
        for _ in range(REQUESTS):
            await client.ask()
    await _wait(lambda: monitor.commands >= 2 * REQUESTS)
    commands = monitor.commands
    with Calls().on() as short:
        for _ in range(STREAMS):
            await client.ask(2)
    await _wait(lambda: monitor.commands - commands >= 2 * STREAMS)
    stream_commands = monitor.commands - commands
    with Calls().on() as long:
        answer = await client.ask(CHUNKS)
    assert answer.count(b"\n\n") == CHUNKS + wire.EVENTS_AROUND
    per_stream = short.total() / STREAMS
    return {
        "calls_per_request": whole.total() / REQUESTS,
        "calls_per_stream": per_stream,
        "calls_per_chunk": (long.total() - per_stream) / (CHUNKS - 2),
        "redis_commands_per_request": commands / REQUESTS,
        "redis_commands_per_stream": stream_commands / STREAMS,
        "most": {"request": whole.most(REQUESTS), "stream": short.most(STREAMS), "chunk": long.most(CHUNKS)},
    }


async def _measure_writes(client: Client, monitor: Monitor) -> dict[str, Any]:
    """Writes to transports in a long stream, less those of the scripted upstream. Needs a loop written in Python."""
    with Calls().on() as long:
        await client.ask(CHUNKS)
    return {"writes_per_chunk": (long.writes() - CHUNKS) / CHUNKS}


class Core:
    """The pure core of a stream: frames, JSON, counting, the cover check; what each chunk passes on its way."""

    def __init__(self) -> None:
        from config.price import CompiledPrice
        from metering.meter import Channel, Meter
        from metering.ranks import encoding
        from providers.codec import ChatCall, Upstream
        from providers.openai import OpenAICodec

        micro = 1_000_000
        price = CompiledPrice(
            input=micro, cached_input=micro, cache_write=micro, cache_write_1h=micro, output=micro, reasoning=micro,
            audio_input=micro, audio_output=micro, image_output=micro,
        )  # fmt: skip
        self._meter = Meter(price, 21, encoding("o200k_base"))
        call = ChatCall(body=b"", model=wire.MODEL, stream=True, usage_wanted=True)
        self._codec = OpenAICodec(Upstream("one", "openai", b"/v1"), call)
        self._channels = list(Channel)
        self._events = [chunk.split(b"\r\n", 1)[1][:-2] for chunk in wire.CHUNKS]
        self.feed(1)

    def feed(self, chunks: int) -> None:
        """So many chunks, one after the other."""
        codec, meter, channels = self._codec, self._meter, self._channels
        for index in range(chunks):
            for event in codec.feed(self._events[index % len(self._events)]):
                for delta in event.deltas:  # type: ignore[union-attr]  # only chunks are fed
                    meter.add(delta.choice, channels[delta.channel], delta.text, delta.tool)
                assert meter.fits(CREDIT_MICROS)


def _core_counts() -> dict[str, float]:
    core = Core()
    core.feed(CORE_CHUNKS)
    with Calls().on() as calls:
        core.feed(CORE_CHUNKS)
    before = sys.getallocatedblocks()
    core.feed(4 * CORE_CHUNKS)
    kept = sys.getallocatedblocks() - before
    return {"core_calls_per_chunk": calls.total() / CORE_CHUNKS, "core_blocks_kept_per_chunk": kept / 4 / CORE_CHUNKS}


def counts() -> dict[str, Any]:
    """All counts."""
    import uvloop

    from tests.support.redis_server import RedisServer

    found: dict[str, Any] = dict(_core_counts())
    with tempfile.TemporaryDirectory(prefix="tg-", dir="/tmp") as name:
        folder = Path(name)
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = name
        server = RedisServer(folder)
        server.start()
        try:
            found |= uvloop.run(_worker_counts(server.url, server.socket, folder, _measure))
            found |= asyncio.run(_worker_counts(server.url, server.socket, folder, _measure_writes))
        finally:
            server.kill()
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["core"]:
        Core().feed(int(sys.argv[2]))
    else:
        json.dump(counts(), sys.stdout, indent=1)
