"""Admission and settlement: a call is let in against its key's limits, and settled exactly once.

`admit` and `settle` are plain functions: nothing can cancel a call between its hold and its
settlement. This ledger keeps a key's limits of size and concurrency and counts what was used; money
and windows come to the same two verbs.
"""

from __future__ import annotations

from dataclasses import dataclass

from router.errors import RateLimited, TooLarge
from router.types import Key, Usage


@dataclass(slots=True)
class Hold:
    """What one call has set aside until it is settled."""

    key: Key
    is_settled: bool = False


@dataclass(slots=True)
class KeyTotals:
    """What a key has used since the start of the process."""

    requests: int = 0
    in_flight: int = 0
    input_tokens: int = 0
    output_tokens: int = 0


class Ledger:
    """One process's accounts by key name."""

    def __init__(self) -> None:
        self.totals: dict[str, KeyTotals] = {}

    def admit(self, key: Key, body_bytes: int) -> Hold:
        """Let a call of this size in. Raises TooLarge or RateLimited."""
        limits = key.limits
        if limits.max_input_bytes is not None and body_bytes > limits.max_input_bytes:
            raise TooLarge(
                f"the request has {body_bytes} bytes; the key {key.name!r} may send at most "
                f"{limits.max_input_bytes} (max_input_kib)"
            )
        totals = self.totals.setdefault(key.name, KeyTotals())
        if limits.concurrent is not None and totals.in_flight >= limits.concurrent:
            raise RateLimited(
                f"the key {key.name!r} has {totals.in_flight} calls in flight, its limit; "
                "wait until one has ended",
                retry_after_s=1.0,
            )
        totals.in_flight += 1
        totals.requests += 1
        return Hold(key)

    def settle(self, hold: Hold, usage: Usage | None) -> None:
        """Close the hold with what was really used."""
        assert not hold.is_settled, "a hold is settled once"
        hold.is_settled = True
        totals = self.totals[hold.key.name]
        totals.in_flight -= 1
        if usage is not None:
            totals.input_tokens += usage.input_tokens
            totals.output_tokens += usage.output_tokens
