"""One session's meter: text deltas and provider usage in, micros out. Pure and synchronous; nothing waits here.

Output is counted exactly, one counter for each (choice, channel, tool), because separate texts never share a token.
`fits` answers from a byte bound that is renewed rarely; text is tokenised again only when that bound is used up.
Must not: decide what happens when credit ends, know frames or HTTP, or read a clock.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Literal

from config.price import CompiledPrice
from metering.pricing import MILLION, TokenUsage, at_least, cost, rates_for, sane
from metering.token_counter import Encoder, StreamCounter

COUNTERS_MAX = 1024
"""Separate texts of one session (choices x channels x tools). What comes beyond is counted as one text for each
price (`merged` says so): their tokens may then differ by one for each delta, and memory stays bounded."""

Source = Literal["provider", "counted", "estimated"]


class Channel(IntEnum):
    """Where a delta's text belongs. Reasoning has its own price; the others are output."""

    CONTENT = 0
    REFUSAL = 1
    REASONING = 2
    TOOL_NAME = 3
    TOOL_ARGUMENTS = 4


_Key = tuple[int, int, int]
_MERGED_OUTPUT: _Key = (-1, Channel.CONTENT, 0)
_MERGED_REASONING: _Key = (-1, Channel.REASONING, 0)


class Meter:
    """What one session costs so far. `prompt_tokens` is our own count; `prompt_kind` says how good it is."""

    __slots__ = (
        "_counters",
        "_encoding",
        "_fresh_bytes",
        "_high_water",
        "_limit",
        "_price",
        "_prompt",
        "_prompt_kind",
        "_room_bytes",
        "_seen",
        "_undo",
        "merged",
        "refused",
        "reported",
    )

    def __init__(
        self,
        price: CompiledPrice,
        prompt_tokens: int,
        encoding: Encoder,
        prompt_kind: Literal["counted", "estimated"] = "counted",
    ) -> None:
        self._price = price
        self._prompt = prompt_tokens
        self._prompt_kind: Source = prompt_kind
        self._encoding = encoding
        self._counters: dict[_Key, StreamCounter] = {}
        self._undo: dict[_Key, StreamCounter] = {}
        self.reported: TokenUsage | None = None
        """The provider's usage, if one was believed and no text came after it."""
        self._seen: TokenUsage | None = None  # the last one believed, whatever came after it
        self._high_water = 0
        self._limit: int | None = None
        self._room_bytes = 0  # bytes that fit `_limit` for certain, since the last look at the counters
        self._fresh_bytes = 0  # bytes added since then
        self.merged = False
        self.refused: str | None = None
        """Why the last provider usage was not believed."""

    def add(self, choice: int, channel: Channel, text: str, tool: int = 0) -> None:
        """Count a delta. `tool` is the index of the tool call for the two tool channels."""
        if not text:
            return
        self.reported = None  # a report made before this text cannot cover it
        key: _Key = (choice, channel, tool)
        counter = self._counters.get(key)
        if counter is None:
            key, counter = self._new_counter(key)
        if self._fresh_bytes + 4 * len(text) > self._room_bytes and key not in self._undo:
            self._undo[key] = counter.copy()
        self._fresh_bytes += counter.feed(text)

    def counted(self) -> TokenUsage:
        """Everything so far: our own exact count, and what the provider has reported beyond it (see `at_least`)."""
        own = self._own()
        return own if self._seen is None else at_least(own, self._seen)

    def counted_output(self) -> int:
        """Output tokens so far by our own count alone, reasoning included, exact."""
        return self._own().output

    def cost_now(self) -> int:
        """Micros of `counted()`, exact. Tokenises the unfinished words."""
        return cost(self._price, self.counted())

    def cost_upper(self) -> int:
        """Micros, at least `cost_now()`, without tokenising anything."""
        if self._seen is not None:
            return self._most(self._seen)
        return cost(self._price, self._usage([counter.upper() for counter in self._counters.values()]))

    def checkpoint(self) -> int:
        """What a progress report carries: `cost_now()`, but never less than an earlier checkpoint said (a word's
        tokens can become fewer when it goes on, and a report can say that much of the prompt was cached). What is
        settled in the end may be less."""
        self._high_water = max(self._high_water, self.cost_now())
        return self._high_water

    def fits(self, limit_micros: int) -> bool:
        """Whether everything added so far costs at most `limit_micros`. Exact; usually one comparison."""
        certain = limit_micros == self._limit and self._fresh_bytes <= self._room_bytes
        if not certain:
            self._limit, self._fresh_bytes = limit_micros, 0
            self._room_bytes = self._room(limit_micros)
            if self._room_bytes < 0:
                return False
        if self._undo:
            self._undo.clear()
        return True

    def take_back(self) -> None:
        """After `fits` said no: forget what was added since it last said yes, so that a chunk that is not forwarded
        is not charged. Text that was certain to fit when it was added stays counted."""
        self._counters.update(self._undo)
        self._undo.clear()

    def report(self, usage: TokenUsage, *, partial: bool = False) -> str | None:
        """The provider's usage; the last one believed wins over our count, or is the least of it once text has come
        after it. `partial`: it tells of a part, and is no more than that least. Returns why it was refused, or None."""
        self.refused = sane(usage)
        if self.refused is None:
            self._seen = usage
            self._room_bytes = -1  # what fits is looked at anew, once more text comes
            if not partial:
                self.reported = usage
        return self.refused

    def final(self) -> tuple[TokenUsage, Source]:
        """What is charged, and whose count it is: the provider's, else ours (`estimated` when the prompt was)."""
        if self.reported is not None:
            return self.reported, "provider"
        return self.counted(), self._prompt_kind

    def final_cost(self) -> int:
        """Micros of `final()`."""
        return cost(self._price, self.final()[0])

    def _new_counter(self, key: _Key) -> tuple[_Key, StreamCounter]:
        if len(self._counters) >= COUNTERS_MAX:
            self.merged = True
            key = _MERGED_REASONING if key[1] == Channel.REASONING else _MERGED_OUTPUT
        return key, self._counters.setdefault(key, StreamCounter(self._encoding))

    def _own(self) -> TokenUsage:
        if not self._counters:
            return TokenUsage(self._prompt, 0, 0, 0, 0)
        return self._usage([counter.total() for counter in self._counters.values()])

    def _usage(self, tokens: list[int]) -> TokenUsage:
        reasoning = sum(n for key, n in zip(self._counters, tokens, strict=True) if key[1] == Channel.REASONING)
        return TokenUsage(self._prompt, cached=0, cache_write=0, output=sum(tokens), reasoning=reasoning)

    def _room(self, limit_micros: int) -> int:
        """How many more bytes are certain to fit, at the dearest token a byte; -1 when what is there does not fit.

        In millionths of a micro, where `cost(...) <= limit` is `spent <= budget` without rounding.
        """
        if self._seen is not None:
            return self._room_above(self._seen, limit_micros)
        rates = rates_for(self._price, self._prompt)
        budget = (limit_micros - self._price.request) * MILLION - self._prompt * rates.input
        priced = [
            (rates.reasoning if key[1] == Channel.REASONING else rates.output, counter)
            for key, counter in self._counters.items()
        ]
        left = budget - sum([rate * counter.most() for rate, counter in priced])
        if left < 0:
            if sum([rate * counter.total() for rate, counter in priced]) > budget:
                return -1
            left = max(0, budget - sum([rate * counter.most() for rate, counter in priced]))
        dearest = max(rates.output, rates.reasoning)
        return left // dearest if dearest else 1 << 62

    def _room_above(self, seen: TokenUsage, limit_micros: int) -> int:
        """`_room` where a report is the least. To whole micros: a byte or two less than would fit."""
        most = self._most(seen)
        if most > limit_micros:
            if self.cost_now() > limit_micros:
                return -1
            most = min(limit_micros, self._most(seen))
        rates = rates_for(self._price, seen.prompt or self._prompt)
        dearest = max(rates.output, rates.reasoning)
        return (limit_micros - most) * MILLION // dearest if dearest else 1 << 62

    def _most(self, seen: TokenUsage) -> int:
        """Micros that the text so far can come to, less a token at the dearest rate for each byte to come.

        Counted reasoning takes tokens off the rest of a reported output. Where it is the cheaper one, the cost falls
        and then rises with it (it is convex), so that it is dearest at the least or at the most of it.
        """
        price = self._price
        most = self._usage([counter.most() for counter in self._counters.values()])
        upper = cost(price, at_least(most, seen))
        rates = rates_for(price, seen.prompt or self._prompt)
        if rates.reasoning < rates.output:
            thoughts = [counter for key, counter in self._counters.items() if key[1] == Channel.REASONING]
            least = sum([counter.least() for counter in thoughts])
            fewer = TokenUsage(self._prompt, 0, 0, output=most.output - most.reasoning + least, reasoning=least)
            upper = max(upper, cost(price, at_least(fewer, seen)))
        return upper
