"""What calls met on their way, by name: so that a run which never came there is known to have proved nothing of it.

Must not: judge what happened.
"""

from __future__ import annotations

from collections import Counter

from proxy.session import Ending
from tests.support.simulation.cases import Case
from tests.support.simulation.world import World

PATHS = frozenset(
    (
        *("asked", "retried", "fell back", "queued", "queue refused", "breaker opened", "breaker closed"),
        *("hedged", "hedge: first won", "hedge: second won", "hedge: second leads", "hedge: none won"),
        *("hedge: the client left", "continued", "continued twice", "continued: completed", "continued: cut"),
        *("continued: the client left", "continued: failed", "continued: unfaithful", "continued: not connected"),
    )
)
"""Those that a long run must reach."""
RARE = frozenset(("continued twice", "continued: cut", "continued: unfaithful", "queue refused", "hedge: none won"))
"""Those that a few thousand schedules may miss."""


def reached(world: World) -> Counter[str]:
    """How often a schedule came to each path."""
    found = Counter(world.paths)
    for case in world.cases:
        if case.begun:
            candidates = [each.candidate for each in case.tried]
            found["fell back"] += any(each is not candidates[0] for each in candidates)
            _hedges(case, found)
            _continuations(case, found)
    return found


def _hedges(case: Case, found: Counter[str]) -> None:
    seconds = [each for each in case.tried if each.beside is not None]
    if not seconds:
        return
    second, ending = seconds[-1], case.begun[0].ending
    first, speaker = second.beside, case.parts[0].tried if case.parts else case.speaker
    if speaker is not None:
        found["hedge: first won"] += speaker is first
        found["hedge: second won"] += speaker is second and first is not None and first.attempt.outcome == "hedge_lost"
    found["hedge: second leads"] += case.begun[0].leader is second and not second.shown
    found["hedge: none won"] += speaker is None and ending is Ending.UPSTREAM_FAILED
    found["hedge: the client left"] += speaker is None and ending is Ending.CLIENT_GONE


def _continuations(case: Case, found: Counter[str]) -> None:
    further = [each for each in case.tried if each.resumed]
    if not further:
        return
    ending, spoke = case.begun[0].ending, bool(case.witness.part)
    gave = len(case.parts) + spoke
    found["continued"] += gave > 1
    found["continued twice"] += gave > 2
    found["continued: completed"] += ending is Ending.COMPLETED
    found["continued: cut"] += ending is Ending.CREDIT_CUT and gave > 1
    found["continued: the client left"] += ending is Ending.CLIENT_GONE
    found["continued: failed"] += ending is Ending.UPSTREAM_FAILED
    found["continued: unfaithful"] += sum(each.script.kind == "unfaithful" for each in further)
    found["continued: not connected"] += sum(each.socket is None or not each.socket.made for each in further)
