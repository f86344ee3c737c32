"""The limit: it finds the knee, keeps to its bounds, and learns nothing from a quiet rung."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.concurrency import AdaptiveLimit, ConcurrencySettings, FixedLimit, Outcome

SETTINGS = ConcurrencySettings()


def drive(
    limit: AdaptiveLimit, serves_per_s: Callable[[int], float], calls: int, now: float = 0.0
) -> tuple[float, list[int]]:
    """A full and perfectly regular rung: the time at the end, and each call's limit."""
    seen = []
    for _ in range(calls):
        value = limit.value
        now += 1 / serves_per_s(value)
        limit.ended(now, Outcome.SERVED, now - 1, value)
        seen.append(limit.value)
    return now, seen


def knee(at: int, collapse: float) -> Callable[[int], float]:
    return lambda n: min(n, at) / (1 + collapse * max(0.0, n / at - 1))


@pytest.mark.parametrize("at", [2, 3, 5, 10, 20, 50, 100])
@pytest.mark.parametrize("collapse", [0.1, 0.5, 1.5])
def test_it_finds_the_knee_from_below_and_from_above(at: int, collapse: float) -> None:
    limit = AdaptiveLimit(SETTINGS, limit_max=200)
    serves = knee(at, collapse)
    now, _ = drive(limit, serves, 600 * at)
    before = now
    now, seen = drive(limit, serves, 600 * at, now)
    assert at * 0.75 <= sum(seen) / len(seen) <= at * 1.3
    # Between two whole limits there is nothing: to a small one each trial is a large step.
    least = 0.93 if at >= 5 else 0.85 if at == 3 else 0.75
    assert 600 * at / (now - before) >= at * least


def test_where_more_brings_nothing_it_goes_down() -> None:
    limit = AdaptiveLimit(replace(SETTINGS, limit_first=64), limit_max=200)
    drive(limit, lambda n: 10.0, 20_000)
    assert limit.value <= 2


def test_where_more_always_pays_it_goes_to_its_bound_and_stays() -> None:
    limit = AdaptiveLimit(SETTINGS, limit_max=40)
    drive(limit, float, 2_000)
    _, seen = drive(limit, float, 2_000)
    assert min(seen) >= 34
    assert max(seen) == 40


def test_a_rung_that_bears_one_call_stays_at_one() -> None:
    limit = AdaptiveLimit(SETTINGS, limit_max=1)
    _, seen = drive(limit, float, 500)
    assert set(seen) == {1}


def test_a_quiet_rung_teaches_nothing() -> None:
    limit = AdaptiveLimit(SETTINGS, limit_max=200)
    for now in range(1_000):
        limit.ended(float(now), Outcome.SERVED, now - 1.0, in_flight=limit.value - 1)
    assert limit.value == SETTINGS.limit_first


@pytest.mark.parametrize("outcome", [Outcome.OTHER, Outcome.SERVED, Outcome.LATE])
def test_a_clock_that_stands_still_teaches_nothing(outcome: Outcome) -> None:
    limit = AdaptiveLimit(SETTINGS, limit_max=200)
    for _ in range(30):
        limit.ended(0, outcome, 0, in_flight=8)
    assert limit.value <= SETTINGS.limit_first


def test_busy_cuts_once_for_all_that_were_under_way() -> None:
    limit = AdaptiveLimit(replace(SETTINGS, limit_first=40), limit_max=200)
    for _ in range(40):
        limit.ended(10, Outcome.BUSY, 5, 40)
    assert limit.value == 34
    limit.ended(12, Outcome.BUSY, 11, 34)
    assert limit.value == 29
    for now in range(13, 60):
        limit.ended(now, Outcome.BUSY, now - 0.5, 29)
    assert limit.value == 1


def test_a_round_in_which_most_calls_were_late_cuts_and_a_few_late_ones_do_not() -> None:
    limit = AdaptiveLimit(replace(SETTINGS, limit_first=40), limit_max=200)
    for now in range(200):
        limit.ended(now, Outcome.LATE if now % 5 else Outcome.SERVED, now - 60, 40)
    assert limit.value == 34
    limit = AdaptiveLimit(replace(SETTINGS, limit_first=40), limit_max=200)
    for now in range(200):
        limit.ended(now, Outcome.SERVED if now % 5 else Outcome.LATE, now - 60, 40)
    assert limit.value == 60


def test_a_restart_forgets() -> None:
    limit = AdaptiveLimit(SETTINGS, limit_max=200)
    now, _ = drive(limit, knee(50, 0.5), 5_000)
    assert limit.value > 30
    limit.restart(now)
    assert limit.value == SETTINGS.limit_first
    drive(limit, knee(50, 0.5), 5_000, now)
    assert limit.value > 30


def test_a_capacity_that_changes_is_followed() -> None:
    limit = AdaptiveLimit(SETTINGS, limit_max=200)
    now, _ = drive(limit, knee(40, 0.5), 20_000)
    now, _ = drive(limit, knee(10, 0.5), 10_000, now)
    assert 7 <= limit.value <= 14
    drive(limit, knee(40, 0.5), 40_000, now)
    assert 30 <= limit.value <= 52


def test_a_fixed_limit_learns_nothing() -> None:
    limit = FixedLimit(7)
    limit.ended(1, Outcome.BUSY, 0, 7)
    limit.restart(2)
    assert limit.value == 7


@given(
    events=st.lists(
        st.tuples(
            st.sampled_from([*Outcome, Outcome.SERVED, Outcome.SERVED]),
            st.floats(-1, 100),
            st.integers(0, 40),
            st.integers(0, 1),
            st.integers(1, 40),
        ),
        max_size=30,
    ),
    limit_max=st.integers(1, 30),
    limit_first=st.integers(1, 60),
)
def test_it_keeps_to_its_bounds_whatever_happens(
    events: list[tuple[Outcome, float, int, int, int]], limit_max: int, limit_first: int
) -> None:
    settings = replace(SETTINGS, limit_first=limit_first)
    limit = AdaptiveLimit(settings, limit_max)
    now = 0.0
    for outcome, seconds, in_flight, is_restart, times in events:
        if is_restart and in_flight == 0:
            limit.restart(now)
        for _ in range(times):
            now += seconds
            limit.ended(now, outcome, now - 1, in_flight)
            assert 1 <= limit.value <= limit_max


def test_a_busy_answer_far_below_the_limit_brings_it_down_to_what_was_in_flight() -> None:
    limit = AdaptiveLimit(ConcurrencySettings(limit_first=4096), 4096)
    limit.ended(10.0, Outcome.BUSY, 9.0, in_flight=40)
    assert limit.value == 34


def test_a_busy_answer_with_few_in_flight_speaks_of_another_limit() -> None:
    limit = AdaptiveLimit(ConcurrencySettings(limit_first=4096), 4096)
    for second in range(20):
        limit.ended(10.0 + 2 * second, Outcome.BUSY, 9.0 + 2 * second, in_flight=1)
    assert limit.value == 4096
