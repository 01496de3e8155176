"""The address of a forward proxy: read from a URL, or from the environment's usual variables.

Must not: name a user, a password or the URL in an error or a `repr`; open anything.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Protocol
from urllib.parse import unquote_to_bytes, urlsplit

import msgspec

_URL = re.compile(
    r"http://(?:(?P<user>[!-.0-9;-?A-~]*)(?::(?P<password>[!-.0-?A-~]*))?@)?"
    r"(?P<host>[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]):(?P<port>[0-9]{1,5})/?"
)
FORM = "Write http://user:password@host:port (user and password only where the proxy asks for them)."


class ProxyAddress(msgspec.Struct, frozen=True):
    """Host (IPv6 without brackets) and port of a proxy that is spoken to in plain HTTP; `user_password` is what Basic
    authentication carries, decoded."""

    host: str
    port: int
    user_password: bytes | None = None

    def __repr__(self) -> str:
        return "ProxyAddress(...)"


def parse(url: str) -> ProxyAddress:
    """The proxy of `http://user:password@host:port` (user and password percent-encoded). Raises ValueError."""
    found = _URL.fullmatch(url)
    if found is None or not 0 < int(found["port"]) < 65_536:
        raise ValueError(f"not the URL of a proxy. {FORM}")
    user_password = None
    if found["user"] is not None:
        user_password = unquote_to_bytes(found["user"]) + b":" + unquote_to_bytes(found["password"] or "")
    return ProxyAddress(found["host"].strip("[]"), int(found["port"]), user_password)


class Settings(Protocol):
    """What a provider's table says of its proxy."""

    @property
    def base_url(self) -> str: ...
    @property
    def http2(self) -> bool: ...
    @property
    def proxy(self) -> str | None: ...
    @property
    def proxy_url_env(self) -> str | None: ...
    @property
    def proxy_env(self) -> bool: ...


def check(settings: Settings) -> None:
    """Raises ValueError, which begins with the key, when the table is wrong whatever the environment holds."""
    ways = [key for key in ("proxy", "proxy_url_env", "proxy_env") if getattr(settings, key)]
    if len(ways) > 1:
        raise ValueError(f"{ways[0]}: not together with {ways[1]}. Keep one of them.")
    if ways and settings.http2 and settings.base_url.startswith("http:"):
        raise ValueError("http2: plain http through a proxy is HTTP/1.1. Use https, or remove http2.")
    if settings.proxy is not None:
        try:
            parse(settings.proxy)
        except ValueError as error:
            raise ValueError(f"proxy: {error}") from None


def configured(settings: Settings, environ: Mapping[str, str]) -> ProxyAddress | None:
    """The proxy in front of a provider, if any. Raises ValueError, which begins with the key."""
    if settings.proxy is not None:
        return parse(settings.proxy)
    try:
        if settings.proxy_env:
            return from_environment(environ, settings.base_url)
        if settings.proxy_url_env is None:
            return None
        value = environ.get(settings.proxy_url_env, "").strip()
        if not value:
            raise ValueError(f"the environment has no {settings.proxy_url_env}. Set it, or remove the key.")
        return parse(value)
    except ValueError as error:
        raise ValueError(f"{'proxy_env' if settings.proxy_env else 'proxy_url_env'}: {error}") from None


def from_environment(environ: Mapping[str, str], base_url: str) -> ProxyAddress | None:
    """What HTTPS_PROXY or HTTP_PROXY names for `base_url`, unless NO_PROXY has its host (names with their subdomains,
    `host:port`, or `*`); lower case wins, as for other programs. Raises ValueError, which names the variable."""
    parts = urlsplit(base_url)
    host = (parts.hostname or "").rstrip(".")
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    if _spared(environ.get("no_proxy") or environ.get("NO_PROXY") or "", host, port):
        return None
    for name in (f"{parts.scheme}_proxy", f"{parts.scheme.upper()}_PROXY"):
        value = environ.get(name, "").strip()
        if value:
            try:
                return parse(value if "://" in value else f"http://{value}")
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    return None


def _spared(no_proxy: str, host: str, port: int) -> bool:
    for entry in no_proxy.lower().replace(",", " ").split():
        name, _, only = entry.rpartition(":") if re.fullmatch(r"[^:]+:[0-9]+|\[.+\]:[0-9]+", entry) else (entry, "", "")
        name = name.strip("[]").removeprefix("*.").lstrip(".")
        if entry == "*" or ((host == name or host.endswith(f".{name}")) and only in ("", str(port))):
            return True
    return False
