"""How the ledger's verbs reach Redis: scripts loaded, epochs known, errors in the ledger's words.

Must not: know a verb. `redis_ledger` has them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable
from typing import Any, TypeVar

from metering import ledger_replies, scripts
from metering.keys import SHARD_COUNT, SHARDS
from metering.ledger import LedgerError, LedgerFrozen, LedgerUnavailable
from metering.scripts import Caller, Script, Word
from storage.redis_client import RedisReplyError, RedisUnavailable

T = TypeVar("T")


class LedgerCalls:
    """One process's way to the ledger in Redis."""

    def __init__(self, client: Caller, loaded: dict[str, Script] | None) -> None:
        self._client = client
        self._scripts = loaded or scripts.load()
        self._epochs: list[bytes | None] = [None] * SHARD_COUNT

    async def start(self) -> None:
        """Load the scripts and read every shard's epoch, in one pipeline. Raises LedgerUnavailable.

        A shard without one stays frozen for this process until it has one; call again after a rebuild.
        """
        loading = [self._client.call("SCRIPT", "LOAD", script.text) for script in self._scripts.values()]
        reading = [self._client.call("HGET", shard.meta, "ep") for shard in SHARDS]
        answers = await answered(asyncio.gather(*loading, *reading))
        self._epochs = answers[len(loading) :]

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
        epoch: bytes | None = await answered(self._client.call("HGET", SHARDS[number].meta, "ep"))
        if epoch is None:
            raise LedgerFrozen(f"shard {number} has no meta key: its admission state was lost or never made")
        self._epochs[number] = epoch
        return epoch

    async def _run(
        self, script: Script, words: list[Word] | tuple[Word, ...], client: Caller | None = None
    ) -> list[Any]:
        client = client or self._client
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
        if reply[0] == b"EPOCH":
            raise LedgerFrozen(f"{script.name}: the shard is frozen or has another epoch")
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
