"""One timer of the loop's for all who wait for something to be late.

A deadline is a number. The watch looks at all of them when the first may have passed, and no sooner
than `_LOOK_EACH_S` for each of them after it last did, so that looking takes the loop about a
hundredth of its time. That is how late a deadline is noticed at worst: 50 ms where ten thousand are
waited for, a millisecond with few.
"""

from __future__ import annotations

import asyncio
import math
from typing import ClassVar, Protocol

# To look at one deadline takes some 50 ns.
_LOOK_EACH_S = 5e-6
_REST_S_MIN = 1e-3


class Patient(Protocol):
    """Who waits. `deadline` is of the loop's time; `expire` is called once, when it has passed."""

    @property
    def deadline(self) -> float: ...

    def expire(self) -> None: ...


class Watch:
    """Looks after everybody who is `patient` on one loop, with one timer."""

    __slots__ = ("_rests_until", "_timer", "looks_at", "loop", "patient")

    last: ClassVar[Watch | None] = None

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.patient: set[Patient] = set()
        self.looks_at = math.inf
        self._rests_until = -math.inf
        self._timer: asyncio.TimerHandle | None = None

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> Watch:
        """The loop's. A process has one loop, and tests have one after the other."""
        watch = cls.last
        if watch is None or watch.loop is not loop:
            watch = cls.last = cls(loop)
        return watch

    def add(self, one: Patient) -> None:
        """Look after this one too, until it expires or is discarded."""
        self.patient.add(one)
        if one.deadline < self.looks_at:
            self.look_by(one.deadline)

    def look_by(self, deadline: float) -> None:
        """Look at that moment, if not before, or as soon after it as the rest is over."""
        when = max(deadline, self._rests_until)
        if when >= self.looks_at:
            return
        if self._timer is not None:
            self._timer.cancel()
        self.looks_at = when
        self._timer = self.loop.call_at(when, self._look)

    def _look(self) -> None:
        now = self.loop.time()
        self._timer, self.looks_at = None, math.inf
        self._rests_until = now + max(_REST_S_MIN, _LOOK_EACH_S * len(self.patient))
        due = [one for one in self.patient if one.deadline <= now]
        self.patient.difference_update(due)
        for one in due:
            one.expire()
        first = min((one.deadline for one in self.patient), default=math.inf)
        if first < math.inf:
            self.look_by(first)
