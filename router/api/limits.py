"""The headers by which OpenAI's clients know how much of their rate is left.

`x-ratelimit-{limit,remaining,reset}-{requests,tokens}`; a duration is written as "6m0s".
"""

from __future__ import annotations

from math import ceil

from router.core.accounts import Meter, window_end
from router.core.leases import Lease
from router.flow.purse import Purse


def rate_lines(purse: Purse, now_s: float) -> str:
    """Of the minute's limits of requests and tokens, where the key has any."""
    lines = ""
    if purse.requests is not None:
        lines = _described("requests", purse.requests, now_s)
    for lease in purse.tokens:
        if lease.account.meter is Meter.TOKENS_MINUTE:
            lines += _described("tokens", lease, now_s)
    return lines


def _described(what: str, lease: Lease, now_s: float) -> str:
    # Before the store has answered, nothing of it is known to be used.
    left = lease.room + lease.free if lease.answered else lease.limit
    left = 0 if left < 0 else min(left, lease.limit)
    end = window_end(lease.account.meter, lease.account.window)
    return (
        f"x-ratelimit-limit-{what}: {lease.limit}\r\n"
        f"x-ratelimit-remaining-{what}: {left}\r\n"
        f"x-ratelimit-reset-{what}: {_duration(end or now_s, now_s)}\r\n"
    )


def _duration(end_s: float, now_s: float) -> str:
    """Until then in whole seconds, never too few."""
    seconds = ceil(end_s - now_s) if end_s > now_s else 0
    return f"{seconds}s" if seconds < 60 else f"{seconds // 60}m{seconds % 60}s"
