"""What must be true of every schedule: while it runs, whenever the loop rests, and at its end.

The charge is reckoned here from the scripts' words and the table of who pays when (the design's 1.4), not from the
core's meter. Must not: move anything.
"""

from __future__ import annotations

import json
from decimal import Decimal

from metering.ledger import LedgerError
from proxy.attempts import AttemptOver
from proxy.errors import CallError
from proxy.prepared import SessionEnded
from proxy.session import Ending, Phase
from tests.support.simulation.cases import Begun, Case
from tests.support.simulation.links import Socket
from tests.support.simulation.loop import Violation
from tests.support.simulation.providers import LONG_S, PROVIDERS, Known, Tried
from tests.support.simulation.server import Row
from tests.support.simulation.witness import at_least, cost_of, price_of
from tests.support.simulation.world import BOUNDS, LIMITS, World

OURS = (Ending.LEASE_LOST, Ending.SHUTDOWN, Ending.INTERNAL)
FIRST_BOUND_S = min(LIMITS.connect_ms, BOUNDS.first_content_ms) / 1000
"""No attempt takes too long before this."""
READING = "Attempts.first_content"
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
        if session is None or not (case.client.disconnected or len(case.tried) > 1):
            continue
        working = [each for each in case.tried if each.socket is not None and _works(each.socket)]
        left = case.client.disconnected and not (session.finishing and not session.stream)
        if left and (working or any(dial.case is case for dial in world.dials)):
            raise Violation("the client has left, and its provider still works")
        if len(working) > 1 and case.witness.texts:
            raise Violation("two providers work on an answer that one of them gives")
    _counted(world)


def _works(socket: Socket) -> bool:
    return socket.made and not socket.closed and not socket.whole


def _may_queue(case: Case) -> bool:
    session = case.session
    return session is not None and session.ending is None and not any(each.running for each in case.tried)


def _counted(world: World) -> None:
    """What is counted of the providers' attempts is what there is."""
    running, waiting = [0] * PROVIDERS, [0] * PROVIDERS
    for case in world.cases:
        for each in case.tried:
            if each.attempt.outcome == "running":
                running[each.at] += 1
                waiting[each.at] += each.attempt.waiting
    queued = sum(known.places.bulkhead.waiting for known in world.known if known.places is not None)
    if queued and queued > sum(map(_may_queue, world.cases)):
        raise Violation("a session that has ended still waits for a place")
    for known, runs, waits in zip(world.known, running, waiting, strict=True):
        live = known.live
        if live.in_flight != runs or live.waiting != waits:
            raise Violation(f"{runs} attempts run, {waits} of them without content; counted are {live}")
        if known.places is not None and known.concurrent is not None:
            under_way = known.places.bulkhead.under_way
            if not runs <= under_way <= known.concurrent:
                raise Violation(f"{runs} attempts run in {under_way} places of {known.concurrent}")


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
    for known in world.known:
        _idle(world, known)


def _idle(world: World, known: Known) -> None:
    """Nothing is under way there, and after its open time the breaker lets somebody through."""
    live, places = known.live, known.places
    if live.in_flight or live.waiting:
        raise Violation(f"{live.in_flight} attempts are in flight at the end, {live.waiting} wait")
    if places is not None and (places.bulkhead.under_way or places.bulkhead.waiting):
        raise Violation(f"{places.bulkhead.under_way} places are held at the end, {places.bulkhead.waiting} wait")
    if live.breaker.try_pass(world.loop.time() + LONG_S / 2) is None:
        raise Violation("a breaker's probe was never handed back")


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
        if isinstance(error, AttemptOver | SessionEnded) and READING in str(task.get_coro()):
            continue  # one of two attempts beside each other: the race has looked at it, or asyncio would say so
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
    _leads(case, begun)
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
    """Micros of what was delivered and of the last attempt, if it answered: what a sweep may charge. Those before it
    have failed; but of the last candidate, which is only tried again, the prompt is told as soon as it has answered
    once."""
    # (A report may say that the prompt was cached: what was metered before it stays.)
    carried = 0
    for part in case.parts:
        prompt = 0 if part.tried.resumed else case.prompt
        carried += max(part.micros, cost_of(part.tried.price, prompt, part.texts))
    last = [each for each in (case.leader,) if each is not None and each.socket is not None and each.socket.answered]
    assert case.call is not None
    again = [
        cost_of(each.price, case.prompt, {})
        for each in case.tried
        if not each.resumed
        and each.candidate is case.call.plan[-1]
        and each.socket is not None
        and each.socket.answered
    ]
    for each in last:
        prompt = 0 if each.resumed else case.prompt
        again += [carried + each.cost(prompt, each.texts()), carried + cost_of(each.price, prompt, each.texts())]
    return max(0, carried, *again)


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


def _leads(case: Case, begun: Begun) -> None:
    """The attempt whose bill and name are the session's is the one whose words the client has; before there are any,
    the last one, but that a second attempt beside a first has to be ahead of it."""
    leader, speaker = begun.leader, case.speaker
    if speaker is not None and leader is not speaker and not leader_may_follow(leader, speaker):
        raise Violation("the session is another attempt's than its words")
    if leader is None or speaker is not None or leader.beside is None:
        return
    first = leader.beside
    if not leader.shown and first.attempt.outcome in ("hedge_lost", begun.ending.value):
        raise Violation("a second attempt has taken the place of a first that was no worse")
    if leader.attempt.outcome == "hedge_lost":
        raise Violation("the session is that of an attempt that lost")


def leader_may_follow(leader: Tried | None, speaker: Tried) -> bool:
    """Whether somebody was asked to go on with the speaker's words, and nothing of it has come."""
    return leader is not None and leader.resumed and leader.number > speaker.number


def _expected(case: Case, begun: Begun) -> tuple[int, int, set[str]]:
    """The least and the most that may be charged, and the outcomes in the journal that fit."""
    ending, stream, leader = begun.ending, case.request.stream, begun.leader
    if leader is not None and (case.parts or leader.resumed):
        return _expected_continued(case, begun, leader)
    if leader is None or leader.socket is None:
        return 0, 0, {"void"}  # the last attempt had not begun to connect
    socket, price = leader.socket, leader.price
    _possible(case, begun, leader)
    delivered = case.witness.part
    least = cost_of(price, case.prompt, delivered)
    most = cost_of(price, case.prompt, socket.texts())
    seen = socket.script.usage or socket.script.early
    if seen is not None and seen.sane:  # what a provider has reported is the least, and its prompt counts
        known = [at_least(price, case.prompt, texts, seen) for texts in (delivered, socket.texts())]
        least, most = min(least, *known), max(most, *known)
    shown = bool(delivered)
    if ending is Ending.COMPLETED:
        exact = _completed(case, leader)
        return exact, exact, {"completed"}
    if ending is Ending.CREDIT_CUT:
        return least, least if seen is None else most, {"cut"}
    if ending is Ending.UPSTREAM_FAILED:
        if stream and begun.phase is Phase.CONTENT:
            exact = leader.cost(case.prompt, delivered)
            return exact, exact, {"error"}
        return 0, 0, {"void"}
    if begun.phase is Phase.HELD:
        return 0, 0, {"void"}  # between two attempts: the provider failed, so nothing was made
    if not stream:
        return _expected_whole(case, ending, leader)
    if ending in LEFT:
        if not socket.answered:
            return 0, 0, {"void"}
        return (least, most, {"aborted"}) if shown else (0, most, {"aborted", "void"})
    if not socket.shown:
        return 0, 0, {"void"}
    return (least, most, {"error"}) if shown else (0, most, {"error", "void"})


def _expected_continued(case: Case, begun: Begun, leader: Tried) -> tuple[int, int, set[str]]:
    """Of an answer that several gave: each part at its price, the prompt once, and nothing for who gave none."""
    carried = sum(part.micros for part in case.parts)
    delivered = case.witness.part
    _possible(case, begun, leader)
    if not delivered and begun.ending is Ending.UPSTREAM_FAILED:
        return carried, carried, {"error"}
    least, most = (carried + leader.cost(0, texts) for texts in (delivered, leader.texts()))
    if begun.ending is Ending.COMPLETED:
        return most, most, {"completed"}
    if begun.ending is Ending.CREDIT_CUT:
        return least, least, {"cut"}
    if begun.ending is Ending.UPSTREAM_FAILED:
        return least, least, {"error"}
    return least, most, {"aborted"} if begun.ending in LEFT else {"error"}


def _expected_whole(case: Case, ending: Ending, leader: Tried) -> tuple[int, int, set[str]]:
    """A call without streaming that did not complete."""
    socket = leader.socket
    if socket is None:
        return 0, 0, {"void"}
    if ending in OURS or not socket.asked:
        # Cancelled or ended in the very moment between the answer and its settlement, the answer is charged.
        return (0, _completed(case, leader), {"error", "void"}) if socket.whole else (0, 0, {"void"})
    prompt = cost_of(leader.price, case.prompt, {})
    if socket.whole:
        return min(prompt, _completed(case, leader)), max(prompt, _completed(case, leader)), {"aborted"}
    return prompt, prompt, {"aborted"}


def _completed(case: Case, leader: Tried) -> int:
    """A whole answer: the provider's usage where it is believable, else every word of it."""
    usage = leader.script.usage
    if usage is not None and usage.sane:
        return price_of(leader.price, usage.prompt, usage.output, usage.reasoning, usage.cached)
    return cost_of(leader.price, case.prompt, leader.texts())


def _possible(case: Case, begun: Begun, leader: Tried) -> None:
    """The ending has a cause."""
    ending, client, script, witness = begun.ending, case.client, leader.script, case.witness
    if ending is Ending.COMPLETED:
        if not script.completes:
            raise Violation(f"an answer that is not whole ({script.kind}) counts as completed")
        if case.request.stream and client.complete and not witness.failed and witness.part != leader.texts():
            raise Violation("a completed stream lacks text at the client")
    if ending is Ending.CLIENT_GONE and not client.disconnected:
        raise Violation("a client that is here counts as gone")
    good = script.kind == "good" and script.completes and leader.socket is not None and leader.socket.whole
    took = 0.0 if case.session is None else begun.at - case.session.started_at
    patience_s = min(FIRST_BOUND_S, case.route.policy.deadline_s / len(case.route.candidates))
    if ending is Ending.UPSTREAM_FAILED and good and took < patience_s:
        raise Violation("a good answer counts as failed")
    served = leader.texts()
    for kind, words in witness.part.items():
        if not served.get(kind, "").startswith(words):
            raise Violation(f"the client got {words!r}, the provider sent {served.get(kind)!r}")
