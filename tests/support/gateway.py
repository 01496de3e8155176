"""A running gateway for tests: `tollgate serve` as its own process tree, and what a test asks of it and its stores.

Nothing here reaches inside: accounts and keys are made as the command line makes them, results are read from Postgres,
from the provider's own log and over HTTP. Clients are made with `verify=False`: all of it is plain HTTP, and to read a
trust store for each client takes longer than most calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from accounts import admin
from config import run as run_file
from config.run import Run
from loadtests.simulated_provider.scripts import models
from metering import grants
from metering.ledger import AccountRef, Balance
from metering.redis_ledger import RedisLedger
from proxy.ids import session_id
from storage.database import Pool, connect_pool
from storage.redis_client import RedisClient
from tests.support.ports import free_port
from tests.support.provider_log import provider_log

ROOT = Path(__file__).resolve().parents[2]
OURS = ("TOLLGATE_", "OPENAI_", "REDIS_URL", "DATABASE_URL", "PORT")
"""Beginnings of the variables that tell `tollgate` something; a test names its own."""
START_S = 90.0
STOP_S = 60.0
LATE_S = 30.0
"""How long what must come at once may take on a machine that has other work too."""

SCRIPTS = tuple(
    name.removeprefix("sim-") for name in models() if name.startswith("sim-") and "+" not in name and ":" not in name
)

ONE_TRY = "retry = { retries = 0 }"
"""For routes whose tests look at one attempt and its trouble."""

CONFIG = """
[server]
log_level = "info"

[bounds]
connect_ms = 1000
headers_ms = 2500
headers_nonstream_ms = 2500
first_content_ms = 2500
idle_ms = 2000
commit_after_ms = 600
keepalive_ms = 400
client_write_ms = 1500
client_header_ms = 1500
client_body_ms = 1500
drain_s = 8
body_bytes_max = 1048576
bodies_bytes_max = 4194304

[metering]
lease_ms = 6000
sweep_every_ms = 200
flush_every_ms = 50
progress_ms = 300

[breaker]  # the scripted troubles come in any order, and many in a row: what breakers do has gateways of its own
consecutive_max = 1000000
calls_min = 1000000
key_refused_ms = 0
retry_after_ms_max = 0
model_missing_ms = 0

[embedded]
simulate = "sim"

[providers.sim]
kind = "openai"
base_url = "http://127.0.0.1:1/v1"

[providers.gone]
kind = "openai"
base_url = "http://127.0.0.1:1/v1"

[providers.keyed]
kind = "openai"
base_url = "http://127.0.0.1:1/v1"

[routes."gpt-4o-mini"]
candidates = [{ provider = "sim", model = "gpt-4o-mini" }]

[routes.real-name]
candidates = [{ provider = "sim", model = "gpt-4o" }]
rename_model = true

[routes.hidden]
candidates = [{ provider = "sim", model = "gpt-4o-mini" }]
hidden_reasoning = true
max_output_tokens = 1000

[routes.unreachable]
candidates = [{ provider = "gone", model = "x" }]
retry = { retries = 0 }

[routes.falls-back]
candidates = [
  { provider = "gone", model = "x" },
  { provider = "sim", model = "sim-500" },
  { provider = "sim", model = "sim-error-frame:after=0" },
  { provider = "sim", model = "gpt-4o-mini" },
]
retry = { retries = 0 }

[prices.default-price-table]
input = "1"
output = "1"
"""


def config_text(more: tuple[str, ...] = ()) -> str:
    """The configuration of acceptance tests: one micro a token, short bounds, a route for every scripted trouble."""
    names = list(dict.fromkeys([*(f"sim-{name}" for name in SCRIPTS), *more]))
    lines = [CONFIG.split("[prices.default-price-table]")[0]]
    for name in names:
        lines.append(f'[routes."{name}"]\ncandidates = [{{ provider = "sim", model = "{name}" }}]\n{ONE_TRY}\n')
    for name in ["gpt-4o-mini", "real-name", "hidden", "unreachable", "falls-back", *names]:
        lines.append(f'[prices."{name}"]\ninput = "1"\noutput = "1"\n')
    return "\n".join(lines)


async def until(condition: Any, seconds: float = LATE_S, every: float = 0.02) -> Any:
    """Poll until `condition()` (awaited where it is a coroutine) is truthy; its value. Fails loudly if it never is."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {condition}")
        await asyncio.sleep(every)


@dataclass(frozen=True)
class Key:
    """An API key of a fresh account."""

    text: str
    id: str
    account: AccountRef


@dataclass
class Gateway:
    """One `tollgate serve`. `log` is the file with its standard error."""

    data_dir: Path
    config: Path
    port: int
    log: Path
    environ: dict[str, str] = field(default_factory=dict)
    workers: int = 1
    process: subprocess.Popen[bytes] | None = None
    _shared: Stores | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def run(self) -> Run:
        files = sorted(self.data_dir.glob("run/**/run.json"))
        return run_file.read_run(files[-1])

    @property
    def provider(self) -> str:
        """The simulated provider's address."""
        return self.run.simulated["sim"].removesuffix("/v1")

    def start(self) -> None:
        """Start and wait until it is ready."""
        command = [sys.executable, "-m", "gateway.cli", "serve", "--port", str(self.port)]
        command += ["--data-dir", str(self.data_dir), "--workers", str(self.workers)]
        environ = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
        environ |= {"TOLLGATE_CONFIG": str(self.config), "TOLLGATE_TEST_NOT_DURABLE": "1", **self.environ}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environ, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
        self.wait_ready()

    def wait_ready(self, seconds: float = START_S) -> None:
        """Until /health/ready says 200."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process is not None and self.process.poll() is not None:
                raise AssertionError(f"serve ended with {self.process.returncode}:\n{self.log.read_text()[-4000:]}")
            with contextlib.suppress(httpx2.HTTPError):
                if httpx2.get(f"{self.url}/health/ready", timeout=2, verify=False).status_code == 200:
                    return
            time.sleep(0.05)
        raise AssertionError(f"not ready within {seconds} s:\n{self.log.read_text()[-4000:]}")

    def stop(self) -> int:
        """SIGTERM and wait; the exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_S)

    def children(self, module: str) -> list[int]:
        """Pids of this instance's children that run `module`."""
        assert self.process is not None
        found = []
        for stat in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                words = stat.read_bytes().split(b"\0")
                parent = int((stat.parent / "stat").read_text().rsplit(")", 1)[1].split()[1])
                if module.encode() in words and parent == self.process.pid:
                    found.append(int(stat.parent.name))
        return found

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[Stores]:
        """Connections that every `stores` inside the block shares, where the stores live through it."""
        async with self.stores() as stores:
            self._shared = stores
            try:
                yield stores
            finally:
                self._shared = None

    @contextlib.asynccontextmanager
    async def stores(self) -> AsyncIterator[Stores]:
        """Connections to this instance's stores."""
        if self._shared is not None:
            yield self._shared
            return
        run = self.run
        async with contextlib.AsyncExitStack() as stack:
            redis = RedisClient(run.redis_url, call_ms=5000, connect_ms=5000, pending_max=10_000)
            stack.push_async_callback(redis.aclose)
            await redis.start()
            ledger = RedisLedger(redis)
            await ledger.start()
            pool = await connect_pool(run.database_url)
            stack.push_async_callback(pool.close)
            yield Stores(pool, redis, ledger, run_file.load_secret(run, {**os.environ, **self.environ}))

    async def key(self, micros: int = 1_000_000, *, rpm: int | None = None, parallel: int | None = None) -> Key:
        """A key of a fresh account with that much credit."""
        async with self.stores() as stores:
            return await stores.key(micros, rpm=rpm, parallel=parallel)

    async def balance(self, key: Key) -> Balance:
        """The account's balance now."""
        async with self.stores() as stores:
            return await stores.ledger.balance(key.account)

    async def idle(self, key: Key) -> Balance:
        """The balance once nothing is held."""
        async with self.stores() as stores:

            async def settled() -> Balance | None:
                balance = await stores.ledger.balance(key.account)
                return balance if balance.held == 0 and balance.sessions == 0 else None

            balance: Balance = await until(settled, LATE_S)
            return balance

    async def session(self, session: str) -> dict[str, Any]:
        """The session's row in Postgres, once the journal has brought it; `metadata` decoded."""
        async with self.stores() as stores:
            row = await until(lambda: stores.pool.fetchrow("SELECT * FROM session WHERE sid = $1", session), LATE_S)
            found = dict(row)
            if isinstance(found["metadata"], str):
                found["metadata"] = json.loads(found["metadata"])
            return found

    async def sessions(self, key: Key, count: int) -> list[dict[str, Any]]:
        """All rows of the account, once there are `count`."""
        async with self.stores() as stores:
            query = "SELECT * FROM session WHERE account_id = $1 ORDER BY started_at"

            async def enough() -> list[Any] | None:
                rows = await stores.pool.fetch(query, key.account.id)
                return rows if len(rows) >= count else None

            return [dict(row) for row in await until(enough, LATE_S)]

    async def served(self, request_id: str, *, over: bool = True) -> dict[str, Any]:
        """The simulated provider's own log entry of a request (once the exchange is over)."""
        async with httpx2.AsyncClient(verify=False) as client:

            async def logged() -> dict[str, Any] | None:
                for entry in await provider_log(self.provider).entries(client):
                    if entry["request_id"] == request_id and not (over and entry.get("running")):
                        found: dict[str, Any] = entry
                        return found
                return None

            entry: dict[str, Any] = await until(logged, LATE_S)
            return entry

    def audit(self) -> subprocess.CompletedProcess[str]:
        """`tollgate audit --json` on this instance."""
        return self.tollgate("audit", "--json")

    def tollgate(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A command line call on this instance."""
        environ = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
        environ |= {"TOLLGATE_CONFIG": str(self.config), "TOLLGATE_DATA_DIR": str(self.data_dir)}
        command = [sys.executable, "-m", "gateway.cli", *arguments]
        return subprocess.run(
            command, cwd=ROOT, env=environ | self.environ, capture_output=True, text=True, check=False, timeout=60
        )


@dataclass
class Stores:
    """Open connections to an instance's stores."""

    pool: Pool
    redis: RedisClient
    ledger: RedisLedger
    pepper: bytes

    async def key(self, micros: int, *, rpm: int | None = None, parallel: int | None = None) -> Key:
        """A fresh account with a grant and a key."""
        account = await admin.create_account(self.pool, f"test-{session_id()}")
        if micros:
            grant = grants.NewGrant(id=f"g_{account.id}", account=account.id, amount=micros)
            issued = await grants.issue(self.pool, self.ledger, grant)
            assert issued.state == "applied"
        made = await admin.create_key(
            self.pool, self.redis, self.pepper, account, "test", requests_per_minute=rpm, parallel_sessions=parallel
        )
        return Key(made.text, made.id, AccountRef(account.id, account.shard))


@contextlib.contextmanager
def running(folder: Path, config: str | None = None, **fields: Any) -> Iterator[Gateway]:
    """A gateway in `folder` (its data and log), stopped at the end; a survivor is killed with its whole session."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "tollgate.toml"
    file.write_text(config or config_text())
    # Not below pytest's folder: it is closed to the unprivileged user that Postgres runs as under root.
    data = Path(tempfile.mkdtemp(prefix="tg-"))
    gateway = Gateway(data, file, free_port(), folder / "serve.log", **fields)
    try:
        gateway.start()
        yield gateway
    finally:
        try:
            gateway.stop()
        except subprocess.TimeoutExpired:
            assert gateway.process is not None
            os.killpg(gateway.process.pid, signal.SIGKILL)
            gateway.process.wait(10)
            raise
        finally:
            shutil.rmtree(data, ignore_errors=True)
