"""`tollgate serve`: stores, schema, prices, then the child processes, kept running until asked to stop.

Order: socket bound, stores, migrations, price catalog, simulated provider, hooks (seeding), ledger process, workers.
The end is the exact reverse: workers drain first, so that what they settle still finds the ledger process and stores.
Must not: serve a request, hold a provider's key anywhere but in the environment, or decide what a child does.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import structlog
from prometheus_client import multiprocess

from config import run as run_file
from config.run import Run
from config.settings import ConfigError, Settings, is_loopback, listen_address, read_secrets
from gateway.children import LISTEN_FD_ENV, Child, ChildError, ChildSpec, Orders, Timing, stop_all, with_arguments
from gateway.openai_models import offered_routes, without_simulated
from storage.embedded import EmbeddedError, EmbeddedStores, Stores
from storage.embedded_files import prepare_data_dir
from storage.embedded_process import Locked, free, until

BACKLOG = 4096
STORES_EVERY_S = 1.0
STORES_RETRY_S = 5.0
RUN_LOCK_S = 10.0
DRAIN_GRACE_S = 10.0
"""On top of a worker's own drain, before it is killed."""

_SOURCE = str(Path(__file__).resolve().parents[1])

Result = TypeVar("Result")

log = structlog.get_logger()


class PortError(ConfigError):
    """The address to listen on cannot be used."""


def _python(module: str, *arguments: str) -> tuple[str, ...]:
    # -P: the folder that somebody happens to stand in must not offer its own `config` or `storage` package
    return (sys.executable, "-P", "-m", module, *arguments)


@dataclass(frozen=True)
class Commands:
    """How the children are started."""

    worker: tuple[str, ...] = _python("gateway.worker")
    ledger: tuple[str, ...] = _python("gateway.ledger_process")
    simulator: tuple[str, ...] = _python("loadtests.simulated_provider")


@dataclass(frozen=True)
class ServeOptions:
    """What `serve` runs with. `port` 0 takes a free one. `hooks` run once before the workers start (seeding);
    `on_ready` is called when everything serves. `durable=False` lets Postgres skip fsync (tests)."""

    settings: Settings
    config_path: Path
    data_dir: Path
    environ: Mapping[str, str]
    host: str
    port: int
    workers: int
    hooks: Sequence[Callable[[Run], Awaitable[None]]] = ()
    on_ready: Callable[[Run], None] | None = None
    commands: Commands = field(default_factory=Commands)
    timing: Timing = field(default_factory=Timing)
    durable: bool = True


def run_supervisor(options: ServeOptions) -> int:
    """Serve until SIGINT, SIGTERM or SIGHUP; 0 after an orderly end. Raises what `serve` raises."""
    return asyncio.run(serve(options))


async def serve(options: ServeOptions) -> int:
    """Start everything, wait for a signal, end everything in order. Returns 0.

    Raises ConfigError (PortError for a taken port), EmbeddedError, ChildError, storage.database.FAILED and what the
    hooks raise, after everything that had been started was ended.
    """
    return await Supervisor(options).run()


class Supervisor:
    """One run of `serve`."""

    def __init__(self, options: ServeOptions) -> None:
        self._options = options
        self._data_dir = options.data_dir.absolute()
        self._secrets = read_secrets(options.settings, options.environ)
        self._stop = asyncio.Event()
        self._orders = Orders(timing=options.timing, on_death=self._forget_metrics)
        self._folder = Path()
        self._socket: socket.socket | None = None
        self.workers: list[Child] = []

    async def run(self) -> int:
        """The whole life. Signals count from the first moment, also while things start."""
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        for number in numbers:
            loop.add_signal_handler(number, self._asked, number)
        try:
            async with AsyncExitStack() as stack:
                starting = asyncio.create_task(self._start(stack))
                stopping = asyncio.create_task(self._stop.wait())
                await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
                await _finished(starting, stopping)
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)
        log.info("stopped")
        return 0

    def _asked(self, number: signal.Signals) -> None:
        again = self._stop.is_set()
        drain_s = 0 if again else self._options.settings.bounds.drain_s
        self._stop.set()
        if again:
            self._orders.hurry.set()
        log.info("stopping at once" if again else "stopping", signal=number.name, drain_s=drain_s)

    async def _start(self, stack: AsyncExitStack) -> None:
        options = self._options
        self._socket = stack.enter_context(listen(options.host, options.port))
        if not is_loopback(options.host):
            _check_metrics_listen(options.settings.server.metrics_listen)
        prepare_data_dir(self._data_dir)
        stores = await self._start_stores(stack)
        self._folder = stack.enter_context(_run_folder(self._data_dir / "run"))
        await self._prepare_schema_and_prices(stores)
        self._orders.open()
        stack.callback(self._orders.close)
        simulated = await self._start_simulator(stack)
        run = self._describe(stores, simulated)
        run_file.write_run(self._folder / "run.json", run)
        for hook in options.hooks:
            await hook(run)
        await self._start_children(stack)
        log.info("serving", host=run.host, port=run.port, workers=run.workers)
        if options.on_ready is not None:
            options.on_ready(run)

    async def _start_stores(self, stack: AsyncExitStack) -> Stores:
        external = Stores(self._secrets.redis_url or "", self._secrets.database_url or "")
        stores = EmbeddedStores(self._data_dir, log=_log_store, durable=self._options.durable, external=external)
        stack.push_async_callback(_in_thread, stores.stop)
        found = await _in_thread(lambda: stores.start("serve"))
        watching = asyncio.create_task(_watch_stores(stores))
        stack.push_async_callback(_cancel, watching)
        return found

    async def _prepare_schema_and_prices(self, stores: Stores) -> None:
        import migrations
        from config import catalog  # imports a price library: never in a data worker, and only now

        await migrations.upgrade(stores.database_url)
        offered = await offered_routes(self._options.settings, self._secrets)
        settings = without_simulated(self._options.settings, offered)
        catalog.write(catalog.compile_catalog(settings, extra_routes=offered), self._folder / "catalog.json")

    async def _start_simulator(self, stack: AsyncExitStack) -> dict[str, str]:
        name = self._options.settings.embedded.simulate
        if name is None:
            return {}
        ours = {"REDIS_URL", "DATABASE_URL", run_file.SECRET_ENV}
        ours |= {one.api_key_env for one in self._options.settings.providers.values() if one.api_key_env}
        child = Child(
            ChildSpec(
                name="simulated provider",
                command=(*self._options.commands.simulator, "--port", "0"),
                environ={key: value for key, value in self._environ().items() if key not in ours},
                ready_on_stdout=True,
                repeat=lambda spec, line: with_arguments(spec, "--port", str(_port(line))),
            ),
            self._orders,
        )
        stack.push_async_callback(child.stop)
        return {name: f"http://127.0.0.1:{_port(await child.start())}/v1"}

    def _describe(self, stores: Stores, simulated: dict[str, str]) -> Run:
        options = self._options
        assert self._socket is not None
        made_secret = self._secrets.secret is None
        if made_secret:
            run_file.load_or_create_secret(self._data_dir, options.environ)
        (self._folder / "metrics").mkdir()
        return Run(
            redis_url=stores.redis_url,
            database_url=stores.database_url,
            data_dir=str(self._data_dir),
            config_path=str(options.config_path.absolute()),
            catalog_path=str(self._folder / "catalog.json"),
            metrics_dir=str(self._folder / "metrics"),
            host=options.host,
            port=self._socket.getsockname()[1],
            workers=options.workers,
            supervisor_pid=os.getpid(),
            secret_path=str(self._data_dir / "secret") if made_secret else None,
            simulated=simulated,
        )

    async def _start_children(self, stack: AsyncExitStack) -> None:
        assert self._socket is not None
        environ = {
            **self._environ(),
            run_file.RUN_ENV: str(self._folder / "run.json"),
            "PROMETHEUS_MULTIPROC_DIR": str(self._folder / "metrics"),
        }
        ledger = Child(ChildSpec("ledger", self._options.commands.ledger, environ, drain_s=30.0), self._orders)
        stack.push_async_callback(ledger.stop)
        await ledger.start()
        listening = self._socket.fileno()
        for number in range(self._options.workers):
            spec = ChildSpec(
                name=f"worker-{number}",
                command=self._options.commands.worker,
                environ={**environ, LISTEN_FD_ENV: str(listening), run_file.WORKER_ENV: str(number)},
                pass_fds=(listening,),
                drain_s=self._options.settings.bounds.drain_s + DRAIN_GRACE_S,
            )
            self.workers.append(Child(spec, self._orders))
        stack.push_async_callback(stop_all, self.workers)
        # Our copy goes first: once the last worker has closed its own, clients are refused instead of left waiting.
        stack.callback(self._socket.close)
        await asyncio.gather(*(worker.start() for worker in self.workers))

    def _environ(self) -> dict[str, str]:
        path = [_SOURCE, *filter(None, [self._options.environ.get("PYTHONPATH")])]
        return {**self._options.environ, "PYTHONPATH": os.pathsep.join(path)}

    def _forget_metrics(self, pid: int) -> None:
        """Drop the live gauges of a dead child; its counters stay, they must not run backwards."""
        folder = self._folder / "metrics"
        if folder.is_dir():
            multiprocess.mark_process_dead(pid, str(folder))  # type: ignore[no-untyped-call]


def listen(host: str, port: int) -> socket.socket:
    """Bind and listen before anything slow: the port is ours over every worker's restart. Raises PortError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
    except OSError as error:
        raise PortError(f"server.host: '{host}' is not an address of this machine: {error.strerror}.") from None
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(BACKLOG)
        made.setblocking(False)
    except OSError as error:
        made.close()
        raise PortError(_port_message(host, port, error)) from None
    return made


def _check_metrics_listen(address: str) -> None:
    """The ledger process binds it later, with nobody to read its words. Raises PortError."""
    host, port = listen_address(address)
    try:
        family, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        socket.create_server((str(place[0]), port), family=family).close()
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise PortError(
            f"server.metrics_listen: '{address}' cannot be used: {reason}. Name another host:port of this machine."
        ) from None


def _port_message(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"Port {port} on {host} is in use. Choose another with PORT=... or --port."
    if error.errno == errno.EACCES:
        return f"Port {port} needs more rights than this user has. Choose one above 1023 with PORT=... or --port."
    return f"Cannot listen on {host} port {port}: {error.strerror}. Set server.host, --host, PORT or --port."


@contextlib.contextmanager
def _run_folder(parent: Path) -> Iterator[Path]:
    """A fresh folder for this run, removed at the end; those of killed runs (their lock is free) are removed now."""
    with contextlib.closing(_wait_for_lock(parent / "lock")):
        for leftover in parent.glob("serve-*"):
            if free(leftover / "lock"):
                shutil.rmtree(leftover, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix="serve-", dir=parent))
        lock = Locked(folder / "lock")
    try:
        yield folder
    finally:
        lock.close()
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for_lock(path: Path) -> Locked:
    taken: list[Locked] = []

    def take() -> bool:
        with contextlib.suppress(BlockingIOError):
            taken.append(Locked(path))
        return bool(taken)

    if not until(take, RUN_LOCK_S):
        raise EmbeddedError(f"{path} is held by another process for too long.")
    return taken[0]


def _port(line: bytes) -> int:
    """The port in the simulated provider's report `{"port": N}`. Raises ChildError."""
    try:
        return int(json.loads(line)["port"])
    except (ValueError, KeyError, TypeError):
        raise ChildError(f"The simulated provider reported {line[:80]!r} instead of its port.") from None


def _log_store(message: str) -> None:
    log.info("embedded stores", step=message)


async def _watch_stores(stores: EmbeddedStores) -> None:
    """Start an embedded server again when it died by itself."""
    while True:
        await asyncio.sleep(STORES_EVERY_S)
        try:
            for name in await _in_thread(stores.ensure):
                log.error("store ended and was started again", store=name)
        except EmbeddedError as error:
            log.error("store cannot be started again", error=str(error), retry_s=STORES_RETRY_S)
            await asyncio.sleep(STORES_RETRY_S)


async def _in_thread(work: Callable[[], Result]) -> Result:
    """Run blocking work; when cancelled, still wait for its end (half-started stores could not be stopped)."""
    future = asyncio.get_running_loop().run_in_executor(None, work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait([future])
        if not future.cancelled():
            future.exception()  # seen: the cancellation is what counts
        raise


async def _finished(starting: asyncio.Task[None], stopping: asyncio.Task[bool]) -> None:
    """Return when asked to stop: give up a start that is still under way. Raises what the start raised."""
    try:
        if not starting.done():
            starting.cancel()
            await asyncio.wait([starting])
        if not starting.cancelled():
            await starting
        await stopping
    finally:
        stopping.cancel()


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])
