"""One HTTP/1.1 load connection on a raw protocol: it counts events and finds the end of an answer, and little else.

Must not: decide when to send; jobs.py does.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from loadtests.bench import wire

_LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.IGNORECASE)
_OUTPUT = re.compile(rb'"completion_tokens":\s*(\d+)')
_PROMPT = re.compile(rb'"prompt_tokens":\s*(\d+)')
_END = b"0\r\n\r\n"


@dataclass
class Totals:
    """What all connections of a job have seen. `tokens` sums what whole answers said was used (prompt and output)."""

    sent: int = 0
    begun: int = 0
    finished: int = 0
    events: int = 0
    reads: int = 0
    tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)


def as_json(totals: Totals) -> dict[str, Any]:
    """The totals as a result carries them."""
    return {**vars(totals), "errors": dict(totals.errors)}


class Load(asyncio.Protocol):
    """A keep-alive connection, one request at a time. `on_end` is called when an answer is over, whole or not."""

    def __init__(self, totals: Totals, on_end: Callable[[Load], None], *, exact: bool) -> None:
        """`exact`: the number of events must be what the usage says (a proxy may cut an event's end in two)."""
        self._totals, self._on_end, self._exact = totals, on_end, exact
        self._transport: asyncio.Transport | None = None
        self._waiting = False
        self.sent_at = self.first_at = 0
        self._forget()

    def _forget(self) -> None:
        self._before = self._previous = b""
        self._in_body = self._chunked = False
        self._missing = 0
        self._events = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._waiting:
            self._end("connection lost")

    @property
    def open(self) -> bool:
        """Whether another request can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    def close(self) -> None:
        """No more requests."""
        self._waiting = False
        if self._transport is not None:
            self._transport.abort()

    def send(self, request: bytes) -> None:
        """Begin an exchange. Times are monotonic nanoseconds."""
        assert self._transport is not None
        self._forget()
        self._waiting = True
        self._totals.sent += 1
        self.first_at = 0
        self.sent_at = time.monotonic_ns()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        if not self._waiting:
            return
        self._totals.reads += 1
        if not self._in_body:
            data = self._previous + data
            if not self._head(data):
                self._previous = data
                return
            if not self._waiting:
                return  # it was an error
        if self._chunked:
            self._stream(data)
        else:
            self._previous += data
            self._missing -= len(data)
            if self._missing <= 0:
                self._check(self._previous, 0)

    def _head(self, data: bytes) -> bool:
        """Read the response's head; the rest of `data` is the body's beginning. False while it is not whole."""
        end = data.find(b"\r\n\r\n")
        if end < 0:
            return False
        head = data[:end]
        self._previous = b""
        self._in_body = True
        self._totals.begun += 1
        length = _LENGTH.search(head)
        self._chunked = length is None
        self._missing = int(length[1]) + end + 4 if length is not None else 0
        if not head.startswith(b"HTTP/1.1 200"):
            self._end(f"{head[9:12].decode()}: {data[end + 4 : end + 300].decode(errors='replace')}")
        return True

    def _stream(self, data: bytes) -> None:
        if not self.first_at and b'"content":" ' in data:
            self.first_at = time.monotonic_ns()
        events = data.count(b"\n\n")
        if self._previous[-1:] == b"\n" and data[:1] == b"\n":
            events += 1
        self._events += events
        self._totals.events += events
        previous, before = self._previous, self._before
        if data.endswith(_END) or (len(data) < len(_END) and (previous + data).endswith(_END)):
            self._check(before + previous + data, self._events)
            return
        self._before, self._previous = previous, data

    def _check(self, tail: bytes, events: int) -> None:
        """The answer has ended: was it whole?"""
        output, prompt = _OUTPUT.search(tail), _PROMPT.search(tail)
        if output is None or prompt is None:
            error = "" if not self._exact else "no usage"
        elif self._chunked and b"data: [DONE]" not in tail:
            error = "no [DONE]"
        elif self._chunked and self._exact and events != int(output[1]) + wire.EVENTS_AROUND:
            error = f"{events} events where {int(output[1]) + wire.EVENTS_AROUND} were sent"
        else:
            error = ""
            self._totals.tokens += int(output[1]) + int(prompt[1])
        self._end(error)

    def _end(self, error: str = "") -> None:
        self._waiting = False
        if error:
            self._totals.errors[error] += 1
            if self._transport is not None:
                self._transport.abort()  # what may still come of this answer belongs to no request
        else:
            self._totals.finished += 1
        self._on_end(self)
