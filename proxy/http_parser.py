"""One HTTP/1.1 response, read: httptools' callbacks and the checks that llhttp leaves to its user.

Must not: touch sockets or time. A reader serves one response and is thrown away, so nothing of one answer can show
up in the next.
"""

from __future__ import annotations

from collections.abc import Callable

import httptools


class MalformedResponse(Exception):
    """The bytes are no acceptable response; raised inside the parser's callbacks."""


PARSE_ERRORS = (httptools.HttpParserError, httptools.HttpParserUpgrade)
"""What `ResponseReader.parse` raises for bad bytes."""


class ResponseReader:
    """Collects `status`, `headers` (lower-cased names, without trailers) and body `chunks` of the final response.

    `parse(data)` is httptools' own method and `chunks.append` its body callback: no Python frame of ours per chunk.
    Informational (1xx) responses are skipped; 101 is refused because nothing here ever asks for an upgrade.
    """

    __slots__ = (
        "chunks", "clean", "complete", "head_bytes", "head_bytes_max", "head_only", "headers", "keep_alive", "on_body",
        "parse", "parser", "status", "until_close",
    )  # fmt: skip

    def __init__(self, head_bytes_max: int, *, head_only: bool) -> None:
        """`head_only`: the request was HEAD, the response ends with its headers whatever they announce."""
        self.chunks: list[bytes] = []
        self.on_body = self.chunks.append
        self.headers: list[tuple[bytes, bytes]] = []
        self.status = 0
        self.head_only = head_only
        self.head_bytes = 0
        self.head_bytes_max = head_bytes_max
        self.complete = self.keep_alive = self.until_close = False
        self.clean = True
        parser = httptools.HttpResponseParser(self)
        self.parser: httptools.HttpResponseParser | None = parser
        self.parse: Callable[[bytes], None] = parser.feed_data

    def close(self) -> None:
        """Break the reference cycle of parser and callbacks; `parse` may not be called again."""
        if self.parser is not None:
            self.parser = None
            del self.parse

    def on_message_begin(self) -> None:
        """Nobody asked for a second response: parsing stops before any of it could join the first one's body."""
        if self.complete:
            raise MalformedResponse("bytes after the response")

    def on_header(self, name: bytes, value: bytes) -> None:
        self.head_bytes += len(name) + len(value) + 4
        if self.head_bytes > self.head_bytes_max:
            raise MalformedResponse("the headers are too large")
        if not self.status:
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        if self.status:
            return
        parser: httptools.HttpResponseParser = self.parser  # type: ignore[assignment]  # there until `close`
        status = parser.get_status_code()
        if status < 200:
            self._skip(status)
            return
        if status > 599:
            raise MalformedResponse("the status is out of range")
        self._framing(status, parser.get_http_version())
        self.keep_alive = parser.should_keep_alive()
        self.status = status
        if self.head_only:
            self.complete = True

    def on_message_complete(self) -> None:
        if self.status:
            self.complete = True

    def _skip(self, status: int) -> None:
        """An informational response: its headers are dropped but stay counted, so that an endless row of them ends."""
        if status < 100 or status == 101:
            raise MalformedResponse("the status is out of range" if status < 100 else "an upgrade nobody asked for")
        self.head_bytes += 16
        self.headers.clear()

    def _framing(self, status: int, version: str) -> None:
        """How the body ends (RFC 9112 6.3). llhttp has refused duplicate or bad lengths and a length beside chunked."""
        if version not in ("1.1", "1.0"):
            raise MalformedResponse("the HTTP version is not 1.0 or 1.1")
        sized = status in (204, 304)
        chunked = False
        for name, value in self.headers:
            if name == b"content-length":
                sized = True
            elif name == b"transfer-encoding":
                if chunked or version == "1.0" or value.strip().lower() != b"chunked":
                    raise MalformedResponse("the transfer encoding is not exactly one 'chunked'")
                chunked = True
        self.until_close = not sized and not chunked


def starts_response(data: bytes) -> bool:
    """Whether the first bytes can be an HTTP status line. llhttp also takes RTSP and ICE; blank lines are tolerated."""
    first = data.lstrip(b"\r\n")
    return not first or first[:1] == b"H"


def describe(error: BaseException) -> str:
    """What was wrong with the bytes, without quoting them."""
    cause = error.__context__
    if isinstance(cause, MalformedResponse):
        return str(cause)
    if isinstance(error, httptools.HttpParserUpgrade):
        return "an upgrade nobody asked for"
    return str(error) or type(error).__name__
