"""What the bench measures, as processes: the upstream, nginx, and `tollgate serve` with stores of its own.

Must not: import the gateway. It is started and asked as a user would, with its command line.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg  # type: ignore[import-untyped]

from loadtests.bench import procstat, wire

ROOT = Path(__file__).resolve().parents[2]
START_S = 60.0
STOP_S = 30.0
CREDITS = "1000000"
STORES = ("valkey", "postgres", "redis")

TLS_CONFIG = """
[providers.tls]
kind = "openai"
base_url = "https://localhost:{port}/v1"

[routes."{route}"]
candidates = [{{ provider = "tls", model = "{model}" }}]

[prices."{route}"]
input = "1"
output = "1"
"""

CONFIG = """
[server]
log_level = "info"

[providers.bench]
kind = "openai"
base_url = "http://127.0.0.1:{upstream}/v1"

[routes."{model}"]
candidates = [{{ provider = "bench", model = "{model}" }}]

[prices."{model}"]
input = "1"
output = "1"
"""
"""One micro a token, so that a charge is a number of tokens."""

NGINX = """
worker_processes 1;
daemon off;
{user}
pid {tmp}/nginx.pid;
error_log {tmp}/error.log warn;
events {{ worker_connections 16384; }}
http {{
  access_log off;
  client_body_temp_path {tmp}/body;
  proxy_temp_path {tmp}/proxy;
  fastcgi_temp_path {tmp}/fastcgi;
  uwsgi_temp_path {tmp}/uwsgi;
  scgi_temp_path {tmp}/scgi;
  keepalive_requests 1000000000;
  upstream bench {{ server 127.0.0.1:{upstream}; keepalive 4096; keepalive_requests 1000000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://bench;
      proxy_http_version 1.1;
      proxy_set_header connection "";
      proxy_buffering off;
      proxy_read_timeout 300s;
    }}
  }}
}}
"""


class BenchError(Exception):
    """Something to be measured cannot be measured; the text says why."""


@dataclass(frozen=True)
class Target:
    """Something that answers chat completions. `groups` are the processes whose CPU time is its cost."""

    name: str
    port: int
    groups: dict[str, tuple[int, ...]]
    key: str = "none"
    tls_port: int = 0
    """Of the upstream; 0 where no certificate could be made."""
    certificate: str = ""


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _process(
    command: list[str], stop: signal.Signals = signal.SIGTERM, **options: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is gone at the end."""
    process = subprocess.Popen(command, cwd=ROOT, **options)
    try:
        yield process
    finally:
        process.send_signal(stop)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def upstream() -> Iterator[Target]:
    """The provider that the others forward to; over TLS too where openssl is there to make a certificate."""
    with tempfile.TemporaryDirectory(prefix="tg-upstream-", dir="/tmp") as folder:
        files = _certificate(Path(folder))
        command = [sys.executable, "-m", "loadtests.bench.upstream", *files]
        with _process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            port, *tls = map(int, process.stdout.readline().split())
            groups: dict[str, tuple[int, ...]] = {"upstream": (process.pid,)}
            yield Target("direct", port, groups, tls_port=sum(tls), certificate="".join(files[:1]))


def _certificate(folder: Path) -> list[str]:
    """The files of a certificate of its own for localhost and of its key; nothing without openssl."""
    program = shutil.which("openssl")
    if program is None:
        return []
    files = [str(folder / "certificate.pem"), str(folder / "key.pem")]
    command = [program, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    done = subprocess.run([*command, "-out", files[0], "-keyout", files[1]], capture_output=True, check=False)
    return files if done.returncode == 0 else []


@contextlib.contextmanager
def nginx(origin: Target) -> Iterator[Target | None]:
    """nginx as a plain proxy: one worker, no buffering, kept-alive upstream connections. None where it is missing."""
    program = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
    if program is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="tg-nginx-", dir="/tmp") as folder:
        port = free_port()
        user = "user root;" if os.getuid() == 0 else ""
        text = NGINX.format(tmp=folder, upstream=origin.port, port=port, user=user)
        Path(folder, "nginx.conf").write_text(text)
        command = [program, "-c", f"{folder}/nginx.conf", "-p", folder, "-e", f"{folder}/error.log"]
        with _process(command, stdin=subprocess.DEVNULL) as process:
            _wait(lambda: _connects(port), "nginx", lambda: Path(folder, "error.log").read_text()[-500:])
            workers = tuple(procstat.children(process.pid))
            yield Target("nginx", port, {"worker": workers, "tree": (process.pid, *workers), **origin.groups})


@dataclass(frozen=True)
class Tollgate:
    """One running `tollgate serve`. `ready_s`: from its start to the first answer that says ready."""

    target: Target
    data_dir: Path
    environ: dict[str, str]
    database_url: str
    redis_url: str
    ready_s: float
    account: str = ""

    def ledger(self) -> tuple[int, int]:
        """Finished sessions of the bench's account in Postgres, and their charges in micros."""

        async def ask() -> tuple[int, int]:
            connection = await asyncpg.connect(self.database_url)
            try:
                query = "SELECT count(*), coalesce(sum(charged), 0)::bigint FROM session WHERE account_id = $1"
                row = await connection.fetchrow(query, self.account)
                return int(row[0]), int(row[1])
            finally:
                await connection.close()

        return asyncio.run(ask())


@contextlib.contextmanager
def tollgate(origin: Target, *, workers: int = 1, beside: Tollgate | None = None) -> Iterator[Tollgate]:
    """`tollgate serve` in front of `origin`, with an account, credit and a key. `beside`: another whose stores,
    account and key it shares; its start is then one with external stores."""
    # Not below a user's folder: it is closed to the unprivileged user that Postgres runs as under root.
    folder = Path(tempfile.mkdtemp(prefix="tg-bench-", dir="/tmp"))
    folder.chmod(0o755)
    config, port = folder / "tollgate.toml", free_port()
    config.write_text(CONFIG.format(upstream=origin.port, model=wire.MODEL))
    if origin.tls_port:
        more = TLS_CONFIG.format(port=origin.tls_port, route=wire.TLS_MODEL, model=wire.MODEL)
        config.write_text(config.read_text() + more)
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("TOLLGATE_", "OPENAI_"))}
    environ |= {"TOLLGATE_CONFIG": str(config), "TOLLGATE_DATA_DIR": str(folder / "data")}
    environ["TOLLGATE_SECRET"] = beside.environ["TOLLGATE_SECRET"] if beside else secrets.token_hex(32)
    if origin.tls_port:
        environ["SSL_CERT_FILE"] = origin.certificate  # OpenSSL's own variable for whom to trust
    if beside is not None:
        environ |= {"REDIS_URL": beside.redis_url, "DATABASE_URL": beside.database_url}
    command = [sys.executable, "-m", "gateway.cli", "serve", "--port", str(port), "--workers", str(workers)]
    log = folder / "serve.log"
    try:
        with log.open("wb") as out:
            began = time.monotonic()
            with _process(command, env=environ, stdin=subprocess.DEVNULL, stdout=out, stderr=out) as process:
                _wait(lambda: process.poll() is not None or _ready(port), "tollgate", lambda: log.read_text()[-2000:])
                ready_s = time.monotonic() - began
                if process.poll() is not None:
                    raise BenchError(f"tollgate serve ended:\n{log.read_text()[-2000:]}")
                yield _described(process.pid, port, folder / "data", environ, origin, beside, ready_s)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _described(
    pid: int,
    port: int,
    data_dir: Path,
    environ: dict[str, str],
    origin: Target,
    beside: Tollgate | None,
    ready_s: float,
) -> Tollgate:
    family = procstat.children(pid)
    workers = tuple(child for child, words in family.items() if "gateway.worker" in words)
    ours = tuple(child for child, words in family.items() if not any(name in words[0] for name in STORES))
    groups = {"worker": workers, "tree": (pid, *ours), **origin.groups}
    if beside is not None:
        target = Target("tollgate", port, groups, beside.target.key)
        return Tollgate(target, data_dir, environ, beside.database_url, beside.redis_url, ready_s, beside.account)
    (run_file,) = data_dir.glob("run/*/run.json")
    run = json.loads(run_file.read_text())
    account = _command(environ, "accounts", "create", "bench")["id"]
    _command(environ, "credits", "grant", account, CREDITS)
    key = _command(environ, "keys", "create", "--account", account)["key"]
    target = Target("tollgate", port, groups, key)
    return Tollgate(target, data_dir, environ, run["database_url"], run["redis_url"], ready_s, account)


def _command(environ: dict[str, str], *arguments: str) -> dict[str, Any]:
    """A call of the command line; its JSON."""
    command = [sys.executable, "-m", "gateway.cli", *arguments, "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode != 0:
        raise BenchError(f"tollgate {' '.join(arguments)}: {done.stderr[-500:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _connects(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _wait(condition: Any, name: str, why: Any) -> None:
    deadline = time.monotonic() + START_S
    while not condition():
        if time.monotonic() > deadline:
            raise BenchError(f"{name} was not ready within {START_S:.0f} s: {why()}")
        time.sleep(0.01)
