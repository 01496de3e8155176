"""From a checked request to a held session: route, prompt estimate, size of the hold, one reserve, or a named refusal.

Must not: read the body's bytes itself, answer the client, or call a provider.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import msgspec

from config.settings import Bounds, Metering
from metering.ledger import (
    MICROS_MAX,
    AccountRef,
    Held,
    HoldRequest,
    KeyLimits,
    LedgerError,
    LedgerUnavailable,
    Refused,
    Repeated,
    SessionRef,
)
from metering.pricing import HoldRates
from metering.prompt import PromptEstimate, estimate_prompt
from metering.prompt_counts import PromptCounts
from metering.ranks import encoding
from metering.redis_ledger import RedisLedger
from providers.routing import Preferences
from proxy import telemetry
from proxy.candidates import Candidate, Route
from proxy.errors import (
    AccountBlocked,
    CallError,
    CreditInFlight,
    IdempotencyConflict,
    IdempotencyInFlight,
    InternalError,
    InvalidValue,
    LedgerDown,
    ModelNotFound,
    ModelUnpriced,
    OutOfCredit,
    ParallelSessionsExceeded,
    RequestRateExceeded,
)
from proxy.idempotency import repeat_error
from proxy.ids import session_id
from proxy.live_session import Cached, LiveSession
from proxy.live_sessions import LiveSessions
from proxy.plans import MOVING, latest, plan
from proxy.prepared import PreparedCall
from proxy.request import ChatRequest
from proxy.threads import Threads

RETRY_WITHIN_S = 0.2
RETRY_PAUSE_S = 0.02
GIVE_UP_PAUSE_S = 0.2
"""Between two tries to void a reserve whose answer never came."""
TAKE_OVERS_MAX = 2
"""How often one call takes an idempotency key over from a void session, when others try the same."""
COUNT_WAIT_S = 5.0
"""How long a call waits for a thread that counts its prompt; then it is estimated by its bytes, on the high side."""


class Caller(msgspec.Struct, frozen=True):
    """Who is calling, as admission needs it. `idempotency` is the hash of the client's idempotency key, "" for none;
    `preferences` say which providers the account and the request want."""

    account: AccountRef
    key_id: str
    limits: KeyLimits
    idempotency: str = ""
    preferences: Preferences | None = None


class _Size(msgspec.Struct, frozen=True):
    """A hold's size in micros: asked for, least accepted, and the most it may grow to. `output` is what `want` covers
    of each choice's output, in tokens, where the call cannot be metered in flight. It grows by `slice_cost` when less
    than `slice_low_cost` is left, both at the rates of this prompt."""

    want: int
    minimum: int
    most: int
    slice_cost: int
    slice_low_cost: int
    output: int | None = None


class _Metadata(msgspec.Struct, omit_defaults=True):
    """What the ledger keeps of a session for its sweep."""

    request_id: str
    route: str
    stream: bool
    price_version: str
    counted_prompt: int
    idempotency: str = ""


_encode = msgspec.json.Encoder().encode


class Admission:
    """Admits calls of this worker."""

    def __init__(
        self,
        ledger: RedisLedger,
        live: LiveSessions,
        routes: Mapping[str, Route],
        price_version: str,
        owner: str,
        limits: tuple[Metering, Bounds],
    ) -> None:
        self._ledger = ledger
        self._live = live
        self._clock = live.clock
        self._routes = routes
        self._price_version = price_version
        self._owner = owner
        self._metering, self._bounds = limits
        self._counts = PromptCounts()
        self.threads = Threads()
        """For work beside the event loop; this worker's handlers read large bodies there too."""

    def route(self, model: str) -> Route:
        """The route of a model name. Raises ModelNotFound or ModelUnpriced."""
        route = self._routes.get(model)
        if route is None:
            shown = model if len(model) <= 128 and model.isprintable() else "that you named"
            raise ModelNotFound(f"The model `{shown}` does not exist or you do not have access to it.")
        if not route.candidates:
            raise ModelUnpriced()
        return route

    async def admit(self, caller: Caller, request: ChatRequest, request_id: str) -> tuple[LiveSession, PreparedCall]:
        """Hold credit for the request. Raises CallError; then nothing is held."""
        self._live.admit()
        route = self.route(request.model)
        if len(request.root.body) <= self._bounds.prompt_inline_bytes:
            prompt = self._estimate(caller, route, request, self._bounds.prompt_exact_bytes_max)
        else:
            prompt = await self._estimate_beside(caller, route, request)
        asked = plan(route, request, prompt, caller.preferences, self._clock.monotonic())
        rates = route.hold_rates(prompt.hold, asked, audio=request.audio, cache_1h=request.cache_1h)
        if request.stream and not route.hidden_reasoning:
            size = self._slice(rates, request, prompt.hold)
        else:
            size = self._worst_case(rates, request, prompt.hold, route.max_output_tokens)
        if size.want > MICROS_MAX:
            raise InvalidValue("The request could cost more than the gateway can hold.", param="max_tokens")
        asked_ms = self._clock.boot_ms()
        hold = self._hold(caller, request, asked[0], prompt, size, request_id)
        reply = await self._ask(hold)
        held = reply if isinstance(reply, Held) else await self._not_held(hold, reply)
        if route.strategy in MOVING:  # others have begun meanwhile
            asked = latest(asked, route, request, prompt, caller.preferences, self._clock.monotonic())
        limited = size.output is not None and held.held < size.want
        limit = max(1, rates.output_covered(held.held, prompt.hold) // request.choices) if limited else size.output
        session = self._session(hold, held, request, route, size, asked_ms, request_id)
        session.limited = limited
        session.idempotency = caller.idempotency
        continuable = route.policy.continuation and request.stream and request.choices == 1
        continuable = continuable and not route.hidden_reasoning  # what was thought out of sight cannot be handed on
        call = PreparedCall(request, route, prompt.tokens, prompt.kind, limit, asked, continuable)
        self._live.add(session)
        return session, call

    async def admit_cached(
        self, caller: Caller, request: ChatRequest, request_id: str, cached: Cached
    ) -> tuple[LiveSession, PreparedCall]:
        """Hold what a kept answer costs, all of it. Raises CallError; then nothing is held."""
        self._live.admit()
        route, tokens, micros = self.route(request.model), cached.usage.prompt, cached.micros
        size = _Size(micros, micros, micros, 0, 0)
        asked_ms = self._clock.boot_ms()
        estimate = PromptEstimate(tokens, "counted", tokens)
        hold = self._hold(caller, request, route.candidates[0], estimate, size, request_id)
        hold = msgspec.structs.replace(hold, prompt_cost=0)  # a sweep charges nothing: nothing was given yet
        reply = await self._ask(hold)
        held = reply if isinstance(reply, Held) else await self._not_held(hold, reply)
        session = self._session(hold, held, request, route, size, asked_ms, request_id)
        session.cached = cached
        session.idempotency = caller.idempotency
        self._live.add(session)
        return session, PreparedCall(
            request=request,
            route=route,
            prompt_tokens=tokens,
            prompt_kind="counted",
            output_limit=None,
            plan=route.candidates,
        )

    async def _estimate_beside(self, caller: Caller, route: Route, request: ChatRequest) -> PromptEstimate:
        """A long prompt would stall every other stream of this worker for the milliseconds it takes."""
        exact = self._bounds.prompt_exact_bytes_max
        try:
            counting = self.threads.run(lambda: self._estimate(caller, route, request, exact))
            return await asyncio.wait_for(counting, COUNT_WAIT_S)
        except TimeoutError:
            return self._estimate(caller, route, request, 0)

    def _estimate(self, caller: Caller, route: Route, request: ChatRequest, exact_bytes_max: int) -> PromptEstimate:
        """The prompt's tokens at the first candidate."""
        first, account, count = route.candidates[0], caller.account.id, self._counts.count
        return estimate_prompt(
            encoding(first.encoding),
            first.model,
            request.messages,
            tools=request.tools,
            functions=request.functions,
            response_format=request.response_format,
            sizes=request.sizes(),
            exact_bytes_max=exact_bytes_max,
            count_one=lambda encoding, text: count(account, encoding, text),
        )

    async def aclose(self) -> None:
        """Admit nothing more. Does not wait for prompts that are still being counted."""
        await self.threads.aclose()

    def _slice(self, rates: HoldRates, request: ChatRequest, prompt: int) -> _Size:
        """A stream holds its prompt and the first slice; more follows while it runs."""
        slice_tokens, limit = self._metering.slice_tokens, request.limit
        most = MICROS_MAX
        if limit is not None:
            slice_tokens = min(slice_tokens, limit * request.choices)
            most = rates.hold_cost(prompt, limit * request.choices)
        want, least = rates.hold_cost(prompt, slice_tokens), rates.hold_cost(prompt, 1)
        return _Size(want, least, most, *self._growth(rates))

    def _worst_case(self, rates: HoldRates, request: ChatRequest, prompt: int, output_max: int) -> _Size:
        """A call that cannot be metered in flight holds all it could cost."""
        limit = request.limit
        most = output_max if limit is None else min(limit, output_max)
        least = min(most, self._metering.output_floor_tokens)
        want = rates.hold_cost(prompt, most * request.choices)
        minimum = rates.hold_cost(prompt, least * request.choices)
        return _Size(want, minimum, want, *self._growth(rates), most)

    def _growth(self, rates: HoldRates) -> tuple[int, int]:
        """Micros of a slice and of its low mark."""
        return rates.output_cost(self._metering.slice_tokens), rates.output_cost(self._metering.slice_low_tokens)

    def _hold(
        self,
        caller: Caller,
        request: ChatRequest,
        first: Candidate,
        prompt: PromptEstimate,
        size: _Size,
        request_id: str,
    ) -> HoldRequest:
        metadata = _Metadata(
            request_id, request.model, request.stream, self._price_version, prompt.tokens, caller.idempotency
        )
        return HoldRequest(
            session=session_id(),
            account=caller.account,
            key=caller.key_id,
            want=size.want,
            minimum=min(size.minimum, size.want),
            prompt_cost=first.prompt_cost(prompt.tokens),
            body_hash=request.body_hash(),
            owner=self._owner,
            price_version=self._price_version,
            metadata=_encode(metadata),
            limits=caller.limits,
            idempotency=caller.idempotency,
        )

    async def _not_held(self, hold: HoldRequest, reply: Held | Refused | Repeated) -> Held:
        """Reserve again where a session that ended void has the idempotency key: that freed it. Raises the named error
        of a refusal."""
        for _ in range(TAKE_OVERS_MAX):
            if not isinstance(reply, Repeated):
                break
            await self._check_free(hold.account, reply)
            reply = await self._ask(msgspec.structs.replace(hold, past=reply.session))
        if isinstance(reply, Repeated):  # others with the same key were faster each time
            raise IdempotencyInFlight(metadata={"session": reply.session})
        if isinstance(reply, Refused):
            telemetry.REFUSED.labels(_LIMITS.get(reply.reason, reply.reason)).inc()
            raise _refusal(reply)
        return reply

    async def _check_free(self, account: AccountRef, taken: Repeated) -> None:
        """Raises the named error unless the idempotency key is free again."""
        if not taken.same_body:
            raise IdempotencyConflict()
        try:
            past = await self._ledger.past(account, taken.session)
        except LedgerUnavailable:
            raise LedgerDown(retry_after_ms=1_000) from None
        except LedgerError:
            raise InternalError from None
        error = repeat_error(taken, past)
        if error is not None:
            raise error

    async def _ask(self, hold: HoldRequest) -> Held | Refused | Repeated:
        """One reserve, again while answers are lost at once; one given up is voided so that a late one cannot leak."""
        reply: Held | Refused | Repeated | None = None
        began = self._clock.monotonic()
        while reply is None:
            try:
                reply = await self._ledger.reserve(hold)
            except LedgerUnavailable:
                # A lost connection is worth another try; a call that timed out is not: the client is waiting.
                if self._clock.monotonic() - began > RETRY_WITHIN_S:
                    break
                await asyncio.sleep(RETRY_PAUSE_S)
            except LedgerError:
                raise InternalError from None
        if reply is None:
            ref = SessionRef(hold.session, hold.account, hold.key, 0)  # no fence: the ledger never told us one
            self._live.detach(self._give_up(ref))
            raise LedgerDown(retry_after_ms=1_000)
        return reply

    async def _give_up(self, ref: SessionRef) -> None:
        """Until the ledger has it, or until a hold that it may have made is swept."""
        ends = self._clock.monotonic() + self._metering.lease_ms / 1000
        while True:
            try:
                await self._ledger.void(ref)
                return
            except LedgerUnavailable:
                if self._clock.monotonic() > ends:
                    break
            await asyncio.sleep(GIVE_UP_PAUSE_S)
        telemetry.log.error("a reserve of unknown outcome could not be voided; its lease will", session=ref.session)

    def _session(
        self,
        hold: HoldRequest,
        held: Held,
        request: ChatRequest,
        route: Route,
        size: _Size,
        asked_ms: int,
        request_id: str,
    ) -> LiveSession:
        now = self._clock.monotonic()
        return LiveSession(
            ref=SessionRef(hold.session, hold.account, hold.key, held.fence),
            request_id=request_id,
            route=route.name,
            stream=request.stream,
            held=held.held,
            hold_max=size.most,
            slice_cost=size.slice_cost,
            slice_low_cost=size.slice_low_cost,
            fence_ms=asked_ms + held.lease_ms - self._metering.fence_margin_ms,
            checkpoint_at=now,
            started_at=now,
            clock=self._clock,
        )


_LIMITS = {"debt": "balance"}


def _refusal(reply: Refused) -> CallError:
    """The named error of a refusal; `metadata.limit` says which limit refused (contract 3)."""
    limit = {"limit": _LIMITS.get(reply.reason, reply.reason)}
    if reply.reason in ("balance", "debt"):
        return OutOfCredit(metadata=limit)
    if reply.reason == "in_flight":
        return CreditInFlight(metadata=limit, retry_after_ms=1_000)
    if reply.reason == "requests":
        return RequestRateExceeded(metadata=limit, retry_after_ms=max(1, reply.retry_after_ms))
    if reply.reason == "parallel":
        return ParallelSessionsExceeded(metadata=limit, retry_after_ms=max(1_000, reply.retry_after_ms))
    if reply.reason == "blocked":
        return AccountBlocked()
    return InternalError()
