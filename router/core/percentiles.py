"""What a rung was like over the last minutes: percentiles of times, and the share of errors. Pure.

Times go into buckets whose bounds grow by a tenth, so a percentile is right within 5 % whatever its
size; a reading costs one logarithm, and the memory is fixed. Two generations rotate: what is shown
covers between half and all of the window, and silence empties it. Times beyond the range count in
its first or last bucket. What several processes timed adds up by its filled buckets (`Window`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from router.types import Json

_GROWTH = 1.1
_LOG_GROWTH = math.log(_GROWTH)
_TIME_S_MIN = 0.001
_TIME_S_MAX = 86_400.0
_BUCKETS = math.ceil(math.log(_TIME_S_MAX / _TIME_S_MIN) / _LOG_GROWTH)

# `{"counts": [[bucket, count], …], "ended": attempts, "failed": attempts}`, as JSON has it.
Window = Json


@dataclass(slots=True)
class _Generation:
    """One half of the window."""

    counts: list[int] = field(default_factory=lambda: [0] * _BUCKETS)
    timed: int = 0
    ended: int = 0
    failed: int = 0


class Recent:
    """Of one rung and one kind of time. `window_s`: nothing older than this is shown."""

    def __init__(self, window_s: float = 300.0) -> None:
        self._half_s = window_s / 2
        self._turn_at = -math.inf
        self._now = _Generation()
        self._before = _Generation()

    def timed(self, now: float, time_s: float) -> None:
        """Something took so long."""
        if now >= self._turn_at:
            self._turn(now)
        self._now.counts[_bucket(time_s)] += 1
        self._now.timed += 1

    def ended(self, now: float, *, failed: bool) -> None:
        """An attempt ended, well or not."""
        if now >= self._turn_at:
            self._turn(now)
        self._now.ended += 1
        self._now.failed += failed

    def answered(self, now: float, time_s: float) -> None:
        """An attempt ended well and took so long."""
        if now >= self._turn_at:
            self._turn(now)
        current = self._now
        current.counts[_bucket(time_s)] += 1
        current.timed += 1
        current.ended += 1

    def quantile_s(self, now: float, share: float) -> float | None:
        """The time that `share` of all did not exceed, within 5 %; None: nothing was timed."""
        self._turn(now)
        count = self._now.timed + self._before.timed
        if count == 0:
            return None
        rank = max(1, math.ceil(share * count))
        bucket, seen = -1, 0
        while seen < rank:
            bucket += 1
            seen += self._now.counts[bucket] + self._before.counts[bucket]
        return _middle_s(bucket)

    def error_share(self, now: float) -> float | None:
        self._turn(now)
        ended = self._now.ended + self._before.ended
        return (self._now.failed + self._before.failed) / ended if ended else None

    def window(self, now: float) -> Window:
        """What is known of late, for adding up."""
        self._turn(now)
        both = enumerate(zip(self._now.counts, self._before.counts, strict=True))
        return {
            "counts": [[bucket, one + other] for bucket, (one, other) in both if one or other],
            "ended": self._now.ended + self._before.ended,
            "failed": self._now.failed + self._before.failed,
        }

    def _turn(self, now: float) -> None:
        if now < self._turn_at:
            return
        # After a silence longer than a half, what was the current one is too old as well.
        is_next = now < self._turn_at + self._half_s
        self._before = self._now if is_next else _Generation()
        self._now = _Generation()
        self._turn_at = (self._turn_at if is_next else now) + self._half_s


def _bucket(time_s: float) -> int:
    if time_s <= _TIME_S_MIN:
        return 0
    return min(_BUCKETS - 1, int(math.log(time_s / _TIME_S_MIN) / _LOG_GROWTH))


def _middle_s(bucket: int) -> float:
    """In the sense of ratios: as far from one bound as from the other."""
    return _TIME_S_MIN * math.exp((bucket + 0.5) * _LOG_GROWTH)


def quantile_s(windows: Sequence[Window], share: float) -> float | None:
    """The time that `share` of all in these windows did not exceed; None: nothing was timed."""
    counts: Counter[int] = Counter()
    for window in windows:
        for bucket, count in window["counts"]:
            counts[bucket] += count
    rank, seen = max(1, math.ceil(share * counts.total())), 0
    for bucket in sorted(counts):
        seen += counts[bucket]
        if seen >= rank:
            return _middle_s(bucket)
    return None


def error_share(windows: Sequence[Window]) -> float | None:
    ended: int = sum(window["ended"] for window in windows)
    failed: int = sum(window["failed"] for window in windows)
    return failed / ended if ended else None
