"""Scripted providers: what one connection will bring, byte for byte, with the words that each prefix of it holds.

Every word is one token of the encoding, wherever frames or reads cut the text, so counting words is counting tokens
(`check_words` proves it). Must not: know the core; a script is only bytes and what is true of them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from random import Random
from typing import Any

from metering.token_counter import Encoder, count_text

WORDS = (" red", " blue", " green", " one", " two", " three", " river", " stone", " cloud", " bird", " tree", " house")
FIRST_WORDS = (" north", " south", " east", " west", " alpha", " beta", " gamma", " delta")
"""What the continuations of one answer begin with, each with its own: it shows whose words a client has."""
Kind = tuple[int, bool]
"""A text of its own: choice, and whether it is reasoning."""
SENDS = b"data: %b\n\n"
FRAMES = (0, 1, 2, 5, 10, 30)


def check_words(encoder: Encoder) -> None:
    """Raises AssertionError unless every word, alone or after another, is one token."""
    for first in WORDS + FIRST_WORDS:
        for second in WORDS:
            assert count_text(encoder, first + second + first) == 3


@dataclass
class Usage:
    """Token counts that a provider reports. `sane` says whether they can be believed."""

    prompt: int
    output: int
    reasoning: int
    cached: int
    sane: bool

    def json(self) -> dict[str, Any]:
        """As OpenAI writes it."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.output,
            "total_tokens": self.prompt + self.output,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning},
        }


@dataclass
class Mark:
    """What is true of a response once its bytes up to `at` have come."""

    at: int
    texts: list[tuple[Kind, str]] = field(default_factory=list)
    shows: bool = False
    """Whether a client would call it content."""
    usage: Usage | None = None
    """What the provider has reported."""


@dataclass
class Script:
    """One connection's life. `dial`: accept, refuse or hang. `raw` is all that is ever sent; then `end`: keep (the
    response was whole), eof, reset or stall."""

    dial: str
    raw: bytes
    end: str
    head_at: int
    success: bool
    """A 2xx status."""
    marks: list[Mark]
    completes: bool
    """Whether all of it, with its end, makes a complete answer."""
    usage: Usage | None
    kind: str
    early: Usage | None = None
    """Reported before a failure."""
    final: bool = False
    """Whether it fails by an error that nobody else is to be asked after, once there was content."""

    def texts(self, given: int | None = None) -> dict[Kind, str]:
        """All text in the frames within the first `given` bytes (None: all of them)."""
        found: dict[Kind, str] = {}
        for mark in self.marks:
            if given is None or mark.at <= given:
                for kind, words in mark.texts:
                    found[kind] = found.get(kind, "") + words
        return found

    def seen(self, given: int) -> Usage | None:
        """The last believable report within the first `given` bytes."""
        reports = [mark.usage for mark in self.marks if mark.at <= given and mark.usage is not None and mark.usage.sane]
        return reports[-1] if reports else None


@dataclass(frozen=True)
class Wanted:
    """What a script is asked for. `name` is the id of its chunks, `prompt` the tokens of the prompt."""

    stream: bool
    usage_asked: bool
    prompt: int
    name: str = "c1"


Piece = tuple[Kind, str, str]
"""What a frame says: to which text it belongs, the words, and which of them a client is to get."""


class _Response:
    """Builds the raw bytes and remembers where each frame ends in them."""

    def __init__(self, rng: Random, head: bytes) -> None:
        self._rng = rng
        self._body = bytearray()
        self._head = head
        self._ends: list[tuple[int, Mark]] = []

    def add(self, data: bytes, mark: Mark | None = None) -> None:
        self._body += data
        if mark is not None:
            self._ends.append((len(self._body), mark))

    def cut(self, share: float) -> None:
        """Forget what comes behind this share of the body."""
        del self._body[int(len(self._body) * share) :]
        self._ends = [(end, mark) for end, mark in self._ends if end <= len(self._body)]

    def raw(self, *, last: bool) -> tuple[bytes, list[Mark]]:
        """Chunked transfer coding, in pieces of any size; `last` adds the chunk that ends it."""
        out, at, marks = bytearray(self._head), 0, list(self._ends)
        while at < len(self._body):
            size = self._rng.choice((1, 7, 40, 200, 1_000))
            piece = self._body[at : at + size]
            out += b"%x\r\n" % len(piece)
            for end, mark in marks:
                if at < end <= at + len(piece):
                    mark.at = len(out) + end - at
            out += piece + b"\r\n"
            at += len(piece)
        if last:
            out += b"0\r\n\r\n"
        return bytes(out), [mark for _, mark in marks]


_CHUNKED = b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n"  # each attempt has a script, so a connection too
_SSE_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n" + _CHUNKED
_JSON_HEAD = b"HTTP/1.1 %d Some Reason\r\ncontent-type: application/json\r\n" + _CHUNKED
_ERROR = b'{"error":{"message":"boom","type":"server_error"}}'
_REFUSAL = b'{"error":{"message":"no","status":400,"code":"content_policy_violation"}}'


Kinds = tuple[str, ...]
KINDS: Kinds = ("refuse", "hang", "status", "silent", "cut", "cut", "stall", "stall", "error", "garbage", "odd")
BROKEN: Kinds = ("cut", "cut", "stall", "error", "garbage")
"""Those that may come after content."""


def script(
    rng: Random,
    wanted: Wanted,
    trouble: float,
    pieces: list[Piece] | None = None,
    kinds: Kinds = KINDS,
) -> Script:
    """A random connection; with probability `trouble` one that goes wrong, as one of `kinds`. `pieces`: what a stream
    says."""
    kind = rng.choice(kinds) if rng.random() < (trouble if kinds is KINDS else 0.9) else "good"
    if kind in ("refuse", "hang"):
        return Script(kind, b"", "stall", 0, False, [], False, None, kind)
    if kind == "silent":
        return Script("accept", b"", rng.choice(("stall", "eof", "reset")), 1, False, [], False, None, kind)
    if kind == "status":
        return _status(rng)
    if wanted.stream and kind != "odd":
        return _stream(rng, kind, wanted, _texts(rng) if pieces is None else pieces)
    return _whole(rng, "cut" if kind == "error" else kind, wanted.prompt)


def _status(rng: Random) -> Script:
    status = rng.choice((400, 401, 404, 429, 500, 503))
    response = _Response(rng, _JSON_HEAD % status)
    response.add(json.dumps({"error": {"message": "no", "type": "some_error", "code": None}}).encode())
    raw, _ = response.raw(last=True)
    return Script("accept", raw, "keep", len(_JSON_HEAD % status), False, [], False, None, f"status {status}")


def _texts(rng: Random) -> list[Piece]:
    choices = 2 if rng.random() < 0.15 else 1
    thinks = rng.random() < 0.2
    found: list[Piece] = []
    for words in some_words(rng):
        found.append(((rng.randrange(choices), thinks and rng.random() < 0.5), words, words))
    return found


def plain_pieces(words: list[str]) -> list[Piece]:
    """Content of one choice, a frame each."""
    return [((0, False), each, each) for each in words]


def some_words(rng: Random) -> list[str]:
    """The words of a stream's frames."""
    return ["".join(rng.choices(WORDS, k=rng.choice((1, 1, 1, 2, 5, 12)))) for _ in range(rng.choice(FRAMES))]


def _usage(rng: Random, texts: list[Piece], prompt: int) -> Usage:
    output = sum(text.count(" ") for _, text, _ in texts)
    reasoning = sum(text.count(" ") for (_, thought), text, _ in texts if thought)
    if rng.random() < 0.15:
        return Usage(-1, output, 0, 0, False)
    more = rng.choice((0, 0, 0, 3))  # our count of a prompt is an estimate, and some servers add tokens of their own
    usage = Usage(max(0, prompt + rng.choice((0, 0, -1, 2))), output + more, reasoning, 0, True)
    usage.cached = rng.randint(0, usage.prompt) if rng.random() < 0.3 else 0
    return usage


def _chunk(name: str, choices: list[dict[str, Any]], **more: Any) -> bytes:
    frame = {"id": name, "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": choices, **more}
    return SENDS % json.dumps(frame).encode()


def _stream(rng: Random, kind: str, wanted: Wanted, texts: list[Piece]) -> Script:
    response, name = _Response(rng, _SSE_HEAD), wanted.name
    if rng.random() < 0.3:
        response.add(b": hello\n\n")
    broken_at = (
        rng.randint(min(len(texts), rng.choice((0, 1))), len(texts)) if kind in ("error", "garbage") else len(texts)
    )
    begun: set[int] = set()
    for (choice, thought), words, told in texts[:broken_at]:
        delta = {"reasoning_content" if thought else "content": words}
        if choice not in begun and rng.random() < 0.8:
            if rng.random() < 0.5:
                response.add(_chunk(name, [{"index": choice, "delta": {"role": "assistant", "content": ""}}]))
            else:
                delta["role"] = "assistant"
        begun.add(choice)
        mark = Mark(0, [((choice, thought), told)] if told else [], bool(told))
        response.add(_chunk(name, [{"index": choice, "delta": delta}]), mark)
    if kind in ("error", "garbage"):
        return _broken(rng, response, kind, wanted, texts[:broken_at])
    usage = _usage(rng, texts, wanted.prompt) if wanted.usage_asked and rng.random() < 0.8 else None
    finishes = rng.random() < 0.9
    done = not finishes or rng.random() < 0.9
    with_finish = usage is not None and rng.random() < 0.3
    for choice in sorted(begun or {0}) if finishes else ():
        last = {"usage": usage.json()} if with_finish and usage is not None else {}
        frame = _chunk(name, [{"index": choice, "delta": {}, "finish_reason": "stop"}], **last)
        response.add(frame, Mark(0, [], True, usage if with_finish else None))
    if usage is not None and not (finishes and with_finish):
        response.add(_chunk(name, [], usage=usage.json()), Mark(0, usage=usage))
    if done:
        response.add(SENDS % b"[DONE]")
    completes = done if begun or finishes else False
    if kind in ("cut", "stall"):
        response.cut(rng.random() * 0.98)
        raw, marks = response.raw(last=False)
        end = rng.choice(("eof", "reset")) if kind == "cut" else "stall"
        # A cut between a finish and `[DONE]` is a complete stream where the end of the body is known to be one.
        return Script("accept", raw, end, len(_SSE_HEAD), True, marks, False, usage, kind)
    raw, marks = response.raw(last=True)
    return Script("accept", raw, "keep", len(_SSE_HEAD), True, marks, completes or finishes, usage, kind)


def _broken(rng: Random, response: _Response, kind: str, wanted: Wanted, said: list[Piece]) -> Script:
    """A stream that ends in an error, or in what is no frame."""
    early = _usage(rng, said, wanted.prompt) if rng.random() < 0.4 else None
    if early is not None:
        response.add(_chunk(wanted.name, [], usage=early.json()), Mark(0, usage=early))
    final = kind == "error" and rng.random() < 0.3
    response.add(SENDS % (b'{"choices": [oops' if kind == "garbage" else _REFUSAL if final else _ERROR))
    raw, marks = response.raw(last=True)
    return Script("accept", raw, "keep", len(_SSE_HEAD), True, marks, False, None, kind, early, final)


def _whole(rng: Random, kind: str, prompt: int) -> Script:
    """An answer without streaming (for `odd` also where a stream was asked for)."""
    words = "".join(rng.choices(WORDS, k=rng.choice((1, 3, 20, 60))))
    texts: list[Piece] = [((0, False), words, words)]
    usage = _usage(rng, texts, prompt) if rng.random() < 0.7 else None
    answer: dict[str, Any] = {"id": "a", "object": "chat.completion", "created": 1, "model": "m"}
    answer["choices"] = [{"index": 0, "message": {"role": "assistant", "content": words}, "finish_reason": "stop"}]
    if usage is not None:
        answer["usage"] = usage.json()
    body = json.dumps(answer).encode()
    if kind in ("garbage", "odd"):
        body = rng.choice((b"<html>", b'{"object":"x"}', b'{"error":{"message":"late","code":500}}'))
    response = _Response(rng, _JSON_HEAD % 200)
    mark = Mark(0, [((0, False), words)], True)
    response.add(body, mark)
    if kind in ("cut", "stall"):
        response.cut(rng.random() * 0.98)
        raw, marks = response.raw(last=False)
        end = rng.choice(("eof", "reset")) if kind == "cut" else "stall"
        return Script("accept", raw, end, len(_JSON_HEAD % 200), True, marks, False, usage, kind)
    raw, marks = response.raw(last=True)
    good = kind == "good"
    return Script("accept", raw, "keep", len(_JSON_HEAD % 200), True, marks if good else [], good, usage, kind)
