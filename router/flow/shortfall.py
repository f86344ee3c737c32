"""Why an account grants no more, in words for whoever it refuses."""

from __future__ import annotations

from datetime import UTC, datetime

from router.core import accounts
from router.core.accounts import Meter
from router.core.leases import Lease
from router.errors import BUDGET_IN_USE, QuotaUsedUp, RateLimited, RouterError, StateUnavailable
from router.types import Key

# What a refused caller is told to wait where the amount is only in the hands of other calls.
_IN_USE_S = 1.0


def unavailable(key: Key, trouble: str) -> StateUnavailable:
    """The store does not say what is left of the key's budgets."""
    return StateUnavailable(
        f"the limits of the key {key.name!r} cannot be counted now: {trouble}; "
        "the key itself is in order",
        retry_after_s=_IN_USE_S,
    )


def refused(key: Key, lease: Lease, amount: int, now_s: float, trouble: str) -> RouterError:
    """This lease does not grant the amount: it is used up until its window ends, or in use by
    others; or nobody knows, for the `trouble` with the store."""
    _, meter, start = lease.account
    settled = max(lease.settled, lease.spent)
    if trouble and settled + amount <= lease.limit:
        return unavailable(key, trouble)
    who = f"the key {key.name!r}"
    if meter is Meter.USD_TOTAL:
        who = f"the session of {who}"
    end = accounts.window_end(meter, start)
    opens_s = None if end is None else max(1.0, end - now_s)
    limit = _amount(meter, lease.limit)
    if meter is Meter.CONCURRENT:
        return RateLimited(
            f"{who} has {lease.limit} calls in flight, its limit; wait until one has ended",
            retry_after_s=_IN_USE_S,
        )
    if settled + amount <= lease.limit:
        return RateLimited(
            f"{who} has {limit} ({meter.value}), of which calls in flight hold too much "
            f"for this one ({_amount(meter, amount)}), here or in another process; "
            "try again in a second",
            code=BUDGET_IN_USE,
            retry_after_s=min(_IN_USE_S, opens_s or _IN_USE_S),
        )
    when = "" if end is None else f"; it opens again at {_utc(end)}"
    words = (
        f"{who} has used {_amount(meter, settled)} of its {limit} ({meter.value}), too much "
        f"for this call ({_amount(meter, amount)}){when}"
    )
    if meter in (Meter.REQUESTS_MINUTE, Meter.TOKENS_MINUTE):
        return RateLimited(words, retry_after_s=opens_s)
    return QuotaUsedUp(words, retry_after_s=opens_s)


def _amount(meter: Meter, amount: int) -> str:
    if meter in accounts.USD_METERS:
        return f"${accounts.shown_usd(amount)}"
    return str(amount)


def _utc(at: int) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
