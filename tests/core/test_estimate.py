"""Estimates learn from reports; what is set aside covers what can be produced for it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.accounts import cost
from router.core.estimate import (
    MARGIN_TOKENS,
    MARGIN_TOKENS_MAX,
    UNSAID_OUTPUT_TOKENS,
    Estimates,
    Terms,
    terms,
)
from router.types import Needs, Price

# Ten dollars for a million tokens: 10,000 nano-dollars a token.
PRICE = Price.per_mtok(10, 10)
A_TOKEN = 10_000


def text(chars: int) -> Needs:
    return Needs(prompt_chars=chars)


def test_a_prompt_nobody_reported_is_set_aside_twice_as_dense_as_usual() -> None:
    known = Estimates()
    assert known.prompt_tokens(text(400)) == 108
    assert known.prompt_tokens(Needs(images=2)) == 3_008
    assert known.prompt_tokens_max(Needs(prompt_chars=300, schema_chars=100)) == 232
    assert known.prompt_tokens_max(Needs(images=2)) == 3_032


def test_reported_prompts_calibrate_the_next() -> None:
    known = Estimates()
    known.learn_prompt(Needs(prompt_chars=800, schema_chars=200), 508)
    assert known.prompt_tokens(text(1_000)) == 508
    assert known.prompt_tokens_max(text(1_000)) == 625 + 32
    known.learn_prompt(text(1_000), 1_008)
    assert known.prompt_tokens(text(1_000)) == 608


def test_short_prompts_tell_of_the_template() -> None:
    known = Estimates()
    for _ in range(40):
        known.learn_prompt(text(40), 110)
    assert known.prompt_tokens(text(40)) == 110
    assert known.prompt_tokens_max(text(40)) == 20 + 125
    known.learn_prompt(text(400), 300)
    assert known.prompt_tokens(text(400)) == 300


def test_what_says_nothing_of_text_is_not_learnt_from() -> None:
    known = Estimates()
    known.learn_prompt(Needs(prompt_chars=500, images=1), 5_000)
    known.learn_prompt(text(500), 0)
    known.learn_prompt(text(500), 8)
    assert known == Estimates()


def test_before_any_report_a_chunk_is_a_token_unless_it_holds_more() -> None:
    known = Estimates()
    assert known.output_tokens(400, 10) == 100
    assert known.output_tokens(700, 100) == 100
    assert known.output_tokens(0, 0) == 0
    assert known.output_tokens(1, 0) == 1
    assert known.output_tokens(400, 0) == 100


@pytest.mark.parametrize(
    ("chars", "chunks", "tokens"),
    [(9, 1, 1), (21, 1, 7), (3, 1, 1)],
    ids=["a token each", "joined tokens", "short tokens"],
)
def test_reports_make_the_estimate_exact_for_a_steady_rung(
    chars: int, chunks: int, tokens: int
) -> None:
    known = Estimates()
    for size in (50, 80, 20, 60):
        known.learn_output(chars * size, chunks * size, tokens * size, 1.0)
    assert known.output_tokens(chars * 33, chunks * 33) == tokens * 33


def test_the_measure_that_was_nearer_to_the_reports_is_used() -> None:
    by_chunks, by_chars = Estimates(), Estimates()
    for size, length in ((40, 2), (40, 9), (50, 3), (60, 12)):
        # Words of any length, a token a chunk; and the same in chunks of any size.
        by_chunks.learn_output(size * length, size, size, 1.0)
        by_chars.learn_output(size * 4, size // length, size, 1.0)
    assert by_chunks.output_tokens(1_000, 100) == 100
    assert by_chars.output_tokens(400, 3) == 100


def test_whole_answers_calibrate_by_their_length() -> None:
    known = Estimates()
    known.learn_output(500, 0, 100, 2.0)
    known.learn_output(500, 0, 100, 0.0)
    assert known.output_tokens(1_000, 0) == 200
    assert known.output_tokens(1_000, 10) == 10
    assert known.tokens_per_s == 50.0


def test_what_reports_nothing_or_shows_nothing_teaches_nothing() -> None:
    known = Estimates()
    known.learn_output(400, 10, 0, 1.0)
    assert known == Estimates()
    known.learn_output(0, 0, 100, 1.0)
    assert known == Estimates(tokens_per_s=60.0)


def test_answers_much_longer_in_the_bill_than_seen_hide_their_reasoning() -> None:
    known = Estimates()
    known.learn_output(400, 100, 264, 1.0)
    before = known.output_tokens(400, 100)
    assert before == 264
    known.learn_output(400, 100, 2_000, 1.0)
    assert known.hides_reasoning
    assert known.output_tokens(400, 100) == before


def test_a_dense_script_hides_nothing() -> None:
    known = Estimates()
    known.learn_output(1_000, 4, 1_000, 1.0)
    assert not known.hides_reasoning
    assert known.output_tokens(500, 2) == 500


def test_the_margin_is_a_second_of_the_rung_within_reason() -> None:
    known = Estimates()
    assert known.margin_tokens == MARGIN_TOKENS
    for _ in range(50):
        known.learn_output(4_000, 1_000, 1_000, 2.0)
    assert known.margin_tokens == 500
    for _ in range(50):
        known.learn_output(4_000, 1_000, 1_000, 0.001)
    assert known.margin_tokens == MARGIN_TOKENS_MAX


def agreed(
    *,
    asked: int | None = None,
    choices: int = 1,
    holds_all: bool = False,
    context_left: int | None = None,
    price: Price = PRICE,
    usd: int | None = None,
    tokens: int | None = None,
) -> Terms:
    """`usd`: in output tokens' worth, beside a prompt of 100."""
    return terms(
        asked=asked,
        choices=choices,
        holds_all=holds_all,
        prompt_tokens=100,
        context_left=context_left,
        price=price,
        nanousd=None if usd is None else (usd + 100) * A_TOKEN,
        tokens=tokens,
        margin_tokens=64,
    )


@pytest.mark.parametrize(
    ("found", "sent", "held"),
    [
        # What is affordable is neither cut nor said.
        (agreed(asked=50, usd=1_000), None, 50),
        (agreed(asked=500, usd=1_000), None, 64),
        (agreed(asked=500, usd=1_000, holds_all=True), None, 500),
        (agreed(usd=100_000), None, 64),
        # A whole answer is told where to stop, since all of it is set aside.
        (agreed(usd=100_000, holds_all=True), UNSAID_OUTPUT_TOKENS, UNSAID_OUTPUT_TOKENS),
        # The rest of a budget.
        (agreed(asked=500, usd=200), 200, 64),
        (agreed(asked=500, usd=200, holds_all=True), 200, 200),
        (agreed(usd=30), 30, 30),
        (agreed(usd=200, choices=2), 100, 128),
        (agreed(asked=500, tokens=180), 80, 64),
        (agreed(asked=500, usd=300, tokens=180), 80, 64),
        # Nothing left: one token, which will be refused with its reason.
        (agreed(asked=500, usd=0), 1, 1),
        (agreed(tokens=40), 1, 1),
        # A context that holds less than was asked for, whoever pays.
        (agreed(asked=500, context_left=300), 300, 64),
        (agreed(asked=500, context_left=300, usd=1_000), 300, 64),
        (agreed(asked=500, context_left=0), 1, 1),
        (agreed(context_left=300, usd=1_000), None, 64),
        (agreed(context_left=300, usd=1_000, holds_all=True), 300, 300),
        # Nobody limits it: nothing is said, and a guess is set aside for the doubt after a crash.
        (agreed(), None, 64),
        (agreed(holds_all=True, context_left=100_000), None, UNSAID_OUTPUT_TOKENS),
        (agreed(asked=9_000, holds_all=True), None, 9_000),
        # Free tokens cost nothing, and a limit of tokens counts them all the same.
        (agreed(asked=500, usd=0, price=Price(0, 0)), None, 64),
        (agreed(asked=500, usd=0, price=Price(0, 0), tokens=150), 50, 50),
    ],
)
def test_terms(found: Terms, sent: int | None, held: int) -> None:
    assert (found.output_tokens_max, found.held_tokens) == (sent, held)


@pytest.mark.parametrize(
    ("found", "is_short"),
    [
        (agreed(), False),
        (agreed(asked=500, usd=10_000), False),
        (agreed(asked=500, usd=200), True),
        (agreed(asked=500, tokens=150), True),
        # What nobody asked for is bounded all the same, and that is not for want of money.
        (agreed(holds_all=True, usd=1_000_000), False),
        (agreed(holds_all=True, usd=200), True),
        (agreed(asked=500, context_left=300, usd=10_000), False),
    ],
)
def test_an_answer_is_short_where_money_alone_bounds_it(found: Terms, *, is_short: bool) -> None:
    assert found.is_short is is_short


@given(
    st.none() | st.integers(1, 10_000),
    st.integers(1, 4),
    st.booleans(),
    st.none() | st.integers(1, 10_000),
    st.integers(104 * A_TOKEN, 10**9),
    st.none() | st.integers(104, 10_000),
)
def test_what_is_sent_is_affordable_and_what_is_held_covers_its_start(
    asked: int | None,
    choices: int,
    holds_all: bool,
    context_left: int | None,
    nanousd: int,
    tokens: int | None,
) -> None:
    found = terms(
        asked=asked,
        choices=choices,
        holds_all=holds_all,
        prompt_tokens=100,
        context_left=context_left,
        price=PRICE,
        nanousd=nanousd,
        tokens=tokens,
        margin_tokens=64,
    )
    most = found.output_tokens_max or asked
    assert cost(PRICE, 100, found.held_tokens) <= nanousd
    assert tokens is None or 100 + found.held_tokens <= tokens
    if most is not None:
        assert cost(PRICE, 100, most * choices) <= nanousd
        assert context_left is None or most <= context_left
        assert found.held_tokens == (most if holds_all else min(most, 64)) * choices
