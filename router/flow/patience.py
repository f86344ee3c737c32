"""Time limits by phase for one attempt, cheap enough to set for each call and move at each event.

A limit is a number, and one timer of the loop's looks at all of them (`_Watch`): a call has none of
its own. It looks when the first limit may have passed, and no sooner than `_LOOK_EACH_S` for each
of them after it last did, so that looking takes the loop about a hundredth of its time. That is how
late a limit is noticed at worst: 50 ms where ten thousand are waited for, a millisecond with few.
"""

from __future__ import annotations

import asyncio
import math
from types import TracebackType
from typing import ClassVar, Self

from router.errors import UpstreamTimeout

# To look at one limit takes some 50 ns.
_LOOK_EACH_S = 5e-6
_REST_S_MIN = 1e-3


class Patience:
    """`with Patience(who) as patience: patience.wait("first_token", 10)`, around what awaits.

    When the current phase's limit passes, the block is cancelled and leaves with UpstreamTimeout.
    """

    __slots__ = (
        "_cancelling",
        "_has_expired",
        "_limit_s",
        "_phase",
        "_task",
        "_watch",
        "_who",
        "deadline",
    )

    def __init__(self, who: str) -> None:
        self._who = who
        self._phase = ""
        self._limit_s = math.inf
        self._has_expired = False
        self.deadline = math.inf

    def __enter__(self) -> Self:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task(loop)
        assert task is not None, "patience needs a task to cancel"
        self._task = task
        self._cancelling = task.cancelling()
        watch = _Watch.last
        if watch is None or watch.loop is not loop:
            # A process has one loop, and tests have one after the other.
            watch = _Watch.last = _Watch(loop)
        self._watch = watch
        watch.patient.add(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._watch.patient.discard(self)
        # As asyncio.timeout does: only our own cancellation becomes a time-out, and another that
        # came meanwhile goes before it.
        if not self._has_expired:
            return
        if self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise UpstreamTimeout(
                f"{self._who} passed its limit of {self._limit_s:g} s ({self._phase}_s)",
                phase=self._phase,
            ) from error

    def wait(self, phase: str, limit_s: float) -> None:
        """From now on the phase may last `limit_s` seconds."""
        self._phase, self._limit_s = phase, limit_s
        watch = self._watch
        self.deadline = deadline = watch.loop.time() + limit_s
        if deadline < watch.looks_at:
            watch.look_by(deadline)

    def again(self) -> None:
        """The phase begins anew, without a pause since it began."""
        self.deadline = self._watch.loop.time() + self._limit_s

    def pause(self) -> None:
        """No limit until the next `wait`: it is not the upstream that is waited for."""
        self.deadline = math.inf

    def expire(self) -> None:
        """The limit has passed."""
        self._has_expired = True
        self._task.cancel()


class _Watch:
    """Looks after everybody who is `patient` on one loop, with one timer."""

    __slots__ = ("_rests_until", "_timer", "looks_at", "loop", "patient")

    last: ClassVar[_Watch | None] = None

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.patient: set[Patience] = set()
        self.looks_at = math.inf
        self._rests_until = -math.inf
        self._timer: asyncio.TimerHandle | None = None

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
