"""The world of a chaos run: stores, providers and gateways as processes, and a `Link` between any two of them.

    client -> gateway -> Valkey, Postgres, provider a, provider b          replica -> Valkey

The run itself looks at the stores past the links. Must not: decide what fails (`faults`) or judge (`check`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg  # type: ignore[import-untyped]
import psutil
import redis.asyncio

from loadtests.chaos.proxy import Link
from loadtests.chaos.servers import ChaosError, Postgres, Valkey
from loadtests.run_instance import ROOT, free_port
from metering.keys import SHARDS, Shard

START_S, STOP_S, CLI_S = 60.0, 40.0, 120.0
OURS = ("TOLLGATE_", "OPENAI_", "CHAOS_", "REDIS_URL", "DATABASE_URL", "PORT")
INTERVAL_MS, TTFT_MS = 10, 30
CREDITS_EACH = 1_000
TROUBLES = (
    "sim-no-usage", "sim-zero-usage", "sim-cut:after.20", "sim-truncate:after.10", "sim-garbage:after.5",
    "sim-429", "sim-500", "sim-stall:after.5", "sim-wrong-usage:kind.huge", "sim-wrong-usage:kind.negative",
    "sim-wrong-usage:kind.two", "sim-error-frame:after.5", "sim-slow-first:ms.500",
)  # fmt: skip
ROUTES = {
    "gpt-4o-mini": (("a", "gpt-4o-mini"), ("b", "gpt-4o-mini")),
    "falls-back": (("a", "sim-500"), ("b", "sim-error-frame:after.0"), ("a", "gpt-4o-mini")),
    **{name: (("b", name),) for name in TROUBLES},
}
CONFIG = """
[bounds]
connect_ms = 1000
headers_ms = 8000
headers_nonstream_ms = 20000
first_content_ms = 8000
idle_ms = 4000
client_write_ms = 4000
drain_s = 30

[metering]
lease_ms = {lease_ms}

[redis]
call_ms = 1000
replicas = 1
"""


@dataclass(frozen=True)
class Account:
    """One account of the run and a key of it."""

    name: str
    id: str
    shard: Shard
    key: str
    key_id: str


@dataclass
class Provider:
    """One simulated provider and its log on disk."""

    name: str
    process: subprocess.Popen[bytes]
    port: int
    log: Path


@dataclass
class Gateway:
    """One `tollgate serve` with links of its own: `front` to clients, the others to what it needs."""

    name: str
    folder: Path
    port: int
    links: dict[str, Link]
    environ: dict[str, str]
    process: subprocess.Popen[bytes] | None = None

    @property
    def front(self) -> Link:
        """The link that clients use."""
        return self.links["front"]

    def start(self) -> None:
        """Start; `World.ready` waits."""
        command = [sys.executable, "-P", "-m", "gateway.cli", "serve", "--port", str(self.port), "--data-dir"]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, str(self.folder / "data")], cwd=ROOT, env=self.environ, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def family(self, module: str = "") -> list[psutil.Process]:
        """Its living processes, children first: all, or those that run `module`."""
        assert self.process is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            main = psutil.Process(self.process.pid)
            found = [*reversed(main.children(recursive=True)), main]
            return [one for one in found if not module or _runs(one, module)]
        return []

    def kill(self) -> None:
        """kill -9 of everything it is, workers first, so that nobody says goodbye."""
        gone = self.family()
        for one in gone:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        if self.process is not None:
            self.process.wait(STOP_S)
        psutil.wait_procs(gone, timeout=STOP_S)

    def terminate(self) -> int:
        """SIGTERM, and the exit code when it has drained. Blocks."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_S)

    def healthy(self) -> bool:
        """Whether its readiness answers 200, asked past the links. Raises ChaosError when it has ended."""
        assert self.process is not None
        if self.process.poll() is not None:
            said = (self.folder / "log").read_text(errors="replace")[-2000:]
            raise ChaosError(f"gateway {self.name} ended with {self.process.returncode}:\n{said}")
        url = f"http://127.0.0.1:{self.port}/health/ready"
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=3) as reply:
            return bool(reply.status == 200)
        return False


def _runs(process: psutil.Process, module: str) -> bool:
    try:
        return module in process.cmdline()
    except psutil.Error:
        return False


@dataclass
class World:
    """Everything, running. `redis` and `pool` go past the links."""

    folder: Path
    secret: str
    lease_s: float
    valkey: Valkey
    replica: Valkey
    postgres: Postgres
    replication: Link
    providers: list[Provider] = field(default_factory=list)
    gateways: list[Gateway] = field(default_factory=list)
    accounts: list[Account] = field(default_factory=list)
    """Every account; those of `customers` are the load's, the others belong to single faults."""
    customers: list[Account] = field(default_factory=list)

    def redis(self) -> redis.asyncio.Redis:
        """A new client of the primary."""
        return client_of(self.valkey)

    async def postgres_connection(self) -> Any:
        """A new connection. Raises what asyncpg raises."""
        return await asyncpg.connect(self.postgres.url(), timeout=10, command_timeout=60)

    async def fetch(self, query: str, *arguments: Any) -> list[dict[str, Any]]:
        """The rows of one query."""
        connection = await self.postgres_connection()
        try:
            return [dict(row) for row in await connection.fetch(query, *arguments)]
        finally:
            await connection.close()

    async def tollgate(self, *arguments: str, codes: tuple[int, ...] = (0,)) -> Any:
        """What `tollgate <arguments> --json` answers, past the links. Raises ChaosError for another exit code."""
        command = [sys.executable, "-P", "-m", "gateway.cli", *arguments, "--json"]
        environ = _environ(self, self.valkey.port, self.postgres.port, self.gateways[0].folder)
        process = await asyncio.create_subprocess_exec(
            *command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        async with asyncio.timeout(CLI_S):
            said, complained = await process.communicate()
        if process.returncode not in codes:
            text = complained.decode(errors="replace")[-2000:]
            raise ChaosError(f"tollgate {' '.join(arguments)} ended with {process.returncode}: {text}")
        return json.loads(said)

    async def account(self, credits_: str = str(CREDITS_EACH)) -> Account:
        """A fresh account with so many credits and a key."""
        name = f"chaos-{secrets.token_hex(4)}"
        made = await self.tollgate("accounts", "create", name)
        _, key = await asyncio.gather(
            self.tollgate("credits", "grant", name, credits_), self.tollgate("keys", "create", "--account", name)
        )
        account = Account(name, made["id"], SHARDS[made["shard"]], key["key"], key["id"])
        self.accounts.append(account)
        return account

    async def ready(self, seconds: float = START_S) -> None:
        """Until every gateway says so. Raises ChaosError."""
        for gateway in self.gateways:
            await until(partial(asyncio.to_thread, gateway.healthy), seconds, f"{gateway.name}: ready")

    def calm(self) -> None:
        """Every link is sound again."""
        self.replication.calm()
        for gateway in self.gateways:
            for link in gateway.links.values():
                link.calm()

    def links(self, name: str) -> list[Link]:
        """The link of that name of every gateway."""
        return [gateway.links[name] for gateway in self.gateways]


def client_of(server: Valkey) -> redis.asyncio.Redis:
    """A new client of one server, past the links."""
    return redis.asyncio.Redis.from_url(server.url(), socket_timeout=10, socket_connect_timeout=5)


async def until(condition: Callable[[], Any], seconds: float, what: str, every_s: float = 0.1) -> Any:
    """Poll until `condition()` (awaited where it can be) is truthy; its value. Raises ChaosError."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if isinstance(value, Awaitable):
            value = await value
        if value:
            return value
        if time.monotonic() > deadline:
            raise ChaosError(f"{what}: not within {seconds:g} s")
        await asyncio.sleep(every_s)


def _environ(world: World, valkey_port: int, postgres_port: int, folder: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    return {
        **kept,
        "PYTHONPATH": str(ROOT),
        "TOLLGATE_CONFIG": str(folder / "tollgate.toml"),
        "TOLLGATE_DATA_DIR": str(folder / "data"),
        "TOLLGATE_SECRET": world.secret,
        "REDIS_URL": world.valkey.url(valkey_port),
        "DATABASE_URL": world.postgres.url(postgres_port),
    }


def config_text(lease_ms: int, ports: dict[str, int]) -> str:
    """One gateway's configuration: one micro a token, its providers behind its own links."""
    lines = [CONFIG.format(lease_ms=lease_ms)]
    for name, port in ports.items():
        lines.append(f'[providers.{name}]\nkind = "openai"\nbase_url = "http://127.0.0.1:{port}/v1"\n')
    for route, steps in ROUTES.items():
        candidates = ", ".join(f'{{ provider = "{name}", model = "{model}" }}' for name, model in steps)
        lines.append(f'[routes."{route}"]\ncandidates = [{candidates}]\n')
        lines.append(f'[prices."{route}"]\ninput = "1"\noutput = "1"\n')
    return "\n".join(lines)


def _start_provider(folder: Path, name: str) -> Provider:
    log = folder / f"provider-{name}.jsonl"
    command = [sys.executable, "-P", "-m", "loadtests.simulated_provider", "--log", str(log)]
    command += ["--interval-ms", str(INTERVAL_MS), "--ttft-ms", str(TTFT_MS)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise ChaosError(f"the simulated provider did not start: exit code {process.wait(STOP_S)}")
    return Provider(name, process, int(json.loads(line)["port"]), log)


async def _add_gateway(world: World, name: str, stack: contextlib.AsyncExitStack) -> None:
    folder = world.folder / name
    folder.mkdir()
    port = free_port()
    targets = {"front": port, "valkey": world.valkey.port, "postgres": world.postgres.port}
    targets |= {provider.name: provider.port for provider in world.providers}
    links = {what: Link(f"{name} {what}", target) for what, target in targets.items()}
    for link in links.values():
        await link.start()
        stack.push_async_callback(link.aclose)
    ports = {provider.name: links[provider.name].port for provider in world.providers}
    (folder / "tollgate.toml").write_text(config_text(int(world.lease_s * 1000), ports))
    environ = _environ(world, links["valkey"].port, links["postgres"].port, folder)
    gateway = Gateway(name, folder, port, links, environ)
    world.gateways.append(gateway)
    stack.push_async_callback(asyncio.to_thread, gateway.kill)
    gateway.start()


def _end_provider(provider: Provider) -> None:
    provider.process.terminate()
    provider.process.wait(STOP_S)
    assert provider.process.stdout is not None
    provider.process.stdout.close()


@contextlib.asynccontextmanager
async def world(gateways: int = 2, accounts: int = 3, lease_s: float = 15.0) -> AsyncIterator[World]:
    """Everything started, with accounts; gone at the end, with its folder. Raises ChaosError."""
    folder = _folder()
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        valkey = Valkey(folder / "valkey")
        replication = Link("replica valkey", valkey.port)
        await replication.start()
        stack.push_async_callback(replication.aclose)
        replica = Valkey(folder / "replica", password=valkey.password, primary_port=replication.port)
        postgres = Postgres(folder / "postgres")
        made = World(folder, secrets.token_hex(24), lease_s, valkey, replica, postgres, replication)
        for server in (valkey, replica, postgres):
            stack.callback(server.remove)
        await asyncio.to_thread(_start_stores, made)
        for name in ("a", "b"):
            provider = await asyncio.to_thread(_start_provider, folder, name)
            made.providers.append(provider)
            stack.callback(_end_provider, provider)
        for number in range(gateways):
            await _add_gateway(made, f"gateway-{number}", stack)
        await made.ready()
        for _ in range(accounts):
            made.customers.append(await made.account())
        yield made


def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="tollgate-chaos-"))
    folder.chmod(0o711)  # Postgres runs as another user under root
    return folder


def _start_stores(made: World) -> None:
    made.valkey.make(small_disk=True)
    made.valkey.start()
    made.replica.make(small_disk=True)  # a failover makes it the primary
    made.replica.start()
    made.postgres.make()
    made.postgres.start()
