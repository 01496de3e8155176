"""A gateway for load: its own data folder, port and configuration, before a simulated provider with a log on disk.

Everything about it is asked as an operator would: `tollgate ... --json`, its run file, and Redis' own statistics.
Must not: import the gateway, or leave a process or a folder behind.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import redis

ROOT = Path(__file__).resolve().parent.parent
START_S, STOP_S, CLI_S = 60.0, 60.0, 180.0
ACCOUNTS, KEYS_EACH = 8, 3
CREDITS_EACH = 10_000
SESSIONS_LISTED_MAX = 10_000
INTERVAL_MS, TTFT_MS = 20, 80
"""The provider's pace: 50 tokens a second after 80 ms, so that gaps and first tokens mean something."""

ROUTES = {
    "gpt-4o-mini": ("gpt-4o-mini",),
    "falls-back": ("sim-500", "sim-error-frame:after.0", "gpt-4o-mini"),
    **{name: (name,) for name in ("sim-no-usage", "sim-reasoning", "sim-comments", "sim-cut:after.20")},
}


def config_text(provider: str) -> str:
    """The configuration: one micro a token, so that a charge is a number of tokens."""
    lines = [f'[providers.sim]\nkind = "openai"\nbase_url = "{provider}"\n']
    for name, models in ROUTES.items():
        candidates = ", ".join(f'{{ provider = "sim", model = "{model}" }}' for model in models)
        lines.append(f'[routes."{name}"]\ncandidates = [{candidates}]\n')
        lines.append(f'[prices."{name}"]\ninput = "1"\noutput = "1"\n')
    return "\n".join(lines)


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Any, seconds: float, what: str) -> Any:
    """Poll until `condition()` is truthy; its value. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.1)
    return value


@dataclass
class Instance:
    """One running gateway with its provider. `folder` has data, logs and keys; `accounts` are names."""

    folder: Path
    port: int
    provider: subprocess.Popen[bytes]
    gateway: subprocess.Popen[bytes]
    accounts: tuple[str, ...] = tuple(f"load-{number}" for number in range(ACCOUNTS))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def provider_log(self) -> Path:
        return self.folder / "provider.jsonl"

    @property
    def calls(self) -> Path:
        return self.folder / "calls.jsonl"

    @property
    def keys(self) -> Path:
        return self.folder / "keys"

    def ask(self, *arguments: str, codes: tuple[int, ...] = (0,)) -> Any:
        """What `tollgate <arguments> --json` answers. Raises RuntimeError for another exit code."""
        command = [sys.executable, "-P", "-m", "gateway.cli", *arguments, "--json"]
        environ = {**_environ(self.folder), "TOLLGATE_DATA_DIR": str(self.folder / "data")}
        done = subprocess.run(
            command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=CLI_S, check=False
        )
        if done.returncode not in codes:
            raise RuntimeError(f"tollgate {' '.join(arguments)} ended with {done.returncode}: {done.stderr[-2000:]}")
        return json.loads(done.stdout)

    def fetch(self, method: str, path: str, body: bytes | None = None, **headers: str) -> int:
        """The status of one answer of the gateway, read to its end. Raises OSError, http.client.HTTPException."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, headers)
            reply = connection.getresponse()
            reply.read()
            return reply.status
        finally:
            connection.close()

    def prepare(self) -> None:
        """Accounts with credit, and the file of their keys."""
        with ThreadPoolExecutor(2) as pool:
            texts = [text for made in pool.map(self._account, self.accounts) for text in made]
        self.keys.touch(mode=0o600)
        self.keys.write_text("\n".join(texts) + "\n")

    def _account(self, name: str) -> list[str]:
        self.ask("accounts", "create", name)
        self.ask("credits", "grant", name, str(CREDITS_EACH))
        return [self.ask("keys", "create", "--account", name)["key"] for _ in range(KEYS_EACH)]

    def redis(self) -> redis.Redis:
        """A connection to the instance's Redis, for its statistics."""
        run = json.loads(next((self.folder / "data" / "run").glob("serve-*/run.json")).read_text())
        return redis.Redis.from_url(run["redis_url"])

    def processes(self) -> dict[str, psutil.Process]:
        """The gateway's processes that hold state over time, by name: `worker-0`, ..., `ledger`."""
        found: dict[str, psutil.Process] = {}
        for child in psutil.Process(self.gateway.pid).children():
            words = child.cmdline()
            if "gateway.worker" in words:
                found[f"worker-{sum(name.startswith('worker') for name in found)}"] = child
            elif "gateway.ledger_process" in words:
                found["ledger"] = child
        return found


def _environ(folder: Path) -> dict[str, str]:
    ours = ("TOLLGATE_", "OPENAI_", "LOADTEST_", "LOCUST_", "REDIS_URL", "DATABASE_URL", "PORT")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {**kept, "TOLLGATE_CONFIG": str(folder / "tollgate.toml"), "PYTHONPATH": str(ROOT)}


def _start_provider(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    command = [sys.executable, "-P", "-m", "loadtests.simulated_provider", "--log", str(folder / "provider.jsonl")]
    command += ["--interval-ms", str(INTERVAL_MS), "--ttft-ms", str(TTFT_MS)]
    process = subprocess.Popen(command, cwd=ROOT, env=_environ(folder), stdout=subprocess.PIPE)
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"the simulated provider did not start: exit code {process.wait(STOP_S)}")
    return process, f"http://127.0.0.1:{json.loads(line)['port']}/v1"


def _start_gateway(folder: Path, port: int, workers: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-m", "gateway.cli", "serve", "--port", str(port), "--workers", str(workers)]
    command += ["--data-dir", str(folder / "data")]
    with (folder / "serve.log").open("wb") as log:
        return subprocess.Popen(command, cwd=ROOT, env=_environ(folder), stdout=log, stderr=log)


def _ready(instance: Instance) -> bool:
    if instance.gateway.poll() is not None:
        raise RuntimeError(f"the gateway did not start:\n{(instance.folder / 'serve.log').read_text()[-3000:]}")
    with contextlib.suppress(OSError, http.client.HTTPException):
        return instance.fetch("GET", "/health/ready") == 200
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


@contextlib.contextmanager
def running(workers: int = 1) -> Iterator[Instance]:
    """A fresh gateway, ready, with accounts and keys; gone at the end with its folder.

    Raises RuntimeError, TimeoutError.
    """
    folder = Path(tempfile.mkdtemp(prefix="tollgate-load-"))
    folder.chmod(0o711)  # Postgres runs as another user under root
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        provider, address = _start_provider(folder)
        stack.callback(_stop, provider)
        (folder / "tollgate.toml").write_text(config_text(address))
        port = free_port()
        gateway = _start_gateway(folder, port, workers)
        stack.callback(_stop, gateway)
        instance = Instance(folder, port, provider, gateway)
        wait_until(lambda: _ready(instance), START_S, "the gateway's readiness")
        instance.prepare()
        yield instance
