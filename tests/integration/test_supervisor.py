"""The supervisor: real child processes and stores; what restarts, in which order things end, what a kill leaves."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from gateway.children import Child, ChildError, ChildSpec, Orders, Timing, with_arguments
from storage.embedded import EmbeddedStores

ROOT = Path(__file__).parents[2]
READY = "import os, signal, sys, time; os.write(int(os.environ['TOLLGATE_READY_FD']), b'ready\\n'); "
SLEEP = "time.sleep(60)"


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(done: Callable[[], bool], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


async def until(done: Callable[[], bool], seconds: float = 15.0) -> None:
    async with asyncio.timeout(seconds):
        while not done():
            await asyncio.sleep(0.01)


@dataclass
class Nursery:
    """Children of one test, with the deaths that were announced."""

    orders: Orders
    deaths: list[int]
    made: list[Child]

    def child(self, script: str, **options: Any) -> Child:
        spec = ChildSpec(name="tiny", command=(sys.executable, "-c", script), environ=dict(os.environ), **options)
        self.made.append(Child(spec, self.orders))
        return self.made[-1]


@pytest.fixture
async def nursery() -> AsyncIterator[Nursery]:
    deaths: list[int] = []
    timing = Timing(backoff_first_s=0.05, backoff_max_s=0.4, healthy_s=30.0, start_s_max=15.0, hurry_s=10.0)
    orders = Orders(timing=timing, on_death=deaths.append)
    orders.open()
    made: list[Child] = []
    yield Nursery(orders, deaths, made)
    orders.hurry.set()
    for child in made:
        await child.stop()
    orders.close()


async def test_a_child_reports_when_it_serves_and_has_a_session_of_its_own(nursery: Nursery) -> None:
    child = nursery.child(READY + SLEEP)
    assert await child.start() == b"ready\n"
    assert child.serving
    assert child.pid is not None
    assert os.getsid(child.pid) == child.pid


async def test_a_crashed_child_is_started_again_and_its_death_announced(nursery: Nursery) -> None:
    child = nursery.child(READY + SLEEP)
    await child.start()
    first = child.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await until(lambda: child.serving and child.pid != first)
    assert nursery.deaths == [first]


async def test_a_child_that_keeps_crashing_is_started_ever_more_slowly_up_to_a_bound(nursery: Nursery) -> None:
    ended: list[float] = []
    nursery.orders.on_death = lambda _: ended.append(time.monotonic())
    child = nursery.child(READY + "sys.exit(1)")
    await child.start()
    await until(lambda: len(ended) >= 7)
    gaps = [after - before for before, after in itertools.pairwise(ended)]
    for gap, pause in zip(gaps, (0.05, 0.1, 0.2, 0.4, 0.4, 0.4), strict=False):
        assert gap >= pause
    assert gaps[5] < 0.8 + 2.0


async def test_a_child_that_ends_before_its_report_fails_the_start_with_its_exit_code(nursery: Nursery) -> None:
    child = nursery.child("import sys; sys.exit(7)")
    with pytest.raises(ChildError, match=r"tiny process ended before it was ready \(exit_code 7\)"):
        await child.start()
    assert child.starts == 1


async def test_a_command_that_does_not_exist_fails_the_start(nursery: Nursery) -> None:
    child = Child(ChildSpec("absent", ("/nonexistent/program",), {}), nursery.orders)
    with pytest.raises(ChildError, match="absent process ended before it was ready"):
        await child.start()
    await child.stop()


async def test_a_child_that_never_reports_is_killed_at_the_bound(nursery: Nursery) -> None:
    nursery.orders.timing = Timing(start_s_max=0.3)
    child = nursery.child("import time; " + SLEEP)
    with pytest.raises(ChildError, match="signal SIGKILL"):
        await child.start()


async def test_stopping_lets_a_child_drain(nursery: Nursery, tmp_path: Path) -> None:
    drained = tmp_path / "drained"
    script = f"signal.signal(15, lambda *_: (time.sleep(0.3), open({str(drained)!r}, 'w').close(), sys.exit(0))); "
    child = nursery.child("import signal, sys, time, os; " + script + READY + SLEEP)
    await child.start()
    pid = child.pid
    await child.stop()
    assert drained.exists()
    assert nursery.deaths == [pid]
    assert child.starts == 1


async def test_a_child_that_ignores_the_stop_is_killed_after_its_drain(nursery: Nursery) -> None:
    child = nursery.child("import signal; signal.signal(15, signal.SIG_IGN); " + READY + SLEEP, drain_s=0.3)
    await child.start()
    pid = child.pid
    assert pid is not None
    await child.stop()
    assert not alive(pid)


async def test_hurrying_interrupts_a_drain(nursery: Nursery) -> None:
    ignore = "import signal; signal.signal(15, signal.SIG_IGN); signal.signal(2, signal.SIG_DFL); "
    child = nursery.child(ignore + READY + SLEEP, drain_s=60.0)
    await child.start()
    stopping = asyncio.create_task(child.stop())
    nursery.orders.hurry.set()
    async with asyncio.timeout(10):
        await stopping


async def test_a_child_in_its_pause_is_not_started_again_once_stopped(nursery: Nursery) -> None:
    nursery.orders.timing = Timing(backoff_first_s=60.0)
    child = nursery.child(READY + SLEEP)
    await child.start()
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    await until(lambda: bool(nursery.deaths))
    async with asyncio.timeout(10):
        await child.stop()
    assert child.starts == 1


async def test_a_child_that_says_more_than_its_report_is_not_blocked(nursery: Nursery, tmp_path: Path) -> None:
    said = tmp_path / "said"
    script = f"import time; print('ready', flush=True); print('x' * 500_000, flush=True); open({str(said)!r}, 'w'); "
    await nursery.child(script + SLEEP, ready_on_stdout=True).start()
    await until(said.exists)


async def test_what_a_child_chose_at_its_first_start_is_kept_over_restarts(nursery: Nursery) -> None:
    script = "import sys, time; print(sys.argv[1:] or 'chosen', flush=True); "
    child = nursery.child(
        script + SLEEP,
        ready_on_stdout=True,
        repeat=lambda spec, line: with_arguments(spec, "--port", line.decode().strip()),
    )
    assert await child.start() == b"chosen\n"
    first = child.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await until(lambda: child.serving and child.pid != first)
    assert child.spec.command[-2:] == ("--port", "chosen")
    assert child.pid is not None
    assert psutil.Process(child.pid).cmdline()[-2:] == ["--port", "chosen"]


# -- the whole supervisor, in a process of its own ---------------------------------------------------------------------


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
        with socket.create_connection(("127.0.0.1", self.run["port"]), timeout=15) as connection:
            return int(connection.makefile().readline())

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


@pytest.fixture
def data_dir() -> Iterator[Path]:
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
    def serving(*arguments: Any, **environ: Any) -> Running:
        process = launch(*arguments, **environ)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("{"), line
        return Running(process, data_dir, json.loads(line))

    return serving


def test_a_crashed_worker_is_replaced_and_no_connection_is_refused_meanwhile(serve: Serve) -> None:
    running = serve()
    first = running.ask()
    os.kill(first, signal.SIGKILL)
    second = running.ask()  # made while no worker listens: it waits in the backlog of the supervisor's socket
    assert second != first
    assert second in running.descendants()


def test_a_crashed_ledger_process_and_a_crashed_store_come_back(serve: Serve) -> None:
    running = serve()
    stores = json.loads((running.data_dir / "servers" / "valkey.json").read_text())
    ledger = next(pid for pid in running.descendants() if psutil.Process(pid).cmdline()[-1] == "ledger")
    os.kill(ledger, signal.SIGKILL)
    os.kill(stores["pid"], signal.SIGKILL)

    def back() -> bool:
        found = [psutil.Process(pid).cmdline()[-1:] for pid in running.descendants() if alive(pid)]
        return ["ledger"] in found and EmbeddedStores.attach(running.data_dir) is not None

    wait_for(lambda: not alive(ledger) and not alive(stores["pid"]) and back())


def test_an_asked_supervisor_ends_everything_in_order(serve: Serve) -> None:
    running = serve(workers=2)
    pids = running.descendants()
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
    ours = [pid for pid in pids if pid not in servers and psutil.pid_exists(pid)]
    wait_for(
        lambda: sorted(running.events()) == ["ledger ends: orphaned, stores up", "worker ends: orphaned, stores up"]
    )
    wait_for(lambda: not any(alive(pid) and "postgres" not in psutil.Process(pid).name() for pid in ours))
    assert all(alive(pid) for pid in servers)
    again = serve(running.run["port"])
    assert again.run["port"] == running.run["port"]
    assert again.ask() not in pids
    assert len(list((again.data_dir / "run").glob("serve-*"))) == 1


def test_the_run_file_is_private_and_holds_no_provider_key(serve: Serve) -> None:
    running = serve()
    folder = Path(running.run["catalog_path"]).parent
    assert (folder / "run.json").stat().st_mode & 0o777 == 0o600
    assert "a-provider-key" not in (folder / "run.json").read_text()
    assert (folder / "catalog.json").exists()
    assert (running.data_dir / "secret").read_bytes().decode() not in (folder / "run.json").read_text()


def test_the_simulated_provider_answers_and_does_not_see_provider_keys(serve: Serve) -> None:
    running = serve()
    port = int(running.run["simulated"]["mock"].removeprefix("http://127.0.0.1:").removesuffix("/v1"))
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
        assert connection.recv(64).startswith(b"HTTP/1.1 200")
    provider = next(
        one for one in running.descendants() if "loadtests.simulated_provider" in psutil.Process(one).cmdline()
    )
    assert "a-provider-key" not in psutil.Process(provider).environ().values()


def test_the_live_gauges_of_a_dead_worker_disappear(serve: Serve) -> None:
    running = serve()
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
        assert process.wait(30) == 1
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
