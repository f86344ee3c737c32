"""Accounts: windows of UTC, and money to the last nano-dollar."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as some

from router.core import accounts
from router.core.accounts import Meter
from router.types import NANO_USD, Price, nanousd_of

NOW = datetime(2026, 2, 28, 23, 59, 59, 900_000, tzinfo=UTC)


def seconds(*parts: int) -> int:
    return int(datetime(*parts, tzinfo=UTC).timestamp())  # type: ignore[misc,arg-type]


@pytest.mark.parametrize(
    ("meter", "start", "end"),
    [
        (Meter.TOKENS_MINUTE, (2026, 2, 28, 23, 59), (2026, 3, 1)),
        (Meter.REQUESTS_MINUTE, (2026, 2, 28, 23, 59), (2026, 3, 1)),
        (Meter.USD_DAY, (2026, 2, 28), (2026, 3, 1)),
        (Meter.TOKENS_DAY, (2026, 2, 28), (2026, 3, 1)),
        (Meter.USD_MONTH, (2026, 2, 1), (2026, 3, 1)),
    ],
)
def test_a_window_opens_and_closes(
    meter: Meter, start: tuple[int, ...], end: tuple[int, ...]
) -> None:
    opened = accounts.window_start(meter, NOW.timestamp())
    assert opened == seconds(*start)
    assert accounts.window_end(meter, opened) == seconds(*end)


@pytest.mark.parametrize("meter", [Meter.USD_TOTAL, Meter.CONCURRENT])
def test_some_meters_have_no_windows(meter: Meter) -> None:
    assert accounts.window_start(meter, NOW.timestamp()) == 0
    assert accounts.window_end(meter, 0) is None


def test_december_ends_with_the_year() -> None:
    start = accounts.window_start(Meter.USD_MONTH, seconds(2026, 12, 31, 12))
    assert accounts.window_end(Meter.USD_MONTH, start) == seconds(2027, 1, 1)


@given(
    meter=some.sampled_from(Meter),
    now=some.datetimes(datetime(2000, 1, 1), datetime(2200, 1, 1), timezones=some.just(UTC)),
)
def test_every_moment_lies_in_its_window_and_windows_touch(meter: Meter, now: datetime) -> None:
    start = accounts.window_start(meter, now.timestamp())
    end = accounts.window_end(meter, start)
    if end is None:
        return
    assert start <= now.timestamp() < end
    assert accounts.window_start(meter, start) == start
    assert accounts.window_start(meter, end) == end
    assert accounts.window_start(meter, end - 1) == start


def test_the_day_of_a_moment() -> None:
    assert accounts.day_of(NOW.timestamp()) == seconds(2026, 2, 28)
    assert accounts.day_of((NOW + timedelta(seconds=1)).timestamp()) == seconds(2026, 3, 1)


prices = some.builds(Price, some.integers(0, 10**9), some.integers(0, 10**9))
counts = some.integers(0, 10**8)


@given(price=prices, input_tokens=counts, output_tokens=counts)
def test_a_cost_is_rounded_up_and_by_less_than_one(
    price: Price, input_tokens: int, output_tokens: int
) -> None:
    exact = Fraction(
        price.input_picousd * input_tokens + price.output_picousd * output_tokens, 1_000
    )
    cost = accounts.cost(price, input_tokens, output_tokens)
    assert exact <= cost < exact + 1
    assert accounts.cost(price, input_tokens, output_tokens) == cost


@given(price=prices, nanousd=some.integers(0, 10**15), input_tokens=counts)
def test_what_is_affordable_costs_no_more_and_one_token_more_does(
    price: Price, nanousd: int, input_tokens: int
) -> None:
    tokens = accounts.affordable(price, nanousd, input_tokens)
    if tokens is None:
        assert price.output_picousd == 0
    elif tokens:
        assert accounts.cost(price, input_tokens, tokens) <= nanousd
        assert accounts.cost(price, input_tokens, tokens + 1) > nanousd
    else:
        assert accounts.cost(price, input_tokens, 1) > nanousd


@given(nanousd=some.integers(-(10**14), 10**14))
def test_what_is_shown_is_exact_and_read_back(nanousd: int) -> None:
    text = accounts.shown_usd(nanousd)
    assert Fraction(text) * NANO_USD == nanousd
    assert "e" not in text
    assert nanousd_of(accounts.to_usd(nanousd)) == nanousd


@pytest.mark.parametrize(
    ("nanousd", "text"),
    [
        (0, "0"),
        (1, "0.000000001"),
        (12_300_000, "0.0123"),
        (5_000_000_000, "5"),
        (-15, "-0.000000015"),
    ],
)
def test_what_is_shown_has_no_zeros_to_spare(nanousd: int, text: str) -> None:
    assert accounts.shown_usd(nanousd) == text


def test_what_a_person_wrote_is_what_they_meant() -> None:
    assert nanousd_of(0.1) == 100_000_000
    assert nanousd_of(0.1 + 0.2) == 300_000_000
    assert accounts.to_usd(100_000_000) == 0.1
