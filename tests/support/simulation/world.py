"""One worker's session core in a world of models: what composes it, and one client's call from its hold to its end.

`World` is built per schedule. `_serve` is what `proxy.routes` does around admission and a relay; everything below it is
the core itself. Must not: decide what happens next (`schedule` does) or
judge (`checks` does), but for what can only be judged while it happens: each write to a client.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from random import Random

import msgspec

from config.price import CompiledPrice
from config.routing import Hedge
from config.settings import Bounds, Metering
from metering.ledger import AccountRef, Gone, HoldRequest, KeyLimits, Settled
from metering.prompt import PromptEstimate, estimate_prompt
from metering.ranks import encoding
from metering.redis_ledger import RedisLedger
from providers.breaker import Change, State
from providers.codec import Upstream
from providers.registry import wire
from providers.retry import RetryPolicy
from providers.routing import Target
from providers.seam import Style
from proxy.admission import Admission, Caller, _Size
from proxy.answer import stream_headers
from proxy.candidates import Candidate, Route
from proxy.client_stream import ClientStream
from proxy.errors import CallError
from proxy.exchange import Deadlines, Exchange
from proxy.http_request import Origin
from proxy.live_session import LiveSession
from proxy.live_sessions import LiveSessions
from proxy.prepared import PreparedCall, SessionEnded
from proxy.relay import StreamRelay
from proxy.request import ChatRequest, read_chat
from proxy.sending import Sender
from proxy.session import Ending
from proxy.settlement import Bill, Settler
from proxy.transport import Transport, TransportLimits
from proxy.upstream import Upstreams
from proxy.whole_relay import WholeRelay
from tests.support.simulation.cases import Begun, Case, Dial, spent
from tests.support.simulation.continuing import Asked, going_on
from tests.support.simulation.links import Client, Socket
from tests.support.simulation.loop import Violation, VirtualLoop
from tests.support.simulation.provider import (
    BROKEN,
    KINDS,
    Wanted,
    check_words,
    plain_pieces,
    script,
    some_words,
)
from tests.support.simulation.providers import Part, Tried, known
from tests.support.simulation.server import Server
from tests.support.simulation.wire import SCRIPTS, Wire
from tests.support.simulation.witness import Witness

ENCODING = "o200k_base"
WIRE = wire("openai")
ACCOUNT = AccountRef("u1", 0)
CALLER = Caller(ACCOUNT, "k1", KeyLimits())
METERING = Metering(
    slice_tokens=24, slice_low_tokens=10, progress_ms=500, lease_ms=4_000, fence_margin_ms=1_000, output_floor_tokens=4
)
BOUNDS = Bounds(
    headers_ms=2_500, headers_nonstream_ms=3_500, first_content_ms=2_500, first_content_hidden_ms=3_500,
    client_write_ms=2_000, commit_after_ms=800, keepalive_ms=1_200, settle_reply_ms=250,
)  # fmt: skip
LIMITS = TransportLimits(connect_ms=1_500, head_ms=2_500, idle_ms=2_500, total_ms=20_000, read_buffer_max=2_048)
STYLES: tuple[Style, ...] = ("prefill", "prefix", "continue_final", "instruction")
WRITE_GRACE_S = 1.0
"""How long after a session's bound for writes the connection has its own, as in `gateway.http_protocol`."""


def prepare() -> None:
    """Load what every schedule shares, once per process."""
    check_words(encoding(ENCODING))


class _Settler(Settler):
    """The settler, which also tells the case."""

    cases: dict[str, Case]
    clock: VirtualLoop

    def begin(
        self, session: LiveSession, call: PreparedCall, ending: Ending
    ) -> tuple[Bill, asyncio.Future[Settled | Gone | None]]:
        phase = session.phase
        case = self.cases[session.id]
        at = self.clock.time()
        case.witness.settling = at
        leader = case.leader
        due, settling = super().begin(session, call, ending)
        case.begun.append(Begun(ending, phase, at, due, leader))
        return due, settling


class _Admission(Admission):
    """Admission, but that a session has its case's id, which is the request's too."""

    def _hold(
        self,
        caller: Caller,
        request: ChatRequest,
        first: Candidate,
        prompt: PromptEstimate,
        size: _Size,
        request_id: str,
    ) -> HoldRequest:
        hold = super()._hold(caller, request, first, prompt, size, request_id)
        return msgspec.structs.replace(hold, session=request_id)


class _Transport(Transport):
    """The transport, which also tells what is opened."""

    opening: Callable[[str, bytes], None]

    def open(self, origin: Origin, request: bytes, deadlines: Deadlines | None = None) -> Exchange:
        self.opening(origin.host, request)
        return super().open(origin, request, deadlines)


class World:
    """Everything of one schedule. Make it, and use it, while `loop` is entered."""

    def __init__(self, loop: VirtualLoop, rng: Random, *, credit: int, trouble: float, cases: int) -> None:
        self.loop = loop
        self._rng = rng
        self._trouble = trouble
        self.server = Server(credit)
        self.wire = Wire(loop, self.server, METERING.lease_ms, METERING.fence_margin_ms)
        self.ledger = RedisLedger(self.wire, lease_ms=METERING.lease_ms, loaded=SCRIPTS)
        self.wire.on_lost = self.ledger.forget  # as the Redis client does
        self.live = LiveSessions(self.ledger, METERING, BOUNDS, loop.clock)
        self.transport = _Transport(LIMITS)
        self.paths: Counter[str] = Counter()
        """What happened, by name, beside endings."""
        self.known = known(loop, rng, self._happened)
        sender = Sender(self.transport, BOUNDS)
        upstreams = Upstreams(sender, BOUNDS, self.live.confirm, self._breaker_changed, rng.random)
        self.settler = _Settler(self.ledger, self.live, "p1", BOUNDS.settle_reply_ms)
        self.settler.clock = loop
        self._stream_relay = StreamRelay(upstreams, self.live, self.settler, BOUNDS, _render)
        self._whole_relay = WholeRelay(upstreams, self.settler, BOUNDS)
        self.routes: dict[str, Route] = {}
        self.admission = _Admission(self.ledger, self.live, self.routes, "p1", "sim", (METERING, BOUNDS))
        self.dials: list[Dial] = []
        self.drain: asyncio.Task[None] | None = None
        self.cases = [self._case(number) for number in range(cases)]
        self.transport.opening = self._opening
        self.settler.cases = {case.sid: case for case in self.cases}
        loop.dialler = self._dial
        self.live.start()

    def warm(self) -> None:
        """The ledger learns its shard's epoch, as at a worker's start."""
        self.loop.create_task(self.ledger.init_shards([ACCOUNT.shard]))
        self.loop.settle()
        self.wire.run_next()
        self.wire.reply_next()
        self.loop.settle()

    # -- making calls --------------------------------------------------------------------------------------------------

    def _case(self, number: int) -> Case:
        rng, loop = self._rng, self.loop
        stream, wanted = rng.random() < 0.75, rng.random() < 0.6
        sid = f"s{number}"
        words = rng.choice((0, 3, 20, 60))
        body = {"model": sid, "messages": [{"role": "user", "content": " red" * words}], "stream": stream}
        if stream and wanted:
            body["stream_options"] = {"include_usage": True}
        if rng.random() < 0.3 or not stream:
            body["max_tokens"] = rng.choice((5, 40, 400))
        count = rng.choice((1, 2, 3, 3))
        route = self._route(tuple(self._candidate(f"c{number}p{at}", at) for at in range(count)), stream)
        self.routes[sid] = route
        request = read_chat(json.dumps(body).encode(), BOUNDS)
        prompt = estimate_prompt(encoding(ENCODING), "sim", request.messages).tokens
        witness = Witness(loop, self.wire, sid, BOUNDS.settle_reply_ms / 1000, stream=stream)
        client = Client(loop, witness.may_write, BOUNDS.client_write_ms / 1000 + WRITE_GRACE_S)
        pieces, kinds = None, KINDS
        if stream and route.policy.continuation and count > 1 and self._trouble and rng.random() < 0.8:
            pieces, kinds = plain_pieces(some_words(rng) or [" red"] * 3), BROKEN  # else few were ever continued
        first = script(rng, _wanted(request, route.candidates[0], prompt, "a0"), self._trouble, pieces, kinds)
        case = Case(number, sid, request, route, prompt, first, client, witness, self._trouble)
        witness.spent = lambda: spent(case)
        witness.drained = lambda: self.drain is not None and self.drain.done()
        return case

    def _route(self, candidates: tuple[Candidate, ...], stream: bool) -> Route:
        rng = self._rng
        policy = RetryPolicy(
            retries=rng.choice((0, 1, 2)),
            attempts_max=rng.choice((1, 2, 4, 6, 6)),
            deadline_s=rng.choice((1.0, 6.0, 30.0)),
            backoff_s=0.25,
            retry_after_s_max=2.0,
            continuation=rng.random() < 0.75,
        )
        others = len(candidates) - 1
        hedge = Hedge(rng.choice((1, 50, 95)), 50, 5) if others and stream and rng.random() < 0.3 else None
        return Route("sim", candidates, 400, False, rng.random() < 0.1, policy=policy, whole_policy=policy, hedge=hedge)

    def _candidate(self, name: str, at: int) -> Candidate:
        rng = self._rng
        rates = [rng.choice((300_000, 1_000_000, 1_700_000)) for _ in range(4)]
        price = CompiledPrice(
            input=rates[0], cached_input=rates[0] // 2, cache_write=rates[0], output=rates[1], reasoning=rates[2],
            audio_input=rates[0], audio_output=rates[1], cache_write_1h=rates[0], image_output=rates[1],
            request=rng.choice((0, 0, 5)),
        )  # fmt: skip
        upstream = Upstream(name, "openai", b"/v1", include_usage=rng.random() < 0.7)
        live, places = self.known[at].live, self.known[at].places
        origin, finish, style = Origin("http", name, 80), rng.random() < 0.3, rng.choice(STYLES)
        return Candidate(
            upstream, WIRE, origin, "sim", price, None, ENCODING, finish, None, style, Target(name, "sim"), live, places
        )

    def start(self, case: Case) -> None:
        """The client's request arrives."""
        case.started = True
        case.client.task = self.loop.create_task(self._handle(case))

    async def _handle(self, case: Case) -> None:
        """As the edge: errors before a response become one."""
        client = case.client
        try:
            await self._serve(case)
        except CallError as error:
            case.error = error
            case.witness.failed = True
            if client.response_started or client.disconnected:
                return
            if not client.respond(500, error.headers, b"{}"):
                await client.send({"type": "http.response.start", "status": 500, "headers": error.headers})
                await client.send({"type": "http.response.body", "body": b"{}"})

    async def _serve(self, case: Case) -> None:
        client = case.client
        began = self.loop.time()
        self.live.admission_begins()
        try:
            session, call = await self.admission.admit(CALLER, case.request, case.sid)
        finally:
            self.live.admission_ended()
        case.session, case.call = session, call
        session.started_at, session.task, session.abort_client = began, client.task, client.abort
        client.on_gone = lambda: self._gone(session)
        if client.disconnected:
            self._gone(session)
        try:
            if session.stream:
                out = ClientStream(client.send, client, lambda: stream_headers(session), self.loop.time)
                await self._stream_relay.run(session, call, out)
            else:
                answer = await self._whole_relay.run(session, call)
                case.witness.handed_over(answer.body)
                if not client.respond(200, answer.headers, answer.body):
                    await client.send({"type": "http.response.start", "status": 200, "headers": answer.headers})
                    await client.send({"type": "http.response.body", "body": answer.body})
        except SessionEnded:
            pass
        finally:
            client.on_gone = None
            session.abort_client = session.client = session.task = None
            self.settler.abandoned(session, call)

    def _gone(self, session: LiveSession) -> None:
        session.client_gone = True
        if session.stream or not session.finishing:
            session.end(Ending.CLIENT_GONE)

    # -- providers -----------------------------------------------------------------------------------------------------

    def _opening(self, host: str, request: bytes) -> None:
        """An attempt is sent: what it will meet is decided now."""
        case, at = self.cases[_case_of(host)], int(host.rpartition("p")[2])
        assert case.session is not None
        assert case.call is not None
        candidate, number = case.route.candidates[at], len(case.tried)
        policy = case.route.policy
        resumed = bool(case.witness.part or case.parts)
        if resumed:
            self._broken(case)
        walk = [each for each in case.tried if each.walk == len(case.parts)]
        before = [each for each in walk if each.at == at and each.attempt.outcome != "hedge_lost"]
        if len(before) > policy.retries or number >= policy.attempts_max:
            raise self.loop.violation("a provider was asked more often than it may be")
        beside = next((each for each in case.tried if each.running), None)
        if before and walk[-1].at != at and beside is None:
            raise self.loop.violation("a provider was asked again after another one")
        wanted = _wanted(case.request, candidate, case.prompt, f"a{number}")
        if resumed:
            planned = going_on(self._rng, self._asked(case, candidate, request), wanted, number, case.trouble)
        else:
            planned = script(self._rng, wanted, case.trouble) if number or at else case.first
        attempt = case.session.attempts[-1]
        case.tried.append(Tried(number, len(case.parts), at, candidate, attempt, planned, resumed, beside))
        self.paths["retried" if before else "hedged" if beside else "asked"] += 1

    def _asked(self, case: Case, candidate: Candidate, request: bytes) -> Asked:
        """What a continuation was asked. All that the client has must be in it, and what that has cost."""
        if not case.route.policy.continuation:
            raise self.loop.violation("a stream was continued on a route that does not")
        try:
            asked = Asked(request, len(case.request.messages), candidate.continuation)
        except Violation as error:
            raise self.loop.violation(str(error)) from None
        got, limit, spent = case.witness.texts, case.request.limit, sum(part.output for part in case.parts)
        if got != {(0, False): asked.text}:
            raise self.loop.violation(f"the client has {got}, the next provider was told {asked.text!r}")
        if asked.limit != (None if limit is None else max(1, limit - spent)):
            raise self.loop.violation(f"asked for {asked.limit} tokens, of {limit} {spent} are used up")
        return asked

    def _broken(self, case: Case) -> None:
        """The words since the last break, if there are any, are a part that stays."""
        speaker, texts = case.speaker, case.witness.part
        if speaker is None:
            return
        if speaker.script.final:
            raise self.loop.violation("a stream was continued that failed by its client's fault")
        if speaker.texts() != texts:
            raise self.loop.violation(f"{speaker.texts()} came and {texts} was given before another one goes on")
        case.parts.append(Part(speaker, texts, speaker.cost(case.prompt, texts), speaker.output(texts)))
        case.witness.part = {}

    def _happened(self, path: str) -> None:
        self.paths[path] += 1

    def _breaker_changed(self, name: str, change: Change) -> None:
        self.paths["breaker opened" if change.state is State.OPEN else "breaker closed"] += 1

    async def _dial(self, factory: object, host: str) -> tuple[asyncio.Transport, asyncio.Protocol]:
        case, at = self.cases[_case_of(host)], int(host.rpartition("p")[2])
        candidate = case.route.candidates[at]
        tried = next(each for each in reversed(case.tried) if each.candidate is candidate)
        tried.socket = socket = Socket(self.loop, tried.script)
        case.sockets.append((candidate, socket))
        dial = Dial(case, candidate, socket, self.loop.create_future())
        self.dials.append(dial)
        try:
            await dial.made
        finally:
            self.dials.remove(dial)
        assert callable(factory)
        protocol = factory()
        socket.join(protocol)
        return socket, protocol


def _wanted(request: ChatRequest, candidate: Candidate, prompt: int, name: str) -> Wanted:
    usage = request.usage_wanted or candidate.upstream.include_usage
    return Wanted(request.stream, usage, prompt, name)


def _case_of(host: str) -> int:
    return int(host.removeprefix("c").partition("p")[0])


def _render(error: CallError) -> bytes:
    metadata = {} if error.metadata is None else dict(error.metadata)
    return json.dumps({"error": {"message": error.message, "metadata": metadata}}).encode()
