"""A provider's HTTP/2 and proxy settings: what is accepted, what each mistake says, and that no password is shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from config import settings
from config.providers import Provider
from config.proxy_url import ProxyAddress, configured, parse
from config.settings import ConfigError, read_secrets
from proxy.httpx_upstreams import open_pools
from proxy.transport import TransportLimits

PASSWORD = "s3cret-word"
HTTPS, HTTP = "https://llm.example/v1", "http://127.0.0.1:9/v1"


def loaded(tmp_path: Path, keys: str, base_url: str = HTTPS) -> settings.Settings:
    path = tmp_path / "tollgate.toml"
    path.write_text(f'[providers.p]\nkind = "openai"\nbase_url = "{base_url}"\n{keys}\n')
    return settings.load(path)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://proxy.local:3128", ProxyAddress("proxy.local", 3128)),
        ("http://10.0.0.1:80/", ProxyAddress("10.0.0.1", 80)),
        ("http://[::1]:3128", ProxyAddress("::1", 3128)),
        ("http://me:p%3Aw%40%C3%A9@proxy:1", ProxyAddress("proxy", 1, "me:p:w@é".encode())),
        ("http://me@proxy:1", ProxyAddress("proxy", 1, b"me:")),
        ("http://me:a:b@proxy:1", ProxyAddress("proxy", 1, b"me:a:b")),
    ],
)
def test_a_proxys_url_is_read(url: str, address: ProxyAddress) -> None:
    assert parse(url) == address


@pytest.mark.parametrize(
    "url",
    [
        "",
        "proxy:3128",
        "https://proxy:3128",
        "socks5://proxy:1",
        "http://proxy",
        "http://proxy:0",
        "http://proxy:65536",
        "http://proxy:1/path",
        "http://proxy:1?x",
        "http://a b:1",
        f"http://u:{PASSWORD}@:1",
        f"http://u:{PASSWORD}@h:1#",
    ],
)
def test_what_is_no_proxys_url_is_refused_without_repeating_it(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError, match=r"providers\.p\.proxy: .*http://user:password@host:port") as caught:
        loaded(tmp_path, f'proxy = "{url}"')
    assert PASSWORD not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "base_url", "key"),
    [
        ('proxy = "http://h:1"\nproxy_env = true', HTTPS, "providers.p.proxy: not together with proxy_env"),
        ('proxy_url_env = "X"\nproxy_env = true', HTTPS, "providers.p.proxy_url_env: not together with proxy_env"),
        ('http2 = true\nproxy = "http://h:1"', HTTP, "providers.p.http2: plain http through a proxy"),
        ("http2 = 1", HTTPS, "http2: expected `bool`, got `int`"),
    ],
)
def test_what_does_not_go_together_names_the_key(tmp_path: Path, keys: str, base_url: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, keys, base_url)
    assert key in str(caught.value)


def test_the_proxy_may_come_from_a_variable_of_its_own(tmp_path: Path) -> None:
    config = loaded(tmp_path, 'proxy_url_env = "MY_PROXY"')
    secrets = read_secrets(config, {"MY_PROXY": f" http://u:{PASSWORD}@h:8\n", "HTTPS_PROXY": "http://other:1"})
    assert secrets.proxies == {"p": ProxyAddress("h", 8, f"u:{PASSWORD}".encode())}
    with pytest.raises(ConfigError, match=r"providers\.p\.proxy_url_env: the environment has no MY_PROXY"):
        read_secrets(config, {})
    with pytest.raises(ConfigError, match=r"providers\.p\.proxy_url_env") as caught:
        read_secrets(config, {"MY_PROXY": f"u:{PASSWORD}@h"})
    assert PASSWORD not in str(caught.value)


def test_no_password_is_shown(tmp_path: Path) -> None:
    config = loaded(tmp_path, f'proxy = "http://u:{PASSWORD}@h:8"')
    secrets = read_secrets(config, {})
    assert PASSWORD not in f"{config!r} {config} {secrets!r} {secrets.proxies!r}"


ENVIRONMENT = {"HTTPS_PROXY": "http://secure:1", "HTTP_PROXY": "http://plain:2"}


@pytest.mark.parametrize(
    ("base_url", "environ", "host"),
    [
        (HTTPS, ENVIRONMENT, "secure"),
        (HTTP, ENVIRONMENT, "plain"),
        (HTTPS, {"HTTPS_PROXY": "bare:1"}, "bare"),
        (HTTPS, {**ENVIRONMENT, "https_proxy": "http://lower:1"}, "lower"),
        (HTTPS, {"HTTP_PROXY": "http://plain:2"}, None),
        (HTTPS, {}, None),
        (HTTPS, {**ENVIRONMENT, "NO_PROXY": "*"}, None),
        (HTTPS, {**ENVIRONMENT, "NO_PROXY": "localhost, example"}, None),
        (HTTPS, {**ENVIRONMENT, "NO_PROXY": ".LLM.example"}, None),
        (HTTPS, {**ENVIRONMENT, "no_proxy": "llm.example:443"}, None),
        (HTTPS, {**ENVIRONMENT, "no_proxy": "llm.example:8443"}, "secure"),
        (HTTPS, {**ENVIRONMENT, "NO_PROXY": "m.example,other"}, "secure"),
        ("http://[::1]:9/v1", {**ENVIRONMENT, "NO_PROXY": "::1"}, None),
        ("http://[::1]:9/v1", {**ENVIRONMENT, "NO_PROXY": "[::1]:9"}, None),
        ("http://127.0.0.1:9/v1", {**ENVIRONMENT, "NO_PROXY": "127.0.0.1"}, None),
    ],
)
def test_the_environments_proxy_counts_when_asked_for(base_url: str, environ: dict[str, str], host: str | None) -> None:
    found = configured(Provider(kind="openai", base_url=base_url, proxy_env=True), environ)
    assert (found.host if found else None) == host
    assert configured(Provider(kind="openai", base_url=base_url), environ) is None


def test_a_wrong_variable_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"providers\.p\.proxy_env: HTTPS_PROXY: not the URL of a proxy"):
        read_secrets(loaded(tmp_path, "proxy_env = true"), {"HTTPS_PROXY": "socks5://h:1"})


@pytest.mark.parametrize(
    ("keys", "environ", "own"),
    [
        ("", ENVIRONMENT, False),
        ("http2 = true", {}, True),
        ('proxy = "http://h:1"', {}, True),
        ("proxy_env = true", ENVIRONMENT, True),
        ("proxy_env = true", {}, False),
    ],
)
def test_only_providers_that_need_it_leave_our_own_transport(
    tmp_path: Path, keys: str, environ: dict[str, str], own: bool
) -> None:
    config = loaded(tmp_path, keys)
    secrets = read_secrets(config, environ)
    assert set(open_pools(config, secrets, {}, TransportLimits())) == ({"p"} if own else set())
    assert open_pools(config, secrets, {"p": "http://127.0.0.1:1/v1"}, TransportLimits()) == {}
