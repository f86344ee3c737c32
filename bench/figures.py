"""The figures of a run: lists of readings by row and column, and how they are told."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

Readings = dict[str, dict[str, list[float]]]


@dataclass
class Figures:
    """Readings of each row, by column: a proxy's name, or for a growth row the size.

    `busy` is how much of its core a proxy had, `foreign` what others took of it meanwhile.
    """

    readings: Readings = field(default_factory=dict)
    busy: Readings = field(default_factory=dict)
    foreign: list[float] = field(default_factory=list)
    not_measured: list[str] = field(default_factory=list)

    def add(self, row: str, column: str, value: float) -> None:
        _add(self.readings, row, column, value)

    def add_busy(self, row: str, column: str, share: float) -> None:
        _add(self.busy, row, column, share)

    def of(self, row: str, column: str) -> list[float]:
        return self.readings.get(row, {}).get(column, [])

    def median(self, row: str, column: str) -> float | None:
        values = self.of(row, column)
        return statistics.median(values) if values else None

    def columns(self, row: str) -> list[str]:
        return list(self.readings.get(row, {}))


def _add(readings: Readings, row: str, column: str, value: float) -> None:
    readings.setdefault(row, {}).setdefault(column, []).append(value)


def told(values: Sequence[float]) -> str:
    """The median, with the lowest and the highest beside it."""
    if not values:
        return "–"
    middle = number(statistics.median(values))
    if len(values) == 1:
        return middle
    return f"{middle} ({number(min(values))} to {number(max(values))})"


def number(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
