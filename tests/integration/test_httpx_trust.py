"""Whom an exchange through a proxy or over HTTP/2 trusts, and who must trust us."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy.http_request import Origin
from proxy.httpx_exchange import HttpxPool
from proxy.transport import TransportLimits
from proxy.transport_errors import (
    ConnectFailed,
    UpstreamClosed,
)
from tests.support.certificates import Certificates, make
from tests.support.forward_proxy import ENCODED
from tests.support.rawserver import both_loops, until, whole
from tests.support.ways import (
    H1Served,
    Served,
    echo,
    provider,
)


@pytest.fixture(scope="module")
def certificates() -> Iterator[Certificates]:
    folder = Path(tempfile.mkdtemp(prefix="tg-ca-"))
    yield make(folder)
    shutil.rmtree(folder)


@pytest.mark.parametrize("told", [True, False])
@both_loops
async def test_a_close_delimited_body_in_a_tunnel_needs_the_close_of_tls(
    told: bool, certificates: Certificates
) -> None:
    """TCP's end alone can be forged by anyone on the path, the proxy too."""

    async def ends(served: Served) -> None:
        assert isinstance(served, H1Served)
        await served.peer.send(b"HTTP/1.1 200 OK\r\n\r\nhello")
        if told:
            served.peer.close()
            return
        number = served.peer.writer.get_extra_info("socket").fileno()
        with socket.socket(fileno=os.dup(number)) as below_tls:
            below_tls.shutdown(socket.SHUT_RDWR)

    async with provider("tunnel", ends, certificates) as behind:
        exchange = behind.open()
        if told:
            assert await whole(exchange) == b"hello"
            return
        assert await exchange.read() == b"hello"
        with pytest.raises(UpstreamClosed):
            await exchange.read()
        exchange.release()


@pytest.mark.parametrize("way", ["tunnel", "h2", "h2-tunnel"])
@both_loops
async def test_an_untrusted_certificate_is_refused(way: str, certificates: Certificates) -> None:
    async with provider(way, echo, certificates) as behind:
        proxy = vars(behind.pool.links)["_way"].proxy
        behind.pool = HttpxPool(
            Origin("https", "127.0.0.1", behind.server.port), TransportLimits(), http2=True, proxy=proxy
        )
        exchange = behind.open()
        with pytest.raises(ConnectFailed, match="certificate") as caught:
            await exchange.head()
        assert not caught.value.sent
        exchange.release()
        await behind.pool.aclose()


@pytest.mark.parametrize("user", ["", "gate%20way:wrong@"])
@pytest.mark.parametrize("way", ["forward", "tunnel", "h2-tunnel"])
@both_loops
async def test_a_proxy_that_refuses_us_is_a_connect_failure(way: str, user: str, certificates: Certificates) -> None:
    async with provider(way, echo, certificates, url=f"http://{user}127.0.0.1:PORT") as behind:
        exchange = behind.open()
        with pytest.raises(ConnectFailed, match="407") as caught:
            await exchange.head()
        assert not caught.value.sent
        assert "wrong" not in str(caught.value)
        assert ENCODED not in repr(caught.value)
        assert behind.connections == 0
        exchange.release()
        if way != "forward":
            assert behind.proxy is not None
            proxy = behind.proxy
            await until(lambda: proxy.open == 0)
