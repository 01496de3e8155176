"""What may be written to an upstream, and where an origin's URL leads."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.http_request import Origin, build_request

HOME = Origin("https", "api.example.com", 443)


def test_a_request_is_written_whole() -> None:
    headers = [(b"Authorization", b"Bearer k"), (b"x-empty", b"")]
    assert build_request(b"POST", b"/v1/x?a=%20", HOME, headers, b"{}") == (
        b"POST /v1/x?a=%20 HTTP/1.1\r\nAuthorization: Bearer k\r\nx-empty: \r\nhost: api.example.com\r\n"
        b"content-length: 2\r\n\r\n{}"
    )


def test_a_length_is_sent_with_every_body_and_with_an_empty_post_but_not_with_a_get() -> None:
    assert build_request(b"POST", b"/", HOME, [], b"").endswith(b"\r\ncontent-length: 0\r\n\r\n")
    assert build_request(b"GET", b"/", HOME, [], b"") == b"GET / HTTP/1.1\r\nhost: api.example.com\r\n\r\n"


@pytest.mark.parametrize(
    ("method", "target", "header"),
    [
        (b"GET /x", b"/", (b"a", b"b")),
        (b"get", b"/", (b"a", b"b")),
        (b"", b"/", (b"a", b"b")),
        (b"GET", b"", (b"a", b"b")),
        (b"GET", b"/a b", (b"a", b"b")),
        (b"GET", b"/\r\nx: y", (b"a", b"b")),
        (b"GET", b"/ HTTP/1.1\r\nx: y\r\n", (b"a", b"b")),
        (b"GET", b"/\xc3\xa9", (b"a", b"b")),
        (b"GET", b"/", (b"a", b"b\r\nx: y")),
        (b"GET", b"/", (b"a", b"b\r\n")),
        (b"GET", b"/", (b"a", b"b\n")),
        (b"GET", b"/", (b"a", b"b\rc")),
        (b"GET", b"/", (b"a", b"b\0c")),
        (b"GET", b"/", (b"a\r\nx", b"b")),
        (b"GET", b"/", (b"a: b\r\nx", b"y")),
        (b"GET", b"/", (b"a b", b"c")),
        (b"GET", b"/", (b"a:", b"c")),
        (b"GET", b"/", (b"", b"c")),
        (b"GET", b"/", (b"Host", b"elsewhere")),
        (b"GET", b"/", (b"Content-Length", b"3")),
        (b"GET", b"/", (b"transfer-encoding", b"chunked")),
    ],
)
def test_nothing_can_change_the_framing(method: bytes, target: bytes, header: tuple[bytes, bytes]) -> None:
    with pytest.raises(ValueError, match="not allowed"):
        build_request(method, target, HOME, [header], b"")


def test_a_refused_header_is_not_quoted() -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        build_request(b"GET", b"/", HOME, [(b"authorization", b"Bearer sk-secret\r\n")], b"")
    assert "secret" not in str(caught.value)


@given(st.lists(st.tuples(st.binary(max_size=12), st.binary(max_size=12)), max_size=4), st.binary(max_size=20))
def test_whatever_is_accepted_reads_back_as_exactly_the_headers_given(
    headers: list[tuple[bytes, bytes]], body: bytes
) -> None:
    def made(*parts: list[tuple[bytes, bytes]]) -> bytes | None:
        try:
            return build_request(b"POST", b"/", HOME, parts[0], body, *parts[1:])
        except ValueError:
            return None

    raw, own = made(headers), made([], headers)
    assert (raw is None) == (own is None)
    for each in (raw, own):
        if each is not None:
            head, _, rest = each.partition(b"\r\n\r\n")
            assert rest == body
            *lines, length = [tuple(line.split(b": ", 1)) for line in head.split(b"\r\n")[1:]]
            assert length == (b"content-length", b"%d" % len(body))
            lines.remove((b"host", b"api.example.com"))
            assert lines == headers


@pytest.mark.parametrize(
    ("url", "origin", "authority"),
    [
        ("https://API.example.com/v1", ("https", "api.example.com", 443), b"api.example.com"),
        ("http://127.0.0.1:8000", ("http", "127.0.0.1", 8000), b"127.0.0.1:8000"),
        ("http://[::1]:80/x", ("http", "::1", 80), b"[::1]"),
        ("https://b\u00fccher.example:8443", ("https", "xn--bcher-kva.example", 8443), b"xn--bcher-kva.example:8443"),
    ],
)
def test_an_origin_is_read_from_a_url(url: str, origin: tuple[str, str, int], authority: bytes) -> None:
    found = Origin.from_url(url)
    assert (found.scheme, found.host, found.port) == origin
    assert found == Origin(*origin)
    assert hash(found) == hash(Origin(*origin))
    assert found.authority == authority


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host",
        "//host",
        "http://",
        "http://user:key@host",
        "http://a b/",
        "http://host:0",
        "http://host:99999",
        "x",
    ],
)
def test_what_is_no_origin_is_refused(url: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        Origin.from_url(url)
