"""One worker's session core in a world of models: what composes it, and one client's call from its hold to its end.

`World` is built per schedule. `_serve` is what `proxy.routes` does around admission and a relay; everything below it is
the core itself. Must not: decide what happens next (`schedule` does) or
judge (`checks` does), but for what can only be judged while it happens: each write to a client.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import msgspec

from config.price import CompiledPrice
from config.settings import Bounds, Metering
from metering.ledger import AccountRef, Gone, HoldRequest, KeyLimits, Settled
from metering.prompt import PromptEstimate, estimate_prompt
from metering.ranks import encoding
from metering.redis_ledger import RedisLedger
from providers.codec import Upstream
from providers.registry import wire
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
from proxy.session import Ending, Phase
from proxy.settlement import Bill, Settler
from proxy.transport import Transport, TransportLimits
from proxy.upstream import Upstreams
from proxy.whole_relay import WholeRelay
from tests.support.simulation.links import Client, Socket
from tests.support.simulation.loop import VirtualLoop
from tests.support.simulation.provider import Script, check_words, script
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
WRITE_GRACE_S = 1.0
"""How long after a session's bound for writes the connection has its own, as in `gateway.http_protocol`."""


def prepare() -> None:
    """Load what every schedule shares, once per process."""
    check_words(encoding(ENCODING))


@dataclass(frozen=True)
class Begun:
    """One call of `Settler.begin`: how, in which phase, and when (loop seconds)."""

    ending: Ending
    phase: Phase
    at: float
    due: Bill


@dataclass
class Case:
    """One client's call. `sockets` are the connections made for it, in order."""

    number: int
    sid: str
    request: ChatRequest
    route: Route
    prompt: int
    scripts: list[Script]
    client: Client
    witness: Witness
    again: Callable[[], Script]
    """Another script, for an attempt at a candidate that had failed."""
    session: LiveSession | None = None
    call: PreparedCall | None = None
    sockets: list[tuple[Candidate, Socket]] = field(default_factory=list)
    opened: int = 0
    """Exchanges opened; the last of them may have no connection yet."""
    begun: list[Begun] = field(default_factory=list)
    error: BaseException | None = None
    cancelled: bool = False
    started: bool = False

    @property
    def over(self) -> bool:
        """Whether the client's call is over for its handler."""
        return self.client.task is not None and self.client.task.done()


@dataclass
class Dial:
    """A connection in the making."""

    case: Case
    candidate: Candidate
    socket: Socket
    made: asyncio.Future[None]


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
        due, settling = super().begin(session, call, ending)
        case.begun.append(Begun(ending, phase, at, due))
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
    """The transport, which also counts what is opened for each case."""

    cases: list[Case]

    def open(self, origin: Origin, request: bytes, deadlines: Deadlines | None = None) -> Exchange:
        self.cases[_case_of(origin.host)].opened += 1
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
        upstreams = Upstreams(Sender(self.transport, BOUNDS), BOUNDS, self.live.confirm, draw=self._rng.random)
        self.settler = _Settler(self.ledger, self.live, "p1", BOUNDS.settle_reply_ms)
        self.settler.clock = loop
        self._stream_relay = StreamRelay(upstreams, self.live, self.settler, BOUNDS, _render)
        self._whole_relay = WholeRelay(upstreams, self.settler, BOUNDS)
        self.routes: dict[str, Route] = {}
        self.admission = _Admission(self.ledger, self.live, self.routes, "p1", "sim", (METERING, BOUNDS))
        self.dials: list[Dial] = []
        self.drain: asyncio.Task[None] | None = None
        self.cases = [self._case(number) for number in range(cases)]
        self.transport.cases = self.cases
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
        candidates = tuple(self._candidate(f"c{number}p{at}") for at in range(rng.choice((1, 1, 2))))
        self.routes[sid] = route = Route("sim", candidates, 400, False, rng.random() < 0.1)
        request = read_chat(json.dumps(body).encode(), BOUNDS)
        prompt = estimate_prompt(encoding(ENCODING), "sim", request.messages).tokens

        def again(asked: bool = wanted) -> Script:
            return script(rng, stream=stream, usage_asked=asked, trouble=self._trouble, prompt=prompt)

        scripts = [again(wanted or each.upstream.include_usage) for each in candidates]
        witness = Witness(loop, self.wire, sid, BOUNDS.settle_reply_ms / 1000, stream=stream)
        client = Client(loop, witness.may_write, BOUNDS.client_write_ms / 1000 + WRITE_GRACE_S)
        case = Case(number, sid, request, route, prompt, scripts, client, witness, again)
        witness.price = lambda: case.sockets[-1][0].price
        witness.seen = lambda: case.sockets[-1][1].script.usage or case.sockets[-1][1].script.early
        witness.drained = lambda: self.drain is not None and self.drain.done()
        witness.prompt = prompt
        return case

    def _candidate(self, name: str) -> Candidate:
        rng = self._rng
        rates = [rng.choice((300_000, 1_000_000, 1_700_000)) for _ in range(4)]
        price = CompiledPrice(
            input=rates[0], cached_input=rates[0] // 2, cache_write=rates[0], output=rates[1], reasoning=rates[2],
            audio_input=rates[0], audio_output=rates[1], cache_write_1h=rates[0], image_output=rates[1],
            request=rng.choice((0, 0, 5)),
        )  # fmt: skip
        upstream = Upstream(name, "openai", b"/v1", include_usage=rng.random() < 0.7)
        return Candidate(upstream, WIRE, Origin("http", name, 80), "sim", price, None, ENCODING, rng.random() < 0.3)

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

    async def _dial(self, factory: object, host: str) -> tuple[asyncio.Transport, asyncio.Protocol]:
        case, at = self.cases[_case_of(host)], int(host.rpartition("p")[2])
        candidate, planned = case.route.candidates[at], case.scripts[at]
        before = [each for each, _ in case.sockets if each is candidate]
        if len(before) > case.route.policy.retries or (before and case.sockets[-1][0] is not candidate):
            raise self.loop.violation("a provider was asked more often than it may be")
        if before:  # tried again, it behaves as it likes
            planned = case.again()
        socket = Socket(self.loop, planned)
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


def _case_of(host: str) -> int:
    return int(host.removeprefix("c").partition("p")[0])


def _render(error: CallError) -> bytes:
    metadata = {} if error.metadata is None else dict(error.metadata)
    return json.dumps({"error": {"message": error.message, "metadata": metadata}}).encode()
