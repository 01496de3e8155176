"""Partial shapes of OpenAI's chat wire: only what is counted or decided on; everything else stays bytes.

Must not: model the whole body (new fields arrive every few days) or change a payload. Odd types are tolerated: what
does not fit the partial shape is read by the slow path with the same meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from providers.events import Channel, Delta, ReportedUsage
from providers.json_root import RootObject


class ToolFunction(msgspec.Struct, gc=False):
    name: str | None = None
    arguments: str | None = None


class CustomTool(msgspec.Struct, gc=False):
    name: str | None = None
    input: str | None = None


class ToolCall(msgspec.Struct, gc=False):
    index: int | None = None
    function: ToolFunction | None = None
    custom: CustomTool | None = None

    def called(self) -> ToolFunction | None:
        """Name and arguments of either kind of tool."""
        if self.custom is not None:
            return ToolFunction(self.custom.name, self.custom.input)
        return self.function


class WireDelta(msgspec.Struct, gc=False):
    role: str | None = None
    content: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None
    function_call: ToolFunction | None = None


class WireChoice(msgspec.Struct, gc=False):
    index: int = 0
    delta: WireDelta | None = None
    finish_reason: str | None = None


class GroqMember(msgspec.Struct, gc=False):
    usage: dict[str, Any] | None = None


class WireChunk(msgspec.Struct, gc=False):
    choices: list[WireChoice] | None = None
    usage: msgspec.Raw = msgspec.Raw()  # as sent; empty when absent (a union with None would refuse objects)
    error: Any = None
    x_groq: GroqMember | None = None

    def usage_json(self) -> bytes | None:
        """The usage object wherever this server puts it, or None."""
        raw = bytes(self.usage)
        if raw and raw != b"null":
            return raw
        if self.x_groq is not None and self.x_groq.usage is not None:
            return msgspec.json.encode(self.x_groq.usage)
        return None


decode_chunk = msgspec.json.Decoder(WireChunk).decode
decode_any = msgspec.json.Decoder().decode
decode_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
encode = msgspec.json.encode


NO_USAGE = (msgspec.Raw(b"null"), msgspec.Raw())


def only_text(chunk: WireChunk) -> Delta | None:
    """The chunk's one piece of content or reasoning when there is nothing else in it that anyone acts on."""
    choices = chunk.choices
    if not choices or len(choices) > 1 or chunk.error is not None or chunk.x_groq is not None:
        return None
    choice = choices[0]
    delta = choice.delta
    if delta is None or choice.finish_reason is not None or chunk.usage not in NO_USAGE:
        return None
    if delta.refusal or delta.tool_calls or delta.function_call:
        return None
    content, reasoning = delta.content, delta.reasoning_content or delta.reasoning
    if content and not reasoning:
        return Delta(choice.index, Channel.CONTENT, 0, content)
    if reasoning and not content:
        return Delta(choice.index, Channel.REASONING, 0, reasoning)
    return None


def deltas_of(choice: int, delta: WireDelta) -> list[Delta]:
    """The output text in one delta. `reasoning` and `reasoning_content` together are one text sent twice."""
    found = []
    if delta.content:
        found.append(Delta(choice, Channel.CONTENT, 0, delta.content))
    reasoning = delta.reasoning_content or delta.reasoning
    if reasoning:
        found.append(Delta(choice, Channel.REASONING, 0, reasoning))
    if delta.refusal:
        found.append(Delta(choice, Channel.REFUSAL, 0, delta.refusal))
    if delta.tool_calls:
        for position, call in enumerate(delta.tool_calls):
            _tool(found, choice, position if call.index is None else call.index, call.called())
    elif delta.function_call is not None:  # some servers send a forced call under both names
        _tool(found, choice, 0, delta.function_call)
    return found


def _tool(found: list[Delta], choice: int, tool: int, function: ToolFunction | None) -> None:
    if function is None:
        return
    if function.name:
        found.append(Delta(choice, Channel.TOOL_NAME, tool, function.name))
    if function.arguments:
        found.append(Delta(choice, Channel.TOOL_ARGUMENTS, tool, function.arguments))


def lenient_chunk(payload: bytes) -> WireChunk | None:
    """Read a chunk whose types are odd (content as a list of parts, usage as text). None when it is not a JSON object.

    Raises msgspec.DecodeError when it is not JSON.
    """
    raw = decode_any(payload)
    if not isinstance(raw, dict):
        return None
    members = decode_members(payload)
    choices = raw.get("choices")
    return WireChunk(
        choices=[_lenient_choice(each) for each in _dicts(choices)] if isinstance(choices, list) else None,
        usage=members.get("usage", msgspec.Raw()),
        error=raw.get("error"),
    )


def _dicts(values: list[Any]) -> list[dict[str, Any]]:
    return [value for value in values if isinstance(value, dict)]


def _lenient_choice(raw: Mapping[str, Any]) -> WireChoice:
    index, finish, delta = raw.get("index"), raw.get("finish_reason"), raw.get("delta", raw.get("message"))
    return WireChoice(
        index=index if isinstance(index, int) and not isinstance(index, bool) else 0,
        delta=lenient_delta(delta) if isinstance(delta, dict) else None,
        finish_reason=finish if isinstance(finish, str) else None,
    )


def lenient_delta(raw: Mapping[str, Any]) -> WireDelta:
    """A delta or message of any shape as far as text can be found in it."""
    calls = raw.get("tool_calls")
    return WireDelta(
        role=_text(raw.get("role")),
        content=_text(raw.get("content")),
        refusal=_text(raw.get("refusal")),
        reasoning_content=_text(raw.get("reasoning_content")),
        reasoning=_text(raw.get("reasoning")),
        tool_calls=[_lenient_call(each) for each in _dicts(calls)] if isinstance(calls, list) else None,
        function_call=_lenient_function(raw.get("function_call")),
    )


def _lenient_call(raw: Mapping[str, Any]) -> ToolCall:
    index = raw.get("index")
    return ToolCall(
        index=index if isinstance(index, int) and not isinstance(index, bool) else None,
        function=_lenient_function(raw.get("function")) or _lenient_custom(raw.get("custom")),
    )


def _lenient_function(raw: Any) -> ToolFunction | None:
    if not isinstance(raw, dict):
        return None
    return ToolFunction(name=_text(raw.get("name")), arguments=_text(raw.get("arguments")))


def _lenient_custom(raw: Any) -> ToolFunction | None:
    if not isinstance(raw, dict):
        return None
    return ToolFunction(name=_text(raw.get("name")), arguments=_text(raw.get("input")))


_SPOKEN = ("audio", "thinking", "reasoning_details")
_SPOKEN_NAMES = tuple(b'"%b"' % name.encode() for name in _SPOKEN)
_NO_TEXT = frozenset(("id", "type", "object", "index", "data", "signature", "format", "encrypted_content"))


def unheard(payload: bytes) -> list[Delta]:
    """Output text in members that the partial shapes leave out: audio transcripts, thinking in parts.

    Only chunks without any other text are asked, so that an ordinary stream does not pay for it. Members that nobody
    knows are not counted: they may be no output at all, and a charge must not exceed the provider's.
    """
    if payload.find(b"\\") < 0 and max(map(payload.find, _SPOKEN_NAMES)) < 0:
        return []  # no such name, as it is or with an escape in it
    found = []
    for choice in _dicts(decode_any(payload).get("choices") or []):
        delta, index = choice.get("delta"), choice.get("index")
        if isinstance(delta, dict):
            text = "".join(_strings([delta.get(name) for name in _SPOKEN]))
            if text:
                found.append(Delta(index if isinstance(index, int) else 0, Channel.CONTENT, 0, text))
    return found


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for name, inner in value.items() if name not in _NO_TEXT for text in _strings(inner)]
    if isinstance(value, list):
        return [text for inner in value for text in _strings(inner)]
    return []


def _text(value: Any) -> str | None:
    """Text as it stands, or the text of a list of parts (Mistral sends content so)."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in value]
        return "".join(part for part in parts if isinstance(part, str)) or None
    return None


class PromptDetails(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    cached_tokens: int | None = None
    cache_write_tokens: int | None = None
    audio_tokens: int | None = None


class OutputDetails(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    reasoning_tokens: int | None = None
    audio_tokens: int | None = None
    image_tokens: int | None = None
    accepted_prediction_tokens: int | None = None
    rejected_prediction_tokens: int | None = None


class WireUsage(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    """Usage as OpenAI sends it, both counts there. Nothing in it is skipped, so reading it checks all of it."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int | None = None
    prompt_tokens_details: PromptDetails | None = None
    completion_tokens_details: OutputDetails | None = None
    prompt_cache_hit_tokens: int | None = None


_decode_usage = msgspec.json.Decoder(WireUsage).decode
_NOT_GIVEN, _NOT_MADE = PromptDetails(), OutputDetails()


def usage_of(raw: bytes) -> ReportedUsage | None:
    """Read a usage object; None when it is not an object or names no token count.

    Counts that are not integers come back as -1, so that whoever prices them refuses the whole report.
    """
    try:
        usage = _decode_usage(raw)
    except msgspec.ValidationError:
        return lenient_usage(raw)
    given = usage.prompt_tokens_details or _NOT_GIVEN
    made = usage.completion_tokens_details or _NOT_MADE
    cached = usage.prompt_cache_hit_tokens if given.cached_tokens is None else given.cached_tokens
    if made.reasoning_tokens and usage.total_tokens != usage.prompt_tokens + usage.completion_tokens:
        return lenient_usage(raw)
    return ReportedUsage(
        prompt=usage.prompt_tokens,
        output=usage.completion_tokens,
        cached=cached or 0,
        cache_write=given.cache_write_tokens or 0,
        reasoning=made.reasoning_tokens or 0,
        audio_input=given.audio_tokens or 0,
        audio_output=made.audio_tokens or 0,
        image_output=_drawn(made.image_tokens, usage.completion_tokens, made.reasoning_tokens, made.audio_tokens)
        if made.image_tokens
        else 0,
        raw=raw,
    )


def lenient_usage(raw: bytes) -> ReportedUsage | None:
    """What `usage_of` returns, for usage of any shape."""
    value = decode_any(raw)
    if not isinstance(value, dict):
        return None
    prompt, output = _count(value, "prompt_tokens"), _count(value, "completion_tokens")
    if prompt is None and output is None:
        return None
    given, made = value.get("prompt_tokens_details"), value.get("completion_tokens_details")
    given = given if isinstance(given, dict) else {}
    made = made if isinstance(made, dict) else {}
    cached = _count(given, "cached_tokens")
    if cached is None:
        cached = _count(value, "prompt_cache_hit_tokens")
    reasoning = _count(made, "reasoning_tokens") or 0
    if reasoning > 0 and prompt is not None and output is not None:
        output, raw = _with_reasoning(value, raw, (prompt, output, reasoning))
    audio = _count(made, "audio_tokens") or 0
    written, kept = _count(given, "cache_write_tokens") or 0, given.get("cache_write_tokens_details")
    hour = (_count(kept, "ttl_1h_tokens") or 0) if isinstance(kept, dict) else 0
    return ReportedUsage(
        prompt=prompt,
        output=output,
        cached=cached or 0,
        cache_write=written,
        reasoning=reasoning,
        audio_input=_count(given, "audio_tokens") or 0,
        audio_output=audio,
        cache_write_1h=max(0, min(hour, written)),
        image_output=_drawn(_count(made, "image_tokens") or 0, output, reasoning, audio),
        raw=raw,
    )


def _drawn(images: int, output: int | None, reasoning: int | None, audio: int | None) -> int:
    """Tokens of images among the output, never more than the other parts leave of it."""
    return max(0, min(images, (output or 0) - (reasoning or 0) - (audio or 0)))


def _with_reasoning(value: Mapping[str, Any], raw: bytes, counts: tuple[int, int, int]) -> tuple[int, bytes]:
    """The output with its reasoning, and the object that says so. xAI counts reasoning beside `completion_tokens`,
    OpenAI within: the total tells which it is."""
    prompt, output, reasoning = counts
    if _count(value, "total_tokens") != prompt + output + reasoning:
        return output, raw
    return output + reasoning, RootObject(raw).replaced({"completion_tokens": b"%d" % (output + reasoning)})


def _count(value: Mapping[str, Any], name: str) -> int | None:
    count = value.get(name)
    if count is None:
        return None
    if isinstance(count, float) and count.is_integer() and abs(count) < 2**53:
        return int(count)
    return count if isinstance(count, int) and not isinstance(count, bool) else -1
