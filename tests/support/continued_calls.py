"""A call whose stream breaks and goes on elsewhere: what its client has, and providers that break or go on."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from metering.ranks import encoding
from metering.token_counter import count_text
from proxy.ids import session_id
from tests.support.gateway import Gateway, Key, until
from tests.support.raw_client import DONE, Frame, RawCall, post
from tests.support.scripted_providers import Script, Turn

FIRST = "The quick brown fox \U0001f98a jumps over the fence and"
REST = " runs into the \U0001f468\u200d\U0001f469\u200d\U0001f467 woods \U0001f44d\U0001f3fd, never to be seen again."
CANCEL_S = 0.25
GRANTED = 1_000_000


@dataclass
class Scene:
    """One client's call, its providers' view of it included."""

    gateway: Gateway
    key: Key
    call: RawCall | None = None
    frames: list[Frame] = field(default_factory=list)

    @property
    def text(self) -> str:
        """What the client has."""
        return "" if self.call is None else self.call.text

    async def has(self, text: str) -> None:
        """Until the client has this text."""
        await until(lambda: self.text == text, every=0.002)

    async def run(self, model: str = "on", **fields: Any) -> list[Frame]:
        """The whole call."""
        async with post(self.gateway, self.key, asked(model, **fields)) as self.call:
            await self.call.head()
            self.frames = await self.call.rest()
        return self.frames

    async def row(self) -> dict[str, Any]:
        """The session's row, once nothing is held."""
        (row,) = await self.gateway.sessions(self.key, 1)
        row["metadata"] = json.loads(row["metadata"]) if isinstance(row["metadata"], str) else row["metadata"]
        balance = await self.gateway.idle(self.key)
        assert balance.available == GRANTED - row["charged"]
        return row

    @property
    def usage(self) -> dict[str, Any]:
        """The one usage chunk."""
        (found,) = (frame.data for frame in self.frames if frame.data.get("usage"))
        return found

    @property
    def error(self) -> dict[str, Any] | None:
        """The error in the stream."""
        return next((frame.data["error"] for frame in self.frames if "error" in frame.data), None)


def asked(model: str, **fields: Any) -> dict[str, Any]:
    """A streamed chat request of its own."""
    messages = [{"role": "system", "content": "Tell."}, {"role": "user", "content": f"A story, {session_id()}."}]
    usage = {"stream_options": {"include_usage": True}}
    return {"model": model, "stream": True, "messages": messages, **usage, **fields}


def tokens(text: str) -> int:
    return count_text(encoding("o200k_base"), text)


def whole(scene: Scene) -> None:
    """The client's frames are one complete stream."""
    frames = [frame for frame in scene.frames if frame.kind != "comment"]
    assert [frame.kind for frame in frames].index(DONE) == len(frames) - 1
    chunks = [frame.data for frame in frames[:-1]]
    for name in ("id", "created", "model", "object"):
        assert len({chunk[name] for chunk in chunks}) == 1, name
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert [choice["delta"]["role"] for choice in choices if "role" in choice["delta"]] == ["assistant"]
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["stop"]
    assert [bool(chunk.get("usage")) for chunk in chunks].count(True) == 1
    assert chunks[-1]["usage"]


Break = Callable[[Turn], Awaitable[None]]


async def closes(turn: Turn) -> None:
    """In the middle of a chunk."""


async def resets(turn: Turn) -> None:
    turn.reset()


async def stalls(turn: Turn) -> None:
    await turn.left.wait()


async def errs(turn: Turn) -> None:
    """And keeps the connection, writing on."""
    await turn.event({"error": {"message": "boom", "type": "server_error"}})
    await turn.left.wait()


async def babbles(turn: Turn) -> None:
    await turn.raw(b'data: {"choices": [oops\n\n')
    await turn.left.wait()


async def ends_early(turn: Turn) -> None:
    """A body that is whole, without a finish."""
    turn.writer.write(b"0\r\n\r\n")


async def tears(turn: Turn) -> None:
    """In the middle of a frame."""
    await turn.raw(b'data: {"choices": [{"index": 0, "delta": {"content": "never"')


BREAKS = {"closed": closes, "closed ": resets, "stall": stalls, "server": errs, "garbage": babbles,
          "truncated": ends_early, "closed  ": tears}  # fmt: skip


def begins(scene: Scene, then: Break, *texts: str) -> Script:
    """Say this, and break once the client has all of it."""
    parts = texts or (FIRST[:9], FIRST[9:])

    async def script(turn: Turn) -> None:
        await turn.say(*parts)
        await scene.has("".join(parts))
        await then(turn)

    return script


def goes_on(text: str = REST) -> Script:
    """Go on as asked by instruction, in pieces, and report a prompt and an output of its own."""

    async def script(turn: Turn) -> None:
        reply = turn.anchor + text
        await turn.say(*(reply[at : at + 7] for at in range(0, len(reply), 7)))
        await turn.finish()

    return script
