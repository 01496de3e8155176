"""How the ledger's verbs reach Redis: scripts loaded, epochs known, errors in the ledger's words.

Must not: know a verb. `redis_ledger` has them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Iterable, Sequence
from typing import Any, TypeVar

from metering import ledger_replies, scripts
from metering.keys import SHARD_COUNT, SHARDS
from metering.ledger import LedgerError, LedgerFrozen, LedgerUnavailable
from metering.scripts import Caller, Script, Word
from metering.server_check import VERIFIED_KEY, run_id
from storage.redis_client import RedisClient, RedisReplyError, RedisUnavailable
from storage.redis_cluster import ClusterClient
from storage.redis_replicated import ReplicatedClient

T = TypeVar("T")

FROZEN = b"-1"
"""The epoch that `freeze` leaves: no caller has it."""


class LedgerCalls:
    """One process's way to the ledger in Redis.

    An epoch is asked for once per shard and connection: after a lost connection the server may be another one, or the
    same without its last writes, so nothing is sent to a shard before it is known that the contents were verified.
    """

    def __init__(self, client: Caller, loaded: dict[str, Script] | None) -> None:
        self._client = client
        self._scripts = loaded or scripts.load()
        self._epochs: list[bytes | None] = [None] * SHARD_COUNT
        self._opened = [0] * SHARD_COUNT
        """When each shard's epoch was opened, on the shard's clock in ms; 0 for the first epoch."""
        self._learned = [0.0] * SHARD_COUNT
        self._losses = 0
        self.forget_when_lost(client)

    def forget_when_lost(self, client: object) -> None:
        """Ask for all epochs anew once this client has lost its connection."""
        if isinstance(client, RedisClient | ReplicatedClient | ClusterClient):
            client.on_lost(self.forget)

    def forget(self) -> None:
        """The server may be another one: every epoch is asked for again before the next call."""
        self._losses += 1
        self._epochs = [None] * SHARD_COUNT

    async def start(self) -> None:
        """Load the scripts and read every shard's epoch, in one pipeline. Raises LedgerUnavailable.

        A shard without one stays frozen for this process until it has one; call again after a rebuild.
        """
        loading = [self._client.call("SCRIPT", "LOAD", script.text) for script in self._scripts.values()]
        await answered(asyncio.gather(*loading))
        await self._learn(range(SHARD_COUNT))

    async def _learn(self, numbers: Sequence[int]) -> None:
        """Read the epochs of these shards: None where one is missing, frozen or not open yet, and everywhere while the
        server's contents are not verified."""
        losses = self._losses
        asked = self._client.call("INFO", "server"), self._client.call("GET", VERIFIED_KEY)
        reading = [self._client.call("HMGET", SHARDS[v].meta, "ep", "fz", "op") for v in numbers]
        info, known, *metas = await answered(asyncio.gather(*asked, *reading))
        if losses != self._losses:
            raise LedgerUnavailable("the connection was lost while epochs were read")
        fit = known is None or known == run_id(info)
        for number, (epoch, closed, opened) in zip(numbers, metas, strict=True):
            usable = fit and closed is None and epoch != FROZEN
            self._epochs[number] = epoch if usable else None
            self._opened[number] = int(opened or 0)
            self._learned[number] = time.monotonic()

    async def init_shards(self, numbers: Iterable[int], epoch: int = 1) -> None:
        """Create the meta of shards that have none. The caller knows that the journal has nothing of them either."""
        script = self._scripts["init"]
        calls = [(v, script.place({"meta": SHARDS[v].meta}, {"ep": epoch})) for v in numbers]
        replies = await answered(asyncio.gather(*(scripts.run(self._client, script, words) for _, words in calls)))
        for (number, _), reply in zip(calls, replies, strict=True):
            if reply[0] == b"BOUNDS":
                raise LedgerError("init refused: the epoch must be a positive integer")
            self._epochs[number] = reply[1]

    async def _epoch_of(self, number: int) -> bytes:
        return self._epochs[number] or await self._epoch(number)

    async def _epoch(self, number: int) -> bytes:
        """The epoch of a shard that had none when we looked last. Nothing of ours can be open there."""
        await self._learn([number])
        epoch = self._epochs[number]
        if epoch is None:
            raise LedgerFrozen(f"shard {number} is frozen: its admission state was lost, or is not verified yet")
        return epoch

    async def _run(
        self, script: Script, words: list[Word] | tuple[Word, ...], client: Caller | None = None
    ) -> list[Any]:
        """Run a script: KEYS[1] is its shard's meta key, ARGV[1] the epoch. Once more where that is another one by now:
        then the shard was rebuilt, and nothing ran."""
        reply = await self._run_once(script, words, client or self._client)
        if reply[0] != b"EPOCH":
            return reply
        number, at = int(str(words[1])[4:7]), 1 + int(words[0])
        self._epochs[number] = None
        epoch = await self._epoch(number)
        if epoch != words[at]:
            words = (*words[:at], epoch, *words[at + 1 :])
            reply = await self._run_once(script, words, client or self._client)
        if reply[0] == b"EPOCH":
            raise LedgerFrozen(f"{script.name}: the shard is frozen or has another epoch")
        return reply

    async def _run_once(self, script: Script, words: Sequence[Word], client: Caller) -> list[Any]:
        try:
            try:
                reply: list[Any] = await client.call("EVALSHA", script.sha, *words)
            except RedisReplyError as error:
                if error.code != "NOSCRIPT":  # as `scripts.run`, without its frame: this is on every call's way
                    raise
                reply = await client.call("EVAL", script.text, *words)
        except RedisReplyError as error:
            raise ledger_replies.translated(error) from error
        except RedisUnavailable as error:
            raise LedgerUnavailable(str(error)) from error
        return reply


def brought(sent: asyncio.Future[Any]) -> list[Any]:
    """The reply of a script that was sent without a coroutine, with the client's errors in the ledger's words. A script
    that the server does not have is LedgerUnavailable: the way with a coroutine loads it."""
    try:
        reply: list[Any] = sent.result()
    except RedisReplyError as error:
        if error.code == "NOSCRIPT":
            raise LedgerUnavailable(str(error)) from error
        raise ledger_replies.translated(error) from error
    except RedisUnavailable as error:
        raise LedgerUnavailable(str(error)) from error
    if reply[0] == b"EPOCH":
        raise LedgerFrozen("the shard is frozen or has another epoch")
    return reply


async def answered(call: Awaitable[T]) -> T:
    """A call's result, with the client's errors in the ledger's words."""
    try:
        return await call
    except RedisReplyError as error:
        raise ledger_replies.translated(error) from error
    except RedisUnavailable as error:
        raise LedgerUnavailable(str(error)) from error
