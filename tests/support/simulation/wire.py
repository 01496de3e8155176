"""The connection to the model server as `RedisLedger` sees it: calls wait until the schedule runs and answers them.

Here calls are late, lost before or after they ran, run long after their caller gave up, or refused. Also here: what is
known of each session from the answers alone (its fence, its settlement), for the checks.
Must not: know the core's classes but through `metering.scripts.Caller`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from metering import scripts
from metering.scripts import Script, Word
from storage.redis_client import RedisReplyError, RedisUnavailable
from tests.support.simulation.loop import VirtualLoop
from tests.support.simulation.server import Args, Reply, Server

CALL_S = 0.6
"""A caller gives up after this many seconds."""
OOM = b"OOM command not allowed when used memory > 'maxmemory'."
REFUSALS = (b"EPOCH", b"LOADING the server is loading its data", OOM)
"""What a server in trouble answers. Settlements run while memory is full."""
TERMINAL = ("settle", "void")
READS: dict[str, Any] = {"INFO": b"run_id:1\r\n", "GET": None, "HMGET": [b"1", None, None], "HGET": b"1"}
"""What is asked of the server beside scripts (the shard's epoch, and who the server is), and its answers."""
SCRIPTS = scripts.load()
_BY_NAME = {script.sha: script for script in SCRIPTS.values()} | {script.text: script for script in SCRIPTS.values()}


class Call:
    """One script call on its way. `ran`: the server has its effect, `reply` waits to be delivered."""

    __slots__ = ("answer", "args", "ran", "reply", "sent_ms", "verb")

    def __init__(self, verb: str, args: Args, answer: asyncio.Future[Any], sent_ms: int) -> None:
        self.verb = verb
        self.args = args
        self.answer = answer
        self.sent_ms = sent_ms
        self.ran = False
        self.reply: Any = None


class Wire:
    """`call` is what the ledger uses; all else is the schedule's."""

    def __init__(self, loop: VirtualLoop, server: Server, lease_ms: int, margin_ms: int) -> None:
        self._loop = loop
        self._server = server
        self._fence_after_ms = lease_ms - margin_ms
        self.line: deque[Call] = deque()
        self.late: list[Call] = []
        """Not run when their caller gave them up; they may still be."""
        self.refusing: bytes | None = None
        """What the server answers to everything while it is not itself."""
        self.forgotten = False
        """Whether the server lost its scripts: EVALSHA is refused until an EVAL comes."""
        self.on_lost: Callable[[], None] = lambda: None
        self.fences: dict[str, int] = {}
        """Session -> boot milliseconds until which its owner may write, by the answers that came."""
        self.known_held: dict[str, int] = {}
        self.ended: dict[str, Reply] = {}
        """Session -> the answer to its settlement that came."""
        self.settled_calls: dict[str, list[Call]] = {}

    def call(self, *args: Word) -> asyncio.Future[Any]:
        """Send one command. Only what the session core sends is known here."""
        answer: asyncio.Future[Any] = self._loop.create_future()
        if args[0] in ("EVALSHA", "EVAL"):
            script = _BY_NAME[str(args[1])]
            call = Call(script.name, _named(script, args), answer, self._loop.boot_ms())
        else:
            call = Call(str(args[0]), {"sid": ""}, answer, self._loop.boot_ms())
        if call.verb in TERMINAL:
            self._watch_settlement(call)
        elif call.verb == "progress" and call.args["sid"] in self.settled_calls:
            raise self._loop.violation("a checkpoint was sent after the settlement")
        if self.forgotten and args[0] == "EVALSHA":
            call.reply, call.ran = RedisReplyError("NOSCRIPT No matching script."), True
        elif args[0] == "EVAL":
            self.forgotten = False
        self.line.append(call)
        self._loop.call_later(CALL_S, self._given_up, call)
        return answer

    def _watch_settlement(self, call: Call) -> None:
        sid = call.args["sid"]
        before = self.settled_calls.setdefault(sid, [])
        if sid in self.ended:
            raise self._loop.violation("a session was settled again after its settlement was answered")
        if before and not before[-1].answer.done():
            raise self._loop.violation("a session was settled twice at once")
        if before and (before[0].verb, before[0].args.get("charge")) != (call.verb, call.args.get("charge")):
            raise self._loop.violation("a settlement was repeated with another charge")
        before.append(call)

    # -- acts of the schedule ------------------------------------------------------------------------------------------

    def run_next(self) -> bool:
        """The server gets to the next call. False without one."""
        for call in self.line:
            if not call.ran:
                self._run(call)
                return True
        return False

    def reply_next(self) -> bool:
        """The oldest reply arrives. False without one."""
        if not self.line or not self.line[0].ran:
            return False
        call = self.line.popleft()
        if not call.answer.done():
            self._deliver(call)
        return True

    def lose(self) -> None:
        """The connection breaks: everybody is told so, and what has not run may still run later."""
        self.on_lost()
        calls, self.line = self.line, deque()
        for call in calls:
            if not call.ran:
                self.late.append(call)
            if not call.answer.done():
                call.answer.set_exception(RedisUnavailable("the connection was lost", sent=True))

    def run_late(self, at: int) -> None:
        """A call that its caller gave up reaches the server after all."""
        self._run(self.late.pop(at))

    def _given_up(self, call: Call) -> None:
        if not call.answer.done():
            call.answer.set_exception(RedisUnavailable("no answer in time", sent=True))

    def _run(self, call: Call) -> None:
        call.ran = True
        if call.verb in READS:
            call.reply = [b"-1", None, None] if self.refusing == b"EPOCH" and call.verb == "HMGET" else READS[call.verb]
        elif self.refusing == b"EPOCH":
            call.reply = [b"EPOCH"]
        elif self.refusing is not None and (self.refusing != OOM or call.verb not in TERMINAL):
            call.reply = RedisReplyError(self.refusing.decode())
        else:
            call.reply = self._server.run(call.verb, call.args)

    def _deliver(self, call: Call) -> None:
        reply = call.reply
        if isinstance(reply, RedisReplyError):
            call.answer.set_exception(reply)
            return
        if call.verb in READS or call.verb in ("init", "correct"):
            call.answer.set_result(reply)
            return
        sid, code = call.args["sid"], reply[0]
        if code == b"OK" or code == b"HELD":
            self.fences[sid] = call.sent_ms + self._fence_after_ms
            self.known_held[sid] = int(reply[1])
        elif code == b"EXISTS":
            self.fences[sid] = call.sent_ms + int(reply[4]) - (int(call.args["lease"]) - self._fence_after_ms)
            self.known_held[sid] = int(reply[1])
        elif call.verb in TERMINAL and code != b"EPOCH":
            self.ended[sid] = reply
        call.answer.set_result(reply)


def _named(script: Script, words: tuple[Word, ...]) -> Args:
    """A call's arguments by the names in the script's header."""
    values = words[3 + int(words[2]) :]
    texts = [value.decode() if isinstance(value, bytes) else str(value) for value in values]
    return dict(zip(script.args, texts, strict=True))
