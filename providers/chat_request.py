"""A client's OpenAI chat request, read and checked for codecs that must say it in another language.

Must not: know a provider, drop anything silently, or model what it only passes on: members that nobody here reads are
kept as given (`extra`, `rest`). Null is as absent everywhere.
Shapes: OpenAI's API reference, "create chat completion".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

import msgspec

from providers.chat_members import Members
from providers.chat_parts import PARTS_MAX, Audio, File, Image, Part, Refusal, Text, check_parts, read_content
from providers.codec import BadRequest, Unsupported
from providers.refused import buys, reason

__all__ = [
    "BOOKKEEPING",
    "PARTS_MAX",
    "Audio",
    "BadRequest",
    "Chat",
    "File",
    "Image",
    "Message",
    "Part",
    "Refusal",
    "ResponseFormat",
    "Text",
    "Tool",
    "ToolChoice",
    "ToolUse",
    "Unsupported",
    "read_chat",
    "refuse",
    "refuse_fields",
    "refuse_names",
    "refuse_rest",
]

BOOKKEEPING = frozenset(
    (
        *("stream_options", "store", "metadata", "service_tier", "safety_identifier"),
        *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "prediction"),
    )
)
"""OpenAI's members without an effect on what is answered: what is stored about a call and under which name, which
queue it waits in, and hints that only make it faster or cheaper. Other providers may leave them out."""

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "modalities": (["text"],),
}
"""Values that ask for nothing."""

_encode = msgspec.json.Encoder().encode


class ToolUse(msgspec.Struct):
    """A call in an earlier answer. `arguments` is JSON as text; `extra` the call's other members."""

    id: str
    name: str
    arguments: str
    extra: dict[str, Any] = msgspec.field(default_factory=dict)

    def object(self) -> dict[str, Any]:
        """The arguments as an object. Others (a model may write such) are shown as they are, inside one."""
        try:
            given = msgspec.json.decode(self.arguments.encode()) if self.arguments.strip() else {}
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            given = None
        return given if isinstance(given, dict) else {"INVALID_JSON": self.arguments}


Role = Literal["system", "developer", "user", "assistant", "tool"]
_ROLES: dict[str, Role] = {role: role for role in get_args(Role)}


class Message(msgspec.Struct):
    """One message. `reasoning` is its thinking as text; `extra` its other members (signatures come back there)."""

    role: Role
    parts: list[Part] = msgspec.field(default_factory=list)
    tool_uses: list[ToolUse] = msgspec.field(default_factory=list)
    tool_call_id: str | None = None
    name: str | None = None
    reasoning: str | None = None
    extra: dict[str, Any] = msgspec.field(default_factory=dict)

    def text(self) -> str:
        """All its text parts as one."""
        return "".join(part.text for part in self.parts if isinstance(part, Text | Refusal))


class Tool(msgspec.Struct):
    """A function. `parameters` is its JSON schema; `extra` the tool's other members."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    extra: dict[str, Any] = msgspec.field(default_factory=dict)


class ToolChoice(msgspec.Struct):
    """`name` where the mode is "named"."""

    mode: Literal["auto", "none", "required", "named"]
    name: str | None = None


class ResponseFormat(msgspec.Struct):
    """`schema` is a JSON schema where the kind is "json_schema"."""

    kind: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class Chat(msgspec.Struct):
    """A whole request. `max_tokens` is the smaller of its two limits; `native_tools` are tools of other types, as
    given; `rest` every member of the root that is not read here, as given."""

    model: str
    messages: list[Message]
    tools: list[Tool] = msgspec.field(default_factory=list)
    native_tools: list[dict[str, Any]] = msgspec.field(default_factory=list)
    tool_choice: ToolChoice | None = None
    parallel_tools: bool | None = None
    response_format: ResponseFormat | None = None
    stop: list[str] = msgspec.field(default_factory=list)
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    reasoning_effort: str | None = None
    seed: int | None = None
    n: int = 1
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    user: str | None = None
    stream: bool = False
    rest: dict[str, Any] = msgspec.field(default_factory=dict)


def read_chat(
    body: bytes,
    *,
    native_tools: bool = False,
    refused: frozenset[str] = frozenset(),
    drop: frozenset[str] = frozenset(),
) -> Chat:
    """Read `body`. Raises BadRequest; Unsupported for custom tools, for tools that are no functions unless the codec
    takes the provider's own (`native_tools`), and for `refused` members that buy something, unless `drop` has them."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise BadRequest("body", "The body is not JSON.") from None
    root = Members(value, "")
    check_parts(value)
    if refused:
        _check_refused(value, root, refused, drop)
    chat = Chat(model=root.text("model") or "", messages=_messages(root))
    chat.tools, chat.native_tools = _tools(root, native_tools)
    chat.tool_choice = _tool_choice(root, chat)
    chat.parallel_tools = root.flag("parallel_tool_calls")
    chat.response_format = _response_format(root)
    chat.stop = _stop(root)
    chat.temperature, chat.top_p = root.number("temperature"), root.number("top_p")
    limits = [_at_least_1(root, name) for name in ("max_tokens", "max_completion_tokens")]
    chat.max_tokens = min((limit for limit in limits if limit is not None), default=None)
    chat.reasoning_effort = root.text("reasoning_effort")
    chat.seed = root.integer("seed")
    chat.n = _at_least_1(root, "n") or 1
    chat.frequency_penalty, chat.presence_penalty = root.number("frequency_penalty"), root.number("presence_penalty")
    chat.user = root.text("user")
    chat.stream = bool(root.flag("stream"))
    chat.rest = root.left()
    return chat


def refuse_rest(chat: Chat, passes: frozenset[str], ignored: frozenset[str], drop: frozenset[str]) -> dict[str, Any]:
    """The members of `rest` that the provider takes as they are. Those in `ignored`, null ones and values that ask for
    nothing are left out; any other raises Unsupported, unless `drop` (see `Upstream`) has it."""
    passed = {}
    for name, value in chat.rest.items():
        if value is None:
            continue
        if name in passes:
            passed[name] = value
        elif name not in ignored and value not in _NEUTRAL.get(name, ()):
            refuse(name, drop)
    return passed


def refuse(param: str, drop: frozenset[str], message: str | None = None) -> None:
    """Raise Unsupported, unless the configuration says that `param` is left out instead. Without its indexes for
    `drop`: `messages[3].name` is dropped as `messages.name`."""
    if "*" not in drop and re.sub(r"\[\d+\]", "", param) not in drop:
        raise Unsupported(param, message)


def refuse_fields(chat: Chat, names: tuple[str, ...], drop: frozenset[str]) -> None:
    """Refuse each of `names` (OpenAI's names of members that `Chat` reads) that is set to something."""
    for name in names:
        value = chat.n - 1 if name == "n" else getattr(chat, name)
        if value is not None and (value != 0 or name == "seed"):  # a penalty of 0 is none
            refuse(name, drop)


def refuse_names(chat: Chat, drop: frozenset[str]) -> None:
    """Refuse messages with a `name`, unless `drop` has `messages.name`: it tells participants of one role apart, for
    which no other wire has a word, and what a gateway would make of it is nothing that the client said. A tool's name
    is that of its call."""
    for at, message in enumerate(chat.messages):
        if message.name and message.role != "tool":
            refuse(f"messages[{at}].name", drop)


def _check_refused(value: dict[str, Any], root: Members, refused: frozenset[str], drop: frozenset[str]) -> None:
    for name in value:
        if name in refused and buys(name, value[name]):
            refuse(name, drop, reason(name))
            root.any(name)


def _at_least_1(root: Members, name: str) -> int | None:
    value = root.integer(name)
    return value if value is None or value >= 1 else root.wrong(name, "at least 1")


def _stop(root: Members) -> list[str]:
    value = root.any("stop")
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        root.wrong("stop", "a string or an array of strings")
    return stops


def _response_format(root: Members) -> ResponseFormat | None:
    given = root.members("response_format")
    if given is None:
        return None
    kind = given.needed("type")
    if kind == "text":
        return ResponseFormat("text")
    if kind == "json_object":
        return ResponseFormat("json_object")
    if kind != "json_schema":
        given.wrong("type", "'text', 'json_object' or 'json_schema'")
    described = given.members("json_schema")
    if described is None:
        given.wrong("json_schema", "an object")
    schema = described.object("schema")
    return ResponseFormat("json_schema", described.text("name"), schema, described.flag("strict"))


def _tools(root: Members, native: bool) -> tuple[list[Tool], list[dict[str, Any]]]:
    """Functions, and tools of other types. `functions` is the older name of `tools` and has functions only."""
    tools, others = [], []
    for at, value in enumerate(root.list("tools") or []):
        given = Members(value, f"tools[{at}]")
        kind = given.text("type")
        if kind != "function" and (kind is not None or "function" not in value):
            if not native or "custom" in value:
                raise Unsupported("tools", f"The provider of this model does not support tools of type '{kind}'.")
            others.append(value)
            continue
        described = given.members("function")
        if described is None:
            given.wrong("function", "an object")
        tools.append(_tool(described, given.left()))
    for at, value in enumerate(root.list("functions") or []):
        tools.append(_tool(Members(value, f"functions[{at}]"), {}))
    return tools, others


def _tool(given: Members, extra: dict[str, Any]) -> Tool:
    tool = Tool(given.needed("name"), given.text("description"), given.object("parameters"), given.flag("strict"))
    tool.extra = {**extra, **given.left()}
    return tool


def _tool_choice(root: Members, chat: Chat) -> ToolChoice | None:
    """`tool_choice`, or the older `function_call`. Of allowed tools only those are kept in `chat`, which is what they
    ask for."""
    older = root.any("function_call")
    value = root.any("tool_choice")
    name = "function_call" if value is None and older is not None else "tool_choice"
    value = older if name == "function_call" else value
    if value is None:
        return None
    if isinstance(value, str):
        for mode in ("auto", "none", "required"):
            if value == mode:
                return ToolChoice(mode)
        root.wrong(name, "'auto', 'none', 'required' or a function")
    given = Members(value, name)
    kind = given.text("type")
    if kind == "allowed_tools":
        return _allowed(given, chat)
    if kind not in ("function", None):
        raise Unsupported(name, f"The provider of this model does not support a choice of type '{kind}'.")
    described = given.members("function")
    return ToolChoice("named", (given if described is None else described).needed("name"))


def _allowed(given: Members, chat: Chat) -> ToolChoice:
    allowed = given.members("allowed_tools") or given
    names = set()
    for at, value in enumerate(allowed.list("tools") or []):
        each = Members(value, f"{allowed.path('tools')}[{at}]")
        names.add((each.members("function") or each).needed("name"))
    chat.tools = [tool for tool in chat.tools if tool.name in names]
    return ToolChoice("required" if allowed.text("mode") == "required" else "auto")


def _messages(root: Members) -> list[Message]:
    given = root.list("messages")
    if not given:
        root.wrong("messages", "an array with at least one message")
    messages: list[Message] = []
    called: dict[str, str] = {}  # ids of the older function calls, which have none, by function
    for at, value in enumerate(given):
        messages.append(_message(Members(value, f"messages[{at}]"), f"call_function_{at}", called))
    return messages


def _message(given: Members, call_id: str, called: dict[str, str]) -> Message:
    role = given.needed("role")
    answers = role == "function"  # the older form of "tool": by the function's name
    known = "tool" if answers else _ROLES.get(role)
    if known is None:
        given.wrong("role", "'system', 'developer', 'user', 'assistant' or 'tool'")
    message = Message(known, name=given.text("name"), tool_call_id=given.text("tool_call_id"))
    message.parts = read_content(given)
    if known == "tool":
        if answers:
            message.tool_call_id = called.get(message.name or "", call_id)
        elif message.tool_call_id is None:
            given.wrong("tool_call_id", "a string")
    if known == "assistant":
        refusal = given.text("refusal")
        if refusal:
            message.parts.append(Refusal(refusal))
        message.reasoning = _reasoning(given)
        message.tool_uses = _tool_uses(given)
        older = given.members("function_call")
        if older is not None and not message.tool_uses:
            use = ToolUse(call_id, older.needed("name"), _arguments(older))
            called[use.name] = use.id
            message.tool_uses.append(use)
    message.extra = {name: value for name, value in given.left().items() if value is not None}
    return message


def _reasoning(given: Members) -> str | None:
    """Thinking as text under either name. Of another type it is nobody's, and not sent again."""
    found = [value for value in (given.any("reasoning_content"), given.any("reasoning")) if isinstance(value, str)]
    return next((text for text in found if text), None)


def _tool_uses(given: Members) -> list[ToolUse]:
    uses = []
    for at, value in enumerate(given.list("tool_calls") or []):
        call = Members(value, f"{given.path('tool_calls')}[{at}]")
        kind = call.text("type")
        if kind not in ("function", None):
            raise Unsupported(call.path("type"), f"The provider of this model does not support calls of type '{kind}'.")
        function = call.members("function")
        if function is None:
            call.wrong("function", "an object")
        call.any("index")  # of the stream that it came in
        uses.append(ToolUse(call.needed("id"), function.needed("name"), _arguments(function), call.left()))
    return uses


def _arguments(function: Members) -> str:
    """JSON as text. Some clients send the object itself; nothing at all is a call without arguments."""
    value = function.any("arguments")
    if value is None:
        return "{}"
    if isinstance(value, dict):
        return _encode(value).decode()
    return value if isinstance(value, str) else function.wrong("arguments", "a string")
