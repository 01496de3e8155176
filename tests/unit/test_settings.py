"""Configuration: what is accepted, and that what is not names the key and the fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from config.settings import SHIPPED, ConfigError, Settings, data_dir, find, load, read_secrets

BASE = """
[providers.mock]
kind = "openai"
base_url = "http://127.0.0.1:9137/v1"

[routes.gpt-4o-mini]
candidates = [{ provider = "mock", model = "gpt-4o-mini" }]

[prices.gpt-4o-mini]
input = "0.15"
output = "0.60"
"""


def parsed(tmp_path: Path, text: str) -> Settings:
    path = tmp_path / "tollgate.toml"
    path.write_text(text)
    return load(path)


def test_the_contracts_example_loads(tmp_path: Path) -> None:
    settings = parsed(tmp_path, BASE)
    assert settings.routes["gpt-4o-mini"].candidates[0].provider == "mock"


def test_the_shipped_default_loads() -> None:
    assert load(SHIPPED).embedded.simulate == "mock"


BAD = [
    ('[server]\nport = "x"', "server.port", "expected"),
    ("[server]\nprot = 1", "server", "prot"),
    ("[bounds]\nbody_bytes_max = 0", "bounds.body_bytes_max", "below 1"),
    ("[redis]\nreplicas = -1", "redis.replicas", "below 0"),
    ("[redis]\nreplicas = 1\ncall_ms = 250", "redis.call_ms", "500 or more"),
    ("[bounds]\nbodies_bytes_max = 1000000", "bounds.bodies_bytes_max", "smaller than bounds.body_bytes_max"),
    ("[metering]\nfence_margin_ms = 15000", "metering.fence_margin_ms", "smaller than"),
    ('[providers.x]\nkind = "nope"\nbase_url = "https://x"', "providers.x.kind", "nope"),
    ('[providers.x]\nkind = "openai"\nbase_url = "ftp://x"', "providers.x.base_url", "http"),
    ('[providers.x]\nkind = "openai"\nbase_url = "http://example.com/v1"', "providers.x.base_url", "insecure = true"),
    ('[routes.a]\ncandidates = [{ provider = "nobody", model = "m" }]', "routes.a.candidates", "[providers.nobody]"),
    ("[routes.a]\ncandidates = []", "routes.a.candidates", "at least one"),
    ('[embedded]\nsimulate = "nobody"', "embedded.simulate", "[providers.nobody]"),
    ("[server", "not valid TOML", ""),
]


@pytest.mark.parametrize(("text", "key", "hint"), BAD, ids=[row[1] for row in BAD])
def test_mistakes_name_the_key_and_the_fix(tmp_path: Path, text: str, key: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(tmp_path, text)
    assert key in str(caught.value)
    assert hint in str(caught.value)


def test_a_missing_file_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="TOLLGATE_CONFIG"):
        load(tmp_path / "none.toml")


def test_external_stores_need_the_shared_secret(tmp_path: Path) -> None:
    settings = parsed(tmp_path, BASE)
    with pytest.raises(ConfigError, match="TOLLGATE_SECRET"):
        read_secrets(settings, {"REDIS_URL": "redis://x"})
    with pytest.raises(ConfigError, match="too short"):
        read_secrets(settings, {"TOLLGATE_SECRET": "short"})


def test_a_named_provider_key_must_be_set(tmp_path: Path) -> None:
    settings = parsed(tmp_path, BASE.replace('/v1"', '/v1"\napi_key_env = "THE_KEY"'))
    with pytest.raises(ConfigError, match="THE_KEY"):
        read_secrets(settings, {})
    secrets = read_secrets(settings, {"THE_KEY": "sk-secret"})
    assert secrets.provider_keys == {"mock": "sk-secret"}
    assert "sk-secret" not in repr(secrets)


def test_the_environment_names_file_and_folder(tmp_path: Path) -> None:
    assert find({"TOLLGATE_CONFIG": "/x/y.toml"}) == Path("/x/y.toml")
    assert data_dir({"TOLLGATE_DATA_DIR": str(tmp_path)}) == tmp_path
