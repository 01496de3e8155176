"""Port numbers for servers of tests. Must not: listen."""

from __future__ import annotations

import socket
import sys

_reserved: list[socket.socket] = []


def free_port() -> int:
    """A TCP port on loopback where nobody listens, and that on Linux nobody else gets while this process lives.

    A bound socket that does not listen keeps the number; a server with SO_REUSEADDR, as all of ours, may still have it.
    """
    probe = socket.socket()
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    probe.bind(("127.0.0.1", 0))
    port = int(probe.getsockname()[1])
    if sys.platform == "linux":
        _reserved.append(probe)
    else:
        probe.close()
    return port
