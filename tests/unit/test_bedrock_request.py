"""What each member of an OpenAI request becomes in Converse's, or by which name it is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from config.kinds import KINDS
from providers.bedrock import BedrockCodec
from providers.bedrock_fields import family_of
from providers.bedrock_request import converse_body
from providers.chat_request import BadRequest, Unsupported
from providers.codec import ChatCall, Upstream, UpstreamRequest
from providers.sigv4 import Credentials, Unsigned, signing_headers

CLAUDE = "us.anthropic.claude-3-7-sonnet-20250219-v1:0"
CLAUDE_46 = "global.anthropic.claude-opus-4-6-v1"
CLAUDE_5 = "anthropic.claude-opus-5"
GPT = "openai.gpt-oss-120b-1:0"
NOVA = "us.amazon.nova-micro-v1:0"
HI = [{"role": "user", "content": "Hi"}]
PNG = "data:image/png;base64,iVBORw0="
CACHE = {"type": "ephemeral"}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Paris"}'}}


def converse(
    messages: list[Any] | None = None, model: str = CLAUDE, drop: str = "", options: Any = None, **more: Any
) -> dict[str, Any]:
    body = json.dumps({"model": model, "messages": HI if messages is None else messages, **more}).encode()
    made: dict[str, Any] = json.loads(converse_body(body, model, frozenset(drop.split()), options or {}))
    return made


def without_messages(**more: Any) -> dict[str, Any]:
    made = converse(**more)
    del made["messages"]
    return made


def test_a_question_is_a_message_and_nothing_else() -> None:
    assert converse() == {"messages": [{"role": "user", "content": [{"text": "Hi"}]}]}


@pytest.mark.parametrize(
    ("given", "native"),
    [
        ({"max_tokens": 50, "max_completion_tokens": 40}, {"inferenceConfig": {"maxTokens": 40}}),
        ({"temperature": 0, "top_p": 0.5}, {"inferenceConfig": {"temperature": 0, "topP": 0.5}}),
        ({"temperature": 1.7}, {"inferenceConfig": {"temperature": 1}}),
        ({"stop": "END"}, {"inferenceConfig": {"stopSequences": ["END"]}}),
        ({"stop": ["a", "b"]}, {"inferenceConfig": {"stopSequences": ["a", "b"]}}),
        ({"response_format": {"type": "text"}}, {}),
        ({"n": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logprobs": False, "logit_bias": {}}, {}),
        ({"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "flex", "seed": None}, {}),
        ({"stream": True, "stream_options": {"include_usage": True}, "prompt_cache_key": "k"}, {}),
        ({"guardrailConfig": {"guardrailIdentifier": "g"}}, {"guardrailConfig": {"guardrailIdentifier": "g"}}),
        ({"guardrail_config": {"trace": "enabled"}}, {"guardrailConfig": {"trace": "enabled"}}),
        ({"request_metadata": {"a": "b"}}, {"requestMetadata": {"a": "b"}}),
        ({"additional_model_request_fields": {"top_k": 1}}, {"additionalModelRequestFields": {"top_k": 1}}),
        ({"top_k": 5}, {"additionalModelRequestFields": {"top_k": 5}}),
        ({"tools": [], "parallel_tool_calls": False}, {}),
        ({"tools": [WEATHER], "tool_choice": "none"}, {}),
    ],
)
def test_members_have_their_native_names(given: dict[str, Any], native: dict[str, Any]) -> None:
    assert without_messages(**given) == native


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"n": 2}, "n"),
        ({"seed": 0}, "seed"),
        ({"frequency_penalty": 0.1}, "frequency_penalty"),
        ({"presence_penalty": -1}, "presence_penalty"),
        ({"logprobs": True}, "logprobs"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"verbosity": "low"}, "verbosity"),
        ({"some_new_member": 1}, "some_new_member"),
        ({"stop": [" "]}, "stop"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [WEATHER], "parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"serviceTier": {"type": "priority"}}, "serviceTier"),
        ({"performanceConfig": {"latency": "optimized"}}, "performanceConfig"),
        ({"reasoning_effort": "low", "model": NOVA}, "reasoning_effort"),
        ({"reasoning_effort": "xhigh", "model": GPT}, "reasoning_effort"),
        ({"top_k": 5, "model": NOVA}, "top_k"),
        ({"thinking": {"type": "disabled"}, "model": GPT}, "thinking"),
        ({"temperature": 0.5, "model": CLAUDE_5}, "temperature"),
    ],
)
def test_what_converse_cannot_do_is_refused_by_name_or_dropped(given: dict[str, Any], param: str) -> None:
    with pytest.raises(Unsupported) as refused:
        converse(**given)
    assert refused.value.param == param
    kept: dict[str, Any] = {"tools": [WEATHER]} if "tools" in given else {}
    model = {"model": given["model"]} if "model" in given else {}
    for drop in (param, "*"):
        assert converse(drop=drop, **given) == converse(**kept, **model)


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        (CLAUDE, {"top_k": 5, "thinking": {"type": "enabled", "budget_tokens": 2_000}}),
        (CLAUDE_46, {"output_config": {"effort": "low"}}),
        (GPT, {"reasoning_effort": "low"}),
        (NOVA, {"inferenceConfig": {"topK": 20}}),
        ("us.amazon.nova-2-lite-v1:0", {"reasoningConfig": {"type": "enabled", "maxReasoningEffort": "low"}}),
        ("mistral.mistral-7b-instruct-v0:2", {"top_k": 5}),
        ("cohere.command-r-v1:0", {"k": 5, "seed": 1, "frequency_penalty": 0.5, "presence_penalty": 0.5}),
        ("ai21.jamba-1-5-large-v1:0", {"frequency_penalty": 0.5}),
        ("us.deepseek.r1-v1:0", {"reasoning_effort": "low"}),
    ],
)
def test_a_makers_own_fields_pass(model: str, fields: dict[str, Any]) -> None:
    made = converse(model=model, additionalModelRequestFields=fields)
    assert made["additionalModelRequestFields"] == fields


@pytest.mark.parametrize(
    "model", [CLAUDE, GPT, NOVA, "meta.llama3-8b", "cohere.command-text-v14", "ai21.j2", "arn:aws:x"]
)
@pytest.mark.parametrize(
    "name",
    [
        *("max_tokens", "maxTokenCount", "max_gen_len", "max_tokens_to_sample", "max_new_tokens"),
        "max_completion_tokens",
        *("n", "numResults", "best_of", "num_generations", "num_return_sequences", "budget_tokens", "anthropic_beta"),
        *("tools", "documents", "textGenerationConfig", "service_tier", "speed"),
    ],
)
def test_any_other_field_of_a_model_is_refused_or_dropped(model: str, name: str) -> None:
    with pytest.raises(Unsupported) as refused:
        converse(model=model, additionalModelRequestFields={name: 9})
    assert refused.value.param == f"additionalModelRequestFields.{name}"
    for drop in (refused.value.param, "*"):
        assert converse(model=model, additionalModelRequestFields={name: 9}, drop=drop) == converse(model=model)


@pytest.mark.parametrize(
    ("model", "given", "param"),
    [
        (CLAUDE, {"thinking": {"type": "enabled", "best_of": 2}}, "thinking.best_of"),
        (CLAUDE, {"additionalModelRequestFields": {"thinking": {"x": 2}}}, "additionalModelRequestFields.thinking.x"),
        (
            NOVA,
            {"additionalModelRequestFields": {"inferenceConfig": {"topK": 1, "maxTokens": 9}}},
            "additionalModelRequestFields.inferenceConfig.maxTokens",
        ),
    ],
)
def test_nothing_hides_inside_a_known_field(model: str, given: dict[str, Any], param: str) -> None:
    with pytest.raises(Unsupported) as refused:
        converse(model=model, **given)
    assert refused.value.param == param
    dropped = converse(model=model, drop=param, **given)["additionalModelRequestFields"]
    assert param.rpartition(".")[2] not in str(dropped)


@pytest.mark.parametrize("fields", ["x", {"top_k": [5]}, {"top_k": {"max_tokens": 9}}, {"thinking": "adaptive"}])
def test_a_field_of_the_wrong_form_is_a_bad_request(fields: Any) -> None:
    with pytest.raises(BadRequest):
        converse(additionalModelRequestFields=fields)


def test_a_guardrail_that_the_kind_refuses_is_refused() -> None:
    body = json.dumps({"model": NOVA, "messages": HI, "guardrail_config": {"guardrailIdentifier": "g"}}).encode()
    with pytest.raises(Unsupported) as refused:
        converse_body(body, NOVA, frozenset(), {}, frozenset(KINDS["bedrock"].refused))
    assert refused.value.param == "guardrail_config"
    assert b"uardrail" not in converse_body(body, NOVA, frozenset("*"), {}, frozenset(KINDS["bedrock"].refused))


def test_schemas_are_text() -> None:
    schema = {"type": "object", "properties": {}, "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema, "strict": True}}
    form = converse(response_format=wanted)["outputConfig"]["textFormat"]
    assert json.loads(form["structure"]["jsonSchema"].pop("schema")) == schema
    assert form == {"type": "json_schema", "structure": {"jsonSchema": {"name": "thing"}}}
    with pytest.raises(BadRequest):
        converse(response_format={"type": "json_schema", "json_schema": {"name": "thing"}})


@pytest.mark.parametrize(
    ("model", "effort", "limit", "fields"),
    [
        (CLAUDE, "low", 10_000, {"thinking": {"type": "enabled", "budget_tokens": 2_000}}),
        (CLAUDE, "minimal", 2_000, {"thinking": {"type": "enabled", "budget_tokens": 1_024}}),
        (CLAUDE, "high", None, {"thinking": {"type": "enabled", "budget_tokens": 25_600}}),
        (CLAUDE, "high", 1_024, None),
        (CLAUDE, "none", None, None),
        (CLAUDE_46, "none", None, None),
        (CLAUDE_46, "minimal", 10, {"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}),
        (CLAUDE_5, "xhigh", 10, {"thinking": {"type": "adaptive"}, "output_config": {"effort": "xhigh"}}),
        (GPT, "medium", None, {"reasoning_effort": "medium"}),
    ],
)
def test_effort_is_a_budget_or_an_effort(model: str, effort: str, limit: int | None, fields: Any) -> None:
    made = converse(model=model, reasoning_effort=effort, max_tokens=limit)
    assert made.get("additionalModelRequestFields") == fields


def test_options_tell_what_an_id_does_not() -> None:
    profile = "arn:aws:bedrock:us-east-1:123456789012:application-inference-profile/abc"
    with pytest.raises(Unsupported):
        converse(model=profile, reasoning_effort="low")
    for how, kind in (("adaptive", "adaptive"), ("budget", "enabled")):
        options = {"family": "anthropic", "thinking": how}
        made = converse(model=profile, reasoning_effort="low", options=options)
        assert made["additionalModelRequestFields"]["thinking"]["type"] == kind


def test_the_clients_own_fields_win() -> None:
    own = {"thinking": {"type": "enabled", "budget_tokens": 5}}
    made = converse(reasoning_effort="high", additionalModelRequestFields=own)
    assert made["additionalModelRequestFields"] == own
    made = converse(reasoning_effort="high", thinking=own["thinking"])
    assert made["additionalModelRequestFields"] == own
    with pytest.raises(BadRequest) as refused:
        converse(reasoning_effort="extreme")
    assert refused.value.param == "reasoning_effort"


def test_a_budget_is_left_out_where_thinking_did_not_come_back() -> None:
    turn: dict[str, Any] = {"role": "assistant", "tool_calls": [CALL]}
    result = {"role": "tool", "tool_call_id": "call_1", "content": "mild"}
    made = converse([*HI, turn, result], tools=[WEATHER], reasoning_effort="high")
    assert "additionalModelRequestFields" not in made
    turn["thinking_blocks"] = [{"type": "thinking", "thinking": "t", "signature": "s"}]
    made = converse([*HI, turn, result], tools=[WEATHER], reasoning_effort="high")
    assert made["additionalModelRequestFields"]["thinking"]["type"] == "enabled"


def test_defaults_are_left_out_for_models_that_take_no_other() -> None:
    assert "inferenceConfig" not in converse(model=CLAUDE_5, temperature=1, top_p=1)
    assert converse(model=NOVA, temperature=1)["inferenceConfig"] == {"temperature": 1}


def test_tools_and_choices() -> None:
    tool = {
        "type": "function",
        "function": {"name": "weather", "description": "d", "strict": True},
        "cache_control": {"type": "ephemeral", "ttl": "1h"},
    }
    spec = {
        "name": "weather",
        "description": "d",
        "strict": True,
        "inputSchema": {"json": {"type": "object", "properties": {}}},
    }
    config = converse(tools=[tool], tool_choice="required")["toolConfig"]
    assert config["tools"] == [{"toolSpec": spec}, {"cachePoint": {"type": "default", "ttl": "1h"}}]
    assert config["toolChoice"] == {"any": {}}
    named = {"type": "function", "function": {"name": "weather"}}
    assert converse(tools=[tool], tool_choice=named)["toolConfig"]["toolChoice"] == {"tool": {"name": "weather"}}
    assert "toolChoice" not in converse(tools=[tool], tool_choice="auto")["toolConfig"]
    loose = converse(tools=[tool], drop="tools.function.strict")["toolConfig"]
    assert "strict" not in loose["tools"][0]["toolSpec"]
    with pytest.raises(Unsupported) as refused:
        converse(tools=[{**tool, "defer_loading": True}])
    assert refused.value.param == "tools[0].defer_loading"
    with pytest.raises(Unsupported):
        converse(tools=[{"type": "custom", "custom": {"name": "c"}}])


def test_no_tools_at_all_is_refused_once_tools_were_used() -> None:
    messages = [*HI, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "call_1"}]
    with pytest.raises(Unsupported) as refused:
        converse(messages, tools=[WEATHER], tool_choice="none")
    assert refused.value.param == "tool_choice"
    dropped = converse(messages, tools=[WEATHER], tool_choice="none", drop="tool_choice")
    assert dropped["toolConfig"] == converse(tools=[WEATHER])["toolConfig"]


def test_what_is_not_openais_is_refused() -> None:
    for body in (b"", b"[]", b'{"messages":[]}', b'{"messages":[{"role":"system","content":"s"}]}'):
        with pytest.raises(BadRequest):
            converse_body(body, CLAUDE, frozenset(), {})
    with pytest.raises(Unsupported) as refused:
        converse([{"role": "system", "content": [{"type": "image_url", "image_url": {"url": PNG}}]}, *HI])
    assert refused.value.param == "messages[0].content[0]"


@pytest.mark.parametrize(
    ("model", "family"),
    [
        (CLAUDE, "anthropic"),
        (CLAUDE_46, "anthropic"),
        (CLAUDE_5, "anthropic"),
        ("anthropic.claude-sonnet-4-20250514-v1:0", "anthropic"),
        ("arn:aws:bedrock:us-east-1:1:inference-profile/us.anthropic.claude-haiku-4-5-v1:0", "anthropic"),
        ("anthropic.claude-new", "anthropic"),
        (GPT, "openai"),
        (NOVA, "amazon"),
        ("us.meta.llama3-3-70b-instruct-v1:0", "meta"),
        ("arn:aws:bedrock:us-east-1:1:application-inference-profile/abc", ""),
        ("google.gemma-3-27b-it", ""),
    ],
)
def test_ids_tell_whose_a_model_is(model: str, family: str) -> None:
    assert family_of(model) == family


def sent(key: str | None, options: dict[str, str] | None = None, *, stream: bool = True) -> UpstreamRequest:
    body = json.dumps({"model": NOVA, "messages": HI}).encode()
    call = ChatCall(body=body, model=NOVA, stream=stream, created=1_790_000_000)
    return BedrockCodec(Upstream("p", "bedrock", b"/base", key=key, options=options or {}), call).request(call, "req-1")


def test_the_request_goes_to_the_models_address_with_a_bearer_key() -> None:
    out = sent("ABSKc2VjcmV0")
    assert (out.method, out.target) == (b"POST", b"/base/model/us.amazon.nova-micro-v1%3A0/converse-stream")
    assert dict(out.headers)[b"accept"] == b"application/vnd.amazon.eventstream"
    assert dict(out.headers)[b"content-type"] == b"application/json"
    assert out.own == ((b"x-request-id", b"req-1"), (b"authorization", b"Bearer ABSKc2VjcmV0"))
    assert json.loads(out.body) == {"messages": [{"role": "user", "content": [{"text": "Hi"}]}]}
    whole = sent(None, stream=False)
    assert whole.target.endswith(b"/converse")
    assert whole.own == ((b"x-request-id", b"req-1"),)


@pytest.mark.parametrize(
    ("options", "region", "host"),
    [
        ({}, "us-east-1", b"bedrock-runtime.us-east-1.amazonaws.com"),
        ({"region": "eu-west-3"}, "eu-west-3", b"bedrock-runtime.eu-west-3.amazonaws.com"),
        ({"region": "eu-west-3", "host": "vpce-1.example.org:8443"}, "eu-west-3", b"vpce-1.example.org:8443"),
    ],
)
def test_an_access_key_signs_what_is_sent(options: dict[str, str], region: str, host: bytes) -> None:
    out = sent("AKIA1:se/cret:to/ken", options)
    assert out == sent("AKIA1:se/cret:to/ken", options)
    headers = ((b"host", host), (b"content-type", b"application/json"))
    unsigned = Unsigned(out.method, out.target, headers, out.body)
    key = Credentials("AKIA1", "se/cret", "to/ken")
    expected = signing_headers(unsigned, key, region=region, service="bedrock", epoch_s=1_790_000_000)
    assert out.own == ((b"x-request-id", b"req-1"), *expected)
    assert dict(out.own)[b"x-amz-date"] == b"20260921T141320Z"
    assert b"se/cret" not in b"".join(value for _, value in out.own)
