"""OpenAI's chat request as Google's `generateContent` request (Gemini API and Vertex AI).

Must not: fetch anything, know the wire of answers, or leave out silently what changes the answer.
Sources: ai.google.dev/api/generate-content, .../gemini-api/docs/{thinking,thought-signatures,function-calling,openai,
file-input-methods}, googleapis/python-genai (types), the Vertex reference "Generate content with the Gemini API".

Members that only pass: `top_k`, `safety_settings`, and in `google` (the name that Google's own OpenAI-compatible
endpoint gives its extras) `thinking_config`, `safety_settings` and `labels`, all as Google has them. Not what adds
tokens to the prompt that no hold has seen: `cached_content`, the tool `url_context`.
Left out because they are hints: `user`, OpenAI's bookkeeping, an image's `detail`, `cache_control`, a function's
`strict`, and thinking as text in earlier answers (Google takes signatures, not texts).
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from providers.chat_request import (
    BOOKKEEPING,
    BadRequest,
    Chat,
    Tool,
    ToolChoice,
    refuse,
    refuse_names,
    refuse_rest,
)
from providers.gemini_contents import Contents

PASSES = frozenset(("top_k", "safety_settings", "google"))
_EXTRAS = frozenset(("thinkingConfig", "safetySettings", "labels"))
_THINKING = frozenset(("thinkingBudget", "thinkingLevel", "includeThoughts"))
_NATIVE_TOOLS = frozenset(("codeExecution",))
"""Google's own tools that cost nothing but tokens. The others (search, maps, retrieval) are billed by the query, which
nobody meters here."""
_MODES = {"auto": "AUTO", "none": "NONE", "required": "ANY"}
_BUDGETS = {"none": 0, "minimal": 1024, "low": 1024, "medium": 8192, "high": 24576, "xhigh": 24576, "max": 24576}
"""Gemini 2.5, tokens; Google's own table for `reasoning_effort` (ai.google.dev/gemini-api/docs/openai)."""
_LEVELS = {"minimal": "LOW", "low": "LOW", "medium": "MEDIUM", "high": "HIGH", "xhigh": "HIGH", "max": "HIGH"}
"""Gemini 3 and later. Its lowest level that every model has is LOW; MINIMAL is there in some flash models."""
_MODEL = re.compile(r"(?:.*/)?gemini-(?:(\d+)(?:\.(\d+))?-)?(.*)")
_encode = msgspec.json.Encoder().encode


class ModelTraits(msgspec.Struct, frozen=True):
    """What a model's name says: its generation ((0, 0): not a Gemini that is known here) and whether it is a "pro"."""

    generation: tuple[int, int]
    pro: bool

    @property
    def signs(self) -> bool:
        """Whether it wants thought signatures with tool calls, and ids (Gemini 3 and later; older ones on Vertex
        refuse a request with ids)."""
        return self.generation >= (3, 0)


def traits_of(model: str) -> ModelTraits:
    """From names such as `gemini-2.5-flash-lite`; `gemini-pro-latest` and the like are the newest."""
    found = _MODEL.fullmatch(model)
    if found is None:
        return ModelTraits((0, 0), False)
    pro = found[3].startswith("pro")
    if found[1] is None:
        return ModelTraits((99, 0) if found[3].endswith("-latest") else (1, 0), pro)
    return ModelTraits((int(found[1]), int(found[2] or 0)), pro)


def native_body(chat: Chat, model: str, *, vertex: bool, drop: frozenset[str]) -> bytes:
    """The request's body. Raises Unsupported and BadRequest; `drop` as in `providers.codec.Upstream`."""
    traits = traits_of(model)
    passed = refuse_rest(chat, PASSES, BOOKKEEPING, drop)
    extras = _extras(passed, drop)
    refuse_names(chat, drop)
    contents = Contents(signs=traits.signs, vertex=vertex, drop=drop)
    for at, message in enumerate(chat.messages):
        contents.add(at, message)
    body: dict[str, Any] = contents.told()
    config = _config(chat, passed)
    thinking = _thinking(chat, traits, extras.pop("thinkingConfig", None), drop)
    if thinking:
        config["thinkingConfig"] = thinking
    if config:
        body["generationConfig"] = config
    body.update(_tools(chat, drop))
    return _encode({**body, **extras})


def _config(chat: Chat, passed: dict[str, Any]) -> dict[str, Any]:
    """`generationConfig`, as far as it is asked for. The output limit covers thinking too, as OpenAI's does."""
    given: dict[str, Any] = {
        "temperature": chat.temperature,
        "topP": chat.top_p,
        "topK": passed.get("top_k"),
        "maxOutputTokens": chat.max_tokens,
        "stopSequences": chat.stop or None,
        "seed": chat.seed,
        "presencePenalty": chat.presence_penalty or None,
        "frequencyPenalty": chat.frequency_penalty or None,
        "candidateCount": chat.n if chat.n > 1 else None,
    }
    wanted = chat.response_format
    if wanted is not None and wanted.kind != "text":
        given["responseMimeType"] = "application/json"
        given["responseJsonSchema"] = wanted.schema
    return {name: value for name, value in given.items() if value is not None}


def _thinking(chat: Chat, traits: ModelTraits, own: Any, drop: frozenset[str]) -> dict[str, Any]:
    """`thinkingConfig`: Google's own where given, else from `reasoning_effort`, then with the thoughts told (which is
    the only way to see that the model is at work; they are billed either way)."""
    effort = chat.reasoning_effort
    if own is not None:
        config = _camel(own, "google.thinking_config")
        if not config.keys() <= _THINKING:
            raise BadRequest(
                "google.thinking_config", "'google.thinking_config' has a member that Google does not know."
            )
        if effort is not None:
            raise BadRequest("reasoning_effort", "Give 'reasoning_effort' or 'google.thinking_config', not both.")
        return config
    if effort is None:
        return {}
    name = "reasoning_effort"
    if traits.generation < (2, 5) or effort not in _BUDGETS:
        refuse(name, drop)
        return {}
    if effort == "none" and (traits.signs or traits.pro):
        refuse(name, drop, "The provider of this model cannot turn its thinking off ('reasoning_effort').")
        return {}
    if not traits.signs:
        return {"thinkingBudget": _BUDGETS[effort], "includeThoughts": effort != "none"}
    return {"thinkingLevel": _level(effort, traits), "includeThoughts": True}


def _level(effort: str, traits: ModelTraits) -> str:
    if effort == "minimal" and not traits.pro and traits.generation < (3, 7):
        return "MINIMAL"
    if effort == "medium" and traits.pro and traits.generation == (3, 0):
        return "HIGH"  # as Google's own table has it: Gemini 3 Pro knows two levels
    return _LEVELS[effort]


def _extras(passed: dict[str, Any], drop: frozenset[str]) -> dict[str, Any]:
    """Members of the native root from `google` and `safety_settings`, and `thinkingConfig` where it is there."""
    google = passed.get("google")
    extras: dict[str, Any] = {}
    for name, value in (_camel(google, "google") if google is not None else {}).items():
        if name in _EXTRAS:
            extras[name] = value
        else:
            refuse(f"google.{_snake(name)}", drop)
    if "safety_settings" in passed:
        extras["safetySettings"] = passed["safety_settings"]
    top_k = passed.get("top_k")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int | float)):
        raise BadRequest("top_k", "'top_k' must be a number.")
    return extras


def _tools(chat: Chat, drop: frozenset[str]) -> dict[str, Any]:
    """`tools` and `toolConfig`. Functions take JSON Schema as it is (`parametersJsonSchema`, v1beta and v1)."""
    native = [tool for each in chat.native_tools if (tool := _native_tool(each, drop)) is not None]
    declared = [_declaration(tool) for tool in chat.tools]
    if not declared:
        return {"tools": native} if native else {}
    if chat.parallel_tools is False:
        refuse("parallel_tool_calls", drop)
    told: dict[str, Any] = {"tools": [{"functionDeclarations": declared}, *native]}
    if chat.tool_choice is not None:
        told["toolConfig"] = {"functionCallingConfig": _choice(chat.tool_choice)}
    return told


def _declaration(tool: Tool) -> dict[str, Any]:
    declared: dict[str, Any] = {"name": tool.name}
    if tool.description:
        declared["description"] = tool.description
    if tool.parameters:
        declared["parametersJsonSchema"] = tool.parameters
    return declared


def _choice(choice: ToolChoice) -> dict[str, Any]:
    if choice.mode == "named":
        return {"mode": "ANY", "allowedFunctionNames": [choice.name]}
    return {"mode": _MODES[choice.mode]}


def _native_tool(tool: dict[str, Any], drop: frozenset[str]) -> dict[str, Any] | None:
    """A tool of Google's own: `{"code_execution": {}}` or `{"type": "code_execution"}`, in either spelling."""
    kind = tool.get("type")
    given = {kind: {}} if isinstance(kind, str) else {name: value for name, value in tool.items() if name != "type"}
    camel = _camel(given, "tools")
    if camel and camel.keys() <= _NATIVE_TOOLS:
        return camel
    refuse("tools", drop, "Of the provider's own tools only 'code_execution' can be used here.")
    return None


def _camel(value: Any, param: str) -> dict[str, Any]:
    """An object's members under the names of protobuf's JSON; both spellings are given. Values stay."""
    if not isinstance(value, dict):
        raise BadRequest(param, f"'{param}' must be an object.")
    return {re.sub(r"_([a-z])", lambda found: found[1].upper(), name): inner for name, inner in value.items()}


def _snake(name: str) -> str:
    return re.sub(r"[A-Z]", lambda found: "_" + found[0].lower(), name)
