"""The bytes of request bodies that a worker holds: bounded in sum, and none left behind on any way out."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator

import httpx2

from tests.support.credit import send
from tests.support.gateway import Gateway, Key, until
from tests.support.raw_client import RawCall, ask, post
from tests.support.strict_client import connected

BODY_MAX, BODIES_MAX = 1_048_576, 4_194_304  # as in the acceptance configuration
PART = 1_000_000


async def held(gateway: Gateway) -> int:
    """Bytes that the workers say they hold."""
    async with httpx2.AsyncClient() as client:
        text = (await client.get(f"{gateway.url}/metrics")).text
    (found,) = re.findall(r"^tollgate_request_body_bytes(?:\{.*\})? (\S+)$", text, re.MULTILINE)
    return int(float(found))


async def holding(gateway: Gateway, size: int) -> None:
    async def reached() -> bool:
        return await held(gateway) == size

    await until(reached, 10)


def head(key: Key, size: int | None) -> bytes:
    framing = "transfer-encoding: chunked" if size is None else f"content-length: {size}"
    return (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key.text}\r\n{framing}\r\n\r\n"
    ).encode()


@contextlib.asynccontextmanager
async def begun(gateway: Gateway, key: Key, sent: int, announced: int | None) -> AsyncIterator[RawCall]:
    """A call whose body has come so far and no further; chunked when its size is not announced."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    try:
        part = b" " * sent
        writer.write(head(key, announced) + (b"%x\r\n%b\r\n" % (sent, part) if announced is None else part))
        await writer.drain()
        yield RawCall(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def long_call(size: int) -> bytes:
    """A stream of some seconds whose body has so many bytes."""
    fields = ask("[[tokens=400]][[interval_ms=20]]Go on.", stream=True) | {"metadata": {"x": ""}}
    fields["metadata"] = {"x": "y" * (size - len(json.dumps(fields)))}
    return json.dumps(fields).encode()


async def test_what_exceeds_the_sum_is_refused_and_what_fits_again_is_served(gateway: Gateway, key: Key) -> None:
    await holding(gateway, 0)
    async with contextlib.AsyncExitStack() as stack:
        count = BODIES_MAX // PART
        for _ in range(count):
            running = await stack.enter_async_context(post(gateway, key, long_call(PART)))
            await running.head()
        await holding(gateway, count * PART)
        for announced in (BODY_MAX, None):
            async with connected(gateway.port) as client:
                body = b"" if announced else b"%x\r\n%b\r\n" % (PART, b" " * PART)
                await client.send(head(key, announced) + body)
                answer = await client.answer()
            assert (answer.status, answer.error()["code"]) == (503, "overloaded")
            assert answer.headers["retry-after"] == "1"
        assert (await send(gateway, key, ask(max_tokens=1))).status_code == 200
    await holding(gateway, 0)
    assert (await send(gateway, key, ask("x" * PART, max_tokens=1))).status_code == 200
    await holding(gateway, 0)


async def test_a_client_that_leaves_within_its_body_leaves_nothing(gateway: Gateway, key: Key) -> None:
    await holding(gateway, 0)
    async with begun(gateway, key, PART, BODY_MAX) as call:
        await holding(gateway, PART)
        call.leave("rst")
        await holding(gateway, 0)


async def test_a_body_that_is_too_slow_too_large_or_no_json_leaves_nothing(gateway: Gateway, key: Key) -> None:
    async with begun(gateway, key, PART, BODY_MAX) as slow, begun(gateway, key, BODY_MAX, None) as large:
        large.writer.write(b"1\r\n \r\n")
        await large.head()
        assert large.status == 413
        async with connected(gateway.port) as client:
            assert (await client.chat(key.text, b" " * PART)).status == 400
        await slow.head()
        assert slow.status == 408
    await holding(gateway, 0)


async def test_a_large_body_is_read_as_a_small_one_is(gateway: Gateway, key: Key) -> None:
    filler = "y" * 400_000
    large = json.dumps(ask("[[tokens=5]]Go on.", max_tokens=9) | {"metadata": {"x": filler}})
    assert (await send(gateway, key, large.encode())).status_code == 200
    bad = await send(gateway, key, json.dumps(ask(n=0) | {"metadata": {"x": filler}}).encode())
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "n")
