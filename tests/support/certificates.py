"""Certificates of a test's own CA, made with openssl, and TLS contexts over them."""

from __future__ import annotations

import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Certificates:
    """PEM files in `folder`: `ca.pem`, and `good.pem` of that CA for localhost and 127.0.0.1."""

    folder: Path

    @property
    def ca(self) -> Path:
        return self.folder / "ca.pem"

    def server(self, *protocols: str) -> ssl.SSLContext:
        """A server's context that offers these protocols (ALPN)."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self.folder / "good.pem", self.folder / "good.key")
        if protocols:
            context.set_alpn_protocols(list(protocols))
        return context

    def client(self) -> ssl.SSLContext:
        """A client's context that trusts the CA and nobody else."""
        context = ssl.create_default_context(cafile=str(self.ca))
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        return context


def make(folder: Path) -> Certificates:
    """Make them in `folder`."""
    new = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    local = "subjectAltName=DNS:localhost,IP:127.0.0.1"
    ca = ("-CA", "ca.pem", "-CAkey", "ca.key", "-addext", local, "-addext", "basicConstraints=critical,CA:FALSE")
    for more in (
        ("-subj", "/CN=Test CA", "-keyout", "ca.key", "-out", "ca.pem"),
        (*ca, "-subj", "/CN=good", "-keyout", "good.key", "-out", "good.pem"),
    ):
        subprocess.run(["openssl", *new, *more], cwd=folder, check=True, capture_output=True, timeout=60)
    return Certificates(folder)
