"""How many bytes of request bodies a worker holds, and the bound on their sum.

Must not: read a body, or count one request's bytes in another's share.
"""

from __future__ import annotations

from proxy.errors import Overloaded

RETRY_MS = 1_000


class Bodies:
    """The bodies of one worker: those that are being read, and those of calls that still run. `held` and `bytes_max`
    in bytes."""

    __slots__ = ("bytes_max", "held")

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.held = 0


class BodyShare:
    """One request's bytes among them. Release it on every way out."""

    __slots__ = ("_bodies", "size")

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self.size = 0

    def expect(self, size: int) -> None:
        """A body of `size` bytes is announced. Raises Overloaded when it cannot fit now; nothing is counted yet, so
        that a client which announces much and sends nothing takes nobody's place."""
        if self._bodies.held + size > self._bodies.bytes_max:
            raise _full()

    def grow(self, size: int) -> None:
        """`size` more bytes have come. Raises Overloaded, without counting them, when they do not fit."""
        bodies = self._bodies
        held = bodies.held + size
        if held > bodies.bytes_max:
            raise _full()
        bodies.held = held
        self.size += size

    def release(self) -> None:
        """The body is no longer needed. A second time does nothing."""
        self._bodies.held -= self.size
        self.size = 0


def _full() -> Overloaded:
    return Overloaded(
        "The gateway holds as many bytes of request bodies as it may. Retry shortly.", retry_after_ms=RETRY_MS
    )
