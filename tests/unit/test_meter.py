"""The meter: exact counts for each text, provider usage first, and an exact answer to "does it still fit"."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config.price import CompiledPrice, Rates
from metering.meter import COUNTERS_MAX, Channel, Meter
from metering.pricing import TokenUsage, at_least, cost
from metering.ranks import encoding
from metering.token_counter import StreamCounter, count_text, utf8_bytes
from tests.unit.test_token_counter import NASTY, CountingEncoder, cut

PRICE = CompiledPrice(
    input=1_000_000,
    cached_input=500_000,
    cache_write=1_000_000,
    cache_write_1h=2_000_000,
    output=4_000_000,
    reasoning=6_000_000,
    audio_input=1_000_000,
    audio_output=4_000_000,
    image_output=40_000_000,
)
CHEAP_THOUGHTS = msgspec.structs.replace(PRICE, reasoning=1_000_000)
O200K = encoding("o200k_base")


def n(text: str) -> int:
    return count_text(O200K, text)


def test_every_choice_and_channel_is_its_own_text() -> None:
    meter = Meter(PRICE, 7, O200K)
    meter.add(0, Channel.CONTENT, "inter")
    meter.add(1, Channel.CONTENT, "national")
    meter.add(0, Channel.CONTENT, "national")
    meter.add(0, Channel.REFUSAL, "no")
    meter.add(0, Channel.TOOL_NAME, "get_weather", tool=1)
    meter.add(0, Channel.TOOL_ARGUMENTS, '{"city":', tool=0)
    meter.add(0, Channel.TOOL_ARGUMENTS, '{"a":', tool=1)
    meter.add(0, Channel.TOOL_ARGUMENTS, '"Rome"}', tool=0)
    texts = ("international", "national", "no", "get_weather", '{"city":"Rome"}', '{"a":')
    assert meter.counted_output() == sum(map(n, texts))


def test_reasoning_is_part_of_output_at_its_own_price() -> None:
    meter = Meter(PRICE, 10, O200K)
    meter.add(0, Channel.REASONING, "let me think about it")
    meter.add(0, Channel.CONTENT, "yes")
    thought = n("let me think about it")
    assert meter.counted() == TokenUsage(10, 0, 0, output=thought + 1, reasoning=thought)
    assert meter.cost_now() == 10 + 6 * thought + 4


def test_an_empty_delta_counts_nothing() -> None:
    meter = Meter(PRICE, 0, O200K)
    meter.add(0, Channel.CONTENT, "")
    assert (meter.counted_output(), meter.cost_now(), meter.cost_upper()) == (0, 0, 0)


def test_provider_usage_wins_and_the_last_one_counts() -> None:
    meter = Meter(PRICE, 10, O200K)
    meter.add(0, Channel.CONTENT, "hello there")
    assert meter.final() == (TokenUsage(10, 0, 0, 2, 0), "counted")
    assert meter.report(TokenUsage(12, 3, 0, 1, 0)) is None
    assert meter.report(TokenUsage(12, 3, 0, 40, 20)) is None
    assert meter.final() == (TokenUsage(12, 3, 0, 40, 20), "provider")
    assert meter.final_cost() == cost(PRICE, TokenUsage(12, 3, 0, 40, 20))
    assert meter.counted_output() == 2


def test_a_reported_zero_is_zero() -> None:
    meter = Meter(PRICE, 10, O200K)
    meter.add(0, Channel.CONTENT, "hello")
    meter.report(TokenUsage(0, 0, 0, 0, 0))
    assert (meter.final()[1], meter.final_cost()) == ("provider", 0)


def test_an_absurd_report_is_refused_and_our_count_stands() -> None:
    meter = Meter(PRICE, 10, O200K, prompt_kind="estimated")
    meter.add(0, Channel.CONTENT, "hello")
    assert meter.report(TokenUsage(10, 11, 0, 1, 0)) == meter.refused == "cached and cache_write exceed prompt"
    assert meter.final() == (TokenUsage(10, 0, 0, 1, 0), "estimated")
    assert meter.reported is None


def test_a_checkpoint_never_falls_though_a_count_may() -> None:
    meter = Meter(PRICE, 0, O200K)
    meter.add(0, Channel.CONTENT, "Divulga")
    first = meter.checkpoint()
    meter.add(0, Channel.CONTENT, "ção")
    assert meter.cost_now() < first
    assert meter.checkpoint() == first


@settings(max_examples=80, deadline=None)
@given(
    pieces=st.lists(st.tuples(st.integers(0, 1), st.sampled_from(list(Channel)), st.sampled_from(NASTY)), max_size=120),
    limits=st.lists(st.integers(0, 900), min_size=1, max_size=3).map(sorted),
)
def test_fits_is_exact_after_every_delta(pieces: list[tuple[int, Channel, str]], limits: list[int]) -> None:
    meter, texts = Meter(PRICE, 5, O200K), dict[tuple[int, Channel], str]()
    for number, (choice, channel, text) in enumerate(pieces):
        meter.add(choice, channel, text)
        texts[choice, channel] = texts.get((choice, channel), "") + text
        counts = {key: n(value) for key, value in texts.items()}
        thought = sum(count for (_, one), count in counts.items() if one == Channel.REASONING)
        exact = cost(PRICE, TokenUsage(5, 0, 0, sum(counts.values()), thought))
        limit = limits[number * len(limits) // len(pieces)]
        assert meter.fits(limit) == (exact <= limit)
        assert meter.cost_upper() >= exact


def test_a_long_stream_is_answered_without_counting_its_tail_each_time() -> None:
    encoder = CountingEncoder()
    meter = Meter(PRICE, 0, encoder)
    text = "The quick brown fox jumps over the lazy dog; 1234 times.\n" * 400
    for delta in cut(text, [4]):
        meter.add(0, Channel.CONTENT, delta)
        assert meter.fits(10**9)
    assert encoder.characters <= 1.01 * len(text)


@pytest.mark.parametrize("run", ["a", "=", "你"])
def test_the_end_of_a_hold_is_found_in_a_run_without_boundaries_for_little_work(run: str) -> None:
    encoder = CountingEncoder()
    meter, tokens, chunks = Meter(PRICE, 0, encoder), 200, 0
    while True:
        meter.add(0, Channel.CONTENT, run * 4)
        if not meter.fits(4 * tokens):
            break
        chunks += 1
    assert n(run * 4 * chunks) <= tokens < n(run * 4 * (chunks + 1))
    bytes_a_token = len(run.encode()) * 4 * chunks / tokens
    assert encoder.calls <= bytes_a_token * (math.log(tokens) + 3)


def test_the_end_of_a_small_hold_is_found_in_words_with_few_looks() -> None:
    encoder = CountingEncoder()
    meter, chunks = Meter(PRICE, 0, encoder), 0
    while True:
        meter.add(0, Channel.CONTENT, " word")
        if not meter.fits(4 * 64):
            break
        chunks += 1
    assert chunks == 64
    assert encoder.calls <= 32
    assert encoder.characters <= 3 * len(" word") * chunks


@settings(max_examples=80, deadline=None)
@given(pieces=st.lists(st.sampled_from(NASTY), max_size=60), look=st.integers(1, 7))
def test_what_a_text_can_become_holds_for_everything_that_follows(pieces: list[str], look: int) -> None:
    counter, text, bounds = StreamCounter(O200K), "", list[tuple[int, int]]()
    for number, piece in enumerate(pieces):
        counter.feed(piece)
        text += piece
        exact, size = n(text), utf8_bytes(text)
        assert all(exact <= most + size - before for most, before in bounds)
        if number % look == 0:
            assert counter.total() == exact
        bounds.append((counter.most(), size))


def test_a_word_whose_tokens_come_apart_again_is_counted_again() -> None:
    meter = Meter(PRICE, 0, O200K)
    meter.add(0, Channel.CONTENT, " Divulgação")
    assert n(" Divulgação") == 1
    assert meter.fits(4 * 3)
    meter.add(0, Channel.CONTENT, "r")
    assert n(" Divulgaçãor") > 3
    assert not meter.fits(4 * 3)


def test_the_room_of_a_hold_is_reckoned_at_the_dearest_price() -> None:
    byte_by_byte = "\U000e0041" * 18  # a token for each of its 72 bytes
    assert n(byte_by_byte) == 72
    meter = Meter(PRICE, 0, O200K)
    assert meter.fits(4 * 100)
    meter.add(0, Channel.REASONING, byte_by_byte)
    assert not meter.fits(4 * 100)


def test_extending_the_hold_lets_the_stream_go_on() -> None:
    meter = Meter(PRICE, 0, O200K)
    meter.add(0, Channel.CONTENT, "one two three")
    assert not meter.fits(11)
    assert meter.fits(12)
    assert not meter.fits(11)


def test_a_chunk_that_does_not_fit_can_be_taken_back() -> None:
    meter = Meter(PRICE, 0, O200K)
    for word in ("one", " two", " three"):
        meter.add(0, Channel.CONTENT, word)
        assert meter.fits(12)
    meter.add(0, Channel.CONTENT, " four")
    meter.add(1, Channel.CONTENT, "five")
    assert not meter.fits(12)
    assert not meter.fits(12)
    meter.take_back()
    assert meter.cost_now() == 12
    assert meter.fits(12)


@settings(max_examples=60, deadline=None)
@given(pieces=st.lists(st.sampled_from(NASTY), min_size=1, max_size=150), limit=st.integers(0, 600))
def test_what_was_forwarded_is_what_is_charged_after_taking_back(pieces: list[str], limit: int) -> None:
    meter, forwarded = Meter(PRICE, 0, O200K), ""
    for piece in pieces:
        meter.add(0, Channel.CONTENT, piece)
        if not meter.fits(limit):
            meter.take_back()
            break
        forwarded += piece
    assert meter.counted_output() == n(forwarded)
    assert meter.final_cost() <= limit


def test_a_free_price_always_fits() -> None:
    free = msgspec.structs.replace(PRICE, **dict.fromkeys(Rates.__struct_fields__, 0))
    meter = Meter(free, 100, O200K)
    meter.add(0, Channel.CONTENT, "words " * 500)
    assert meter.fits(0)
    meter.add(0, Channel.CONTENT, "words " * 500)
    assert meter.fits(0)


def test_texts_beyond_the_bound_are_counted_as_one() -> None:
    meter = Meter(PRICE, 0, O200K)
    for choice in range(COUNTERS_MAX):
        meter.add(choice, Channel.CONTENT, "x")
    assert not meter.merged
    for tool in range(50):
        meter.add(0, Channel.TOOL_ARGUMENTS, " word", tool=tool)
        meter.add(0, Channel.REASONING, " idea", tool=tool)
    assert meter.merged
    assert meter.counted() == TokenUsage(0, 0, 0, output=COUNTERS_MAX + 100, reasoning=50)
    assert len(meter._counters) == COUNTERS_MAX + 2


def test_a_report_made_before_more_text_is_not_the_last_word() -> None:
    meter = Meter(PRICE, 5, encoding("o200k_base"))
    meter.report(TokenUsage(5, 0, 0, 0, 0))
    meter.add(0, Channel.CONTENT, "four more tokens here")
    usage, source = meter.final()
    assert (usage.output, source) == (4, "counted")


# -- What a provider has reported of an answer that is not over -------------------------------------------------------


def test_who_leaves_pays_the_prompt_that_the_provider_reported_by_its_classes() -> None:
    meter = Meter(PRICE, 10, O200K, prompt_kind="estimated")
    meter.report(TokenUsage(3000, 1000, 500, 1, 0, audio_input=7, cache_write_1h=200), partial=True)
    assert meter.cost_now() == cost(PRICE, TokenUsage(3000, 1000, 500, 1, 0, audio_input=7, cache_write_1h=200))
    meter.add(0, Channel.CONTENT, "four more tokens here")
    assert meter.counted() == TokenUsage(3000, 1000, 500, 4, 0, audio_input=7, cache_write_1h=200)
    assert (meter.final(), meter.counted_output()) == ((meter.counted(), "estimated"), 4)


def test_hidden_thinking_is_paid_beside_the_text_that_came_after_its_report() -> None:
    meter = Meter(PRICE, 10, O200K)
    meter.add(0, Channel.CONTENT, "hello")
    meter.report(TokenUsage(12, 0, 0, 1001, 1000))
    assert meter.counted() == TokenUsage(12, 0, 0, 1001, 1000)
    meter.add(0, Channel.CONTENT, " there" * 9)
    assert meter.counted() == TokenUsage(12, 0, 0, 1010, 1000)


def test_thinking_that_is_in_a_reported_output_already_is_not_paid_twice() -> None:
    meter = Meter(PRICE, 10, O200K)
    meter.add(0, Channel.REASONING, " think" * 30)
    meter.add(0, Channel.CONTENT, " say" * 10)
    meter.report(TokenUsage(10, 0, 0, 50, 0))
    meter.add(0, Channel.CONTENT, " more")
    assert meter.counted() == TokenUsage(10, 0, 0, 50, 30)


def test_an_image_has_no_text_and_is_paid_beside_it() -> None:
    meter = Meter(PRICE, 10, O200K)
    meter.report(TokenUsage(10, 0, 0, 1290, 0, image_output=1290))
    meter.add(0, Channel.CONTENT, " say" * 10)
    assert meter.counted() == TokenUsage(10, 0, 0, 1300, 0, image_output=1290)


def test_a_partial_report_is_never_the_last_word_and_a_prompt_of_zero_says_nothing() -> None:
    meter = Meter(PRICE, 10, O200K)
    meter.add(0, Channel.CONTENT, "hello")
    meter.report(TokenUsage(12, 0, 0, 0, 0), partial=True)
    assert meter.reported is None
    assert meter.final() == (TokenUsage(12, 0, 0, 1, 0), "counted")
    meter.report(TokenUsage(0, 0, 0, 0, 0), partial=True)
    assert meter.counted() == TokenUsage(10, 0, 0, 1, 0)


def test_a_refused_report_is_no_least_either() -> None:
    meter = Meter(PRICE, 10, O200K)
    meter.report(TokenUsage(9000, 9001, 0, 1, 0), partial=True)
    assert meter.counted() == TokenUsage(10, 0, 0, 0, 0)


def test_a_checkpoint_stays_when_a_report_makes_the_prompt_cheaper_and_what_is_due_falls() -> None:
    meter = Meter(PRICE, 1000, O200K)
    assert meter.checkpoint() == 1000
    meter.report(TokenUsage(1000, 900, 0, 0, 0), partial=True)
    assert (meter.cost_now(), meter.checkpoint()) == (550, 1000)


def test_what_is_reported_counts_against_the_hold_at_the_next_text() -> None:
    meter = Meter(PRICE, 10, O200K)
    meter.add(0, Channel.CONTENT, "one")
    assert meter.fits(100)
    meter.report(TokenUsage(10, 0, 0, 21, 20))
    meter.add(0, Channel.CONTENT, " two")
    assert not meter.fits(100)
    meter.take_back()
    assert meter.counted_output() == 1
    assert meter.cost_now() == 10 + 20 * 6 + 4
    assert meter.fits(meter.cost_now())


REPORTS = st.builds(
    lambda prompt, cached, hidden, spoken, drawn: TokenUsage(
        prompt, min(cached, prompt), 0, spoken + hidden + drawn, hidden, image_output=drawn
    ),
    st.integers(0, 30), st.integers(0, 30), st.integers(0, 20), st.integers(0, 60), st.integers(0, 2),
)  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(
    price=st.sampled_from((PRICE, CHEAP_THOUGHTS)),
    pieces=st.lists(
        st.one_of(REPORTS, st.tuples(st.integers(0, 1), st.sampled_from(list(Channel)), st.sampled_from(NASTY))),
        max_size=80,
    ),
    limit=st.integers(0, 900),
)
def test_fits_is_exact_above_reports_too(
    price: CompiledPrice, pieces: list[TokenUsage | tuple[int, Channel, str]], limit: int
) -> None:
    meter, texts = Meter(price, 5, O200K), dict[tuple[int, Channel], str]()
    seen: TokenUsage | None = None
    for piece in pieces:
        if isinstance(piece, TokenUsage):
            meter.report(piece)
            seen = piece
            continue
        choice, channel, text = piece
        meter.add(choice, channel, text)
        texts[choice, channel] = texts.get((choice, channel), "") + text
        counts = {key: n(value) for key, value in texts.items()}
        thought = sum(count for (_, one), count in counts.items() if one == Channel.REASONING)
        own = TokenUsage(5, 0, 0, sum(counts.values()), thought)
        exact = cost(price, own if seen is None else at_least(own, seen))
        assert meter.fits(limit) == (exact <= limit)
        assert meter.cost_upper() >= exact


def test_usage_in_every_chunk_is_answered_without_counting_the_tail_each_time() -> None:
    encoder = CountingEncoder()
    meter, text = Meter(PRICE, 0, encoder), "The quick brown fox jumps over the lazy dog; 1234 times.\n" * 400
    for number, delta in enumerate(cut(text, [4])):
        meter.add(0, Channel.CONTENT, delta)
        assert meter.fits(10**9)
        meter.report(TokenUsage(12, 0, 0, number + 1, 0))
    assert encoder.characters <= 1.01 * len(text)
