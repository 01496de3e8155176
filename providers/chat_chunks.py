"""OpenAI's side of a translated stream or answer: the chunks, the whole answer and the usage that a client sees.

Must not: know a provider, gather text, or repair (what is made here is right from the start). Every chunk carries the
deltas of exactly the text that is in it, so that metering counts what the client gets.
Shapes: OpenAI's API reference, "chat completion chunk object" and "chat completion object".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from providers.codec import ChatCall
from providers.events import Channel, Chunk, Delta, ReportedUsage
from providers.json_root import RootObject
from providers.openai_wire import deltas_of, lenient_delta

UNKNOWN_ID = "chatcmpl-tollgate"
"""An answer's id where the provider gives none."""
COUNT_MAX = 2**53
"""Token counts above this are no counts (and no JSON numbers that every reader takes)."""

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode


class ChunkMaker:
    """Makes one stream's chunks. `created` in seconds; `null_usage` puts `"usage":null` into each, as OpenAI does for
    those who asked for usage."""

    __slots__ = ("_head", "_tail")

    def __init__(self, answer_id: str, model: str, created: int, *, null_usage: bool = False) -> None:
        names = (_encode(answer_id), created, _encode(model))
        self._head = b'{"id":%b,"object":"chat.completion.chunk","created":%d,"model":%b,"choices":[' % names
        self._tail = b'],"usage":null}' if null_usage else b"]}"

    @classmethod
    def of(cls, call: ChatCall, answer_id: str, model: str | None = None) -> ChunkMaker:
        """For `call`, whose answers name `model`, or the candidate's where the provider names none."""
        return cls(answer_id, call.rename_to or model or call.model, call.created, null_usage=call.usage_wanted)

    def role(self, choice: int = 0) -> Chunk:
        """The choice's first chunk: the role and no text. Not content."""
        return Chunk(self._payload(choice, b'{"role":"assistant","content":"","refusal":null}'))

    def content(self, text: str, choice: int = 0) -> Chunk:
        """A piece of the answer."""
        return self._text(b'{"content":%b}', text, Channel.CONTENT, choice)

    def reasoning(self, text: str, choice: int = 0, extra: Mapping[str, Any] | None = None) -> Chunk:
        """A piece of the thinking, under the name that most clients read. `extra` are further members of the delta;
        what they repeat of the text is counted once."""
        chunk = self._text(b'{"reasoning_content":%b}', text, Channel.REASONING, choice)
        if extra:
            chunk.payload = self._payload(choice, _encode({"reasoning_content": text, **extra}))
        return chunk

    def refusal(self, text: str, choice: int = 0) -> Chunk:
        """A piece of a refusal."""
        return self._text(b'{"refusal":%b}', text, Channel.REFUSAL, choice)

    def tool_start(
        self, tool: int, call_id: str, name: str, extra: Mapping[str, Any] | None = None, choice: int = 0
    ) -> Chunk:
        """A tool call begins: its id and name. `extra` are members of the call beside OpenAI's."""
        call = {
            "index": tool,
            "id": call_id,
            "type": "function",
            "function": {"name": name, "arguments": ""},
            **(extra or {}),
        }
        deltas = [Delta(choice, Channel.TOOL_NAME, tool, name)] if name else []
        return Chunk(self._payload(choice, _encode({"tool_calls": [call]})), deltas, content=True)

    def tool_arguments(self, tool: int, text: str, choice: int = 0) -> Chunk:
        """A piece of a tool call's arguments, which are JSON as text."""
        delta = b'{"tool_calls":[{"index":%d,"function":{"arguments":%b}}]}' % (tool, _encode(text))
        deltas = [Delta(choice, Channel.TOOL_ARGUMENTS, tool, text)] if text else []
        return Chunk(self._payload(choice, delta), deltas, content=bool(text))

    def extra(self, delta_members: Mapping[str, Any], choice: int = 0) -> Chunk:
        """Members beside OpenAI's own, or its `annotations`: nothing in them is counted, and they are no content."""
        return Chunk(self._payload(choice, _encode(delta_members)))

    def finish(self, reason: str, choice: int = 0) -> Chunk:
        """The choice's last chunk."""
        return Chunk(self.finish_payload(choice, reason), finished=(choice,), content=True)

    def finish_payload(self, choice: int, reason: str) -> bytes:
        """The JSON of a chunk that ends `choice`."""
        end = b'{"index":%d,"delta":{},"logprobs":null,"finish_reason":%b}' % (choice, _encode(reason))
        return self._head + end + self._tail

    def usage_payload(self, usage: bytes, extra: bytes) -> bytes:
        """The usage chunk: no choices, `usage` (a JSON object), then `extra` (members with a leading comma, or "")."""
        return b'%b],"usage":%b%b}' % (self._head, usage, extra)

    def _text(self, delta: bytes, text: str, channel: Channel, choice: int) -> Chunk:
        deltas = [Delta(choice, channel, 0, text)] if text else []
        return Chunk(self._payload(choice, delta % _encode(text)), deltas, content=bool(text))

    def _payload(self, choice: int, delta: bytes) -> bytes:
        end = b'{"index":%d,"delta":%b,"logprobs":null,"finish_reason":null}' % (choice, delta)
        return self._head + end + self._tail


def whole_answer(
    answer_id: str, model: str, created: int, message: Mapping[str, Any], finish_reason: str, usage_raw: bytes
) -> bytes:
    """A `chat.completion` of one choice. `message` as `assistant_message` makes it; `usage_raw` a JSON object."""
    return whole_choices(answer_id, model, created, [(message, finish_reason)], usage_raw)


def whole_choices(
    answer_id: str, model: str, created: int, choices: list[tuple[Mapping[str, Any], str]], usage_raw: bytes
) -> bytes:
    """A `chat.completion` of these (message, finish reason), in order. Without usage where `usage_raw` is empty."""
    answer: dict[str, Any] = {
        "id": answer_id,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": [
            {"index": index, "message": message, "logprobs": None, "finish_reason": reason}
            for index, (message, reason) in enumerate(choices)
        ],
    }
    if usage_raw:
        answer["usage"] = msgspec.Raw(usage_raw)
    return _encode(answer)


def assistant_message(
    content: str | None,
    *,
    reasoning: str = "",
    refusal: str | None = None,
    tool_calls: list[dict[str, Any]] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A whole answer's message. `extra` are further members (`annotations`, signatures); empty ones are left out."""
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": refusal}
    if reasoning:
        message["reasoning_content"] = reasoning
    if tool_calls:
        message["tool_calls"] = tool_calls
    return {**message, **(extra or {})}


def tool_call(call_id: str, name: str, arguments: str, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A whole answer's tool call. `arguments` is JSON as text."""
    function = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function, **(extra or {})}


class WholeAnswer(msgspec.Struct):
    """See `providers.codec.Answer`. `root` is over what `whole_answer` made."""

    root: RootObject
    usage: ReportedUsage | None

    def texts(self) -> list[tuple[int, int, int, str]]:
        """(choice, channel, tool, text) of every text in it."""
        found: list[tuple[int, int, int, str]] = []
        for index, choice in enumerate(_decode(self.root.raw("choices") or b"[]")):
            deltas = deltas_of(index, lenient_delta(choice["message"]))
            found += [(delta.choice, int(delta.channel), delta.tool, delta.text) for delta in deltas]
        return found


def count(value: Any) -> int:
    """A provider's token count: absent is 0, and what is no count at all is -1 (whoever prices it refuses it)."""
    if value is None:
        return 0
    if isinstance(value, float) and value.is_integer() and abs(value) < COUNT_MAX:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        return -1
    return value if 0 <= value <= COUNT_MAX else -1


def total(*counts: int) -> int:
    """Their sum, or -1 where one of them is no count."""
    return -1 if min(counts) < 0 else sum(counts)


def reported(usage: ReportedUsage, details: Mapping[str, Any] | None = None) -> ReportedUsage:
    """The report with OpenAI's usage object for the client; both counts are a provider's own, see `count` and `total`.
    `details` are further members; those of its `prompt_tokens_details` and `completion_tokens_details` go into OpenAI's
    objects of that name."""
    more = dict(details or {})
    prompt, output = usage.prompt or 0, usage.output or 0
    given = {
        "cached_tokens": usage.cached,
        "cache_write_tokens": usage.cache_write,
        "audio_tokens": usage.audio_input,
    }
    made = {"reasoning_tokens": usage.reasoning, "audio_tokens": usage.audio_output}
    members = {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": total(prompt, output),
        "prompt_tokens_details": {**given, **more.pop("prompt_tokens_details", {})},
        "completion_tokens_details": {**made, **more.pop("completion_tokens_details", {})},
        **more,
    }
    usage.raw = _encode(members)
    return usage
