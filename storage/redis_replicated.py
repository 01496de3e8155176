"""A Redis connection whose commands are answered once a replica has them: batches, each followed by one WAIT.

A connection blocked in WAIT runs nothing else, so what must not be held up (reserves, reads) stays on `RedisClient`.
Must not: retry a command (its outcome may be unknown), or take a missing replica for a failed command: what the
primary has applied stands, and `on_unconfirmed` says that no replica has confirmed it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from storage.redis_client import RedisClient, RedisReplyError, RedisUnavailable
from storage.redis_connection import Word

WAIT_MS = 250
"""How long the server lets a batch wait for a replica before it answers without."""

REPLICAS_WAITED_FOR = 1

MARK = ("PUBLISH", "tollgate:replicated", "")
"""Written before each WAIT, which waits for the last write of its own connection only: a repeated settlement writes
nothing, and the connection that wrote it may be gone. A message nobody listens to goes to the replicas all the same."""

BATCH_MAX = 256
"""Commands of one batch: a few milliseconds of scripts, so that the server's other connections get their turns."""


@dataclass(frozen=True, slots=True)
class _Asked:
    words: tuple[Word, ...]
    answer: asyncio.Future[Any]
    at: float


class ReplicatedClient:
    """One more connection to the Redis of `RedisClient`, with the same `call`. Belongs to the loop of `start`.

    One batch is under way at a time; what is asked for meanwhile makes the next. A call waits at most `call_ms` for its
    batch and `call_ms` for its answer; `call_ms` must exceed `wait_ms`. `pending_max` bounds the unanswered calls.
    `on_unconfirmed` gets the number of commands that were applied without a replica's word; it must not raise.
    `mark` gives the write before a batch's WAIT for its commands, where MARK is not replicated (in a cluster).
    """

    def __init__(
        self,
        url: str,
        *,
        call_ms: int,
        connect_ms: int,
        pending_max: int,
        on_unconfirmed: Callable[[int], None] = lambda count: None,
        wait_ms: int = WAIT_MS,
        mark: Callable[[Sequence[tuple[Word, ...]]], tuple[Word, ...]] | None = None,
    ) -> None:
        """Raises RedisUrlError for a URL that cannot be read, ValueError for a `call_ms` that no WAIT fits into."""
        if call_ms <= wait_ms:
            raise ValueError(f"call_ms is {call_ms}: it must be above the {wait_ms} ms that a replica is waited for")
        # Room for two batches with MARK and WAIT: one that timed out is unanswered until the connection is given up.
        self._client = RedisClient(url, call_ms=call_ms, connect_ms=connect_ms, pending_max=2 * (BATCH_MAX + 2))
        self._call_s = call_ms / 1000
        self._pending_max = pending_max
        self._on_unconfirmed = on_unconfirmed
        self._wait_ms = wait_ms
        self._mark = mark
        self._asked: deque[_Asked] = deque()
        self._under_way = 0
        self._writer: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def on_lost(self, callback: Callable[[], None]) -> None:
        """As `RedisClient.on_lost`."""
        self._client.on_lost(callback)

    @property
    def connected(self) -> bool:
        """Whether a call made now would be written."""
        return self._client.connected

    async def start(self) -> None:
        """Connect once. Raises as `RedisClient.start` does."""
        self._loop = asyncio.get_running_loop()
        await self._client.start()

    def call(self, *args: Word) -> asyncio.Future[Any]:
        """Ask for one command. The awaited result is its reply, given when the WAIT of its batch was answered.

        Raises (when awaited) RedisReplyError, RedisUnavailable, TypeError. Cancelling does not unsend the command.
        """
        if not self._client.connected:
            return self._client.call(*args)
        assert self._loop is not None
        answer: asyncio.Future[Any] = self._loop.create_future()
        if len(self._asked) + self._under_way >= self._pending_max:
            answer.set_exception(_unsent(f"{self._pending_max} calls are pending"))
            return answer
        self._asked.append(_Asked(args, answer, self._loop.time()))
        if self._writer is None:
            self._writer = self._loop.create_task(self._write(), name="redis replicated batches")
        return answer

    async def aclose(self) -> None:
        """Close the connection; what is unanswered gets RedisUnavailable."""
        await self._client.aclose()
        if self._writer is not None:
            await asyncio.wait([self._writer])

    async def _write(self) -> None:
        """Batch after batch, until nothing is asked for."""
        try:
            while self._asked:
                batch = self._next_batch()
                self._under_way = len(batch)
                await self._run(batch)
        finally:
            self._under_way = 0
            self._writer = None

    def _next_batch(self) -> list[_Asked]:
        """The oldest calls; those that waited too long for their turn are failed, unsent."""
        assert self._loop is not None
        too_old = self._loop.time() - self._call_s
        batch: list[_Asked] = []
        while self._asked and len(batch) < BATCH_MAX:
            asked = self._asked.popleft()
            if asked.at < too_old:
                _fail(asked, _unsent(f"not written within {self._call_s:g} s"))
            else:
                batch.append(asked)
        return batch

    async def _run(self, batch: list[_Asked]) -> None:
        if not batch:
            return
        calls = [self._send(asked.words) for asked in batch]
        mark = MARK if self._mark is None else self._mark([asked.words for asked in batch])
        calls += self._client.call(*mark), self._client.call("WAIT", REPLICAS_WAITED_FOR, self._wait_ms)
        *replies, marked, waited = await asyncio.gather(*calls, return_exceptions=True)
        lost = _lost(waited)
        applied = 0
        for asked, reply in zip(batch, replies, strict=True):
            if isinstance(reply, BaseException):
                _fail(asked, reply)
            elif lost is not None:
                _fail(asked, RedisUnavailable(lost, sent=True))
            else:
                applied += 1
                if not asked.answer.done():
                    asked.answer.set_result(reply)
        if lost is not None:
            self._fail_asked()
        elif applied and (
            isinstance(marked, BaseException) or not isinstance(waited, int) or waited < REPLICAS_WAITED_FOR
        ):
            self._on_unconfirmed(applied)

    def _send(self, words: tuple[Word, ...]) -> Awaitable[Any]:
        try:
            return self._client.call(*words)
        except TypeError as error:  # a word that no command can carry: its caller's fault alone, not the batch's
            assert self._loop is not None
            failed: asyncio.Future[Any] = self._loop.create_future()
            failed.set_exception(error)
            return failed

    def _fail_asked(self) -> None:
        """The batch before them got no answer: those who wait behind it shall not wait for as long again."""
        while self._asked:
            _fail(self._asked.popleft(), _unsent("the batch before had no answer"))


def _lost(waited: object) -> str | None:
    """Why the outcome of a batch is unknown, if it is. Any other error of WAIT only says that nothing is confirmed."""
    demoted = isinstance(waited, RedisReplyError) and waited.code == "UNBLOCKED"  # what it applied may be undone
    return str(waited) if demoted or isinstance(waited, RedisUnavailable) else None


def _unsent(reason: str) -> RedisUnavailable:
    return RedisUnavailable(f"Redis with a replica: {reason}", sent=False)


def _fail(asked: _Asked, error: BaseException) -> None:
    if not asked.answer.done():
        asked.answer.set_exception(error)
