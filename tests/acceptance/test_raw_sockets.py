"""Bytes that are almost HTTP: one request is one answer, then the connection closes and the next one is fine."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from tests.support.gateway import Gateway, Key
from tests.support.strict_client import REQUEST_ID, StrictClient, connected, stream_of, well_formed

PATH = "/v1/chat/completions"
BODY = b'{"model":"gpt-4o-mini","max_tokens":5,"stream":true,"messages":[{"role":"user","content":"hi"}]}'
SMUGGLED = b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n"
CLIENT_HEADER_S = CLIENT_BODY_S = 1.5  # as in the acceptance configuration


def post(*headers: str, body: bytes = BODY, line: str = f"POST {PATH} HTTP/1.1") -> bytes:
    """A request head with these header lines, its body, and a second request hidden behind it."""
    lines = "".join(f"{header}\r\n" for header in ("host: x", "authorization: Bearer KEY", *headers))
    return f"{line}\r\n{lines}\r\n".encode("latin-1") + body + SMUGGLED


LENGTH = f"content-length: {len(BODY)}"
WHOLE = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
TE = "transfer-encoding: chunked"

# name -> bytes that must be refused with one 400 (or no answer at all) and a closed connection
CORPUS = {
    "a length and chunks": post(LENGTH, TE, body=WHOLE),
    "chunks and a length": post(TE, LENGTH, body=WHOLE),
    "two lengths": post(LENGTH, "content-length: 1"),
    "a list of lengths": post(f"content-length: {len(BODY)}, {len(BODY)}"),
    "a signed length": post(f"content-length: +{len(BODY)}"),
    "a negative length": post("content-length: -1"),
    "a hexadecimal length": post(f"content-length: {len(BODY):#x}"),
    "a length with a space inside": post("content-length: 9 7"),
    "a length of 2^64": post("content-length: 18446744073709551616"),
    "no length at all but a word": post("content-length: many"),
    "an unknown transfer coding": post("transfer-encoding: xchunked", body=WHOLE),
    "chunked and then another coding": post("transfer-encoding: chunked, identity", body=WHOLE),
    "chunked in two headers": post(TE, "transfer-encoding: identity", body=WHOLE),
    "a space before the colon": post(f"content-length : {len(BODY)}"),
    "a folded header": post("x-a: 1\r\n 2", LENGTH),
    "a folded length": post("content-length:\r\n " + str(len(BODY))),
    "a header without a colon": post("nonsense", LENGTH),
    "a NUL in a header": post("x-a: a\0b", LENGTH),
    "a CR in a header": post("x-a: a\rb", LENGTH),
    "bare LF after a header": post(f"x-a: 1\nx-b: 2\r\n{LENGTH}"),
    "bare LF throughout": post(LENGTH).replace(b"\r\n", b"\n"),
    "a bad header name": post("x(a): 1", LENGTH),
    "a chunk size that is no number": post(TE, body=b"zz\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "a negative chunk size": post(TE, body=b"-5\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "a chunk size of 2^64": post(TE, body=b"10000000000000000\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "a chunk size with 0x": post(TE, body=b"0x%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)),
    "a chunk longer than its size": post(TE, body=b"5\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "a chunk extension with a bare LF": post(TE, body=b"%x;a\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)),
    "chunk lines that end in bare LF": post(TE, body=WHOLE.replace(b"\r\n", b"\n")),
    "a bad version": post(LENGTH, line=f"POST {PATH} HTTP/3.7"),
    "a word for a version": post(LENGTH, line=f"POST {PATH} HTPP/1.1"),
    "HTTP/0.9": b"GET /v1/models\r\n\r\n" + SMUGGLED,
    "HTTP/2's preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SMUGGLED,
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 200,
    "a method that is no word": post(LENGTH, line=f"PO(ST {PATH} HTTP/1.1"),
    "a space in the address": post(LENGTH, line="POST /v1/chat completions HTTP/1.1"),
    "one header of 100 kB": post("x-a: " + "a" * 100_000, LENGTH),
    "an address of 100 kB": post(LENGTH, line="POST /" + "a" * 100_000 + " HTTP/1.1"),
    "a thousand headers": post(*(f"x-{number}: 1" for number in range(1_000)), LENGTH),
    "CONNECT": post(line="CONNECT evil:443 HTTP/1.1"),
}


async def fine(gateway: Gateway, key: Key) -> None:
    """The gateway serves, and nothing of this account is held."""
    async with connected(gateway.port) as client:
        assert (await client.request("GET", "/v1/models", key.text)).status == 200
    assert (await gateway.idle(key)).held == 0


@pytest.mark.parametrize("name", CORPUS)
async def test_what_is_not_quite_http_gets_one_answer_and_a_closed_connection(
    gateway: Gateway, key: Key, name: str
) -> None:
    async with connected(gateway.port) as client:
        await send(client, CORPUS[name].replace(b"KEY", key.text.encode()))
        got = await client.rest()
    assert got.count(b"HTTP/1.1 ") <= 1
    assert b'"status":"ok"' not in got  # the hidden request was not served
    if got:
        head, _, body = got.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 401 " if name == "HTTP/0.9" else b"HTTP/1.1 400 ")
        assert well_formed(json.loads(body)["error"])["type"] == "invalid_request_error"
        assert REQUEST_ID.search(head.decode())
    await fine(gateway, key)
    assert (await gateway.balance(key)).charged == 0


async def send(client: StrictClient, data: bytes) -> None:
    """Write; the server may close while it is written to."""
    try:
        await client.send(data)
    except (ConnectionError, RuntimeError):  # uvloop's word for a closed transport
        return


async def test_what_follows_a_request_is_a_request_of_its_own(gateway: Gateway, key: Key) -> None:
    request = post(LENGTH).replace(b"KEY", key.text.encode())
    async with connected(gateway.port) as client:
        await client.send(request + request)
        for _ in range(2):
            assert stream_of(await client.answer(), usage_wanted=False).text()
            assert (await client.answer()).json() == {"status": "ok"}


async def test_garbage_behind_a_request_does_not_reach_into_its_answer(gateway: Gateway, key: Key) -> None:
    body = b'{"model":"sim-slow-first","stream":true,"messages":[{"role":"user","content":"hi"}]}'
    request = post(f"content-length: {len(body)}", body=body).replace(SMUGGLED, b"").replace(b"KEY", key.text.encode())
    async with connected(gateway.port) as client:
        await client.send(request)
        assert (await client.reader.readuntil(b"\n\n")).endswith(b": tollgate\n\n")
        await client.send(b"\0\0 this is not HTTP\r\n\r\n")
        answer, end, behind = (await client.rest()).partition(b"\r\n0\r\n\r\n")
    assert end
    assert b"HTTP/1.1" not in answer
    assert b"[DONE]" in answer
    assert behind.startswith(b"HTTP/1.1 400 ")
    await fine(gateway, key)


async def is_closed_for_silence(gateway: Gateway, part: bytes, *, behind_a_request: bool = False) -> None:
    """A connection on which only `part` of a head comes is closed at the bound, without a word."""
    async with connected(gateway.port) as client:
        if behind_a_request:
            assert (await client.request("GET", "/health/live")).status == 200
        began = time.monotonic()
        await client.send(part)
        assert await client.rest(CLIENT_HEADER_S + 5) == b"", part
        assert CLIENT_HEADER_S * 0.8 < time.monotonic() - began < CLIENT_HEADER_S + 2, part


async def test_a_head_that_does_not_come_is_not_waited_for(gateway: Gateway) -> None:
    parts = (b"", b"POST /v1/ch", f"POST {PATH} HTTP/1.1\r\nhost: x\r\nauthoriz".encode())
    await asyncio.gather(*(is_closed_for_silence(gateway, part) for part in parts))


async def test_a_header_without_end_is_refused_at_its_bound(gateway: Gateway) -> None:
    async with connected(gateway.port) as client:
        await client.send(b"GET /v1/models HTTP/1.1\r\nx-a: ")
        began = time.monotonic()
        for _ in range(8):
            await send(client, b"a" * 65_536)
        await client.rest()
        assert time.monotonic() - began < CLIENT_HEADER_S * 0.8  # by its size, not by its time


@pytest.mark.parametrize("part", [b"0\r\nA: ", b"5;", b"5;a="], ids=["trailer", "extension", "extension's value"])
async def test_a_chunked_body_that_never_gets_on_is_refused_at_its_bound(
    gateway: Gateway, key: Key, part: bytes
) -> None:
    head = post(TE, body=b"").replace(SMUGGLED, b"").replace(b"KEY", key.text.encode())
    async with connected(gateway.port) as client:
        await client.send(head + part)
        began = time.monotonic()
        for _ in range(8):
            await send(client, b"a" * 65_536)
        await client.rest()
        assert time.monotonic() - began < CLIENT_BODY_S * 0.8  # by its size, not by its time
    await fine(gateway, key)


async def test_a_field_behind_a_chunked_body_is_no_header(gateway: Gateway, key: Key) -> None:
    """Whoever checks the headers in front of us would never have seen it."""
    trailer = WHOLE.removesuffix(b"\r\n") + f"authorization: Bearer {key.text}\r\n\r\n".encode()
    async with connected(gateway.port) as client:
        await client.send(f"POST {PATH} HTTP/1.1\r\nhost: x\r\n{TE}\r\n\r\n".encode() + trailer)
        assert (await client.answer()).status == 401
    await fine(gateway, key)


OFFERS = {
    "http/2": ("connection: Upgrade, HTTP2-Settings", "upgrade: h2c", "http2-settings: AAMAAABkAAQAAP__"),
    "a websocket": ("connection: keep-alive, Upgrade", "upgrade: websocket", "sec-websocket-key: AAAA"),
    "two things": ("upgrade: h2c", "connection: upgrade", "upgrade: x/1"),
}  # fmt: skip


@pytest.mark.parametrize("apart", [False, True], ids=["one segment", "two segments"])
@pytest.mark.parametrize("framing", [LENGTH, TE])
@pytest.mark.parametrize("name", OFFERS)
async def test_an_offer_to_change_the_protocol_is_ignored_and_the_body_stays_a_body(
    gateway: Gateway, key: Key, name: str, framing: str, apart: bool
) -> None:
    say = json.dumps(SMUGGLED.decode())  # the body holds a request, which must not be served as one
    body = b'{"model":"gpt-4o-mini","max_tokens":5,"messages":[{"role":"user","content":%b}]}' % say.encode()
    length = f"content-length: {len(body)}" if framing == LENGTH else framing
    head = post(*OFFERS[name], length, body=b"").replace(SMUGGLED, b"").replace(b"KEY", key.text.encode())
    framed = body if framing == LENGTH else b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    async with connected(gateway.port) as client:
        if apart:
            await client.send(head)
            with pytest.raises(TimeoutError):
                await client.rest(0.2)  # no answer before the body
            await client.send(framed)
        else:
            await client.send(head + framed)
        answer = await client.answer()
        assert answer.status == 200
        assert answer.json()["object"] == "chat.completion"
        with pytest.raises(TimeoutError):
            await client.rest(0.2)  # exactly one answer, and the connection goes on
        assert (await client.request("GET", "/health/live")).json() == {"status": "ok"}
    await fine(gateway, key)


async def test_offers_to_change_the_protocol_may_follow_each_other(gateway: Gateway, key: Key) -> None:
    offer = post(*OFFERS["http/2"], LENGTH).replace(b"KEY", key.text.encode())
    async with connected(gateway.port) as client:
        await client.send(offer + offer)
        for _ in range(2):
            assert stream_of(await client.answer(), usage_wanted=False).text()
            assert (await client.answer()).json() == {"status": "ok"}


async def test_a_connection_whose_next_request_does_not_come_is_not_kept(gateway: Gateway) -> None:
    parts = (b"\r\n", b"\r\n\r\n", b"GET /heal")
    await asyncio.gather(*(is_closed_for_silence(gateway, part, behind_a_request=True) for part in parts))


async def test_a_line_end_before_a_request_is_no_part_of_it(gateway: Gateway) -> None:
    async with connected(gateway.port) as client:
        for _ in range(3):
            assert (await client.request("GET", "/health/live")).status == 200
            await client.send(b"\r\n")
        assert (await client.request("GET", "/health/live")).status == 200


async def test_a_head_that_drips_is_not_waited_for(gateway: Gateway) -> None:
    async with connected(gateway.port) as client:
        began = time.monotonic()
        await client.send(b"GET /v1/models HTTP/1.1\r\n")
        while not client.reader.at_eof() and time.monotonic() - began < 10:
            await send(client, b"x-a: b\r\n")
            try:
                await client.rest(0.1)
            except TimeoutError:
                continue
        assert time.monotonic() - began < CLIENT_HEADER_S + 2


async def is_408(gateway: Gateway, key: Key, framing: str) -> None:
    """A body that does not come on after its beginning is given up at the bound, and the connection with it."""
    head = post(framing, body=b"").replace(SMUGGLED, b"").replace(b"KEY", key.text.encode())
    async with connected(gateway.port) as client:
        began = time.monotonic()
        await client.send(head + (b"5\r\n{    \r\n" if framing == TE else BODY))
        answer = await client.answer()
        assert CLIENT_BODY_S * 0.8 < time.monotonic() - began < CLIENT_BODY_S + 2
        assert await client.rest() == b""
    assert (answer.status, answer.error()["code"]) == (408, "request_timeout")
    assert answer.headers["x-should-retry"] == "false"


async def test_a_body_that_does_not_come_is_a_408(gateway: Gateway, key: Key) -> None:
    framings = (f"content-length: {len(BODY) + 1}", TE)
    await asyncio.gather(*(is_408(gateway, key, framing) for framing in framings))
    await fine(gateway, key)


async def test_a_client_that_leaves_inside_its_body_leaves_nothing(gateway: Gateway, key: Key) -> None:
    head = post(f"content-length: {len(BODY) + 1}").replace(SMUGGLED, b"").replace(b"KEY", key.text.encode())
    async with connected(gateway.port) as client:
        await client.send(head)
    await fine(gateway, key)


async def test_a_client_may_ask_before_it_sends_its_body(gateway: Gateway, key: Key) -> None:
    head = post(LENGTH, "expect: 100-continue", body=b"").replace(SMUGGLED, b"").replace(b"KEY", key.text.encode())
    async with connected(gateway.port) as client:
        await client.send(head)
        assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await client.send(BODY)
        assert stream_of(await client.answer(), usage_wanted=False).text()


async def test_a_request_that_is_refused_before_its_body_came_ends_its_connection(gateway: Gateway, key: Key) -> None:
    behind = post(LENGTH).replace(b"KEY", key.text.encode())
    async with connected(gateway.port) as client:
        await client.send(f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n".encode())
        assert (await client.answer()).status == 401
        await client.send(b" " * 1_000 + behind)
        assert await client.rest() == b""
    await fine(gateway, key)
    assert (await gateway.balance(key)).charged == 0


async def test_http_1_0_is_answered_and_closed(gateway: Gateway, key: Key) -> None:
    async with connected(gateway.port) as client:
        await client.send(f"GET /v1/models HTTP/1.0\r\nauthorization: Bearer {key.text}\r\n\r\n".encode())
        assert (await client.answer()).json()["object"] == "list"
        assert await client.rest() == b""
