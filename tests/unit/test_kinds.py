"""Kinds of providers: every row can be used, what a table says wins over its row, and mistakes name the key."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from genai_prices import data_snapshot

from config.catalog import compile_catalog
from config.kinds import FAMILIES, KINDS, check, key_style
from config.prices import Price
from config.providers import Provider
from config.routing import Candidate, Route
from config.settings import ConfigError, Secrets, Settings, load, read_secrets
from providers.bedrock_fields import FIELDS
from providers.refused import READ
from providers.registry import CODECS, wire
from proxy.candidates import build_routes

ROOT = Path(__file__).resolve().parents[2]
NEEDED: dict[str, dict[str, object]] = {
    "azure": {"base_url": "https://r.openai.azure.com"},
    "generic": {"base_url": "https://llm.example.com/v1"},
    "vertex": {"options": {"region": "europe-west4", "project": "my-project"}},
    "bedrock": {"options": {"region": "eu-central-1"}},
}
"""What a row cannot know."""


def made(kind: str, **more: object) -> Provider:
    return msgspec.convert({"kind": kind, **NEEDED.get(kind, {}), **more}, Provider)


def parsed(tmp_path: Path, text: str) -> Settings:
    path = tmp_path / "tollgate.toml"
    path.write_text(f"[providers.x]\n{text}\n")
    return load(path)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_makes_a_route_whose_codec_can_be_asked(kind: str) -> None:
    provider = made(kind)
    settings = Settings(
        providers={"x": provider},
        routes={"r": Route(candidates=(Candidate(provider="x", model="m"),))},
        prices={"r": Price(input="1", output="1")},
    )
    routes = build_routes(settings, Secrets(None, None, None, {"x": "key"}), compile_catalog(settings), {})
    (candidate,) = routes["r"].candidates
    assert candidate.upstream.kind == kind
    assert (candidate.wire, candidate.upstream.drop) == (wire(KINDS[kind].codec), frozenset(KINDS[kind].drop))
    assert f"{candidate.origin.scheme}://{candidate.origin.authority.decode()}" in provider.base_url


def test_every_kinds_codec_and_price_list_exist() -> None:
    assert {kind.codec for kind in KINDS.values()} == CODECS
    listed = {provider.id for provider in data_snapshot.get_snapshot().providers}
    assert {kind.prices for kind in KINDS.values()} - {None} <= listed


def test_a_codec_is_loaded_only_where_it_is_needed() -> None:
    code = "import sys; from providers.registry import wire; wire('openai'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert "providers.openai" in loaded
    assert not {"providers.anthropic", "providers.gemini", "providers.bedrock", "providers.chat_request"} & set(loaded)


def test_the_kinds_page_names_every_kind() -> None:
    page = (ROOT / "docs" / "providers.md").read_text()
    rows = [line.split("|")[1].strip(" `") for line in page.splitlines() if line.startswith("| `")]
    assert [row for row in rows if row in KINDS] == list(KINDS)


def test_a_known_provider_needs_its_kind_only() -> None:
    provider = made("groq")
    assert provider.base_url == "https://api.groq.com/openai/v1"
    assert (provider.api_key_env, provider.price_provider) == ("GROQ_API_KEY", "groq")
    assert (provider.include_usage, provider.clean_eof, provider.limit_field) == (True, False, None)


def test_what_the_table_says_wins_over_the_row() -> None:
    provider = made(
        "mistral",
        base_url="https://other.example.com/v1",
        include_usage=True,
        clean_eof=True,
        limit_field="max_completion_tokens",
        price_provider="openai",
        drop_unsupported=["user"],
    )
    assert (provider.include_usage, provider.clean_eof) == (True, True)
    assert (provider.limit_field, provider.price_provider) == ("max_completion_tokens", "openai")
    assert provider.drop_unsupported == ("user",)
    assert msgspec.structs.replace(provider) == provider


def test_a_kinds_key_goes_to_its_own_address_only() -> None:
    assert made("openai").api_key_env == "OPENAI_API_KEY"
    assert made("openai", base_url="https://other.example.com/v1").api_key_env is None
    assert made("openai", base_url="https://other.example.com/v1", api_key_env="MINE").api_key_env == "MINE"
    assert made("azure").api_key_env == "AZURE_OPENAI_API_KEY"  # has no address but its customers'


def test_no_key_can_be_said() -> None:
    settings = Settings(providers={"x": made("groq", api_key_env="")})
    assert read_secrets(settings, {}).provider_keys == {}
    with pytest.raises(ConfigError, match="GROQ_API_KEY"):
        read_secrets(Settings(providers={"x": made("groq")}), {})


ADDRESSES = [
    ("azure", {"base_url": "https://r.openai.azure.com/"}, "https://r.openai.azure.com/openai/v1"),
    (
        "azure",
        {"base_url": "https://r.openai.azure.com", "options": {"api_version": "2024-10-21"}},
        "https://r.openai.azure.com/openai",
    ),
    (
        "azure",
        {"base_url": "https://r.openai.azure.com", "options": {"api_version": "preview"}},
        "https://r.openai.azure.com/openai/v1",
    ),
    (
        "vertex",
        {"options": {"region": "europe-west4", "project": "p-1"}},
        "https://europe-west4-aiplatform.googleapis.com/v1/projects/p-1/locations/europe-west4/publishers/google",
    ),
    (
        "vertex",
        {"options": {"region": "global", "project": "p-1"}},
        "https://aiplatform.googleapis.com/v1/projects/p-1/locations/global/publishers/google",
    ),
    ("bedrock", {"options": {"region": "eu-central-1"}}, "https://bedrock-runtime.eu-central-1.amazonaws.com"),
]


@pytest.mark.parametrize(("kind", "table", "address"), ADDRESSES)
def test_addresses_that_options_make(kind: str, table: dict[str, object], address: str) -> None:
    assert made(kind, **table).base_url == address


@pytest.mark.parametrize("kind", ["azure", "anthropic"])
def test_auth_means_the_same_at_every_kind_that_has_it(kind: str) -> None:
    assert key_style(made(kind)) == "api-key"
    assert key_style(made(kind, options={"auth": "api-key"})) == "api-key"
    assert key_style(made(kind, options={"auth": "bearer"})) == "bearer"
    assert key_style(made("openai")) == "bearer"


def test_what_is_refused_is_the_kinds_unless_the_table_says_it() -> None:
    assert made("llamacpp").refuse == KINDS["llamacpp"].refused
    assert made("llamacpp", refuse=[]).refuse == ()
    assert made("ollama", refuse=["seed"]).refuse == ("seed",)
    everything = {name for kind in KINDS.values() if kind.codec == "openai" for name in kind.refused}
    assert set(KINDS["generic"].refused) == everything  # it may be any of them
    assert everything & READ == {"tools"}  # what the gateway itself sends is never refused whole
    assert all(row.caseless for name, row in KINDS.items() if name in ("ollama", "generic"))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("anthropic", {"version": "2023-06-01", "beta": "a-2025-01-01,b-1", "auth": "api-key", "thinking": "budget"}),
        ("azure", {"api_version": "2025-04-01-preview", "auth": "bearer"}),
        ("azure", {"api_version": "preview"}),
        *(("bedrock", {"region": "eu-central-1", "family": family}) for family in FAMILIES),
    ],
)
def test_what_options_may_be(kind: str, options: dict[str, str]) -> None:
    check(made(kind, options=options))


def test_the_families_are_those_whose_fields_are_known() -> None:
    assert tuple(FIELDS) == FAMILIES


BAD = [
    ('kind = "claude"', "providers.x.kind", "anthropic, azure, bedrock"),
    ('kind = "generic"', "providers.x.base_url", "no address of its own"),
    ('kind = "azure"', "providers.x.base_url", "no address of its own"),
    ('kind = "bedrock"', "providers.x.options.region", "base_url"),
    ('kind = "vertex"\noptions = { region = "global" }', "providers.x.options.project", "needs it"),
    ('kind = "openai"\noptions = { region = "a" }', "providers.x.options.region", "It has none"),
    ('kind = "bedrock"\noptions = { project = "a" }', "providers.x.options.project", "It knows region"),
    ('kind = "bedrock"\noptions = { region = "a.example.com/" }', "providers.x.options.region", "characters"),
    ('kind = "bedrock"\noptions = { region = "a.example.com" }', "providers.x.options.region", "characters"),
    ('kind = "bedrock"\noptions = { region = 7 }', "providers.x.options", "expected"),
    ('kind = "azure"\nbase_url = "https://r/openai"', "providers.x.options.api_version", "end in /v1"),
    ('kind = "azure"\nbase_url = "https://r"\noptions = { auth = "basic" }', "providers.x.options.auth", "bearer"),
    ('kind = "anthropic"\noptions = { auth = "x-api-key" }', "providers.x.options.auth", '"api-key" or "bearer"'),
    ('kind = "anthropic"\noptions = { thinking = "on" }', "providers.x.options.thinking", '"adaptive" or "budget"'),
    ('kind = "anthropic"\noptions = { version = "latest" }', "providers.x.options.version", "write a date"),
    ('kind = "anthropic"\noptions = { beta = "a, b" }', "providers.x.options.beta", "without blanks"),
    (
        'kind = "azure"\nbase_url = "https://r"\noptions = { api_version = "2024.10.21" }',
        "providers.x.options.api_version",
        "write a date",
    ),
    (
        'kind = "bedrock"\noptions = { region = "eu-west-1", family = "claude" }',
        "providers.x.options.family",
        "use one of anthropic, openai",
    ),
    ('kind = "bedrock"\noptions = { region = "" }', "providers.x.options.region", "empty"),
    ('kind = "openai"\nrefuse = ["messages"]', "providers.x.refuse", "in every request"),
    ('kind = "openai"\nrefuse = "n"', "providers.x.refuse", "expected"),
    ('kind = "openai"\ndrop_unsupported = ["model"]', "providers.x.drop_unsupported", "'model' is needed"),
    ('kind = "ollama"\ndrop_unsupported = ["max_tokens"]', "providers.x.drop_unsupported", "'max_tokens' is needed"),
    ('kind = "groq"\ndrop_unsupported = ["max_completion_tokens"]', "providers.x.drop_unsupported", "is needed"),
    ('kind = "anthropic"\n[embedded]\nsimulate = "x"', "embedded.simulate", "OpenAI's wire"),
]


@pytest.mark.parametrize(("text", "key", "hint"), BAD)
def test_mistakes_name_the_key_and_the_fix(tmp_path: Path, text: str, key: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(tmp_path, text)
    assert key in str(caught.value)
    assert hint in str(caught.value)


def test_a_server_of_ones_own_has_no_list_of_prices(tmp_path: Path) -> None:
    settings = parsed(tmp_path, 'kind = "ollama"\n[routes.r]\ncandidates = [{ provider = "x", model = "m" }]')
    with pytest.raises(ConfigError, match="no list of prices for the kind 'ollama'"):
        compile_catalog(settings)
