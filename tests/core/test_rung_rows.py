"""A rung as several workers see it: counts add up, times are of all calls, the worst shows."""

from __future__ import annotations

from typing import Any

import pytest

from router.core.percentiles import Recent
from router.core.rung_rows import ladders, shown
from router.types import Json


def row(state: str = "closed", times_s: tuple[float, ...] = (), **more: Any) -> Json:
    recent = Recent()
    for time_s in times_s:
        recent.timed(0, time_s)
        recent.ended(0, failed=time_s > 5)
    return {
        "rung": "b/m",
        "state": state,
        "in_flight": 1,
        "limit": 4,
        "queued": 2,
        "first_token": Recent().window(0),
        "total": recent.window(0),
        "until": None,
        "reason": None,
        **more,
    }


def test_counts_add_up() -> None:
    found = shown([row(), row(), row()])
    assert (found["in_flight"], found["limit"], found["queued"]) == (3, 12, 6)
    assert "states" not in found


def test_one_worker_without_a_limit_is_no_limit() -> None:
    assert shown([row(), row(limit=None)])["limit"] is None


def test_percentiles_are_those_of_all_calls() -> None:
    """A mean of the two medians would be 5.5 s."""
    found = shown([row(times_s=(1.0,) * 99), row(times_s=(10.0,))])
    assert found["total_ms"]["p50"] == pytest.approx(1000, rel=0.05)
    assert found["error_share"] == 0.01
    assert found["first_token_ms"] == {"p50": None, "p95": None}
    assert shown([row(), row()])["error_share"] is None


@pytest.mark.parametrize(
    ("states", "worst"),
    [
        (("closed", "closed"), "closed"),
        (("closed", "asleep"), "asleep"),
        (("half_open", "asleep", "closed"), "half_open"),
        (("open", "half_open"), "open"),
        (("open", "cooling", "closed"), "cooling"),
    ],
)
def test_the_worst_state_is_shown_with_its_reason(states: tuple[str, ...], worst: str) -> None:
    found = shown([row(state, until=1.0, reason=f"is {state}") for state in states])
    assert (found["state"], found["reason"]) == (worst, f"is {worst}")
    differs = len(set(states)) > 1
    assert ("states" in found) is differs
    if differs:
        assert sum(found["states"].values()) == len(states)


def test_of_two_that_cool_the_longer_is_shown() -> None:
    rows = [row("cooling", until=3.0, reason="short"), row("cooling", until=9.0, reason="long")]
    assert shown(rows)["reason"] == "long"


def test_ladders_are_those_of_the_worker_that_was_asked() -> None:
    own = {"chat": [row(), row(rung="c/m")], "new": [row()]}
    other = {"chat": [row(rung="gone/m"), row()], "old": [row()]}
    found = ladders([own, other])
    assert list(found) == ["chat", "new"]
    assert [(one["rung"], one["in_flight"]) for one in found["chat"]["rungs"]] == [
        ("b/m", 2),
        ("c/m", 1),
    ]
    assert found["new"]["rungs"][0]["in_flight"] == 1
