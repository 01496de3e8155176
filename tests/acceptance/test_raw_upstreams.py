"""Providers that no script of the simulated one covers: bytes on a socket, and what of them may reach a client."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.support.gateway import ONE_TRY, Gateway, Key
from tests.support.ports import free_port
from tests.support.strict_client import Answer, connected, stream_of

CANARY = "sk-canaryUpstream0123456789"
ASK = [{"role": "user", "content": "hi"}]
PORT = free_port()
"""Where the route `raw` finds its provider."""
PROVIDERS = f"""
[providers.raw]
kind = "openai"
base_url = "http://127.0.0.1:{PORT}/v1"
api_key_env = "RAW_KEY"

[routes.raw]
candidates = [{{ provider = "raw", model = "raw" }}]
{ONE_TRY}

[routes.raw-then-sim]
candidates = [{{ provider = "raw", model = "raw" }}, {{ provider = "sim", model = "gpt-4o-mini" }}]
{ONE_TRY}

[prices.raw]
input = "1"
output = "1"

[prices.raw-then-sim]
input = "1"
output = "1"
"""
ENVIRON = {"RAW_KEY": CANARY}
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n"
START = b'data: {"id":"x","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"role":"assistant"}}]}\n\n'
END = b'data: {"id":"x","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'


def said(text: bytes) -> bytes:
    """A content frame; `text` is JSON between its quotes."""
    return b'data: {"id":"x","choices":[{"index":0,"delta":{"content":"%b"}}]}\n\n' % text


def status(line: str, body: bytes, *headers: str) -> bytes:
    lines = "".join(f"{header}\r\n" for header in ("content-type: application/json", "connection: close", *headers))
    return f"HTTP/1.1 {line}\r\n{lines}content-length: {len(body)}\r\n\r\n".encode() + body


def sse(body: bytes, *headers: str) -> bytes:
    return HEAD + "".join(f"{header}\r\n" for header in headers).encode() + b"\r\n" + body


@asynccontextmanager
async def provider(port: int, *answers: bytes) -> AsyncIterator[list[bytes]]:
    """A provider that answers each connection with the next of `answers`; yields the requests it read."""
    asked: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        asked.append(head + await reader.readexactly(length))
        writer.write(answers[min(len(asked), len(answers)) - 1])
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", port)
    async with server:
        yield asked


async def ask(gateway: Gateway, key: Key, *, stream: bool, model: str = "raw", **more: Any) -> Answer:
    body = {"model": model, "messages": ASK, "stream": stream, **more}
    async with connected(gateway.port) as client:
        answer = await client.chat(key.text, body, accept_encoding="gzip")
        assert (await client.request("GET", "/v1/models", key.text)).status == 200
    assert CANARY.encode() not in answer.body
    return answer


async def refused(gateway: Gateway, key: Key, answer: Answer) -> tuple[int, str | None, str]:
    """Status, code and message of an error that cost nothing."""
    error = answer.error()
    row = await gateway.session(answer.headers["x-tollgate-session"])
    assert (row["outcome"], row["charged"]) == ("void", 0)
    assert (await gateway.idle(key)).available == 1_000_000
    return answer.status, error["code"], error["message"]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("line", ["401 Unauthorized", "403 Forbidden"])
async def test_our_key_refused_is_a_502_without_the_providers_words(
    gateway: Gateway, key: Key, stream: bool, line: str
) -> None:
    body = json.dumps(
        {"error": {"message": f"Incorrect API key provided: {CANARY}", "code": "invalid_api_key"}}
    ).encode()
    async with provider(PORT, status(line, body, f"www-authenticate: Bearer {CANARY}")) as asked:
        answer = await ask(gateway, key, stream=stream)
    assert (await refused(gateway, key, answer))[:2] == (502, "upstream_key_refused")
    assert f"authorization: Bearer {CANARY}".encode() in asked[0]
    assert "www-authenticate" not in answer.headers
    row = await gateway.session(answer.headers["x-tollgate-session"])
    assert row["metadata"]["attempts"][0]["status"] == int(line[:3])


@pytest.mark.parametrize("stream", [True, False])
async def test_our_key_refused_inside_a_200_is_a_502_too(gateway: Gateway, key: Key, stream: bool) -> None:
    error = {
        "message": f"Incorrect API key provided: {CANARY}",
        "type": "authentication_error",
        "code": "invalid_api_key",
    }
    body = json.dumps({"error": error}).encode()
    answers = sse(b"data: " + body + b"\n\n") if stream else status("200 OK", body)
    async with provider(PORT, answers):
        answer = await ask(gateway, key, stream=stream)
    assert (await refused(gateway, key, answer))[:2] == (502, "upstream_key_refused")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("line", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
async def test_redirects_are_refused_and_not_followed(gateway: Gateway, key: Key, stream: bool, line: str) -> None:
    location = f"location: http://127.0.0.1:{PORT}/v1/metadata?{CANARY}"
    async with provider(PORT, status(line, b"{}", location)) as asked:
        answer = await ask(gateway, key, stream=stream)
    assert (await refused(gateway, key, answer))[:2] == (502, "upstream_invalid")
    assert len(asked) == 1
    assert "location" not in answer.headers


async def test_nothing_of_the_clients_headers_goes_up_and_nothing_of_the_providers_comes_down(
    gateway: Gateway, key: Key
) -> None:
    ours = ("set-cookie: a=b", "x-request-id: theirs", "x-tollgate-charge: 0", "server: nginx", "x-ratelimit-limit: 1")
    async with (
        provider(PORT, sse(START + said(b"hi") + END, *ours)) as asked,
        connected(gateway.port) as client,
    ):
        answer = await client.chat(
            key.text,
            {"model": "raw", "messages": ASK, "stream": True},
            connection="authorization, x-secret",
            x_secret="s",
            cookie="c=1",
            x_forwarded_for="1.2.3.4",
            openai_organization="org-1",
            x_request_id="11111111-2222-4333-8444-555555555555",
            user_agent="someone",
        )
    stream_of(answer, usage_wanted=False)
    names = {line.split(b":")[0].lower() for line in asked[0].split(b"\r\n\r\n")[0].split(b"\r\n")[1:]}
    allowed = {
        b"host",
        b"content-type",
        b"content-length",
        b"accept",
        b"accept-encoding",
        b"user-agent",
        b"x-request-id",
    }
    assert names <= allowed | {b"authorization"}
    assert key.text.encode() not in asked[0]
    assert b"someone" not in asked[0]
    assert b"11111111" not in asked[0]
    assert not {"set-cookie", "server", "x-ratelimit-limit", "x-tollgate-charge"} & set(answer.headers)
    assert len(answer.headers["x-request-id"]) == 36


@pytest.mark.parametrize("line", ["400 Bad Request", "404 Not Found", "413 Too Large", "422 Unprocessable"])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_fault_of_the_caller_does_not_fall_back(gateway: Gateway, key: Key, stream: bool, line: str) -> None:
    body = b'{"error":{"message":"Bad field.","type":"invalid_request_error","param":"zz","code":"bad_field"}}'
    async with provider(PORT, status(line, body)) as asked:
        answer = await ask(gateway, key, stream=stream, model="raw-then-sim")
    assert await refused(gateway, key, answer) == (int(line[:3]), "bad_field", "Bad field.")
    assert answer.error()["param"] == "zz"
    assert len(asked) == 1


@pytest.mark.parametrize("stream", [True, False])
async def test_a_rate_limit_falls_back(gateway: Gateway, key: Key, stream: bool) -> None:
    async with provider(PORT, status("429 Slow", b"{}", "retry-after: 9")):
        answer = await ask(gateway, key, stream=stream, model="raw-then-sim")
    assert (answer.status, answer.headers["x-tollgate-attempts"]) == (200, "2")
    row = await gateway.session(answer.headers["x-tollgate-session"])
    assert [each["status"] for each in row["metadata"]["attempts"]] == [429, 200]


FRAMES = {
    "a frame in two data lines": b'data: {"id":"x","choices":[{"index":0,\ndata: "delta":{"content":"hi"}}]}\n\n',
    "line ends inside JSON": b'data: {"choices":[{"index":0,\r\ndata:"delta":{\rdata: "content":"hi"}}]}\r\n\r\n',
    "other fields beside data": b"id: 7\nevent: chunk\nretry: 5\nfoo: bar\n" + said(b"hi"),
    "an escaped end inside content": said(b"hi\\n\\nevent: x\\ndata: [DONE]\\n\\n"),
    "a byte order mark": said(b"hi"),
    "trailing spaces": b'data: {"choices":[{"index":0,"delta":{"content":"hi"}}]}   \n\n',
    "nothing but blank lines first": b"\n\n\n\n" + said(b"hi"),
}


@pytest.mark.parametrize("name", FRAMES)
async def test_odd_frames_leave_as_plain_ones(gateway: Gateway, key: Key, name: str) -> None:
    start = START.replace(b"data: ", b"\xef\xbb\xbfdata: ") if name == "a byte order mark" else START
    async with provider(PORT, sse(start + FRAMES[name] + END)):
        answer = await ask(gateway, key, stream=True)
    stream = stream_of(answer, usage_wanted=False)
    assert stream.text().startswith("hi")
    row = await gateway.session(answer.headers["x-tollgate-session"])
    assert (row["outcome"], row["source"]) == ("completed", "counted")


GARBAGE = {
    "invalid UTF-8 in content": said(b"\xff\xfe"),
    "a raw line end in a string": b'data: {"choices":[{"index":0,"delta":{"content":"a\ndata: b"}}]}\n\n',
    "a NUL in a string": said(b"\x00"),
    "choices of a wrong type": b'data: {"choices":"x"}\n\n' + b"data: 7\n\n",
    "deep nesting": b'data: {"choices":' + b"[" * 100_000 + b"]" * 100_000 + b"}\n\n",
}


@pytest.mark.parametrize("name", GARBAGE)
async def test_frames_that_make_no_sense_are_a_502(gateway: Gateway, key: Key, name: str) -> None:
    async with provider(PORT, sse(GARBAGE[name])):
        answer = await ask(gateway, key, stream=True)
    assert (await refused(gateway, key, answer))[:2] == (502, "upstream_invalid")


WHOLE_GARBAGE = {
    "compressed": status("200 OK", gzip.compress(b'{"choices":[]}'), "content-encoding: gzip"),
    "an array": status("200 OK", b"[]"),
    "a number": status("200 OK", b"1"),
    "no content": b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}",
    "a length and chunks": b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n"
    b"2\r\n{}\r\n0\r\n\r\n",
    "a bad chunk size": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    "endless headers": b"HTTP/1.1 200 OK\r\n" + b"x-a: " + b"a" * 1_000_000 + b"\r\n\r\n{}",
    "HTTP/2's preface": b"\x00\x00\x12\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x64",
    "a switch of protocols": b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("name", WHOLE_GARBAGE)
async def test_answers_that_make_no_sense_are_a_502(gateway: Gateway, key: Key, name: str, stream: bool) -> None:
    async with provider(PORT, WHOLE_GARBAGE[name]):
        answer = await ask(gateway, key, stream=stream)
    assert (await refused(gateway, key, answer))[:2] == (502, "upstream_invalid")


async def test_an_end_that_came_in_one_read_leaves_in_one_write_once_it_is_settled(gateway: Gateway, key: Key) -> None:
    async with provider(PORT, sse(START + said(b"hello") + END)):
        answer = await ask(gateway, key, stream=True, stream_options={"include_usage": True})
    *spoken, last = answer.parts
    assert b"hello" in b"".join(spoken)
    assert b'"finish_reason":"stop"' not in b"".join(spoken)
    assert last.count(b"data: ") == 3  # the finish without text, usage and [DONE]
    assert b'"finish_reason":"stop"' in last
    assert last.endswith(b"data: [DONE]\n\n")


async def test_a_connection_closed_without_a_word_is_a_502(gateway: Gateway, key: Key) -> None:
    async with provider(PORT, b""):
        answer = await ask(gateway, key, stream=True)
    assert (await refused(gateway, key, answer))[0] == 502


async def test_the_providers_key_is_in_no_log_line(gateway: Gateway) -> None:
    assert CANARY not in gateway.log.read_text()
