"""Deterministic text: what the simulated model says, cut into the tokens it is billed in.

Must not: use randomness or the clock (the same request always gets the same answer), or count in any way but one pass
of `encode_ordinary` over a whole text.
"""

# ruff: noqa: RUF001 - scripts that look like Latin are here on purpose: they split into other tokens

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from functools import cache, lru_cache
from typing import Any

import tiktoken

from metering.ranks import encoding

_SHORT_CHARS = 16_384  # texts up to this size are worth remembering: load tests repeat a few prompts for ever
_DEFAULT_TOKENS = 60
_FILLER = " yes"  # one token wherever it stands after a word

FRAGMENTS = (
    "A stream is a promise kept one token at a time, and each of them is counted as it passes. ",
    "Here is a small example:\n\n```python\ndef toll(tokens: int, micros_per_million: int) -> int:\n"
    '    """Round up."""\n    return -(-tokens * micros_per_million // 1_000_000)\n```\n\n',
    "In numbers: 1234567890 tokens at 0.15 per million make 185.19, and 3.14159 is still not pi. ",
    "Übrigens: naïve cafés in Zürich charge 4,50 € for a Rüblitorte, façade included. ",
    "日本語の文章も、正しく数えられます。中文也一样：流式输出，逐个计费。",
    "Emoji take several tokens each: 🚀🌍👩‍💻 and 🇨🇭 are whole only once all their bytes are there. ",
    "1. Reserve what the call may cost.\n2. Forward what the model says.\n3. Settle what it did cost.\n\n",
    "It's what we'd call \"don't count twice\": they're exact, I'll show you, you've seen it. ",
    "Вот строка по-русски, а ось українською, und dann wieder Deutsch. ",
    "| field | value |\n|---|---|\n| prompt_tokens | 21 |\n| completion_tokens | 84 |\n\n",
    "HTTPServer, getElementById and snake_case_names live in `src/app/index.tsx:42`. ",
    '{"id": 7, "tags": ["α", "β"], "nested": {"ok": true, "ratio": 0.25}}\n',
    "안녕하세요, 스트리밍 토큰을 세는 예시입니다. ",
    "A line\u2028separator and a next\u0085line are legal inside JSON and must not split a frame. ",
    "That is all for now; ask again whenever you like.\n",
)
THOUGHTS = (
    "The user wants an answer, so first look at what was asked. ",
    "Two readings are possible; the simpler one fits better. ",
    "Check: 17 * 23 = 391, which agrees with the estimate. ",
    "比较两种方案后，第一种更简单。",
    "Then write it down plainly. ",
)
REFUSAL = "I'm sorry, but I can't help with that request. It asks for something I won't do – even for 1,000 €."


@cache
def _codec() -> tiktoken.Encoding:
    return encoding("o200k_base")


PIECE_CHARS = 500_000


def warm_up() -> None:
    """Load the ranks now (about 0.2 s) instead of during the first request."""
    count("warm")


def _count(text: str) -> int:
    # In pieces where it is huge: the tokenizer panics at a run of a million blanks.
    pieces = range(0, len(text), PIECE_CHARS)
    return sum(len(_codec().encode_ordinary(text[at : at + PIECE_CHARS])) for at in pieces)


_remembered = lru_cache(maxsize=4096)(_count)


def count(text: str) -> int:
    """Tokens of `text` in o200k_base, in one pass over the whole of it."""
    return _remembered(text) if len(text) <= _SHORT_CHARS else _count(text)


def _pieces(text: str) -> tuple[tuple[str, int], ...]:
    out: list[tuple[str, int]] = []
    codec, held, tokens = _codec(), b"", 0
    for token in codec.encode_ordinary(text):
        held += codec.decode_single_token_bytes(token)
        tokens += 1
        try:
            out.append((held.decode(), tokens))
        except UnicodeDecodeError:
            continue  # the token ends inside a character: like OpenAI, wait for the rest of it
        held, tokens = b"", 0
    return tuple(out)


_remembered_pieces = lru_cache(maxsize=512)(_pieces)


def pieces(text: str) -> tuple[tuple[str, int], ...]:
    """`text` as (piece, tokens) pairs: one token each, more only where a token ends inside a character."""
    return _remembered_pieces(text) if len(text) <= _SHORT_CHARS else _pieces(text)


def clean(text: str) -> str:
    """`text` without lone surrogates, which no UTF-8 stream can carry."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def fit(text: str, limit: int) -> str:
    """The start of `text` that counts exactly `limit` tokens, or all of it when it is shorter.

    Where a cut would fall inside a character, or changes how the last word splits, filler words make up the number.
    """
    tokens = _codec().encode_ordinary(text)
    if len(tokens) <= limit:
        return text
    for take in range(limit, -1, -1):
        start = _codec().decode_bytes(tokens[:take]).decode("utf-8", "ignore")
        missing = limit - count(start)
        if missing >= 0 and count(filled := start + _FILLER * missing) == limit:
            return filled
    return ""


def _seed(topic: str, choice: int) -> int:
    return zlib.crc32(f"{choice}:{topic}".encode("utf-8", "replace"))


def _endless(fragments: tuple[str, ...], seed: int) -> Iterator[str]:
    """The fragments in an order that `seed` chooses, without end: a stride coprime to their number visits them all."""
    size = len(fragments)
    stride = next(s for s in range(1 + seed % 7, 100) if all(s % d or size % d for d in range(2, size + 1)))
    at = seed >> 3
    while True:
        at += stride
        yield fragments[at % size]


def _plenty(tokens: int) -> int:
    """Fragments count up to 3 % less together than one by one: enough of them to fill `tokens` for certain."""
    return tokens + tokens // 8 + 16


def _at_least(fragments: tuple[str, ...], seed: int, opening: str, tokens: int) -> str:
    parts, have = [opening], count(opening)
    for fragment in _endless(fragments, seed):
        if have >= tokens:
            break
        parts.append(fragment)
        have += count(fragment)
    return "".join(parts)


@lru_cache(maxsize=512)
def answer(topic: str, choice: int, tokens: int | None) -> str:
    """A friendly answer to `topic`: 60 to about 120 tokens of whole sentences, or exactly `tokens` of them."""
    words = " ".join(topic.split()[:8])[:60].replace('"', "'")
    opening = f'You asked about "{words}", so here is what I think. ' if words else "Hello! "
    seed = _seed(topic, choice)
    if tokens is None:
        return _at_least(FRAGMENTS, seed, opening, _DEFAULT_TOKENS + seed % 40).rstrip()
    return fit(_at_least(FRAGMENTS, seed, opening, _plenty(tokens)), tokens)


def thoughts(topic: str, choice: int, tokens: int) -> str:
    """Reasoning text of exactly `tokens` tokens."""
    return fit(_at_least(THOUGHTS, _seed(topic, choice), "Let me think. ", _plenty(tokens)), tokens)


def sample(schema: Any, topic: str = "", depth: int = 0) -> Any:
    """A value that fits a JSON schema's outline (type, enum, const, properties, items); text where it says nothing."""
    if not isinstance(schema, dict) or depth > 8:
        return topic[:40]
    if "const" in schema:
        return schema["const"]
    if isinstance(schema.get("enum"), list) and schema["enum"]:
        return schema["enum"][0]
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = next((k for k in kind if k != "null"), "null")
    if kind == "object" or isinstance(schema.get("properties"), dict):
        properties = schema.get("properties")
        members = properties.items() if isinstance(properties, dict) else ()
        return {clean(str(name)): sample(member, topic or str(name), depth + 1) for name, member in members}
    if kind == "array":
        return [sample(schema.get("items"), topic, depth + 1)]
    return {"integer": 42, "number": 3.5, "boolean": True, "null": None}.get(str(kind), f"Zürich, {topic[:40]}")


def as_json(value: Any) -> str:
    """Compact JSON the way models write it: UTF-8 as it is."""
    return clean(json.dumps(value, ensure_ascii=False, separators=(",", ":")))
