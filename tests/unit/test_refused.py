"""What a candidate's price does not cover is refused by name, or left out where the configuration says so."""

from __future__ import annotations

import json
from typing import Any

import pytest

from config.kinds import KINDS, caseless
from config.settings import Bounds
from providers import refused
from providers.codec import ChatCall, Unsupported, Upstream
from providers.json_root import RootObject
from providers.openai import OpenAICodec
from providers.registry import wire
from proxy import request as checked

HI = [{"role": "user", "content": "Hi"}]
FUNCTION = {"type": "function", "function": {"name": "f"}}
SEARCH = {"type": "openrouter:web_search"}


def upstream(kind: str, *, drop: str = "", refuse: tuple[str, ...] | None = None) -> Upstream:
    row = KINDS[kind]
    names = row.refused if refuse is None else refuse
    dropped = frozenset(drop.split() or row.drop)
    return Upstream("p", kind, b"/v1", drop=dropped, refused=frozenset(names), caseless=caseless(kind))


def sent(kind: str, drop: str = "", refuse: tuple[str, ...] | None = None, **members: Any) -> bytes:
    """The body that goes up; the same whether the gateway has read the client's or not."""
    raw = json.dumps({"model": "m", "messages": HI, **members}).encode()
    told = []
    for root in (None, RootObject(raw)):
        call = ChatCall(raw, "m", stream=False, root=root)
        codec = OpenAICodec(upstream(kind, drop=drop, refuse=refuse), call)
        told.append(codec.request(call, "r").body)
    assert told[0] == told[1]
    return told[0]


def refused_at(kind: str, **members: Any) -> str:
    with pytest.raises(Unsupported) as caught:
        sent(kind, **members)
    return caught.value.param


REFUSED = [
    ("openai", {"service_tier": "priority"}),
    ("openai", {"service_tier": "fast"}),
    ("openai", {"service_tier": "scale"}),
    ("openai", {"service_tier": "some-new-tier"}),
    ("openai", {"web_search_options": {}}),
    ("openai", {"tools": [FUNCTION, {"type": "web_search"}]}),
    ("azure", {"data_sources": [{"type": "azure_search"}]}),
    ("azure", {"enhancements": {"ocr": {"enabled": True}}}),
    ("openrouter", {"models": ["dear/model"]}),
    ("openrouter", {"plugins": [{"id": "web"}]}),
    ("openrouter", {"preset": "mine"}),
    ("openrouter", {"provider": {"order": ["dear"]}}),
    ("openrouter", {"route": "sort"}),
    ("openrouter", {"tools": [SEARCH]}),
    ("groq", {"service_tier": "performance"}),
    ("groq", {"compound_custom": {"models": {}}}),
    ("groq", {"tools": [{"type": "browser_search"}]}),
    ("deepseek", {"service_tier": "priority"}),
    ("mistral", {"tools": [{"type": "web_search"}]}),
    ("together", {"safety_model": "guard"}),
    ("xai", {"search_parameters": {"mode": "on"}}),
    ("xai", {"deferred": True}),
    ("vllm", {"best_of": 8}),
    ("vllm", {"use_beam_search": True}),
    ("llamacpp", {"n_predict": -1}),
    ("llamacpp", {"n_cmpl": 4}),
    ("llamacpp", {"n_probs": 100}),
    ("transformers", {"generation_config": "{}"}),
]


@pytest.mark.parametrize(("kind", "members"), REFUSED, ids=str)
def test_what_the_price_does_not_cover_is_refused_by_name(kind: str, members: dict[str, Any]) -> None:
    assert [refused_at(kind, **members)] == list(members)
    assert [refused_at("generic", **members)] == list(members)  # which may be any of them


@pytest.mark.parametrize(("kind", "members"), REFUSED, ids=str)
def test_the_operator_may_let_it_pass_or_have_it_left_out(kind: str, members: dict[str, Any]) -> None:
    (name,) = members
    assert json.loads(sent(kind, refuse=(), **members))[name] == members[name]
    for drop in (name, "*"):
        left = json.loads(sent(kind, drop=drop, **members))
        assert left.pop("tools", [FUNCTION]) == [FUNCTION]
        assert left == {"model": "m", "messages": HI}


@pytest.mark.parametrize("kind", ["openai", "generic"])
@pytest.mark.parametrize(
    "members",
    [
        {"service_tier": None, "web_search_options": None},
        *({"service_tier": tier} for tier in ("auto", "default", "flex", "on_demand")),
        {"tools": [FUNCTION, {"type": "custom", "custom": {"name": "c"}}, {"function": {"name": "g"}}]},
        {"models": [], "plugins": [], "route": "fallback", "search_parameters": {"mode": "off"}, "deferred": False},
        {"best_of": 1, "use_beam_search": False, "n_probs": 0, "n_cmpl": 1},
        {"transforms": ["middle-out"], "usage": {"include": True}, "min_tokens": 5, "some_new_field": {"A": 1}},
    ],
    ids=str,
)
def test_what_buys_nothing_passes_byte_for_byte(kind: str, members: dict[str, Any]) -> None:
    assert sent(kind, **members) == json.dumps({"model": "m", "messages": HI, **members}).encode()


@pytest.mark.parametrize(
    "value", ['"default","service_tier":"priority"', '"priority","service_tier":"default"', "1e999"], ids=str
)
def test_a_value_that_nobody_can_be_sure_of_is_refused(value: str) -> None:
    body = f'{{"model":"m","messages":[],"service_tier":{value}}}'.encode()
    call = ChatCall(body, "m", stream=False, root=RootObject(body))
    with pytest.raises(Unsupported):
        OpenAICodec(upstream("openai"), call).request(call, "r")


@pytest.mark.parametrize(
    "name", ["MAX_TOKENS", "Stream", "N", "Model", "Messages", "\u017ftream", "max_to\u212aens", "Tools"]
)
def test_a_go_server_is_not_told_by_another_spelling_what_the_gateway_has_settled(name: str) -> None:
    assert refused_at("ollama", **{name: 1}) == name
    members: dict[str, Any] = {name: 1}
    assert name in json.loads(sent("vllm", **members))
    assert name not in json.loads(sent("ollama", drop="*", **members))


def test_a_go_server_is_not_told_by_another_spelling_to_withhold_usage() -> None:
    options = {"include_usage": True, "Include_Usage": False}
    assert refused_at("ollama", drop="*", stream_options=options) == "stream_options.Include_Usage"
    for harmless in ({"include_usage": True}, {}, None):
        assert json.loads(sent("ollama", stream_options=harmless))["stream_options"] == harmless
    assert sent("vllm", stream_options=options)


def test_other_spellings_of_refused_members_are_refused_and_of_others_pass() -> None:
    assert refused_at("generic", Service_Tier="priority") == "Service_Tier"
    assert refused_at("generic", Service_Tier="default") == "Service_Tier"
    assert json.loads(sent("ollama", Seed=7, größe=1, Service_Tier="priority"))["Seed"] == 7


def test_only_the_providers_own_tools_are_left_out() -> None:
    body = json.loads(sent("openrouter", drop="*", tools=[SEARCH, FUNCTION], tool_choice="auto"))
    assert (body["tools"], body["tool_choice"]) == ([FUNCTION], "auto")
    assert json.loads(sent("openrouter", drop="*", tools=[SEARCH], tool_choice="auto")) == {
        "model": "m",
        "messages": HI,
    }


def test_what_the_gateway_itself_adds_is_not_the_clients() -> None:
    root = RootObject(b'{"model":"m","messages":[]}')
    call = ChatCall(b'{"model":"m","messages":[],"max_tokens":5}', "m", stream=False, root=root)
    known = Upstream("p", "generic", b"/v1", refused=frozenset(("max_tokens",)))
    assert OpenAICodec(known, call).request(call, "r").body == call.body


def test_every_member_that_the_gateway_reads_is_known_by_every_spelling() -> None:
    assert set(checked._READ) <= refused.READ
    read = checked.read_chat(b'{"model":"m","messages":[{"role":"user","content":"x"}]}', Bounds())
    assert refused.other_spellings(read.root.spans, frozenset()) == []


@pytest.mark.parametrize("kind", ["anthropic", "gemini", "bedrock"])
@pytest.mark.parametrize(("drop", "passes"), [("", False), ("top_k", True), ("*", True)])
def test_a_list_of_the_operators_holds_for_every_codec(kind: str, drop: str, passes: bool) -> None:
    body = json.dumps({"model": "anthropic.claude-x", "messages": HI, "top_k": 5}).encode()
    call = ChatCall(body, "anthropic.claude-x", stream=False)
    known = Upstream("p", kind, b"/v1", drop=frozenset(drop.split()), refused=frozenset(("top_k",)))
    codec = wire(kind).codec(known, call)
    if passes:
        assert b"top" not in codec.request(call, "r").body
        return
    with pytest.raises(Unsupported) as caught:
        codec.request(call, "r")
    assert (caught.value.param, "price" in caught.value.message) == ("top_k", True)
