"""Which entries the cache's store may have, so that nearly no miss asks it.

A filter of the keys (`core/key_filter.py`) is filled in the background, and follows what this and
other processes write: what another one wrote in the last second may be taken for missing,
which is a call more upstream and no wrong answer. Until it is filled, and while the store does not
say what is new, everything may be there. What was deleted stays in the filter, since a look in vain
does no harm, until it is full: then another is filled beside it, and takes its place.
"""

from __future__ import annotations

import asyncio
import contextlib

from router.core.key_filter import KeyFilter
from router.errors import StateUnavailable
from router.store.base import CacheStore

_LOOK_EVERY_S = 0.5
# A part is added without letting others have their turn: a third of a millisecond. Between parts of
# a long beginning there is a pause, so that a million entries cost calls nothing.
_KEYS_AT_ONCE = 256
_PAUSE_S = 0.01
# As many parts of the next filter are read after each look: one that is twice as full as it should
# be still keeps nine questions of ten from the store, so there is no hurry.
_PARTS_AT_ONCE = 20
# 640 KB at first; 10 MB where the store is full of the smallest entries.
_KEYS_MIN = 1 << 19
_KEYS_MAX = 1 << 23


class Contents:
    """What one process knows of the store's entries."""

    def __init__(self, store: CacheStore) -> None:
        self._store = store
        self._current = _Reading(store)
        self._coming: _Reading | None = None
        self._is_known = False

    def may_have(self, cache_key: bytes) -> bool:
        """False: it is not there, or was not a second ago."""
        return not self._is_known or self._current.filter.may_have(cache_key)

    def add(self, cache_key: bytes) -> None:
        """This process writes it."""
        self._current.filter.add(cache_key)
        if self._coming is not None:
            self._coming.filter.add(cache_key)

    async def follow_forever(self) -> None:
        while True:
            with contextlib.suppress(StateUnavailable):
                await self.follow()
            await asyncio.sleep(_LOOK_EVERY_S)

    async def follow(self) -> None:
        """Read all keys that are new, and a part of those for the next filter. Raises
        StateUnavailable."""
        try:
            while not await self._current.read(_PARTS_AT_ONCE):
                pass
        except StateUnavailable:
            self._is_known = False
            raise
        self._is_known = True
        if self._coming is None and self._current.filter.is_full:
            self._coming = _Reading(self._store)
        if self._coming is not None and await self._coming.read(_PARTS_AT_ONCE):
            self._current, self._coming = self._coming, None


class _Reading:
    """The store's keys, as far as they were read."""

    def __init__(self, store: CacheStore) -> None:
        self.filter = KeyFilter(_KEYS_MIN)
        self._store = store
        self._place = ""

    async def read(self, parts: int) -> bool:
        """Whether these were all. Raises StateUnavailable."""
        for _ in range(parts):
            if await self._read_part():
                return True
            await asyncio.sleep(_PAUSE_S)
        return False

    async def _read_part(self) -> bool:
        is_first = not self._place
        part = await self._store.entry_keys(self._place, _KEYS_AT_ONCE)
        if is_first and part.entries * 2 > self.filter.keys_max:
            # Room for as many again before it is full.
            self.filter = KeyFilter(min(part.entries * 2, _KEYS_MAX))
        for cache_key in part.keys:
            self.filter.add(cache_key)
        self._place = part.place
        return part.is_all
