"""Retries on the same rung: when one is worth it, after how long, and who pays for it. Pure.

Why a budget and no number of tries for each call: with "three tries" a backend in trouble gets
three times its load at the very moment it can bear the least. A budget is a share of the traffic:
each first attempt on a rung deposits a fraction, each retry withdraws a whole. In good times every
rare failure finds a retry waiting; in a storm the retries stay that share, whatever the calls would
like. A small allowance a second lets a rung with little traffic retry at all, and the reserve is
bounded, so that a quiet day does not pay for an hour of storm.

Why seldom: a retry waits and asks who just failed, a later rung answers at once and is well. So the
same rung is asked again only when no later rung can be taken. The one exception is a kept
connection that the backend had closed before anything was sent on it: that says nothing of the
backend, and the call goes out again at once on a new one, still from the budget. A time limit that
passed is never retried: the patience is spent, and the work may still be going on upstream.
"""

from __future__ import annotations

from dataclasses import dataclass

from router.errors import ConnectFailed, UpstreamBusy, UpstreamError, UpstreamFailed

# Beyond this many doublings the cap holds in any case, and the power stays a number.
_DOUBLINGS_MAX = 30


@dataclass(frozen=True, slots=True)
class RetrySettings:
    """`share`: retries for each first attempt; `per_s`: the allowance; `reserve_max`: what can be
    saved up. `retry_after_s_max`: a longer wait that a backend asks for is left to the client.
    """

    share: float = 0.1
    per_s: float = 0.05
    reserve_max: float = 10.0
    backoff_base_s: float = 0.25
    backoff_cap_s: float = 5.0
    retry_after_s_max: float = 5.0


class RetryBudget:
    """The reserve of one rung.

    Invariant: retries never exceed `1 + share x calls + per_s x seconds`, over its whole life, and
    from any moment on `reserve_max` in place of the 1.
    """

    def __init__(self, settings: RetrySettings, now: float) -> None:
        self._settings = settings
        self._reserve = min(1.0, settings.reserve_max)
        self._at = now
        # Since the last look; the bound holds for all together as for one after the other.
        self._deposits = 0

    def deposit(self) -> None:
        """A first attempt was made on the rung."""
        self._deposits += 1

    def withdraw(self, now: float) -> bool:
        """Whether a retry may be made; it is paid for."""
        self._grow(now)
        if self._reserve < 1.0:
            return False
        self._reserve -= 1.0
        return True

    def _grow(self, now: float) -> None:
        settings = self._settings
        # A clock that stands still, or goes back, earns nothing.
        earned = settings.per_s * max(0.0, now - self._at) + settings.share * self._deposits
        self._at, self._deposits = max(self._at, now), 0
        self._reserve = min(settings.reserve_max, self._reserve + earned)


@dataclass(frozen=True, slots=True)
class Verdict:
    """`wait_s` seconds until the same rung is asked again; None: it is not. `reason` says why."""

    wait_s: float | None
    reason: str


def decide(
    error: UpstreamError,
    *,
    tries: int,
    has_next: bool,
    is_stale_connection: bool,
    left_s: float,
    settings: RetrySettings,
    budget: RetryBudget,
    now: float,
    rand: float,
) -> Verdict:
    """Whether to ask the same rung again after this error, before the commit.

    `tries` are those this call made on this rung so far (1 after the first), `has_next` says that a
    later rung could be taken now, `left_s` is what remains of the call's total time. The budget is
    asked last, so that only a retry that will be made is paid for. The caller still needs the
    breaker's and the limiter's leave when the wait is over.
    """
    if is_stale_connection and tries == 1:
        return _pay(0.0, "a kept connection had been closed", budget, now)
    if has_next:
        return Verdict(None, "the next rung can answer at once")
    if not _may_pass(error):
        return Verdict(None, f"{error.cause}: asking again would not help")
    wait_s = backoff_s(tries - 1, rand, settings.backoff_base_s, settings.backoff_cap_s)
    if error.retry_after_s is not None:
        if error.retry_after_s > settings.retry_after_s_max:
            return Verdict(None, f"it asks to wait {error.retry_after_s:g} s")
        # Not sooner than told; the jitter comes on top, or all who were told come back as one.
        wait_s += max(0.0, error.retry_after_s)
    if wait_s >= left_s:
        return Verdict(None, "no time is left to wait")
    return _pay(wait_s, f"{error.cause} may pass", budget, now)


def backoff_s(attempt: int, rand: float, base_s: float, cap_s: float) -> float:
    """Exponential with full jitter: anywhere from nothing to a ceiling that doubles each time."""
    return rand * min(cap_s, base_s * 2.0 ** min(attempt, _DOUBLINGS_MAX))


def _pay(wait_s: float, reason: str, budget: RetryBudget, now: float) -> Verdict:
    if not budget.withdraw(now):
        return Verdict(None, "the retry budget is used up")
    return Verdict(wait_s, reason)


def _may_pass(error: UpstreamError) -> bool:
    """Nothing was sent, or the backend itself says that it could not just now.

    A wait that it names with an error that closes the rung is the board's cool-down, not ours.
    """
    return error.cool_s is None and isinstance(error, ConnectFailed | UpstreamBusy | UpstreamFailed)
