"""What `rungway status` says of a rung."""

from __future__ import annotations

from typing import Any

import pytest

from router.cli.status import _facts

QUIET: dict[str, Any] = {
    "limit": None,
    "in_flight": 0,
    "queued": 0,
    "first_token_ms": {"p50": None, "p95": None},
    "total_ms": {"p50": None, "p95": None},
    "error_share": None,
    "until": None,
    "reason": None,
}


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({}, ["0 in flight"]),
        ({"limit": 4, "in_flight": 4, "queued": 2}, ["4 of 4 in flight", "2 waiting"]),
        (
            {"total_ms": {"p50": 12.5, "p95": 80.0}, "error_share": 0.25},
            ["0 in flight", "whole p50 12.5 ms, p95 80 ms", "errors 25%"],
        ),
        (
            {"until": 7.5, "reason": "its breaker is open"},
            ["0 in flight", "for 7.5 s more", "its breaker is open"],
        ),
    ],
)
def test_facts(changes: dict[str, Any], facts: list[str]) -> None:
    assert _facts({**QUIET, **changes}) == facts
