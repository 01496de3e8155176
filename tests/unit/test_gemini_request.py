"""OpenAI's chat request as Google's, field by field: what it becomes, or who is told that it cannot be."""

from __future__ import annotations

import json
from typing import Any

import pytest

from providers.chat_request import BadRequest, Unsupported
from providers.codec import ChatCall, Upstream, UpstreamRequest
from providers.gemini import GeminiCodec
from providers.gemini_request import traits_of

USER = {"role": "user", "content": "hi"}
FUNCTION = {
    "name": "f",
    "description": "does f",
    "parameters": {"type": "object", "properties": {"a": {"$ref": "#/x"}}},
}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":1.50}'}}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "ok"}
FILE = {"type": "file", "file": {"file_id": "file-1"}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA==", "detail": "low"}}


def sent(body: dict[str, Any], model: str = "gemini-2.5-flash", kind: str = "gemini", **more: Any) -> UpstreamRequest:
    """The upstream request of a body; `more` are `drop` and members of the call."""
    upstream = Upstream("g", kind, b"/base", key="k", drop=frozenset(more.pop("drop", ())))
    whole = {"model": model, "messages": [USER], **body}
    call = ChatCall(**{"body": json.dumps(whole).encode(), "model": model, "stream": True, **more})
    return GeminiCodec(upstream, call).request(call, "req_1")


def native(body: dict[str, Any], model: str = "gemini-2.5-flash", **more: Any) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(sent(body, model, **more).body)
    return told


def config(body: dict[str, Any], model: str = "gemini-2.5-flash", **more: Any) -> dict[str, Any]:
    told: dict[str, Any] = native(body, model, **more).get("generationConfig", {})
    return told


# -- where it goes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "stream", "target"),
    [
        ("gemini-2.5-flash", True, b"/base/models/gemini-2.5-flash:streamGenerateContent?alt=sse"),
        ("gemini-2.5-flash", False, b"/base/models/gemini-2.5-flash:generateContent"),
        ("models/gemini-x", False, b"/base/models/gemini-x:generateContent"),
        ("tunedModels/mine", False, b"/base/tunedModels/mine:generateContent"),
        ("a/../b?c#d e", False, b"/base/models/a%2F..%2Fb%3Fc%23d%20e:generateContent"),
    ],
)
def test_the_model_is_in_the_path(model: str, stream: bool, target: bytes) -> None:
    request = sent({}, model, stream=stream)
    assert (request.method, request.target) == (b"POST", target)
    assert dict(request.headers)[b"accept"] == (b"text/event-stream" if stream else b"application/json")
    assert request.own == ((b"x-request-id", b"req_1"),)


def test_the_key_goes_where_each_of_the_two_wants_it() -> None:
    gemini, vertex = dict(sent({}).headers), dict(sent({}, kind="vertex").headers)
    assert (gemini[b"x-goog-api-key"], gemini.get(b"authorization")) == (b"k", None)
    assert (vertex[b"authorization"], vertex.get(b"x-goog-api-key")) == (b"Bearer k", None)
    bare = ChatCall(json.dumps({"model": "m", "messages": [USER]}).encode(), "m", True)
    request = GeminiCodec(Upstream("g", "gemini", b""), bare).request(bare, "r")
    assert not {b"authorization", b"x-goog-api-key"} & dict(request.headers).keys()


# -- generationConfig -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, {}),
        ({"temperature": 0}, {"temperature": 0}),
        ({"top_p": 0.5, "top_k": 40}, {"topP": 0.5, "topK": 40}),
        ({"max_tokens": 9}, {"maxOutputTokens": 9}),
        ({"max_completion_tokens": 7, "max_tokens": 9}, {"maxOutputTokens": 7}),
        ({"stop": "x"}, {"stopSequences": ["x"]}),
        ({"stop": ["x", "y"]}, {"stopSequences": ["x", "y"]}),
        ({"seed": 0}, {"seed": 0}),
        ({"presence_penalty": 0.5, "frequency_penalty": 1}, {"presencePenalty": 0.5, "frequencyPenalty": 1}),
        ({"presence_penalty": 0, "frequency_penalty": 0}, {}),
        ({"n": 1}, {}),
        ({"n": 2}, {"candidateCount": 2}),
        ({"response_format": {"type": "text"}}, {}),
        ({"response_format": {"type": "json_object"}}, {"responseMimeType": "application/json"}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}}},
            {"responseMimeType": "application/json", "responseJsonSchema": {"type": "object"}},
        ),
        ({"logprobs": False, "top_logprobs": 0, "logit_bias": {}, "modalities": ["text"]}, {}),
        ({"user": "u", "store": True, "metadata": {"a": "b"}, "stream_options": {"include_usage": True}}, {}),
        ({"service_tier": "flex", "prompt_cache_key": "k", "safety_identifier": "s"}, {}),
    ],
)
def test_each_setting_becomes_googles(body: dict[str, Any], expected: dict[str, Any]) -> None:
    assert config(body) == expected


@pytest.mark.parametrize(
    ("model", "effort", "expected"),
    [
        ("gemini-2.5-flash", "none", {"thinkingBudget": 0, "includeThoughts": False}),
        ("gemini-2.5-flash", "minimal", {"thinkingBudget": 1024, "includeThoughts": True}),
        ("gemini-2.5-pro", "low", {"thinkingBudget": 1024, "includeThoughts": True}),
        ("gemini-2.5-pro", "medium", {"thinkingBudget": 8192, "includeThoughts": True}),
        ("gemini-2.5-flash-lite", "high", {"thinkingBudget": 24576, "includeThoughts": True}),
        ("gemini-3-flash-preview", "minimal", {"thinkingLevel": "MINIMAL", "includeThoughts": True}),
        ("gemini-3.7-flash", "minimal", {"thinkingLevel": "LOW", "includeThoughts": True}),
        ("gemini-3.1-pro-preview", "minimal", {"thinkingLevel": "LOW", "includeThoughts": True}),
        ("gemini-3-pro-preview", "medium", {"thinkingLevel": "HIGH", "includeThoughts": True}),
        ("gemini-3.1-pro-preview", "medium", {"thinkingLevel": "MEDIUM", "includeThoughts": True}),
        ("gemini-flash-latest", "medium", {"thinkingLevel": "MEDIUM", "includeThoughts": True}),
        ("models/gemini-3.5-flash", "low", {"thinkingLevel": "LOW", "includeThoughts": True}),
        ("gemini-4-pro", "xhigh", {"thinkingLevel": "HIGH", "includeThoughts": True}),
    ],
)
def test_reasoning_effort_becomes_what_the_models_generation_knows(
    model: str, effort: str, expected: dict[str, Any]
) -> None:
    assert config({"reasoning_effort": effort}, model) == {"thinkingConfig": expected}


@pytest.mark.parametrize(
    ("model", "effort"),
    [
        *(("gemini-2.5-pro", "none"), ("gemini-3-flash-preview", "none"), ("gemini-2.0-flash", "low")),
        *(("gemma-3-27b-it", "low"), ("gemini-1.5-pro", "high"), ("gemini-2.5-flash", "a lot")),
    ],
)
def test_an_effort_that_the_model_has_not_is_refused_or_dropped(model: str, effort: str) -> None:
    with pytest.raises(Unsupported) as refused:
        native({"reasoning_effort": effort}, model)
    assert refused.value.param == "reasoning_effort"
    assert config({"reasoning_effort": effort}, model, drop=["reasoning_effort"]) == {}


@pytest.mark.parametrize(
    ("model", "generation", "pro"),
    [
        *(("gemini-2.5-pro-preview-05-06", (2, 5), True), ("gemini-3-pro", (3, 0), True), ("gemini-pro", (1, 0), True)),
        *(("gemini-2.0-flash-001", (2, 0), False), ("gemini-pro-latest", (99, 0), True), ("gpt-4", (0, 0), False)),
        *(("gemini-exp-1206", (1, 0), False), ("a/b/gemini-10.11-x", (10, 11), False)),
    ],
)
def test_a_models_name_says_its_generation(model: str, generation: tuple[int, int], pro: bool) -> None:
    traits = traits_of(model)
    assert (traits.generation, traits.pro) == (generation, pro)


# -- Google's own extras ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["thinking_config", "thinkingConfig"])
def test_googles_own_extras_pass_in_either_spelling(spelling: str) -> None:
    safety = [{"category": "HARM_CATEGORY_HARASSMENT", "threshold": "BLOCK_NONE"}]
    google = {spelling: {"thinking_budget": 5, "includeThoughts": True}}
    told = native({"google": google, "safety_settings": safety})
    assert told["generationConfig"] == {"thinkingConfig": {"thinkingBudget": 5, "includeThoughts": True}}
    assert told["safetySettings"] == safety
    assert native({"google": {"safety_settings": safety, "labels": {"a": "b"}}})["labels"] == {"a": "b"}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"google": 5}, "google"),
        ({"google": {"thinking_config": 5}}, "google.thinking_config"),
        ({"google": {"thinking_config": {"budget": 5}}}, "google.thinking_config"),
        ({"google": {"thinking_config": {}}, "reasoning_effort": "low"}, "reasoning_effort"),
        ({"top_k": "5"}, "top_k"),
        ({"top_k": True}, "top_k"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages"),
        ({"messages": [USER, RESULT]}, "messages[1].tool_call_id"),
    ],
)
def test_what_is_no_request_is_told_by_name(body: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        native(body)
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logit_bias": {"1": 5}}, "logit_bias"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "x", "format": "wav"}}, "audio"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"verbosity": "low"}, "verbosity"),
        ({"some_new_field": 1}, "some_new_field"),
        ({"google": {"generation_config": {"maxOutputTokens": 9}}}, "google.generation_config"),
        ({"google": {"generationConfig": {}}}, "google.generation_config"),
        ({"tools": [TOOL], "parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"tools": [{"type": "google_search"}]}, "tools"),
        ({"tools": [{"googleSearch": {}}]}, "tools"),
        ({"messages": [{**USER, "name": "ann"}]}, "messages[0].name"),
        ({"messages": [USER, {"role": "assistant", "audio": {"id": "a"}, "content": "x"}]}, "messages[1].audio"),
        ({"messages": [{"role": "system", "content": [IMAGE]}, USER]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [FILE]}, USER]}, "messages[0].content"),
    ],
)
def test_what_google_cannot_do_is_refused_by_name_or_dropped(body: dict[str, Any], param: str) -> None:
    with pytest.raises(Unsupported) as refused:
        native(body)
    assert refused.value.param == param
    assert native(body, drop=["*"])["contents"]


def test_parallel_calls_are_what_google_does_anyway() -> None:
    assert native({"tools": [TOOL], "parallel_tool_calls": True}) == native({"tools": [TOOL]})
    assert "tools" not in native({"parallel_tool_calls": False})


# -- tools ------------------------------------------------------------------------------------------------------------


def test_functions_keep_their_json_schema() -> None:
    told = native({"tools": [TOOL, {"type": "function", "function": {"name": "bare", "strict": True}}]})
    first, second = told["tools"][0]["functionDeclarations"]
    assert first == {"name": "f", "description": "does f", "parametersJsonSchema": FUNCTION["parameters"]}
    assert second == {"name": "bare"}
    assert "toolConfig" not in told


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("auto", {"mode": "AUTO"}),
        ("none", {"mode": "NONE"}),
        ("required", {"mode": "ANY"}),
        ({"type": "function", "function": {"name": "f"}}, {"mode": "ANY", "allowedFunctionNames": ["f"]}),
    ],
)
def test_tool_choice_is_a_calling_mode(choice: Any, expected: dict[str, Any]) -> None:
    told = native({"tools": [TOOL], "tool_choice": choice})
    assert told["toolConfig"] == {"functionCallingConfig": expected}


@pytest.mark.parametrize("tool", [{"codeExecution": {}}, {"code_execution": {}}, {"type": "code_execution"}])
def test_googles_own_tools_that_cost_only_tokens_pass(tool: dict[str, Any]) -> None:
    assert native({"tools": [tool]})["tools"] == [{"codeExecution": {}}]
    assert len(native({"tools": [TOOL, tool]})["tools"]) == 2


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"google": {"cached_content": "cachedContents/x"}}, "google.cached_content"),
        ({"tools": [{"url_context": {}}]}, "tools"),
    ],
)
def test_what_adds_to_the_prompt_unseen_is_refused(body: dict[str, Any], param: str) -> None:
    with pytest.raises(Unsupported) as refused:
        native(body)
    assert refused.value.param == param
