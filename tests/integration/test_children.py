"""One supervised child process: its report, its restarts, its end."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from gateway.children import Child, ChildError, ChildSpec, Orders, Timing, with_arguments

READY = "import os, signal, sys, time; os.write(int(os.environ['TOLLGATE_READY_FD']), b'ready\\n'); "
SLEEP = "time.sleep(60)"


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def until(done: Callable[[], bool], seconds: float = 30.0) -> None:
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
