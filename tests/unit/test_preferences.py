"""What accounts, keys and requests say about providers: its form and bounds, and that nobody widens what is allowed."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accounts.key_store import KeyRecord, decode_record, encode_record
from accounts.keys import KeysUnavailable
from accounts.preferences import NAMES_MAX, RoutingPreferences, changed, checked, from_text, narrowed, to_text
from providers.breaker import Breaker, BreakerPolicy
from providers.latency import PeakEwma
from providers.routing import Facts, Live, Preferences, Target, removal
from proxy.errors import InvalidValue
from proxy.route_hint import HEADER_BYTES_MAX, combined, read_hint

OFFERED, MODELS, TAGS = ("openai", "azure", "groq"), ("gpt-4o", "meta/llama"), ("eu", "no-training")
NAMES = OFFERED + tuple(f"{provider}/{model}" for provider in OFFERED for model in MODELS)
LIVE = Live(Breaker(BreakerPolicy(), lambda: 0.0), PeakEwma(10), PeakEwma(10))
TARGETS = [
    Target(provider, model, tags=frozenset(tags))
    for provider in OFFERED
    for model in MODELS
    for tags in ((), TAGS[:1], TAGS)
]

names = st.lists(st.sampled_from(NAMES), max_size=4, unique=True).map(tuple)
preferences = st.builds(
    RoutingPreferences,
    allowed=st.none() | names,
    excluded=names,
    preferred=names,
    tags=st.lists(st.sampled_from(TAGS), max_size=2, unique=True).map(tuple),
)
anyone = st.none() | preferences


def passes(said: Preferences | None) -> set[int]:
    """The targets that may answer."""
    facts = Facts(0.0, [LIVE], preferences=said)
    return {index for index, target in enumerate(TARGETS) if removal(target, LIVE, facts) is None}


def header(said: RoutingPreferences) -> bytes:
    """The same as a client writes it; an empty list cannot be written."""
    parts = {"providers": said.allowed or (), "exclude": said.excluded, "prefer": said.preferred, "tags": said.tags}
    return "; ".join(f"{word}={', '.join(names)}" for word, names in parts.items() if names).encode()


@given(anyone, preferences)
def test_a_request_never_widens_what_its_key_allows(own: RoutingPreferences | None, asked: RoutingPreferences) -> None:
    hint = read_hint([header(asked)])
    both = combined(own, hint)
    assert passes(both) == passes(combined(own, None)) & passes(hint)


@given(anyone, anyone)
def test_a_key_never_widens_what_its_account_allows(
    account: RoutingPreferences | None, key: RoutingPreferences | None
) -> None:
    both = narrowed(account, key)
    assert passes(combined(both, None)) == passes(combined(account, None)) & passes(combined(key, None))


@given(preferences, preferences)
def test_keys_narrow_accounts_as_routing_narrows_by_hints(account: RoutingPreferences, key: RoutingPreferences) -> None:
    ours, own, hint = combined(narrowed(account, key), None), combined(account, None), combined(key, None)
    assert ours is not None
    assert own is not None
    assert hint is not None
    routing = own.narrowed(hint)
    assert (ours.allowed, ours.excluded, ours.tags) == (routing.allowed, routing.excluded, routing.tags)
    assert ours.preferred == tuple(dict.fromkeys(routing.preferred)), "the key's order goes first"


@given(anyone)
def test_preferences_survive_both_stores(said: RoutingPreferences | None) -> None:
    record = KeyRecord(id="k", mac=b"m", pepper="p", account="a", shard=1, name="n", routing=said)
    assert decode_record(encode_record(record)).routing == said
    assert from_text(to_text(said)) == said


def test_a_record_without_the_field_says_nothing_and_none_is_not_written() -> None:
    record = KeyRecord(id="k", mac=b"m", pepper="p", account="a", shard=1, name="n")
    assert b"routing" not in encode_record(record)
    assert decode_record(encode_record(record)).routing is None


def test_what_cannot_be_read_is_neither_yes_nor_no() -> None:
    for damaged in ("", "{", '{"allowed":"openai"}', "[]", "null"):
        with pytest.raises(KeysUnavailable):
            from_text(damaged)


def test_a_change_replaces_the_lists_it_names_and_an_empty_one_takes_its_list_away() -> None:
    first = changed(None, {"allowed": ["openai", "groq", "openai"], "tags": ["eu"]})
    assert first == RoutingPreferences(allowed=("openai", "groq"), tags=("eu",))
    assert changed(first, {"tags": []}) == RoutingPreferences(allowed=("openai", "groq"))
    assert changed(first, {"allowed": []}) == RoutingPreferences(tags=("eu",)), "no list allows all"
    assert changed(first, {"allowed": [], "tags": []}) is None
    assert changed(first, {"excluded": ["azure"]}, clear=True) == RoutingPreferences(excluded=("azure",))
    assert changed(first, {}, clear=True) is None


@pytest.mark.parametrize("name", ["openai", "a/b/c:d@e+f.g_h", "@cf/meta/llama-3", "x" * 128])
def test_a_provider_or_a_model_of_one_is_a_name(name: str) -> None:
    assert checked("allowed", [name]) == (name,)


@pytest.mark.parametrize("name", ["", "x" * 129, "a b", "/gpt-4o", "openai/", "a,b", "a;b", "é", "a\n", "a\0", "*"])
def test_anything_else_is_no_name(name: str) -> None:
    with pytest.raises(ValueError, match="not a provider"):
        checked("excluded", [name])


@pytest.mark.parametrize("tag", ["", "-eu", "a.b", "e u", "x" * 65, "eu/de"])
def test_a_tag_has_the_form_of_the_configuration_s(tag: str) -> None:
    with pytest.raises(ValueError, match="not a tag"):
        checked("tags", [tag])


def test_a_list_is_bounded_and_the_largest_preferences_fit_into_postgres() -> None:
    most = [f"{'x' * 125}{number:03d}" for number in range(NAMES_MAX)]
    tags = [f"{'x' * 61}{number:03d}" for number in range(NAMES_MAX)]
    with pytest.raises(ValueError, match=f"at most {NAMES_MAX}"):
        checked("preferred", [*most, "one-more"])
    said = changed(None, {"allowed": most, "excluded": most, "preferred": most, "tags": tags})
    text = to_text(said)
    assert text is not None
    assert len(text.encode()) <= 32_768


@pytest.mark.parametrize("sent", [[], [b""], [b"  "]])
def test_no_header_and_an_empty_one_say_nothing(sent: list[bytes]) -> None:
    assert read_hint(sent) is None
    assert combined(None, read_hint(sent)) is None


def test_a_header_says_four_lists_in_any_order() -> None:
    said = Preferences(frozenset({"a", "b/c"}), frozenset({"d"}), ("f", "e"), frozenset({"eu", "x-1"}))
    assert read_hint([b"providers=a,b/c; exclude=d; prefer=f,e; tags=eu,x-1"]) == said
    assert read_hint([b" tags = x-1 , eu;prefer=f, e ;exclude=d;providers=b/c,a "]) == said


def test_names_alone_are_tried_first() -> None:
    assert read_hint([b"groq, openai/gpt-4o"]) == Preferences(preferred=("groq", "openai/gpt-4o"))
    assert read_hint([b"exclude=azure; groq"]) == Preferences(excluded=frozenset({"azure"}), preferred=("groq",))


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        ([b"a", b"b"], "more than once"),
        ([b"provider=a"], "'provider' is not one of providers, exclude, prefer, tags"),
        ([b"x" * 40 + b"=a"], "'" + "x" * 32 + "' is not one of"),
        ([b"=a"], "'' is not one of"),
        ([b"PREFER=a"], "'PREFER' is not one of"),
        ([b"prefer=a; prefer=b"], "'prefer' is in it more than once"),
        ([b"a; prefer=b"], "'prefer' is in it more than once"),
        ([b"prefer="], "a name is missing in 'prefer'"),
        ([b"prefer=a,,b"], "a name is missing in 'prefer'"),
        ([b"exclude=a;"], "a name is missing in 'prefer'"),
        ([b"exclude=a b"], "'exclude': 'a b' is not a provider"),
        ([b"tags=a/b"], "'tags': 'a/b' is not a tag"),
        ([b"prefer=a=b"], "'prefer': 'a=b' is not a provider"),
        ([b"prefer=\xc3\xa9"], "outside ASCII"),
        ([b"prefer=" + b",".join(b"%d" % number for number in range(NAMES_MAX + 1))], "at most 64"),
        ([b"x" * (HEADER_BYTES_MAX + 1)], "longer than 1024 bytes"),
    ],
)
def test_what_does_not_follow_the_grammar_is_refused_with_the_reason(sent: list[bytes], reason: str) -> None:
    for _ in range(2):  # a remembered header is not taken for a good one
        with pytest.raises(InvalidValue) as caught:
            read_hint(sent)
        assert reason in caught.value.message
        assert caught.value.param == "x-tollgate-route"


@given(st.binary(max_size=HEADER_BYTES_MAX + 10))
def test_any_bytes_are_read_or_refused(value: bytes) -> None:
    try:
        hint = read_hint([value])
    except InvalidValue as error:
        msgspec.json.encode(error.message)
    else:
        assert hint is None or isinstance(hint, Preferences)


def test_a_remembered_header_and_combination_are_the_same_objects() -> None:
    own, value = RoutingPreferences(excluded=("azure",)), b"groq; exclude=openai"
    assert read_hint([value]) is read_hint([value])
    assert combined(own, read_hint([value])) is combined(own, read_hint([value]))
