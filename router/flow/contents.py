"""Which entries the cache's store may have, so that nearly no miss asks it.

A filter of the keys (`core/key_filter.py`) is filled in the background, and follows what this and
other processes write: what another one wrote in the last half second may be taken for missing,
which is a call more upstream and no wrong answer. Until it is filled, and while the store does not
say what is new, everything may be there. What was deleted stays in the filter until it is made
anew, since a look in vain does no harm.
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
# 160 KB at first; 5 MB where the store is full of the smallest entries.
_KEYS_MIN = 1 << 17
_KEYS_MAX = 1 << 22


class Contents:
    """What one process knows of the store's entries."""

    def __init__(self, store: CacheStore) -> None:
        self._store = store
        self._filter = KeyFilter(_KEYS_MIN)
        self._place = ""
        self._is_known = False

    def may_have(self, cache_key: bytes) -> bool:
        """False: it is not there, or was not half a second ago."""
        return not self._is_known or self._filter.may_have(cache_key)

    def add(self, cache_key: bytes) -> None:
        """This process writes it."""
        self._filter.add(cache_key)

    async def follow_forever(self) -> None:
        while True:
            with contextlib.suppress(StateUnavailable):
                await self.follow()
            await asyncio.sleep(_LOOK_EVERY_S)

    async def follow(self) -> None:
        """Read all keys that are new. Raises StateUnavailable."""
        if self._filter.is_full:
            self._is_known = False
            self._filter, self._place = KeyFilter(_KEYS_MIN), ""
        try:
            while True:
                if await self._read_some():
                    break
                await asyncio.sleep(_PAUSE_S)
        except StateUnavailable:
            self._is_known = False
            raise
        self._is_known = True

    async def _read_some(self) -> bool:
        """Whether that was all."""
        is_first = not self._place
        part = await self._store.entry_keys(self._place, _KEYS_AT_ONCE)
        if is_first and part.entries * 2 > self._filter.keys_max:
            # Room for as many again before it is made anew.
            self._filter = KeyFilter(min(part.entries * 2, _KEYS_MAX))
        for cache_key in part.keys:
            self._filter.add(cache_key)
        self._place = part.place
        return part.is_all
