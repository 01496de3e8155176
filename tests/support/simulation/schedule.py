"""One schedule: a seed decides what the world is and what happens in it, act by act, until everything has ended.

Acts come in any order between two turns of the loop, or (in some schedules) while callbacks still wait. Each schedule
has weights of its own, most faults at zero, so that rare combinations come up. Must not: judge what happened.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from random import Random

from tests.support.simulation import checks, paths
from tests.support.simulation.cases import Case
from tests.support.simulation.loop import Violation, VirtualLoop
from tests.support.simulation.wire import REFUSALS
from tests.support.simulation.world import World

ACTS_MAX = 300
CALM = 0.8
"""In how many schedules all calls are admitted before anything goes wrong."""
HEAL_ACTS_MAX = 4_000
HEAL_S_MAX = 60.0
FAULTS = (
    "lose",
    "late",
    "jump",
    "suspend",
    "leave",
    "pause",
    "cancel",
    "take",
    "grant",
    "refuse",
    "forget",
    "shutdown",
)
SIZES = (1, 9, 60, 400, 400, 5_000)


class Failed(Exception):
    """A schedule broke a promise of the core. The text has the seed and the last acts."""

    def __init__(self, seed: int, reason: str, acts: list[str]) -> None:
        last = " ".join(acts[-40:])
        super().__init__(f"seed {seed}: {reason}\n  the last of its {len(acts)} acts: {last}")
        self.seed = seed
        self.reason = reason


@dataclass(frozen=True)
class Result:
    """What a schedule reached: (ending, phase, stream) of each settled session, how often it took each other path, and
    how many acts it had."""

    endings: list[tuple[str, str, bool]]
    paths: Counter[str]
    acts: int


def run(seed: int) -> Result:
    """Run one schedule. Raises Failed."""
    with entered(seed) as schedule:
        try:
            return schedule.run()
        except (AssertionError, KeyError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise Failed(seed, f"{type(error).__name__}: {error}", schedule.acts) from error


@contextmanager
def entered(seed: int, *, cases: int | None = None, trouble: float | None = None) -> Iterator[Schedule]:
    """A schedule whose loop is the running one. The options replace what the seed says."""
    loop = VirtualLoop()
    loop.enter()
    try:
        yield Schedule(loop, seed, cases, trouble)
    finally:
        for task in loop.tasks:
            if not task.done():  # of a schedule that failed
                task._log_destroy_pending = False  # type: ignore[attr-defined]  # nobody waits for it any more
                with suppress(AssertionError, RuntimeError):
                    task.get_coro().close()
        loop.leave()
        loop.close()


def _drawn(names: list[str], weights: list[float], draw: float) -> str:
    """As `Random.choices` draws one, in a third of its time."""
    left = draw * sum(weights)
    for name, weight in zip(names, weights, strict=True):
        left -= weight
        if left < 0:
            return name
    return max(zip(weights, names, strict=True))[1]


class Schedule:
    """One seed's. `run` once, or use its acts by hand."""

    def __init__(self, loop: VirtualLoop, seed: int, cases: int | None, trouble: float | None) -> None:
        self.rng = rng = Random(seed)
        self.loop = loop
        self.acts: list[str] = []
        self._weights: dict[str, float] = {name: rng.choice((0, 0, 0, 0.3, 2)) for name in FAULTS}
        self._left = dict.fromkeys(FAULTS, rng.choice((1, 2, 6)))
        self._weights |= {name: rng.choice((2, 10, 30)) for name in ("chunk", "dial", "run", "reply", "start")}
        self._weights |= {"tick": rng.choice((0.5, 2, 8)), "nap": rng.choice((0, 2)), "sweep": rng.choice((1, 10))}
        self._weights["resume"] = rng.choice((0, 2, 8))
        self._mid_turn = rng.choice((0.0, 0.0, 0.3, 0.7))
        credit, many, wrong = (
            rng.choice((60, 120, 400, 2_000, 100_000)),
            rng.choice((1, 2, 3)),
            rng.choice((0.0, 0.2, 0.6)),
        )
        self.world = World(
            loop,
            rng,
            credit=credit,
            trouble=wrong if trouble is None else trouble,
            cases=many if cases is None else cases,
        )

    def run(self) -> Result:
        """Acts until all is over, then health, then the checks."""
        rng, world = self.rng, self.world
        if rng.random() < CALM:
            self.admit_all()
        for _ in range(ACTS_MAX):
            self._act()
            if rng.random() < self._mid_turn:
                self.loop.turn()
            else:
                self.loop.settle()
                checks.at_rest(world)
            if all(case.over for case in world.cases) and not len(world.live):
                break
        self.heal()
        settled = [(case, begun) for case in world.cases for begun in case.begun]
        endings = [(begun.ending.value, begun.phase.name, case.request.stream) for case, begun in settled]
        return Result(endings, paths.reached(world), len(self.acts))

    def admit_all(self) -> None:
        """Every call gets its hold."""
        world = self.world
        world.warm()
        for case in world.cases:
            world.start(case)
            self.loop.settle()
            while world.wire.run_next() and world.wire.reply_next():
                self.loop.settle()

    # -- acts ----------------------------------------------------------------------------------------------------------

    def _act(self) -> None:
        possible = self._possible()
        names = list(possible)
        weights = [self._weights[name] for name in names]
        if not any(weights):
            name = "tick"
            self.acts.append(name)
            self._tick()
            return
        name = _drawn(names, weights, self.rng.random())
        self.acts.append(name)
        if name in FAULTS:
            self._left[name] -= 1
            if not self._left[name]:
                self._weights[name] = 0
        possible[name]()

    def _possible(self) -> dict[str, Callable[[], object]]:
        """What can happen now, by name."""
        world, wire, found = self.world, self.world.wire, dict[str, Callable[[], object]]()
        waiting = [case for case in world.cases if not case.started]
        running = [case for case in world.cases if case.started and not case.over]
        if waiting:
            found["start"] = lambda: world.start(waiting[0])
        if any(socket.has_more for case in world.cases for _, socket in case.sockets):
            found["chunk"] = self._chunk
        if world.dials:
            found["dial"] = self.dial
        if wire.line:
            found["lose"] = wire.lose
            if wire.line[0].ran:
                found["reply"] = wire.reply_next
            if not wire.line[-1].ran:
                found["run"] = wire.run_next
        if wire.late:
            found["late"] = lambda: wire.run_late(self.rng.randrange(len(wire.late)))
        if self.loop.idle:
            found |= {"tick": self._tick, "jump": self._jump, "suspend": self._suspend}
        found["nap"] = lambda: self.pass_time(self.rng.random() * 0.1)
        if world.server.due():
            found["sweep"] = world.server.sweep
        found |= {"take": lambda: world.server.take(self.rng.choice((20, 200, 10**9)))}
        found |= {"grant": lambda: world.server.grant(self.rng.choice((20, 200)))}
        found |= {"refuse": self._refuse, "forget": self._forget}
        if world.drain is None:
            found["shutdown"] = self._shutdown
        if running:
            self._with_clients(found, running)
        return found

    def _with_clients(self, found: dict[str, Callable[[], object]], running: list[Case]) -> None:
        rng = self.rng
        case = running[rng.randrange(len(running))]
        client = case.client
        if not client.disconnected:
            found["leave"] = client.leave
            found["resume" if client.paused else "pause"] = client.resume if client.paused else client.pause
        if case.session is not None and not case.cancelled:
            found["cancel"] = lambda: self._cancel(case)

    def _chunk(self) -> None:
        sockets = [socket for case in self.world.cases for _, socket in case.sockets if socket.has_more]
        self.rng.choice(sockets).give(self.rng.choice(SIZES))

    def dial(self) -> None:
        dial = self.rng.choice(self.world.dials)
        how = dial.socket.script.dial
        if how == "accept" and not dial.made.done():
            dial.made.set_result(None)
        elif how == "refuse" and not dial.made.done():
            dial.made.set_exception(ConnectionRefusedError(111, "refused"))

    def _cancel(self, case: Case) -> None:
        """The worker's server gives up on the request's task."""
        case.cancelled = True
        assert case.client.task is not None
        case.client.task.cancel()

    def _refuse(self) -> None:
        wire = self.world.wire
        wire.refusing = None if wire.refusing else self.rng.choice(REFUSALS)

    def _forget(self) -> None:
        self.world.wire.forgotten = True

    def _shutdown(self) -> None:
        world = self.world
        world.drain = self.loop.create_task(world.live.drain(self.rng.choice((0.0, 0.5, 3.0))))

    # -- time ----------------------------------------------------------------------------------------------------------

    def pass_time(self, seconds: float) -> None:
        """Time goes on, here and at the ledger's server."""
        self.world.server.now += round(seconds * 1000)
        self.loop.advance(seconds)

    def _tick(self) -> None:
        due = self.loop.next_timer()
        self.pass_time(0.1 if due is None else max(0.0, due - self.loop.time()) + 0.0005)

    def _jump(self) -> None:
        """The process is stopped for a while; on waking it finds all its timers due."""
        self.pass_time(self.rng.uniform(0.5, 6.0))

    def _suspend(self) -> None:
        """The machine sleeps: its monotonic clock stands still, the ledger's server goes on."""
        milliseconds = self.rng.randrange(500, 6_000)
        self.loop.suspend(milliseconds)
        self.world.server.now += milliseconds

    # -- the end -------------------------------------------------------------------------------------------------------

    def heal(self) -> None:
        """No more faults: everything must end by itself, and end well. Raises Violation."""
        world, wire = self.world, self.world.wire
        self.acts.append("HEAL")
        wire.refusing, wire.forgotten = None, False
        began = self.loop.time()
        for _ in range(HEAL_ACTS_MAX):
            self.loop.settle()
            checks.at_rest(world)
            if self._ended():
                break
            if self.loop.time() - began > HEAL_S_MAX:
                raise Violation(f"something does not end: {checks.open_ends(world)}")
            self._healthy_act()
        else:
            raise Violation(f"something turns for ever: {checks.open_ends(world)}")
        while wire.late:  # what reaches the server last of all must change nothing
            wire.run_late(0)
        self.loop.settle()
        world.server.now += 60_000
        world.server.sweep()
        checks.at_end(world)

    def _healthy_act(self) -> None:
        world, wire = self.world, self.world.wire
        if any(not case.started for case in world.cases):
            world.start(next(case for case in world.cases if not case.started))
        elif wire.line:
            wire.run_next()
            wire.reply_next()
        elif any(dial.socket.script.dial != "hang" and not dial.made.done() for dial in world.dials):
            self.dial()
        elif any(socket.has_more for case in world.cases for _, socket in case.sockets):
            self._chunk()
        elif all(case.over for case in world.cases) and not len(world.live) and world.drain is None:
            world.drain = self.loop.create_task(world.live.drain(0.0))
        else:
            self._tick()
            world.server.sweep()

    def _ended(self) -> bool:
        drain = self.world.drain
        return drain is not None and all(task.done() for task in self.loop.tasks) and not self.world.transport.active
