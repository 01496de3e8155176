"""Mistakes in what routes and their providers say: one line with the key as it stands in the file, and the fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from config.settings import ConfigError, Settings, load

BASE = """
[providers.one]
kind = "generic"
base_url = "http://127.0.0.1:9001/v1"
#one
[providers.two]
kind = "generic"
base_url = "http://127.0.0.1:9002/v1"
[routes.r]
candidates = [{ provider = "one", model = "m"#candidate }, { provider = "two", model = "m" }]
#route
"""


def parsed(tmp_path: Path, place: str, text: str) -> Settings:
    path = tmp_path / "tollgate.toml"
    file = BASE.replace(place, text) if place else f"{BASE}{text}"
    path.write_text(file.replace("#candidate", ""))
    return load(path)


def mistake(tmp_path: Path, place: str, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parsed(tmp_path, place, text)
    return str(caught.value).removeprefix(f"{tmp_path / 'tollgate.toml'}: ")


TYPES = [
    ("#route", 'stratgy = "weighted"', "routes.r: table contains unknown field `stratgy`. Did you mean `strategy`?"),
    (
        "#route",
        'strategy = "random"',
        "routes.r.strategy: invalid enum value 'random'. "
        "Use one of ordered, weighted, least_latency, cheapest, least_busy.",
    ),
    ("#route", 'fall_back_on = ["429"]', "routes.r.fall_back_on[0]: invalid enum value '429'. Use one of context_"),
    ("#route", 'fall_back_on = "context_length"', "routes.r.fall_back_on: expected `list`, got `str`."),
    ("#route", "retry = 3", "routes.r.retry: expected `table`, got `int`."),
    ("#route", "retry = { retry = 3 }", "routes.r.retry: table contains unknown field `retry`. Did you mean `retries`"),
    ("#route", "hedge = true", "routes.r.hedge: expected `table`, got `bool`."),
    ("#route", 'continuation = "yes"', "routes.r.continuation: expected `bool`, got `str`."),
    ("#candidate", ', weight = "2"', "routes.r.candidates[0].weight: expected `float`, got `str`."),
    ("#candidate", ", wieght = 2", "routes.r.candidates[0]: table contains unknown field `wieght`. Did you mean `wei"),
    ("#candidate", ', features = ["vision"]', "routes.r.candidates[0].features[0]: invalid enum value 'vision'. Use "),
    (', model = "m"#candidate', "", "routes.r.candidates[0]: table missing required field `model`."),
    ("#one", "limits = { rpm = 5 }", "providers.one.limits: table contains unknown field `rpm`. It knows concurrent, "),
    ("#one", 'continuation = "prefil"', "providers.one.continuation: invalid enum value 'prefil'. Use one of prefill"),
    ("#one", "probe = true", "providers.one.probe: expected `table`, got `bool`."),
    ("#one", 'models = { m = { concurrent = "1" } }', "providers.one.models.m.concurrent: expected `int`, got `str`."),
    ("#one", "options = { region = 1 }", "providers.one.options.region: expected `str`, got `int`."),
    ("", "[breakers]\nopen_ms = 1", "the file: table contains unknown field `breakers`. Did you mean `breaker`?"),
    (
        "",
        '[routes.gpt-4.1]\ncandidates = [{ provider = "one", model = "m" }]',
        'routes.gpt-4: table contains unknown field `1`. A name with a dot is written in quotes, [routes."gpt-4.1"]',
    ),
]


@pytest.mark.parametrize(("place", "text", "said"), TYPES, ids=[row[1] for row in TYPES])
def test_a_wrong_name_or_type_is_told_by_its_entry_with_what_would_be_right(
    tmp_path: Path, place: str, text: str, said: str
) -> None:
    assert mistake(tmp_path, place, text).startswith(said)


VALUES = [
    ("#candidate", ", weight = -1", "routes.r.candidates[0].weight: -1.0 is not from 0 to "),
    ("#candidate", ", weight = nan", "routes.r.candidates[0].weight: nan is not from 0 to "),
    ("#candidate", ", context_tokens = 0", "routes.r.candidates[0].context_tokens: 0 is below 1."),
    ("#candidate", ' }, { provider = "one", model = "m"', "routes.r.candidates[1]: 'm' at 'one' is candidates[0] alr"),
    ('"m"#candidate', '""', "routes.r.candidates[0].model: not 1-512 printable characters"),
    ('"m"#candidate', r'"a\nb"', "routes.r.candidates[0].model: not 1-512 printable characters"),
    ("#route", "retry = { attempts_max = 0 }", "routes.r.retry.attempts_max: 0 is below 1."),
    ("#route", "retry = { retries = -1 }", "routes.r.retry.retries: -1 is below 0."),
    ("#route", "hedge = { percentile = 101 }", "routes.r.hedge.percentile: 101 is above 100."),
    ("#one", "limits = { concurrent = 0 }", "providers.one.limits.concurrent: 0 is below 1."),
    ("#one", "models = { m = { concurrent = 0 } }", 'providers.one.models."m".concurrent: 0 is below 1.'),
    ("#one", "models = { other = { concurrent = 1 } }", 'providers.one.models."other": no route has a candidate'),
    ("#one", "queue = { wait_ms = -1 }", "providers.one.queue.wait_ms: -1 is below 0."),
    ("#one", "probe = { every_ms = 0 }", "providers.one.probe.every_ms: 0 is below 100."),
    ("#one", 'tags = ["no training"]', "providers.one.tags: 'no training' is not 1-64 letters, digits, - or _."),
    ("", "[breaker]\nerror_percent = 150", "breaker.error_percent: 150 is above 100."),
]


@pytest.mark.parametrize(("place", "text", "said"), VALUES, ids=[row[1] for row in VALUES])
def test_a_value_that_cannot_be_meant_stops_the_start(tmp_path: Path, place: str, text: str, said: str) -> None:
    assert mistake(tmp_path, place, text).startswith(said)


@pytest.mark.parametrize("name", ["a/b", "a b", "", "ä", "a,b", "a" * 65, "-a"])
def test_a_provider_that_preferences_could_not_name_is_refused(tmp_path: Path, name: str) -> None:
    said = mistake(tmp_path, "", f'[providers."{name}"]\nkind = "openai"')
    assert said.startswith((f'providers."{name}": ', f"providers.{name}: "))
    assert "without a slash" in said


def test_a_model_may_have_slashes_and_a_provider_dots_and_colons(tmp_path: Path) -> None:
    line = '[providers."vllm.local:8000"]\nkind = "vllm"\nmodels = { "Qwen/Qwen3-8B" = { concurrent = 1 } }\n'
    route = '[routes.q]\ncandidates = [{ provider = "vllm.local:8000", model = "Qwen/Qwen3-8B" }]'
    assert parsed(tmp_path, "", line + route).routes["q"].candidates[0].model == "Qwen/Qwen3-8B"


def test_openais_own_list_is_not_known_yet_when_the_file_is_read(tmp_path: Path) -> None:
    line = '[providers.openai]\nkind = "openai"\nmodels = { "gpt-4o" = { concurrent = 1 } }\n'
    assert parsed(tmp_path, "", line).providers["openai"].models["gpt-4o"].concurrent == 1
