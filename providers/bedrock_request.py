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
| guardrailConfig, additionalModelResponseFieldPaths, requestMetadata | the same |
| additionalModelRequestFields | the same, as far as `bedrock_fields` knows the maker's fields |

Temperatures above 1 become 1. Refused (or dropped by configuration): n > 1, seed, penalties, logit_bias, logprobs,
json_object, parallel_tool_calls false, addresses of images and files, and other members; custom tools always. The
native `serviceTier` and `performanceConfig` are refused because they change the price.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from providers.bedrock_blocks import Conversation, cache_point
from providers.bedrock_fields import REQUEST_FIELDS, checked_fields, family_of
from providers.chat_request import (
    BOOKKEEPING,
    BadRequest,
    Chat,
    Tool,
    read_chat,
    refuse,
    refuse_fields,
    refuse_names,
    refuse_rest,
)
from providers.claude import OUTPUT_MAX, adaptive, budget_of, claude_version, effort_of, fixed_sampling

_NATIVE = {
    "guardrailConfig": "guardrailConfig",
    "guardrail_config": "guardrailConfig",
    "additionalModelRequestFields": REQUEST_FIELDS,
    "additional_model_request_fields": REQUEST_FIELDS,
    "additionalModelResponseFieldPaths": "additionalModelResponseFieldPaths",
    "requestMetadata": "requestMetadata",
    "request_metadata": "requestMetadata",
}
_ANTHROPIC_FIELDS = frozenset(("top_k", "thinking"))
_NO_SCHEMA = {"type": "object", "properties": {}}
_encode = msgspec.json.Encoder().encode


def converse_body(
    body: bytes,
    model: str,
    drop: frozenset[str],
    options: Mapping[str, str],
    refused: frozenset[str] = frozenset(),
) -> bytes:
    """Raises BadRequest and Unsupported. Of `options`, for models whose id does not tell (an application inference
    profile): `family` is whose it is ("anthropic", "openai"), `thinking` how it thinks ("adaptive", "budget")."""
    chat = read_chat(body, refused=refused, drop=drop)
    refuse_names(chat, drop)
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
    request: dict[str, Any] = {"messages": conversation.messages}
    _put(request, "system", conversation.system)
    _put(request, "inferenceConfig", _inference(chat, version, drop))
    _put(request, "toolConfig", _tools(chat, conversation.uses_tools, drop))
    _put(request, "outputConfig", _output(chat, drop))
    for name in passed.keys() & _NATIVE.keys():
        request[_NATIVE[name]] = passed[name]
    fields = _reasoning(chat, conversation, family, adaptive(version, options), drop)
    own = {name: passed[name] for name in passed.keys() & _ANTHROPIC_FIELDS}
    fields |= checked_fields(own, "", family, drop)  # the client's own fields win over ours
    fields |= checked_fields(request.pop(REQUEST_FIELDS, None), REQUEST_FIELDS, family, drop)
    _put(request, REQUEST_FIELDS, fields)
    return _encode(request)


def _passes(family: str) -> frozenset[str]:
    return _ANTHROPIC_FIELDS if family == "anthropic" else frozenset()


def _put(request: dict[str, Any], name: str, value: Any) -> None:
    if value:
        request[name] = value


def _inference(chat: Chat, version: tuple[int, int], drop: frozenset[str]) -> dict[str, Any]:
    """Converse's temperature ends at 1, OpenAI's at 2: more is the most there is, as in the anthropic codec."""
    config: dict[str, Any] = {}
    fixed = fixed_sampling(version)
    _put(config, "maxTokens", chat.max_tokens)
    for name, native, value in (("temperature", "temperature", chat.temperature), ("top_p", "topP", chat.top_p)):
        if value is None or (fixed and value == 1):
            continue
        if fixed:
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
    chat: Chat, conversation: Conversation, family: str, by_effort: bool, drop: frozenset[str]
) -> dict[str, Any]:
    asked = chat.reasoning_effort
    if asked is None:
        return {}
    if family == "openai" and asked in ("low", "medium", "high"):
        return {"reasoning_effort": asked}
    if family != "anthropic":
        refuse("reasoning_effort", drop)
        return {}
    if asked == "none":
        return {}  # the default; some models refuse to be told "disabled"
    effort = effort_of(asked)
    if by_effort:
        return {"thinking": {"type": "adaptive"}, "output_config": {"effort": effort}}
    budget = budget_of(asked, chat.max_tokens or OUTPUT_MAX)  # Converse's own limit is the model's, and not smaller
    if budget is None or not conversation.thinks_before_tools():
        return {}  # no room for it within the limit, or the model would refuse it here
    return {"thinking": {"type": "enabled", "budget_tokens": budget}}
