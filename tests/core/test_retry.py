"""Retries: which faults are worth one, when, and that storms never get more than the budget."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.retry import RetryBudget, RetrySettings, Verdict, backoff_s, decide
from router.errors import (
    CallerMistake,
    ConnectFailed,
    PromptTooLong,
    RungRefused,
    UpstreamAsleep,
    UpstreamBroken,
    UpstreamBusy,
    UpstreamError,
    UpstreamFailed,
    UpstreamTimeout,
)

SETTINGS = RetrySettings()


def verdict(
    error: UpstreamError,
    *,
    tries: int = 1,
    has_next: bool = False,
    is_stale: bool = False,
    left_s: float = 60,
    rand: float = 0.5,
    budget: RetryBudget | None = None,
) -> Verdict:
    return decide(
        error,
        tries=tries,
        has_next=has_next,
        is_stale_connection=is_stale,
        left_s=left_s,
        settings=SETTINGS,
        budget=budget or RetryBudget(SETTINGS, 0),
        now=0,
        rand=rand,
    )


DOWN = ConnectFailed("refused")
BROKEN = UpstreamBroken("cut")


@pytest.mark.parametrize(
    ("error", "wait_s"),
    [
        (DOWN, 0.125),
        (UpstreamFailed("500"), 0.125),
        (UpstreamBusy("429"), 0.125),
        (UpstreamBusy("429", retry_after_s=0), 0.125),
        (UpstreamBusy("429", retry_after_s=3), 3.125),
        (UpstreamFailed("503", retry_after_s=5), 5.125),
        (UpstreamBusy("429", retry_after_s=5.1), None),
        (UpstreamFailed("out of credit", cool_s=60), None),
        (UpstreamTimeout("slow", phase="first_token"), None),
        (BROKEN, None),
        (UpstreamAsleep("asleep"), None),
        (RungRefused("401"), None),
        (PromptTooLong("long"), None),
        (CallerMistake("bad"), None),
    ],
)
def test_which_faults_of_the_last_rung_are_worth_a_retry(
    error: UpstreamError, wait_s: float | None
) -> None:
    found = verdict(error)
    assert found.wait_s == wait_s
    assert found.reason


def test_another_rung_goes_before_a_retry() -> None:
    assert verdict(DOWN, has_next=True) == Verdict(None, "the next rung can answer at once")


def test_a_kept_connection_found_closed_is_retried_at_once_and_only_once() -> None:
    assert verdict(BROKEN, is_stale=True, has_next=True).wait_s == 0
    assert verdict(BROKEN, is_stale=True, has_next=True, tries=2).wait_s is None


def test_a_wait_beyond_the_calls_time_is_not_begun_nor_paid() -> None:
    budget = RetryBudget(SETTINGS, 0)
    busy = UpstreamBusy("429", retry_after_s=4)
    assert verdict(busy, left_s=4.1, budget=budget).wait_s is None
    assert verdict(busy, left_s=4.2, budget=budget).wait_s == 4.125


def test_no_budget_no_retry() -> None:
    budget = RetryBudget(SETTINGS, 0)
    assert verdict(DOWN, budget=budget).wait_s is not None
    assert verdict(DOWN, budget=budget) == Verdict(None, "the retry budget is used up")
    assert verdict(BROKEN, is_stale=True, budget=budget).wait_s is None


@pytest.mark.parametrize(
    ("attempt", "rand", "wait_s"),
    [(0, 0, 0), (0, 0.5, 0.5), (1, 0.5, 1), (3, 0.5, 4), (4, 0.5, 5), (10**9, 0.5, 5)],
)
def test_the_backoff_doubles_up_to_its_cap(attempt: int, rand: float, wait_s: float) -> None:
    assert backoff_s(attempt, rand, base_s=1, cap_s=10) == wait_s


def test_the_reserve_is_bounded_and_a_quiet_rung_earns_its_retry() -> None:
    settings = replace(SETTINGS, share=0, per_s=0.1, reserve_max=2)
    budget = RetryBudget(settings, 0)
    assert budget.withdraw(0)
    assert not budget.withdraw(9.9)
    assert budget.withdraw(10.1)
    assert [budget.withdraw(10_000) for _ in range(3)] == [True, True, False]


def test_a_share_of_traffic_is_earned() -> None:
    budget = RetryBudget(replace(SETTINGS, share=0.25, per_s=0), 0)
    assert budget.withdraw(0)
    for _ in range(3):
        budget.deposit()
        assert not budget.withdraw(0)
    budget.deposit()
    assert budget.withdraw(0)


@given(
    events=st.lists(st.tuples(st.booleans(), st.floats(-1, 30)), max_size=200),
    share=st.sampled_from([0.0, 0.125, 0.5]),
    per_s=st.sampled_from([0.0, 0.25]),
)
def test_retries_never_exceed_the_budget(
    events: list[tuple[bool, float]], share: float, per_s: float
) -> None:
    """Also counted from any later moment: then the full reserve may be there, and no more."""
    settings = replace(SETTINGS, share=share, per_s=per_s, reserve_max=3)
    budget = RetryBudget(settings, 0)
    now = latest = 0.0
    marks = [(0, 0.0, 0)]
    retries = calls = 0
    for is_call, seconds in events:
        now += seconds
        latest = max(latest, now)
        if is_call:
            budget.deposit()
            calls += 1
        else:
            retries += budget.withdraw(now)
        earned = share * calls + per_s * latest
        assert retries <= 1 + earned + 1e-6
        for calls_then, then, retries_then in marks:
            since = share * (calls - calls_then) + per_s * (latest - then)
            assert retries - retries_then <= settings.reserve_max + since + 1e-6
        marks.append((calls, latest, retries))
