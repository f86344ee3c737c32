"""Percentiles within 5 %, of the window only, and the share of errors."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.percentiles import Recent, error_share, quantile_s


@given(
    times=st.lists(st.floats(0.001, 86_000), min_size=1, max_size=100),
    share=st.sampled_from([0.0, 0.01, 0.5, 0.95, 0.99, 1.0]),
)
def test_a_percentile_is_right_within_a_twentieth(times: list[float], share: float) -> None:
    recent = Recent()
    for time_s in times:
        recent.timed(0, time_s)
    exact = sorted(times)[max(1, math.ceil(share * len(times))) - 1]
    assert recent.quantile_s(0, share) == pytest.approx(exact, rel=0.05)


def test_times_out_of_range_count_at_its_ends() -> None:
    recent = Recent()
    for time_s in (-1.0, 0.0, 1e9):
        recent.timed(0, time_s)
    assert recent.quantile_s(0, 0.5) == pytest.approx(0.001, rel=0.05)
    assert recent.quantile_s(0, 1.0) == pytest.approx(86_400, rel=0.1)


def test_nothing_is_told_of_nothing() -> None:
    assert Recent().quantile_s(0, 0.5) is None
    assert Recent().error_share(0) is None


@pytest.mark.parametrize(("later_s", "is_shown"), [(0, True), (49, True), (100, False)])
def test_the_window_forgets(later_s: float, is_shown: bool) -> None:
    recent = Recent(window_s=100)
    recent.timed(7, 2.0)
    recent.ended(7, failed=True)
    now = 7 + later_s
    assert (recent.quantile_s(now, 0.5) is not None) is is_shown
    assert recent.error_share(now) == (1.0 if is_shown else None)


def test_the_halves_rotate() -> None:
    recent = Recent(window_s=100)
    recent.timed(0, 1.0)
    recent.timed(60, 10.0)
    assert recent.quantile_s(60, 0.5) == pytest.approx(1, rel=0.05)
    assert recent.quantile_s(101, 0.5) == pytest.approx(10, rel=0.05)
    assert recent.quantile_s(160, 0.5) is None


@given(gaps=st.lists(st.floats(0, 300), min_size=1, max_size=50))
def test_what_is_shown_is_between_half_and_all_of_the_window(gaps: list[float]) -> None:
    recent, now, ended = Recent(window_s=100), 0.0, []
    for gap in gaps:
        now += gap
        ended.append(now)
        recent.ended(now, failed=len(ended) % 2 == 0)
        young = sum(now - at < 50 for at in ended)
        old = sum(now - at <= 100 for at in ended)
        share = recent.error_share(now)
        assert share is not None
        possible = [ended[-count:] for count in range(young, old + 1)]
        firsts = [len(ended) - len(some) for some in possible]
        assert any(
            share == pytest.approx(sum((first + i) % 2 for i in range(len(some))) / len(some))
            for first, some in zip(firsts, possible, strict=True)
        )


def test_the_share_of_errors() -> None:
    recent = Recent()
    for failed in (True, False, False, True, False):
        recent.ended(1, failed=failed)
    assert recent.error_share(2) == pytest.approx(0.4)


@given(
    parts=st.lists(st.lists(st.floats(0.001, 86_000), max_size=30), min_size=1, max_size=4),
    share=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
)
def test_what_several_timed_is_as_if_one_had_timed_it_all(
    parts: list[list[float]], share: float
) -> None:
    whole, windows = Recent(), []
    for times in parts:
        recent = Recent()
        for time_s in times:
            for one in (recent, whole):
                one.timed(0, time_s)
                one.ended(0, failed=time_s > 1)
        windows.append(recent.window(0))
    assert quantile_s(windows, share) == whole.quantile_s(0, share)
    assert error_share(windows) == whole.error_share(0)


def test_the_window_that_adds_up_forgets_too() -> None:
    recent = Recent(window_s=100)
    recent.timed(0, 1.0)
    recent.ended(0, failed=True)
    assert recent.window(0)["ended"] == 1
    assert recent.window(500) == {"counts": [], "ended": 0, "failed": 0}
