"""The least HTTP/1.1 client that can leave at any byte and read as slowly as it likes: a plain socket and a parser.

Must not: retry, follow, buffer ahead of its caller, or know what a chat is. Under Locust the socket is gevent's.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from dataclasses import dataclass, field

HEAD_BYTES_MAX = 64 * 1024


class WireError(Exception):
    """What came is no HTTP/1.1 response, or it ended too soon."""


@dataclass(slots=True)
class Response:
    """One response, parsed as its bytes arrive. `status` is 0 until the whole head is there; header names are lower."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    done: bool = False
    _buffer: bytes = b""
    _left: int | None = None  # bytes of the body (or of the chunk) still to come; None between chunks
    _chunked: bool = False

    def feed(self, data: bytes) -> bytes:
        """Take what one read brought; the part of the body in it. Raises WireError."""
        self._buffer += data
        if not self.status and not self._take_head():
            return b""
        return self._take_chunks() if self._chunked else self._take_length()

    def _take_head(self) -> bool:
        head, mark, rest = self._buffer.partition(b"\r\n\r\n")
        if not mark:
            if len(self._buffer) > HEAD_BYTES_MAX:
                raise WireError("the head has no end")
            return False
        first, *lines = head.decode("latin-1").split("\r\n")
        words = first.split(" ", 2)
        if len(words) < 2 or words[0] != "HTTP/1.1" or not words[1].isdecimal():
            raise WireError(f"no status line: {first[:80]!r}")
        self.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self.status, self._buffer = int(words[1]), rest
        self._chunked = self.headers.get("transfer-encoding", "").lower() == "chunked"
        if not self._chunked:
            self._left = int(self.headers.get("content-length", "0"))
            self.done = self._left == 0
        return True

    def _take_length(self) -> bytes:
        part = self._buffer[: self._left]
        self._left = (self._left or 0) - len(part)
        self._buffer = self._buffer[len(part) :]
        self.done = self._left == 0
        if self.done and self._buffer:
            raise WireError("bytes beyond the body")
        return part

    def _take_chunks(self) -> bytes:
        parts = []
        while not self.done:
            if self._left is None:
                line, mark, rest = self._buffer.partition(b"\r\n")
                if not mark:
                    break
                try:
                    self._left = int(line.split(b";")[0], 16)
                except ValueError:
                    raise WireError(f"no chunk size: {line[:80]!r}") from None
                self._buffer = rest
            if len(self._buffer) < self._left + 2:
                break  # a chunk is handed on whole: the gateway writes whole frames, so this delays nothing
            if self._buffer[self._left : self._left + 2] != b"\r\n":
                raise WireError("a chunk does not end where it said")
            parts.append(self._buffer[: self._left])
            self._buffer = self._buffer[self._left + 2 :]
            self.done, self._left = self._left == 0, None
        return b"".join(parts)


class Frames:
    """Server-sent events: whole `data:` payloads out of a body that arrives in any pieces. Comments are dropped."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, body: bytes) -> list[bytes]:
        """The payloads that are complete now."""
        *frames, self._rest = (self._rest + body).split(b"\n\n")
        return [frame[5:].strip() for frame in frames if frame.startswith(b"data:")]


class Connection:
    """One TCP connection. `receive_bytes` bounds the kernel's buffer, so that a slow reader is felt by the server."""

    def __init__(self, host: str, port: int, receive_bytes: int | None = None) -> None:
        self.used = False
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        if receive_bytes is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self._socket.settimeout(10.0)
        try:
            self._socket.connect((host, port))
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError:
            self._socket.close()
            raise

    def send(self, data: bytes) -> None:
        """Raises OSError."""
        self._socket.sendall(data)

    def read(self, most: int, within_s: float) -> bytes:
        """What has come, at most so many bytes; b'' at the end. Raises TimeoutError, OSError."""
        self._socket.settimeout(max(within_s, 0.001))
        return self._socket.recv(most)

    def leave(self, *, reset: bool = False) -> None:
        """Close with FIN, or with RST as a process that dies does."""
        with contextlib.suppress(OSError):
            if reset:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._socket.close()
