"""The headers by which OpenAI's clients know how much of their rate is left.

`x-ratelimit-{limit,remaining,reset}-{requests,tokens}`; a duration is written as "6m0s".
"""

from __future__ import annotations

from router.core.accounts import Meter, window_end
from router.core.leases import Lease
from router.flow.purse import Purse


def rate_headers(purse: Purse, now_s: float) -> dict[str, str]:
    """Of the minute's limits of requests and tokens, where the key has any."""
    headers: dict[str, str] = {}
    if purse.requests is not None:
        _describe(headers, "requests", purse.requests, now_s)
    for lease in purse.tokens:
        if lease.account.meter is Meter.TOKENS_MINUTE:
            _describe(headers, "tokens", lease, now_s)
    return headers


def _describe(headers: dict[str, str], what: str, lease: Lease, now_s: float) -> None:
    # Before the store has answered, nothing of it is known to be used.
    left = lease.room + lease.free if lease.answered else lease.limit
    end = window_end(lease.account.meter, lease.account.window)
    headers[f"x-ratelimit-limit-{what}"] = str(lease.limit)
    headers[f"x-ratelimit-remaining-{what}"] = str(max(0, min(left, lease.limit)))
    headers[f"x-ratelimit-reset-{what}"] = _duration(max(0.0, (end or now_s) - now_s))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds, 3), 60)
    shown = f"{rest:.3f}".rstrip("0").rstrip(".")
    return f"{int(minutes)}m{shown}s" if minutes else f"{shown}s"
