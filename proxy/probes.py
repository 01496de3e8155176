"""Active checks: each provider with a `probe` is asked for its list of models, again and again.

Must not: send anything that costs, follow a redirect, open a breaker for a list that never worked, or close one that a
refused key opened where the list is shown without a key.

A list says two things: whether the provider answers (to breakers that are not closed: one half-open probe; a failure to
all), and which models it has (to `Live.missing_until`). What it does not say for certain it does not say at all.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec
from prometheus_client import Counter, Gauge

from config import kinds
from providers.breaker import Breaker, Change, Permit
from providers.breaker_record import Reason, decode
from providers.codec import ChatCall, Upstream
from providers.model_lists import (
    MODELS_MAX,
    PAGES_MAX,
    Names,
    decides,
    has,
    list_request,
    names,
    proves_key,
    read_list,
)
from providers.registry import wire
from providers.routing import Live
from proxy import telemetry
from proxy.candidates import Pool
from proxy.exchange import Deadlines, Exchange
from proxy.http_request import Origin, build_request
from proxy.live_session import CLOCK, Clock
from proxy.transport import Transport
from proxy.transport_errors import ConnectFailed, ExchangeAborted, TransportError

LIST_BYTES_MAX = 8 * 1024 * 1024
"""Bytes of one list, all its pages together. The largest known, of a reseller of hundreds of models, has one MB."""
ERROR_BYTES_MAX = 256 * 1024
"""Bytes of an error's body."""
JITTER = 0.1
"""Part of the time between two probes by which it is shorter or longer, so that workers do not ask as one."""
NO_LIST_PAUSES = 10
"""After an answer that is no list the provider is left alone for so many times as long."""
MISSING_PAUSES = 2.5
"""A model counts as missing for so many times as long, unless the next list says so again."""

PROBES = Counter("tollgate_probes_total", "Model lists asked for, by provider and result.", ["provider", "result"])
MISSING = Gauge(
    "tollgate_model_missing",
    "Whether a candidate's model is not in its provider's list.",
    ["provider", "model"],
    multiprocess_mode="livemax",
)

Result = Literal["ok", "refused", "failed", "no_list"]
Changed = Callable[[str, Change], object]


class ProbeTarget(msgspec.Struct, frozen=True):
    """A provider to ask: where it is, `pool` its own way (None: the worker's transport), seconds between two probes and
    for one, and its candidates by model."""

    upstream: Upstream
    origin: Origin
    pool: Pool | None
    every_s: float
    timeout_s: float
    lives: Sequence[tuple[str, Live]]


class _Said(msgspec.Struct, frozen=True):
    """What came of one probe. `known` where a whole list came; `counts` whether a failure is the provider's for
    certain, `detail` what it was."""

    result: Result
    known: Names | None = None
    counts: bool = False
    detail: str = ""


class _NoList(Exception):
    """The provider's answer is no list of models."""


class Probes:
    """The probes of one worker: `start()`, then `aclose()`."""

    def __init__(
        self,
        targets: Sequence[ProbeTarget],
        transport: Transport,
        changed: Changed,
        *,
        clock: Clock = CLOCK,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """`changed` is told of breakers that a probe opened or closed: the candidate as `provider/model`, and the
        change. `draw` gives random numbers of [0, 1)."""
        self._jobs = [
            _Job(target, transport, changed, clock) for target in targets if list_request(target.upstream) is not None
        ]
        self._draw = draw
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Ask every provider at once, then again and again. Call it in the loop, once."""
        loop = asyncio.get_running_loop()
        for job in self._jobs:
            task = loop.create_task(self._run(job), name=f"probe of {job.provider}")
            self._tasks.add(task)
            task.add_done_callback(self._ended)

    async def aclose(self) -> None:
        """End them all; a probe under way is given up and its connection closed."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, job: _Job) -> None:
        while True:
            result = await job.probe()
            pauses = NO_LIST_PAUSES if result == "no_list" else 1
            await asyncio.sleep(job.every_s * pauses * (1 + JITTER * (2 * self._draw() - 1)))

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            telemetry.log.error("a probe ended by a fault of ours", probe=task.get_name(), exc_info=error)


class _Job:
    """One provider's probes. `_listed`: a list came at some time, so its failures mean something."""

    def __init__(self, target: ProbeTarget, transport: Transport, changed: Changed, clock: Clock) -> None:
        self.provider = target.upstream.name
        self.every_s = target.every_s
        self._target = target
        self._transport = transport
        self._changed = changed
        self._clock = clock
        self._listed = False
        self._missing: set[str] = set()
        self._before: Result = "ok"

    async def probe(self) -> Result:
        """Ask once and tell the candidates."""
        said = await self._ask()
        telemetry.count(PROBES, 1, self.provider, said.result)
        if said.result != self._before:
            self._before = said.result
            log = telemetry.log.info if said.result == "ok" else telemetry.log.warning
            log("probe", provider=self.provider, result=said.result, detail=said.detail)
        now = self._clock.monotonic()
        for model, live in self._target.lives:
            self._tell(model, live.breaker, said, now)
            self._mark(model, live, said.known, now)
        return said.result

    # -- asking ------------------------------------------------------------------------------------------------------

    async def _ask(self) -> _Said:
        try:
            return await self._list()
        except _NoList as error:
            return _Said("no_list", detail=str(error))
        except TransportError as error:
            counts = self._listed or error.phase == "connect"
            if isinstance(error, ExchangeAborted) or (isinstance(error, ConnectFailed) and error.__cause__ is None):
                counts = False  # our doing: the transport is closed, or has too many connections
            return _Said("failed", counts=counts, detail=str(error))

    async def _list(self) -> _Said:
        """Page after page, as far as the bounds allow: of a list that was not read to its end nothing is missing."""
        ids: list[str] = []
        room, page = LIST_BYTES_MAX, None
        due = self._clock.monotonic() + self._target.timeout_s
        for _ in range(PAGES_MAX):
            exchange = self._open(page, max(0.0, due - self._clock.monotonic()))
            try:
                await exchange.head()
                if exchange.status != 200:
                    return await self._refusal(exchange)
                body = await _body(exchange, room)
            finally:
                exchange.release()
            listed = read_list(self._target.upstream.kind, body)
            if listed is None:
                raise _NoList("the answer is no list of models")
            self._listed = True
            room -= len(body)
            ids.extend(listed.ids)
            page = listed.next
            if page is None or len(ids) > MODELS_MAX:
                break
        whole = page is None and len(ids) <= MODELS_MAX
        return _Said("ok", known=names(ids) if whole else None)

    def _open(self, page: bytes | None, seconds: float) -> Exchange:
        target = self._target
        out = list_request(target.upstream, page)
        assert out is not None
        deadlines = Deadlines(seconds, seconds, seconds, seconds)
        if target.pool is not None:
            return target.pool.open(out, deadlines)
        try:
            raw = build_request(out.method, out.target, target.origin, out.headers, out.body, out.own)
        except ValueError as error:
            raise _NoList(str(error)) from None
        return self._transport.open(target.origin, raw, deadlines)

    async def _refusal(self, exchange: Exchange) -> _Said:
        """What another status than 200 says of the provider, in the words of its wire: not all answer 401 to a bad key.

        A key may be good for calls and not for lists: OpenAI says so (401, "Missing scopes"), others just answer 403.
        """
        status, upstream = exchange.status, self._target.upstream
        detail = f"status {status}"
        if status < 400 or status in (404, 405, 501):
            return _Said("no_list", detail=detail)
        body = await _body(exchange, ERROR_BYTES_MAX)
        codec = wire(kinds.speaks(upstream.kind)).codec(upstream, ChatCall(b"", "", stream=False))
        if status == 403 and not self._listed:
            return _Said("no_list", detail=f"{detail}: the key may not list models")
        if codec.failure(status, exchange.headers, body).kind == "key_refused":
            if b"missing scope" in body.lower():
                return _Said("no_list", detail=f"{detail}: the key may not list models")
            return _Said("refused", counts=True, detail=detail)
        return _Said("failed", counts=status >= 500 and self._listed, detail=detail)

    # -- telling -----------------------------------------------------------------------------------------------------

    def _tell(self, model: str, breaker: Breaker, said: _Said, now: float) -> None:
        """What the probe means to a candidate's breaker. The permit is taken now, not before the probe: while one is
        under way no call waits for it."""
        change: Change | None = None
        if said.result == "ok":
            permit = self._doubted(breaker, now)
            if permit is not None:
                change = breaker.succeeded(permit, now)
        elif said.counts:
            permit = breaker.try_pass(now)
            if permit is not None:
                change = breaker.failed(permit, now, key_refused=said.result == "refused")
        if change is not None:
            self._changed(f"{self.provider}/{model}", change)

    def _doubted(self, breaker: Breaker, now: float) -> Permit | None:
        """A half-open probe's permit, where a list speaks about what opened the breaker; of a closed one none."""
        record = decode(breaker.record())
        if record is not None and record.reason is Reason.KEY_REFUSED and not proves_key(self._target.upstream):
            return None
        permit = breaker.try_pass(now)
        return permit if permit is not None and permit.probe_at is not None else None

    def _mark(self, model: str, live: Live, known: Names | None, now: float) -> None:
        """Whether the candidate's model is there. Without a list what was known runs out by itself."""
        if known is None or not decides(self._target.upstream.kind, known):
            missing = now < live.missing_until
        elif has(known, model):
            missing, live.missing_until = False, 0.0
        else:
            missing, live.missing_until = True, now + MISSING_PAUSES * self.every_s
        if missing == (model in self._missing):
            return
        MISSING.labels(self.provider, model).set(int(missing))
        if missing:
            self._missing.add(model)
            telemetry.log.warning("model missing", provider=self.provider, model=model)
        else:
            self._missing.discard(model)
            telemetry.log.info("model no longer missing", provider=self.provider, model=model)


async def _body(exchange: Exchange, bytes_max: int) -> bytes:
    """The whole body. Raises _NoList when it is larger."""
    parts, size = [], 0
    while data := await exchange.read():
        parts.append(data)
        size += len(data)
        if size > bytes_max:
            raise _NoList("the answer is larger than a list may be")
    return b"".join(parts)
