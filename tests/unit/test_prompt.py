"""Prompt estimates: exact for text, never below the truth for the rest, and never an exception."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metering.prompt import (
    _ROLE_TOKENS,
    FILE_TOKENS_MAX,
    FILE_TOKENS_UNKNOWN,
    IMAGE_TOKENS_ORIGINAL,
    VIDEO_TOKENS_MAX,
    PromptEstimate,
    estimate_prompt,
)
from metering.ranks import encoding
from metering.token_counter import count_text
from metering.tool_text import prompt_bytes, render_tools

O200K = encoding("o200k_base")
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.\nNow.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Its name"},
                "unit": {"enum": ["C", "F", 3]},
                "days": {"type": "integer", "default": 1},
                "spots": {"type": "array", "items": {"type": "object", "properties": {"x": {"type": "number"}}}},
                "when": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "kind": {"type": ["string", "null"]},
                "where": {"$ref": "#/$defs/Place"},
            },
            "required": ["city"],
            "$defs": {"Place": {"type": "object", "properties": {"name": {"type": "string"}}}},
        },
    },
}


def n(text: str) -> int:
    return count_text(O200K, text)


def tokens(model: str, messages: object, **more: Any) -> int:
    return estimate_prompt(O200K, model, messages, **more).tokens


def test_recorded_prompts_of_a_real_provider_come_out_to_the_token() -> None:
    capital = [{"role": "user", "content": "What is the capital of Mexico?"}]
    assert estimate_prompt(O200K, "gpt-4o", capital)[:2] == (14, "counted")


@pytest.mark.parametrize(
    "model", ["gpt-4o", "gpt-4o-mini", "gpt-4.1", "gpt-4.5-preview", "mock-model", "ft:gpt-4o:a::b"]
)
def test_a_text_prompt_costs_three_around_each_message_and_three_at_the_end(model: str) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tell me about Rome."}]
    expected = 3 + 1 + n("Be brief.") + 3 + 1 + n("Tell me about Rome.") + 3
    assert estimate_prompt(O200K, model, messages)[:2] == (expected, "counted")


@pytest.mark.parametrize(
    "model", ["o3-mini", "o1", "gpt-5", "gpt-5.6-sol", "gpt-6.1-terra", "openai/gpt-5-pro", "gpt-10"]
)
def test_newer_families_take_two_at_the_end(model: str) -> None:
    assert tokens(model, [{"role": "user", "content": "hi"}]) == 3 + 1 + 1 + 2


def test_a_name_costs_itself_and_one() -> None:
    assert tokens("gpt-4o", [{"role": "user", "name": "Alice", "content": "hi"}]) == 5 + 1 + n("Alice") + 3


def test_text_parts_count_one_by_one_and_stay_exact() -> None:
    parts = [{"type": "text", "text": "inter"}, {"type": "text", "text": "national"}]
    assert estimate_prompt(O200K, "gpt-4o", [{"role": "user", "content": parts}])[:2] == (
        4 + n("inter") + n("national") + 3,
        "counted",
    )


def test_null_fields_and_call_ids_cost_nothing() -> None:
    plain = tokens("gpt-4o", [{"role": "tool", "content": "21 degrees"}])
    message = {"role": "tool", "content": "21 degrees", "tool_call_id": "call_abc", "name": None, "refusal": None}
    assert estimate_prompt(O200K, "gpt-4o", [message])[:2] == (plain, "counted")


def test_earlier_tool_calls_count_names_and_arguments() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Rome"}'}}
    estimate = estimate_prompt(O200K, "gpt-4o", [{"role": "assistant", "content": None, "tool_calls": [call, call]}])
    assert estimate[:2] == (4 + 2 * (8 + n("get_weather") + n('{"city":"Rome"}')) + 3, "estimated")
    legacy = {"role": "assistant", "function_call": call["function"]}
    assert tokens("gpt-4o", [legacy]) == 4 + 8 + n("get_weather") + n('{"city":"Rome"}') + 3


def test_tools_are_rendered_as_the_models_see_them() -> None:
    assert render_tools([WEATHER]) == (
        "namespace functions {\n\n// Weather of a city.\n// Now.\ntype get_weather = (_: {\n// Its name\n"
        "city: string,\n"
        'unit?: "C" | "F" | 3,\ndays?: number, // default: 1\nspots?: {\nx?: number,\n}[],\nwhen?: string | null,\n'
        "kind?: string | null,\nwhere?: #/$defs/Place,\n}) => any;\n\n{\nname?: string,\n}\n} // namespace functions"
    )
    assert render_tools([{"function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}]) == (
        "namespace functions {\n\ntype now = () => any;\n\n} // namespace functions"
    )
    assert render_tools([], None) == render_tools(None) == ""


@pytest.mark.parametrize(
    ("model", "system", "constant"), [("gpt-4o", False, 9), ("gpt-4o", True, 4), ("gpt-5", True, 89)]
)
def test_tools_add_their_rendering_and_the_models_constant(model: str, system: bool, constant: int) -> None:
    messages = [{"role": "user", "content": "hi"}]
    if system:
        messages.insert(0, {"role": "developer", "content": "x"})
    estimate = estimate_prompt(O200K, model, messages, tools=[WEATHER])
    assert estimate[:2] == (tokens(model, messages) + n(render_tools([WEATHER])) + constant, "estimated")
    assert tokens(model, messages, functions=[WEATHER["function"]]) == estimate.tokens


def test_a_response_schema_counts() -> None:
    messages = [{"role": "user", "content": "hi"}]
    schema = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object"}}}
    assert estimate_prompt(O200K, "gpt-4o", messages, response_format=schema)[:2] > (8 + 10, "estimated")
    assert estimate_prompt(O200K, "gpt-4o", messages, response_format={"type": "text"})[:2] == (8, "counted")


@pytest.mark.parametrize(
    ("model", "detail", "expected"),
    [
        ("gpt-4o", None, 1445),
        ("gpt-4o", "low", 85),
        ("gpt-4.1", "auto", 1445),
        ("gpt-4o-mini", "high", 48169),
        ("gpt-4.1-mini", None, 2489),
        ("o3", "low", 75),
        ("o4-mini", None, 2642),
        ("gpt-5.1", None, 1190),
        ("gpt-5.6-sol", None, 3000),
        ("gpt-6.1-sol", "original", IMAGE_TOKENS_ORIGINAL),
        ("unknown", None, 3000),
    ],
)
def test_an_image_counts_as_the_largest_one_of_its_model(model: str, detail: str | None, expected: int) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 100_000, "detail": detail}}
    empty = tokens(model, [{"role": "user", "content": []}])
    assert estimate_prompt(O200K, model, [{"role": "user", "content": [part]}])[:2] == (empty + expected, "estimated")


def test_audio_and_files_count_by_their_size_or_a_constant() -> None:
    def of(part: dict[str, Any]) -> int:
        return tokens("gpt-4o", [{"role": "user", "content": [part]}]) - tokens("gpt-4o", [{"role": "user"}])

    assert of({"type": "input_audio", "input_audio": {"data": "A" * 640_000, "format": "mp3"}}) == 1201
    assert of({"type": "input_audio", "input_audio": {}}) == FILE_TOKENS_UNKNOWN + 1
    assert of({"type": "file", "file": {"file_id": "file-1"}}) == FILE_TOKENS_UNKNOWN
    assert of({"type": "file", "file": {"file_data": "A" * 40_000}}) == 11_000
    assert of({"type": "file", "file": {"file_data": "A" * 4_000_000}}) == FILE_TOKENS_MAX


KEYS = (
    *("role", "content", "name", "tool_calls", "type", "text", "image_url", "function", "arguments", "parameters", "x"),
    *("properties", "required", "enum", "anyOf", "items", "input_audio", "data", "file", "detail", "$defs", "default"),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(KEYS),
            inner | st.sampled_from(["text", "image_url", "input_audio", "file", "object", "array"]),
            max_size=5,
        )
    ),
    max_leaves=25,
)


@settings(max_examples=300, deadline=None)
@given(messages=JSON, tools=JSON, functions=JSON, response_format=JSON)
def test_no_decoded_json_raises_whatever_its_shape(
    messages: object, tools: object, functions: object, response_format: object
) -> None:
    for sizes, exact in ((None, 2**20), ({"tools": 10**6, "x": 9}, 0)):
        estimate = estimate_prompt(
            O200K,
            "gpt-4o",
            messages,
            tools=tools,
            functions=functions,
            response_format=response_format,
            sizes=sizes,
            exact_bytes_max=exact,
        )
        assert estimate.hold >= estimate.tokens >= 2
        assert estimate.kind in ("counted", "estimated")


@settings(max_examples=100, deadline=None)
@given(value=JSON.filter(lambda one: one not in (None, [], "")))
def test_what_has_no_rule_is_estimated_at_least_by_half_its_bytes(value: object) -> None:
    estimate = estimate_prompt(O200K, "gpt-4o", [{"role": "user", "new_field": value}])
    assert estimate[:2] == (4 + prompt_bytes(value) // 2 + 1 + 3, "estimated")


PLAIN = st.fixed_dictionaries(
    {"role": st.sampled_from(list(_ROLE_TOKENS)), "content": st.text(max_size=30) | st.sampled_from(list(_ROLE_TOKENS))}
)
NEARLY_PLAIN: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["a stranger", ""]), "content": st.text(max_size=9)}),
    st.fixed_dictionaries({"role": st.sampled_from([None, 5, []]), "content": st.text(max_size=9)}),
    st.fixed_dictionaries({"role": st.just("user"), "content": st.none() | st.integers() | st.lists(st.text())}),
    st.fixed_dictionaries({"content": st.text(max_size=9), "name": st.text(max_size=9)}),
    st.fixed_dictionaries({"role": st.just("user"), "content": st.text(max_size=9), "name": st.text(max_size=9)}),
    st.dictionaries(st.sampled_from(["role", "content"]), st.text(max_size=9), max_size=1),
)


@settings(max_examples=300, deadline=None)
@given(
    messages=st.lists(PLAIN, max_size=5) | st.lists(NEARLY_PLAIN, max_size=2) | st.lists(PLAIN | NEARLY_PLAIN) | JSON,
    model=st.sampled_from(["gpt-4o", "o3", "a/gpt-5", "ft:ft:o3", "FT:o1", ""]),
    sizes=st.none() | st.dictionaries(st.sampled_from(["model", "messages", "tools", "user"]), st.integers(0, 999)),
    exact=st.integers(0, 60) | st.just(2**20),
    tools=st.sampled_from([None, [], {}, 0, ""]),
)
def test_plain_messages_come_out_as_by_the_rules_for_all(
    messages: object, model: str, sizes: dict[str, int] | None, exact: int, tools: object
) -> None:
    """A member that nobody knows, of no bytes, adds nothing and leads through the rules."""

    def counted(sizes: dict[str, int] | None) -> PromptEstimate:
        return estimate_prompt(O200K, model, messages, tools=tools, sizes=sizes, exact_bytes_max=exact)

    assert counted(sizes) == counted({**(sizes or {}), "unknown": 0})


def test_a_schema_as_deep_as_a_body_may_be_does_not_exhaust_the_stack() -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(500):
        schema = {"type": "object", "properties": {"x": schema}}
    tool = {"function": {"name": "deep", "parameters": schema}}
    assert tokens("gpt-4o", [], tools=[tool]) > 64


def test_an_enormous_integer_in_a_schema_is_shortened() -> None:
    schema = {"type": "object", "properties": {"x": {"type": "integer", "default": 10**5000}}}
    assert tokens("gpt-4o", [], tools=[{"function": {"name": "f", "parameters": schema}}]) > 1000


def test_bytes_of_a_prompt_are_about_its_size_on_the_wire() -> None:
    assert prompt_bytes([{"role": "user", "content": "é" * 10}]) == 4 + 4 + 7 + 20
    assert prompt_bytes([1, None, True, ["x"]]) == 13


# -- Guards of holds --------------------------------------------------------------------------------------------------

HI = [{"role": "user", "content": "hi"}]
LONG = "word " * 10_000


def sized(messages: object = HI, **fields: Any) -> PromptEstimate:
    """The estimate of a request with these root members, as admission asks for it."""
    ruled = {name: fields[name] for name in ("tools", "functions", "response_format") if name in fields}
    sizes = {name: len(json.dumps(value)) for name, value in {"messages": messages, **fields}.items()}
    return estimate_prompt(O200K, "gpt-4o", messages, sizes=sizes, **ruled)


@pytest.mark.parametrize(
    "fields",
    [
        {"prediction": {"type": "content", "content": LONG}},
        {"documents": [LONG]},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"description": LONG}}}},
        {"response_format": {"type": "grammar", "grammar": LONG}},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"description": LONG}}}]},
        {"tools": [{"type": "function", "function": {"name": "f", "junk": LONG}}]},
        {"functions": [{"name": "f", "parameters": {"properties": {"x": {"type": "string", "pattern": LONG}}}}]},
    ],
)
def test_a_hold_covers_text_wherever_it_may_enter_the_prompt(fields: dict[str, Any]) -> None:
    estimate = sized(**fields)
    assert estimate.hold >= n(LONG)
    assert estimate.kind == "estimated"


@pytest.mark.parametrize(
    ("part", "most"),
    [
        ({"type": "file", "file": {"file_data": "https://a.example/x.pdf"}}, FILE_TOKENS_MAX),
        ({"type": "file", "file": {"file_url": "HTTPS://a.example/x.pdf"}}, FILE_TOKENS_MAX),
        ({"type": "video_url", "video_url": {"url": "https://a.example/x.mp4"}}, VIDEO_TOKENS_MAX),
        ({"type": "video_url", "video_url": {"url": "gs://a/x", "format": "application/pdf"}}, VIDEO_TOKENS_MAX),
    ],
)
def test_a_hold_covers_what_stands_at_an_address(part: dict[str, Any], most: int) -> None:
    estimate = sized([{"role": "user", "content": [part]}])
    assert estimate.hold >= most
    assert estimate.tokens < 2 * FILE_TOKENS_UNKNOWN  # what is charged where the provider says nothing
    assert estimate.kind == "estimated"


@pytest.mark.parametrize(
    "message",
    [
        {"role": "tool", "tool_call_id": LONG, "content": "x"},
        {"role": "user", "content": [{"type": "text", "text": "x", "junk": LONG}]},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}, "junk": LONG}]},
        {"role": "assistant", "tool_calls": [{"id": LONG, "function": {"name": "f", "arguments": "{}"}}]},
    ],
)
def test_a_hold_covers_text_in_odd_places_of_a_message(message: dict[str, Any]) -> None:
    estimate = sized([message])
    assert estimate.hold >= n(LONG)
    assert estimate.kind == "estimated"


def test_what_never_enters_the_prompt_is_not_held_for_and_text_stays_exact() -> None:
    free = {"metadata": {"x": LONG}, "user": LONG, "temperature": 0.5, "stop": ["x"], "logit_bias": {"1": 2}}
    few = {"seed": 7, "unknown": True, "response_format": {"type": "json_object"}}
    assert sized(**free, **few) == (8, "counted", 8)


def test_a_tools_rendering_is_held_for_where_it_is_the_larger() -> None:
    tool = {"function": {"name": "f", "description": "a b c d e f g " * 100}}
    estimate = sized(tools=[tool])
    assert estimate.hold == estimate.tokens
    assert sized(tools=[WEATHER]).hold > sized(tools=[WEATHER]).tokens


@pytest.mark.parametrize("text", ["word " * 500_000, "\u4f60" * 500_000, " " * 2**21], ids=["prose", "han", "blanks"])
def test_text_beyond_the_bound_is_estimated_high_from_its_bytes(text: str) -> None:
    estimate = estimate_prompt(O200K, "gpt-4o", [{"role": "user", "content": text}])
    assert estimate.kind == "estimated"
    assert estimate.tokens >= n(text)
    within = estimate_prompt(O200K, "gpt-4o", [{"role": "user", "content": text}], exact_bytes_max=2**22)
    assert within[:2] == (7 + n(text), "counted")


def test_text_in_many_messages_shares_one_bound() -> None:
    messages = [{"role": "user", "content": "word " * 100}] * 100
    few = estimate_prompt(O200K, "gpt-4o", messages, exact_bytes_max=5_000)
    assert few.kind == "estimated"
    assert few.tokens > 2 * tokens("gpt-4o", messages)


@pytest.mark.parametrize("name", ["o200k_base", "cl100k_base"])
def test_roles_have_the_tokens_that_are_written_down_for_them(name: str) -> None:
    assert {role: count_text(encoding(name), role) for role in _ROLE_TOKENS} == _ROLE_TOKENS
