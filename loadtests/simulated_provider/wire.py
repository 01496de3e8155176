"""OpenAI's bytes: HTTP heads, SSE frames in OpenAI's key order, whole completions, error bodies.

Must not: decide what to send or when; it only writes it down.
"""

from __future__ import annotations

import random
import string
import time
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus
from typing import Any

import msgspec

from loadtests.simulated_provider.chat import Answer, Channel, Choice

SNAPSHOTS = {"gpt-4o-mini": "gpt-4o-mini-2024-07-18", "gpt-4o": "gpt-4o-2024-08-06"}
DONE = b"data: [DONE]\n\n"
LAST_CHUNK = b"0\r\n\r\n"
_FINGERPRINT = b"fp_51e0a7d2c4"
_LETTERS = "".join(random.Random(7).choices(string.ascii_letters + string.digits, k=32))
_PADS = tuple(b',"obfuscation":"%b"' % _LETTERS[at : at + at % 16].encode() for at in range(16))
# Raw text on purpose: odd spacing, number forms and escapes show whether a relay re-serialises what it forwards.
EXTRA_ROOT = b', "x_root" :{"deep": [1, 2.50, 1e3, {"e":"\\u00e9\\/\xc3\xa9"}], "big":12345678901234567890123}'
EXTRA_CHOICE = b', "x_choice" : [ null,true ]'
EXTRA_DELTA = b', "x_delta":{"a":-0.0 , "b":"\\ud83d\\ude80"}'
EXTRA_USAGE = b', "x_usage" : {"watts":0.10}'

encode = msgspec.json.encode


def usage_bytes(usage: dict[str, Any], extra: bool) -> bytes:
    return encode(usage)[:-1] + (EXTRA_USAGE if extra and usage else b"") + b"}"


def usage_object(prompt: int, completion: int, reasoning: int, cached: int) -> dict[str, Any]:
    """OpenAI's usage object in its key order. All values in tokens."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": reasoning,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> bytes:
    return encode({"error": {"message": message, "type": kind, "param": param, "code": code}})


def head(status: int, headers: list[tuple[str, str]], serial: str) -> bytes:
    """Status line and headers; `headers` come last, after what OpenAI always sends."""
    try:
        reason = HTTPStatus(status).phrase
    except ValueError:
        reason = "Unknown"
    always = [
        ("date", formatdate(usegmt=True)),
        ("openai-organization", "simulated"),
        ("openai-processing-ms", "12"),
        ("openai-version", "2020-10-01"),
        ("x-request-id", f"req_{serial}"),
    ]
    lines = "".join(f"{name}: {value}\r\n" for name, value in (*always, *headers))
    return f"HTTP/1.1 {status} {reason}\r\n{lines}\r\n".encode("latin-1")


def chunk(data: bytes) -> bytes:
    """One HTTP chunk around `data`."""
    return b"%x\r\n%b\r\n" % (len(data), data)


@dataclass(slots=True, frozen=True)
class Style:
    """How frames are written, where a script or the request changes it."""

    usage_key: bool = False  # `"usage":null` on every chunk
    obfuscate: bool = True
    extra: bool = False
    tool_index: bool = True
    reasoning_field: str = "reasoning_content"


class Frames:
    """The frames of one answer: what never changes is joined once, since load tests ask for many."""

    def __init__(self, model: str, serial: str, style: Style) -> None:
        self.style = style
        self.model = SNAPSHOTS.get(model, model)
        self.id = f"chatcmpl-{serial[:29]}"
        self.created = int(time.time())
        self._open = (
            b'data: {"id":"%b","object":"chat.completion.chunk","created":%d,"model":%b,"service_tier":"default",'
            b'"system_fingerprint":"%b","choices":['
            % (self.id.encode(), self.created, encode(self.model), _FINGERPRINT)
        )
        self._choice_end = b',"logprobs":null,"finish_reason":null' + (EXTRA_CHOICE if style.extra else b"") + b"}"
        self._usage_null = b',"usage":null' if style.usage_key else b""
        self._delta_end = (EXTRA_DELTA if style.extra else b"") + b"}"

    def _frame(self, choices: bytes, padded: int, usage: bytes | None) -> bytes:
        member = self._usage_null if usage is None else b',"usage":' + usage
        pad = _PADS[-padded % 16] if self.style.obfuscate else b""
        extra = EXTRA_ROOT if self.style.extra else b""
        return b"%b%b]%b%b%b}\n\n" % (self._open, choices, member, pad, extra)

    def delta(self, choice: int, members: bytes, usage: bytes | None = None) -> bytes:
        """A chunk with one delta; `members` is what stands between its braces."""
        body = b'{"index":%d,"delta":{%b%b%b' % (choice, members, self._delta_end, self._choice_end)
        return self._frame(body, len(members), usage)

    def piece(self, choice: int, channel: Channel, tool: int, text: str, usage: bytes | None = None) -> bytes:
        """A chunk with the next piece of a channel."""
        quoted = encode(text)
        if channel.kind == "tool":
            return self.delta(choice, self._tool(tool, b'"function":{"arguments":%b}' % quoted), usage)
        name = self.style.reasoning_field if channel.kind == "reasoning" else channel.kind
        return self.delta(choice, b'"%b":%b' % (name.encode(), quoted), usage)

    def _tool(self, tool: int, members: bytes) -> bytes:
        index = b'"index":%d,' % tool if self.style.tool_index else b""
        return b'"tool_calls":[{%b%b}]' % (index, members)

    def tool_start(self, tool: int, channel: Channel) -> bytes:
        """The members that open a tool call: id, type and name once, arguments empty."""
        call = b'"id":%b,"type":"function","function":{"name":%b,"arguments":""}'
        return self._tool(tool, call % (encode(channel.call_id), encode(channel.name)))

    @staticmethod
    def role(started_tool: bytes | None) -> bytes:
        if started_tool is not None:
            return b'"role":"assistant","content":null,%b,"refusal":null' % started_tool
        return b'"role":"assistant","content":"","refusal":null'

    def finish(self, choice: int, reason: str, usage: bytes | None = None, wrapped: bytes = b"") -> bytes:
        """The chunk that ends a choice. `wrapped` are further members of the choice."""
        extra = EXTRA_CHOICE if self.style.extra else b""
        body = b'{"index":%d,"delta":{},"logprobs":null,"finish_reason":%b%b%b}'
        return self._frame(body % (choice, encode(reason), wrapped, extra), 0, usage)

    def usage(self, usage: bytes) -> bytes:
        return self._frame(b"", 9, usage)

    def azure_preamble(self) -> bytes:
        """The first chunk of an Azure deployment: no choices, no id, no model."""
        filters = {"hate": {"filtered": False, "severity": "safe"}}
        prompt = [{"prompt_index": 0, "content_filter_results": filters}]
        members = {"choices": [], "created": 0, "id": "", "model": "", "object": "", "prompt_filter_results": prompt}
        return b"data: " + encode(members) + b"\n\n"

    def error_chunk(self, message: str) -> bytes:
        """OpenRouter's mid-stream failure: a top-level error beside a choice that finishes with "error"."""
        failed = b'{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":"error"}'
        error = encode({"code": 502, "message": message})
        whole = self._frame(failed, 0, None)
        return whole[: -len(b"}\n\n")] + b',"error":' + error + b"}\n\n"

    def whole(self, answer: Answer, usage: bytes | None, with_finish: bool, with_role: bool) -> bytes:
        """The body of a call that does not stream."""
        choices = b",".join(self._whole_choice(choice, with_finish, with_role) for choice in answer.choices)
        return (
            b'{"id":"%b","object":"chat.completion","created":%d,"model":%b,"choices":[%b]%b,"service_tier":"default",'
            b'"system_fingerprint":"%b"%b}'
            % (
                self.id.encode(),
                self.created,
                encode(self.model),
                choices,
                b"" if usage is None else b',"usage":' + usage,
                _FINGERPRINT,
                EXTRA_ROOT if self.style.extra else b"",
            )
        )

    def _whole_choice(self, choice: Choice, with_finish: bool, with_role: bool) -> bytes:
        by_kind = {channel.kind: channel.text for channel in choice.channels}
        message: dict[str, Any] = {"role": "assistant"} if with_role else {}
        message["content"] = by_kind.get("content")
        tools = [c for c in choice.channels if c.kind == "tool"]
        if tools:
            message["tool_calls"] = [
                {"id": c.call_id, "type": "function", "function": {"name": c.name, "arguments": c.text}} for c in tools
            ]
        message["refusal"] = by_kind.get("refusal")
        if "reasoning" in by_kind:
            message[self.style.reasoning_field] = by_kind["reasoning"]
        message["annotations"] = []
        extra = EXTRA_CHOICE if self.style.extra else b""
        return b'{"index":%d,"message":%b%b,"logprobs":null,"finish_reason":%b%b}' % (
            choice.index,
            encode(message)[:-1],
            self._delta_end,
            encode(choice.finish if with_finish else None),
            extra,
        )
