"""Locust users of an OpenAI-compatible server: who calls what, how they read, and what they report as request events.

Request types: `POST` (a whole call), `abort` (until the client left), `TTFT` (to the first content), `gap` and `gap
max` (mean and worst time between chunks of one answer), all in milliseconds, and `tokens/s` (its number stands where
Locust shows milliseconds).
Must not: know the gateway; addresses and keys come from outside (`-H`, LOADTEST_KEYS).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, ClassVar, TextIO
from urllib.parse import urlsplit

from locust import User, between

from loadtests.users.calls import Call, Exchange, Manner, request_bytes
from loadtests.users.wire import Connection, WireError

READ_WHOLE = Manner()
_SENTENCE = "The toll is taken at the gate, once, for what has passed through it. "
_numbers = itertools.count()


@cache
def keys() -> tuple[str, ...]:
    """The API keys to call with: one a line in the file that LOADTEST_KEYS names."""
    return tuple(Path(os.environ["LOADTEST_KEYS"]).read_text().split())


@cache
def call_log() -> TextIO:
    """Where each call leaves a line: the file that LOADTEST_CALLS names. Whole lines, so processes may share it."""
    return Path(os.environ.get("LOADTEST_CALLS", os.devnull)).open("a", encoding="utf-8")


class ChatUser(User):  # type: ignore[misc]  # Locust is installed in .venv-bench only
    """A user with a connection of their own, kept between calls as SDKs do, and a key drawn anew for every call."""

    abstract = True
    wait_time = between(0.2, 1.5)
    who: ClassVar[str]
    expected: ClassVar[frozenset[str]] = frozenset({"completed"})
    paced: ClassVar[bool] = True  # whether its gaps are the server's, not its own slowness

    def on_start(self) -> None:
        self.random = Random(f"{os.environ.get('LOADTEST_SEED', '1')}:{next(_numbers)}")
        self._connection: Connection | None = None

    def on_stop(self) -> None:
        if self._connection is not None:
            self._connection.leave()

    def ask(self, model: str = "gpt-4o-mini", *, stream: bool, tokens: int | None = None) -> dict[str, Any]:
        """A request's body: a prompt of 20 to some 2,000 tokens, an answer of `tokens` or of the model's own length."""
        steer = "" if tokens is None else f"[[tokens={tokens}]]"
        length = self.random.choice((1, 1, 1, 2, 8, 120))
        say = f"{steer}Question {self.random.randrange(1000)}: {_SENTENCE * length}"
        fields: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": say}], "stream": stream}
        if stream:
            fields["stream_options"] = {"include_usage": True}
        return fields

    def chat(self, fields: dict[str, Any], manner: Manner = READ_WHOLE) -> Call:
        """One call, from connecting to the report. It is logged however it ends, also when Locust stops the user."""
        call = Call(self.who, fields["model"], fields["stream"])
        exchange: Exchange | None = None
        try:
            connection = self._send(fields, manner)
            exchange = Exchange(call, manner)
            self._connection = connection if exchange.read(connection) else None
        except (OSError, WireError, ValueError, KeyError) as error:
            call.ending, call.error = "failed", f"{type(error).__name__}: {error}"
            self._hang_up()
        except BaseException:  # Locust stops the user in the middle of a call: it is one more client that leaves
            self._hang_up()
            raise
        finally:
            if exchange is not None:
                exchange.stop_clock()
            call_log().write(call.line())
            call_log().flush()
        self._report(call)
        return call

    def _send(self, fields: dict[str, Any], manner: Manner) -> Connection:
        place = urlsplit(self.host)
        request = request_bytes(place.netloc, self.random.choice(keys()), fields)
        kept = self._connection
        if kept is None or manner.receive_bytes is not None:
            self._hang_up()
            kept = self._connection = Connection(place.hostname or "", place.port or 80, manner.receive_bytes)
        kept.send(request)
        return kept

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.leave()
            self._connection = None

    def _report(self, call: Call) -> None:
        wrong = None if call.ending in self.expected else RuntimeError(f"{call.ending}: {call.error}")
        kind = "abort" if call.ending == "aborted" else "POST"
        self._fire(kind, call.total_ms, call.received_bytes, wrong)
        if call.ttft_ms is not None:
            self._fire("TTFT", call.ttft_ms)
        if call.gaps_ms and self.paced:
            spent_ms = sum(call.gaps_ms)
            self._fire("gap", spent_ms / len(call.gaps_ms))
            self._fire("gap max", max(call.gaps_ms))
            if call.ending == "completed" and spent_ms:
                self._fire("tokens/s", len(call.gaps_ms) * 1000 / spent_ms)

    def _fire(self, kind: str, value: float, length: int = 0, exception: Exception | None = None) -> None:
        self.environment.events.request.fire(
            request_type=kind,
            name=self.who,
            response_time=value,
            response_length=length,
            exception=exception,
            context={},
        )


def _stream(user: ChatUser) -> None:
    user.chat(user.ask(stream=True, tokens=user.random.choice((None, None, 20, 150, 300))))


def _whole(user: ChatUser) -> None:
    user.chat(user.ask(stream=False, tokens=user.random.choice((None, 10, 40))))


def _leave(user: ChatUser) -> None:
    reset, dice = user.random.random() < 0.5, user.random.random()
    if dice < 0.25:  # a call without streaming is left after a time: nothing of it has come before it is whole
        user.chat(user.ask(stream=False), Manner(leave_after_s=user.random.uniform(0, 1.5), reset=reset))
    elif dice < 0.4:
        user.chat(user.ask(stream=True), Manner(leave_after_s=user.random.uniform(0, 0.3), reset=reset))
    else:
        byte = user.random.choice((0, 1, user.random.randrange(1_000), user.random.randrange(60_000)))
        user.chat(user.ask(stream=True, tokens=200), Manner(leave_at_byte=byte, reset=reset))


def _read_slowly(user: ChatUser) -> None:
    manner = Manner(read_bytes=user.random.choice((512, 2_048)), rest_s=0.03, receive_bytes=4_096)
    user.chat(user.ask(stream=True, tokens=200), manner)


def _meet_trouble(user: ChatUser) -> None:
    model = user.random.choice(("falls-back", "sim-no-usage", "sim-reasoning", "sim-comments", "sim-cut:after.20"))
    user.chat(user.ask(model, stream=model == "sim-cut:after.20" or user.random.random() < 0.7))


class Streaming(ChatUser):
    """Reads answers as they come, to the end."""

    weight, who = 10, "streaming"
    tasks: ClassVar[list[Callable[..., None]]] = [_stream]


class Whole(ChatUser):
    """Asks for the answer in one piece."""

    weight, who = 4, "whole"
    tasks: ClassVar[list[Callable[..., None]]] = [_whole]


class Leaving(ChatUser):
    """Leaves at any byte of a stream or any moment of a whole call, with FIN or RST."""

    weight, who = 4, "leaving"
    expected = frozenset({"completed", "aborted"})
    tasks: ClassVar[list[Callable[..., None]]] = [_leave]


class SlowReader(ChatUser):
    """Reads a little at a time through a small window."""

    weight, who, paced = 1, "slow reader", False
    tasks: ClassVar[list[Callable[..., None]]] = [_read_slowly]


class Unlucky(ChatUser):
    """Meets providers that fail over, report no usage, think first, or break off."""

    weight, who = 1, "unlucky"
    expected = frozenset({"completed", "broken"})
    tasks: ClassVar[list[Callable[..., None]]] = [_meet_trouble]
