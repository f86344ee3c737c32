"""Time limits by phase for one attempt, cheap enough to move at every event.

`asyncio.timeout` makes and drops a timer each time its deadline moves. Here the deadline is a
number, and one timer looks at it when it might be due and sets itself anew when it was not.
"""

from __future__ import annotations

import asyncio
import math
from types import TracebackType
from typing import Self

from router.errors import UpstreamTimeout


class Patience:
    """`with Patience(who) as patience: patience.wait("first_token", 10)`, around what awaits.

    When the current phase's limit passes, the block is cancelled and leaves with UpstreamTimeout.
    """

    def __init__(self, who: str) -> None:
        self._who = who
        self._phase = ""
        self._limit_s = math.inf
        self._deadline = math.inf
        self._expired = False
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None, "patience needs a task to cancel"
        self._task = task
        self._cancelling = task.cancelling()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        # As asyncio.timeout does: only our own cancellation becomes a time-out, and another that
        # came meanwhile goes before it.
        if not self._expired:
            return
        if self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise UpstreamTimeout(
                f"{self._who} passed its limit of {self._limit_s:g} s ({self._phase}_s)",
                phase=self._phase,
            ) from error

    def wait(self, phase: str, limit_s: float) -> None:
        """From now on the phase may last `limit_s` seconds."""
        self._phase, self._limit_s = phase, limit_s
        self._deadline = self._loop.time() + limit_s
        if self._timer is None:
            self._timer = self._loop.call_at(self._deadline, self._look)
        elif self._deadline < self._timer.when():
            self._timer.cancel()
            self._timer = self._loop.call_at(self._deadline, self._look)

    def pause(self) -> None:
        """No limit until the next `wait`: it is not the upstream that is waited for."""
        self._deadline = math.inf

    def _look(self) -> None:
        if self._loop.time() < self._deadline:
            due = min(self._deadline, self._loop.time() + self._limit_s)
            self._timer = self._loop.call_at(due, self._look)
            return
        self._expired = True
        self._task.cancel()
