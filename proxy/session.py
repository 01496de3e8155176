"""The session's life as tables: which phase may follow which, and who pays at each ending. Pure.

Must not: await, read clocks or talk to anyone. Source: metering design 1.2 and 1.4; each row of `CHARGES` is a test.
"""

from __future__ import annotations

from enum import Enum, IntEnum, StrEnum

from metering.ledger import Outcome


class Phase(IntEnum):
    """How far a session has come. It only moves forward, except back to HELD for the next attempt."""

    NEW = 0
    HELD = 1
    SENT = 2
    ANSWERED = 3
    CONTENT = 4
    SETTLING = 5
    FINAL = 6


MOVES: dict[Phase, frozenset[Phase]] = {
    Phase.NEW: frozenset((Phase.HELD, Phase.FINAL)),
    Phase.HELD: frozenset((Phase.SENT, Phase.SETTLING)),
    Phase.SENT: frozenset((Phase.HELD, Phase.ANSWERED, Phase.SETTLING)),
    Phase.ANSWERED: frozenset((Phase.HELD, Phase.CONTENT, Phase.SETTLING)),
    Phase.CONTENT: frozenset((Phase.SETTLING,)),
    Phase.SETTLING: frozenset((Phase.FINAL,)),
    Phase.FINAL: frozenset(),
}


ALLOWED = tuple(sum(1 << then for then in MOVES[now]) for now in Phase)
"""`MOVES` as bits: an enum's hash is a call of Python, and a session moves five times."""


class IllegalMove(Exception):
    """A session tried a move that its table does not have."""


def may_move(now: Phase, then: Phase) -> None:
    """Raises IllegalMove where the table has no such move."""
    if not ALLOWED[now] >> then & 1:
        raise IllegalMove(f"{now.name} -> {then.name}")


class Ending(StrEnum):
    """Every way a session ends, as logs, metrics and the journal name it."""

    COMPLETED = "completed"
    CACHED = "cached"
    CREDIT_CUT = "credit_cut"
    CLIENT_GONE = "client_gone"
    CLIENT_STALLED = "client_stalled"
    UPSTREAM_FAILED = "upstream_failed"
    LEASE_LOST = "lease_lost"
    SHUTDOWN = "shutdown"
    INTERNAL = "internal"


class Charge(Enum):
    """What is charged: nothing, the prompt alone, our own counts, the provider's report where it made one, or what a
    kept answer costs."""

    NOTHING = "nothing"
    PROMPT = "prompt"
    COUNTED = "counted"
    REPORTED = "reported"
    CACHED = "cached"


_BEFORE_ANSWER = (Phase.HELD, Phase.SENT)
_AFTER = (Phase.ANSWERED, Phase.CONTENT)

CHARGES: dict[tuple[Ending, Phase, bool], tuple[Charge, Outcome]] = {
    # (ending, phase reached, stream) -> (charge, outcome in the journal)
    **{
        (Ending.COMPLETED, phase, stream): (Charge.REPORTED, "completed")
        for phase in _AFTER
        for stream in (True, False)
    },
    # A kept answer is settled before it is given, and no provider is asked.
    **{(Ending.CACHED, Phase.HELD, stream): (Charge.CACHED, "completed") for stream in (True, False)},
    **{(Ending.CREDIT_CUT, phase, True): (Charge.COUNTED, "cut") for phase in _AFTER},
    # An upstream error costs nothing until output was delivered, then what was delivered (never error text).
    **{
        (Ending.UPSTREAM_FAILED, phase, stream): (Charge.NOTHING, "void")
        for phase in (*_BEFORE_ANSWER, Phase.ANSWERED)
        for stream in (True, False)
    },
    (Ending.UPSTREAM_FAILED, Phase.CONTENT, True): (Charge.COUNTED, "error"),
    (Ending.UPSTREAM_FAILED, Phase.CONTENT, False): (Charge.NOTHING, "void"),
    # A client that leaves pays what the provider had confirmed and produced until the cancel, by our own count: usage
    # that a provider reports as it goes may lag behind what was delivered.
    **{
        (ending, phase, True): (Charge.NOTHING, "void")
        for ending in (Ending.CLIENT_GONE, Ending.CLIENT_STALLED)
        for phase in _BEFORE_ANSWER
    },
    **{
        (ending, phase, True): (Charge.COUNTED, "aborted")
        for ending in (Ending.CLIENT_GONE, Ending.CLIENT_STALLED)
        for phase in _AFTER
    },
    # A whole answer shows no 2xx before it is finished, so a request that was sent costs its prompt.
    (Ending.CLIENT_GONE, Phase.HELD, False): (Charge.NOTHING, "void"),
    **{(Ending.CLIENT_GONE, phase, False): (Charge.PROMPT, "aborted") for phase in (Phase.SENT, Phase.ANSWERED)},
    (Ending.CLIENT_GONE, Phase.CONTENT, False): (Charge.REPORTED, "aborted"),
    # Faults of ours: what was delivered, nothing before that.
    **{
        (ending, phase, stream): (Charge.NOTHING, "void")
        for ending in (Ending.LEASE_LOST, Ending.SHUTDOWN, Ending.INTERNAL)
        for phase in (*_BEFORE_ANSWER, Phase.ANSWERED)
        for stream in (True, False)
    },
    **{
        (ending, Phase.CONTENT, stream): (Charge.COUNTED, "error") if stream else (Charge.NOTHING, "void")
        for ending in (Ending.LEASE_LOST, Ending.SHUTDOWN, Ending.INTERNAL)
        for stream in (True, False)  # of a whole answer nothing is delivered before it is settled
    },
}


def charge_for(ending: Ending, phase: Phase, *, stream: bool) -> tuple[Charge, Outcome]:
    """Who pays when. Raises IllegalMove for an ending that cannot happen in that phase."""
    try:
        return CHARGES[ending, phase, stream]
    except KeyError:
        raise IllegalMove(f"{ending.name} in {phase.name}") from None
