"""What one client gets, judged as it is written: in time, whole, in order, paid for, and the end only after the bill.

Must not: look into the core. It knows the clock, the answers that came from the ledger, and the bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from config.price import CompiledPrice
from tests.support.simulation.loop import VirtualLoop
from tests.support.simulation.provider import Kind, Usage
from tests.support.simulation.wire import Wire

MILLION = 1_000_000
DONE = "[DONE]"


def price_of(price: CompiledPrice, prompt: int, output: int, reasoning: int, cached: int = 0) -> int:
    """Micros, reckoned here and not by the code under test: one rounding, up."""
    raw = (prompt - cached) * price.input + cached * price.cached_input
    raw += (output - reasoning) * price.output + reasoning * price.reasoning
    return -(-raw // MILLION) + price.request


class Witness:
    """One client's. `settling` is when its settlement began (loop seconds), None before."""

    def __init__(self, loop: VirtualLoop, wire: Wire, sid: str, reply_s: float, *, stream: bool) -> None:
        self._loop = loop
        self._wire = wire
        self._sid = sid
        self._reply_s = reply_s
        self._stream = stream
        self.settling: float | None = None
        self.drained: Callable[[], bool]
        """Whether the worker has stopped waiting for anything."""
        self.spent: Callable[[], int]
        """Micros of the prompt and of everything that was delivered, at least."""
        self.texts: dict[Kind, str] = {}
        self.part: dict[Kind, str] = {}
        """Of them, what came since another provider was asked to go on."""
        self.name = ""
        """The id of the chunks."""
        self.ended = False
        self.done = False
        self._handed = False
        self.failed = False
        """Whether the response is an error instead of an answer."""
        self.usage: dict[str, Any] | None = None
        self.cut: dict[str, Any] | None = None
        self.told: list[str] = []
        """Every charge that the client was told, in credits."""

    def may_write(self, data: bytes, last: bool) -> None:
        """Bytes are about to reach the client. Raises Violation."""
        if self.ended:
            raise self._loop.violation("bytes after the end of the response")
        self.ended = last
        if self.failed:
            return  # an error's body, which nobody pays for
        if not self._handed:
            self._in_time(data)
        if self._stream:
            self._frames(data)

    def handed_over(self, body: bytes) -> None:
        """A whole answer goes to the connection, which may keep it until the client reads: it counts as written now."""
        self._in_time(body)
        self._handed = True

    def _in_time(self, data: bytes) -> None:
        fence, now = self._wire.fences[self._sid], self._loop.boot_ms()
        if now >= fence and not self._ours():
            raise self._loop.violation(f"bytes {now - fence} ms after the fence at {now}: {data[:100]!r}")

    def _ours(self) -> bool:
        """Whether the ledger has said that this settlement ended the session: then no sweeper can."""
        reply = self._wire.ended.get(self._sid)
        return reply is not None and (reply[0] == b"SETTLED" or (reply[0] == b"FINAL" and reply[5] != b"swept"))

    def _frames(self, data: bytes) -> None:
        if not data.endswith(b"\n\n"):
            raise self._loop.violation(f"a torn frame: {data[-60:]!r}")
        for frame in data[:-2].decode().split("\n\n"):
            if frame.startswith(":"):
                continue
            if not frame.startswith("data: ") or self.done:
                raise self._loop.violation(f"not a frame, or one after [DONE]: {frame[:60]!r}")
            payload = frame.removeprefix("data: ")
            if payload == DONE:
                self._over()
            else:
                self._payload(json.loads(payload, parse_float=str))

    def _over(self) -> None:
        """`[DONE]`: the ledger has answered, or the client has waited long enough."""
        self.done = True
        if self.settling is None:
            raise self._loop.violation("[DONE] before the settlement")
        waited = self._loop.time() - self.settling
        if self._sid not in self._wire.ended and not self.drained() and waited < self._reply_s - 1e-6:
            raise self._loop.violation(f"[DONE] {waited:.3f} s into a settlement that is not answered")

    def _payload(self, frame: dict[str, Any]) -> None:
        usage = frame.get("usage")
        if usage:
            self.usage = usage
            if "cost" in usage:
                self.told.append(str(usage["cost"]))
            charge = frame.get("x_tollgate", {}).get("charge")
            if charge is not None:
                self.told.append(str(charge))
        if "error" in frame:
            self.cut = frame["error"].get("metadata")
        for choice in frame.get("choices", ()):
            delta = choice.get("delta", {})
            for name, thought in (("content", False), ("reasoning_content", True)):
                words = delta.get(name)
                if words:
                    key = (choice["index"], thought)
                    self.texts[key] = self.texts.get(key, "") + words
                    self.part[key] = self.part.get(key, "") + words
                    self._named(frame["id"])
                    self._covered()

    def _named(self, name: str) -> None:
        """All chunks of an answer are one stream's."""
        self.name = self.name or name
        if name != self.name:
            raise self._loop.violation(f"a chunk of {name} in the stream {self.name}")

    def _covered(self) -> None:
        """Credit is never overdrawn by what was forwarded: the hold that the ledger confirmed covers it."""
        spent, held = self.spent(), self._wire.known_held[self._sid]
        if spent > held:
            raise self._loop.violation(f"forwarded {spent} micros on a hold of {held}")


def at_least(price: CompiledPrice, prompt: int, texts: dict[Kind, str], seen: Usage) -> int:
    """Micros of an answer that is not over, whose provider has reported (decision 0010)."""
    thought = sum(text.count(" ") for (_, reasoning), text in texts.items() if reasoning)
    said = sum(text.count(" ") for text in texts.values()) - thought
    reasoning = max(thought, seen.reasoning)
    return price_of(price, seen.prompt or prompt, max(said + reasoning, seen.output), reasoning, seen.cached)


def cost_of(price: CompiledPrice, prompt: int, texts: dict[Kind, str]) -> int:
    """Micros of a prompt and of texts whose every word is a token."""
    output = sum(text.count(" ") for text in texts.values())
    thought = sum(text.count(" ") for (_, reasoning), text in texts.items() if reasoning)
    return price_of(price, prompt, output, thought)
