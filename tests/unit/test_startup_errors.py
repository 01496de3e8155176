"""What whoever starts the gateway can get wrong in an address or a key: named with its fix, and never repeated."""

from __future__ import annotations

from pathlib import Path

import pytest

from config.providers import Provider
from config.settings import (
    METRICS_LISTEN_ENV,
    ConfigError,
    Settings,
    load,
    read_secrets,
    with_metrics_listen,
)
from gateway.openai_models import offered_routes
from storage.database import DatabaseUrlError, dsn

BAD_DATABASE_URLS = [
    "postgresql://user:hun/ter2@host:5432/db",
    "postgresql://user:123/hunter2@host/db",
    "postgresql://user:hun#ter2@host/db",
    "postgresql://user:hun?ter2@host/db",
    "postgresql://user:12?hunter2@host/db",
    "postgresql://user:p@hunter2@host/db",
    "postgresql://user:p@hunter2/x@host/db",
    "postgresql://user:hunter2@host:port/db",
    "postgresql://user:hunter2@host:0/db",
    "postgresql://user:hunter2@host:65536/db",
    "postgresql://user:hunter2@host:-1/db",
    "postgresql://user:hunter2@host:5432:5433/db",
    "postgresql://user:hunter2@[::1/db",
    "postgresql://user:hunter2@ho st/db",
    "postgresql://user:hunter2@hö\u2100st/db",
    "postgresql://user:hunter2@host,other:x/db",
    "host=localhost password=hunter2",
]


@pytest.mark.parametrize("url", BAD_DATABASE_URLS)
def test_a_database_url_that_cannot_be_read_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(DatabaseUrlError) as caught:
        dsn(url)
    message = str(caught.value)
    assert message.startswith("DATABASE_URL: ")
    assert "ter2" not in message
    assert "hun" not in message


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user:p%2F%23%3F%40%25@host:5432/db",
        "postgresql://user@/db?host=/run/postgres",
        "postgresql://user:a:b@host,other:5433/db?sslmode=require",
        "postgresql://user@[::1]:5432/db",
        "postgresql://%2Frun%2Fpostgres/db",
        "postgresql://x@host/db?application_name=a@b",
        "postgresql:///db",
    ],
)
def test_a_database_url_that_can_be_read_stays_as_it_is(url: str) -> None:
    assert dsn(url) == url


def written(folder: Path, text: str) -> Path:
    path = folder / "tollgate.toml"
    path.write_text(text)
    return path


BAD_BASE_URLS = [
    "https://host:99999/v1",
    "https://host:0/v1",
    "https://host:x/v1",
    "https://ho st/v1",
    "https://host/v 1",
    "https://host/v1?api-version=secret",
    "https://host/v1#secret",
    "https://user:secret@host/v1",
    "https://host\\n/v1",
    "https://[::1/v1",
    "https://höst/v1",
    "https:///v1",
    "host/v1",
]


@pytest.mark.parametrize("url", BAD_BASE_URLS)
def test_a_providers_address_that_cannot_be_used_is_refused_at_the_start(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(written(tmp_path, f'[providers.p]\nkind = "openai"\nbase_url = "{url}"\n'))
    assert "providers.p.base_url" in str(caught.value)
    assert "https://" in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "https://host",
        "https://host:8443/v1/",
        "https://[2001:db8::1]:443/v1",
        "http://[::1]:1",
        "http://127.0.0.1:65535",
    ],
)
def test_a_providers_usable_address_is_taken(tmp_path: Path, url: str) -> None:
    settings = load(written(tmp_path, f'[providers.p]\nkind = "openai"\nbase_url = "{url}"\n'))
    assert settings.providers["p"].base_url == url


@pytest.mark.parametrize("listen", ["", "9464", "host:", "host:x", "host:0", "host:65536", "a b:1", "::1:9464", "h:1 "])
def test_a_metrics_address_that_cannot_be_read_is_refused_at_the_start(tmp_path: Path, listen: str) -> None:
    with pytest.raises(ConfigError, match=r"server\.metrics_listen: .* host:port"):
        load(written(tmp_path, f'[server]\nmetrics_listen = "{listen}"\n'))


@pytest.mark.parametrize("listen", ["127.0.0.1:9464", ":9464", "[::]:9464", "metrics.internal:1"])
def test_a_metrics_address_is_taken(tmp_path: Path, listen: str) -> None:
    assert load(written(tmp_path, f'[server]\nmetrics_listen = "{listen}"\n')).server.metrics_listen == listen


def test_the_environments_metrics_address_wins_over_the_files() -> None:
    settings = Settings()
    assert with_metrics_listen(settings, {}) is settings
    assert with_metrics_listen(settings, {METRICS_LISTEN_ENV: ":1"}).server.metrics_listen == ":1"
    with pytest.raises(ConfigError, match=f"{METRICS_LISTEN_ENV}: .* host:port"):
        with_metrics_listen(settings, {METRICS_LISTEN_ENV: "9464"})


KEYED = Settings(providers={"p": Provider(kind="openai", base_url="https://host/v1", api_key_env="THE_KEY")})


@pytest.mark.parametrize("around", ["{}\n", "{}\r\n", " {} ", "\t{}"])
def test_white_space_around_a_providers_key_is_not_part_of_it(around: str) -> None:
    assert read_secrets(KEYED, {"THE_KEY": around.format("sk-secret")}).provider_keys == {"p": "sk-secret"}


@pytest.mark.parametrize("key", ["sk-\nsecret", "sk-secret\0", "sk-\x7fsecret", "sk-secrét", "sk-\udc80secret"])
def test_a_providers_key_that_no_header_can_carry_is_refused_by_its_variable(key: str) -> None:
    with pytest.raises(ConfigError, match="THE_KEY") as caught:
        read_secrets(KEYED, {"THE_KEY": key})
    assert "sec" not in str(caught.value)


@pytest.mark.parametrize("key", ["", "\n", "  "])
def test_a_blank_providers_key_is_none(key: str) -> None:
    with pytest.raises(ConfigError, match="has no THE_KEY"):
        read_secrets(KEYED, {"THE_KEY": key})


async def test_nothing_is_asked_for_without_a_key() -> None:
    assert await offered_routes(KEYED, read_secrets(KEYED, {"THE_KEY": "sk-x"})) == {}
