"""What budgets are counted in: meters, their windows in UTC, and exact money.

An *account* is one meter of one owner (a key or a session) in one window. Amounts are integers:
nano-dollars, tokens, requests or places. A price is in pico-dollars a token, since a nano-dollar is
too coarse for one: 0.0375 USD for a million tokens are 37,500 pico-dollars a token.
"""

from __future__ import annotations

import enum
from datetime import UTC, datetime
from typing import NamedTuple

from router.types import NANO_USD, Price

_PICO_A_NANO = 1_000
_MINUTE_S = 60
_DAY_S = 86_400


class Meter(enum.StrEnum):
    """What is limited. `USD_TOTAL` is a session's share, for its whole life."""

    USD_DAY = "usd_per_day"
    USD_MONTH = "usd_per_month"
    USD_TOTAL = "usd"
    TOKENS_MINUTE = "tokens_per_minute"
    TOKENS_DAY = "tokens_per_day"
    REQUESTS_MINUTE = "requests_per_minute"
    CONCURRENT = "concurrent"


USD_METERS = frozenset({Meter.USD_DAY, Meter.USD_MONTH, Meter.USD_TOTAL})
TOKEN_METERS = frozenset({Meter.TOKENS_MINUTE, Meter.TOKENS_DAY})
_MINUTES = frozenset({Meter.TOKENS_MINUTE, Meter.REQUESTS_MINUTE})
_DAYS = frozenset({Meter.USD_DAY, Meter.TOKENS_DAY})


class Account(NamedTuple):
    """`window` is the unix second at which it opened; 0 where the meter has no windows."""

    owner: str
    meter: Meter
    window: int


def window_start(meter: Meter, now_s: float) -> int:
    """The window that `now_s` (unix seconds) falls in."""
    now = int(now_s)
    if meter in _MINUTES:
        return now - now % _MINUTE_S
    if meter in _DAYS:
        return now - now % _DAY_S
    if meter is Meter.USD_MONTH:
        at = datetime.fromtimestamp(now, UTC)
        return int(datetime(at.year, at.month, 1, tzinfo=UTC).timestamp())
    return 0


def window_end(meter: Meter, start: int) -> int | None:
    """The unix second at which the next window opens; None for a meter without windows."""
    if meter in _MINUTES:
        return start + _MINUTE_S
    if meter in _DAYS:
        return start + _DAY_S
    if meter is Meter.USD_MONTH:
        at = datetime.fromtimestamp(start, UTC)
        year, month = (at.year + 1, 1) if at.month == 12 else (at.year, at.month + 1)
        return int(datetime(year, month, 1, tzinfo=UTC).timestamp())
    return None


def day_of(now_s: float) -> int:
    """The start of the UTC day, in unix seconds."""
    return int(now_s) - int(now_s) % _DAY_S


def cost(price: Price, input_tokens: int, output_tokens: int) -> int:
    """Nano-dollars, rounded up: a fraction is charged and never given away."""
    pico = price.input_picousd * input_tokens + price.output_picousd * output_tokens
    return -(-pico // _PICO_A_NANO)


def affordable(price: Price, nanousd: int, input_tokens: int) -> int | None:
    """How many output tokens that much money buys after the prompt; None: they cost nothing."""
    if price.output_picousd == 0:
        return None
    left = nanousd * _PICO_A_NANO - price.input_picousd * input_tokens
    return max(0, left) // price.output_picousd


def to_usd(nanousd: int) -> float:
    return nanousd / NANO_USD


def shown_usd(nanousd: int) -> str:
    """Exact, without an exponent and without trailing zeros: "0.0123"."""
    whole, rest = divmod(abs(nanousd), NANO_USD)
    text = f"{whole}.{rest:09d}".rstrip("0").rstrip(".")
    return f"-{text}" if nanousd < 0 else text
