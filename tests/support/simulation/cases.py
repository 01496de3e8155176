"""One client's call in a schedule: what it is made of, and what is known of it from the outside.

Must not: move anything, or judge what happened.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from proxy.candidates import Candidate, Route
from proxy.live_session import LiveSession
from proxy.prepared import PreparedCall
from proxy.request import ChatRequest
from proxy.session import Ending, Phase
from proxy.settlement import Bill
from tests.support.simulation.links import Client, Socket
from tests.support.simulation.provider import FIRST_WORDS, Script
from tests.support.simulation.providers import Part, Tried
from tests.support.simulation.witness import Witness, cost_of


@dataclass(frozen=True)
class Begun:
    """One call of `Settler.begin`: how, in which phase, and when (loop seconds)."""

    ending: Ending
    phase: Phase
    at: float
    due: Bill
    leader: Tried | None
    """The attempt that the session calls its own."""


@dataclass
class Case:
    """One client's call. `tried` are the attempts that were sent, in order, and `sockets` the connections that were
    made for them; `parts` what those gave whose stream another one went on with."""

    number: int
    sid: str
    request: ChatRequest
    route: Route
    prompt: int
    first: Script
    """What the first attempt at its first candidate meets."""
    client: Client
    witness: Witness
    trouble: float
    session: LiveSession | None = None
    call: PreparedCall | None = None
    sockets: list[tuple[Candidate, Socket]] = field(default_factory=list)
    tried: list[Tried] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    begun: list[Begun] = field(default_factory=list)
    error: BaseException | None = None
    cancelled: bool = False
    started: bool = False

    @property
    def over(self) -> bool:
        """Whether the client's call is over for its handler."""
        return self.client.task is not None and self.client.task.done()

    @property
    def leader(self) -> Tried | None:
        """The attempt that the session calls its own: the last of its list."""
        if self.session is None or not self.session.attempts:
            return None
        last = self.session.attempts[-1]
        return next((each for each in self.tried if each.attempt is last), None)

    @property
    def speaker(self) -> Tried | None:
        """Whose words the client has got since the last break, by the frames themselves; None for nobody's."""
        witness = self.witness
        if not witness.part:
            return None
        if not self.parts:
            return next(each for each in self.tried if f"a{each.number}" == witness.name)
        new = next(iter(witness.part.values()))
        return next(each for each in self.tried if new.startswith(FIRST_WORDS[each.number]))


@dataclass
class Dial:
    """A connection in the making."""

    case: Case
    candidate: Candidate
    socket: Socket
    made: asyncio.Future[None]


def spent(case: Case) -> int:
    """Micros of the prompt and of everything that was delivered, at least: a report may say that it was cached."""
    carried, speaker, texts = sum(part.micros for part in case.parts), case.speaker, case.witness.part
    if speaker is None:
        return carried
    prompt = 0 if case.parts else case.prompt
    return carried + min(cost_of(speaker.price, prompt, texts), speaker.cost(prompt, texts))
