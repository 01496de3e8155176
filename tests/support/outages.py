"""Streams that are watched byte by byte, and the processes of a gateway instance: what tests of outages stop and kill.

Signals go only to processes that are found by an instance's own folders.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import psutil

from metering.keys import SHARDS
from metering.ranks import encoding
from storage.embedded_process import read_record
from tests.support.gateway import LATE_S, Gateway, Key, Stores, config_text, until

MODEL = "gpt-4o-mini"
DONE = b"data: [DONE]\n\n"


def outage_config(*, lease_ms: int, margin_ms: int, call_ms: int = 1_000, drain_s: int = 8) -> str:
    """The acceptance tests' configuration with other leases and bounds."""
    text = config_text()
    for old, new in (
        ("lease_ms = 6000", f"lease_ms = {lease_ms}\nfence_margin_ms = {margin_ms}"),
        ("drain_s = 8", f"drain_s = {drain_s}"),
    ):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text + f"\n[redis]\ncall_ms = {call_ms}\n"


def ask(tokens: int, interval_ms: int = 0, *, stream: bool = True) -> dict[str, Any]:
    """The body of a call for an answer of so many tokens, paced."""
    content = f"Write [[tokens={tokens}]] [[interval_ms={interval_ms}]]"
    return {"model": MODEL, "stream": stream, "messages": [{"role": "user", "content": content}]}


def bearer(key: Key) -> dict[str, str]:
    """The key's header."""
    return {"authorization": f"Bearer {key.text}"}


@dataclass
class Stream:
    """One streamed chat call, read as it comes. `parts` are (monotonic seconds, bytes) as the client got them."""

    gateway: Gateway
    key: Key
    body: dict[str, Any]
    status: int = 0
    session: str = ""
    request: str = ""
    parts: list[tuple[float, bytes]] = field(default_factory=list)
    frames: list[dict[str, Any]] = field(default_factory=list)
    whole: bool = False
    """Whether the response ended as HTTP says it must."""
    task: asyncio.Task[None] | None = None
    _rest: bytes = b""

    @property
    def data(self) -> bytes:
        """All bytes of the body."""
        return b"".join(part for _, part in self.parts)

    @property
    def text(self) -> str:
        """The content that arrived."""
        deltas = [choice["delta"] for frame in self.frames for choice in frame.get("choices", ())]
        return "".join(delta.get("content") or "" for delta in deltas)

    @property
    def tokens(self) -> int:
        """Tokens of the content that arrived, counted in one go."""
        return len(encoding("o200k_base").encode_ordinary(self.text))

    @property
    def error(self) -> dict[str, Any] | None:
        """The in-band error, if one came."""
        return next((frame["error"] for frame in self.frames if "error" in frame), None)

    async def flowing(self, frames: int, seconds: float = LATE_S) -> None:
        """Until so many frames have come."""
        await until(lambda: len(self.frames) >= frames or self._failed(), seconds)

    async def ended(self, seconds: float = LATE_S) -> None:
        """Until the response has ended, one way or the other."""
        assert self.task is not None
        async with asyncio.timeout(seconds):
            await asyncio.wait({self.task})
        self.task.result()

    def after(self, moment: float) -> bytes:
        """The bytes that came later than `moment`."""
        return b"".join(part for at, part in self.parts if at > moment)

    def _failed(self) -> bool:
        assert self.task is None or not self.task.done(), (self.status, self.data[-500:])
        return False

    async def read(self) -> None:
        """Ask and read to the end."""
        url = f"{self.gateway.url}/v1/chat/completions"
        async with httpx2.AsyncClient(verify=False, timeout=30, headers=bearer(self.key)) as client:
            with contextlib.suppress(httpx2.TransportError):
                async with client.stream("POST", url, json=self.body) as response:
                    self.status = response.status_code
                    self.session = response.headers.get("x-tollgate-session", "")
                    self.request = response.headers["x-request-id"]
                    async for part in response.aiter_raw():
                        self._take(part)
                    self.whole = True

    def _take(self, part: bytes) -> None:
        self.parts.append((time.monotonic(), part))
        *lines, self._rest = (self._rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data: {"):
                self.frames.append(json.loads(line[6:]))


@contextlib.asynccontextmanager
async def streams(gateway: Gateway, key: Key, count: int, tokens: int, interval_ms: int) -> AsyncIterator[list[Stream]]:
    """So many streams, started together."""
    made = [Stream(gateway, key, ask(tokens, interval_ms)) for _ in range(count)]
    try:
        for stream in made:
            stream.task = asyncio.create_task(stream.read())
        yield made
    finally:
        tasks = [stream.task for stream in made if stream.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def held_session(stores: Stores, key: Key, session: str) -> dict[str, str]:
    """The session's record in Redis: `st` H while held, T when final; `m` metered at the last progress; `ow` owner."""
    flat = await stores.redis.call("HGETALL", SHARDS[key.account.shard].session + session)
    words = [word.decode(errors="replace") for word in flat]
    return dict(zip(words[::2], words[1::2], strict=True))


async def owner_pid(stores: Stores, key: Key, session: str) -> int:
    """The worker that held the session."""
    return int((await held_session(stores, key, session))["ow"].split("-")[0])


async def leases(stores: Stores, key: Key) -> list[bytes]:
    """What still has a lease in the account's shard."""
    found: list[bytes] = await stores.redis.call("ZRANGE", SHARDS[key.account.shard].leases, "0", "-1")
    return found


async def terminal_entries(stores: Stores, session: str) -> tuple[int, int]:
    """How many terminal journal entries and session rows the session has in Postgres."""
    entries = await stores.pool.fetchval("SELECT count(*) FROM entry WHERE sid = $1 AND type = 'settle'", session)
    rows = await stores.pool.fetchval("SELECT count(*) FROM session WHERE sid = $1", session)
    return entries, rows


async def books_agree(stores: Stores, key: Key) -> bool:
    """Whether sessions and corrections in Postgres come to what the account was charged."""
    rows = await stores.pool.fetchval(
        "SELECT sum(charged) FROM (SELECT charged FROM session WHERE account_id = $1 "
        "UNION ALL SELECT charged FROM correction WHERE account_id = $1) each",
        key.account.id,
    )
    return bool(rows == (await stores.ledger.balance(key.account)).charged)


def server_pid(gateway: Gateway, name: str) -> int | None:
    """The main process of one embedded server; None while the supervisor starts it again, when no record names it."""
    record = read_record(gateway.data_dir.resolve() / "servers", name)
    return record.pid if record is not None and alive(record.pid) else None


async def server_pids(gateway: Gateway, name: str) -> list[int]:
    """The processes of one embedded server, the main one first, once it runs."""
    main: int = await until(lambda: server_pid(gateway, name))
    return [main, *(process.pid for process in _inside(gateway.data_dir.resolve() / name) if process.pid != main)]


def names(pids: Iterable[int]) -> set[str]:
    """The programs' names; a process that has ended since it was found has none."""
    found = set()
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.add(psutil.Process(pid).name())
    return found


def instance_pids(gateway: Gateway) -> set[int]:
    """Every living process of the instance: by the configuration it was started with, or the folder it works in."""
    found = {process.pid for process in _inside(gateway.data_dir.resolve())}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("TOLLGATE_CONFIG") == str(gateway.config) and alive(process.pid):
                found.add(process.pid)
    return found


def _inside(folder: Path) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if Path(process.cwd()).is_relative_to(folder) and alive(process.pid):
                yield process


def alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def frozen(pids: Iterable[int]) -> Iterator[None]:
    """These processes stand still inside the block."""
    stopped = []
    try:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                stopped.append(pid)
        yield
    finally:
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def nothing_left(gateway: Gateway) -> Iterator[None]:
    """Whatever of the instance a failed test leaves behind is killed, so that it disturbs no other test."""
    try:
        yield
    finally:
        for pid in instance_pids(gateway):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


async def readiness(gateway: Gateway) -> tuple[int, dict[str, str]]:
    """The readiness answer: its status and the word of each part. (0, {}) when nobody answers."""
    with contextlib.suppress(httpx2.TransportError):
        async with httpx2.AsyncClient(verify=False, timeout=20) as client:
            answer = await client.get(f"{gateway.url}/health/ready")
            return answer.status_code, answer.json()["parts"]
    return 0, {}


async def ready(gateway: Gateway, seconds: float = LATE_S) -> None:
    """Until every part says ok."""

    async def everything() -> bool:
        status, parts = await readiness(gateway)
        return status == 200 and set(parts.values()) == {"ok"}

    await until(everything, seconds, every=0.1)


def audited(gateway: Gateway) -> dict[str, Any]:
    """The audit's report; fails when it found anything."""
    done = gateway.audit()
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["ok"]
    assert report["differences"] == []
    return report
