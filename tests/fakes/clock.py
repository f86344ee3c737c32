"""A clock that goes only where a test moves it."""

from __future__ import annotations


class Clock:
    """Monotonic seconds, from 100 on."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now
