"""One chat call from the client's side: how it is read, when it is left, and what its client knows afterwards.

Must not: fire Locust events or decide who calls what (`people` does).
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from typing import Any

from loadtests.users.wire import Connection, Frames, Response, WireError

SILENCE_S = 60.0
MICROS = 1_000_000


@dataclass(frozen=True, slots=True)
class Manner:
    """How a client reads. It leaves at byte `leave_at_byte` of the response (head included), or after `leave_after_s`;
    it reads `read_bytes` at a time and rests `rest_s` in between."""

    leave_at_byte: int | None = None
    leave_after_s: float | None = None
    reset: bool = False
    read_bytes: int = 65_536
    rest_s: float = 0.0
    receive_bytes: int | None = None


@dataclass(slots=True)
class Call:
    """What the client of one call knows. Times in milliseconds since the request was sent, `at` in epoch seconds.

    `ending`: `completed`; `aborted` (the client left); `broken` (an error inside of the stream); `refused` (another
    status than 200); `failed` (no valid answer). `text` is the content delivered, kept unless the call completed.
    """

    who: str
    model: str
    stream: bool
    at: float = field(default_factory=time.time)
    ending: str = "aborted"
    status: int = 0
    request_id: str | None = None
    session: str | None = None
    told_micros: int | None = None
    text: str = ""
    chunks: int = 0
    received_bytes: int = 0
    ttft_ms: float | None = None
    gaps_ms: list[float] = field(default_factory=list)
    total_ms: float = 0.0
    error: str | None = None

    def line(self) -> str:
        """The call as a line of the client's log. The text of a completed one is not needed by anybody."""
        known = asdict(self)
        if self.ending == "completed":
            known["text"] = ""
        return json.dumps(known, ensure_ascii=False) + "\n"


def request_bytes(host: str, key: str, fields: dict[str, Any]) -> bytes:
    """The HTTP request of a chat call."""
    body = json.dumps(fields).encode()
    return (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {key}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    ).encode() + body


def micros(credits_: object) -> int:
    """Exact micros of a decimal amount of credits. Raises ValueError for a fraction of a micro."""
    exact = Decimal(str(credits_)) * MICROS
    if exact != int(exact):
        raise ValueError(f"{credits_} is no whole number of micros")
    return int(exact)


class Exchange:
    """Reads one response into a Call."""

    def __init__(self, call: Call, manner: Manner) -> None:
        self.call, self._manner = call, manner
        self._response, self._frames = Response(), Frames()
        self._started = time.perf_counter()
        self._latest: float | None = None
        self._whole = b""
        self._saw_done = False

    def read(self, connection: Connection) -> bool:
        """Read to the end, or to where the client leaves. True when the connection can be used again.

        Raises WireError and OSError; the call then has not `ended`.
        """
        call, manner = self.call, self._manner
        while not self._response.done:
            data = self._next(connection)
            if data is None:
                connection.leave(reset=manner.reset)
                return False
            if not data:
                raise WireError(f"the answer ended after {call.received_bytes} bytes")
            call.received_bytes += len(data)
            self._take(data)
            if manner.rest_s:
                time.sleep(manner.rest_s)
        self._conclude()
        return self._response.headers.get("connection", "").lower() != "close"

    def stop_clock(self) -> None:
        """Note how long it took, however it ended."""
        self.call.total_ms = self._elapsed_ms()

    def _next(self, connection: Connection) -> bytes | None:
        """The next bytes, or None where the client leaves."""
        manner, most, within_s = self._manner, self._manner.read_bytes, SILENCE_S
        if manner.leave_at_byte is not None:
            most = min(most, manner.leave_at_byte - self.call.received_bytes)
            if most <= 0:
                return None
        if manner.leave_after_s is not None:
            within_s = manner.leave_after_s - self._elapsed_ms() / 1000
            if within_s <= 0:
                return None
        try:
            return connection.read(most, within_s)
        except TimeoutError:
            if manner.leave_after_s is not None:
                return None
            raise

    def _elapsed_ms(self) -> float:
        return round((time.perf_counter() - self._started) * 1000, 3)

    def _take(self, data: bytes) -> None:
        known = self._response.status
        body = self._response.feed(data)
        if not known and self._response.status:
            headers = self._response.headers
            self.call.status = self._response.status
            self.call.request_id = headers.get("x-request-id")
            self.call.session = headers.get("x-tollgate-session")
        if self.call.stream and self.call.status == 200:
            for payload in self._frames.feed(body):
                self._frame(payload)
        else:
            self._whole += body

    def _frame(self, payload: bytes) -> None:
        if payload == b"[DONE]":
            self._saw_done = True
            return
        data = json.loads(payload, parse_float=Decimal)
        if "error" in data:
            self.call.error = str(data["error"].get("code") or data["error"].get("message"))
        if "x_tollgate" in data and "charge" in data["x_tollgate"]:
            self.call.told_micros = micros(data["x_tollgate"]["charge"])
        said = [each.get("delta") or {} for each in data.get("choices") or []]
        if any(delta.get(name) for delta in said for name in ("content", "reasoning_content", "tool_calls", "refusal")):
            self._content("".join(delta.get("content") or "" for delta in said))

    def _content(self, text: str) -> None:
        now = self._elapsed_ms()
        if self._latest is None:
            self.call.ttft_ms = now
        else:
            self.call.gaps_ms.append(round(now - self._latest, 3))
        self._latest = now
        self.call.chunks += 1
        self.call.text += text

    def _conclude(self) -> None:
        call = self.call
        if call.status != 200:
            call.ending, call.error = "refused", f"{call.status} {self._whole[:200].decode(errors='replace')}"
        elif call.error is not None:
            call.ending = "broken"
        elif call.stream and not self._saw_done:
            call.ending, call.error = "failed", "no [DONE]"
        else:
            call.ending = "completed"
            if not call.stream:
                self._bill()

    def _bill(self) -> None:
        charge = self._response.headers.get("x-tollgate-charge")
        self.call.told_micros = None if charge is None else micros(charge)
        answer = json.loads(self._whole)
        self.call.chunks = answer["usage"]["completion_tokens"]
