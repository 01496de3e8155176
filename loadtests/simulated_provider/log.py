"""The provider's own log: what was asked, what was served, how it ended. Tests reconcile our charges against it.

Must not: grow without bound, or hold a key (authorization is kept as its SHA-256 only).
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, TextIO

from loadtests.simulated_provider.chat import Answer
from loadtests.simulated_provider.steps import BROKEN, Step

LOG_ENTRIES_MAX, LOG_BYTES_MAX = 20_000, 128 * 1024 * 1024
REQUESTS_MAX, REQUEST_BYTES_MAX = 1_000, 256 * 1024 * 1024
_SECRET_HEADERS = frozenset({"authorization", "api-key", "x-api-key", "cookie", "proxy-authorization"})


def _sha256(value: bytes) -> str:
    return hashlib.sha256(value).hexdigest()


@dataclass(slots=True)
class Request:
    """One HTTP request as it came. Header names are lower case."""

    method: str
    path: str
    query: str
    headers: list[tuple[str, str]]
    body: bytes
    http10: bool = False

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name), None)

    def shown_headers(self) -> list[tuple[str, str]]:
        """The header list; a secret is shown as the hash of its value."""
        return [
            (name, f"sha256:{_sha256(value.encode('latin-1'))}" if name in _SECRET_HEADERS else value)
            for name, value in self.headers
        ]


@dataclass(slots=True)
class Exchange:
    """One request and its reply, while it lasts."""

    n: int
    request: Request
    model: str | None = None
    stream: bool = False
    status: int | None = None
    started_ms: int = field(default_factory=lambda: time.time_ns() // 1_000_000)
    started: float = field(default_factory=time.monotonic)
    ended_ms: int | None = None
    answer: Answer | None = None
    handed_tokens: int = 0
    usage_sent: dict[str, Any] | None = None
    broken: bool = False
    completed: bool = False
    aborted: bool = False
    abort_after_ms: float | None = None
    response: bytearray | None = None

    def promise(self, answer: Answer) -> None:
        """The answer this exchange is about to give."""
        self.answer = answer

    def recording(self) -> bytearray:
        """The buffer that the body's bytes are copied into."""
        self.response = bytearray()
        return self.response

    def hand_over(self, step: Step, status: int | None) -> None:
        """Note a step in the moment its bytes go to the socket."""
        if self.status is None and step.data:
            self.status = status
        self.handed_tokens += step.tokens
        self.broken = self.broken or step.kind in BROKEN
        if step.sink is not None:
            if step.kind == "call":
                step.sink.name_served = True
            else:
                step.sink.served.append(step.text)
        elif step.kind in ("whole", "half"):
            self._hand_over_all()
        if step.usage is not None:
            self.usage_sent = step.usage

    def _hand_over_all(self) -> None:
        for channel in self.answer.channels() if self.answer else ():
            channel.served, channel.name_served = [channel.text], bool(channel.name)

    def end(self, *, completed: bool, aborted: bool) -> None:
        self.ended_ms = time.time_ns() // 1_000_000
        self.completed = completed and not self.broken
        self.aborted = aborted
        if aborted:
            self.abort_after_ms = round((time.monotonic() - self.started) * 1000, 3)

    def _served_tokens(self) -> int:
        if self.answer is None or self.ended_ms is None:
            return self.handed_tokens
        if self.completed:
            return self.answer.completion_tokens()
        # A cut text is counted again in one go, as a reader of it would.
        return sum(channel.served_tokens() for channel in self.answer.channels())

    def as_dict(self) -> dict[str, Any]:
        """The line of the log. While the exchange runs, `served_tokens` sums what each frame carried."""
        served, request, said = self._served_tokens(), self.request, self.answer
        authorization = request.header("authorization")
        return {
            "n": self.n,
            "request_id": request.header("x-request-id"),
            "method": request.method,
            "path": request.path,
            "model": self.model,
            "stream": self.stream,
            "authorization_sha256": None if authorization is None else _sha256(authorization.encode("latin-1")),
            "status": self.status,
            "started_ms": self.started_ms,
            "ended_ms": self.ended_ms,
            "prompt_tokens": said.prompt_tokens if said else 0,
            "served_tokens": served,
            "completion_tokens": said.completion_tokens() if said and self.completed else served,
            "reasoning_tokens": said.reasoning_tokens() if said and self.completed else 0,
            "usage_sent": self.usage_sent,
            "running": self.ended_ms is None,
            "completed": self.completed,
            "aborted": self.aborted,
            "abort_after_ms": self.abort_after_ms,
            "body_sha256": _sha256(request.body),
            "text": _spoken(said),
            "choices": _choices(said),
        }


def _spoken(said: Answer | None) -> str:
    """The served content (or refusal) of all choices, one after the other."""
    channels = said.channels() if said else []
    return "".join("".join(c.served) for c in channels if c.kind in ("content", "refusal"))


def _choices(said: Answer | None) -> list[dict[str, Any]]:
    out = []
    for choice in said.choices if said else ():
        texts: dict[str, Any] = {"tools": [], "finish": choice.finish}
        for channel in choice.channels:
            served = "".join(channel.served)
            if channel.kind == "tool":
                if channel.name_served:
                    texts["tools"].append({"name": channel.name, "arguments": served})
            else:
                texts[channel.kind] = served
        out.append(texts)
    return out


class Bounded:
    """The newest values by number: at most `items_max` of them and `bytes_max` bytes."""

    def __init__(self, items_max: int, bytes_max: int) -> None:
        self._items_max, self._bytes_max, self._bytes = items_max, bytes_max, 0
        self._items: OrderedDict[int, tuple[int, Any]] = OrderedDict()

    def put(self, n: int, value: Any, size: int) -> None:
        self._items[n] = (size, value)
        self._bytes += size
        while len(self._items) > self._items_max or (self._bytes > self._bytes_max and len(self._items) > 1):
            _, (gone, _) = self._items.popitem(last=False)
            self._bytes -= gone

    def get(self, n: int) -> Any:
        return self._items.get(n, (0, None))[1]

    def since(self, n: int) -> list[Any]:
        return [value for at, (_, value) in self._items.items() if at > n]

    def clear(self) -> None:
        self._items.clear()
        self._bytes = 0


class ServiceLog:
    """All exchanges: the running ones, the ended ones in memory, and each ended one as a line of the file."""

    def __init__(self, file: TextIO | None = None) -> None:
        self._file = file
        self._n = 0
        self._running: dict[int, Exchange] = {}
        self._ended = Bounded(LOG_ENTRIES_MAX, LOG_BYTES_MAX)
        self._exchanges = Bounded(REQUESTS_MAX, REQUEST_BYTES_MAX)

    def begin(self, request: Request) -> Exchange:
        self._n += 1
        exchange = self._running[self._n] = Exchange(self._n, request)
        self._exchanges.put(self._n, exchange, len(request.body) + 2048)
        return exchange

    def end(self, exchange: Exchange, *, completed: bool, aborted: bool) -> None:
        """Write the exchange's line. A second ending of the same exchange changes nothing."""
        if exchange.ended_ms is not None:
            return
        exchange.end(completed=completed, aborted=aborted)
        line = json.dumps(exchange.as_dict(), ensure_ascii=False)
        if self._running.pop(exchange.n, None) is not None:
            self._ended.put(exchange.n, line, len(line))
        exchange.answer = None  # the texts live in the line from here on
        if self._file is not None:
            self._file.write(line + "\n")
            self._file.flush()

    def listed(self, since: int) -> bytes:
        """A JSON array of the exchanges numbered above `since`, in the order they began."""
        running = {n: json.dumps(e.as_dict(), ensure_ascii=False) for n, e in self._running.items() if n > since}
        lines = [*self._ended.since(since), *running.values()]
        lines.sort(key=lambda line: int(line[len('{"n": ') : line.index(",")]))
        return f"[{','.join(lines)}]".encode()

    def exchange(self, n: int) -> Exchange | None:
        found = self._exchanges.get(n)
        return found if isinstance(found, Exchange) else None

    def end_all(self) -> None:
        """The process stops: what still runs ends here, neither completed nor aborted by its peer."""
        for exchange in list(self._running.values()):
            self.end(exchange, completed=False, aborted=False)

    def reset(self) -> None:
        """Forget what ended. Numbers go on, and what runs still gets its line."""
        self._ended.clear()
        self._exchanges.clear()


def open_file(path: str) -> TextIO:
    """Append to `path`; only its owner may read it, since it holds what users were told."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a", encoding="utf-8")
