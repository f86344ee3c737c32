"""The breaker of one rung: whether it may be tried, judged by how its last attempts ended. Pure.

Closed, it opens on failures in a row or on a share of failures among the recent attempts. Open, it
lets nobody through until its interval is over. Half-open, it lets one attempt through, the probe;
the probe's success closes it, its failure opens it again for longer. What counts as a failure is
the caller's to say: a full backend is not a broken one, and the limiter's business.

Invariants: within a period open or half-open there is one probe at a time, unless the one before
has been silent for `probe_s` (a lost probe must not wedge the rung); between two probes that failed
lie at least `open_s_min` seconds. Attempts begun before the state changed say nothing any more:
each attempt holds a permit, and a permit is good for the period that gave it.

One success closes: the probe is a real call answered whole, the limiter starts low again, and an
interval that grew is only forgotten after the rung has stayed closed for `open_s_max`, so a rung
that passes its probes and nothing else is left alone ever longer all the same. The interval has
full jitter above its minimum, for the sake of a backend that comes back to many routers at once.
"""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass

# An exponent beyond this has long reached any sensible limit, and stays a number.
_DOUBLINGS_MAX = 30

Permit = int


class State(enum.StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(frozen=True, slots=True)
class BreakerSettings:
    """`share_max` holds once `calls_min` attempts ended within the last `window_s` seconds; at most
    the last `window_calls` of them count.
    """

    failures_in_row_max: int = 5
    share_max: float = 0.5
    calls_min: int = 20
    window_calls: int = 100
    window_s: float = 60.0
    open_s_min: float = 5.0
    open_s_max: float = 120.0
    probe_s: float = 60.0


class Breaker:
    """`until` is when the next attempt may be made, or None where one may be made now.

    `is_closed`: all may pass.
    """

    def __init__(self, settings: BreakerSettings) -> None:
        self._settings = settings
        self._state = State.CLOSED
        self.is_closed = True
        self._recent: deque[tuple[float, bool]] = deque()
        self._recent_failures = 0
        self._in_row = 0
        self._openings = 0
        self._closed_at = 0.0
        self._widest_s = 0.0
        self._until: float | None = None
        self._probe: Permit | None = None
        # Permits are counted up; those below the period's first one are of an earlier period.
        self._next_permit = 0
        self._first_permit = 0

    def view(self, now: float) -> State:
        """The state as people see it: half-open from the moment a probe may be sent."""
        if self._state is State.OPEN and self._is_over(now):
            return State.HALF_OPEN
        return self._state

    def until(self, now: float) -> float | None:
        return None if self.may_try(now) else self._until

    def may_try(self, now: float) -> bool:
        """Whether `enter` would give a permit now. Advises; takes nothing."""
        return self._state is State.CLOSED or self._is_over(now)

    def enter(self, now: float) -> Permit | None:
        """A permit for one attempt, to be given back by one of the three below; None: closed off.

        The gate and the taking are one step, so that two callers never both take the one probe.
        """
        permit = self._next_permit
        if self._state is not State.CLOSED:
            if not self._is_over(now):
                return None
            if self._state is State.OPEN:
                self._begin(State.HALF_OPEN, permit)
            self._probe, self._until = permit, now + self._settings.probe_s
        self._next_permit = permit + 1
        return permit

    def succeeded(self, permit: Permit, now: float) -> bool:
        """Whether the breaker has closed by it."""
        if permit < self._first_permit:
            return False
        if self._state is State.HALF_OPEN:
            self._closed_at = now
            self._begin(State.CLOSED, self._next_permit)
            return True
        self._in_row = 0
        self._note(now, failed=False)
        return False

    def failed(self, permit: Permit, now: float, rand: float) -> None:
        """`rand` in [0, 1) draws the open interval, where this failure opens the breaker."""
        if permit < self._first_permit:
            return
        if self._state is State.HALF_OPEN:
            self._open(now, rand)
            return
        self._in_row += 1
        self._note(now, failed=True)
        settings = self._settings
        count = len(self._recent)
        if self._in_row >= settings.failures_in_row_max or (
            count >= settings.calls_min and self._recent_failures >= settings.share_max * count
        ):
            if now - self._closed_at >= self._widest_s:
                self._openings = 0
            self._open(now, rand)

    def cancelled(self, permit: Permit) -> None:
        """The caller left before the end: nothing is known, and another probe may go at once."""
        if permit == self._probe:
            self._probe, self._until = None, None

    def follow(self, until: float | None, now: float) -> None:
        """Another process's breaker of the same rung opened until then, or closed (None)."""
        if until is None:
            if self._state is not State.CLOSED:
                self._closed_at = now
                self._begin(State.CLOSED, self._next_permit)
        elif self._state is not State.OPEN or self._until is None or self._until < until:
            self._begin(State.OPEN, self._next_permit)
            self._count_opening()
            self._until = until

    def reset(self, now: float) -> None:
        """What made it fail is mended (a new token, a backend seen to be ready): start afresh."""
        self._openings = 0
        self._closed_at = now
        self._begin(State.CLOSED, self._next_permit)

    def _is_over(self, now: float) -> bool:
        return self._until is None or now >= self._until

    def _open(self, now: float, rand: float) -> None:
        settings = self._settings
        self._begin(State.OPEN, self._next_permit)
        self._count_opening()
        self._until = now + settings.open_s_min + rand * (self._widest_s - settings.open_s_min)

    def _count_opening(self) -> None:
        settings = self._settings
        self._openings = min(self._openings + 1, _DOUBLINGS_MAX)
        self._widest_s = min(settings.open_s_max, settings.open_s_min * 2.0**self._openings)

    def _begin(self, state: State, first_permit: Permit) -> None:
        self._state = state
        self.is_closed = state is State.CLOSED
        self._first_permit = first_permit
        self._until = self._probe = None
        self._in_row = 0
        self._recent.clear()
        self._recent_failures = 0

    def _note(self, now: float, *, failed: bool) -> None:
        recent, settings = self._recent, self._settings
        recent.append((now, failed))
        self._recent_failures += failed
        oldest = now - settings.window_s
        while len(recent) > settings.window_calls or recent[0][0] < oldest:
            self._recent_failures -= recent.popleft()[1]
