"""Prices: where they come from, in which order, to which integers, and what is refused at the start."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec
import pytest
from genai_prices.types import ModelPrice
from hypothesis import given
from hypothesis import strategies as st

from config.catalog import Catalog, PricedCandidate, _from_genai, compile_catalog, priced_models, read, write
from config.price import CompiledPrice
from config.routing import Candidate, Route
from config.settings import SHIPPED, ConfigError, Settings, load

AT = datetime(2026, 11, 1, 12, tzinfo=UTC)
URL = "https://api.example.com/v1"


def configured(**tables: Any) -> Settings:
    raw = {
        "providers": {"openai": {"kind": "openai", "base_url": URL}},
        "routes": {"fast": {"candidates": [{"provider": "openai", "model": "gpt-4o-mini"}]}},
        **tables,
    }
    return msgspec.convert(raw, Settings)


def first(settings: Settings, route: str = "fast") -> PricedCandidate:
    return compile_catalog(settings, at=AT).routes[route].candidates[0]


def refusal(settings: Settings) -> str:
    with pytest.raises(ConfigError) as caught:
        compile_catalog(settings, at=AT)
    return str(caught.value)


def price(text_in: str, text_out: str, **more: Any) -> dict[str, Any]:
    return {"input": text_in, "output": text_out, **more}


def test_the_shipped_configuration_compiles() -> None:
    catalog = compile_catalog(load(SHIPPED), at=AT)
    found = catalog.routes["gpt-4o-mini"].candidates[0]
    assert (found.price.input, found.price.cached_input, found.price.output) == (150_000, 75_000, 600_000)
    assert found.source == "prices.gpt-4o-mini"
    assert catalog.routes["gpt-4o-mini"].max_output_tokens == 16384


def test_a_candidates_own_price_beats_the_routes_and_both_beat_the_list() -> None:
    listed = first(configured())
    assert (listed.source, listed.price.input) == ("genai-prices:openai", 150_000)
    by_route = first(configured(prices={"fast": price("1", "2")}))
    assert (by_route.source, by_route.price.input) == ("prices.fast", 1_000_000)
    own = first(configured(prices={"fast": price("1", "2"), "openai/gpt-4o-mini": price("3", "4")}))
    assert (own.source, own.price.input) == ('prices."openai/gpt-4o-mini"', 3_000_000)


def test_missing_classes_take_their_parents_price() -> None:
    found = first(configured(prices={"fast": price("1", "2")})).price
    assert (found.cached_input, found.cache_write, found.audio_input) == (1_000_000,) * 3
    assert (found.reasoning, found.audio_output, found.image_output) == (2_000_000,) * 3
    assert (found.image, found.second, found.character, found.request, found.tiers) == (0, 0, 0, 0, ())


def test_an_hour_in_the_cache_costs_what_anthropic_would_ask_unless_it_has_a_price() -> None:
    def hour(**more: str) -> int:
        return first(configured(prices={"fast": price("1", "2", **more)})).price.cache_write_1h

    assert hour() == 2_000_000
    assert hour(cache_write="1.25") == 2_000_000
    assert hour(cache_write="0.7") == 1_120_000
    assert hour(cache_write="1.25", cache_write_1h="3") == 3_000_000
    tiers = [{"above": 1000, **price("2", "4")}]
    (tier,) = first(configured(prices={"fast": price("1", "2", cache_write_1h="0", tiers=tiers)})).price.tiers
    assert tier.cache_write_1h == 4_000_000


def test_listed_prices_of_an_hour_in_the_cache_and_of_images_are_taken_over() -> None:
    def listed(kind: str, model: str) -> CompiledPrice:
        providers = {"one": {"kind": kind, "base_url": URL}}
        routes = {"r": {"candidates": [{"provider": "one", "model": model}]}}
        return first(configured(providers=providers, routes=routes), "r").price

    claude = listed("anthropic", "claude-opus-4-5")
    assert (claude.input, claude.cache_write, claude.cache_write_1h) == (5_000_000, 6_250_000, 10_000_000)
    drawing = listed("gemini", "gemini-2.5-flash-image")
    assert (drawing.output, drawing.image_output) == (2_500_000, 30_000_000)


def test_units_and_tiers_compile() -> None:
    tiers = [{"above": 1000, **price("2", "4")}, {"above": 2000, **price("3", "5", cached_input="0.5")}]
    found = first(
        configured(prices={"fast": price("1", "2", tiers=tiers, request="0.002", image="0.04", character="0.0000001")})
    ).price
    assert (found.request, found.image, found.character) == (2000, 40_000, 1)
    assert [(tier.above, tier.input, tier.cached_input, tier.output) for tier in found.tiers] == [
        (1000, 2_000_000, 2_000_000, 4_000_000),
        (2000, 3_000_000, 500_000, 5_000_000),
    ]


def test_prices_round_up_to_whole_micros_a_million() -> None:
    found = first(configured(prices={"fast": price("0.0000001", "0.1234567")})).price
    assert (found.input, found.output) == (1, 123_457)


def test_listed_prices_are_dollars_times_credits_and_markup_and_the_cost_has_no_markup() -> None:
    found = first(configured(billing={"credits_per_usd": "100", "markup": "1.2"}))
    assert found.price.input == 150_000 * 120
    assert found.cost is not None
    assert found.cost.input == 150_000 * 100


def test_configured_prices_are_credits_already_and_take_no_markup() -> None:
    found = first(configured(billing={"markup": "3"}, prices={"fast": price("1", "2")}))
    assert found.price.input == 1_000_000


def test_the_houses_cost_may_be_configured_apart() -> None:
    found = first(configured(costs={"fast": price("0.1", "0.2")}))
    assert found.cost is not None
    assert (found.price.input, found.cost.input) == (150_000, 100_000)
    unknown = configured(
        prices={"own": price("1", "1")},
        routes={"own": {"candidates": [{"provider": "openai", "model": "my-own-model"}]}},
    )
    assert first(unknown, "own").cost is None


def test_listed_tiers_and_cache_prices_are_taken_over() -> None:
    settings = configured(routes={"big": {"candidates": [{"provider": "openai", "model": "gpt-5.6-luna"}]}})
    found = first(settings, "big").price
    assert (found.input, found.cached_input, found.cache_write, found.output) == (200_000, 20_000, 250_000, 1_200_000)
    assert [(tier.above, tier.input, tier.output) for tier in found.tiers] == [(272_000, 400_000, 1_800_000)]


def test_dated_prices_follow_the_date() -> None:
    settings = configured(routes={"big": {"candidates": [{"provider": "openai", "model": "gpt-5.6-luna"}]}})
    early = compile_catalog(settings, at=datetime(2026, 7, 1, tzinfo=UTC)).routes["big"].candidates[0]
    assert early.price.input == 1_000_000


@pytest.mark.parametrize("hour", [3, 12, 23])
def test_a_price_that_changes_with_the_hour_is_the_dearest_at_any_hour(hour: int) -> None:
    providers = {"deep": {"kind": "openai", "base_url": URL, "price_provider": "deepseek"}}
    routes = {"chat": {"candidates": [{"provider": "deep", "model": "deepseek-chat"}]}}
    catalog = compile_catalog(configured(providers=providers, routes=routes), at=AT.replace(hour=hour))
    found = catalog.routes["chat"].candidates[0].price
    assert (found.input, found.cached_input, found.output) == (270_000, 70_000, 1_100_000)


def test_another_providers_price_is_never_used() -> None:
    settings = configured(routes={"claude": {"candidates": [{"provider": "openai", "model": "claude-sonnet-4-5"}]}})
    assert refusal(settings) == (
        "routes.claude: 'claude-sonnet-4-5' of provider 'openai' has no price, and genai-prices has none for 'openai'. "
        'Add [prices."openai/claude-sonnet-4-5"] or [prices."claude"] with input and output.'
    )


def test_the_price_list_of_another_provider_can_be_named() -> None:
    providers = {"corp": {"kind": "openai", "base_url": URL, "price_provider": "anthropic"}}
    routes = {"claude": {"candidates": [{"provider": "corp", "model": "claude-sonnet-4-5"}]}}
    found = first(configured(providers=providers, routes=routes), "claude")
    assert found.source == "genai-prices:anthropic"
    assert found.price.input >= 1_000_000
    providers["corp"]["price_provider"] = "nobody"
    assert refusal(configured(providers=providers, routes=routes)).startswith(
        "providers.corp.price_provider: genai-prices has no provider 'nobody'."
    )


@pytest.mark.parametrize("model", ["text-embedding-3-small", "whisper-1", "no-such-model"])
def test_a_listed_model_without_input_and_output_prices_is_unpriced(model: str) -> None:
    settings = configured(routes={"odd": {"candidates": [{"provider": "openai", "model": model}]}})
    assert f"'{model}' of provider 'openai' has no price" in refusal(settings)


def test_zero_is_a_price_only_when_configured() -> None:
    found = first(configured(prices={"fast": price("0", "0.0")}))
    assert (found.price.input, found.price.output) == (0, 0)
    half_free = ModelPrice(input_mtok=Decimal(1), output_mtok=Decimal(0))
    assert _from_genai(half_free, Fraction(1)) is None
    free_cache = ModelPrice(input_mtok=Decimal(1), output_mtok=Decimal(2), cache_read_mtok=Decimal(0))
    listed = _from_genai(free_cache, Fraction(1))
    assert listed is not None
    assert listed.cached_input == 1_000_000


def test_a_listed_fee_for_each_request_is_taken_over() -> None:
    listed = _from_genai(
        ModelPrice(input_mtok=Decimal(1), output_mtok=Decimal(2), requests_kcount=Decimal(5)), Fraction(1)
    )
    assert listed is not None
    assert listed.request == 5000


@pytest.mark.parametrize(
    "bad", ["-1", "NaN", "Infinity", "1e3", "", " 1", "1.", ".5", "0x1", "1234567890", "0." + "1" * 13, "\u0661"]
)
def test_amounts_that_are_not_plain_decimals_are_refused_by_key(bad: str) -> None:
    assert refusal(configured(prices={"fast": price("1", bad)})).startswith(
        f'prices.fast.output: "{bad}" is not an amount'
    )
    unused = configured(prices={"openai/never-used": price("1", "1", image=bad)})
    assert refusal(unused).startswith('prices."openai/never-used".image: ')
    assert refusal(configured(billing={"markup": bad})).startswith("billing.markup: ")
    assert refusal(configured(billing={"credits_per_usd": bad})).startswith("billing.credits_per_usd: ")


def test_a_markup_of_zero_is_refused() -> None:
    assert refusal(configured(billing={"markup": "0"})) == "billing.markup: must be above 0."


@pytest.mark.parametrize("starts", [[0], [5, 5], [9, 3]])
def test_tiers_must_rise(starts: list[int]) -> None:
    tiers = [{"above": start, **price("1", "1")} for start in starts]
    assert "must rise from tier to tier" in refusal(configured(prices={"fast": price("1", "1", tiers=tiers)}))


@pytest.mark.parametrize("table", ["prices", "costs"])
@pytest.mark.parametrize("key", ["fats", "nobody/gpt-4o-mini"])
def test_a_price_for_nothing_configured_is_refused(table: str, key: str) -> None:
    assert refusal(configured(**{table: {key: price("1", "1")}})) == (
        f'{table}."{key}": neither a route nor "<provider>/<model>" of a configured provider. '
        "Correct the name, or add the route or the provider."
    )


def test_a_routes_output_limit_is_its_own_or_the_default_and_at_least_one() -> None:
    candidates = [{"provider": "openai", "model": "gpt-4o-mini"}]
    routes = {"fast": {"candidates": candidates, "max_output_tokens": 99, "hidden_reasoning": True}}
    found = compile_catalog(configured(routes=routes), at=AT).routes["fast"]
    assert (found.max_output_tokens, found.hidden_reasoning, found.rename_model) == (99, True, False)
    routes["fast"]["max_output_tokens"] = 0
    assert refusal(configured(routes=routes)) == "routes.fast.max_output_tokens: 0 is below 1."


def test_a_candidates_context_is_its_own_or_the_listed_one_and_weight_and_features_pass_through() -> None:
    def found(**more: Any) -> PricedCandidate:
        candidate = {"provider": "openai", "model": "gpt-4o-mini", **more}
        return first(configured(routes={"fast": {"candidates": [candidate]}}, prices={"fast": price("1", "2")}))

    listed = found()
    assert (listed.context_tokens, listed.weight, listed.features) == (128_000, 1.0, None)
    own = found(context_tokens=5000, weight=2.5, features=["tools"])
    assert (own.context_tokens, own.weight, own.features) == (5000, 2.5, ("tools",))
    assert found(model="my-own-model", context_tokens=7).context_tokens == 7
    assert found(model="my-own-model").context_tokens is None
    assert msgspec.json.decode(msgspec.json.encode(own), type=PricedCandidate) == own


def test_only_priced_models_of_a_provider_are_offered() -> None:
    settings = configured(
        prices={"openai/own": price("1", "1"), "o3-pro": price("1", "1")},
        routes={"o3-pro": {"candidates": [{"provider": "openai", "model": "o3-pro"}]}},
    )
    models = ["gpt-4o", "whisper-1", "own", "no-such", "o3-pro"]
    assert priced_models(settings, "openai", models, at=AT) == ["gpt-4o", "own", "o3-pro"]


def test_extra_routes_stand_beside_the_configured_ones_when_they_are_priced() -> None:
    def offered(model: str) -> Route:
        return Route(candidates=(Candidate(provider="openai", model=model),))

    extra = {"fast": offered("gpt-4o"), "gpt-4o": offered("gpt-4o"), "whisper-1": offered("whisper-1")}
    catalog = compile_catalog(configured(), extra_routes=extra, at=AT)
    assert list(catalog.routes) == ["fast", "gpt-4o"]
    assert catalog.routes["fast"].candidates[0].model == "gpt-4o-mini"


def test_the_version_names_the_content() -> None:
    one = compile_catalog(configured(), at=AT)
    assert one.version == compile_catalog(configured(), at=AT).version
    assert len(one.version) == 16
    assert one.version != compile_catalog(configured(prices={"fast": price("1", "1")}), at=AT).version


def test_a_written_catalog_reads_back_the_same(tmp_path: Path) -> None:
    catalog = compile_catalog(configured(), at=AT)
    write(catalog, tmp_path / "catalog.json")
    assert read(tmp_path / "catalog.json") == catalog
    assert [path.name for path in tmp_path.iterdir()] == ["catalog.json"]


def test_a_missing_damaged_or_altered_catalog_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "catalog.json"
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read(path)
    path.write_bytes(b'{"version":1}')
    with pytest.raises(ConfigError, match="not a price catalog"):
        read(path)
    write(compile_catalog(configured(), at=AT), path)
    path.write_bytes(path.read_bytes().replace(b'"input":150000', b'"input":150001', 1))
    with pytest.raises(ConfigError, match="altered after it was compiled"):
        read(path)


@given(whole=st.integers(0, 999_999_999), part=st.integers(0, 10**12 - 1))
def test_any_decimal_compiles_to_the_next_whole_micro(whole: int, part: int) -> None:
    exact = whole * 10**12 + part
    found = first(configured(prices={"fast": price(f"{whole}.{part:012d}", "1")})).price.input
    assert 0 <= found * 10**6 - exact < 10**6


def test_reading_a_catalog_does_not_import_genai_prices(tmp_path: Path) -> None:
    write(compile_catalog(configured(), at=AT), tmp_path / "catalog.json")
    program = (
        "import sys; from pathlib import Path; from config.catalog import read; import metering.meter; "
        "read(Path(sys.argv[1])); assert not {'genai_prices', 'sqlalchemy'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "catalog.json")]
    assert subprocess.run(command, check=False, capture_output=True, text=True).stderr == ""


def test_a_catalog_is_plain_json() -> None:
    catalog = compile_catalog(configured(), at=AT)
    assert msgspec.convert(msgspec.json.decode(msgspec.json.encode(catalog)), Catalog) == catalog
