"""What must be true of every schedule: while it runs, whenever the loop rests, and at its end.

The charge is reckoned here from the scripts' words and the table of who pays when (the design's 1.4), not from the
core's meter. Must not: move anything.
"""

from __future__ import annotations

import json
from decimal import Decimal

from metering.ledger import LedgerError
from proxy.errors import CallError
from proxy.session import Ending, Phase
from tests.support.simulation.links import Socket
from tests.support.simulation.loop import Violation
from tests.support.simulation.server import Row
from tests.support.simulation.witness import at_least, cost_of, price_of
from tests.support.simulation.world import BOUNDS, LIMITS, Begun, Case, World

OURS = (Ending.LEASE_LOST, Ending.SHUTDOWN, Ending.INTERNAL)
FIRST_BOUND_S = min(LIMITS.connect_ms, BOUNDS.first_content_ms) / 1000
"""No attempt takes too long before this."""
LEFT = (Ending.CLIENT_GONE, Ending.CLIENT_STALLED)


def at_rest(world: World) -> None:
    """Nothing is ready to run. Raises Violation."""
    if world.loop.broken:
        raise world.loop.broken[0]
    if world.loop.faults:
        raise Violation(f"a callback failed: {world.loop.faults[0]}")
    server = world.server
    if server.available < 0 or server.granted != server.available + server.held + server.elsewhere + _charged(world):
        raise Violation("credit was made or lost")
    for case in world.cases:
        session = case.session
        if session is None or not case.client.disconnected or (session.finishing and not session.stream):
            continue
        for _, socket in case.sockets:
            if socket.made and not socket.closed and not socket.whole:
                raise Violation("the client has left, and its provider still works")


def at_end(world: World) -> None:
    """All is over. Raises Violation."""
    _no_task_failed(world)
    server = world.server
    if server.held or any(row.state == "H" for row in server.rows.values()):
        raise Violation(f"credit is still held: {open_ends(world)}")
    entries = [entry.sid for entry in server.journal if entry.outcome != "corrected"]
    if len(entries) != len(set(entries)):
        raise Violation("a session has two terminal entries")
    at_rest(world)
    for case in world.cases:
        _case(world, case)


def open_ends(world: World) -> str:
    """What has not ended, for a message."""
    tasks = [str(task.get_coro()) for task in world.loop.tasks if not task.done()]
    rows = [f"{row.sid}={row.held}" for row in world.server.rows.values() if row.state == "H"]
    phases = [f"{case.sid}:{case.session.phase.name}" for case in world.cases if case.session is not None]
    return f"tasks {tasks}, held {rows}, {phases}, live {len(world.live)}"


def _charged(world: World) -> int:
    return sum(row.charged for row in world.server.rows.values())


def _no_task_failed(world: World) -> None:
    served = {case.client.task: case for case in world.cases}
    for task in world.loop.tasks:
        if not task.done():
            raise Violation(f"a task is left: {task.get_coro()}")
        if task.cancelled():
            continue
        error = task.exception()
        if error is None or isinstance(error, LedgerError) or (isinstance(error, CallError) and task in served):
            continue  # (a checkpoint's task ends with the ledger's error, which its callback reads)
        raise Violation(f"a task failed: {error!r}") from error


def _case(world: World, case: Case) -> None:
    row = world.server.rows.get(case.sid)
    if case.session is None:
        if row is not None and row.charged:
            raise Violation("a call that was never admitted was charged")
        return
    if len(case.begun) != 1:
        raise Violation(f"{len(case.begun)} settlements were begun: {case.begun}")
    if row is None or row.state != "T":
        raise Violation("a session has no terminal entry")
    begun = case.begun[0]
    sent = world.wire.settled_calls.get(case.sid, [])
    if not sent:
        raise Violation("no settlement was sent")
    due = int(sent[0].args.get("charge", "0"))
    outcome = sent[0].args.get("outcome", "void")
    _check_due(case, begun, due, outcome)
    if row.outcome == "swept":
        if row.swept_for > max(due, _served(case)):
            raise Violation(f"swept for {row.swept_for}, which no attempt has cost")
    elif (row.outcome, row.charged + row.absorbed) != (outcome, due):
        raise Violation(f"the ledger has {row}, due were {due} ({outcome})")
    _check_told(case, row)
    kept_back = not case.request.stream and isinstance(case.error, CallError)
    if kept_back and row.outcome == "completed" and row.charged:
        raise Violation(f"the client has paid {row.charged} for an answer that was kept back")


def _served(case: Case) -> int:
    """Micros of the last attempt, if it answered: what a sweep may charge. Those before it have failed; but of the last
    candidate, which is only tried again, the prompt is told as soon as it has answered once."""
    if not case.sockets:
        return 0
    candidate, socket = case.sockets[-1]
    if case.opened == len(case.sockets) and socket.answered:
        return cost_of(candidate.price, case.prompt, socket.texts())
    again = candidate is case.route.candidates[-1] and any(
        each.answered for at, each in case.sockets if at is candidate
    )
    return cost_of(candidate.price, case.prompt, {}) if again else 0


def _check_told(case: Case, row: Row) -> None:
    """The client was told what the ledger charged, wherever it was told anything."""
    told = list(case.witness.told)
    headers = list(case.client.headers)
    told += [value.decode() for name, value in headers if name == b"x-tollgate-charge"]
    if case.client.status == 200 and not case.request.stream and case.client.complete:
        answer = json.loads(bytes(case.client.body), parse_float=str)
        told += [str(answer["usage"]["cost"])] if "cost" in answer["usage"] else []
    cut = case.witness.cut
    if cut is not None and "charged" in cut:
        told.append(str(Decimal(cut["charged"]) / 1_000_000))
    # Told before the ledger answered, the session may still be swept, and the house absorb a part of its correction.
    allowed = {row.charged} | ({row.charged + row.absorbed} if row.outcome == "swept" else set())
    for text in told:
        if Decimal(text) * 1_000_000 not in allowed:
            raise Violation(f"the client was told {text} credits, the ledger charged {row.charged} micros ({told})")


# -- who pays when -----------------------------------------------------------------------------------------------------


def _check_due(case: Case, begun: Begun, due: int, outcome: str) -> None:
    """The charge asked of the ledger, against the table."""
    lowest, highest, outcomes = _expected(case, begun)
    if not lowest <= due <= highest or outcome not in outcomes:
        raise Violation(
            f"{begun.ending.value} in {begun.phase.name}: charged {due} as {outcome}, "
            f"expected {lowest} to {highest} as {outcomes}"
        )


def _expected(case: Case, begun: Begun) -> tuple[int, int, set[str]]:
    """The least and the most that may be charged, and the outcomes in the journal that fit."""
    ending, stream = begun.ending, case.request.stream
    if case.opened > len(case.sockets):
        return 0, 0, {"void"}  # the last attempt had not begun to connect
    if not case.sockets:
        return 0, 0, {"void"}
    candidate, socket = case.sockets[-1]
    _possible(case, begun, socket)
    delivered = case.witness.texts
    least = cost_of(candidate.price, case.prompt, delivered)
    most = cost_of(candidate.price, case.prompt, socket.texts())
    seen = socket.script.usage or socket.script.early
    if seen is not None and seen.sane:  # what a provider has reported is the least, and its prompt counts
        known = [at_least(candidate.price, case.prompt, texts, seen) for texts in (delivered, socket.texts())]
        least, most = min(least, *known), max(most, *known)
    shown = bool(delivered)
    if ending is Ending.COMPLETED:
        exact = _completed(case, socket)
        return exact, exact, {"completed"}
    if ending is Ending.CREDIT_CUT:
        return least, least if seen is None else most, {"cut"}
    if ending is Ending.UPSTREAM_FAILED:
        if stream and begun.phase is Phase.CONTENT:
            return least, least if seen is None else most, {"error"}
        return 0, 0, {"void"}
    if begun.phase is Phase.HELD and not socket.script.completes:
        return 0, 0, {"void"}  # between two attempts: the provider failed, so nothing was made
    if not stream:
        return _expected_whole(case, ending, socket)
    if ending in LEFT:
        if not socket.answered:
            return 0, 0, {"void"}
        return (least, most, {"aborted"}) if shown else (0, most, {"aborted", "void"})
    if not socket.shown:
        return 0, 0, {"void"}
    return (least, most, {"error"}) if shown else (0, most, {"error", "void"})


def _expected_whole(case: Case, ending: Ending, socket: Socket) -> tuple[int, int, set[str]]:
    """A call without streaming that did not complete."""
    if ending in OURS or not socket.asked:
        # Cancelled or ended in the very moment between the answer and its settlement, the answer is charged.
        return (0, _completed(case, socket), {"error", "void"}) if socket.whole else (0, 0, {"void"})
    prompt = cost_of(case.sockets[-1][0].price, case.prompt, {})
    if socket.whole:
        return min(prompt, _completed(case, socket)), max(prompt, _completed(case, socket)), {"aborted"}
    return prompt, prompt, {"aborted"}


def _completed(case: Case, socket: Socket) -> int:
    """A whole answer: the provider's usage where it is believable, else every word of it."""
    price, usage = case.sockets[-1][0].price, socket.script.usage
    if usage is not None and usage.sane:
        return price_of(price, usage.prompt, usage.output, usage.reasoning, usage.cached)
    return cost_of(price, case.prompt, socket.texts())


def _possible(case: Case, begun: Begun, socket: Socket) -> None:
    """The ending has a cause."""
    ending, client, script = begun.ending, case.client, socket.script
    if ending is Ending.COMPLETED:
        if not script.completes:
            raise Violation(f"an answer that is not whole ({script.kind}) counts as completed")
        if case.request.stream and client.complete and not case.witness.failed and case.witness.texts != socket.texts():
            raise Violation("a completed stream lacks text at the client")
    if ending is Ending.CLIENT_GONE and not client.disconnected:
        raise Violation("a client that is here counts as gone")
    good = script.kind == "good" and script.completes and socket.whole
    took = 0.0 if case.session is None else begun.at - case.session.started_at
    if ending is Ending.UPSTREAM_FAILED and good and took < FIRST_BOUND_S:
        raise Violation("a good answer counts as failed")
    served = socket.texts()
    for kind, words in case.witness.texts.items():
        if not served.get(kind, "").startswith(words):
            raise Violation(f"the client got {words!r}, the provider sent {served.get(kind)!r}")
