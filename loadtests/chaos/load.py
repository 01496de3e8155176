"""Clients of a chaos run: threads with plain sockets that call, read, leave, and keep all that they were told.

The calls, the ways of reading and the parser are those of the load tests (`loadtests.users`).
Must not: judge an answer (`check` does), or retry one: whoever fails has failed and goes on to the next call.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from loadtests.users.calls import Call, Exchange, Manner, request_bytes
from loadtests.users.wire import Connection, WireError

PATIENCE_S = 25.0
"""When a client of a run leaves a call that still runs."""

_SENTENCE = "The toll is taken at the gate, once, for what has passed through it. "


@dataclass(frozen=True)
class Mix:
    """What clients do, in shares of calls; the rest streams to the end. `models` are drawn for unlucky calls."""

    whole: float = 0.2
    leaving: float = 0.1
    unlucky: float = 0.1
    slow: float = 0.0
    models: tuple[str, ...] = ("falls-back", "sim-no-usage", "sim-cut:after.20")
    tokens: tuple[int, ...] = (5, 30, 60, 120)


@dataclass(frozen=True)
class Door:
    """Where to call: ports of gateways, and with which keys. `direct` are the same gateways past their links."""

    ports: Sequence[int]
    direct: Sequence[int]
    keys: Sequence[str]


def body(model: str, tokens: int, *, stream: bool, random: Random) -> dict[str, Any]:
    """A request for an answer of so many tokens, about something."""
    say = f"[[tokens={tokens}]]Question {random.randrange(10**6)}: {_SENTENCE * random.choice((1, 1, 2, 8))}"
    fields: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": say}], "stream": stream}
    if stream:
        fields["stream_options"] = {"include_usage": True}
    return fields


def one_call(port: int, key: str, fields: dict[str, Any], manner: Manner, who: str = "client") -> Call:
    """One call on a connection of its own, from connecting to the end. Blocks; never raises."""
    call = Call(who, fields["model"], fields["stream"])
    exchange: Exchange | None = None
    connection: Connection | None = None
    try:
        connection = Connection("127.0.0.1", port, manner.receive_bytes)
        connection.send(request_bytes(f"127.0.0.1:{port}", key, fields))
        exchange = Exchange(call, manner)
        exchange.read(connection)
    except (OSError, WireError, ValueError, KeyError) as error:
        call.ending, call.error = "failed", f"{type(error).__name__}: {error}"
    finally:
        if exchange is not None:
            exchange.stop_clock()
        if connection is not None:
            connection.leave()
    return call


def latest_content_s(call: Call) -> float:
    """When the last content came, in epoch seconds; 0 where none came."""
    if call.ttft_ms is None:
        return 0.0
    return call.at + (call.ttft_ms + sum(call.gaps_ms)) / 1000


class Load:
    """Clients at work. `calls` grows as calls end; `start`, then `stop` and `join`."""

    def __init__(self, door: Door, clients: int, seed: str, mix: Mix) -> None:
        self.calls: list[Call] = []
        self._door, self._mix = door, mix
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._client, args=(Random(f"{seed}:{number}"),), daemon=True)
            for number in range(clients)
        ]

    def start(self) -> None:
        """Let the clients begin."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """No new calls; those that run go on to their end."""
        self._stop.set()

    def join(self) -> None:
        """Until every client has gone home. Blocks; at most as long as one call is waited for."""
        deadline = time.monotonic() + PATIENCE_S + 60
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    @property
    def running(self) -> int:
        """Clients that have not gone home."""
        return sum(thread.is_alive() for thread in self._threads)

    def _client(self, random: Random) -> None:
        while not self._stop.is_set():
            call = self._call(random)
            self.calls.append(call)
            hurt = call.ending in ("failed", "refused")
            self._stop.wait(random.uniform(0.05, 0.3) if hurt else random.uniform(0.0, 0.1))

    def _call(self, random: Random) -> Call:
        mix, dice = self._mix, random.random()
        port, key, tokens = random.choice(self._door.ports), random.choice(self._door.keys), random.choice(mix.tokens)
        patient = Manner(leave_after_s=PATIENCE_S)
        if dice < mix.whole:
            return one_call(port, key, body("gpt-4o-mini", tokens, stream=False, random=random), patient, "whole")
        if (dice := dice - mix.whole) < mix.leaving:
            fields = body("gpt-4o-mini", 100, stream=random.random() < 0.8, random=random)
            return one_call(port, key, fields, _leaving(random, stream=fields["stream"]), "leaving")
        if (dice := dice - mix.leaving) < mix.unlucky:
            model = random.choice(mix.models)
            fields = body(model, tokens, stream="cut" in model or random.random() < 0.8, random=random)
            return one_call(port, key, fields, patient, "unlucky")
        if dice - mix.unlucky < mix.slow:
            fields = body("gpt-4o-mini", 60, stream=True, random=random)
            slow = Manner(read_bytes=random.choice((64, 512)), rest_s=0.02, receive_bytes=4_096, leave_after_s=8)
            return one_call(random.choice(self._door.direct), key, fields, slow, "slow reader")
        return one_call(port, key, body("gpt-4o-mini", tokens, stream=True, random=random), patient, "streaming")


def _leaving(random: Random, *, stream: bool) -> Manner:
    """Before the headers, at the first bytes, in the middle, near the end; by FIN or RST."""
    reset = random.random() < 0.5
    if not stream or random.random() < 0.3:
        return Manner(leave_after_s=random.uniform(0, 1.0), reset=reset)
    place = random.choice((0, 1, random.randrange(1_000), random.randrange(40_000)))
    return Manner(leave_at_byte=place, reset=reset)
