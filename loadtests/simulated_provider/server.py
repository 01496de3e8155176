"""The server: HTTP/1.1 connections on uvloop, read by httptools, and the process around them.

Must not: decide what to answer (app.py and plan.py do), print anything but the one line with the port, or outlive its
parent when it was told who that is.
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import json
import os
import signal
import socket
import struct
import sys
from collections import deque
from typing import Final, cast

import httptools
import uvloop

from loadtests.simulated_provider import log, steps, text, wire
from loadtests.simulated_provider.app import Provider
from loadtests.simulated_provider.log import Exchange, Request, ServiceLog
from loadtests.simulated_provider.plan import Pace, Plan
from loadtests.simulated_provider.scripts import MS_MAX
from loadtests.simulated_provider.steps import Step

BODY_BYTES_MAX: Final = 64 * 1024 * 1024
HEADER_BYTES_MAX: Final = 256 * 1024
PIPELINE_MAX: Final = 16
PARENT_FD_ENV: Final = "TOLLGATE_PARENT_FD"


class _Refused(Exception):
    """The request breaks a bound of this server."""


class Connection(asyncio.Protocol):
    """One client connection: requests in, one after the other their plans out."""

    def __init__(self, provider: Provider, open_connections: set[Connection]) -> None:
        self._provider, self._open = provider, open_connections
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._queue: deque[tuple[Request, bool]] = deque()
        self._plan: Plan | None = None
        self._exchange: Exchange | None = None
        self._ahead: Step | None = None
        self._timer: asyncio.Handle | None = None
        self._due = 0.0
        self._paused = self._waiting = self._keep_alive = False
        self._forget_request()

    def _forget_request(self) -> None:
        self._url = b""
        self._headers: list[tuple[str, str]] = []
        self._header_bytes = 0
        self._body: list[bytes] = []
        self._body_bytes = 0

    # -- asyncio ------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but its class
        self._open.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._open.discard(self)
        self._queue.clear()
        self._end(completed=False, aborted=True)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        if self._waiting:
            self._waiting = False
            self._play()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade, _Refused) as error:
            self._refuse(str(error))

    def _refuse(self, why: str) -> None:
        if self._plan is None:
            body = wire.error_body(f"Bad request: {why}", "invalid_request_error")
            headers = [("content-length", str(len(body))), ("connection", "close")]
            self._transport.write(wire.head(400, headers, "refused") + body)
        self._transport.close()

    # -- httptools ----------------------------------------------------------------------------------------------

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_bytes += len(name) + len(value)
        if self._header_bytes > HEADER_BYTES_MAX:
            raise _Refused("the headers are too large")
        self._headers.append((name.decode("latin-1").lower(), value.decode("latin-1")))

    def on_headers_complete(self) -> None:
        if ("expect", "100-continue") in self._headers and self._plan is None:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self._body_bytes > BODY_BYTES_MAX:
            raise _Refused("the body is too large")
        self._body.append(body)

    def on_message_complete(self) -> None:
        path, _, query = self._url.decode("latin-1").partition("?")
        http10 = self._parser.get_http_version() == "1.0"
        method = self._parser.get_method().decode("latin-1")
        request = Request(method, path, query, self._headers, b"".join(self._body), http10)
        self._queue.append((request, bool(self._parser.should_keep_alive())))
        self._forget_request()
        if len(self._queue) > PIPELINE_MAX:
            raise _Refused("too many requests in one go")
        if self._plan is None:
            self._begin()

    # -- playing a plan -----------------------------------------------------------------------------------------

    def _begin(self) -> None:
        request, keep_alive = self._queue.popleft()
        self._plan, self._exchange = self._provider.respond(request)
        self._keep_alive = keep_alive and self._plan.keep_alive and not request.http10
        self._due = self._loop.time()
        self._play()

    def _play(self) -> None:
        """Write what is due, then come back: at once in a later turn of the loop, or when the next step is due."""
        self._timer = None
        while self._plan is not None:
            if self._paused:
                self._waiting = True
                return
            step = self._ahead or next(self._plan.steps, None)
            if step is None:
                self._finish()
                return
            if step.delay_ms and self._ahead is None and self._scheduled(step):
                return
            self._ahead = None
            if not self._emit(step):
                return
            if step.kind in steps.ALONE:
                self._timer = self._loop.call_soon(self._play)
                return

    def _scheduled(self, step: Step) -> bool:
        """Put a step off until it is due. Due times add up, so that a late timer does not slow the stream down."""
        now = self._loop.time()
        self._due = max(self._due, now - 1.0) + step.delay_ms / 1000
        if self._due <= now:
            return False
        self._ahead = step
        self._timer = self._loop.call_at(self._due, self._play)
        return True

    def _emit(self, step: Step) -> bool:
        """Write a step. False where the reply stops here."""
        if self._exchange is not None and self._plan is not None:
            self._exchange.hand_over(step, self._plan.status)
        if step.data:
            self._transport.write(step.data)
        if step.kind == "stall":
            return False
        if step.kind in ("close", "reset"):
            self._end(completed=False, aborted=False)
            self._drop(reset=step.kind == "reset")
            return False
        return True

    def _drop(self, *, reset: bool) -> None:
        if not reset:
            self._transport.close()
            return
        connected = self._transport.get_extra_info("socket")
        if connected is not None:  # a linger time of 0 makes the kernel send RST instead of FIN
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    def _finish(self) -> None:
        self._end(completed=True, aborted=False)
        if not self._keep_alive:
            self._transport.close()
        elif self._queue:
            self._timer = self._loop.call_soon(self._begin)

    def _end(self, *, completed: bool, aborted: bool) -> None:
        if self._timer is not None:
            self._timer.cancel()
        exchange, self._exchange, self._plan = self._exchange, None, None
        self._timer = self._ahead = None
        if exchange is not None:
            self._provider.log.end(exchange, completed=completed, aborted=aborted)

    def abort(self) -> None:
        """The process stops."""
        self._transport.abort()


def _watch_parent(stop: asyncio.Event) -> None:
    """Stop when the other end of the inherited pipe closes: the parent is gone, however it died."""
    inherited = os.environ.get(PARENT_FD_ENV, "")
    if not inherited.isdecimal():
        return
    fd, loop = int(inherited), asyncio.get_running_loop()

    def readable() -> None:
        try:
            ended = not os.read(fd, 1024)
        except BlockingIOError:
            return
        except OSError:
            ended = True
        if ended:
            loop.remove_reader(fd)
            stop.set()

    os.set_blocking(fd, False)
    loop.add_reader(fd, readable)


async def serve(options: argparse.Namespace) -> None:
    """Accept until a signal or the parent's end, then drop every connection and write the last lines of the log."""
    file = log.open_file(options.log) if options.log else None
    provider = Provider(ServiceLog(file), Pace(options.interval_ms, options.ttft_ms))
    connections: set[Connection] = set()
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    text.warm_up()
    server = await loop.create_server(
        lambda: Connection(provider, connections), options.host, options.port, backlog=4096
    )
    _watch_parent(stop)
    print(json.dumps({"port": server.sockets[0].getsockname()[1]}), flush=True)
    await stop.wait()
    server.close()
    provider.log.end_all()
    for connection in list(connections):
        connection.abort()
    await server.wait_closed()
    if file is not None:
        file.close()


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _milliseconds(written: str) -> float:
    value = float(written)
    if not 0 <= value <= MS_MAX:
        raise argparse.ArgumentTypeError(f"must be from 0 to {MS_MAX}")
    return value


def parser() -> argparse.ArgumentParser:
    """The options of this process, and of `tollgate simulate`."""
    made = argparse.ArgumentParser(
        prog="simulate", description="A provider that speaks OpenAI's chat wire, with scripted trouble by model name."
    )
    made.add_argument("--host", default="127.0.0.1", help="a loopback address (default: %(default)s)")
    made.add_argument(
        "--port", type=int, default=0, help='0 takes a free one, printed as {"port": N} (default: %(default)s)'
    )
    made.add_argument("--log", metavar="FILE.jsonl", help="append a JSON line per request that ended")
    made.add_argument("--interval-ms", type=_milliseconds, default=0.0, help="between tokens (default: %(default)s)")
    made.add_argument("--ttft-ms", type=_milliseconds, default=0.0, help="before the first (default: %(default)s)")
    made.add_argument("--allow-any-host", action="store_true", help="listen beyond loopback: there is no password")
    return made


def main(argv: list[str]) -> int:
    """Run until SIGTERM, SIGINT or the parent's end (0). 2 for unusable options, 1 when it cannot listen or log."""
    options = parser().parse_args(argv)
    if not options.allow_any_host and not _is_loopback(options.host):
        print(
            f"simulate: {options.host} is not a loopback address; add --allow-any-host to listen there.",
            file=sys.stderr,
        )
        return 2
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(options))
    except OSError as error:
        print(f"simulate: {error}", file=sys.stderr)
        return 1
    return 0
