"""An HTTP/1.1 request as bytes: where it goes and how its head is written.

Must not: open sockets, or take an address, a key or a header from a caller's request (that is decided above).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from urllib.parse import urlsplit

_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}|[0-9A-Fa-f:.]{2,45}")
_FIRST = re.compile(rb"[A-Z]{1,32} [!-~]+ HTTP/1\.1\r\n")
_HEADERS = re.compile(
    rb"(?:(?!(?i:host|content-length|transfer-encoding):)[!#$%&'*+.^_`|~0-9A-Za-z-]+: [^\r\n\0]*\r\n)*"
)
_REFUSED = "the method, the target or a header is not allowed in an upstream request"
HEADS_KEPT = 1_000
"""Heads of requests that are kept ready: one or two for each provider and model."""

Header = tuple[bytes, bytes]
_WITH_BODY = frozenset((b"POST", b"PUT", b"PATCH"))


@dataclass(frozen=True)
class Origin:
    """Scheme, host (lower case, IPv6 without brackets) and port of an upstream; `authority` is its Host header."""

    scheme: str
    host: str
    port: int
    authority: bytes = field(init=False, repr=False, compare=False)
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Raises ValueError for another scheme than http(s), a host with foreign characters, or a port out of range."""
        if self.scheme not in _PORTS:
            raise ValueError(f"the scheme '{self.scheme}' is not http or https")
        if not _HOST.fullmatch(self.host):
            raise ValueError("the upstream's host is empty or has characters that no host has")
        if not 0 < self.port < 65536:
            raise ValueError(f"the port {self.port} is out of range")
        name = f"[{self.host}]" if ":" in self.host else self.host
        suffix = "" if self.port == _PORTS[self.scheme] else f":{self.port}"
        object.__setattr__(self, "authority", f"{name}{suffix}".encode("ascii"))
        object.__setattr__(self, "_hash", hash((self.scheme, self.host, self.port)))

    def __hash__(self) -> int:
        return self._hash

    @classmethod
    def from_url(cls, url: str) -> Origin:
        """The origin of an http(s) URL; its path is not looked at. Raises ValueError (user info is refused too)."""
        parts = urlsplit(url)
        if parts.username is not None or parts.password is not None:
            raise ValueError("user information in an upstream's URL is not accepted")
        host = (parts.hostname or "").rstrip(".")
        if not host.isascii():
            host = host.encode("idna").decode("ascii")
        scheme = parts.scheme.lower()
        return cls(scheme, host.lower(), parts.port if parts.port is not None else _PORTS.get(scheme, 0))


def build_request(
    method: bytes,
    target: bytes,
    origin: Origin,
    headers: Sequence[Header],
    body: bytes,
    own: Sequence[Header] = (),
) -> bytes:
    """The whole request: head with Host and Content-Length added, then the body. `headers` are those that many
    requests share (they are checked once), `own` this one's.

    Raises ValueError when the method, the target or a header could change the message's framing (CR, LF, NUL, a name
    that is no token) or when Host, Content-Length or Transfer-Encoding are given. The error never names a value.
    """
    head = _head(method, target, origin.authority, tuple(headers))
    for name, value in own:
        if not _may_be_named(name) or b"\r" in value or b"\n" in value or b"\0" in value:
            raise ValueError(_REFUSED)
        head += b"%b: %b\r\n" % (name, value)
    if body or method in _WITH_BODY:
        return b"%bcontent-length: %d\r\n\r\n%b" % (head, len(body), body)
    return head + b"\r\n"


@lru_cache(maxsize=HEADS_KEPT)
def _head(method: bytes, target: bytes, authority: bytes, headers: tuple[Header, ...]) -> bytes:
    first = b"%b %b HTTP/1.1\r\n" % (method, target)
    if not _FIRST.fullmatch(first):
        raise ValueError(_REFUSED)
    return b"%b%bhost: %b\r\n" % (first, _lines(headers), authority)


@lru_cache(maxsize=HEADS_KEPT)
def _may_be_named(name: bytes) -> bool:
    return _HEADERS.fullmatch(name + b": \r\n") is not None and b":" not in name


def _lines(headers: Sequence[Header]) -> bytes:
    lines = b"".join([b"%b: %b\r\n" % pair for pair in headers])
    if not _HEADERS.fullmatch(lines) or lines.count(b"\n") != len(headers) or any(b":" in name for name, _ in headers):
        raise ValueError(_REFUSED)
    return lines
