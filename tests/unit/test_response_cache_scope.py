"""What an answer depends on beside the request: the configuration that decides what is sent, and who may answer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config import catalog, settings
from metering.ledger import AccountRef, SessionRef
from metering.pricing import TokenUsage
from providers.routing import Preferences
from proxy.candidates import build_routes
from proxy.live_session import LiveSession
from proxy.response_cache import cached_routes, keepable
from proxy.response_cache_key import answer_name, named_providers
from proxy.session import Ending
from proxy.settlement import Bill

CONFIG = """
[providers.one]
kind = "azure"
base_url = "https://one.example/openai/v1"
api_key_env = "ONE_KEY"
#one

[providers.two]
kind = "bedrock"
api_key_env = "TWO_KEY"
options = { region = "eu-west-1" }

[routes.kept]
candidates = [{ provider = "one", model = "m" }, { provider = "two", model = "anthropic.n" }]
cache = { ttl_s = 60 }
#route

[prices.kept]
input = "1"
output = "1"
"""
ADDRESS = "https://one.example/openai/v1"
KEYS = {"ONE_KEY": "k1", "TWO_KEY": "k2", "OTHER_KEY": "k3"}


def salt(folder: Path, changes: dict[str, str], keys: dict[str, str] | None = None) -> bytes:
    """That of the route, with parts of the configuration replaced."""
    text = CONFIG
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    file = folder / "tollgate.toml"
    file.write_text(text)
    found = settings.load(file)
    priced = catalog.compile_catalog(found)
    routes = build_routes(found, settings.read_secrets(found, KEYS | (keys or {})), priced, {})
    return cached_routes(found, routes, priced.version)["kept"].salt


@pytest.mark.parametrize(
    "changes",
    [
        {ADDRESS: "https://two.example/openai/v1"},
        {ADDRESS: "https://one.example:8443/openai/v1"},
        {ADDRESS: "https://one.example/deployed/v1"},
        {ADDRESS: "http://one.example/openai/v1", "#one": "insecure = true"},
        {"#one": 'options = { api_version = "preview" }'},
        {"#one": 'options = { auth = "bearer" }'},
        {"#one": 'drop_unsupported = ["seed"]'},
        {"#one": 'refuse = ["seed"]'},
        {"#one": "refuse = []"},
        {"#one": "include_usage = false"},
        {"#one": "clean_eof = true"},
        {"#one": 'limit_field = "max_tokens"'},
        {"#one": 'continuation = "prefill"'},
        {"#one": 'tags = ["eu"]'},
        {'kind = "azure"': 'kind = "generic"'},
        {'"ONE_KEY"': '"OTHER_KEY"'},
        {"eu-west-1": "us-east-1"},
        {'model = "m"': 'model = "other"'},
        {'model = "m"': 'model = "m", weight = 2.0'},
        {'model = "m"': 'model = "m", context_tokens = 1000'},
        {'model = "m"': 'model = "m", features = ["tools"]'},
        {'{ provider = "one", model = "m" }, ': ""},
        {"#route": "rename_model = true"},
        {"#route": "hidden_reasoning = true"},
        {"#route": "max_output_tokens = 77"},
        {"#route": 'strategy = "cheapest"'},
        {"#route": "continuation = true"},
        {"#route": 'fall_back_on = ["content_policy"]'},
        {"[providers.one]": "[bounds]\nmax_output_tokens_default = 99\n[providers.one]"},
        {'input = "1"': 'input = "2"'},
    ],
    ids=lambda changes: re.sub(r"\W+", "-", " ".join(changes.values()))[-60:],
)
def test_a_change_of_what_is_sent_gives_no_old_answer(tmp_path: Path, changes: dict[str, str]) -> None:
    assert salt(tmp_path, changes) != salt(tmp_path, {})


def test_how_answers_are_kept_and_what_keys_are_worth_change_no_answer(tmp_path: Path) -> None:
    assert salt(tmp_path, {"ttl_s = 60": 'ttl_s = 90, price = "0.5", wait_ms = 1'}) == salt(tmp_path, {})
    assert salt(tmp_path, {}, {"ONE_KEY": "another secret"}) == salt(tmp_path, {})
    assert b"another secret" not in salt(tmp_path, {}, {"ONE_KEY": "another secret"})


def test_a_proxys_password_is_in_no_name(tmp_path: Path) -> None:
    line = 'proxy = "http://user:%s@proxy.example:3128"'
    assert salt(tmp_path, {"#one": line % "first"}) == salt(tmp_path, {"#one": line % "second"})


NAMES = st.frozensets(st.sampled_from(["one", "two", "two/m", "three"]), max_size=3)
PREFERENCES = st.none() | st.builds(
    Preferences,
    st.none() | NAMES,
    NAMES,
    st.lists(st.sampled_from(["one", "two", "three"]), unique=True, max_size=3).map(tuple),
    NAMES,
)


@given(PREFERENCES, PREFERENCES)
def test_keys_share_an_answer_when_they_prefer_the_same_providers_and_never_otherwise(
    one: Preferences | None, two: Preferences | None
) -> None:
    names = [answer_name("a", b"s", named_providers(each), b'{"m":1}', stream=True) for each in (one, two)]
    assert (names[0] == names[1]) == (one == two)


def test_preferences_are_the_same_in_whatever_order_their_sets_were_made() -> None:
    words = [f"p{number}" for number in range(50)]
    turned = frozenset(reversed(words))
    first = Preferences(frozenset(words), frozenset(words), ("a",), frozenset(words))
    second = Preferences(turned, turned, ("a",), frozenset(words[25:] + words[:25]))
    assert named_providers(first) == named_providers(second)


def ended(ending: Ending = Ending.COMPLETED, **fields: Any) -> bool:
    """Whether an answer of 5 micros that ended so, with 9 held, is kept."""
    session = LiveSession(
        SessionRef("s", AccountRef("u", 0), "k", 1), "r", "route", True,
        held=9, hold_max=9, slice_cost=0, slice_low_cost=0, fence_ms=0, **fields,
    )  # fmt: skip
    return keepable(session, Bill(TokenUsage(3, 0, 0, 4, 0), "provider", 5, "completed", None, ending))


def test_only_a_whole_answer_of_one_provider_that_nothing_limited_is_kept() -> None:
    assert ended()
    assert not ended(limited=True)
    assert not ended(carried=TokenUsage(3, 0, 0, 2, 0))
    for ending in set(Ending) - {Ending.COMPLETED}:
        assert not ended(ending)
