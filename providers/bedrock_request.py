"""A client's OpenAI chat request as the body of Bedrock's Converse and ConverseStream.

Must not: pass what changes the price or the output limit behind the gateway's back, or drop anything silently.
Source: Amazon Bedrock API reference, Converse; user guide, "inference request parameters", "structured output",
"prompt caching"; Anthropic's documentation for what its models take through `additionalModelRequestFields`.

| OpenAI | Converse |
|---|---|
| system, developer | `system`, wherever they stand |
| tools, `strict` | `toolConfig.tools[].toolSpec` |
| tool_choice auto, required, a function | left out (the default), `any`, `tool` |
| tool_choice none | no `toolConfig`; refused where the messages hold calls, which need one |
| max_tokens, max_completion_tokens, temperature, top_p, stop | `inferenceConfig` |
| response_format json_schema | `outputConfig.textFormat` |
| reasoning_effort | `additionalModelRequestFields` of Anthropic's and OpenAI's models; refused for others |
| cache_control of a part, a message, a tool | a `cachePoint` behind it |
| top_k, thinking | `additionalModelRequestFields` of Anthropic's models; refused for others |
| guardrailConfig, additionalModelRequestFields, additionalModelResponseFieldPaths, requestMetadata | the same |

Temperatures above 1 become 1. Refused (or dropped by configuration): n > 1, seed, penalties, logit_bias, logprobs,
json_object, parallel_tool_calls false, addresses of images and files, and other members; custom tools always. The
native `serviceTier` and `performanceConfig` are refused because they change the price.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from providers.bedrock_blocks import Conversation, cache_point
from providers.chat_request import (
    BOOKKEEPING,
    BadRequest,
    Chat,
    Tool,
    Unsupported,
    read_chat,
    refuse,
    refuse_fields,
    refuse_rest,
)

_NATIVE = {
    "guardrailConfig": "guardrailConfig",
    "guardrail_config": "guardrailConfig",
    "additionalModelRequestFields": "additionalModelRequestFields",
    "additional_model_request_fields": "additionalModelRequestFields",
    "additionalModelResponseFieldPaths": "additionalModelResponseFieldPaths",
    "requestMetadata": "requestMetadata",
    "request_metadata": "requestMetadata",
}
_FIELDS = "additionalModelRequestFields"
_ANTHROPIC_FIELDS = frozenset(("top_k", "thinking"))
_LIMIT = re.compile(r"max.*(?:token|gen_len)", re.IGNORECASE)
"""Names under which models take an output limit: it would override the one that the hold covers."""
_VERSION = re.compile(r"claude-(?:[a-z]+-)*([0-9]{1,2})(?:[-.]([0-9]{1,2})(?![0-9]))?(?![0-9])")
_NEWEST = (99, 0)
_ADAPTIVE = (4, 6)
"""From this version of Anthropic's models on, thinking has an effort instead of a budget."""
_FIXED = (4, 7)
"""From this version on they take of temperature and top_p only the default."""
_EFFORTS = {"minimal": "low", "low": "low", "medium": "medium", "high": "high", "xhigh": "xhigh", "max": "max"}
_BUDGETS = {"minimal": 10, "low": 20, "medium": 50, "high": 80, "xhigh": 95, "max": 95}
"""Percent of the output limit that may be thought with, where there is no effort."""
_BUDGET_MIN = 1024
_OUTPUT_TYPICAL = 32_000
"""What the percents are of where the request has no limit: Bedrock then takes the model's own, which is not smaller."""
_NO_SCHEMA = {"type": "object", "properties": {}}
_encode = msgspec.json.Encoder().encode


def converse_body(body: bytes, model: str, drop: frozenset[str], options: Mapping[str, str]) -> bytes:
    """Raises BadRequest and Unsupported. Of `options`, for models whose id does not tell (an application inference
    profile): `family` is whose it is ("anthropic", "openai"), `thinking` how it thinks ("adaptive", "budget")."""
    chat = read_chat(body)
    family = options.get("family") or family_of(model)
    passed = refuse_rest(chat, frozenset(_NATIVE) | _passes(family), BOOKKEEPING, drop)
    refuse_fields(chat, ("n", "seed", "frequency_penalty", "presence_penalty"), drop)
    conversation = Conversation(drop)
    for at, message in enumerate(chat.messages):
        conversation.add(at, message)
    if not conversation.messages:
        raise BadRequest("messages", "'messages' must have content beside the instructions.")
    conversation.trim()
    version = claude_version(model) if family == "anthropic" else (0, 0)
    adaptive = options.get("thinking", "adaptive" if version >= _ADAPTIVE else "budget") == "adaptive"
    request: dict[str, Any] = {"messages": conversation.messages}
    _put(request, "system", conversation.system)
    _put(request, "inferenceConfig", _inference(chat, version, drop))
    _put(request, "toolConfig", _tools(chat, conversation.uses_tools, drop))
    _put(request, "outputConfig", _output(chat, drop))
    for name in passed.keys() & _NATIVE.keys():
        request[_NATIVE[name]] = passed[name]
    fields = _reasoning(chat, conversation, family, adaptive, drop)
    fields |= {name: passed[name] for name in passed.keys() & _ANTHROPIC_FIELDS}
    _put(request, _FIELDS, fields | _checked_fields(request.get(_FIELDS)))
    return _encode(request)


def family_of(model: str) -> str:
    """Whose model it is by its id: `us.anthropic.claude-...`, `openai.gpt-oss-...`, an ARN with one of those; or ""."""
    found = re.search(r"(?:^|[./])(anthropic|openai)\.", model)
    return found[1] if found else ""


def _passes(family: str) -> frozenset[str]:
    return _ANTHROPIC_FIELDS if family == "anthropic" else frozenset()


def _put(request: dict[str, Any], name: str, value: Any) -> None:
    if value:
        request[name] = value


def _inference(chat: Chat, version: tuple[int, int], drop: frozenset[str]) -> dict[str, Any]:
    """Converse's temperature ends at 1, OpenAI's at 2: more is the most there is, as in the anthropic codec."""
    config: dict[str, Any] = {}
    _put(config, "maxTokens", chat.max_tokens)
    for name, native, value in (("temperature", "temperature", chat.temperature), ("top_p", "topP", chat.top_p)):
        if value is None or (version >= _FIXED and value == 1):
            continue
        if version >= _FIXED:
            refuse(name, drop, f"The model does not support '{name}': only its default, 1, is accepted.")
        else:
            config[native] = min(value, 1)
    stops = [stop for stop in chat.stop if stop.strip()]
    if len(stops) < len(chat.stop):
        refuse("stop", drop, "The provider of this model does not support stop sequences of white space only.")
    _put(config, "stopSequences", stops)
    return config


def _tools(chat: Chat, used: bool, drop: frozenset[str]) -> dict[str, Any]:
    """`used`: the messages hold calls or results. Converse refuses those without a `toolConfig`."""
    choice = chat.tool_choice
    if choice is not None and choice.mode == "none" and chat.tools:
        if not used:
            return {}
        refuse("tool_choice", drop, "The provider of this model takes 'none' only before the first tool call.")
        choice = None
    if chat.tools and chat.parallel_tools is False:
        refuse("parallel_tool_calls", drop)
    tools: list[dict[str, Any]] = []
    for at, tool in enumerate(chat.tools):
        tools += _tool(f"tools[{at}]", tool, drop)
    if not tools:
        return {}
    config: dict[str, Any] = {"tools": tools}
    if choice is not None and choice.mode == "required":
        config["toolChoice"] = {"any": {}}
    elif choice is not None and choice.mode == "named":
        config["toolChoice"] = {"tool": {"name": choice.name}}
    return config


def _tool(place: str, tool: Tool, drop: frozenset[str]) -> list[dict[str, Any]]:
    """`strict` goes along, though not every model takes it: it is left out only where the configuration names it."""
    spec: dict[str, Any] = {"name": tool.name, "inputSchema": {"json": tool.parameters or _NO_SCHEMA}}
    _put(spec, "description", tool.description)
    if tool.strict and "tools.function.strict" not in drop:
        spec["strict"] = True
    for name, value in tool.extra.items():
        if name != "cache_control" and value is not None:
            refuse(f"{place}.{name}", drop)
    return [{"toolSpec": spec}, *cache_point(tool.extra.get("cache_control"))]


def _output(chat: Chat, drop: frozenset[str]) -> dict[str, Any]:
    """A schema is JSON as text there. Without one there is no JSON mode."""
    wanted = chat.response_format
    if wanted is None or wanted.kind == "text":
        return {}
    if wanted.kind == "json_object":
        refuse("response_format", drop, "The provider of this model supports JSON only with a schema (json_schema).")
        return {}
    if wanted.schema is None:
        raise BadRequest("response_format.json_schema.schema", "A schema is needed.")
    schema: dict[str, Any] = {"schema": _encode(wanted.schema).decode()}
    _put(schema, "name", wanted.name)
    return {"textFormat": {"type": "json_schema", "structure": {"jsonSchema": schema}}}


def _reasoning(
    chat: Chat, conversation: Conversation, family: str, adaptive: bool, drop: frozenset[str]
) -> dict[str, Any]:
    effort = chat.reasoning_effort
    if effort is None:
        return {}
    if family == "openai" and effort in ("low", "medium", "high"):
        return {"reasoning_effort": effort}
    if family != "anthropic":
        refuse("reasoning_effort", drop)
        return {}
    if effort == "none":
        return {}  # the default; some models refuse to be told "disabled"
    if effort not in _EFFORTS:
        raise BadRequest("reasoning_effort", "'reasoning_effort' must be one of none, " + ", ".join(_EFFORTS) + ".")
    if adaptive:
        return {"thinking": {"type": "adaptive"}, "output_config": {"effort": _EFFORTS[effort]}}
    limit = chat.max_tokens or _OUTPUT_TYPICAL
    budget = max(_BUDGET_MIN, limit * _BUDGETS[effort] // 100)
    if budget >= limit or not conversation.thinks_before_tools():
        return {}  # no room for it within the limit, or the model would refuse it here
    return {"thinking": {"type": "enabled", "budget_tokens": budget}}


def claude_version(model: str) -> tuple[int, int]:
    """(4, 6) of `us.anthropic.claude-opus-4-6-v1`, (3, 7) of `claude-3-7-sonnet-...`; a name of Claude's without a
    number is the newest, any other model (0, 0)."""
    found = _VERSION.search(model)
    if found is not None:
        return int(found[1]), int(found[2] or 0)
    return _NEWEST if "claude" in model else (0, 0)


def _checked_fields(fields: Any) -> dict[str, Any]:
    """The client's own fields of the model, which win over ours. A limit among them is refused."""
    if fields is None:
        return {}
    if not isinstance(fields, dict):
        raise BadRequest(_FIELDS, f"'{_FIELDS}' must be an object.")
    for name in _names(fields):
        if _LIMIT.search(name):
            raise Unsupported(f"{_FIELDS}.{name}", "The output limit is given as 'max_tokens'.")
    return fields


def _names(value: Any) -> list[str]:
    """Every name of a member in it."""
    if isinstance(value, list):
        return [name for each in value for name in _names(each)]
    if not isinstance(value, dict):
        return []
    return [found for name, inner in value.items() for found in (str(name), *_names(inner))]
