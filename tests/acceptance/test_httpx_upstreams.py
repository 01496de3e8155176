"""Providers behind a forward proxy and over HTTP/2: charged as exactly as any, and let go when the client leaves."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import httpx2
import pytest

from tests.acceptance.test_charges import CALLS, reconciled
from tests.support.credit import settled_once
from tests.support.forward_proxy import ENCODED, ForwardProxy
from tests.support.gateway import Gateway, Key, until
from tests.support.h2server import H2Server, H2Stream
from tests.support.ports import free_port
from tests.support.raw_client import ask, post

PROXY_PORT, H2_PORT = free_port(), free_port()
HOST = "provider.test"
"""A name that only the proxy can resolve."""
MODELS = {"proxied": "httpx-proxied", "http2": "httpx-http2"}
WAYS = {
    "proxied": f'base_url = "http://{HOST}:8000/v1"\ninsecure = true\nproxy_url_env = "SOME_PROXY"',
    "http2": f'base_url = "http://127.0.0.1:{H2_PORT}/v1"\nhttp2 = true',
}
ENVIRON = {"SOME_PROXY": f"http://{ENCODED}@127.0.0.1:{PROXY_PORT}"}
PROVIDERS = "".join(
    f"""
[providers.{name}]
kind = "openai"
{way}

[routes."httpx-{name}"]
candidates = [{{ provider = "{name}", model = "gpt-4o-mini" }}]

[prices."httpx-{name}"]
input = "1"
output = "1"
"""
    for name, way in WAYS.items()
)


class Fronts:
    """What stands between the gateway and the simulated provider."""

    def __init__(self, proxy: ForwardProxy, server: H2Server) -> None:
        self.proxy, self.server = proxy, server

    def used(self, name: str) -> int:
        return len(self.proxy.targets if name == "proxied" else self.server.streams)


@pytest.fixture
async def fronts(gateway: Gateway) -> AsyncIterator[Fronts]:
    """A proxy that knows the provider's name, and an HTTP/2 server that passes requests on to the provider."""
    port = int(gateway.provider.rpartition(":")[2])

    async def passed_on(stream: H2Stream) -> None:
        headers = {name.decode(): value.decode() for name, value in stream.headers if not name.startswith(b":")}
        url = f"{gateway.provider}{stream.target.decode()}"
        async with (
            httpx2.AsyncClient(verify=False, timeout=30) as client,
            client.stream("POST", url, content=stream.body, headers=headers) as answer,
        ):
            await stream.head(answer.status_code, answer.headers["content-type"].encode())
            async for part in answer.aiter_raw():
                await stream.data(part)
            await stream.end()

    async with contextlib.AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(ForwardProxy(PROXY_PORT, {HOST: port}))
        server = await stack.enter_async_context(H2Server(passed_on, port=H2_PORT))
        yield Fronts(proxy, server)


@pytest.mark.parametrize("way", CALLS)
@pytest.mark.parametrize("name", MODELS)
async def test_calls_are_charged_to_the_token(gateway: Gateway, key: Key, fronts: Fronts, name: str, way: str) -> None:
    answered = await CALLS[way](gateway, key, ask("[[tokens=300]]Tell me more.", model=MODELS[name]))
    served, row = await reconciled(gateway, key, answered)
    assert served["completed"]
    assert row["charged"] == served["prompt_tokens"] + served["completion_tokens"]
    assert (row["prompt_tokens"], row["output_tokens"]) == (served["prompt_tokens"], served["completion_tokens"])
    assert row["outcome"] == "completed"
    assert fronts.used(name) == 1
    assert gateway.audit().returncode == 0


@pytest.mark.parametrize("name", MODELS)
async def test_leaving_a_stream_lets_the_provider_go_and_is_charged_fairly(
    gateway: Gateway, key: Key, fronts: Fronts, name: str
) -> None:
    fields = ask("[[tokens=400]][[interval_ms=20]]Tell me more.", model=MODELS[name], stream=True)
    async with post(gateway, key, fields) as call:
        await call.head()
        seen = 0
        async for frame in call.events():
            seen += bool(frame.content)
            if seen == 5:
                break
        call.leave("fin")
        served = await gateway.served(call.headers["x-request-id"])
    row = await settled_once(gateway, key)
    assert served["aborted"]
    assert served["prompt_tokens"] < row["charged"] <= served["prompt_tokens"] + served["served_tokens"]
    assert row["metadata"]["ending"] == "client_gone"
    if name == "http2":
        await until(lambda: fronts.server.streams[0].reset_code == 8)
        assert not fronts.server.peers[0].gone.is_set()


async def test_the_proxys_password_is_in_no_log(gateway: Gateway, key: Key, fronts: Fronts) -> None:
    fronts.proxy.silent = True
    async with httpx2.AsyncClient(verify=False, timeout=20) as client:
        headers = {"authorization": f"Bearer {key.text}"}
        url = f"{gateway.url}/v1/chat/completions"
        reply = await client.post(url, json=ask(model=MODELS["proxied"]), headers=headers)
    assert reply.status_code == 504
    assert "p%3Aw" not in reply.text
    log = gateway.log.read_text()
    assert "attempt failed" in log
    assert "p%3Aw" not in log
    assert "p:w@1" not in log
