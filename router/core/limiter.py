"""The places of one rung: so many calls at once as its limit bears, the next in a queue. Pure.

The queue is bounded, ordered by the keys' priority and then by arrival, and each waiter has a
deadline. When it is full, a newcomer of higher priority takes the place of the youngest waiter of
the lowest priority: else a flood of low priority would keep everybody out just when priorities
matter. Priority is strict, so under a lasting load of high priority the low one starves; what it is
spared is uncertainty: it hears by its deadline, and goes to the next rung or back to its client.

Invariants: waiters exist only while no place is free; a call is given at most one place, in order;
every waiter is admitted, expired, displaced or cancelled exactly once; at most `limit` calls are in
flight, where a limit that has just fallen is reached by waiting for calls to end, not by ending
them.

The shell keeps a future for each waiter, and each method returns those to wake.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from typing import Protocol

from router.core.concurrency import Outcome

# How much one more call moves the running mean of how long calls hold their place.
_EWMA_WEIGHT = 0.05


class Limit(Protocol):
    """What decides how many may be in flight."""

    value: int

    def ended(self, now: float, outcome: Outcome, began: float, in_flight: int) -> None: ...

    def restart(self, now: float) -> None: ...


@dataclass(slots=True, eq=False)
class Ticket:
    """A place, to be given back by `leave`, once."""

    began: float
    is_held: bool = True


class Full(enum.Enum):
    """No place, and no room to wait for one."""

    FULL = "full"


@dataclass(slots=True, eq=False)
class Waiter:
    """A call in the queue. `ticket` is there once it is admitted. `displaced` is the waiter that
    this one has pushed out, who must be told.
    """

    priority: int
    deadline: float
    order: int
    ticket: Ticket | None = None
    displaced: Waiter | None = field(default=None, repr=False)


class Limiter:
    """`queue_max` 0: nobody waits."""

    def __init__(self, limit: Limit, queue_max: int) -> None:
        self._limit = limit
        self._queue_max = queue_max
        # By priority, and in order of arrival within it; a priority without waiters has no entry.
        self._queues: dict[int, dict[int, Waiter]] = {}
        self._order = 0
        self._held_s: float | None = None
        self.in_flight = 0
        self.queued = 0

    @property
    def limit(self) -> int:
        return self._limit.value

    def has_room(self) -> bool:
        """Whether a call would get a place at once. Advises; takes nothing."""
        return self.in_flight < self._limit.value

    def expected_wait_s(self, priority: int) -> float:
        """How long a newcomer would probably wait, by how long calls held their places of late.

        Infinite when there is no room to wait. Calls of higher priority still to come are not
        foreseen.
        """
        if self.has_room():
            return 0.0
        if self.queued >= self._queue_max and not self.may_displace(priority):
            return math.inf
        ahead = sum(len(queue) for each, queue in self._queues.items() if each >= priority)
        return (ahead + 1) * (self._held_s or 0.0) / self._limit.value

    def try_enter(self, now: float) -> Ticket | None:
        """A place, where one is free: then nobody waits for it."""
        if self.in_flight >= self._limit.value:
            return None
        self.in_flight += 1
        return Ticket(now)

    def enter(
        self, now: float, priority: int, wait_s: float, queue_max: int | None = None
    ) -> Ticket | Waiter | Full:
        """A place; else a place in the queue, for at most `wait_s`; else neither.

        `queue_max` is the newcomer's own bound, where it is lower than the limiter's.
        """
        ticket = self.try_enter(now)
        if ticket is not None:
            return ticket
        displaced = None
        if self.queued >= min(self._queue_max, self._queue_max if queue_max is None else queue_max):
            if not self.may_displace(priority):
                return Full.FULL
            displaced = self._youngest(min(self._queues))
            self._drop(displaced)
        self._order += 1
        waiter = Waiter(priority, now + wait_s, self._order, displaced=displaced)
        self._queues.setdefault(priority, {})[waiter.order] = waiter
        self.queued += 1
        return waiter

    def leave(self, now: float, ticket: Ticket, outcome: Outcome) -> list[Waiter]:
        """Give a place back; who gets one now. Giving it back again does nothing."""
        if not ticket.is_held:
            return []
        ticket.is_held = False
        self._limit.ended(now, outcome, ticket.began, self.in_flight)
        self.in_flight -= 1
        if outcome is not Outcome.OTHER:
            held_s = now - ticket.began
            before = held_s if self._held_s is None else self._held_s
            self._held_s = before + _EWMA_WEIGHT * (held_s - before)
        return self._admit(now) if self._queues else []

    def cancel(self, now: float, waiter: Waiter) -> list[Waiter]:
        """The caller waits no more. A place it was given meanwhile goes on to who is returned."""
        if waiter.ticket is not None:
            return self.leave(now, waiter.ticket, Outcome.OTHER)
        if waiter.order in self._queues.get(waiter.priority, {}):
            self._drop(waiter)
        return []

    def expire(self, now: float) -> list[Waiter]:
        """Drop those whose deadline has come, and return them."""
        late = [
            waiter
            for queue in self._queues.values()
            for waiter in queue.values()
            if waiter.deadline <= now
        ]
        for waiter in late:
            self._drop(waiter)
        return late

    def restart(self, now: float) -> list[Waiter]:
        """The rung comes back from being closed: its limit starts anew. Returns who is admitted."""
        self._limit.restart(now)
        return self._admit(now)

    def _admit(self, now: float) -> list[Waiter]:
        """Give free places away. One whose deadline has come and who was not expired takes part: it
        still waits, and serving it is better than the error it would get in the same moment.
        """
        admitted: list[Waiter] = []
        while self._queues and self.has_room():
            waiter = next(iter(self._queues[max(self._queues)].values()))
            self._drop(waiter)
            waiter.ticket = self.try_enter(now)
            admitted.append(waiter)
        return admitted

    def may_displace(self, priority: int) -> bool:
        """Whether a newcomer of this priority would push out a waiter of a lower one."""
        return bool(self._queues) and min(self._queues) < priority

    def _youngest(self, priority: int) -> Waiter:
        return next(reversed(self._queues[priority].values()))

    def _drop(self, waiter: Waiter) -> None:
        queue = self._queues[waiter.priority]
        del queue[waiter.order]
        if not queue:
            del self._queues[waiter.priority]
        self.queued -= 1
