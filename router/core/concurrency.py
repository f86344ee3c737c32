"""How many calls a rung bears at once, found by trying. Pure.

Why throughput and not latency against a minimum, as Vegas and its kin have it: with a language
model the time of a call follows the length of its answer, so the minimum says nothing of the mean;
and a server that batches slows each call down long before more calls stop paying, so a latency that
doubled may be the best point or far beyond it. What is wanted is answers a second, and that can be
counted without a word on why.

So the limit climbs: a round at `low`, a round a little higher, and then a step in the direction and
in proportion of what the difference brought (stochastic approximation, after Kiefer and Wolfowitz).
Noise makes it wander, never run away: the steps are bounded, and the slope brings it back. Where
more concurrency brings nothing it goes down, by `bias`: the same answers at a lower latency. At the
start, and after `restart`, it grows by half each round until that stops paying; where that never
paid, it shrinks likewise.

A backend that says it is busy is believed at once: the limit is cut, once for all calls that were
under way at the cut. A call that passed its time limit may just have been long; it only counts as
not served, but when those are the most of a round the limit is cut too.

Only rounds in which the limit was the limit count: a quiet rung teaches nothing, and its limit
stays as it was. Invariant: 1 <= value <= limit_max.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass


class Outcome(enum.Enum):
    """How an attempt ended, as the limit sees it."""

    SERVED = "served"
    BUSY = "busy"  # 429 or 503
    LATE = "late"  # a time limit of the attempt passed
    OTHER = "other"  # failed, refused, or left by its caller: says nothing of the load


@dataclass(frozen=True, slots=True)
class ConcurrencySettings:
    """The higher round of a pair is higher by a share between `step_min` and `step_max`, which
    grows by `step_grows` while the steps go one way and shrinks by `step_shrinks` when they turn.
    `gain` is how much of what the slope says is done. A round lasts `round_calls_min` calls, or
    `round_trips` calls for each place if that is more. Where the steps have become small, the
    better of the two is kept for up to `rest_rounds`; when less or more than before is served by
    more than `changed` meanwhile, the steps become large again.
    """

    limit_first: int = 8
    step_min: float = 0.05
    step_max: float = 0.25
    step_grows: float = 1.3
    step_shrinks: float = 0.8
    gain: float = 0.5
    bias: float = 0.1
    cut: float = 0.85
    busy_calls_min: int = 8
    round_calls_min: int = 16
    round_trips: float = 4.0
    full_share_min: float = 0.8
    rest_rounds: int = 4
    changed: float = 0.3


class _Phase(enum.Enum):
    GROW = "grow"
    SHRINK = "shrink"
    LOW = "low"
    HIGH = "high"
    REST = "rest"


class AdaptiveLimit:
    """`value` is how many calls may be in flight now."""

    def __init__(self, settings: ConcurrencySettings, limit_max: int) -> None:
        assert limit_max >= 1, "a rung that bears no call is no rung"
        self._settings = settings
        self._limit_max = limit_max
        self._low = 1
        self._to_skip = self._ended = self._served = self._full = 0
        self.restart(-math.inf)

    def restart(self, now: float) -> None:
        """The rung is new, or comes back from being closed: what was known of it may not hold."""
        self._centre = float(min(self._settings.limit_first, self._limit_max))
        self._phase = _Phase.GROW
        self._has_grown = False
        self._before_per_s = 0.0
        self._cut_at = -math.inf
        self._reach = self._settings.step_max
        self._was_up = True
        self._rest = 0
        self.value = round(self._centre)
        self._begin_round(now)

    def ended(self, now: float, outcome: Outcome, began: float, in_flight: int) -> None:
        """An attempt begun at `began` ended, with `in_flight` under way until now, itself too."""
        # With only a few in flight it is another limit that was met, of rate or shared with others:
        # to wait as told is the answer to that, and not fewer at once.
        if outcome is Outcome.BUSY:
            if in_flight >= min(self.value, self._settings.busy_calls_min):
                self._cut(now, began, in_flight)
            return
        if outcome is Outcome.OTHER:
            return
        # The first round trip after a change still shows what was before it.
        if self._to_skip > 0:
            self._to_skip -= 1
            self._round_began = now
            return
        self._ended += 1
        self._served += outcome is Outcome.SERVED
        self._full += in_flight >= self.value
        if self._ended < self._round_calls:
            return
        took_s = now - self._round_began
        if self._served * 2 < self._ended:
            self._cut(now, began, in_flight)
        elif took_s <= 0 or self._full < self._settings.full_share_min * self._ended:
            self._begin_round(now)
        else:
            self._learn(self._served / took_s, now)

    def _cut(self, now: float, began: float, in_flight: int) -> None:
        if began < self._cut_at:
            return
        self._cut_at = now
        # Where the limit was far from reached, what was in flight was too much already.
        too_much = min(self._centre, self.value, in_flight)
        self._centre = max(1.0, too_much * self._settings.cut)
        self._phase = _Phase.LOW
        self.value = self._rounded(self._centre)
        self._begin_round(now)

    def _learn(self, per_s: float, now: float) -> None:
        """A full round ended: what it served a second decides on the next one's limit."""
        if self._phase is _Phase.GROW:
            self._grow(per_s)
        elif self._phase is _Phase.SHRINK:
            self._shrink(per_s)
        elif self._phase is _Phase.LOW:
            self._before_per_s = per_s
            self._low = self.value
            self._phase = _Phase.HIGH
            self.value = self._higher(self.value)
        elif self._phase is _Phase.HIGH:
            self._step(per_s)
            settings = self._settings
            self._rest = int(settings.rest_rounds * settings.step_min / self._reach)
            if self._rest:
                # The better of the two, until it is time to ask again.
                self._phase = _Phase.REST
                if not self._was_up:
                    self.value = self._low
            else:
                self._climb()
        else:
            if abs(math.log(per_s / self._before_per_s)) > self._settings.changed:
                self._reach = self._settings.step_max
            self._climb()
        self._begin_round(now)

    def _climb(self) -> None:
        self._phase = _Phase.LOW
        self.value = self._rounded(self._centre)

    def _grow(self, per_s: float) -> None:
        # Half as much again should serve half as much again; less than a tenth is the knee.
        if per_s < 1.1 * self._before_per_s:
            self._phase = _Phase.LOW if self._has_grown else _Phase.SHRINK
            self._centre = max(1.0, self.value / 1.5)
        else:
            self._has_grown = self._before_per_s > 0
            self._before_per_s = per_s
            if self.value == self._limit_max:
                self._phase = _Phase.LOW
            self._centre = min(self._limit_max, max(self.value * 1.5, self.value + 1.0))
        self.value = self._rounded(self._centre)

    def _shrink(self, per_s: float) -> None:
        """The first limit may lie beyond the knee: go down for as long as that costs little."""
        if per_s < 0.9 * self._before_per_s or self.value == 1:
            self._phase = _Phase.LOW
            self._centre = min(self._limit_max, self.value * 1.5)
        else:
            self._before_per_s = per_s
            self._centre = max(1.0, self.value / 1.5)
        self.value = self._rounded(self._centre)

    def _step(self, per_s: float) -> None:
        settings = self._settings
        low = self._low
        ratio = math.log(self.value / low) if self.value > low else math.log1p(self._reach)
        # 1: all of the added concurrency pays; 0: nothing; below: it harms.
        slope = math.log(per_s / self._before_per_s) / ratio
        slope = max(-1.0, min(1.0, slope - settings.bias))
        if (slope > 0) is self._was_up:
            self._reach = min(settings.step_max, self._reach * settings.step_grows)
        else:
            self._reach = max(settings.step_min, self._reach * settings.step_shrinks)
        self._was_up = slope > 0
        stepped = self._centre * math.exp(settings.gain * slope * ratio)
        self._centre = max(1.0, min(float(self._limit_max), stepped))

    def _higher(self, low: int) -> int:
        return min(self._limit_max, low + max(1, round(self._reach * low)))

    def _rounded(self, centre: float) -> int:
        """The lower limit of a pair; at the top there must be room for the higher one."""
        top = self._limit_max if self._phase is _Phase.GROW else max(1, self._limit_max - 1)
        return max(1, min(top, round(centre)))

    def _begin_round(self, now: float) -> None:
        settings = self._settings
        self._round_began = now
        self._to_skip = self.value
        self._ended = self._served = self._full = 0
        # How many calls must end before the round says something.
        calls = max(settings.round_calls_min, settings.round_trips * self.value)
        self._round_calls = calls * self._rest if self._phase is _Phase.REST else calls


class FixedLimit:
    """A limit that is as it is configured: the same shape, nothing learned."""

    def __init__(self, limit: int) -> None:
        self.value = limit

    def restart(self, now: float) -> None:
        """Nothing was learned, so nothing is forgotten."""

    def ended(self, now: float, outcome: Outcome, began: float, in_flight: int) -> None:
        """Nothing is learned."""
