"""What a continuation costs its client: the text alone, at the rates of the client's own prompt."""

from __future__ import annotations

from config.price import CompiledPrice, TierRates
from metering.pricing import TokenUsage, cost
from proxy.resuming import continued_price

RATES = {
    "cached_input": 1_000_000, "cache_write": 1_000_000, "cache_write_1h": 1_000_000, "reasoning": 9_000_000,
    "audio_input": 1_000_000, "audio_output": 1_000_000, "image_output": 1_000_000,
}  # fmt: skip
PRICE = CompiledPrice(
    input=1_000_000, output=2_000_000, request=50, tiers=(TierRates(above=100, input=3_000_000, output=7_000_000,
    **RATES),), **RATES,
)  # fmt: skip


def test_a_continuation_costs_its_text_and_no_second_request() -> None:
    assert cost(continued_price(PRICE, 100), TokenUsage(0, 0, 0, 10, 0)) == 10 * 2
    assert cost(continued_price(PRICE, 100), TokenUsage(0, 0, 0, 0, 0)) == 0


def test_a_continuation_behind_a_long_prompt_has_the_rates_of_its_tier() -> None:
    assert cost(continued_price(PRICE, 101), TokenUsage(0, 0, 0, 10, 0)) == 10 * 7
