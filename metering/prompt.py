"""How many tokens a prompt has, before a provider says so: exact for text, an over-estimate for everything else.

The rules were measured against the usage of recorded provider traffic (docs: wire contract, section 3). Text-only
prompts come out to the token; tools, images, audio and files are estimates for the hold, and say so.
Must not: raise on any decoded JSON (a malformed message is the provider's to refuse), read a clock, or load ranks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Final, Literal, NamedTuple

from metering.token_counter import Encoder, count_text, utf8_bytes
from metering.tool_text import prompt_bytes, render_tools

PromptKind = Literal["counted", "estimated"]

MESSAGE_TOKENS: Final = 3
"""Around each message, beside its role and content."""

TOOL_CALL_TOKENS: Final = 8
"""Around each tool call of an earlier turn, beside its name and arguments (measured: 7)."""

AUDIO_TOKENS_PER_BYTE: Final = (1, 400)
"""10 tokens a second at 4 KB a second, the thinnest common coding; denser ones are over-estimated."""

FILE_TOKENS_UNKNOWN: Final = 10_000
"""A file known by its id or address only."""

FILE_TOKENS_MAX: Final = 130_000
"""The most that one file can weigh: about a whole context."""

VIDEO_TOKENS_MAX: Final = 1_000_000
"""A video known by its address: about an hour at 263 tokens a second, a whole long context."""

VIDEO_BYTES_PER_TOKEN: Final = 32
"""Of a video that is sent with the request, in base64: 8 KB a second, the thinnest worth looking at."""

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")

_NEWER = re.compile(r"o[1-9]|gpt-(?:[5-9]|[1-9][0-9])")
"""o-series and gpt-5 and later: another end of the prompt, and a longer preamble for tools."""

# (tokens of a low-detail image, of one whose size is unknown). Tiles: at most 8 of them after fitting 2048 and 768;
# patches: the budget times the multiplier. First match wins.
_IMAGE_TOKENS: Final = tuple(
    (re.compile(pattern), low, high)
    for pattern, low, high in (
        (r"gpt-4o-mini", 2833, 2833 + 8 * 5667),
        (r"gpt-4\.1-mini|gpt-5-mini", 2489, 2489),
        (r"gpt-4\.1-nano|gpt-5-nano", 3779, 3779),
        (r"o4-mini", 2642, 2642),
        (r"gpt-4|chatgpt", 85, 85 + 8 * 170),
        (r"o[1-3]", 75, 75 + 8 * 150),
        (r"gpt-5(?:\.1)?(?:-|$)", 70, 70 + 8 * 140),
        (r"computer-use", 65, 65 + 8 * 129),
        (r"", 3000, 3000),
    )
)
IMAGE_TOKENS_ORIGINAL: Final = 12_000
"""`detail: original` of the newest models: a budget of 10,000 patches times 1.2."""

EXACT_BYTES_MAX: Final = 1024 * 1024
"""Text that is tokenised unless the caller says otherwise."""

BYTES_PER_TOKEN_TOOLS: Final = 5
BYTES_PER_TOKEN_GUARD: Final = 4
"""Holds take at least a token for so many bytes of JSON: of tools, and of whatever else may end up in the prompt."""

CHEAP_BYTES: Final = 64
"""So much that has no rule (an id, a flag) is held for by nothing."""

_NO_PROMPT: Final = frozenset(
    (
        *("model", "stream", "stream_options", "n", "max_tokens", "max_completion_tokens", "temperature"),
        *("top_p", "stop", "seed", "user", "metadata", "store", "frequency_penalty", "presence_penalty"),
        *("logit_bias", "logprobs", "top_logprobs", "service_tier", "parallel_tool_calls", "reasoning_effort"),
        *("verbosity", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    )
)
"""Members of a request that providers do not put into the prompt."""

_RULED: Final = frozenset(("messages", "tools", "functions", "response_format"))
_UNGUARDED: Final = _NO_PROMPT | _RULED

_ROLE_TOKENS: Final = {"system": 1, "developer": 1, "user": 1, "assistant": 1, "tool": 1, "function": 1}
"""Tokens of what every message has, in each encoding here; a test counts them."""


class PromptEstimate(NamedTuple):
    """`counted` when only text was involved, `estimated` otherwise. `hold` is what a hold should cover: `tokens`, and
    more where parts have no exact rule and could weigh more."""

    tokens: int
    kind: PromptKind
    hold: int


def estimate_prompt(
    encoding: Encoder,
    model: str,
    messages: object,
    *,
    tools: object = None,
    functions: object = None,
    response_format: object = None,
    sizes: Mapping[str, int] | None = None,
    exact_bytes_max: int = EXACT_BYTES_MAX,
    count_one: Callable[[Encoder, str], int] = count_text,
) -> PromptEstimate:
    """Tokens of a chat request's prompt. All parts are decoded JSON of any shape; nothing raises.

    `sizes` are the bytes of the request's root members as sent; they guard the hold against parts that are not
    rendered or not known. Text beyond `exact_bytes_max` is estimated by its bytes. `count_one` counts one text, by
    default as `count_text` does.

    text: sum of (3 + n(role) + n(content) [+ 1 + n(name)]) + 3, or + 2 for o-series and gpt-5 and later;
    tools: + n(their TypeScript rendering) + a constant of the model.
    """
    newer = newer_family(model)
    tokens = 2 if newer else 3
    if not tools and not functions and response_format is None and (sizes is None or sizes.keys() <= _UNGUARDED):
        texts = _plain_texts(messages, exact_bytes_max)
        if texts is not None:
            tokens += len(texts) * (MESSAGE_TOKENS + 1) + sum([count_one(encoding, text) for text in texts])
            return PromptEstimate(tokens, "counted", tokens)
    count = _Count(encoding, model, exact_bytes_max, count_one)
    listed = messages if isinstance(messages, list) else [] if messages is None else [messages]
    has_system = False
    for message in listed:
        tokens += count.message(message)
        has_system = has_system or (isinstance(message, Mapping) and message.get("role") in ("system", "developer"))
    rendered = render_tools(tools, functions)
    known = dict(sizes or {})
    if rendered:
        count.kind = "estimated"
        shown = count.text(rendered)
        tokens += shown + (89 if newer else 4 if has_system else 9)
        count.at_least(shown, known.get("tools", 0) + known.get("functions", 0), BYTES_PER_TOKEN_TOOLS)
    size = max(prompt_bytes(response_format), known.get("response_format", 0)) if response_format is not None else 0
    if isinstance(response_format, Mapping) and response_format.get("type") == "json_schema":
        count.kind = "estimated"
        tokens += size // BYTES_PER_TOKEN_GUARD + 1
    else:
        count.uncounted(size)
    count.uncounted(sum(size for name, size in known.items() if name not in _UNGUARDED))
    return PromptEstimate(tokens, count.kind, tokens + count.guard)


def _plain_texts(messages: object, bytes_max: int) -> list[str] | None:
    """The texts of messages that each have a known role, of one token, and a text, and nothing else: those of nearly
    every request, for which the rules below come down to their counts. None for others, and beyond `bytes_max`."""
    texts, left = [], bytes_max
    for message in messages if isinstance(messages, list) else (None,):
        if not isinstance(message, dict) or len(message) != 2:
            return None
        role, text = message.get("role"), message.get("content")
        if not isinstance(text, str) or not isinstance(role, str) or role not in _ROLE_TOKENS:
            return None
        left -= utf8_bytes(text)
        texts.append(text)
    return texts if left >= 0 else None


@lru_cache(maxsize=1_000)
def newer_family(model: str) -> bool:
    """Whether a model is of the o-series or gpt-5 and later; a path or fine-tune prefix is ignored."""
    return _NEWER.match(_family(model)) is not None


def _family(model: str) -> str:
    return model.rpartition("/")[2].lower().removeprefix("ft:")


class _Count:
    """Counts the parts of one prompt and remembers whether any of them was only estimated."""

    __slots__ = ("_count_one", "_encoding", "_exact_left", "guard", "kind", "model")

    def __init__(
        self, encoding: Encoder, model: str, exact_bytes_max: int, count_one: Callable[[Encoder, str], int]
    ) -> None:
        self._count_one = count_one
        self._encoding = encoding
        self._exact_left = exact_bytes_max
        self.model = _family(model)
        self.kind: PromptKind = "counted"
        self.guard = 0  # tokens that a hold covers beside the estimate

    def text(self, text: str) -> int:
        known = _ROLE_TOKENS.get(text)
        if known is not None:
            return known
        size = utf8_bytes(text)
        if size > self._exact_left:
            self.kind = "estimated"
            return size // 2 + 1
        self._exact_left -= size
        return self._count_one(self._encoding, text)

    def uncounted(self, size: int) -> None:
        """Hold for so many bytes that the estimate leaves out."""
        if size > CHEAP_BYTES:
            self.kind = "estimated"
            self.guard += size // BYTES_PER_TOKEN_GUARD + 1

    def at_least(self, counted: int, size: int, bytes_per_token: int) -> None:
        """Hold for what `counted` falls short of, by the bytes it stands for."""
        self.guard += max(0, size // bytes_per_token - counted)

    def unknown(self, value: object) -> int:
        """Something without a rule: a token for two bytes is more than any text needs."""
        if value is None:
            return 0
        self.kind = "estimated"
        return prompt_bytes(value) // 2 + 1

    def message(self, message: object) -> int:
        if not isinstance(message, Mapping):
            return MESSAGE_TOKENS + self.unknown(message)
        tokens = MESSAGE_TOKENS
        for key, value in message.items():
            if value is None:
                continue
            if key == "tool_call_id":
                self.uncounted(prompt_bytes(value))
                continue
            rule = _FIELDS.get(key)
            tokens += rule(self, value) if rule else self.unknown(value)
        return tokens

    def plain(self, value: object) -> int:
        return self.text(value) if isinstance(value, str) else self.unknown(value)

    def name(self, value: object) -> int:
        return 1 + self.plain(value)

    def content(self, value: object) -> int:
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, list):
            return sum(self._part(part) for part in value)
        return self.unknown(value)

    def tool_calls(self, value: object) -> int:
        self.kind = "estimated"
        calls = value if isinstance(value, list) else [value]
        counted = sum(self._tool_call(call) for call in calls)
        self.at_least(counted, prompt_bytes(value), BYTES_PER_TOKEN_TOOLS)
        return counted

    def _tool_call(self, call: object) -> int:
        if not isinstance(call, Mapping):
            return self.unknown(call)
        function = call.get("function") or call.get("custom") or call
        if not isinstance(function, Mapping):
            return TOOL_CALL_TOKENS + self.unknown(function)
        body = function.get("arguments", function.get("input"))
        return TOOL_CALL_TOKENS + self.plain(function.get("name")) + self.plain(body)

    def _part(self, part: object) -> int:
        if isinstance(part, str):
            return self.text(part)
        if not isinstance(part, Mapping):
            return self.unknown(part)
        kind = part.get("type")
        if isinstance(kind, str) and (kind in _PARTS or kind in ("text", "refusal")):
            self.uncounted(sum(prompt_bytes(value) for key, value in part.items() if key not in ("type", kind)))
        if kind in ("text", "refusal") and isinstance(part.get(kind), str):
            return self.text(part[kind])
        rule = _PARTS.get(kind) if isinstance(kind, str) else None
        if rule is None:
            return self.unknown(part)
        self.kind = "estimated"
        body = part.get(str(kind))
        return rule(self, body) if isinstance(body, Mapping) else self.unknown(part)

    def _image(self, image: Mapping[str, Any]) -> int:
        low, high = next((low, high) for pattern, low, high in _IMAGE_TOKENS if pattern.match(self.model))
        detail = image.get("detail")
        return low if detail == "low" else max(high, IMAGE_TOKENS_ORIGINAL) if detail == "original" else high

    def _audio(self, audio: Mapping[str, Any]) -> int:
        data = audio.get("data")
        tokens, size = AUDIO_TOKENS_PER_BYTE
        return (len(data) * 3 // 4 * tokens // size if isinstance(data, str) else FILE_TOKENS_UNKNOWN) + 1

    def _file(self, file: Mapping[str, Any]) -> int:
        data = file.get("file_data")
        if any(isinstance(value, str) and _ADDRESS.match(value) for value in file.values()):
            return self._by_address(FILE_TOKENS_MAX)
        return min(FILE_TOKENS_MAX, len(data) // 4 + 1000) if isinstance(data, str) else FILE_TOKENS_UNKNOWN

    def _video(self, video: Mapping[str, Any]) -> int:
        url = video.get("url")
        if isinstance(url, str) and url.startswith("data:"):
            return min(VIDEO_TOKENS_MAX, len(url) // VIDEO_BYTES_PER_TOKEN + 1000)
        return self._by_address(VIDEO_TOKENS_MAX)

    def _by_address(self, most: int) -> int:
        """What only the provider will see: nobody is charged the most it could be, but the hold covers it."""
        self.guard += most - FILE_TOKENS_UNKNOWN
        return FILE_TOKENS_UNKNOWN


_FIELDS: Final[dict[object, Callable[[_Count, object], int]]] = {
    "role": _Count.plain,
    "content": _Count.content,
    "name": _Count.name,
    "refusal": _Count.plain,
    "tool_calls": _Count.tool_calls,
    "function_call": _Count.tool_calls,
}
_PARTS: Final[dict[str, Callable[[_Count, Mapping[str, Any]], int]]] = {
    "image_url": _Count._image,
    "input_audio": _Count._audio,
    "file": _Count._file,
    "video_url": _Count._video,
}
