"""Providers that fail in every way of `tests.support.fault_table`, and what a gateway needs to call them.

The model that is asked for names the fault. Must not: know what the gateway makes of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections import Counter, defaultdict
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.support import certificates
from tests.support.fault_scripts import FRAME_BYTES_MAX, SCRIPTS, Call
from tests.support.fault_table import ROWS, Form, Row
from tests.support.ports import free_port

GOOD = "good"
CONFIG = f"""
[bounds]
connect_ms = 1200
headers_ms = 2000
headers_nonstream_ms = 2000
first_content_ms = 2000
idle_ms = 2000
total_ms = 3600
commit_after_ms = 60000
frame_bytes_max = {FRAME_BYTES_MAX}
answer_bytes_max = {2 * FRAME_BYTES_MAX}

[metering]
flush_every_ms = 50

[breaker]
consecutive_max = 2
calls_min = 1000000
open_ms = 60000
key_refused_ms = 60000
"""
WAYS = ("pair", "alone", "again")
"""The routes of each row and form: a good candidate behind the faulty one, the faulty one tried once, and the faulty
one with the default tries."""


SIBLINGS = ("401", "403")
"""Refusals of a key that are also tried at a provider with two models, `<status>.first` and `<status>.second`."""


def model(row: Row, form: Form, way: str) -> str:
    """A route's name, and that of its faulty provider and model: nothing that one learns is another's."""
    return f"{row.slug(form)}.{way}"


def cases() -> list[tuple[Row, Form]]:
    """Every row in every form that it has."""
    return [(row, form) for row in ROWS for form in row.forms]


@dataclass(frozen=True)
class Places:
    """Where the servers are; `closed` is a port where nobody listens, `silent` accepts and says nothing."""

    http: int
    tls: int
    silent: int
    closed: int

    @classmethod
    def free(cls) -> Self:
        """Four free ports."""
        return cls(free_port(), free_port(), free_port(), free_port())

    def url(self, fault: str) -> str:
        """The address of the provider with this fault."""
        elsewhere = {
            "connection refused": f"http://127.0.0.1:{self.closed}",
            "certificate not trusted": f"https://127.0.0.1:{self.tls}",
            "name does not resolve": "https://x.invalid",
            "TLS handshake hangs": f"https://127.0.0.1:{self.silent}",
        }
        return elsewhere.get(fault, f"http://127.0.0.1:{self.http}")

    def config(self) -> str:
        """The gateway's configuration: a provider and three routes for every row and form."""
        parts = [CONFIG, _provider(GOOD, f"http://127.0.0.1:{self.http}")]
        for row, form in cases():
            for way in WAYS:
                name = model(row, form, way)
                listed = [name, GOOD] if way == "pair" else [name]
                retries = "retries = 0, " if way == "alone" else ""
                more = f"{row.route}\nretry = {{ {retries}deadline_ms = 8000 }}"
                parts.append(_provider(name, self.url(row.fault)))
                parts.append(_route(name, ", ".join(map(_candidate, listed)), more))
        for status in SIBLINGS:
            parts.append(_provider(status, self.url(status)))
            for name in (f"{status}.first", f"{status}.second"):
                parts.append(_route(name, f'{{ provider = "{status}", model = "{name}" }}, {_candidate(GOOD)}', ""))
        return "\n".join(parts)


def _candidate(name: str) -> str:
    return f'{{ provider = "{name}", model = "{name}" }}'


def _route(name: str, candidates: str, more: str) -> str:
    return (
        f'[routes."{name}"]\ncandidates = [{candidates}]\n{more}\n'
        f'[prices."{name}"]\ninput = "1"\noutput = "1"\n[costs."{name}"]\ninput = "1"\noutput = "1"\n'
    )


def _provider(name: str, url: str) -> str:
    return f'[providers."{name}"]\nkind = "generic"\nbase_url = "{url}/v1"\n'


_NAMED = {model(row, form, way): row for row, form in cases() for way in WAYS}


class FaultyProviders:
    """The servers behind `Places`, while the block runs. `asked` counts requests by model; `connected` counts
    connections that never carry one, by the fault that keeps them from it."""

    def __init__(self, places: Places, folder: Path) -> None:
        """`folder` gets the certificates."""
        self._places = places
        self._folder = folder
        self._stack = AsyncExitStack()
        self._tasks: set[asyncio.Task[None]] = set()
        self.asked: Counter[str] = Counter()
        self.connected: Counter[str] = Counter()
        self.heard: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        """By the request id that provider and client are both told."""

    async def __aenter__(self) -> Self:
        places = self._places
        self._tls = certificates.make(self._folder).server()
        for serve, port in ((self._http, places.http), (self._untrusted, places.tls), (self._silent, places.silent)):
            server = await asyncio.start_server(serve, "127.0.0.1", port, backlog=1024)
            self._stack.callback(server.close)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _http(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._answer(reader, writer)
        except (ConnectionError, asyncio.CancelledError):
            pass  # the gateway left: it had enough; or all is over
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        except asyncio.IncompleteReadError:
            return  # a connection that was not used
        fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
        body = json.loads(await reader.readexactly(int(fields["content-length"])))
        name: str = body["model"]
        self.asked[name] += 1
        call = Call("stream" if body.get("stream") else "whole", reader, writer, self.heard[fields["x-request-id"]])
        if name == GOOD:
            await call.answer()
        elif name in _NAMED:
            await SCRIPTS[_NAMED[name].fault](call, _NAMED[name].point)
        else:
            await SCRIPTS[name.partition(".")[0]](call, "headers")

    async def _untrusted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connected["certificate not trusted"] += 1
        with contextlib.suppress(ssl.SSLError, ConnectionError):
            await writer.start_tls(self._tls)
            self.asked["certificate not trusted"] += bool(await reader.read(1))
        writer.close()

    async def _silent(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connected["TLS handshake hangs"] += 1
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()
