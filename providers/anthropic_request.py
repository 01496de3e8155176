"""OpenAI's chat request as a body of Anthropic's Messages API.

Must not: do I/O, or leave out silently what would change the answer. What each member becomes:

model, stream, top_p, stop -> the same, `stop_sequences`; max_tokens and max_completion_tokens -> `max_tokens`, which
Anthropic demands (`OUTPUT_MAX` where neither is given); temperature above 1 -> 1, the most there is (Anthropic's own
compatibility layer does so); tools, tool_choice, parallel_tool_calls -> `tools`, `tool_choice` with
`disable_parallel_tool_use`; response_format json_schema -> `output_config.format`; reasoning_effort -> adaptive
`thinking` with `output_config.effort`, or a budget for models before 4.6; user or safety_identifier ->
`metadata.user_id`; service_tier default -> standard_only. `NATIVE` members pass as they are. n above 1, seed,
penalties, logprobs, logit_bias, verbosity, JSON mode without a schema, audio and other members are refused by name, or
left out where the provider's configuration says so.

Sources: platform.claude.com/docs/en/api/messages, .../build-with-claude/structured-outputs, /effort,
/adaptive-thinking, /extended-thinking, .../agents-and-tools/tool-use, .../cli-sdks-libraries/libraries/openai-sdk.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from providers.anthropic_messages import Turns, thinks_before_tools, turns_of
from providers.anthropic_schema import output_schema
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

NATIVE = frozenset(("thinking", "top_k", "cache_control", "output_config", "context_management"))
"""What passes in Anthropic's own form. Not what costs more than tokens at their price: `speed`, `inference_geo`,
`container`, `mcp_servers`."""
CLIENT_TOOLS = ("bash_", "text_editor_", "computer_", "memory_")
"""Types of Anthropic's tools that the client runs. Those that Anthropic runs are billed by the call or the hour."""
FILES_BETA = "files-api-2025-04-14"
_TOOL_NATIVE = frozenset(
    ("cache_control", "defer_loading", "eager_input_streaming", "allowed_callers", "input_examples")
)


def messages_body(
    body: bytes, drop: frozenset[str], options: Mapping[str, str], refused: frozenset[str] = frozenset()
) -> tuple[bytes, tuple[str, ...]]:
    """The body to send, and the betas that it needs. Raises BadRequest, Unsupported."""
    chat = read_chat(body, native_tools=True, refused=refused, drop=drop)
    refuse_names(chat, drop)
    turns = turns_of(chat.messages)
    passed = refuse_rest(chat, NATIVE, BOOKKEEPING, drop)
    refuse_fields(chat, ("n", "seed", "frequency_penalty", "presence_penalty"), drop)
    out: dict[str, Any] = {"model": chat.model, "max_tokens": chat.max_tokens or OUTPUT_MAX}
    if chat.stream:
        out["stream"] = True
    if turns.system:
        out["system"] = turns.system
    out["messages"] = turns.messages
    _sampling(chat, out, drop)
    _tools(chat, out, drop)
    out.update(passed)
    _output(chat, turns, out, drop, options)
    _about(chat, out)
    return msgspec.json.encode(out), (FILES_BETA,) if turns.files else ()


def _sampling(chat: Chat, out: dict[str, Any], drop: frozenset[str]) -> None:
    fixed = fixed_sampling(claude_version(chat.model))
    for name, value in (("temperature", chat.temperature), ("top_p", chat.top_p)):
        if value is None or (value == 1 and (fixed or name == "top_p")):  # all of the nucleus is none; some refuse both
            continue
        if fixed:
            refuse(name, drop, f"The model does not support '{name}': only its default, 1, is accepted.")
        else:
            out[name] = min(value, 1)
    blank = [stop for stop in chat.stop if not stop.strip()]
    if blank:
        refuse("stop", drop, "The provider of this model does not support stop sequences of white space only.")
    stops = [stop for stop in chat.stop if stop.strip()]
    if stops:
        out["stop_sequences"] = stops


def _clients(tool: dict[str, Any], drop: frozenset[str]) -> bool:
    """Whether the client runs the tool. Raises Unsupported for others, unless they are left out."""
    kind = str(tool.get("type"))
    if kind.startswith(CLIENT_TOOLS):
        return True
    refuse("tools", drop, f"Tools of type '{kind[:64]}' are billed beside tokens, which this gateway does not offer.")
    return False


def _tools(chat: Chat, out: dict[str, Any], drop: frozenset[str]) -> None:
    tools = [_tool(tool, at, drop) for at, tool in enumerate(chat.tools)]
    tools += [tool for tool in chat.native_tools if _clients(tool, drop)]
    if not tools:
        return
    out["tools"] = tools
    choice = chat.tool_choice
    mode = "auto" if choice is None else choice.mode
    chosen: dict[str, Any] = {"type": {"required": "any", "named": "tool"}.get(mode, mode)}
    if choice is not None and choice.name is not None:
        chosen["name"] = choice.name
    if chat.parallel_tools is False and mode != "none":
        chosen["disable_parallel_tool_use"] = True
    if choice is not None or len(chosen) > 1:
        out["tool_choice"] = chosen


def _tool(tool: Tool, at: int, drop: frozenset[str]) -> dict[str, Any]:
    schema = tool.parameters or {"properties": {}}
    given: dict[str, Any] = {"name": tool.name, "input_schema": {"type": "object", **schema}}
    if tool.description:
        given["description"] = tool.description
    if tool.strict:
        given["strict"] = True
    for name, value in tool.extra.items():
        if name in _TOOL_NATIVE:
            given[name] = value
        elif value is not None:
            refuse(f"tools[{at}].{name}", drop)
    return given


def _output(chat: Chat, turns: Turns, out: dict[str, Any], drop: frozenset[str], options: Mapping[str, str]) -> None:
    """`thinking` and `output_config`; members of the client's own win over what is made here."""
    config: dict[str, Any] = {}
    if chat.reasoning_effort is not None:
        thinking = _thinking(chat, turns, out["max_tokens"], config, options)
        if thinking is not None:
            out.setdefault("thinking", thinking)
    wanted = chat.response_format
    if wanted is not None and wanted.kind == "json_object":
        refuse("response_format", drop, "The provider of this model supports JSON only with a schema (json_schema).")
    elif wanted is not None and wanted.kind == "json_schema":
        if wanted.schema is None:
            raise BadRequest("response_format.json_schema.schema", "A schema is needed.")
        config["format"] = {"type": "json_schema", "schema": output_schema(wanted.schema)}
    own = out.pop("output_config", {})
    if not isinstance(own, dict):
        raise BadRequest("output_config", "'output_config' must be an object.")
    if config or own:
        out["output_config"] = {**config, **own}


def _thinking(
    chat: Chat, turns: Turns, max_tokens: int, config: dict[str, Any], options: Mapping[str, str]
) -> dict[str, Any] | None:
    """With an effort, which goes into `config`, or with a budget."""
    asked = chat.reasoning_effort or ""
    by_effort = adaptive(claude_version(chat.model), options)
    if asked == "none":
        return {"type": "disabled"} if by_effort else None
    effort = effort_of(asked)
    if by_effort:
        config["effort"] = effort
        return {"type": "adaptive", "display": "summarized"}
    budget = budget_of(asked, max_tokens)
    if budget is None or not thinks_before_tools(turns.messages):
        return None  # no room for it within the limit, or Anthropic would refuse it here
    return {"type": "enabled", "budget_tokens": budget}


def _about(chat: Chat, out: dict[str, Any]) -> None:
    """Who asks, and which queue it waits in."""
    metadata = chat.rest.get("metadata")
    named = metadata.get("user_id") if isinstance(metadata, dict) else None
    user = chat.user or chat.rest.get("safety_identifier") or named
    if isinstance(user, str) and user:
        out["metadata"] = {"user_id": user}
    if chat.rest.get("service_tier") in ("default", "standard_only"):
        out["service_tier"] = "standard_only"
