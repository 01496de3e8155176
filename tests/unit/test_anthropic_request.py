"""OpenAI's request as Anthropic's: each member is translated, passed, or refused by its name."""

from __future__ import annotations

import json
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from providers.anthropic import AnthropicCodec
from providers.anthropic_schema import output_schema
from providers.chat_request import BadRequest, Unsupported
from providers.claude import OUTPUT_MAX
from providers.codec import ChatCall, Upstream, UpstreamRequest

USER = {"role": "user", "content": "Hi"}
HI = {"role": "user", "content": [{"type": "text", "text": "Hi"}]}
NONE: frozenset[str] = frozenset()


def sent(
    *,
    drop: frozenset[str] = NONE,
    options: dict[str, str] | None = None,
    key: str | None = "sk-ant",
    key_style: Literal["bearer", "api-key"] = "api-key",
    **members: Any,
) -> UpstreamRequest:
    body = json.dumps({"model": "claude-opus-4-6", "messages": [USER], **members}).encode()
    call = ChatCall(body, "m", bool(members.get("stream")))
    upstream = Upstream("p", "anthropic", b"/v1", key=key, drop=drop, options=options or {}, key_style=key_style)
    return AnthropicCodec(upstream, call).request(call, "req-1")


def made(**members: Any) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(sent(**members).body)
    return body


def refused(**members: Any) -> str:
    with pytest.raises(Unsupported) as caught:
        made(**members)
    return caught.value.param


def bad(**members: Any) -> str:
    with pytest.raises(BadRequest) as caught:
        made(**members)
    return caught.value.param


def test_a_plain_request_goes_to_messages_with_our_key() -> None:
    out = sent(stream=True)
    headers = dict(out.headers)
    assert (out.method, out.target) == (b"POST", b"/v1/messages")
    assert (headers[b"x-api-key"], headers[b"anthropic-version"]) == (b"sk-ant", b"2023-06-01")
    assert headers[b"accept"] == b"text/event-stream"
    assert b"authorization" not in headers
    assert dict(out.own) == {b"x-request-id": b"req-1"}
    assert json.loads(out.body) == {
        "model": "claude-opus-4-6",
        "max_tokens": OUTPUT_MAX,
        "stream": True,
        "messages": [HI],
    }


def test_options_change_the_headers() -> None:
    out = sent(options={"version": "2030-01-01", "beta": "a-1,b-2"}, key_style="bearer")
    headers = dict(out.headers)
    assert headers[b"anthropic-version"] == b"2030-01-01"
    assert headers[b"authorization"] == b"Bearer sk-ant"
    assert b"x-api-key" not in headers
    assert dict(out.own)[b"anthropic-beta"] == b"a-1,b-2"
    assert b"x-api-key" not in dict(sent(key=None).headers)


@pytest.mark.parametrize(
    ("given_", "native"),
    [
        ({"max_tokens": 5}, {"max_tokens": 5}),
        ({"max_tokens": 9, "max_completion_tokens": 7}, {"max_tokens": 7}),
        ({"temperature": 0.3}, {"temperature": 0.3}),
        ({"temperature": 1.7}, {"temperature": 1}),
        ({"top_p": 0.5}, {"top_p": 0.5}),
        ({"top_p": 1}, {}),
        ({"stop": "END"}, {"stop_sequences": ["END"]}),
        ({"stop": ["a", "b"]}, {"stop_sequences": ["a", "b"]}),
        ({"user": "u-1"}, {"metadata": {"user_id": "u-1"}}),
        ({"safety_identifier": "s"}, {"metadata": {"user_id": "s"}}),
        ({"metadata": {"user_id": "n", "a": "b"}}, {"metadata": {"user_id": "n"}}),
        ({"metadata": {"a": "b"}}, {}),
        ({"service_tier": "default"}, {"service_tier": "standard_only"}),
        ({"service_tier": "auto"}, {}),
        ({"n": 1, "frequency_penalty": 0, "logit_bias": {}, "store": True, "prompt_cache_key": "k"}, {}),
        ({"response_format": {"type": "text"}}, {}),
        ({"top_k": 5}, {"top_k": 5}),
        ({"cache_control": {"type": "ephemeral"}}, {"cache_control": {"type": "ephemeral"}}),
        ({"thinking": {"type": "adaptive"}}, {"thinking": {"type": "adaptive"}}),
        ({"output_config": {"effort": "low"}}, {"output_config": {"effort": "low"}}),
    ],
)
def test_members_are_translated(given_: dict[str, Any], native: dict[str, Any]) -> None:
    plain = {"model": "claude-opus-4-6", "max_tokens": OUTPUT_MAX, "messages": [HI]}
    assert made(**given_) == {**plain, **native}


@pytest.mark.parametrize(
    "members",
    [
        *({name: 2} for name in ("n", "seed", "frequency_penalty", "presence_penalty", "top_logprobs")),
        {"logprobs": True},
        {"logit_bias": {"1": 2}},
        {"verbosity": "low"},
        {"modalities": ["text", "audio"]},
        {"web_search_options": {}},
        {"speed": "fast"},
        {"inference_geo": "us"},
        {"container": "c"},
        {"mcp_servers": []},
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        {"tools": [{"type": "code_execution_20250825", "name": "code_execution"}]},
        {"from_tomorrow": 1},
        {"response_format": {"type": "json_object"}},
        {"stop": "\n"},
    ],
)
def test_what_it_cannot_do_is_refused_by_name_or_dropped(members: dict[str, Any]) -> None:
    (name,) = members
    assert refused(**members) == name
    plain = made()
    assert made(**members, drop=frozenset((name,))) == plain
    assert made(**members, drop=frozenset("*")) == plain


def test_models_that_fixed_their_sampling_take_only_its_defaults() -> None:
    for model in ("claude-opus-4-7", "claude-sonnet-5", "claude-mythos-preview"):
        assert "temperature" not in made(model=model, temperature=1, top_p=1)
        assert refused(model=model, temperature=0.5) == "temperature"
        assert refused(model=model, top_p=0.5) == "top_p"
        assert "top_p" not in made(model=model, top_p=0.5, drop=frozenset(("top_p",)))
    assert made(model="glm-5", temperature=0.5)["temperature"] == 0.5


def call(id_: str, arguments: str, name: str = "f") -> dict[str, Any]:
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}


SIGNED = {"type": "thinking", "thinking": "Let me see.", "signature": "c2ln"}

# -- thinking ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("effort", "native"),
    [
        ("minimal", "low"),
        *((effort, effort) for effort in ("low", "medium", "high", "xhigh", "max")),
    ],
)
def test_newer_models_think_by_effort(effort: str, native: str) -> None:
    out = made(reasoning_effort=effort)
    assert (out["thinking"], out["output_config"]) == (
        {"type": "adaptive", "display": "summarized"},
        {"effort": native},
    )


@pytest.mark.parametrize(("effort", "budget"), [("minimal", 1024), ("low", 2000), ("medium", 5000), ("high", 8000)])
def test_older_models_think_by_budget(effort: str, budget: int) -> None:
    out = made(model="claude-sonnet-4-5", reasoning_effort=effort, max_tokens=10_000)
    assert out["thinking"] == {"type": "enabled", "budget_tokens": budget}
    assert "output_config" not in out


def test_effort_none_is_no_thinking() -> None:
    assert made(reasoning_effort="none")["thinking"] == {"type": "disabled"}
    assert "thinking" not in made(model="claude-sonnet-4-5", reasoning_effort="none")
    assert bad(reasoning_effort="huge") == "reasoning_effort"


def test_other_models_think_as_their_provider_is_configured() -> None:
    assert made(model="glm-5", reasoning_effort="low")["thinking"]["type"] == "enabled"
    options = {"thinking": "adaptive"}
    assert made(model="glm-5", reasoning_effort="low", options=options)["thinking"]["type"] == "adaptive"


def test_the_clients_own_thinking_wins() -> None:
    own = {"type": "disabled"}
    out = made(thinking=own, reasoning_effort="high", output_config={"effort": "max"})
    assert (out["thinking"], out["output_config"]) == (own, {"effort": "max"})


def test_a_budget_is_left_out_where_it_would_be_refused() -> None:
    asked = {"role": "assistant", "tool_calls": [call("c", "{}")]}
    result = {"role": "tool", "tool_call_id": "c", "content": "1"}
    older: dict[str, Any] = {"model": "claude-sonnet-4-5", "reasoning_effort": "low"}
    assert "thinking" not in made(**older, max_tokens=1024)
    assert "thinking" not in made(**older, messages=[USER, asked, result])
    assert "thinking" in made(**older, messages=[USER, {**asked, "thinking_blocks": [SIGNED]}, result])
    assert "thinking" in made(**older, messages=[USER, asked, result, {"role": "assistant", "content": "1"}, USER])


# -- tools and formats -------------------------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"properties": {"a": {}}}}}
NATIVE = {"name": "f", "description": "d", "input_schema": {"type": "object", "properties": {"a": {}}}}


def test_tools_are_translated_and_the_providers_own_pass() -> None:
    shell = {"type": "bash_20250124", "name": "bash"}
    strict = {"type": "function", "function": {"name": "g", "strict": True}, "cache_control": {"type": "ephemeral"}}
    out = made(tools=[TOOL, strict, shell])
    assert out["tools"] == [
        NATIVE,
        {
            "name": "g",
            "input_schema": {"type": "object", "properties": {}},
            "strict": True,
            "cache_control": {"type": "ephemeral"},
        },
        shell,
    ]
    assert "tool_choice" not in out
    odd = [{**TOOL, "colour": "red"}]
    assert refused(tools=odd) == "tools[0].colour"
    assert made(tools=odd, drop=frozenset(("tools.colour",)))["tools"] == [NATIVE]


@pytest.mark.parametrize(
    ("members", "native"),
    [
        ({"tool_choice": "auto"}, {"type": "auto"}),
        ({"tool_choice": "none", "parallel_tool_calls": False}, {"type": "none"}),
        ({"tool_choice": "required"}, {"type": "any"}),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, {"type": "tool", "name": "f"}),
        ({"parallel_tool_calls": False}, {"type": "auto", "disable_parallel_tool_use": True}),
        (
            {"tool_choice": "required", "parallel_tool_calls": False},
            {"type": "any", "disable_parallel_tool_use": True},
        ),
        ({"parallel_tool_calls": True}, None),
    ],
)
def test_tool_choices_are_translated(members: dict[str, Any], native: Any) -> None:
    assert made(tools=[TOOL], **members).get("tool_choice") == native
    assert "tool_choice" not in made(**members)


def test_a_json_schema_is_the_outputs_format() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 1}}, "required": ["a"]}
    given_ = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    out = made(response_format=given_, reasoning_effort="low")
    assert out["output_config"] == {
        "effort": "low",
        "format": {
            "type": "json_schema",
            "schema": {
                "type": "object",
                "properties": {"a": {"type": "integer", "description": "{minimum: 1}"}},
                "required": ["a"],
                "additionalProperties": False,
            },
        },
    }
    assert bad(response_format={"type": "json_schema", "json_schema": {"name": "n"}}).endswith("schema")


def test_schemas_keep_what_can_be_enforced_and_tell_the_rest() -> None:
    given_ = {
        "$defs": {"S": {"type": "string", "format": "date", "maxLength": 9, "description": "D"}},
        "type": "object",
        "additionalProperties": True,
        "properties": {
            "minimum": {"oneOf": [{"$ref": "#/$defs/S"}, {"type": "null"}]},
            "list": {"type": "array", "items": {"type": "object"}, "minItems": 1, "maxItems": 3, "uniqueItems": False},
            "odd": {"type": "string", "format": "iban", "pattern": "a+", "enum": ["a"]},
        },
    }
    assert output_schema(given_) == {
        "$defs": {"S": {"type": "string", "format": "date", "description": "D\n\n{maxLength: 9}"}},
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "minimum": {"anyOf": [{"$ref": "#/$defs/S"}, {"type": "null"}]},
            "list": {
                "type": "array",
                "items": {"type": "object", "additionalProperties": False},
                "minItems": 1,
                "description": "{maxItems: 3}",
            },
            "odd": {"type": "string", "pattern": "a+", "enum": ["a"], "description": '{format: "iban"}'},
        },
    }


def test_a_schema_without_end_is_refused() -> None:
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(200):
        deep = {"type": "array", "items": deep}
    with pytest.raises(BadRequest):
        output_schema(deep)


# -- anything else -----------------------------------------------------------------------------------------------------

_INNER = "role content type text function name arguments id schema cache_control data signature"
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "role",
                    "content",
                    "type",
                    "text",
                    "function",
                    "name",
                    "arguments",
                    "id",
                    "schema",
                    "cache_control",
                    "data",
                    "signature",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
_NAMES = "messages tools tool_choice response_format stop output_config thinking reasoning_effort metadata user"
_EXTRA = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"])},
    optional={"content": _JSON, "thinking_blocks": _JSON, "reasoning_details": _JSON, "cache_control": _JSON},
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(_NAMES.split(" ")), _JSON, max_size=4), st.lists(_EXTRA, max_size=3))
def test_no_request_raises_anything_else(members: dict[str, Any], messages: list[Any]) -> None:
    try:
        body = made(**{"messages": messages, **members})
    except (BadRequest, Unsupported):
        return
    assert body["messages"] is not None
