"""The upstream transport over TLS: whom it trusts, how an answer may end, cancellation in the handshake."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from proxy.transport import (
    ConnectFailed,
    ExchangeAborted,
    Origin,
    Transport,
    TransportLimits,
    UpstreamClosed,
    UpstreamTimeout,
)
from tests.support.rawserver import (
    OK,
    Peer,
    RawServer,
    answers,
    both_loops,
    closes_after,
    post,
    transport_with,
    until,
    whole,
)


@dataclass(frozen=True)
class Certificates:
    """PEM files made for this run: a CA, its certificate for localhost and 127.0.0.1, one for another name, and a
    self-signed one."""

    folder: Path

    def server(self, name: str) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2  # some systems' own default is whatever OpenSSL still speaks
        context.load_cert_chain(self.folder / f"{name}.pem", self.folder / f"{name}.key")
        return context

    def client(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.folder / "ca.pem"))
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        return context


def _openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    folder = tmp_path_factory.mktemp("certificates")
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    local = "subjectAltName=DNS:localhost,IP:127.0.0.1"
    new = ("req", "-x509", *key)
    _openssl(folder, *new, "-subj", "/CN=Test CA", "-keyout", "ca.key", "-out", "ca.pem")
    _openssl(folder, *new, "-subj", "/CN=localhost", "-addext", local, "-keyout", "self.key", "-out", "self.pem")
    for name, names in (("good", local), ("other", "subjectAltName=DNS:other.example")):
        ca = ("-CA", "ca.pem", "-CAkey", "ca.key", "-addext", names, "-addext", "basicConstraints=critical,CA:FALSE")
        _openssl(folder, *new, *ca, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.pem")
    return Certificates(folder)


@both_loops
async def test_a_certificate_of_the_given_ca_is_accepted_and_the_connection_reused(certificates: Certificates) -> None:
    async with (
        RawServer(answers(OK, OK), tls=certificates.server("good")) as server,
        transport_with(certificates.client()) as transport,
    ):
        for host in ("127.0.0.1", "localhost"):
            origin = Origin("https", host, server.port)
            for _ in range(2):
                assert await whole(transport.open(origin, post(origin))) == b"ok"
        assert len(server.peers) == 2
        versions = {peer.writer.get_extra_info("ssl_object").version() for peer in server.peers}
        assert versions == {"TLSv1.3"}


@pytest.mark.parametrize("name", ["self", "other", "good"])
@both_loops
async def test_an_untrusted_or_foreign_certificate_is_refused(certificates: Certificates, name: str) -> None:
    """Self-signed; right CA but another host's name; right name but a CA that the system does not trust."""
    context = None if name == "good" else certificates.client()
    async with RawServer(answers(OK), tls=certificates.server(name)) as server, transport_with(context) as transport:
        exchange = transport.open(server.origin, post(server.origin))
        with pytest.raises(ConnectFailed, match="certificate") as caught:
            await exchange.head()
        assert not caught.value.sent
        assert server.requests == []


@both_loops
async def test_a_server_below_tls_1_2_is_refused(certificates: Certificates) -> None:
    old = certificates.server("good")
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    async with RawServer(answers(OK), tls=old) as server, transport_with(certificates.client()) as transport:
        with pytest.raises(ConnectFailed):
            await transport.open(server.origin, post(server.origin)).head()


@both_loops
async def test_a_plain_server_behind_https_is_a_connect_failure(certificates: Certificates) -> None:
    async def script(peer: Peer) -> None:
        await peer.send(OK)
        await peer.until_gone()

    async with RawServer(script) as server, transport_with(certificates.client()) as transport:
        origin = Origin("https", "127.0.0.1", server.port)
        with pytest.raises(ConnectFailed):
            await transport.open(origin, post(origin)).head()


def test_a_context_that_does_not_verify_is_refused(certificates: Certificates) -> None:
    unchecked = certificates.client()
    unchecked.check_hostname = False
    blind = certificates.client()
    blind.check_hostname = False
    blind.verify_mode = ssl.CERT_NONE
    old = certificates.client()
    old.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    for context in (unchecked, blind, old):
        with pytest.raises(ValueError, match="TLS context"):
            Transport(TransportLimits(), ssl_context=context)


@both_loops
async def test_a_close_delimited_body_needs_the_close_of_tls(certificates: Certificates) -> None:
    """TCP's end alone can be forged by anyone on the path."""

    async def cut(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\n\r\nhello")
        await peer.reader.read(1)

    async with (
        RawServer(closes_after(b"HTTP/1.1 200 OK\r\n\r\nhello"), tls=certificates.server("good")) as server,
        transport_with(certificates.client()) as transport,
    ):
        assert await whole(transport.open(server.origin, post(server.origin))) == b"hello"
    async with (
        RawServer(cut, tls=certificates.server("good")) as server,
        transport_with(certificates.client()) as transport,
    ):
        exchange = transport.open(server.origin, post(server.origin))
        assert await exchange.read() == b"hello"
        number = server.peers[0].writer.get_extra_info("socket").fileno()
        with socket.socket(fileno=os.dup(number)) as below_tls:
            below_tls.shutdown(socket.SHUT_RDWR)
        with pytest.raises(UpstreamClosed):
            await exchange.read()


@both_loops
async def test_a_truncated_chunked_body_fails_over_tls(certificates: Certificates) -> None:
    cut = closes_after(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", b"5\r\nhello\r\n")
    async with (
        RawServer(cut, tls=certificates.server("good")) as server,
        transport_with(certificates.client()) as transport,
    ):
        exchange = transport.open(server.origin, post(server.origin))
        assert await exchange.read() == b"hello"
        with pytest.raises(UpstreamClosed):
            await exchange.read()


@both_loops
async def test_a_slow_reader_stops_the_upstream_over_tls(certificates: Certificates) -> None:
    total, piece = 48 * 1024 * 1024, b"x" * 65536

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % total)
        for _ in range(total // len(piece)):
            await peer.send(piece)
        await peer.until_gone()

    async with (
        RawServer(script, tls=certificates.server("good")) as server,
        transport_with(certificates.client()) as transport,
    ):
        exchange = transport.open(server.origin, post(server.origin))
        await exchange.head()
        sent, same = -1, 0
        while same < 20:
            await asyncio.sleep(0.02)
            same = same + 1 if server.peers[0].sent == sent else 0
            sent = server.peers[0].sent
        assert sent < total // 2
        assert sum(map(len, exchange.chunks)) <= 1024 * 1024
        assert len(await whole(exchange)) == total
        assert transport.counts().idle == 1


@both_loops
async def test_a_silent_handshake_times_out_or_is_cancelled_without_a_socket_left(certificates: Certificates) -> None:
    async def script(peer: Peer) -> None:
        await peer.until_gone()

    async with RawServer(script) as server, transport_with(certificates.client(), connect_ms=200) as transport:
        origin = Origin("https", "127.0.0.1", server.port)
        with pytest.raises(UpstreamTimeout) as caught:
            await transport.open(origin, post(origin)).head()
        assert (caught.value.bound, caught.value.sent) == ("connect", False)
        exchange = transport.open(origin, post(origin), transport.deadlines_with(connect_ms=60_000))
        waiting = asyncio.create_task(exchange.head())
        await until(lambda: len(server.peers) == 2)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert isinstance(exchange.error, ExchangeAborted)
        for peer in server.peers:
            await asyncio.wait_for(peer.gone.wait(), 15)
