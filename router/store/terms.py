"""What both engines hold to: how long things last, what a row counts in, how a record is written.

Pure but for `alive_s`. Nothing here knows an engine.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import NamedTuple

import orjson

from router.core.accounts import USD_METERS, Account, Meter, window_end, window_start
from router.core.leases import Ask
from router.store.base import AMOUNT_MAX, KeptAnswer, KeyRecord, RowKey, Totals

# How long a process may go on without the store. Longer than a failover or a restart of the store
# takes (10 to 20 s); short enough that the places of a dead host come back while callers still try.
LEASE_S = 30.0
# A process counts its lease from before it asked, the store from when it heard: both clocks may go
# differently by this much in one lease.
MARGIN_S = 5.0

# A minute's account is of no use once its calls are over; a longer one is kept for a week after its
# end, so that a clock which jumps ahead and back finds it again.
_MINUTE_KEPT_S = 3_600
_WINDOW_KEPT_S = 7 * 86_400
# Usage and the ids of processes that ended, as long as each other: an end that is said again after
# its id is forgotten would only bring rows that are forgotten too.
USAGE_KEPT_S = 400 * 86_400
PRUNE_EVERY_S = 60.0
PRUNE_ROWS_MAX = 2_000
# How much of a long message is done at once, before others have their turn.
END_BATCH = 1_000
SCRIPT_BATCH = 500
EXPIRED_KEPT_S = 86_400

CHANGED_KEYS_MAX = 1_000
FORGET_KEYS_MAX = 500

GROUPS = ("key", "ladder", "rung", "day")
# Their accounts can be counted from rows; a minute's and the places cannot.
_MINUTES = frozenset({Meter.TOKENS_MINUTE, Meter.REQUESTS_MINUTE})


class Bounds(NamedTuple):
    """How much the engine keeps of what it may forget."""

    answer_bytes_max: int = 8 << 20
    key_answers_bytes_max: int = 32 << 20
    key_answers_max: int = 10_000
    answers_bytes_max: int = 256 << 20
    cache_bytes_max: int = 512 << 20

    @property
    def entry_bytes_max(self) -> int:
        return self.cache_bytes_max // 8


def alive_s() -> float:
    """Seconds that go on while the machine sleeps and never jump: all its processes agree."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def is_silent(heard_at: float, now: float, lease_s: float) -> bool:
    """One that was heard of in the future was heard of before the machine started anew."""
    return heard_at > now + MARGIN_S or now - heard_at > lease_s + MARGIN_S


def counted_in(row: RowKey, delta: Totals) -> Iterator[tuple[Account, int]]:
    """The accounts that a growing row counts in, and by how much."""
    money = delta.settled + delta.in_doubt
    tokens = delta.input_tokens + delta.output_tokens
    if money:
        yield Account(row.key, Meter.USD_DAY, row.day), money
        yield Account(row.key, Meter.USD_MONTH, window_start(Meter.USD_MONTH, row.day)), money
        if row.session:
            yield Account(row.session, Meter.USD_TOTAL, 0), money
    if tokens:
        yield Account(row.key, Meter.TOKENS_DAY, row.day), tokens


def left_by(meter: str, granted: int, counted: int) -> int:
    """What a process that ended leaves counted in an account."""
    if meter in _MINUTES:
        return granted
    return 0 if meter == Meter.CONCURRENT else counted


def forgotten_at(account: Account) -> int:
    """When an account is of no use any more, in unix seconds; 0: never by itself."""
    end = window_end(account.meter, account.window)
    if end is None:
        return 0
    return end + (_MINUTE_KEPT_S if account.meter in _MINUTES else _WINDOW_KEPT_S)


def in_hands(lines: Iterable[tuple[str, str, str, int]]) -> dict[str, int]:
    """By key, from lines of process, key, meter and amount. One hold stands in several accounts of
    a key: the largest sum of a process says it once."""
    sums: dict[tuple[str, str, str], int] = {}
    for process, key, meter, amount in lines:
        if meter in USD_METERS:
            place = (process, key, meter)
            sums[place] = sums.get(place, 0) + amount
    most: dict[tuple[str, str], int] = {}
    for (process, key, _), amount in sums.items():
        most[process, key] = max(amount, most.get((process, key), 0))
    found: dict[str, int] = {}
    for (_, key), amount in most.items():
        found[key] = found.get(key, 0) + amount
    return found


def within(amount: int) -> int:
    return max(0, min(amount, AMOUNT_MAX))


def bounded(ask: Ask) -> Ask:
    return ask._replace(
        limit=within(ask.limit),
        spent=within(ask.spent),
        floor=within(ask.floor),
        need=within(ask.need),
    )


def check_group(group: Sequence[str]) -> None:
    wrong = [name for name in group if name not in GROUPS]
    if wrong:
        raise ValueError(f"usage is grouped by {', '.join(GROUPS)}; not by {', '.join(wrong)}")


def ends_at(record: KeyRecord) -> float:
    """When nobody can use the key any more; 0: not to be foreseen."""
    ends = [at for at in (record.expires_at, record.revoked_at) if at is not None]
    return min(ends, default=0.0)


def dump_record(record: KeyRecord) -> bytes:
    return orjson.dumps(asdict(record))


def load_record(text: bytes | str) -> KeyRecord:
    return KeyRecord(**orjson.loads(text))


def answer_bytes(answer: KeptAnswer) -> int:
    """About what it takes; the constant is for its names."""
    headers = sum(len(name) + len(value) for name, value in answer.headers.items())
    return len(answer.body or b"") + headers + 256
