"""Time limits by phase for one attempt, cheap enough to set for each call and move at each event.

A limit is a number that the loop's watch looks at: a call has no timer of its own.
"""

from __future__ import annotations

import asyncio
import math
from types import TracebackType
from typing import Self

from router.errors import UpstreamTimeout
from router.flow.watch import Watch


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
        watch = Watch.last
        if watch is None or watch.loop is not loop:
            watch = Watch.of(loop)
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
        task = self._task
        # A task that is cancelled keeps its frames, and they this object.
        del self._task
        # As asyncio.timeout does: only our own cancellation becomes a time-out, and another that
        # came meanwhile goes before it.
        if not self._has_expired:
            return
        if task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
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
