"""One rung's gate: its breaker, its places and queue, its retry budget, and how it did of late.

The policies are `core`'s; here they get the clock, the dice, and a future for each waiter. All but
`enter` is synchronous, and `enter` decides again after it has waited.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from router.core.breaker import Breaker, BreakerSettings, Permit, State
from router.core.concurrency import AdaptiveLimit, ConcurrencySettings, Outcome
from router.core.limiter import Full, Limiter, Ticket, Waiter
from router.core.percentiles import Recent
from router.core.retry import RetryBudget, RetrySettings, Verdict, decide
from router.errors import (
    ConnectFailed,
    StaleConnection,
    UpstreamBroken,
    UpstreamBusy,
    UpstreamError,
    UpstreamFailed,
    UpstreamTimeout,
)
from router.types import Json

RETRIES = RetrySettings()
_BREAKER = BreakerSettings()
# A rung whose configuration names no limit has none until it says that it is busy.
_LIMIT_MAX = 4096
# A probe mostly tells within moments.
_PROBE_S = 1.0


class NotLetIn(Exception):
    """The gate is closed to this call; `cause` and `wait_s` are as a plan's."""

    def __init__(self, reason: str, cause: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.cause = cause
        self.wait_s = wait_s


@dataclass(slots=True)
class Place:
    """Leave for one attempt; given back by one of `Gate`'s three endings."""

    ticket: Ticket
    permit: Permit


class Gate:
    """`clock` gives monotonic seconds, `rand` numbers from 0 to 1.

    `tell` hears for how many seconds the breaker has opened, or None where it has closed.
    """

    def __init__(
        self,
        max_in_flight: int | None,
        queue_max: int,
        clock: Callable[[], float],
        rand: Callable[[], float],
        tell: Callable[[float | None], None] = lambda open_s: None,
    ) -> None:
        self._clock = clock
        self._rand = rand
        self._tell = tell
        limit_max = max_in_flight or _LIMIT_MAX
        # It starts at what it is said to bear, and falls from there: a burst is not to queue for a
        # limit that was only not found yet.
        settings = ConcurrencySettings(limit_first=limit_max)
        self._breaker = Breaker(_BREAKER)
        self._limiter = Limiter(AdaptiveLimit(settings, limit_max), queue_max)
        self._budget = RetryBudget(RETRIES, clock())
        self._first = Recent()
        self._total = Recent()
        self._waiting: dict[Waiter, asyncio.Future[None]] = {}

    @property
    def in_flight(self) -> int:
        return self._limiter.in_flight

    def closed(self) -> tuple[str, float] | None:
        """Why the breaker lets nobody through, and for how long still; None: it does."""
        now = self._clock()
        until = self._breaker.until(now)
        if until is None:
            return None
        if self._breaker.view(now) is State.HALF_OPEN:
            return "its breaker lets one probe through at a time, and one is under way", _PROBE_S
        wait_s = until - now
        return f"its breaker is open after failures, for {wait_s:.0f} s more", wait_s

    def full(self, priority: int, queue_max: int) -> str | None:
        """Why a call would neither get a place nor could wait for one; None: it would.

        `queue_max` is how long a queue its ladder lets it join.
        """
        limiter = self._limiter
        if limiter.has_room():
            return None
        may_join = limiter.queued < queue_max or limiter.may_displace(priority)
        if may_join and queue_max and limiter.expected_wait_s(priority) != math.inf:
            return None
        return f"{limiter.in_flight} calls are in flight, its limit, and {limiter.queued} wait"

    def has_room(self) -> bool:
        return self._limiter.has_room()

    @property
    def is_open(self) -> bool:
        """Whether a call would be let in at once, for certain."""
        return self._breaker.is_closed and self._limiter.has_room()

    def try_enter(self, *, is_retry: bool = False) -> Place | None:
        """A place, where there is one at once; else `enter` says what is to be done."""
        if not self._breaker.is_closed:
            return None
        now = self._clock()
        ticket = self._limiter.try_enter(now)
        if ticket is None:
            return None
        permit = self._breaker.enter(now)
        assert permit is not None, "a closed breaker lets everybody pass"
        if not is_retry:
            self._budget.deposit()
        return Place(ticket, permit)

    async def enter(
        self,
        priority: int,
        wait_s: float,
        *,
        queue_max: int | None = None,
        is_retry: bool = False,
    ) -> Place:
        """A place, after waiting for one for at most `wait_s`. Raises NotLetIn."""
        place = self.try_enter(is_retry=is_retry)
        if place is not None:
            return place
        if self._breaker.until(self._clock()) is not None:
            raise self._shut()
        if wait_s <= 0 and not self._limiter.has_room():
            raise NotLetIn(f"{self._limiter.in_flight} calls are in flight, its limit", "busy", 1.0)
        found = self._limiter.enter(self._clock(), priority, wait_s, queue_max)
        if isinstance(found, Full):
            raise NotLetIn("no place is free, and no room to wait for one", "busy", 1.0)
        ticket = await self._wait(found, wait_s) if isinstance(found, Waiter) else found
        permit = self._breaker.enter(self._clock())
        if permit is None:
            self._wake(self._limiter.leave(self._clock(), ticket, Outcome.OTHER))
            raise self._shut()
        if not is_retry:
            self._budget.deposit()
        return Place(ticket, permit)

    def spoke(self, place: Place) -> None:
        """The attempt has content: of a probe that is all that was asked."""
        if not self._breaker.is_closed:
            now = self._clock()
            if self._breaker.view(now) is State.HALF_OPEN:
                self._succeeded(place, now)

    def served(self, place: Place, first_token_s: float | None) -> None:
        """The attempt answered; `first_token_s` seconds to its first content, of a stream."""
        now = self._clock()
        self._total.answered(now, now - place.ticket.began)
        if first_token_s is not None:
            self._first.timed(now, first_token_s)
        if self._breaker.succeeded(place.permit, now):
            self._tell(None)
        woken = self._limiter.leave(now, place.ticket, Outcome.SERVED)
        if woken:
            self._wake(woken)

    def failed(self, place: Place, error: UpstreamError) -> None:
        """The attempt failed. A full rung is not a broken one, nor is one that refuses a call."""
        now = self._clock()
        self._total.ended(now, failed=counts(error) or isinstance(error, UpstreamBusy))
        if isinstance(error, UpstreamBusy | StaleConnection):
            # How much it bears is the limit's business, and says nothing of its health; nor does
            # a kept connection that it no longer wanted.
            self._breaker.cancelled(place.permit)
        elif counts(error):
            before = self._breaker.view(now)
            self._breaker.failed(place.permit, now, self._rand())
            if before is not State.OPEN and self._breaker.view(now) is State.OPEN:
                if before is State.CLOSED:
                    self._wake(self._limiter.restart(now))
                self._tell((self._breaker.until(now) or now) - now)
        else:
            # It answered, and that is what the breaker asks.
            self._succeeded(place, now)
        self._wake(self._limiter.leave(now, place.ticket, _outcome(error)))

    def left(self, place: Place) -> None:
        """The caller left, or the call's time was over: that says nothing of the rung."""
        self._breaker.cancelled(place.permit)
        self._wake(self._limiter.leave(self._clock(), place.ticket, Outcome.OTHER))

    def retry(self, error: UpstreamError, *, tries: int, has_next: bool, left_s: float) -> Verdict:
        """Whether this call may ask this rung again, and when."""
        return decide(
            error,
            tries=tries,
            has_next=has_next,
            is_stale_connection=isinstance(error, StaleConnection),
            left_s=left_s,
            settings=RETRIES,
            budget=self._budget,
            now=self._clock(),
            rand=self._rand(),
        )

    def reset(self) -> None:
        """What made it fail is mended: start afresh."""
        self._breaker.reset(self._clock())
        self._wake(self._limiter.restart(self._clock()))

    def follow(self, open_s: float | None) -> None:
        """Another worker's breaker of this rung opened for so long, or closed (None)."""
        now = self._clock()
        if open_s is None:
            self._breaker.follow(None, now)
            return
        was_closed = self._breaker.view(now) is State.CLOSED
        # Who opened it also probes it; the others wait a little longer to hear how that went.
        self._breaker.follow(now + open_s + _PROBE_S, now)
        if was_closed:
            self._wake(self._limiter.restart(now))

    def first_token_s(self) -> float | None:
        """The median of late; None: no stream was timed."""
        return self._first.quantile_s(self._clock(), 0.5)

    def row(self) -> Json:
        """The state, the places, and how it did in the last minutes, as numbers that add up."""
        now = self._clock()
        return {
            "state": self._breaker.view(now).value,
            "in_flight": self._limiter.in_flight,
            "limit": self._limiter.limit if self._limiter.limit < _LIMIT_MAX else None,
            "queued": self._limiter.queued,
            "first_token": self._first.window(now),
            "total": self._total.window(now),
        }

    def _succeeded(self, place: Place, now: float) -> None:
        if self._breaker.succeeded(place.permit, now):
            self._tell(None)

    async def _wait(self, waiter: Waiter, wait_s: float) -> Ticket:
        future = asyncio.get_running_loop().create_future()
        self._waiting[waiter] = future
        if waiter.displaced is not None:
            self._wake((waiter.displaced,))
        try:
            async with asyncio.timeout(wait_s):
                await future
        except TimeoutError:
            pass
        except asyncio.CancelledError:
            self._wake(self._limiter.cancel(self._clock(), waiter))
            raise
        finally:
            del self._waiting[waiter]
        if waiter.ticket is None:
            self._wake(self._limiter.cancel(self._clock(), waiter))
            raise NotLetIn(f"no place came free within {wait_s:g} s", "busy", 1.0)
        return waiter.ticket

    def _wake(self, waiters: Iterable[Waiter]) -> None:
        for waiter in waiters:
            future = self._waiting.get(waiter)
            if future is not None and not future.done():
                future.set_result(None)

    def _shut(self) -> NotLetIn:
        reason, wait_s = self.closed() or ("its breaker let another one through", _PROBE_S)
        return NotLetIn(reason, "breaker", wait_s)


def counts(error: UpstreamError) -> bool:
    """Whether the failure is the rung's own: not the caller's, nor a matter of load or rights."""
    if isinstance(error, StaleConnection):
        return False
    return isinstance(error, ConnectFailed | UpstreamTimeout | UpstreamFailed | UpstreamBroken)


def _outcome(error: UpstreamError) -> Outcome:
    if isinstance(error, UpstreamBusy):
        return Outcome.BUSY
    return Outcome.LATE if isinstance(error, UpstreamTimeout) else Outcome.OTHER
