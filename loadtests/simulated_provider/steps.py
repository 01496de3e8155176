"""A reply as a lazy sequence of steps, and the transforms that scripts put over it.

A step is some bytes with what they mean: when they go out, which counted text they carry, or that the reply stops here.
Must not: know sockets or the clock; the connection plays the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, NamedTuple

from loadtests.simulated_provider import wire
from loadtests.simulated_provider.chat import Channel

COUNTED: Final = frozenset({"content", "call"})
ENDING: Final = frozenset({"finish", "usage", "done"})
BROKEN: Final = frozenset({"stall", "reset", "close", "broken", "half"})
ALONE: Final = frozenset({"head", "role", "content", "call", "drip"})  # each goes out in a write of its own


class Step(NamedTuple):
    """One write. Kinds: head, role, content, call (a tool call opens), finish, usage, done, end, whole (a complete
    answer in one write), half (a broken one), drip, other; and without bytes: stall, reset, close, broken."""

    data: bytes = b""
    kind: str = "other"
    delay_ms: float = 0.0  # after the step before
    tokens: int = 0
    sink: Channel | None = None
    text: str = ""
    usage: dict[str, Any] | None = None


Steps = Iterator[Step]
Transform = Callable[[Steps], Steps]


def insert(after: int, extra: Callable[[], Iterable[Step]], *, resume: bool) -> Transform:
    """Put `extra` behind the first `after` counted chunks: before everything for 0, before the finish chunk when the
    answer is shorter. Without `resume` the rest is dropped."""

    def transform(steps: Steps) -> Steps:
        seen, placed = 0, False
        for step in steps:
            due = after == 0 or step.kind in ENDING or (seen >= after and step.kind in COUNTED)
            if due and not placed:
                placed = True
                yield from extra()
                if not resume:
                    return
            seen += step.kind in COUNTED
            yield step
        if not placed:
            yield from extra()

    return transform


def rewrite(change: Callable[[bytes], bytes]) -> Transform:
    """Apply `change` to the bytes of every step that has some."""

    def transform(steps: Steps) -> Steps:
        for step in steps:
            yield step._replace(data=change(step.data)) if step.data else step

    return transform


def without(kinds: frozenset[str]) -> Transform:
    """Leave out the steps of these kinds."""
    return lambda steps: (step for step in steps if step.kind not in kinds)


def later(steps: Steps, delay_ms: float) -> Steps:
    """Delay the first step."""
    for step in steps:
        yield step._replace(delay_ms=step.delay_ms + delay_ms)
        break
    yield from steps


def comments(steps: Steps) -> Steps:
    """OpenRouter's keepalive comments, before the first frame and between frames."""
    comment = Step(b": OPENROUTER PROCESSING\n\n")
    yield comment
    for at, step in enumerate(steps):
        if at % 3 == 0:
            yield comment
        yield step


def id_lines(steps: Steps) -> Steps:
    """`id:`, `retry:` and `event: ping` lines around the frames: legal SSE that breaks the official SDKs."""
    yield Step(b"retry: 1000\n\nevent: ping\n\n")
    for at, step in enumerate(steps):
        if at % 4 == 2:
            yield Step(b': still here\n\nevent: ping\ndata: {"type":"ping"}\n\n')
        yield step._replace(data=b"id: %d\n%b" % (at, step.data)) if step.data else step


def recorded(into: bytearray, bytes_max: int) -> Transform:
    """Copy the body's bytes, up to `bytes_max`, as they are handed over."""

    def transform(steps: Steps) -> Steps:
        for step in steps:
            if len(into) + len(step.data) <= bytes_max:
                into.extend(step.data)
            yield step

    return transform


def framed(head: Step, steps: Steps, chunked: bool) -> Steps:
    """The reply on the wire: head, body in HTTP chunks or as it is, end of the chunked body."""
    yield head
    if not chunked:
        yield from steps
        return
    for step in steps:
        if step.data:
            data, kind, delay, tokens, sink, said, usage = step
            yield Step(wire.chunk(data), kind, delay, tokens, sink, said, usage)
        else:
            yield step
    yield Step(wire.LAST_CHUNK, "end")


def dripped(steps: Steps, interval_ms: float) -> Steps:
    """One byte a write. A step counts as served with its first byte, so that the log is never behind the reader."""
    for step in steps:
        yield step._replace(data=step.data[:1])
        for at in range(1, len(step.data)):
            yield Step(step.data[at : at + 1], "drip", interval_ms)
