"""A stream of plain text that broke off: whether another attempt can go on with it, and what that attempt is asked.

Must not: do I/O, or re-encode the client's messages. `providers.seam` puts the texts together, `providers.continued`
the streams.

How providers are asked (`Style`):
prefill: the text is the last message, an assistant's. Anthropic, but from Claude 4.6 on that is a 400
(platform.claude.com, "What's new in Claude 4.6"), and so it is with thinking; Ollama, whose templates leave such a
message open. White space at its end is left out, which Anthropic refuses and which other models seldom go on from well.
prefix: the same with `"prefix": true`. Mistral (docs.mistral.ai, "Prefix": its reply begins with the prefix), and
DeepSeek under /beta (api-docs.deepseek.com, "Chat Prefix Completion").
continue_final: the same with `continue_final_message`, as vLLM, SGLang and llama-server (since May 2026) name it.
instruction: the text and a request to go on. For all others: OpenAI, Groq and xAI end a message where it ends, Gemini
from 3.5 on refuses to (partly), OpenRouter does what is behind it, and `transformers serve` answers `{}`.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from providers.events import Channel, Chunk
from providers.json_root import NotAnObject, RootObject
from providers.seam import BLANK_CHARS_MAX, TAG, Style, anchor_of

DELIVERED_BYTES_MAX = 1024 * 1024
"""UTF-8 of the text that is continued: it is kept while the stream runs, and sent again."""

GEMINI_WITH_PREFILL = (3, 1)
_ABSENT: tuple[Any, ...] = (None, False, 0, [], {})
_NOT_ASKED = ("tools", "functions", "audio", "logprobs", "prediction", "web_search_options")
"""Members that bring something else than text, or say something of each token of one attempt."""
_LIMITS = ("max_tokens", "max_completion_tokens")
_READ = (*_NOT_ASKED, *_LIMITS, "messages", "n", "response_format", "modalities")
_UNHEARD = (b'"thinking"', b'"reasoning_details"', b'"audio"')
_GEMINI = re.compile(r"gemini-([0-9]{1,2})(?:\.([0-9]{1,2}))?(?![0-9])")
_INSTRUCTION = """\
The connection broke off in the middle of your last message. Go on with it from exactly where it stops, so that both \
parts together are one text. Your reply must begin with an exact copy of the last words of that message, which are:
<{tag}>{anchor}</{tag}>
Copy these words without the tags and go straight on behind them, in the middle of a word or a line where it broke off \
there. Write nothing before them and no remark about this, and repeat nothing else. If the message was complete \
already, reply with these words only."""

_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode


class _Role(msgspec.Struct):
    role: Any = None


_roles = msgspec.json.Decoder(list[_Role]).decode


class Delivered:
    """What of a stream's chunks has reached the client, gathered for the case that it breaks off. `first` is its first
    chunk with text. Texts of continuations are added to the same."""

    __slots__ = ("_chars", "_parts", "first", "plain")

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._chars = 0
        self.first: bytes | None = None
        self.plain = True
        """Whether it is nothing but unfinished content of one choice, and not too long."""

    def add(self, chunk: Chunk) -> None:
        """Note a chunk that was written. Only its deltas count: a role, or filter results, are no text."""
        if not self.plain:
            return
        if chunk.finished:
            self.plain = False
        for delta in chunk.deltas:
            self._parts.append(delta.text)
            self._chars += len(delta.text)
            if delta.channel is not Channel.CONTENT or delta.choice != 0 or self._chars > DELIVERED_BYTES_MAX:
                self.plain = False
        if chunk.deltas:
            self.first = self.first or chunk.payload
            # Thinking in parts comes as content where there is no other text; inside a JSON text these have escapes.
            if any(name in chunk.payload for name in _UNHEARD):
                self.plain = False
        if not self.plain:
            self._parts.clear()

    @property
    def text(self) -> str:
        """All of it; empty once it is not plain."""
        return "".join(self._parts)


def continuable(root: RootObject, delivered: Delivered) -> bool:
    """Whether another attempt can go on: the client's request asks for one plain text, and a piece of it, and nothing
    else, was delivered. Stop sequences may be there: whoever goes on has them too. Not where the client's last message
    is an assistant's, because nobody knows whose text the delivered one goes on with."""
    text = delivered.text
    if not text or len(text.encode()) > DELIVERED_BYTES_MAX or len(text) - len(text.rstrip()) > BLANK_CHARS_MAX:
        return False
    if not root.duplicates.isdisjoint(_READ):
        return False
    try:
        if any(_value(root, name) not in _ABSENT for name in _NOT_ASKED):
            return False
        wanted = _value(root, "response_format")
        return (
            _value(root, "n") in (None, 1)
            and (wanted is None or (isinstance(wanted, dict) and wanted.get("type") == "text"))
            and _value(root, "modalities") in (None, [], ["text"])
            and _last_role(root) not in (None, "assistant")
        )
    except (msgspec.DecodeError, RecursionError):
        return False


def style_for(kind_style: Style, model: str, root: RootObject | None = None) -> Style:
    """How `model` is asked at a provider whose kind (or table) says `kind_style`. `root` is the request: a model that
    is asked to think does not go on from a prefill."""
    if kind_style != "prefill":
        return kind_style
    if "claude" in model:
        from providers.claude import claude_version, prefills  # not loaded for wires that are not used

        able = prefills(claude_version(model))
    elif found := _GEMINI.search(model):
        able = (int(found[1]), int(found[2] or 0)) <= GEMINI_WITH_PREFILL
    else:
        able = True
    return "prefill" if able and not (root is not None and _thinks(root)) else "instruction"


def continued_body(root: RootObject, delivered: str, style: Style, spent_tokens: int) -> bytes:
    """The request whose reply goes on behind `delivered`. The client asked for its output limits in all, so each is
    lowered by `spent_tokens`, what the text has cost so far, but to no less than 1. Every other byte stays.

    Raises NotAnObject where the body has no messages.
    """
    changes: dict[str, bytes] = {}
    for name in _LIMITS:
        limit = _value(root, name)
        if isinstance(limit, int | float) and not isinstance(limit, bool):
            changes[name] = b"%d" % max(1, int(limit) - max(0, spent_tokens))
    stem = delivered.rstrip()
    if stem:  # white space alone is nothing to go on from: the reply begins anew, without it
        changes["messages"] = _appended(root, _messages(delivered, stem, style))
    if stem and style == "continue_final":
        changes |= {"continue_final_message": b"true", "add_generation_prompt": b"false"}
    return root.replaced(changes) if changes else root.body


def _messages(delivered: str, stem: str, style: Style) -> list[dict[str, Any]]:
    if style == "instruction":
        asked = _INSTRUCTION.format(tag=TAG, anchor=anchor_of(stem))
        return [{"role": "assistant", "content": delivered}, {"role": "user", "content": asked}]
    message: dict[str, Any] = {"role": "assistant", "content": stem}
    if style == "prefix":
        message["prefix"] = True
    return [message]


def _appended(root: RootObject, messages: list[dict[str, Any]]) -> bytes:
    raw = (root.raw("messages") or b"").rstrip()
    if not raw.startswith(b"["):
        raise NotAnObject("the body has no messages")
    first = raw[1:-1].strip() == b""
    return b"%b%b%b" % (raw[:-1].rstrip(), b"" if first else b",", _encode(messages)[1:])


def _value(root: RootObject, name: str) -> Any:
    raw = root.raw(name)
    return None if raw is None else _decode(raw)


def _last_role(root: RootObject) -> Any:
    messages = _roles(root.raw("messages") or b"[]")
    return messages[-1].role if messages else None


def _thinks(root: RootObject) -> bool:
    try:
        effort, thinking = _value(root, "reasoning_effort"), _value(root, "thinking")
        reasoning = _value(root, "reasoning")
    except (msgspec.DecodeError, RecursionError):
        return True
    if isinstance(thinking, dict) and thinking.get("type") == "disabled":
        thinking = None
    return effort not in (None, "none") or thinking is not None or reasoning is not None
