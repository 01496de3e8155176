"""The chat request as the simulated provider reads it, and the answer it decides on.

Must not: know about sockets, frames or scripts. Counting rules: prompts as Sum(3 + n(role) + n(text content)) + 3, and
1 + n(name) for a named message (tools, images and past tool calls add nothing); completions as n(text) per choice and
channel, and n(name) + n(arguments) per tool call.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import msgspec

from loadtests.simulated_provider import text

TOKENS_MAX = 200_000
CHOICES_MAX = 128
_STEER = re.compile(r"\[\[(tokens|interval_ms|ttft_ms|say)=(.*?)\]\]", re.DOTALL)


class BadRequest(Exception):
    """The request is refused with OpenAI's error body."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status


@dataclass(slots=True, frozen=True)
class Chat:
    """The fields that change the answer. `steer` holds what the last user message says in `[[name=value]]`."""

    model: str
    stream: bool
    include_usage: bool
    obfuscate: bool
    choices: int
    limit: int | None
    prompt_tokens: int
    topic: str
    steer: dict[str, str]
    tools: tuple[dict[str, Any], ...]
    tool_choice: str | None  # none, auto, required, or the name of a function
    after_tool: bool
    answer_schema: Any  # None: free text


@dataclass(slots=True)
class Channel:
    """One counted text of one choice. `served` collects the pieces whose bytes were handed to the socket."""

    kind: str  # content, reasoning, refusal or tool
    text: str
    name: str = ""
    call_id: str = ""
    served: list[str] = field(default_factory=list)
    name_served: bool = False

    def tokens(self) -> int:
        return text.count(self.text) + (text.count(self.name) if self.name else 0)

    def served_tokens(self) -> int:
        return text.count("".join(self.served)) + (text.count(self.name) if self.name_served else 0)


@dataclass(slots=True)
class Choice:
    index: int
    channels: list[Channel]
    finish: str


@dataclass(slots=True)
class Answer:
    """Everything the model is going to say, and what it costs in tokens."""

    choices: list[Choice]
    prompt_tokens: int
    hidden_tokens: int = 0  # reasoning that is billed and never shown

    def channels(self) -> list[Channel]:
        return [channel for choice in self.choices for channel in choice.channels]

    def completion_tokens(self) -> int:
        return self.hidden_tokens + sum(channel.tokens() for channel in self.channels())

    def reasoning_tokens(self) -> int:
        return self.hidden_tokens + sum(c.tokens() for c in self.channels() if c.kind == "reasoning")


@dataclass(slots=True)
class Shape:
    """What a script wants the answer to be."""

    tool_calls: int = 0  # 0: only when the request leads to one
    tools_by_request: bool = True
    think_tokens: int = 0
    think_hidden: bool = False
    refuse: bool = False
    tokens: int | None = None


def _integer(body: dict[str, Any], name: str, low: int, high: int) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if type(value) is not int or not low <= value <= high:
        message = f"Invalid value for '{name}': expected an integer from {low} to {high}."
        raise BadRequest(message, name, "invalid_value")
    return value


def _said(content: Any) -> str:
    """The text of a message's content: a string, or the text parts of a list."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    parts = (part.get("text") for part in content if isinstance(part, dict))
    return "".join(part for part in parts if isinstance(part, str))


def prompt_tokens(messages: list[Any]) -> int:
    """The text-only rule of the gpt-4o family; see the module's docstring."""
    total = 3
    for message in messages:
        total += 3 + text.count(str(message.get("role", ""))) + text.count(_said(message.get("content")))
        if isinstance(message.get("name"), str):
            total += 1 + text.count(message["name"])
    return total


def _tool_choice(body: dict[str, Any]) -> str | None:
    value = body.get("tool_choice")
    if isinstance(value, dict):
        function = value.get("function")
        return str(function.get("name", "")) if isinstance(function, dict) else None
    return value if isinstance(value, str) else None


def _functions(body: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    tools = body.get("tools")
    found = (tool.get("function") for tool in tools if isinstance(tool, dict)) if isinstance(tools, list) else ()
    return tuple(f for f in found if isinstance(f, dict) and isinstance(f.get("name"), str))


def _schema(body: dict[str, Any]) -> Any:
    wanted = body.get("response_format")
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if kind == "json_object":
        return {"type": "object", "properties": {"answer": {"type": "string"}, "count": {"type": "integer"}}}
    if kind == "json_schema" and isinstance(wanted, dict) and isinstance(wanted.get("json_schema"), dict):
        return wanted["json_schema"].get("schema") or {"type": "object"}
    return None


def _decode(raw: bytes) -> dict[str, Any]:
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest("We could not parse the JSON body of your request.") from error
    if not isinstance(body, dict):
        raise BadRequest("The JSON body of your request must be an object.")
    return body


def parse(raw: bytes) -> Chat:
    """Read a request body. Raises BadRequest the way OpenAI answers 400."""
    body = _decode(raw)
    model, messages = body.get("model"), body.get("messages")
    if not isinstance(model, str) or not model:
        raise BadRequest("you must provide a model parameter", "model")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise BadRequest("Invalid 'messages': expected a non-empty array of objects.", "messages", "invalid_value")
    options = body.get("stream_options")
    options = options if isinstance(options, dict) else {}
    last = next((_said(m.get("content")) for m in reversed(messages) if m.get("role") == "user"), "")
    limit = _integer(body, "max_completion_tokens", 1, 10**9)
    return Chat(
        model=model,
        stream=body.get("stream") is True,
        include_usage=options.get("include_usage") is True,
        obfuscate=options.get("include_obfuscation") is not False,
        choices=_integer(body, "n", 1, CHOICES_MAX) or 1,
        limit=limit if limit is not None else _integer(body, "max_tokens", 1, 10**9),
        prompt_tokens=prompt_tokens(messages),
        topic=_STEER.sub("", last).strip(),
        steer=dict(_STEER.findall(last)),
        tools=_functions(body),
        tool_choice=_tool_choice(body),
        after_tool=messages[-1].get("role") == "tool",
        answer_schema=_schema(body),
    )


def _calls_wanted(chat: Chat, shape: Shape) -> int:
    if shape.tool_calls:
        return 0 if chat.after_tool else shape.tool_calls  # an agent's loop must end
    if not chat.tools or chat.tool_choice == "none":
        return 0
    forced = chat.tool_choice not in (None, "auto")
    return int(forced or (shape.tools_by_request and not chat.after_tool))


def _tool_channels(chat: Chat, calls: int, call_id: str) -> list[Channel]:
    tools = chat.tools or ({"name": "lookup", "parameters": {"properties": {"query": {"type": "string"}}}},)
    named = [tool for tool in tools if tool["name"] == chat.tool_choice]
    out = []
    for at in range(calls):
        tool = (named or tools)[at % len(named or tools)]
        arguments = text.as_json(text.sample(tool.get("parameters") or {"type": "object"}, chat.topic))
        arguments = arguments if arguments.startswith("{") else "{}"
        out.append(Channel("tool", arguments, text.clean(tool["name"]), f"call_{call_id}{at:02d}"))
    return out


def _spoken(chat: Chat, shape: Shape, index: int) -> str:
    if chat.answer_schema is not None:
        return text.as_json(text.sample(chat.answer_schema, chat.topic))
    if "say" in chat.steer:
        return text.clean(chat.steer["say"])
    return text.answer(chat.topic, index, shape.tokens)


def _limited(channels: list[Channel], limit: int | None, finish: str) -> tuple[list[Channel], str]:
    """Cut the channels, in their order, to exactly `limit` tokens altogether."""
    if limit is None or sum(channel.tokens() for channel in channels) <= limit:
        return channels, finish
    left, kept = limit, []
    for channel in channels:
        if channel.name:
            left -= text.count(channel.name)
        if left < 0 or (left == 0 and not channel.name):
            break
        channel.text = text.fit(channel.text, left)
        left -= text.count(channel.text)
        kept.append(channel)
    return kept, "length"


def _choice(chat: Chat, shape: Shape, index: int, call_id: str) -> Choice:
    channels: list[Channel] = []
    if shape.think_tokens and not shape.think_hidden:
        channels.append(Channel("reasoning", text.thoughts(chat.topic, index, shape.think_tokens)))
    calls, finish = _calls_wanted(chat, shape), "stop"
    if shape.refuse:
        channels.append(Channel("refusal", text.REFUSAL))
    elif calls:
        channels += _tool_channels(chat, calls, f"{call_id}{index:02d}")
        finish = "tool_calls"
    else:
        channels.append(Channel("content", _spoken(chat, shape, index)))
    hidden = shape.think_tokens if shape.think_hidden else 0
    limit = None if chat.limit is None else max(0, chat.limit - hidden)
    kept, finish = _limited(channels, limit, finish)
    return Choice(index, kept, finish)


def answer(chat: Chat, shape: Shape, call_id: str) -> Answer:
    """Decide on the whole answer. The same request and shape give the same text; only the ids differ."""
    choices = [_choice(chat, shape, index, call_id) for index in range(chat.choices)]
    hidden = shape.think_tokens if shape.think_hidden else 0
    hidden = hidden if chat.limit is None else min(hidden, chat.limit)
    return Answer(choices, chat.prompt_tokens, hidden * chat.choices)
