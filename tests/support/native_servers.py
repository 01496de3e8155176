"""A server that speaks providers' own wires from transcripts, and the answers of each wire without streaming.

One server on one port stands for every provider: a test says what it answers, and reads what it was asked. Transcripts
are those of `tests/transcripts`, written for the purpose.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import eventstream

TRANSCRIPTS = Path(__file__).resolve().parents[1] / "transcripts"
EVENTS = "text/event-stream; charset=utf-8"
AMAZON = "application/vnd.amazon.eventstream"


@dataclass(frozen=True)
class Asked:
    """One request as it arrived; header names in lower case."""

    method: str
    target: str
    headers: dict[str, str]
    raw: bytes

    @property
    def body(self) -> dict[str, Any]:
        """The JSON in it."""
        found: dict[str, Any] = json.loads(self.raw)
        return found


@dataclass(frozen=True)
class Held:
    """A stream whose last frame waits for `gate`."""

    whole: bytes
    gate: asyncio.Event


@asynccontextmanager
async def native_server(port: int, *answers: bytes | Held) -> AsyncIterator[list[Asked]]:
    """Answers each connection with the next of `answers` (the last one again and again); yields what it was asked."""
    asked: list[Asked] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.removesuffix("\r\n\r\n").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        method, target, _ = first.split(" ")
        asked.append(Asked(method, target, headers, await reader.readexactly(int(headers["content-length"]))))
        answer = answers[min(len(asked), len(answers)) - 1]
        if isinstance(answer, Held):
            last = answer.whole.rindex(b"data: ")
            writer.write(answer.whole[:last])
            await answer.gate.wait()
            answer = answer.whole[last:]
        writer.write(answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", port)
    async with server:
        yield asked


def streamed(body: bytes, kind: str = EVENTS) -> bytes:
    """A 200 that streams `body` and ends."""
    return f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\nconnection: close\r\n\r\n".encode() + body


def whole(value: Any, line: str = "200 OK", *headers: str) -> bytes:
    """An answer with a JSON body."""
    body = json.dumps(value).encode()
    more = "".join(f"{header}\r\n" for header in headers)
    head = f"HTTP/1.1 {line}\r\ncontent-type: application/json\r\nconnection: close\r\n{more}"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def replayed(transcript: str) -> bytes:
    """The stream of a transcript: `anthropic/plain`, `bedrock/tools`, ..."""
    wire, _, name = transcript.partition("/")
    if wire == "bedrock":
        return streamed(eventstream.wire(name), AMAZON)
    return streamed((TRANSCRIPTS / wire / f"{name}.sse").read_bytes())


def chat(usage: dict[str, Any], *more: dict[str, Any], done: bool = True) -> bytes:
    """A stream of OpenAI's wire that says "ab": `more` are members put into its chunks, the last has the finish."""
    deltas: list[tuple[dict[str, Any], str | None]] = [
        ({"role": "assistant", "content": "a"}, None),
        ({"content": "b"}, None),
        ({}, "stop"),
    ]
    frames = []
    for at, (delta, reason) in enumerate(deltas):
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        chunk = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
        frames.append({**chunk, **(more[at] if at < len(more) else {})})
    if usage:
        frames.append({**frames[0], "choices": [], "usage": usage})
    text = "".join(f"data: {json.dumps(frame)}\n\n" for frame in frames)
    return streamed((text + ("data: [DONE]\n\n" if done else "")).encode())


OPENAI_ANSWER = {
    "id": "c1",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello."}, "finish_reason": "stop"}],
    "usage": {
        "prompt_tokens": 9,
        "completion_tokens": 4,
        "total_tokens": 13,
        "prompt_tokens_details": {"cached_tokens": 3},
        "completion_tokens_details": {"reasoning_tokens": 1},
    },
}
ANTHROPIC_ANSWER = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "claude-test-5",
    "content": [
        {"type": "text", "text": "Hello."},
        {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Köln"}},
    ],
    "stop_reason": "tool_use",
    "stop_sequence": None,
    "usage": {
        "input_tokens": 5,
        "cache_creation_input_tokens": 300,
        "cache_read_input_tokens": 1000,
        "output_tokens": 30,
        "output_tokens_details": {"thinking_tokens": 20},
    },
}
GEMINI_ANSWER = {
    "candidates": [
        {
            "content": {
                "role": "model",
                "parts": [
                    {"text": "Hello."},
                    {"functionCall": {"id": "id1", "name": "weather", "args": {"city": "Köln"}}},
                ],
            },
            "finishReason": "STOP",
            "index": 0,
        }
    ],
    "usageMetadata": {
        "promptTokenCount": 20,
        "cachedContentTokenCount": 8,
        "candidatesTokenCount": 5,
        "thoughtsTokenCount": 7,
        "totalTokenCount": 32,
    },
    "modelVersion": "gemini-t",
    "responseId": "resp-1",
}
BEDROCK_ANSWER = {
    "output": {
        "message": {
            "role": "assistant",
            "content": [
                {"text": "Hello."},
                {"toolUse": {"toolUseId": "tooluse_1", "name": "weather", "input": {"city": "Köln"}}},
            ],
        }
    },
    "stopReason": "tool_use",
    "metrics": {"latencyMs": 412},
    "usage": {
        "inputTokens": 5,
        "cacheReadInputTokens": 100,
        "cacheWriteInputTokens": 30,
        "outputTokens": 6,
        "totalTokens": 141,
    },
}
