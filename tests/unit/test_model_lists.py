"""Lists of models: how they are asked for and read, and which names they speak against."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.kinds import KINDS
from providers import anthropic
from providers.codec import Upstream
from providers.model_lists import decides, has, list_request, names, proves_key, read_list


def upstream(kind: str, target: bytes = b"/v1", key: str | None = "k", **options: str) -> Upstream:
    return Upstream("p", kind, target, key, options=options, key_style=KINDS[kind].key_style)


def page(*ids: str, **more: object) -> bytes:
    return json.dumps({"object": "list", "data": [{"id": each, "object": "model"} for each in ids], **more}).encode()


ASKED = {
    "openai": (b"/v1/models", (b"authorization", b"Bearer k")),
    "openrouter": (b"/v1/models", (b"authorization", b"Bearer k")),
    "xai": (b"/v1/language-models", (b"authorization", b"Bearer k")),
    "anthropic": (b"/v1/models?limit=1000", (b"x-api-key", b"k")),
    "gemini": (b"/v1/models?pageSize=1000", (b"x-goog-api-key", b"k")),
}


@pytest.mark.parametrize("kind", ASKED)
def test_a_list_is_asked_for_where_the_kind_has_it_and_with_its_key(kind: str) -> None:
    target, key = ASKED[kind]
    out = list_request(upstream(kind))
    assert out is not None
    assert (out.method, out.target, out.body) == (b"GET", target, b"")
    assert key in out.headers
    unkeyed = list_request(upstream(kind, key=None))
    assert unkeyed is not None
    assert not {b"authorization", b"x-api-key", b"x-goog-api-key"} & {name for name, _ in unkeyed.headers}


def test_anthropic_is_told_its_version_and_takes_the_key_in_either_header() -> None:
    plain = list_request(upstream("anthropic"))
    other = list_request(upstream("anthropic", version="2030-01-01", auth="bearer"))
    assert plain is not None
    assert other is not None
    assert (b"anthropic-version", anthropic.VERSION) in plain.headers
    assert {(b"anthropic-version", b"2030-01-01"), (b"authorization", b"Bearer k")} <= set(other.headers)


def test_kinds_that_list_other_things_than_callable_models_are_not_asked() -> None:
    assert {kind for kind in KINDS if list_request(upstream(kind)) is None} == {"azure", "vertex", "bedrock"}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_is_asked_in_the_words_of_its_wire(kind: str) -> None:
    out = list_request(upstream(kind))
    words = {"openai": b"authorization", "anthropic": b"x-api-key", "gemini": b"x-goog-api-key"}
    assert out is None or words[KINDS[kind].codec] in dict(out.headers)


READ = {
    "openai": ("openai", page("a", "b"), ("a", "b")),
    "a bare array": ("together", b' [{"id":"a","type":"chat"},{"id":"b"}]', ("a", "b")),
    "names alone": ("generic", b'{"models":["a","b"]}', ("a", "b")),
    "aliases": ("xai", b'{"models":[{"id":"a-1","aliases":["a","a-latest",7]}]}', ("a-1", "a", "a-latest")),
    "slugs": ("openrouter", b'{"data":[{"id":"x/a","canonical_slug":"x/a-20250101"}]}', ("x/a", "x/a-20250101")),
    "gemini": ("gemini", b'{"models":[{"name":"models/a"},{"name":"models/b"}]}', ("a", "b")),
    "both members": ("llamacpp", b'{"models":[{"name":"a"}],"data":[{"id":"b"}]}', ("b", "a")),
    "odd names": ("openai", b'{"data":[{"id":null},{"id":5},{"id":""},{},{"id":"a"}]}', ("a",)),
    "none": ("openai", page(), ()),
    "ollama without models": ("ollama", b'{"object":"list","data":null}', ()),
    "gemini without models": ("gemini", b"{}", ()),
}


@pytest.mark.parametrize("name", READ)
def test_lists_of_every_shape_are_read(name: str) -> None:
    kind, body, ids = READ[name]
    found = read_list(kind, body)
    assert found is not None
    assert (found.ids, found.next) == (ids, None)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"null",
        b"7",
        b'"a"',
        b"{}",
        b'{"error":{"message":"no"}}',
        b'{"data":7}',
        b'{"data":[1]}',
        b'{"data":[{"id":"a"}',
        b"[[]]",
        b"\xff\xfe",
        b'{"data":' + b"[" * 100_000,
    ],
)
def test_what_is_no_list_is_none(body: bytes) -> None:
    assert read_list("openai", body) is None


@given(
    st.binary(max_size=200)
    | st.recursive(st.none() | st.text(), lambda inner: st.lists(inner)).map(repr).map(str.encode)
)
def test_no_body_raises(body: bytes) -> None:
    for kind in ("openai", "gemini"):
        found = read_list(kind, body)
        assert found is None or all(isinstance(each, str) for each in found.ids)


def test_further_pages_are_named_in_the_words_of_the_wire() -> None:
    found = read_list("anthropic", page("a", has_more=True, last_id="a/b&c"))
    assert found is not None
    assert found.next == b"after_id=a%2Fb%26c"
    out = list_request(upstream("anthropic"), found.next)
    assert out is not None
    assert out.target == b"/v1/models?limit=1000&after_id=a%2Fb%26c"
    other = read_list("generic", page("a", has_more=True, last_id="a"))
    assert other is not None
    assert other.next == b"after=a"
    google = read_list("gemini", b'{"models":[{"name":"models/a"}],"nextPageToken":"t="}')
    assert google is not None
    assert google.next == b"pageToken=t%3D"
    last = read_list("anthropic", page("a", has_more=False, last_id="a"))
    assert last is not None
    assert last.next is None


THERE = [
    ("gpt-4o", "gpt-4o"),
    ("gpt-4o", "gpt-4o-2024-08-06"),  # an alias, of which a snapshot is listed
    ("gpt-4o-2024-08-06", "gpt-4o"),  # a snapshot, where aliases alone are listed
    ("claude-3-5-sonnet-latest", "claude-3-5-sonnet-20241022"),
    ("claude-3-5-sonnet-20241022", "claude-3-5-sonnet-latest"),
    ("claude-opus-4-0", "claude-opus-4-20250514"),
    ("claude-sonnet-4-5", "claude-sonnet-4-5-20250929"),
    ("grok-4", "grok-4-0709"),
    ("gemini-2.0-flash", "gemini-2.0-flash-001"),
    ("gemini-2.5-flash", "gemini-2.5-flash-preview-09-2025"),
    ("models/gemini-2.0-flash", "gemini-2.0-flash"),
    ("gemini-2.0-flash", "models/gemini-2.0-flash"),
    ("tunedModels/mine", "gemini-2.0-flash"),
    ("mistral-large-latest", "mistral-large-2411"),
    ("command-r", "command-r-08-2024"),
    ("x/a:free", "x/a"),
    ("x/a:nitro", "x/a"),
    ("x/a:free", "x/a:free"),
    ("openai/gpt-oss-120b:fireworks-ai", "openai/gpt-oss-120b"),
    ("gpt-4o:online", "gpt-4o-2024-08-06"),
    ("sim-cut:after=3,tokens=9", "sim-cut"),
    ("llama3.2", "llama3.2:latest"),
    ("llama3.2:latest", "llama3.2"),
    ("library/llama3.2", "llama3.2:latest"),
    ("Qwen/Qwen2.5-7B", "qwen/qwen2.5-7b"),
    ("ft:gpt-4o-mini-2024-07-18:us::abc:ckpt-step-80", "gpt-4o-mini"),
    ("accounts/us/models/mine", "accounts/fireworks/models/llama"),
    ("accounts/fireworks/models/llama#us/deployed", "accounts/fireworks/models/other"),
    ("@preset/mine", "x/a"),
    ("openai/anything", "openai/*"),
]


@pytest.mark.parametrize(("model", "listed"), THERE)
def test_other_names_of_a_listed_model_are_there(model: str, listed: str) -> None:
    assert has(names([listed, "another-model"]), model)


MISSING = [
    ("gpt-4", ["gpt-4o", "gpt-4-turbo"]),
    ("gpt-4o-mini", ["gpt-4o"]),
    ("claude-3-5-sonnet-20240620", ["claude-3-5-sonnet-20241022"]),  # a retired snapshot
    ("claude-opus-4-1", ["claude-opus-4-20250514"]),
    ("llama3.2:3b", ["llama3.2:1b", "mistral:latest"]),  # not pulled
    ("llama3.2", ["llama3.1:latest", "llama3.2:1b"]),
    ("x/b:free", ["x/a:free", "x/a"]),
    ("accounts/fireworks/models/gone", ["accounts/fireworks/models/llama"]),
]


@pytest.mark.parametrize(("model", "listed"), MISSING)
def test_what_no_listed_name_could_mean_is_missing(model: str, listed: list[str]) -> None:
    assert not has(names(listed), model)


def test_an_empty_list_says_nothing() -> None:
    assert has(names([]), "anything")
    assert not any(decides(kind, names([])) for kind in KINDS)


def test_a_server_that_takes_any_name_is_not_believed() -> None:
    one, two = names(["a"]), names(["a", "b"])
    assert {kind for kind in KINDS if not decides(kind, two)} == {"llamacpp", "transformers"}
    assert not decides("generic", one)
    assert decides("vllm", one)


@given(st.text(max_size=60), st.lists(st.text(max_size=30), max_size=5))
def test_a_listed_name_is_always_there(model: str, others: list[str]) -> None:
    assert has(names([*others, model]), model)
    assert has(names([*others, model]), f"{model}:free")


def test_a_list_proves_a_key_only_where_it_needs_one() -> None:
    proving = {kind for kind in KINDS if proves_key(upstream(kind))}
    assert proving == {"openai", "groq", "deepseek", "mistral", "together", "xai", "anthropic", "gemini"}
    assert not any(proves_key(upstream(kind, key=None)) for kind in KINDS)
