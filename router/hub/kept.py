"""One value fetched from outside and kept for a while.

A single fetch is under way at a time, and the old value outlives a failure.

Callers who come while it is being fetched wait for the same fetch. After a failure nobody asks
again for `_RETRY_S`, so that an upstream that hangs delays one caller and not each in turn.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from router.errors import UpstreamError

_RETRY_S = 5.0
Value = TypeVar("Value")


class Kept(Generic[Value]):
    """`fetch` may raise UpstreamError only; `clock` gives monotonic seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = asyncio.Lock()
        self._fetched_at = -math.inf
        self._failed_at = -math.inf
        self._failure: UpstreamError | None = None
        self._fetches = 0
        self.value: Value | None = None

    @property
    def is_fetching(self) -> bool:
        return self._lock.locked()

    def forget(self) -> None:
        """The next `get` fetches, whatever the age. The value stays for when that fails."""
        self._fetched_at = self._failed_at = -math.inf

    async def get(self, fetch: Callable[[], Awaitable[Value]], *, age_s_max: float) -> Value:
        """The value, no older than `age_s_max`. Raises UpstreamError; `value` may hold an old one.

        What was fetched while this call waited its turn is taken, however small `age_s_max` is.
        """
        if self.value is not None and self._clock() - self._fetched_at <= age_s_max:
            return self.value
        fetches = self._fetches
        async with self._lock:
            if self.value is not None and self._fetches != fetches:
                return self.value
            if self._failure is not None and self._clock() - self._failed_at <= _RETRY_S:
                raise self._failure.with_traceback(None)
            try:
                self.value = await fetch()
            except UpstreamError as error:
                self._failed_at, self._failure = self._clock(), error
                raise
            self._fetched_at, self._failure = self._clock(), None
            self._fetches += 1
            return self.value
