"""An HTTP/1.1 request as bytes: where it goes and how its head is written.

Must not: open sockets, or take an address, a key or a header from a caller's request (that is decided above).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import urlsplit

_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}|[0-9A-Fa-f:.]{2,45}")
_HEAD = re.compile(
    rb"[A-Z]{1,32} [!-~]+ HTTP/1\.1\r\n"
    rb"(?:(?!(?i:host|content-length|transfer-encoding):)[!#$%&'*+.^_`|~0-9A-Za-z-]+: [^\r\n\0]*\r\n)*"
)
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
    method: bytes, target: bytes, origin: Origin, headers: list[tuple[bytes, bytes]], body: bytes
) -> bytes:
    """The whole request: head with Host and Content-Length added, then the body.

    Raises ValueError when the method, the target or a header could change the message's framing (CR, LF, NUL, a name
    that is no token) or when `headers` has Host, Content-Length or Transfer-Encoding. The error never names a value.
    """
    lines = [b"%b %b HTTP/1.1\r\n" % (method, target)]
    lines += [b"%b: %b\r\n" % pair for pair in headers]
    head = b"".join(lines)
    if not _HEAD.fullmatch(head) or head.count(b"\n") != len(lines) or any(b":" in name for name, _ in headers):
        raise ValueError("the method, the target or a header is not allowed in an upstream request")
    if body or method in _WITH_BODY:
        return b"%bhost: %b\r\ncontent-length: %d\r\n\r\n%b" % (head, origin.authority, len(body), body)
    return b"%bhost: %b\r\n\r\n" % (head, origin.authority)
