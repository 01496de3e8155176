"""Costs are integers, rounded up once; holds cover them; budgets invert exactly."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.price import CompiledPrice, Rates, TierRates
from metering.pricing import (
    TOKENS_MAX,
    TokenUsage,
    cost,
    hold_rates,
    rates_for,
    sane,
)

RATE = st.integers(0, 10**9)
TOKENS = st.integers(0, 2_000_000)
NAMES = Rates.__struct_fields__


def flat(rate_in: int, rate_out: int, cached: int | None = None) -> CompiledPrice:
    return CompiledPrice(
        input=rate_in,
        cached_input=rate_in if cached is None else cached,
        cache_write=rate_in,
        cache_write_1h=rate_in,
        output=rate_out,
        reasoning=rate_out,
        audio_input=rate_in,
        audio_output=rate_out,
        image_output=rate_out,
    )


def hold_cost(price: CompiledPrice, prompt: int, output: int, *, audio: bool = False) -> int:
    """What a hold beside this prompt takes."""
    return hold_rates([price], prompt, audio=audio).hold_cost(prompt, output)


def output_tokens_covered(price: CompiledPrice, budget: int, prompt: int, *, audio: bool = False) -> int:
    """What of the output a hold of `budget` covers beside this prompt."""
    return hold_rates([price], prompt, audio=audio).output_covered(budget, prompt)


@st.composite
def prices(draw: st.DrawFn) -> CompiledPrice:
    base = {name: draw(RATE) for name in NAMES}
    tiers, above = [], 0
    for _ in range(draw(st.integers(0, 2))):
        above += draw(st.integers(1, 500_000))
        base_above = {name: base[name] * 2 for name in NAMES}
        tiers.append(TierRates(above=above, **base_above))
    return CompiledPrice(**base, tiers=tuple(tiers), request=draw(st.sampled_from((0, 0, 1, 5000))))


@st.composite
def usages(draw: st.DrawFn) -> TokenUsage:
    prompt, output = draw(TOKENS), draw(TOKENS)
    cached = draw(st.integers(0, prompt))
    reasoning = draw(st.integers(0, output))
    return TokenUsage(prompt, cached, draw(st.integers(0, prompt - cached)), output, reasoning)


def test_the_worked_example() -> None:
    price = flat(150_000, 600_000, cached=75_000)  # $0.15, $0.60, $0.075 a million
    usage = TokenUsage(prompt=1000, cached=200, cache_write=0, output=50, reasoning=10)
    assert cost(price, usage) == 120 + 15 + 30


def test_one_token_costs_at_least_one_micro_and_a_zero_price_nothing() -> None:
    assert cost(flat(0, 1), TokenUsage(9, 0, 0, 1, 0)) == 1
    assert cost(flat(0, 0), TokenUsage(9, 0, 0, 1, 0)) == 0


def test_parts_are_taken_out_of_their_parents_and_never_below_zero() -> None:
    price = CompiledPrice(
        input=1_000_000,
        cached_input=10_000_000,
        cache_write=100_000_000,
        cache_write_1h=10_000_000_000,
        output=1_000_000,
        reasoning=10_000_000,
        audio_input=1_000_000_000,
        audio_output=100_000_000,
        image_output=1_000_000_000,
    )
    assert cost(price, TokenUsage(10, 2, 3, 0, 0, audio_input=1)) == 4 + 20 + 300 + 1000
    assert cost(price, TokenUsage(0, 0, 0, 10, 2, audio_output=3)) == 5 + 20 + 300
    assert cost(price, TokenUsage(1, 1, 1, 0, 0, audio_input=1)) == 10 + 100 + 1000
    assert cost(price, TokenUsage(10, 2, 3, 0, 0, cache_write_1h=1)) == 5 + 20 + 200 + 10_000
    assert cost(price, TokenUsage(10, 10, 0, 0, 0, cache_write_1h=1)) == 100  # a part of nothing
    assert cost(price, TokenUsage(0, 0, 0, 10, 2, audio_output=3, image_output=4)) == 1 + 20 + 300 + 4000
    assert cost(price, TokenUsage(0, 0, 0, 10, 0, image_output=4)) == 6 + 4000


def test_a_long_prompt_prices_every_token_at_the_tier() -> None:
    tier = TierRates(above=1000, **dict.fromkeys(NAMES, 2_000_000))
    price = flat(1_000_000, 1_000_000)
    price = CompiledPrice(**{name: getattr(price, name) for name in NAMES}, tiers=(tier,))
    assert cost(price, TokenUsage(1000, 0, 0, 5, 0)) == 1005
    assert cost(price, TokenUsage(1001, 0, 0, 5, 0)) == 2012
    assert rates_for(price, 1000) is price
    assert isinstance(rates_for(price, 1001), Rates)


@given(price=prices(), usage=usages())
def test_rounding_happens_once_and_up(price: CompiledPrice, usage: TokenUsage) -> None:
    rates = rates_for(price, usage.prompt)
    exact = (
        Fraction((usage.prompt - usage.cached - usage.cache_write) * rates.input, 10**6)
        + Fraction(usage.cached * rates.cached_input + usage.cache_write * rates.cache_write, 10**6)
        + Fraction((usage.output - usage.reasoning) * rates.output + usage.reasoning * rates.reasoning, 10**6)
    )
    assert exact <= cost(price, usage) - price.request < exact + 1


@given(price=prices(), usage=usages(), more=TOKENS, also=TOKENS)
def test_more_tokens_never_cost_less(price: CompiledPrice, usage: TokenUsage, more: int, also: int) -> None:
    grown = TokenUsage(usage.prompt + also, usage.cached, usage.cache_write, usage.output + more, usage.reasoning)
    assert cost(price, grown) >= cost(price, usage)


@given(price=prices(), usage=usages())
def test_a_hold_covers_whatever_the_provider_calls_the_tokens(price: CompiledPrice, usage: TokenUsage) -> None:
    assert hold_cost(price, usage.prompt, usage.output) >= cost(price, usage)


@given(price=prices(), prompt=TOKENS, budget=st.integers(0, 10**12))
def test_covered_tokens_are_the_exact_inverse_of_the_hold(price: CompiledPrice, prompt: int, budget: int) -> None:
    covered = output_tokens_covered(price, budget, prompt)
    if covered < 0:
        assert hold_cost(price, prompt, 0) > budget
        return
    assert hold_cost(price, prompt, covered) <= budget
    assert covered == TOKENS_MAX or hold_cost(price, prompt, covered + 1) > budget


def test_a_free_output_is_covered_without_end() -> None:
    assert output_tokens_covered(flat(1_000_000, 0), 10, 10) == TOKENS_MAX
    assert output_tokens_covered(flat(1_000_000, 0), 9, 10) == -1


@pytest.mark.parametrize(
    ("usage", "reason"),
    [
        (TokenUsage(-1, 0, 0, 1, 0), "prompt is negative"),
        (TokenUsage(1, 0, 0, 2**31 + 1, 0), "output is above 2147483648"),
        (TokenUsage(1, 2, 0, 1, 0), "cached and cache_write exceed prompt"),
        (TokenUsage(3, 2, 2, 1, 0), "cached and cache_write exceed prompt"),
        (TokenUsage(3, 0, 0, 1, 2), "reasoning exceeds output"),
        (TokenUsage(3, 0, 0, 1, 0, audio_input=4), "cached, cache_write and audio_input exceed prompt"),
        (TokenUsage(3, 0, 0, 1, 0, audio_output=2), "reasoning and audio_output exceed output"),
        (TokenUsage(True, 0, 0, 1, 0), "prompt is not an integer"),
        (TokenUsage(1.5, 0, 0, 1, 0), "prompt is not an integer"),  # type: ignore[arg-type]
        (TokenUsage(0, 0, 0, 0, 0), None),
        (TokenUsage(5, 2, 2, 1, 0, audio_input=2), "cached, cache_write and audio_input exceed prompt"),
        (TokenUsage(5, 0, 0, 4, 3, audio_output=2), "reasoning and audio_output exceed output"),
        (TokenUsage(2**31, 2**30, 2**30 - 5, 9, 4, 5, 5), None),
        (TokenUsage(5, 0, 2, 1, 0, cache_write_1h=3), "cache_write_1h exceeds cache_write"),
        (TokenUsage(5, 0, 2, 1, 0, cache_write_1h=-1), "cache_write_1h is negative"),
        (TokenUsage(5, 0, 0, 4, 2, 0, 1, image_output=2), "reasoning, audio_output and image_output exceed output"),
        (TokenUsage(5, 0, 2, 5, 2, 0, 1, cache_write_1h=2, image_output=2), None),
    ],
)
def test_absurd_reports_are_refused_with_a_reason(usage: TokenUsage, reason: str | None) -> None:
    assert sane(usage) == reason


@given(price=prices(), usage=usages(), percent=st.integers(0, 2), more=st.integers(0, 64))
def test_a_hold_prices_at_every_tier_that_the_prompt_may_reach(
    price: CompiledPrice, usage: TokenUsage, percent: int, more: int
) -> None:
    reached = rates_for(price, usage.prompt + usage.prompt * percent // 100 + more)
    tier = CompiledPrice(**{name: getattr(reached, name) for name in NAMES}, request=price.request)
    assert hold_cost(price, usage.prompt, usage.output) >= hold_cost(tier, usage.prompt, usage.output)


def test_a_hold_takes_the_next_tier_only_within_the_margin_and_the_dearest_of_those_below() -> None:
    def priced(rate: int) -> CompiledPrice:
        tier = TierRates(above=1084, **dict.fromkeys(NAMES, rate))
        return CompiledPrice(**dict.fromkeys(NAMES, 2_000_000), tiers=(tier,))

    assert hold_cost(priced(3_000_000), 1000, 0) == 2000  # 1000 x 1.02 + 64 is 1084, not above it
    assert hold_cost(priced(3_000_000), 1001, 0) == 3003
    assert hold_cost(priced(1_000_000), 2000, 0) == 4000


@given(price=prices(), prompt=TOKENS, output=TOKENS, budget=st.integers(0, 10**12))
def test_a_hold_with_audio_covers_audio_and_inverts_exactly(
    price: CompiledPrice, prompt: int, output: int, budget: int
) -> None:
    spoken = TokenUsage(prompt, 0, 0, output, 0, audio_input=prompt, audio_output=output)
    assert hold_cost(price, prompt, output, audio=True) >= cost(price, spoken)
    covered = output_tokens_covered(price, budget, prompt, audio=True)
    assert covered < 0 or hold_cost(price, prompt, covered, audio=True) <= budget
    assert covered == TOKENS_MAX or hold_cost(price, prompt, covered + 1, audio=True) > budget


@given(price=prices(), prompt=TOKENS, output=TOKENS)
def test_a_hold_covers_images_always_and_hours_in_the_cache_where_they_are_asked_for(
    price: CompiledPrice, prompt: int, output: int
) -> None:
    drawn = TokenUsage(prompt, 0, 0, output, 0, image_output=output)
    assert hold_cost(price, prompt, output) >= cost(price, drawn)
    written = TokenUsage(prompt, 0, prompt, output, 0, cache_write_1h=prompt)
    assert hold_rates([price], prompt, cache_1h=True).hold_cost(prompt, output) >= cost(price, written)


@given(several=st.lists(prices(), min_size=1, max_size=3), prompt=TOKENS, output=TOKENS, budget=st.integers(0, 10**12))
def test_a_hold_covers_the_dearest_of_several_prices(
    several: list[CompiledPrice], prompt: int, output: int, budget: int
) -> None:
    rates = hold_rates(several, prompt)
    alone = [hold_rates([price], prompt) for price in several]
    assert rates.hold_cost(prompt, output) == max(one.hold_cost(prompt, output) for one in alone)
    assert rates.output_cost(output) == max(one.output_cost(output) for one in alone)
    assert rates.output_covered(budget, prompt) == min(one.output_covered(budget, prompt) for one in alone)


@given(price=prices(), output=TOKENS)
def test_a_slice_covers_its_output_and_nothing_of_the_prompt(price: CompiledPrice, output: int) -> None:
    rates = hold_rates([price], 0)
    assert rates.output_cost(output) == rates.hold_cost(0, output) - price.request
