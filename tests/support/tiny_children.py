"""Tiny stand-ins for a data worker and a ledger process, and a supervisor around them in a process of its own.

`python -m tests.support.tiny_children worker|ledger` is a child; `supervise <data dir> <port> [workers]` serves with
such children on real stores, prints the run file's content once ready, and then the line of each error.
A child appends what happens to it to `<data dir>/events`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path

from config import logs
from config.run import Run, read_run
from config.settings import SHIPPED, ConfigError, load
from gateway import supervisor
from gateway.children import LISTEN_FD_ENV, ChildError, Timing, tell_ready, watch_parent
from storage.embedded import EmbeddedError, EmbeddedStores

ME = (sys.executable, "-m", "tests.support.tiny_children")


def note(event: str) -> None:
    with (Path(read_run().data_dir) / "events").open("a") as file:
        file.write(event + "\n")


async def child(name: str) -> None:
    """Serve until SIGTERM or until the supervisor is gone; say which stores still answered then."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    reason = "asked"

    def gone() -> None:
        nonlocal reason
        reason = "orphaned"
        stop.set()

    stubborn = os.environ.get("TINY_STUBBORN") == name
    loop.add_signal_handler(signal.SIGTERM, (lambda: note(f"{name} drains")) if stubborn else stop.set)
    loop.add_signal_handler(signal.SIGINT, stop.set)
    watch_parent(loop, gone)
    if name == "worker":
        await asyncio.start_server(answer, sock=listening())
    if os.environ.get("TINY_BROKEN") == name:
        sys.exit(3)
    tell_ready()
    await stop.wait()
    stores = EmbeddedStores.attach(Path(read_run().data_dir))
    note(f"{name} ends: {reason}, stores {'up' if stores else 'down'}")


def listening() -> socket.socket:
    return socket.socket(fileno=int(os.environ[LISTEN_FD_ENV]))


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Each connection gets our process id."""
    writer.write(f"{os.getpid()}\n".encode())
    writer.close()


def supervise(data_dir: Path, port: int, workers: int) -> int:
    logs.configure("info", "supervisor")

    def ready(run: Run) -> None:
        print((Path(run.catalog_path).parent / "run.json").read_text(), flush=True)

    options = supervisor.ServeOptions(
        settings=load(SHIPPED),
        config_path=SHIPPED,
        data_dir=data_dir,
        environ=os.environ,
        host="127.0.0.1",
        port=port,
        workers=workers,
        on_ready=ready,
        commands=supervisor.Commands(worker=(*ME, "worker"), ledger=(*ME, "ledger")),
        timing=Timing(hurry_s=1.0),
        durable=False,
    )
    try:
        return supervisor.run_supervisor(options)
    except (ConfigError, EmbeddedError, ChildError) as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        return 1


if __name__ == "__main__":
    if sys.argv[1] == "supervise":
        sys.exit(supervise(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
    asyncio.run(child(sys.argv[1]))
