"""The exact-match response cache of a worker: which calls may use it, and a call's turn in it from lookup to storing.

A route without `[routes.<model>.cache]` never comes here. An answer is kept only when it is complete, paid for in full
and not cut or limited by credit, and given only to the same account, unless the route shares its answers.
Must not: speak to a provider or to Redis itself, or keep anything of a call that asked to be left out.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping
from fractions import Fraction
from importlib import metadata

import msgspec
from prometheus_client import Counter

from config import response_cache as config
from config.settings import Bounds, Settings
from metering.ledger import Settled
from providers.routing import Preferences
from proxy import telemetry
from proxy.answer import Headers, stream_headers
from proxy.candidates import Candidate, Route
from proxy.client_stream import ClientConnection, ClientStream, Send
from proxy.errors import CallError, InvalidValue
from proxy.live_session import Cached, LiveSession
from proxy.live_sessions import LiveSessions
from proxy.prepared import PreparedCall
from proxy.relay import StreamRelay
from proxy.request import ChatRequest
from proxy.response_cache_entry import Kept, Recording, Room, marked, pack, stripped
from proxy.response_cache_flights import Flight, Flights, Told
from proxy.response_cache_key import answer_name, named_providers
from proxy.response_cache_relay import CachedRelay
from proxy.response_cache_waiting import Unwatched, Wait
from proxy.session import Ending
from proxy.settlement import Bill
from proxy.threads import Threads
from proxy.whole_relay import WholeAnswer, WholeRelay
from storage.redis_connection import RedisError
from storage.response_store import ResponseStore

HEADER = b"x-tollgate-cache"
PACK_INLINE_BYTES = 64 * 1024
"""A larger answer is packed beside the event loop."""

CACHE = Counter(
    "tollgate_cache_total", "Calls to routes with a response cache, by what became of them.", ["route", "result"]
)
STORED = Counter("tollgate_cache_stored_bytes_total", "Bytes put into the response cache, packed.", ["route"])
EVICTED = Counter("tollgate_cache_evicted_total", "Answers dropped before their time, for others.")


Teller = tuple[Send, str]
"""How a client is spoken to before its call is a session: ASGI's send, and the request's id."""


class CachedRoute(msgspec.Struct, frozen=True):
    """A route whose answers may be kept. `share` of the first charge is what a kept answer costs; `salt` names what
    answers depend on beside the request: the gateway's version, the route, its providers and the prices."""

    name: str
    policy: config.ResponseCache
    share: Fraction
    salt: bytes


def cached_routes(settings: Settings, routes: Mapping[str, Route], price_version: str) -> dict[str, CachedRoute]:
    """Those of the configuration."""
    found = {}
    for name, route in routes.items():
        policy = settings.routes[name].cache if name in settings.routes else None
        if policy is not None:
            salt = _salt(settings, route, price_version)
            found[name] = CachedRoute(name, policy, config.share(policy.price), salt)
    return found


def _salt(settings: Settings, route: Route, price_version: str) -> bytes:
    """Whole tables, so that no key that decides what is sent can be forgotten here, whoever adds it: one too many only
    costs an answer. Left out is what says how answers are kept."""
    table = msgspec.structs.asdict(settings.routes[route.name])
    del table["cache"]
    said = [_said(settings, each) for each in route.candidates]
    version = metadata.version("tollgate"), price_version
    resolved = route.name, route.max_output_tokens, route.rename_model, route.hidden_reasoning
    return msgspec.json.encode((version, resolved, table, said), order="deterministic")


def _said(settings: Settings, candidate: Candidate) -> tuple[object, ...]:
    """Everything about a candidate but its provider's key and what may hold a password."""
    upstream, origin = candidate.upstream, candidate.origin
    table = msgspec.structs.asdict(settings.providers[upstream.name])
    del table["proxy"]
    wire = {each.name: getattr(upstream, each.name) for each in dataclasses.fields(upstream) if each.name != "key"}
    wire["target"] = upstream.target.decode()
    return candidate.model, candidate.continuation, origin.scheme, origin.authority.decode(), wire, table


class _Wishes(msgspec.Struct):
    """What a request's headers say of caching."""

    asked: bytes
    control: set[bytes]


def _wishes(headers: Iterable[tuple[bytes, bytes]]) -> _Wishes:
    """Raises InvalidValue."""
    asked, control = b"", set[bytes]()
    for name, value in headers:
        if name == HEADER:
            asked = value.strip().lower()
            if asked not in (b"on", b"off", b"refresh"):
                raise InvalidValue(
                    "Invalid header 'x-tollgate-cache': expected on, off or refresh.", param=HEADER.decode()
                )
        elif name == b"cache-control":
            control |= {part.strip().lower() for part in value.split(b",")}
    return _Wishes(asked, control)


class ResponseCache:
    """The cache of one worker."""

    def __init__(
        self,
        store: ResponseStore,
        live: LiveSessions,
        threads: Threads,
        routes: Mapping[str, CachedRoute],
        bounds: Bounds,
        relays: tuple[StreamRelay, WholeRelay, CachedRelay],
    ) -> None:
        self.store = store
        self.live = live
        self.threads = threads
        self.relays = relays
        self._routes = routes
        self.bounds = bounds
        self.room = Room(bounds.cache_held_bytes_max)
        self.flights = Flights(store, live.detach, threads, bounds)

    async def turn(
        self,
        headers: Iterable[tuple[bytes, bytes]],
        request: ChatRequest,
        account: str,
        preferences: Preferences | None,
        teller: Teller | None = None,
    ) -> Turn | None:
        """This call's turn; None where its route keeps nothing, or nothing unasked. Without a `teller` its client hears
        nothing while it waits. Raises InvalidValue."""
        route = self._routes.get(request.model)
        if route is None:
            return None
        wishes = _wishes(headers)
        if route.policy.mode == "allow" and not wishes.asked:
            return None
        out = wishes.asked == b"off" or b"no-store" in wishes.control
        fresh = wishes.asked == b"refresh" or b"no-cache" in wishes.control
        name = None
        # An audio answer has an id that ends before its time here, and `store` asks the provider to keep something.
        if not out and not request.audio and request.root.raw("store") != b"true":
            name = await self._name(route, preferences, request, account)
        return Turn(self, route, name, teller if request.stream else None, fresh=fresh)

    async def _name(
        self, route: CachedRoute, preferences: Preferences | None, request: ChatRequest, account: str
    ) -> str | None:
        scope = "" if route.policy.scope == "shared" else account
        hints = named_providers(preferences)

        def name() -> str | None:
            return answer_name(scope, route.salt, hints, request.root.body, stream=request.stream)

        return name() if len(request.root.body) <= self.bounds.body_inline_bytes else await self.threads.run(name)

    async def keep(self, route: CachedRoute, name: str, kept: Kept) -> None:
        """Put an answer into Redis; one that cannot be put there is told of, and costs nobody anything."""
        size = sum(map(len, kept.payloads)) + len(kept.last)
        packed = pack(kept) if size <= PACK_INLINE_BYTES else await self.threads.run(lambda: pack(kept))
        try:
            done = await self.store.keep(name, packed, route.policy.ttl_s * 1000)
        except RedisError as error:
            telemetry.log.warning("an answer could not be kept", route=route.name, reason=str(error))
            return
        if done.kept:
            telemetry.count(STORED, len(packed), route.name)
        if done.evicted:
            telemetry.count(EVICTED, done.evicted)


class Turn:
    """One call's way through the cache: `begin`, then `stream` or `whole`, then `close`, whatever has happened.

    `charge` is what the call costs when its answer was found, None when a provider has to be asked."""

    def __init__(
        self, cache: ResponseCache, route: CachedRoute, name: str | None, teller: Teller | None, *, fresh: bool
    ) -> None:
        """`name` None: the call neither takes an answer nor leaves one. `fresh`: it only leaves one. `teller`: of a
        stream whose client may be sent comments."""
        self._cache = cache
        self._teller = teller if cache.relays[2].tells_errors else None
        self._waited: Unwatched | None = None
        """The response, where it began with comments."""
        self._route = route
        self._name = name
        self._fresh = fresh
        self._began_ms = _now_ms()
        self._kept: Kept | None = None
        self._age_s = 0
        self._flight: Flight | None = None
        self._session: LiveSession | None = None
        self.result = "bypass"
        self.charge: Cached | None = None

    async def begin(self, connection: ClientConnection) -> None:
        """Look for the answer; wait, within the route's bound, for an identical call that fetches it."""
        if self._name is not None:
            self.result = "refresh" if self._fresh else "miss"
            if not self._fresh:
                await self._find(self._name, connection)
        telemetry.count(CACHE, 1, self._route.name, self.result)

    async def _find(self, name: str, connection: ClientConnection) -> None:
        wait = self._wait(connection)
        try:
            kept, self._flight = await self._cache.flights.find(name, wait)
        finally:
            wait.end()
            if wait.client is not None and wait.client.started:
                self._waited = wait.client
        if kept is None or not self._cache.room.take(kept):
            return
        share = self._route.share
        self.result = "coalesced" if kept.stored_ms >= self._began_ms else "hit"
        self._kept, self._age_s = kept, kept.age_s(_now_ms())
        self.charge = Cached(kept.tokens, -(-kept.micros * share.numerator // share.denominator))

    def _wait(self, connection: ClientConnection) -> Wait:
        seconds, teller, bounds = self._route.policy.wait_ms / 1000, self._teller, self._cache.bounds
        if teller is None:
            return Wait(connection, seconds)
        send, request_id = teller
        headers = [
            (b"x-request-id", request_id.encode()),
            (b"x-tollgate-route", self._route.name.encode()),
            (HEADER, b"wait"),
        ]
        return Wait(connection, seconds, lambda: Unwatched(send, connection, lambda: headers, bounds), bounds)

    async def told(self, error: CallError) -> bool:
        """Tell a client whose response began while it waited why nothing comes of it; False where none has begun: then
        the error is the response."""
        if self._waited is None or self._teller is None:
            return False
        self.close()  # nobody shall wait for a client that takes nothing
        name, request_id = type(error).__name__, self._teller[1]
        telemetry.log.info("refused after a wait", request_id=request_id, route=self._route.name, error=name)
        telemetry.count(telemetry.REQUESTS, 1, "200", "")
        await self._cache.relays[2].refuse(self._waited, error)
        return True

    def _headers(self) -> Headers:
        if self._kept is not None:
            return [(HEADER, b"hit"), (b"age", b"%d" % self._age_s)]
        return [(HEADER, b"bypass" if self._name is None else b"miss")]

    async def stream(self, session: LiveSession, call: PreparedCall, send: Send, connection: ClientConnection) -> Bill:
        """Serve a stream, from what was kept or from a provider. Raises as the relays do."""
        self._session = session
        relay, _, cached = self._cache.relays
        headers = self._headers()
        if self._kept is not None:
            headers.append((b"x-request-id", session.request_id.encode()))
            client = self._waited or Unwatched(send, connection, lambda: headers, self._cache.bounds)
            self._cache.live.admission_begins()  # its session ends before it does, and a drain waits for both
            try:
                return await cached.stream(session, call, self._kept, self._age_s, (client, headers))
            finally:
                self._cache.live.admission_ended()
        if self._name is None:
            unkept = ClientStream(send, connection, lambda: stream_headers(session) + headers)
            return await relay.run(session, call, unkept)
        recording = Recording(send, connection, lambda: stream_headers(session) + headers)
        recording.started = self._waited is not None
        recording.record(self._route.policy.bytes_max, self._cache.room)
        try:
            bill = await relay.run(session, call, recording)
            if recording.whole and recording.payloads is not None:
                last = recording.payloads.pop() if call.request.usage_wanted else b""
                self._leave(session, bill, recording.payloads, last)
            return bill
        finally:
            recording.release()

    async def whole(self, session: LiveSession, call: PreparedCall) -> WholeAnswer:
        """Serve a whole answer. Raises as the relays do."""
        self._session = session
        _, relay, cached = self._cache.relays
        if self._kept is not None:
            answer = await cached.whole(session, call, self._kept, self._age_s)
        else:
            answer = await relay.run(session, call)
            if self._name is not None and len(answer.body) <= self._route.policy.bytes_max:
                self._leave(session, answer.bill, [], answer.body)
        return msgspec.structs.replace(answer, headers=answer.headers + self._headers())

    def _leave(self, session: LiveSession, bill: Bill, payloads: list[bytes], last: bytes) -> None:
        """Keep the answer, if it is one to keep."""
        usage = marked(last) if last else b""
        if not keepable(session, bill) or usage is None or self._name is None:
            return
        tokens = msgspec.structs.replace(
            bill.usage, cached=bill.usage.prompt, cache_write=0, cache_write_1h=0, audio_input=0
        )
        kept = Kept(payloads, stripped(last), usage, tokens, bill.micros, _now_ms())
        storing = self._cache.keep(self._route, self._name, kept)
        flight, self._flight = self._flight, None
        if flight is None:
            self._cache.live.detach(storing)
        else:
            self._cache.flights.over(flight, kept, storing)

    def close(self) -> None:
        """The call is over. Those who wait for its answer, and did not get it, are told."""
        kept, self._kept = self._kept, None
        if kept is not None:
            self._cache.room.give_back(kept)
        flight, self._flight = self._flight, None
        if flight is not None:
            failed = self._session is not None and self._session.ending is None
            self._cache.flights.over(flight, Told.ALONE if failed else Told.AGAIN)


def keepable(session: LiveSession, due: Bill) -> bool:
    """Whether an answer is whole, of one provider, and paid for in full. One that a second provider continued is better
    than a broken one for who waited for it; the next one shall have a whole one."""
    if due.ending is not Ending.COMPLETED or session.limited or session.carried is not None:
        return False
    return due.micros <= session.held if session.settled is None else _paid(session)


def _paid(session: LiveSession) -> bool:
    """Whether the account paid for all of it."""
    return isinstance(session.settled, Settled) and session.settled.absorbed == 0


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
