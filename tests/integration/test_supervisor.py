"""The whole supervisor in a process of its own, with tiny children: what restarts, in which order things end, what a
kill leaves behind."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from storage.embedded import EmbeddedStores

ROOT = Path(__file__).parents[2]


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def words(pid: int) -> list[str]:
    """The process's command line; empty when it has ended (a store's own children come and go)."""
    try:
        return psutil.Process(pid).cmdline()
    except psutil.NoSuchProcess:
        return []


def wait_for(done: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


@dataclass
class Running:
    """A supervisor with tiny children: its process, data folder, and the run file's content."""

    process: subprocess.Popen[str]
    data_dir: Path
    run: dict[str, Any]

    def events(self) -> list[str]:
        path = self.data_dir / "events"
        return path.read_text().splitlines() if path.exists() else []

    def descendants(self) -> list[int]:
        return [one.pid for one in psutil.Process(self.process.pid).children(recursive=True)]

    def ask(self) -> int:
        """The process id of the worker that answers a new connection."""
        with socket.create_connection(("127.0.0.1", self.run["port"]), timeout=30) as connection:
            return int(connection.makefile().readline())

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


@pytest.fixture
def data_dir() -> Iterator[Path]:
    with fresh_folder() as folder:
        yield folder


@contextlib.contextmanager
def fresh_folder() -> Iterator[Path]:
    """A data folder; stores that a failed test left in it are stopped."""
    folder = Path(tempfile.mkdtemp(prefix="tollgate-test-"))
    folder.chmod(0o711)
    yield folder
    left = EmbeddedStores(folder, durable=False)
    if EmbeddedStores.attach(folder) is not None:
        left.start()
        left.stop()
    shutil.rmtree(folder)


Serve = Callable[..., Running]


@pytest.fixture
def launch(data_dir: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    with launching_in(data_dir) as launching:
        yield launching


@contextlib.contextmanager
def launching_in(data_dir: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts supervisors in this folder, asked to end with the block."""
    with contextlib.ExitStack() as stack:

        def launching(port: int = 0, workers: int = 1, **environ: str) -> subprocess.Popen[str]:
            command = [sys.executable, "-m", "tests.support.tiny_children", "supervise", str(data_dir), str(port)]
            process = subprocess.Popen(
                [*command, str(workers)],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "MOCK_API_KEY": "a-provider-key", **environ},
            )
            stack.enter_context(process)
            stack.callback(process.wait, 60)
            stack.callback(process.terminate)
            return process

        yield launching


@pytest.fixture
def serve(launch: Callable[..., subprocess.Popen[str]], data_dir: Path) -> Serve:
    return functools.partial(serving, launch, data_dir)


def serving(launch: Callable[..., subprocess.Popen[str]], data_dir: Path, *arguments: Any, **environ: Any) -> Running:
    """A supervisor that is ready."""
    process = launch(*arguments, **environ)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("{"), line
    return Running(process, data_dir, json.loads(line))


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    """One supervisor for the tests that leave it whole."""
    with fresh_folder() as data_dir, launching_in(data_dir) as launch:
        yield serving(launch, data_dir)


def test_a_crashed_worker_is_replaced_and_no_connection_is_refused_meanwhile(running: Running) -> None:
    first = running.ask()
    os.kill(first, signal.SIGKILL)
    second = running.ask()  # made while no worker listens: it waits in the backlog of the supervisor's socket
    assert second != first
    assert second in running.descendants()
    assert psutil.Process(second).environ()["TOLLGATE_WORKER"] == "0", "it keeps its number"


def test_a_crashed_ledger_process_and_a_crashed_store_come_back(running: Running) -> None:
    stores = json.loads((running.data_dir / "servers" / "valkey.json").read_text())
    ledger = next(pid for pid in running.descendants() if words(pid)[-1:] == ["ledger"])
    os.kill(ledger, signal.SIGKILL)
    os.kill(stores["pid"], signal.SIGKILL)

    def back() -> bool:
        found = [words(pid)[-1:] for pid in running.descendants()]
        return ["ledger"] in found and EmbeddedStores.attach(running.data_dir) is not None

    wait_for(lambda: not alive(ledger) and not alive(stores["pid"]) and back())


def test_an_asked_supervisor_ends_everything_in_order(serve: Serve) -> None:
    running = serve(workers=2)
    pids = running.descendants()
    workers = [psutil.Process(pid) for pid in pids if words(pid)[-1:] == ["worker"]]
    assert sorted(worker.environ()["TOLLGATE_WORKER"] for worker in workers) == ["0", "1"]
    assert running.end() == 0
    assert running.events() == [
        "worker ends: asked, stores up",
        "worker ends: asked, stores up",
        "ledger ends: asked, stores up",
    ]
    assert not any(alive(pid) for pid in pids)
    assert EmbeddedStores.attach(running.data_dir) is None
    assert list((running.data_dir / "run").glob("serve-*")) == []


def test_while_workers_drain_new_clients_are_not_kept_waiting_by_the_supervisor(serve: Serve) -> None:
    running = serve(TINY_STUBBORN="worker")
    running.process.send_signal(signal.SIGTERM)
    wait_for(lambda: running.events() == ["worker drains"])
    listeners = [
        c for c in psutil.Process(running.process.pid).net_connections("tcp") if c.status == psutil.CONN_LISTEN
    ]
    assert listeners == []
    began = time.monotonic()
    assert running.end(signal.SIGINT) == 0
    assert time.monotonic() - began < 30
    assert running.events()[1:] == ["worker ends: asked, stores up", "ledger ends: asked, stores up"]


def test_children_of_a_killed_supervisor_leave_and_the_next_one_recovers(serve: Serve) -> None:
    running = serve()
    pids = running.descendants()
    servers = {json.loads(record.read_text())["pid"] for record in (running.data_dir / "servers").glob("*.json")}
    running.process.kill()
    running.process.wait()
    ours = [pid for pid in pids if pid not in servers and any("python" in word for word in words(pid)[:1])]
    wait_for(
        lambda: sorted(running.events()) == ["ledger ends: orphaned, stores up", "worker ends: orphaned, stores up"]
    )
    wait_for(lambda: not any(alive(pid) for pid in ours))
    assert all(alive(pid) for pid in servers)
    again = serve(running.run["port"])
    assert again.run["port"] == running.run["port"]
    assert again.ask() not in pids
    assert len(list((again.data_dir / "run").glob("serve-*"))) == 1


def test_the_run_file_is_private_and_holds_no_provider_key(running: Running) -> None:
    folder = Path(running.run["catalog_path"]).parent
    assert (folder / "run.json").stat().st_mode & 0o777 == 0o600
    assert "a-provider-key" not in (folder / "run.json").read_text()
    assert (folder / "catalog.json").exists()
    assert (running.data_dir / "secret").read_bytes().decode() not in (folder / "run.json").read_text()


def test_the_simulated_provider_answers_and_does_not_see_provider_keys(running: Running) -> None:
    port = int(running.run["simulated"]["mock"].removeprefix("http://127.0.0.1:").removesuffix("/v1"))
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
        assert connection.recv(64).startswith(b"HTTP/1.1 200")
    provider = next(one for one in running.descendants() if "loadtests.simulated_provider" in words(one))
    assert "a-provider-key" not in psutil.Process(provider).environ().values()


def test_the_live_gauges_of_a_dead_worker_disappear(running: Running) -> None:
    first = running.ask()
    metrics = Path(running.run["metrics_dir"])
    for name in (f"gauge_livesum_{first}.db", f"counter_{first}.db"):
        (metrics / name).write_bytes(b"")
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: not (metrics / f"gauge_livesum_{first}.db").exists())
    assert (metrics / f"counter_{first}.db").exists()


def test_a_taken_port_is_refused_before_anything_starts(
    launch: Callable[..., subprocess.Popen[str]], data_dir: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = launch(port)
        assert process.wait(60) == 1
    assert process.stdout is not None
    assert (
        process.stdout.read()
        == f"PortError: Port {port} on 127.0.0.1 is in use. Choose another with PORT=... or --port.\n"
    )
    assert not (data_dir / "servers").exists()


def test_a_worker_that_cannot_start_ends_the_start_and_leaves_nothing(
    launch: Callable[..., subprocess.Popen[str]], data_dir: Path
) -> None:
    process = launch(TINY_BROKEN="worker")
    assert process.wait(60) == 1
    assert process.stdout is not None
    assert "ChildError: The worker-0 process ended before it was ready (exit_code 3)" in process.stdout.read()
    assert EmbeddedStores.attach(data_dir) is None


def test_a_signal_during_the_start_ends_it_cleanly(
    launch: Callable[..., subprocess.Popen[str]], data_dir: Path
) -> None:
    process = launch()
    wait_for(lambda: (data_dir / "lock").exists())
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert EmbeddedStores.attach(data_dir) is None
    assert list((data_dir / "run").glob("serve-*")) == []
