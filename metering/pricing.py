"""Tokens to micros, and micros to the output tokens they cover. All integers; one rounding, up, at the very end.

cost = ceil(sum of tokens x rate / 10^6) + request, on cumulative tokens: never a sum of roundings (docs: metering).
Must not: count tokens, choose a price, or know whom it charges.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from config.price import CompiledPrice, Rates

MILLION = 1_000_000
TOKENS_MAX = 2**31
"""Most tokens of a class in one session; a report of more is refused as absurd."""

_INTEGERS = {int}

REACH_PERCENT, REACH_TOKENS = 102, 64
"""How far beyond our count of a prompt the provider's may be: the tiers up to there price its hold."""


class TokenUsage(msgspec.Struct, frozen=True):
    """Tokens of one session. `cached`, `cache_write` and `audio_input` are parts of `prompt`, and `cache_write_1h`
    (written to be kept for an hour) is one of `cache_write`; `reasoning`, `audio_output` and `image_output` are parts
    of `output`."""

    prompt: int
    cached: int
    cache_write: int
    output: int
    reasoning: int
    audio_input: int = 0
    audio_output: int = 0
    cache_write_1h: int = 0
    image_output: int = 0


def rates_for(price: CompiledPrice, prompt_tokens: int) -> Rates:
    """The rates in force: those of the highest tier that the prompt exceeds, for all tokens of the request."""
    chosen: Rates = price
    for tier in price.tiers:
        if prompt_tokens > tier.above:
            chosen = tier
    return chosen


def cost(price: CompiledPrice, usage: TokenUsage) -> int:
    """Micros for `usage`, rounded up once. What the parts leave of `prompt` and `output` is never below 0."""
    rates = rates_for(price, usage.prompt) if price.tiers else price
    prompt_parts = usage.cached or usage.cache_write or usage.audio_input
    if prompt_parts or usage.reasoning or usage.audio_output or usage.image_output:
        raw = _prompt_raw(rates, usage) + _output_raw(rates, usage)
    else:
        raw = usage.prompt * rates.input + usage.output * rates.output
    return -(-raw // MILLION) + price.request


def at_least(counted: TokenUsage, seen: TokenUsage) -> TokenUsage:
    """What an answer that is not over has used, by our count of its text and by the provider's last report `seen`.

    The prompt is as reported (a 0 says nothing), the output never less than reported or counted. Reasoning may be
    hidden from us, and what was heard or drawn has no text: they are added to the text that we counted, but not to an
    output that has them in it already, so that the sum stays within what the provider will report in the end.
    """
    given = seen if seen.prompt else counted
    reasoning = max(counted.reasoning, seen.reasoning)
    told = counted.output - counted.reasoning + reasoning + seen.audio_output + seen.image_output
    return TokenUsage(
        prompt=given.prompt,
        cached=given.cached,
        cache_write=given.cache_write,
        output=max(told, seen.output),
        reasoning=reasoning,
        audio_input=given.audio_input,
        audio_output=seen.audio_output,
        cache_write_1h=given.cache_write_1h,
        image_output=seen.image_output,
    )


class HoldRates(msgspec.Struct, frozen=True):
    """What holds beside one prompt are reckoned with; never charged. For each price that may come to apply: the dearest
    rates of a prompt token and of an output token (micros per million), and micros per request."""

    rates: tuple[tuple[int, int, int], ...]

    def hold_cost(self, prompt_tokens: int, output_tokens: int) -> int:
        """Micros that cover this many tokens at the dearest price."""
        most = 0
        for prompt, output, request in self.rates:
            micros = -(-(prompt_tokens * prompt + output_tokens * output) // MILLION) + request
            if micros > most:
                most = micros
        return most

    def output_cost(self, output_tokens: int) -> int:
        """Micros that cover this many tokens of output beside a prompt that is held for. For slices."""
        most = 0
        for _, output, _ in self.rates:
            micros = -(-output_tokens * output // MILLION)
            if micros > most:
                most = micros
        return most

    def output_covered(self, budget_micros: int, prompt_tokens: int) -> int:
        """The most output tokens n for which `hold_cost(prompt_tokens, n)` is within the budget, at most TOKENS_MAX;
        -1 when not even the prompt is covered. The exact inverse of `hold_cost`."""
        covered = TOKENS_MAX
        for prompt, output, request in self.rates:
            room = (budget_micros - request) * MILLION - prompt_tokens * prompt
            if room < 0:
                return -1
            if output:
                covered = min(covered, room // output)
        return covered


def hold_rates(
    prices: Iterable[CompiledPrice], prompt_tokens: int, *, audio: bool = False, cache_1h: bool = False
) -> HoldRates:
    """Rates that cover a call at any of `prices` whatever the provider calls its tokens: a prompt may be reported as
    written to the cache (for an hour where the request says so: `cache_1h`), an output as reasoning or as images,
    either as audio where the request has `audio`, and a prompt that is a little longer than our count may reach the
    next tier. Without tiers, audio and `cache_1h` they are the same for every prompt."""
    return HoldRates(tuple((*_worst(price, prompt_tokens, audio, cache_1h), price.request) for price in prices))


def sane(usage: TokenUsage) -> str | None:
    """Why a provider's report is refused (and the local count used instead), or None when it can be charged."""
    values = msgspec.structs.astuple(usage)
    countable = set(map(type, values)) == _INTEGERS and min(values) >= 0 and max(values) <= TOKENS_MAX
    for name, value in () if countable else zip(TokenUsage.__struct_fields__, values, strict=True):
        if type(value) is not int:
            return f"{name} is not an integer"
        if not 0 <= value <= TOKENS_MAX:
            return f"{name} is negative" if value < 0 else f"{name} is above {TOKENS_MAX}"
    if usage.cached + usage.cache_write > usage.prompt:
        return "cached and cache_write exceed prompt"
    if usage.cached + usage.cache_write + usage.audio_input > usage.prompt:
        return "cached, cache_write and audio_input exceed prompt"
    if usage.cache_write_1h > usage.cache_write:
        return "cache_write_1h exceeds cache_write"
    if usage.reasoning > usage.output:
        return "reasoning exceeds output"
    if usage.reasoning + usage.audio_output > usage.output:
        return "reasoning and audio_output exceed output"
    if usage.reasoning + usage.audio_output + usage.image_output > usage.output:
        return "reasoning, audio_output and image_output exceed output"
    return None


def _prompt_raw(rates: Rates, usage: TokenUsage) -> int:
    plain = max(0, usage.prompt - usage.cached - usage.cache_write - usage.audio_input)
    hour = min(usage.cache_write_1h, usage.cache_write)
    return (
        plain * rates.input
        + usage.cached * rates.cached_input
        + (usage.cache_write - hour) * rates.cache_write
        + hour * rates.cache_write_1h
        + usage.audio_input * rates.audio_input
    )


def _output_raw(rates: Rates, usage: TokenUsage) -> int:
    plain = max(0, usage.output - usage.reasoning - usage.audio_output - usage.image_output)
    return (
        plain * rates.output
        + usage.reasoning * rates.reasoning
        + usage.audio_output * rates.audio_output
        + usage.image_output * rates.image_output
    )


def _worst(price: CompiledPrice, prompt_tokens: int, audio: bool, cache_1h: bool) -> tuple[int, int]:
    """The dearest rate of a prompt token and of an output token, in any tier that the prompt may turn out to reach."""
    reach = -(-prompt_tokens * REACH_PERCENT // 100) + REACH_TOKENS
    reached: list[Rates] = [price, *(tier for tier in price.tiers if tier.above < reach)]
    prompt = max(max(rates.input, rates.cached_input, rates.cache_write) for rates in reached)
    output = max(max(rates.output, rates.reasoning, rates.image_output) for rates in reached)
    if cache_1h:
        prompt = max(prompt, *(rates.cache_write_1h for rates in reached))
    if audio:
        prompt = max(prompt, *(rates.audio_input for rates in reached))
        output = max(output, *(rates.audio_output for rates in reached))
    return prompt, output
