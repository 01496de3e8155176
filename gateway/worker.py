"""A data worker: one event loop that serves on the supervisor's socket until it is told to drain.

Must not: be started by hand (it needs the supervisor's run file and socket), or import SQLAlchemy or price tables.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import structlog
import uvicorn

from config import logs, run, settings
from gateway.children import LISTEN_FD_ENV, tell_ready, watch_parent
from gateway.http_protocol import protocol
from gateway.lifespan import Worker, open_worker

log = structlog.get_logger()

ORPHAN_DRAIN_S = 2.0
KEEP_ALIVE_S = 75
COLLECT_AFTER = 10_000
"""Objects made, and not freed, before the collector looks at them."""


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers (draining is ours), and with a word to the supervisor once it accepts."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        tell_ready()


async def serve() -> None:
    """Run until SIGTERM (drain) or until the supervisor is gone (short drain)."""
    this_run = run.read_run()
    config = settings.with_openai(settings.load(Path(this_run.config_path)), os.environ)
    logs.configure(config.server.log_level, "worker")
    secrets = settings.read_secrets(config, os.environ)
    pepper = run.load_secret(this_run, os.environ)
    listening = socket.socket(fileno=int(os.environ[LISTEN_FD_ENV]))
    number = run.worker_number(os.environ)
    async with open_worker(this_run, config, secrets, pepper, number) as worker:
        _spare_collections()
        server = _Server(
            uvicorn.Config(
                worker.app,
                http=protocol(config.bounds.client_header_ms, config.bounds.client_write_ms, KEEP_ALIVE_S),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,  # nobody here reads a client's address
                server_header=False,
                timeout_graceful_shutdown=1,
                backlog=4096,
            )
        )
        await _serve(server, worker, listening)


def _spare_collections() -> None:
    """What was loaded at the start stays for ever, so the collector need not look at it again; and the garbage of a
    request goes by its reference counts, so that collecting cycles after every 700 objects would only cost."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER, 10, 10)


async def _serve(server: _Server, worker: Worker, listening: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    seconds = 0.0

    def asked(drain_s: float) -> None:
        nonlocal seconds
        if stop.is_set():
            worker.live.end_all()  # asked twice: hurry
            return
        seconds = drain_s
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked, float(worker.bounds.drain_s))
    watch_parent(loop, lambda: asked(ORPHAN_DRAIN_S))
    serving = loop.create_task(server.serve(sockets=[listening]))
    stopping = loop.create_task(stop.wait())
    await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if stop.is_set():
        log.info("draining", seconds=seconds, sessions=len(worker.live))
        await worker.live.drain(seconds)
    server.should_exit = True
    await serving


def main() -> int:
    """Entry of `python -m gateway.worker`."""
    import uvloop

    try:
        uvloop.run(serve())
    except settings.ConfigError as error:
        print(f"tollgate: {error}", file=sys.stderr)  # noqa: T201 - before there is a log
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
