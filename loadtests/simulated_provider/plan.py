"""From a request to the steps of its reply: the answer, its frames, and the knobs that scripts turned.

Must not: write to sockets or keep state beyond the exchange; steps are made lazily while the connection plays them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from loadtests.simulated_provider import scripts, steps, text, wire
from loadtests.simulated_provider.chat import TOKENS_MAX, Answer, BadRequest, Channel, Chat, Choice, answer
from loadtests.simulated_provider.log import Exchange
from loadtests.simulated_provider.scripts import Knobs, Reply
from loadtests.simulated_provider.steps import Step, Steps

SSE_HEADERS = [
    ("content-type", "text/event-stream; charset=utf-8"),
    ("cache-control", "no-cache"),
]
RESPONSE_BYTES_MAX = 4 * 1024 * 1024


@dataclass(slots=True)
class Plan:
    """What the connection plays. `keep_alive` is False where the close ends the body."""

    steps: Steps
    status: int | None
    keep_alive: bool = True


@dataclass(slots=True, frozen=True)
class Pace:
    """The process's defaults, in milliseconds."""

    interval_ms: float = 0.0
    ttft_ms: float = 0.0


def _number(chat: Chat, name: str, most: int) -> float | None:
    written = chat.steer.get(name)
    if written is None:
        return None
    try:
        value = float(written)
    except ValueError:
        value = -1.0
    if not 0 <= value <= most:
        raise BadRequest(f"[[{name}=...]] takes a number from 0 to {most}.", "messages", "invalid_value")
    return value


def knobs_for(chat: Chat, pace: Pace, tally: Counter[str]) -> Knobs:
    """The process's defaults, then the model's name, then the last user message. Raises BadRequest."""
    knobs = Knobs(tally, chat.stream, pace.interval_ms, pace.ttft_ms)
    scripts.turn(knobs, chat.model)
    interval, ttft = _number(chat, "interval_ms", scripts.MS_MAX), _number(chat, "ttft_ms", scripts.MS_MAX)
    tokens = _number(chat, "tokens", TOKENS_MAX)
    knobs.interval_ms = knobs.interval_ms if interval is None else interval
    knobs.ttft_ms = knobs.ttft_ms if ttft is None else ttft
    knobs.shape.tokens = knobs.shape.tokens if tokens is None else int(tokens)
    return knobs


def _pieces(channel: Channel, chars: int) -> Iterator[tuple[str, int]]:
    """The deltas of a channel. With `chars` they ignore token boundaries, and a delta's tokens are its share."""
    if not chars:
        yield from text.pieces(channel.text)
        return
    total, size = text.count(channel.text), len(channel.text)
    for at in range(0, size, chars):
        end = min(size, at + chars)
        yield channel.text[at:end], total * end // size - total * at // size


class Stream:
    """The frames of one streamed answer."""

    def __init__(self, chat: Chat, said: Answer, frames: wire.Frames, knobs: Knobs) -> None:
        self.chat, self.said, self.frames, self.knobs = chat, said, frames, knobs
        self.interval_ms = knobs.interval_ms / len(said.choices)
        self.sent = said.hidden_tokens
        self.sent_reasoning = said.hidden_tokens
        self.first = True
        self.latest: dict[str, Any] | None = None  # the usage on the newest chunk, where each carries one

    def _so_far(self) -> bytes | None:
        if self.knobs.usage != "everywhere":
            return None
        self.latest = self._usage(self.sent, self.sent_reasoning)
        return wire.usage_bytes(self.latest, self.frames.style.extra)

    def _usage(self, completion: int, reasoning: int) -> dict[str, Any]:
        prompt = self.said.prompt_tokens
        return wire.usage_object(prompt, completion, reasoning, min(self.knobs.cached, prompt))

    def usages(self) -> list[dict[str, Any]]:
        """The usage objects at the end, as the script wants them."""
        true = self._usage(self.said.completion_tokens(), self.said.reasoning_tokens())
        return self.knobs.usages(true)

    def _counted(self, choice: int, channel: Channel, tool: int, piece: str, tokens: int) -> Step:
        self.sent += tokens
        if channel.kind == "reasoning":
            self.sent_reasoning += tokens
        delay_ms = self.knobs.first_ms if self.first else self.interval_ms
        self.first = False
        data = self.frames.piece(choice, channel, tool, piece, self._so_far())
        return Step(data, "content", delay_ms, tokens, channel, piece)

    def _opening(self, choice: Choice) -> Step | None:
        """The role chunk; it also opens a tool call that comes first."""
        channel = choice.channels[0] if choice.channels else None
        if not self.knobs.role:
            return None
        if channel is None or channel.kind != "tool":
            return Step(self.frames.delta(choice.index, self.frames.role(None), self._so_far()), "role")
        tokens, delay_ms, self.first = text.count(channel.name), self.knobs.first_ms, False
        self.sent += tokens
        members = self.frames.role(self.frames.tool_start(0, channel))
        return Step(self.frames.delta(choice.index, members, self._so_far()), "call", delay_ms, tokens, channel)

    def _call(self, choice: Choice, channel: Channel, tool: int) -> Step:
        tokens = text.count(channel.name)
        self.sent += tokens
        data = self.frames.delta(choice.index, self.frames.tool_start(tool, channel), self._so_far())
        return Step(data, "call", self.interval_ms, tokens, channel)

    def _choice(self, choice: Choice) -> Steps:
        opening = self._opening(choice)
        if opening is not None:
            yield opening
        opened = opening is not None and opening.kind == "call"
        tool = -1
        for channel in choice.channels:
            if channel.kind == "tool":
                tool += 1
                if tool or not opened:
                    yield self._call(choice, channel, tool)
            for piece, tokens in _pieces(channel, self.knobs.chars):
                yield self._counted(choice.index, channel, tool, piece, tokens)

    def steps(self) -> Steps:
        """All frames: the choices take turns, then their finish chunks, usage and [DONE]."""
        turns = [self._choice(choice) for choice in self.said.choices]
        while turns:
            for turn in list(turns):
                step = next(turn, None)
                if step is None:
                    turns.remove(turn)
                else:
                    yield step if self.latest is None else step._replace(usage=self.latest)
        yield from self._endings()
        yield Step(wire.DONE, "done")

    def _endings(self) -> Steps:
        extra, usages = self.frames.style.extra, self.usages()
        for choice in self.said.choices if self.knobs.finish else ():
            usage = self._so_far()
            if self.knobs.usage == "finish" and choice is self.said.choices[-1]:
                usage = wire.usage_bytes(usages[-1], extra)
            data = self.frames.finish(choice.index, choice.finish, usage)
            yield Step(data, "finish", usage=usages[-1] if self.knobs.usage == "finish" else None)
        asked = self.knobs.usage == "asked" and self.chat.include_usage
        if asked or self.knobs.usage == "everywhere":
            for object_ in usages:
                yield Step(self.frames.usage(wire.usage_bytes(object_, extra)), "usage", usage=object_)


def reply_plan(reply: Reply, knobs: Knobs, serial: str) -> Plan:
    """A reply that is no answer: errors, pages, bytes that are not HTTP."""
    if reply.raw is not None:
        return Plan(iter([Step(reply.raw, "half", knobs.head_ms), Step(kind="close")]), None, keep_alive=False)
    headers = [("content-type", reply.content_type), *reply.headers]
    if knobs.chunked:
        headers.append(("content-length", str(len(reply.body))))
    head = wire.head(reply.status, headers, serial)
    step = Step(head + reply.body, "whole", knobs.head_ms + knobs.ttft_ms)
    return Plan(_finished(iter([step]), knobs), reply.status, keep_alive=knobs.chunked)


def _finished(played: Steps, knobs: Knobs) -> Steps:
    return played if knobs.drip_ms is None else steps.dripped(played, knobs.drip_ms)


def _stream_plan(stream: Stream, serial: str, exchange: Exchange) -> Plan:
    knobs = stream.knobs
    body = steps.later(stream.steps(), knobs.ttft_ms)
    for transform in knobs.transforms:
        body = transform(stream.frames)(body)
    if knobs.record:
        body = steps.recorded(exchange.recording(), RESPONSE_BYTES_MAX)(body)
    headers = [*SSE_HEADERS, ("transfer-encoding", "chunked")] if knobs.chunked else SSE_HEADERS
    head = Step(wire.head(200, headers, serial), "head", knobs.head_ms)
    return Plan(_finished(steps.framed(head, body, knobs.chunked), knobs), 200, keep_alive=knobs.chunked)


def _whole_plan(stream: Stream, serial: str, exchange: Exchange) -> Plan:
    """A call that does not stream takes as long as its stream would, then answers at once."""
    knobs = stream.knobs
    usage = None if knobs.usage == "never" else stream.usages()[-1]
    written = None if usage is None else wire.usage_bytes(usage, knobs.extra)
    body = stream.frames.whole(stream.said, written, knobs.finish, knobs.role)
    if knobs.record:
        exchange.recording().extend(body[:RESPONSE_BYTES_MAX])
    headers = [("content-type", "application/json")]
    if knobs.chunked:
        headers.append(("content-length", str(len(body))))
    data = wire.head(200, headers, serial) + body
    tokens = stream.said.completion_tokens()
    wait_ms = knobs.head_ms + knobs.ttft_ms + knobs.first_ms + knobs.interval_ms * tokens
    played = [Step(data, "whole", wait_ms, tokens, usage=usage)]
    if knobs.broken_whole == "stall":
        played = [Step(kind="stall")]
    elif knobs.broken_whole:
        half = data[: len(data) - len(body) // 2]
        played = [Step(half, "half", wait_ms, tokens), Step(kind=knobs.broken_whole)]
    return Plan(_finished(iter(played), knobs), 200, keep_alive=knobs.chunked)


def plan(chat: Chat, knobs: Knobs, serial: str, exchange: Exchange) -> Plan:
    """Decide on the reply to a chat request, and note in `exchange` what it will be."""
    if knobs.reply is not None:
        return reply_plan(knobs.reply, knobs, serial)
    said = answer(chat, knobs.shape, serial[:16])
    exchange.promise(said)
    style = wire.Style(
        usage_key=chat.include_usage and knobs.usage == "asked",
        obfuscate=chat.obfuscate,
        extra=knobs.extra,
        tool_index=knobs.tool_index,
        reasoning_field=knobs.reasoning_field,
    )
    stream = Stream(chat, said, wire.Frames(chat.model, serial, style), knobs)
    make = _stream_plan if knobs.stream else _whole_plan
    return make(stream, serial, exchange)
