"""Which broken streams can be continued, and what the next attempt is asked."""

from __future__ import annotations

import json
from typing import Any, get_args

import msgspec
import pytest

from config.kinds import KINDS, Continuation
from config.providers import Provider
from providers.continuation import DELIVERED_BYTES_MAX, Delivered, continuable, continued_body, style_for
from providers.events import Channel, Chunk, Delta
from providers.json_root import NotAnObject, RootObject
from providers.seam import Style, anchor_of
from tests.support.seams import STORY, through

STYLES: tuple[Style, ...] = get_args(Style)
BODY = b'{ "model":"m", "messages":[ {"role":"user","content":"Tell \\u00e9"} ] ,"max_tokens":100, "x":1.0}'


def sent(
    style: Style, delivered: str = "Once upon ", spent: int = 0, body: bytes = BODY
) -> tuple[bytes, dict[str, Any]]:
    made = continued_body(RootObject(body), delivered, style, spent)
    return made, json.loads(made)


@pytest.mark.parametrize("style", STYLES)
def test_every_other_byte_of_the_request_stays(style: Style) -> None:
    made, _ = sent(style)
    assert made.startswith(b'{ "model":"m", "messages":[ {"role":"user","content":"Tell \\u00e9"},{')
    assert b'] ,"max_tokens":100, "x":1.0' in made


@pytest.mark.parametrize(
    ("style", "messages", "members"),
    [
        ("prefill", [{"role": "assistant", "content": "Once upon"}], {}),
        ("prefix", [{"role": "assistant", "content": "Once upon", "prefix": True}], {}),
        (
            "continue_final",
            [{"role": "assistant", "content": "Once upon"}],
            {"continue_final_message": True, "add_generation_prompt": False},
        ),
    ],
)
def test_a_provider_that_can_goes_on_with_the_message_itself(
    style: Style, messages: list[dict[str, Any]], members: dict[str, Any]
) -> None:
    _, body = sent(style)
    assert body.pop("messages")[1:] == messages
    assert body == {"model": "m", "max_tokens": 100, "x": 1.0, **members}


def test_any_other_is_asked_to_begin_with_the_last_words() -> None:
    _, body = sent("instruction", STORY + "\n")
    assert body["messages"][1] == {"role": "assistant", "content": STORY + "\n"}
    assert body["messages"][2]["role"] == "user"
    assert f"\n<last_words>{anchor_of(STORY)}</last_words>\n" in body["messages"][2]["content"]


@pytest.mark.parametrize("style", STYLES)
def test_white_space_alone_is_asked_for_anew(style: Style) -> None:
    assert sent(style, "\n\n")[1] == {**json.loads(BODY), "messages": json.loads(BODY)["messages"]}
    assert through("\n\n", style, ["\n", "\nOnce"]) == "Once"


@pytest.mark.parametrize(("spent", "left"), [(0, 100), (30, 70), (99, 1), (500, 1)])
def test_output_limits_hold_for_all_attempts_together(spent: int, left: int) -> None:
    assert sent("prefill", spent=spent)[1]["max_tokens"] == left
    both = b'{"messages":[{"role":"user"}],"max_completion_tokens":200,"max_tokens":null}'
    _, body = sent("prefill", spent=spent, body=both)
    assert (body["max_completion_tokens"], body["max_tokens"]) == (max(1, 200 - spent), None)


def test_a_body_without_messages_is_refused() -> None:
    with pytest.raises(NotAnObject):
        sent("prefill", body=b'{"messages":7}')


STYLE_ROWS: list[tuple[Style, str, dict[str, Any], Style]] = [
    ("prefill", "claude-sonnet-4-5", {}, "prefill"),
    ("prefill", "claude-opus-4-20250514", {}, "prefill"),
    ("prefill", "claude-3-5-haiku-20241022", {}, "prefill"),
    ("prefill", "claude-opus-4-6", {}, "instruction"),
    ("prefill", "anthropic/claude-sonnet-4.6", {}, "instruction"),
    ("prefill", "claude-sonnet-5", {}, "instruction"),
    ("prefill", "claude-latest", {}, "instruction"),
    ("prefill", "claude-sonnet-4-5", {"reasoning_effort": "low"}, "instruction"),
    ("prefill", "claude-sonnet-4-5", {"reasoning_effort": "none"}, "prefill"),
    ("prefill", "claude-sonnet-4-5", {"thinking": {"type": "enabled", "budget_tokens": 2000}}, "instruction"),
    ("prefill", "claude-sonnet-4-5", {"thinking": {"type": "disabled"}}, "prefill"),
    ("prefill", "gemini-2.5-pro", {}, "prefill"),
    ("prefill", "gemini-3.6-flash", {}, "instruction"),
    ("prefill", "llama3.2", {}, "prefill"),
    ("prefix", "mistral-large", {"reasoning_effort": "low"}, "prefix"),
    ("continue_final", "claude-opus-4-6", {}, "continue_final"),
    ("instruction", "claude-sonnet-4-5", {}, "instruction"),
]


@pytest.mark.parametrize(("kind_style", "model", "members", "style"), STYLE_ROWS)
def test_models_that_refuse_a_prefill_are_asked_in_words(
    kind_style: Style, model: str, members: dict[str, Any], style: Style
) -> None:
    assert style_for(kind_style, model, RootObject(json.dumps(members).encode())) == style


def test_kinds_say_how_they_are_asked_and_a_table_wins() -> None:
    assert get_args(Continuation) == STYLES
    assert {name: kind.continuation for name, kind in KINDS.items() if kind.continuation != "instruction"} == {
        "anthropic": "prefill",
        "ollama": "prefill",
        "mistral": "prefix",
        "vllm": "continue_final",
        "llamacpp": "continue_final",
    }
    assert msgspec.convert({"kind": "mistral"}, Provider).continuation == "prefix"
    assert msgspec.convert({"kind": "deepseek", "continuation": "prefix"}, Provider).continuation == "prefix"
    assert msgspec.convert({"kind": "deepseek"}, Provider).continuation == "instruction"


def written(*chunks: Chunk) -> Delivered:
    delivered = Delivered()
    for chunk in chunks:
        delivered.add(chunk)
    return delivered


def piece(text: str, channel: Channel = Channel.CONTENT, choice: int = 0) -> Chunk:
    return Chunk(b'{"id":"a"}', [Delta(choice, channel, 0, text)], content=True)


def request(**members: Any) -> RootObject:
    return RootObject(json.dumps({"messages": [{"role": "user", "content": "Hi"}], **members}).encode())


def test_plain_text_of_one_choice_can_be_continued() -> None:
    delivered = written(Chunk(b'{"id":"role"}'), piece("Once "), piece("upon"))
    assert (delivered.text, delivered.first) == ("Once upon", b'{"id":"a"}')
    plain = {"n": 1, "tools": [], "logprobs": False, "response_format": {"type": "text"}, "modalities": ["text"]}
    for members in ({}, plain, {"n": None, "tools": None, "stop": ["\n"], "max_tokens": 5}):
        assert continuable(request(**members), delivered), members


@pytest.mark.parametrize(
    "members",
    [
        {"n": 2},
        {"tools": [{"type": "function"}]},
        {"functions": [{"name": "f"}]},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema"}},
        {"response_format": "text"},
        {"audio": {"voice": "alloy"}},
        {"modalities": ["text", "audio"]},
        {"logprobs": True},
        {"prediction": {"type": "content"}},
        {"web_search_options": {"search_context_size": "low"}},
        {"messages": [{"role": "user"}, {"role": "assistant", "content": "Once"}]},
        {"messages": []},
        {"messages": [7]},
    ],
)
def test_a_request_for_more_than_one_text_cannot(members: dict[str, Any]) -> None:
    assert not continuable(request(**members), written(piece("Once")))


@pytest.mark.parametrize(
    "chunks",
    [
        [],
        [Chunk(b"{}")],
        [piece("Hm", Channel.REASONING), piece("Once")],
        [piece("Once"), piece("f", Channel.TOOL_NAME)],
        [piece("No", Channel.REFUSAL)],
        [piece("Once", choice=1)],
        [piece("Once"), Chunk(b"{}", finished=(0,), content=True)],
        [Chunk(b'{"choices":[{"delta":{"content":[{"type":"thinking"}]}}]}', [Delta(0, Channel.CONTENT, 0, "Hm")])],
        [piece("x" * DELIVERED_BYTES_MAX), piece("y")],
        [piece("\u00e9" * (DELIVERED_BYTES_MAX // 2)), piece("y")],
        [piece("Once" + " " * 300)],
    ],
)
def test_what_is_more_than_unfinished_text_cannot(chunks: list[Chunk]) -> None:
    assert not continuable(request(), written(*chunks))


def test_a_doubled_field_cannot() -> None:
    root = RootObject(b'{"messages":[{"role":"user"}],"n":2,"n":1}')
    assert not continuable(root, written(piece("Once")))
