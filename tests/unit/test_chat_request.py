"""Reading an OpenAI chat request for codecs that translate: everything is read, kept or named in an error."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from providers.chat_request import (
    BOOKKEEPING,
    PARTS_MAX,
    Audio,
    BadRequest,
    Chat,
    File,
    Image,
    Refusal,
    ResponseFormat,
    Text,
    Tool,
    ToolChoice,
    ToolUse,
    Unsupported,
    read_chat,
    refuse_fields,
    refuse_names,
    refuse_rest,
)
from providers.codec import ChatCall, Upstream
from providers.registry import wire

NONE: frozenset[str] = frozenset()


def read(**members: Any) -> Chat:
    return read_chat(json.dumps({"model": "m", "messages": [{"role": "user", "content": "Hi"}], **members}).encode())


def part(value: Any) -> Any:
    (message,) = read(messages=[{"role": "user", "content": [value]}]).messages
    (only,) = message.parts
    return only


def refused(**members: Any) -> str:
    with pytest.raises(BadRequest) as caught:
        read(**members)
    assert caught.value.message.startswith("'")
    return caught.value.param


def test_the_plain_members_are_read() -> None:
    chat = read(
        temperature=0.5,
        top_p=1,
        seed=7,
        n=2,
        user="u",
        stream=True,
        reasoning_effort="low",
        frequency_penalty=0.1,
        presence_penalty=-1,
        parallel_tool_calls=False,
        stop="END",
    )
    assert (chat.model, chat.temperature, chat.top_p, chat.seed, chat.n) == ("m", 0.5, 1, 7, 2)
    assert (chat.user, chat.stream, chat.reasoning_effort, chat.stop) == ("u", True, "low", ["END"])
    assert (chat.frequency_penalty, chat.presence_penalty, chat.parallel_tools) == (0.1, -1, False)
    assert chat.rest == {}


def test_null_is_as_absent() -> None:
    names = ("temperature", "stop", "tools", "tool_choice", "response_format", "max_tokens", "n", "stream", "user")
    chat = read(**dict.fromkeys(names))
    assert chat == read()
    assert chat.n == 1


@pytest.mark.parametrize(
    ("limits", "expected"),
    [({}, None), ({"max_tokens": 5}, 5), ({"max_tokens": 5, "max_completion_tokens": 3}, 3), ({"max_tokens": 4.0}, 4)],
)
def test_the_smaller_limit_counts(limits: dict[str, Any], expected: int | None) -> None:
    assert read(**limits).max_tokens == expected


def test_text_in_both_forms() -> None:
    assert part({"type": "text", "text": "a"}) == part("a") == Text("a")
    assert part({"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}).cache == {"type": "ephemeral"}
    assert read().messages[0].parts == [Text("Hi")]
    assert read().messages[0].text() == "Hi"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"url": "https://x/y.png", "detail": "low"}, Image("https://x/y.png", None, None, "low")),
        ("https://x/y.png", Image("https://x/y.png")),
        ({"url": "data:image/PNG;base64,QUJD"}, Image(None, "image/png", "QUJD")),
        ({"url": "data:image/png;charset=x;base64,QUJD"}, Image(None, "image/png", "QUJD")),
        ({"url": "data:;base64,QUJD"}, Image(None, None, "QUJD")),
    ],
)
def test_images_are_addresses_or_data(value: Any, expected: Image) -> None:
    assert part({"type": "image_url", "image_url": value}) == expected


def test_audio_is_data_in_a_format() -> None:
    assert part({"type": "input_audio", "input_audio": {"data": "QUJD", "format": "mp3"}}) == Audio("QUJD", "mp3")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"file_id": "file-1"}, File(file_id="file-1")),
        ({"file_id": "https://x/a.pdf"}, File(url="https://x/a.pdf")),
        ({"filename": "a.pdf", "file_data": "QUJD"}, File("a.pdf", None, "QUJD")),
        ({"file_data": "data:application/pdf;base64,QUJD"}, File(None, "application/pdf", "QUJD")),
        ({"file_data": "https://x/a.pdf"}, File(url="https://x/a.pdf")),
    ],
)
def test_files_are_data_addresses_or_ids(value: Any, expected: File) -> None:
    assert part({"type": "file", "file": value}) == expected


def test_videos_are_files_of_their_type() -> None:
    assert part({"type": "video_url", "video_url": {"url": "https://x/a"}}) == File(
        media_type="video/mp4", url="https://x/a"
    )


def test_an_assistants_message_keeps_calls_refusal_reasoning_and_unknown_members() -> None:
    call = {"id": "c", "type": "function", "index": 0, "function": {"name": "f", "arguments": "{}"}}
    extra = {"extra_content": {"google": {"thought_signature": "s"}}}
    answer = {
        "role": "assistant",
        "content": None,
        "refusal": "No.",
        "reasoning": "hm",
        "reasoning_details": [{"a": 1}],
    }
    message = read(messages=[{**answer, "tool_calls": [{**call, **extra}], "audio": None}]).messages[0]
    assert message.parts == [Refusal("No.")]
    assert message.tool_uses == [ToolUse("c", "f", "{}", extra)]
    assert (message.reasoning, message.extra) == ("hm", {"reasoning_details": [{"a": 1}]})


@pytest.mark.parametrize(
    ("given_", "expected"), [('{"a":1}', '{"a":1}'), ({"a": 1}, '{"a":1}'), (None, "{}"), ("", "")]
)
def test_arguments_are_text(given_: Any, expected: str) -> None:
    call = {"id": "c", "function": {"name": "f", "arguments": given_}}
    assert read(messages=[{"role": "assistant", "tool_calls": [call]}]).messages[0].tool_uses[0].arguments == expected


def test_the_older_function_calls_become_tool_calls() -> None:
    chat = read(
        functions=[{"name": "f", "parameters": {"type": "object"}}],
        function_call={"name": "f"},
        messages=[
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
            {"role": "function", "name": "f", "content": "1"},
        ],
    )
    (use,) = chat.messages[1].tool_uses
    assert (chat.messages[2].role, chat.messages[2].tool_call_id) == ("tool", use.id)
    assert chat.tools == [Tool("f", None, {"type": "object"})]
    assert chat.tool_choice == ToolChoice("named", "f")


def test_tools_are_read_with_their_unknown_members() -> None:
    function = {"name": "f", "description": "d", "parameters": {"a": 1}, "strict": True, "new": 2}
    chat = read(tools=[{"type": "function", "function": function, "cache_control": {"type": "ephemeral"}}])
    assert chat.tools == [Tool("f", "d", {"a": 1}, True, {"cache_control": {"type": "ephemeral"}, "new": 2})]


def test_custom_tools_are_refused_and_native_ones_only_taken_where_asked() -> None:
    custom = {"type": "custom", "custom": {"name": "c"}}
    search = {"type": "web_search_20250305", "name": "web_search"}
    for tool in (custom, search):
        with pytest.raises(Unsupported) as caught:
            read(tools=[tool])
        assert caught.value.param == "tools"
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "Hi"}], "tools": [search]}).encode()
    assert read_chat(body, native_tools=True).native_tools == [search]
    with pytest.raises(Unsupported):
        read_chat(body.replace(json.dumps(search).encode(), json.dumps(custom).encode()), native_tools=True)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *[(mode, ToolChoice(mode)) for mode in ("auto", "none", "required")],
        ({"type": "function", "function": {"name": "f"}}, ToolChoice("named", "f")),
        ({"type": "function", "name": "f"}, ToolChoice("named", "f")),
    ],
)
def test_tool_choices(value: Any, expected: ToolChoice) -> None:
    assert read(tool_choice=value).tool_choice == expected


def test_allowed_tools_are_the_only_ones_left() -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in "fgh"]
    only = {"mode": "required", "tools": [{"type": "function", "function": {"name": "g"}}]}
    chat = read(tools=tools, tool_choice={"type": "allowed_tools", "allowed_tools": only})
    assert ([tool.name for tool in chat.tools], chat.tool_choice) == (["g"], ToolChoice("required"))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"type": "text"}, ResponseFormat("text")),
        ({"type": "json_object"}, ResponseFormat("json_object")),
        (
            {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True}},
            ResponseFormat("json_schema", "n", {"type": "object"}, True),
        ),
    ],
)
def test_response_formats(value: Any, expected: ResponseFormat) -> None:
    assert read(response_format=value).response_format == expected


@pytest.mark.parametrize(
    ("members", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": ["a"]}, "messages[0]"),
        ({"messages": [{"role": "robot"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "smell"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}]}]},
            "messages[0].content[0].image_url.url",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_data": "data:,x"}}]}]},
            "messages[0].content[0].file.file_data",
        ),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].function"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tool_choice": "maybe"}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"n": True}, "n"),
        ({"stop": [1]}, "stop"),
        ({"stream": 1}, "stream"),
    ],
)
def test_what_is_not_openais_is_refused_by_name(members: dict[str, Any], param: str) -> None:
    assert refused(**members) == param


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'"a"', b"\xff", b"[" * 5000])
def test_a_body_that_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(BadRequest):
        read_chat(body)


@pytest.mark.parametrize(
    "members",
    [
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * PARTS_MAX}]},
        {"messages": [{"role": "user", "content": ["x"] * 100}] * (PARTS_MAX // 100)},
        {"messages": [{"role": "assistant", "thinking_blocks": [{}] * PARTS_MAX}]},
        {"tools": [{"type": "function", "function": {"name": "f"}}] * PARTS_MAX},
    ],
    ids=["one message", "many messages", "thinking", "tools"],
)
def test_more_parts_than_are_translated_are_refused(members: dict[str, Any]) -> None:
    read(**members)
    more = [*members.get("messages", []), {"role": "user", "content": ["y"]}]
    with pytest.raises(BadRequest) as caught:
        read(**{**members, "messages": more})
    assert (caught.value.param, str(PARTS_MAX) in caught.value.message) == ("messages", True)


@pytest.mark.parametrize("codec", ["anthropic", "gemini", "bedrock"])
@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_a_messages_name_is_refused_unless_the_configuration_drops_it(codec: str, role: str) -> None:
    named = [{"role": "user", "content": "a"}, {"role": role, "content": "b", "name": "ann"}]
    body = json.dumps({"model": "m", "messages": named}).encode()
    call = ChatCall(body, "m", stream=False)
    with pytest.raises(Unsupported) as caught:
        wire(codec).codec(Upstream("p", codec, b"/v1"), call).request(call, "r")
    assert caught.value.param == "messages[1].name"
    for drop in ("messages.name", "*"):
        out = wire(codec).codec(Upstream("p", codec, b"/v1", drop=frozenset((drop,))), call).request(call, "r")
        assert b"ann" not in out.body


def test_a_tools_name_is_that_of_its_call() -> None:
    calls = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    refuse_names(
        read(
            messages=[
                {"role": "user", "content": "a", "name": ""},
                {"role": "assistant", "tool_calls": calls},
                {"role": "tool", "tool_call_id": "c", "content": "b", "name": "f"},
            ]
        ),
        NONE,
    )


def test_the_rest_passes_is_left_out_or_is_refused() -> None:
    chat = read(thinking={"type": "enabled"}, store=True, logit_bias={}, logprobs=False, prediction=None, top_k=None)
    assert refuse_rest(chat, frozenset(("thinking", "top_k")), BOOKKEEPING, NONE) == {"thinking": {"type": "enabled"}}
    chat = read(logit_bias={"1": 2}, logprobs=True)
    with pytest.raises(Unsupported) as caught:
        refuse_rest(chat, NONE, BOOKKEEPING, frozenset(("logprobs",)))
    assert caught.value.param == "logit_bias"
    assert refuse_rest(chat, NONE, BOOKKEEPING, frozenset(("logprobs", "logit_bias"))) == {}
    assert refuse_rest(chat, NONE, BOOKKEEPING, frozenset("*")) == {}


def test_fields_that_are_set_to_something_are_refused() -> None:
    names = ("n", "seed", "frequency_penalty")
    refuse_fields(read(n=1, frequency_penalty=0), names, NONE)
    for name in names:
        chat = read(**{name: 2})
        with pytest.raises(Unsupported) as caught:
            refuse_fields(chat, names, NONE)
        assert caught.value.param == name
        refuse_fields(chat, names, frozenset((name,)))


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "content", "type", "text", "function", "name", "arguments", "id", "image_url", "url"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=10,
)
_NAMES = st.sampled_from(
    ["messages", "tools", "tool_choice", "response_format", "stop", "n", "max_tokens", "functions", "function_call"]
)


@settings(deadline=None)
@given(st.dictionaries(_NAMES, _JSON, max_size=4), _JSON)
def test_no_body_raises_anything_else(members: dict[str, Any], content: Any) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": content}], **members}
    try:
        read_chat(msgspec.json.encode(body), native_tools=True)
    except (BadRequest, Unsupported) as error:
        assert error.param  # noqa: PT017  # either may come, and both name what is at fault
