"""The bytes of the bench: what the upstream speaks and what the load client asks for, built once.

A chunk is one SSE event of about 311 bytes with 4 characters of text, as OpenAI's API sends them; every word is one
token of o200k, so that `completion_tokens` is the number of chunks and a charge can be checked to the token.
Must not: know sockets or processes.
"""

from __future__ import annotations

import json
from typing import Any

MODEL = "gpt-4o-mini"
TLS_MODEL = "gpt-4o-mini-tls"
"""The route to the same provider over TLS."""
WORDS = ("day", "man", "way", "sun", "sea", "sky", "air", "hat", "cat", "dog", "car", "bus", "map", "pen", "box", "cup")
_YEAR = "00000000"
"""Eight digits of every prompt, which `asked_anew` makes others: nobody asks twice the same."""
END = "end"
"""The plan that ends all streams."""
PROMPT_TOKENS = 21
ANSWER_TOKENS = 40
EVENTS_AROUND = 4
"""Events of a stream besides its n chunks of text: role, finish, usage and `[DONE]`."""

_DATE = b"date: Fri, 20 Nov 2026 09:00:00 GMT\r\n"
_ID = "chatcmpl-CDq7vYtLmB2sRr0aXkW1u9nZpQeTg"
_CREATED = 1763640000


def _usage(output: int) -> dict[str, Any]:
    return {
        "prompt_tokens": PROMPT_TOKENS,
        "completion_tokens": output,
        "total_tokens": PROMPT_TOKENS + output,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def _http_chunk(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def _event(choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
    body = {
        "id": _ID,
        "object": "chat.completion.chunk",
        "created": _CREATED,
        "model": MODEL + "-2024-07-18",
        "service_tier": "default",
        "system_fingerprint": "fp_44709d6fcb1ce2d8",
        "choices": choices,
        "usage": usage,
    }
    return _http_chunk(b"data: %b\n\n" % _json(body))


def _delta(delta: dict[str, Any], finish: str | None = None) -> list[dict[str, Any]]:
    return [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]


def _json(body: Any) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()


STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\n" + _DATE + b"content-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\nconnection: keep-alive\r\ncache-control: no-cache\r\nopenai-processing-ms: 12\r\n"
    b"x-request-id: req_0a1b2c3d4e5f60718293a4b5c6d7e8f9\r\n\r\n"
)
ROLE = _event(_delta({"role": "assistant", "content": "", "refusal": None}))
CHUNKS = tuple(_event(_delta({"content": " " + word})) for word in WORDS)
FINISH = _event(_delta({}, "stop"))
DONE = _http_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


def last(chunks: int) -> bytes:
    """The end of a stream of so many chunks: finish, usage, `[DONE]`, end of the body."""
    return FINISH + _event([], _usage(chunks)) + DONE


def _answer() -> bytes:
    text = "".join(" " + WORDS[index % len(WORDS)] for index in range(ANSWER_TOKENS))
    message = {"role": "assistant", "content": text, "refusal": None}
    body = _json(
        {
            "id": _ID,
            "object": "chat.completion",
            "created": _CREATED,
            "model": MODEL + "-2024-07-18",
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
            "usage": _usage(ANSWER_TOKENS),
            "service_tier": "default",
            "system_fingerprint": "fp_44709d6fcb1ce2d8",
        }
    )
    head = b"HTTP/1.1 200 OK\r\n" + _DATE + b"content-type: application/json\r\nconnection: keep-alive\r\n"
    return head + b"content-length: %d\r\n\r\n%b" % (len(body), body)


ANSWER = _answer()


def asked_anew(request: bytes, number: int) -> bytes:
    """The request with another prompt of the same length."""
    return request.replace(_YEAR.encode(), b"%08d" % (number % 100_000_000), 1)


def request(port: int, key: str, *, plan: str = "", stream: bool = False, model: str = MODEL) -> bytes:
    """A whole request. `plan` travels in the standard field `user` to the upstream: `chunks=2 rate=0`, or END."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": f"Tell me how the harbour master kept her two ledgers in year {_YEAR}."},
        ],
        "user": plan,
    }
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    raw = _json(body)
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        f"host: 127.0.0.1:{port}",
        f"authorization: Bearer {key}",
        "content-type: application/json",
        "accept: " + ("text/event-stream" if stream else "application/json"),
        "user-agent: tollgate-bench/1",
        f"content-length: {len(raw)}",
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + raw
