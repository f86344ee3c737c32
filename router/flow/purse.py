"""What one key may spend in this process: its leases of the windows now open, and its rows.

A purse belongs to a key, or to one session of it: a session's calls count in its own share and in
its parent's budget. Amounts are whole nano-dollars, tokens, requests or places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from router.core.accounts import (
    TOKEN_METERS,
    USD_METERS,
    Account,
    Meter,
    day_of,
    window_end,
    window_start,
)
from router.core.leases import Lease
from router.store.base import RowKey, Totals
from router.types import Key, KeyLimits


class Row:
    """One line of usage, counted up by this process alone. Money is in nano-dollars."""

    __slots__ = (
        "estimated",
        "input_tokens",
        "key",
        "output_tokens",
        "overrun",
        "requests",
        "settled",
    )

    def __init__(self, key: RowKey) -> None:
        self.key = key
        self.requests = 0
        self.input_tokens = 0
        self.output_tokens = 0
        self.settled = 0
        self.overrun = 0
        self.estimated = 0

    def amounts(self) -> tuple[int, int, int, int, int, int, int]:
        """The fields of Totals; a process knows of no doubts of its own."""
        return (
            self.requests,
            self.input_tokens,
            self.output_tokens,
            self.settled,
            self.overrun,
            self.estimated,
            0,
        )

    def totals(self) -> Totals:
        return Totals(*self.amounts())


class Purse:
    """`money`, `tokens` and `gates` are the leases that a hold, and an admission, must pass."""

    __slots__ = (
        "concurrent",
        "day",
        "gates",
        "in_flight",
        "key",
        "money",
        "requests",
        "rows",
        "since",
        "tokens",
        "until",
        "used_at",
    )

    def __init__(self, key: Key) -> None:
        self.key = key
        self.since = 0
        self.until = 0.0
        self.day = 0
        self.in_flight = 0
        self.used_at = 0.0
        self.money: tuple[Lease, ...] = ()
        self.tokens: tuple[Lease, ...] = ()
        self.gates: tuple[Lease, ...] = ()
        self.requests: Lease | None = None
        self.concurrent: Lease | None = None
        self.rows: dict[tuple[str, str], Row] = {}

    def open(self, key: Key, now_s: float, lease: Callable[[Account, int], Lease]) -> None:
        """Take the leases of the windows that `now_s` (unix seconds) falls in."""
        self.close()
        self.key = key
        self.day = day_of(now_s)
        self.rows = {}
        starts, ends = [self.day], [float(self.day + 86_400)]
        found: dict[Meter, list[Lease]] = {}
        for owner, meter, limit in limits_of(key):
            start = window_start(meter, now_s)
            end = window_end(meter, start)
            if end is not None:
                starts.append(start)
                ends.append(float(end))
            found.setdefault(meter, []).append(lease(Account(owner, meter, start), limit))
        self.since, self.until = max(starts), min(ends)
        self.money = _of(found, USD_METERS)
        self.tokens = _of(found, TOKEN_METERS)
        self.requests = next(iter(found.get(Meter.REQUESTS_MINUTE, ())), None)
        self.concurrent = next(iter(found.get(Meter.CONCURRENT, ())), None)
        self.gates = tuple(one for one in (self.requests, self.concurrent) if one is not None)
        for one in self.leases():
            one.users += 1

    def close(self) -> None:
        """Let go of the leases, which may be forgotten then."""
        for one in self.leases():
            one.users -= 1

    def row(self, ladder: str, rung: str) -> Row | None:
        return self.rows.get((ladder, rung))

    def row_key(self, ladder: str, rung: str) -> RowKey:
        return RowKey(self.day, self.key.name, self.key.session, ladder, rung)

    def leases(self) -> tuple[Lease, ...]:
        return (*self.money, *self.tokens, *self.gates)


def limits_of(key: Key) -> list[tuple[str, Meter, int]]:
    """Owner, meter and limit of each account that a key's calls count in."""
    limits: KeyLimits = key.limits
    found = [
        (key.name, meter, limit)
        for meter, limit in (
            (Meter.USD_DAY, limits.usd_per_day),
            (Meter.USD_MONTH, limits.usd_per_month),
            (Meter.TOKENS_MINUTE, limits.tokens_per_minute),
            (Meter.TOKENS_DAY, limits.tokens_per_day),
            (Meter.REQUESTS_MINUTE, limits.requests_per_minute),
            (Meter.CONCURRENT, limits.concurrent),
        )
        if limit is not None
    ]
    if key.session and key.session_usd is not None:
        # As the store counts a session's rows (`terms.counted_in`); no key has such a name.
        found.append((key.session, Meter.USD_TOTAL, key.session_usd))
    return found


def _of(found: dict[Meter, list[Lease]], meters: Iterable[Meter]) -> tuple[Lease, ...]:
    return tuple(lease for meter in sorted(meters) for lease in found.get(meter, ()))
