"""LiteLLM and Portkey as processes: installed where they can be, started on a free port, gone with all they started.

Both are as lean as they can be set: one process, no database, no log of requests, nothing fetched from a network.
Must not: measure, or bring anything of theirs into our own environment.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loadtests.bench import procstat, stack, wire
from loadtests.bench.stack import BenchError, Target

INSTALL_S = 900.0
START_S = 120.0
STOP_S = 15.0
VENV = stack.ROOT / ".venv-peers"
LOCK = stack.ROOT / "requirements-peers.lock"
NPM_FOLDER = stack.ROOT / "build" / "peers"
NPM_FILES = stack.ROOT / "loadtests" / "bench" / "portkey"
"""Its package.json keeps @hono/node-server at the version of Portkey's own lock file: with 1.19 every stream is a 500,
"TypeError: immutable" (Portkey's issues 1389 and 1550; its lock's version: 1604)."""
GATEWAY = NPM_FOLDER / "node_modules" / "@portkey-ai" / "gateway"

LITELLM_CONFIG = f"""
model_list:
  - model_name: {wire.MODEL}
    litellm_params:
      model: openai/{wire.MODEL}
      api_base: http://127.0.0.1:{{upstream}}/v1
      api_key: none
litellm_settings:
  telemetry: false
  disable_streaming_logging: true
  request_timeout: 600
general_settings:
  master_key: sk-bench
"""
LITELLM_ENVIRON = {
    "LITELLM_MODE": "PRODUCTION",
    "LITELLM_LOG": "ERROR",
    "DISABLE_ADMIN_UI": "True",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_LOCAL_ANTHROPIC_BETA_HEADERS": "True",
    "LITELLM_LOCAL_AUTOROUTER_PRESETS": "True",
    "LITELLM_LOCAL_BLOG_POSTS": "True",
    "LITELLM_LOCAL_POLICY_TEMPLATES": "True",
}


class Missing(Exception):
    """A peer cannot be had here. The text is one line that names what is missing."""


@dataclass(frozen=True)
class Peer:
    """How to get and start one. `install` gives its version or raises Missing. In `command`, `key` and `config`:
    {port} its own, {upstream} that of the upstream, {config} the file with `config`."""

    name: str
    title: str
    install: Callable[[], str]
    command: tuple[str, ...]
    key: str
    config: str = ""
    environ: dict[str, str] = field(default_factory=dict)


def reason(output: str) -> str:
    """The line of an installer's output that tells most: the first that calls itself an error, else the last."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith(("error", "npm error", "npm err!"))]
    return next(iter(errors or lines[-1:]), "no word about why")


def run(command: Sequence[str], failed: str, limit_s: float = INSTALL_S) -> str:
    """What a command printed. Raises Missing when it is not there, fails or takes longer than `limit_s` seconds."""
    try:
        done = subprocess.run(
            command,
            cwd=stack.ROOT,
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError:
        raise Missing(f"{Path(command[0]).name} is missing") from None
    except subprocess.TimeoutExpired:
        raise Missing(f"{failed}: not done within {limit_s:.0f} s") from None
    if done.returncode != 0:
        raise Missing(f"{failed}: {reason(done.stderr or done.stdout)}")
    return done.stdout


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _installed(stamp: Path, lock: Path) -> bool:
    """Whether what this lock file says was installed to the end."""
    return stamp.exists() and stamp.read_text() == _digest(lock)


def _litellm() -> str:
    """Install LiteLLM into .venv-peers. Its version; raises Missing."""
    python, stamp = str(VENV / "bin" / "python"), VENV / ".installed"
    if not _installed(stamp, LOCK):
        print("Installing LiteLLM into .venv-peers ...", file=sys.stderr, flush=True)
        shutil.rmtree(VENV, ignore_errors=True)
        run([sys.executable, "-m", "venv", str(VENV)], "no virtual environment can be made")
        pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--retries", "1"]
        run([*pip, "--require-hashes", "-r", str(LOCK)], f"pip cannot install {LOCK.name}")
        stamp.write_text(_digest(LOCK))
    code = "import importlib.metadata; print(importlib.metadata.version('litellm'))"
    return run([python, "-c", code], "it cannot be asked for its version").strip()


def _portkey() -> str:
    """Install Portkey into build/peers. Its version; raises Missing."""
    if shutil.which("node") is None:
        raise Missing("node is missing")
    stamp, lock = NPM_FOLDER / ".installed", NPM_FILES / "package-lock.json"
    if not _installed(stamp, lock):
        print("Installing Portkey into build/peers ...", file=sys.stderr, flush=True)
        NPM_FOLDER.mkdir(parents=True, exist_ok=True)
        for file in ("package.json", "package-lock.json"):
            shutil.copy(NPM_FILES / file, NPM_FOLDER / file)
        npm = ["npm", "ci", "--ignore-scripts", "--no-fund", "--no-audit", "--loglevel=error", "--fetch-retries=1"]
        run([*npm, "--prefix", str(NPM_FOLDER)], "npm cannot install @portkey-ai/gateway")
        stamp.write_text(_digest(lock))
    return str(json.loads((GATEWAY / "package.json").read_text())["version"])


LITELLM = Peer(
    "litellm",
    "LiteLLM",
    _litellm,
    (
        str(VENV / "bin" / "litellm"),
        "--config",
        "{config}",
        "--host",
        "127.0.0.1",
        "--port",
        "{port}",
        "--num_workers",
        "1",
    ),
    key="sk-bench",
    config=LITELLM_CONFIG,
    environ=LITELLM_ENVIRON,
)
PORTKEY = Peer(
    "portkey",
    "Portkey",
    _portkey,
    ("node", str(GATEWAY / "build" / "start-server.js"), "--port={port}", "--headless"),
    # It is told by headers where to go. The load writes a key as it is, so they ride on the key's line.
    key="none\r\nx-portkey-provider: openai\r\nx-portkey-custom-host: http://127.0.0.1:{upstream}/v1",
    # Without it Portkey refuses a provider on loopback.
    environ={"NODE_ENV": "production", "TRUSTED_CUSTOM_HOSTS": "127.0.0.1,localhost"},
)


def family(pid: int) -> tuple[int, ...]:
    """A process and all that descend from it."""
    return (pid, *(each for child in sorted(procstat.children(pid)) for each in family(child)))


@contextlib.contextmanager
def started(peer: Peer, origin: Target) -> Iterator[Target]:
    """The peer, answering. Raises BenchError when it does not within START_S, or when its processes were not the same
    at the end (their CPU time would then not be its cost)."""
    with tempfile.TemporaryDirectory(prefix="tg-peer-", dir="/tmp") as folder:
        config, log, port = Path(folder, "config.yaml"), Path(folder, "log"), stack.free_port()
        names = {"port": port, "upstream": origin.port, "config": config}
        config.write_text(peer.config.format(**names))
        command = [word.format(**names) for word in peer.command]
        key = peer.key.format(**names)
        # Of our environment as little as can be: a proxy, a database or a provider's key would change what it does.
        environ = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        environ |= {"HOME": folder, **peer.environ}
        with log.open("wb") as out:
            # A session of its own, so that all it started can be stopped with it.
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        try:
            _wait(peer, process, lambda: _answers(port, wire.request(port, key)), log)
            pids = family(process.pid)
            yield Target(peer.name, port, {"worker": pids, "tree": pids, **origin.groups}, key)
            if family(process.pid) != pids:
                raise BenchError(f"{peer.name}: its processes changed while it was measured\n{_tail(log)}")
        finally:
            _stop(process)


def _wait(peer: Peer, process: subprocess.Popen[bytes], ready: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while not ready():
        if process.poll() is not None:
            raise BenchError(f"{peer.name} ended with {process.returncode}:\n{_tail(log)}")
        if time.monotonic() > deadline:
            raise BenchError(f"{peer.name} gave no answer within {START_S:.0f} s:\n{_tail(log)}")
        time.sleep(0.2)


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:]


def _answers(port: int, request: bytes) -> bool:
    """Whether a whole request is answered with 200."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(request)
        return connection.recv(12) == b"HTTP/1.1 200"
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the process and whatever of its session is left."""
    with contextlib.suppress(ProcessLookupError):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_S)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
