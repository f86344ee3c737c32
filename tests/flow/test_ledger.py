"""Admission and settlement: every hold once, whatever the order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.errors import RateLimited, TooLarge
from router.flow.ledger import Hold, Ledger
from router.types import Key, KeyLimits, Usage

KEY = Key("k", limits=KeyLimits(concurrent=2, max_input_bytes=10))


def test_a_body_over_the_keys_limit_is_refused_and_holds_nothing() -> None:
    ledger = Ledger()
    with pytest.raises(TooLarge):
        ledger.admit(KEY, 11)
    ledger.admit(KEY, 10)
    assert ledger.totals["k"].requests == 1


def test_a_hold_is_settled_once() -> None:
    ledger = Ledger()
    hold = ledger.admit(KEY, 1)
    ledger.settle(hold, Usage(3, 4))
    with pytest.raises(AssertionError):
        ledger.settle(hold, Usage(3, 4))
    totals = ledger.totals["k"]
    assert (totals.in_flight, totals.input_tokens, totals.output_tokens) == (0, 3, 4)


@given(st.lists(st.booleans(), max_size=60))
def test_no_more_in_flight_than_allowed_and_none_left_over(steps: list[bool]) -> None:
    """True admits, False settles the oldest: the count is exact and never above the limit."""
    ledger = Ledger()
    held: list[Hold] = []
    for admits in steps:
        if admits:
            try:
                held.append(ledger.admit(KEY, 1))
            except RateLimited as error:
                assert len(held) == 2
                assert error.retry_after_s
        elif held:
            ledger.settle(held.pop(0), None)
        assert len(held) <= 2
        assert not ledger.totals or ledger.totals["k"].in_flight == len(held)
