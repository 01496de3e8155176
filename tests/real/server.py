"""Runs llama-cpp-python's OpenAI server as a process of its own. Must not import it: it lives in another environment.

The server is used as its authors ship it (`python -m llama_cpp.server`), one model, loopback only.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MODEL = "tiny-random"
API_KEY = "local-real-server"
_READY_S = 60.0
_STOP_S = 10.0
_PORT_ATTEMPTS = 3


class ServerError(Exception):
    """The real inference server did not start."""


@dataclass(frozen=True)
class RealServer:
    """A server that answers: `url` is its OpenAI base address, `model` its model's name, `log` what it printed."""

    url: str
    model: str
    log: Path


@contextmanager
def running(python: Path, model_file: Path, log: Path) -> Iterator[RealServer]:
    """Start the server, wait until it answers, stop it at the end. Raises ServerError with the tail of its log."""
    process, url = _start(python, model_file, log)
    try:
        yield RealServer(url, MODEL, log)
    finally:
        _stop(process)


def _start(python: Path, model_file: Path, log: Path) -> tuple[subprocess.Popen[bytes], str]:
    for _ in range(_PORT_ATTEMPTS):  # another program may take the free port before the server binds it
        port = _free_port()
        url = f"http://127.0.0.1:{port}/v1"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [str(python), "-m", "llama_cpp.server", *_options(model_file, port)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # Its options are its whole configuration: it would read settings from the environment too.
                env={name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ},
            )
        if _becomes_ready(process, url):
            return process, url
        _stop(process)
        if b"address already in use" not in log.read_bytes():
            break
    tail = log.read_text(encoding="utf-8", errors="replace")[-2000:]
    raise ServerError(f"the inference server did not answer within {_READY_S:.0f} s; its log ({log}) ends:\n{tail}")


def _options(model_file: Path, port: int) -> list[str]:
    return [
        *("--model", str(model_file), "--model_alias", MODEL),
        *("--host", "127.0.0.1", "--port", str(port), "--api_key", API_KEY),
        *("--n_ctx", "2048", "--n_threads", "1", "--n_threads_batch", "1", "--verbose", "false"),
        # The same prompt gets the same answer, so that a test that passes once passes again.
        *("--seed", "20261120"),
        # By default a running stream is cut, with [DONE], as soon as another request arrives (docs/real-servers.md).
        *("--interrupt_requests", "false"),
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _becomes_ready(process: subprocess.Popen[bytes], url: str) -> bool:
    deadline = time.monotonic() + _READY_S
    request = urllib.request.Request(f"{url}/models", headers={"authorization": f"Bearer {API_KEY}"})
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=1.0) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.1)  # a poll's pause, not synchronisation: the loop ends on an answer, an exit or the deadline
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and whatever it started: its session is a process group of its own."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
