"""The cache's second tier: the state's store, behind what memory has. A gain and never a need.

It is asked only for what it may have (`contents.py`), for at most `_ASK_S`, and is left alone for a
while once it failed or was too slow. What is kept is written in the background, a moment later and
many entries at a time. A group that was dropped is dropped from it as soon as it can be reached.
Where other hosts share the store, a mark tells them of the drop, since each has entries in its own
memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

from router.errors import StateUnavailable
from router.flow.contents import Contents
from router.flow.tasks import Tasks
from router.store.base import CacheStore

_log = logging.getLogger("rungway")

_ASK_S = 0.05
_AFTER_TROUBLE_S = 5.0
# Entries that wait to be written; more are kept in memory alone.
_WRITES_MAX = 4_096
_WRITTEN_AT_ONCE = 512
# How long what is to be written waits for more: an entry alone is three times the work.
_WRITE_EVERY_S = 0.5
# How often another host's drops are looked for, and for how long they can be seen.
_LOOK_EVERY_S = 5.0
_MARK_S = 3_600.0
_MARKS = ""


class SecondTier:
    """One process's way to it. `clock` gives unix seconds; `is_shared`: with other hosts."""

    def __init__(
        self,
        store: CacheStore,
        tasks: Tasks,
        clock: Callable[[], float],
        *,
        is_shared: bool,
        write_every_s: float = _WRITE_EVERY_S,
    ) -> None:
        self._store = store
        self.contents = Contents(store)
        self._tasks = tasks
        self._clock = clock
        self.is_shared = is_shared
        self._writes: dict[bytes, tuple[bytes, str, float]] = {}
        self._write_every_s = write_every_s
        self._writing: asyncio.Task[None] | None = None
        self._has_many = asyncio.Event()
        self._at_store = asyncio.Lock()
        self._owed_drops: dict[str, None] = {}
        self._dropping: asyncio.Task[None] | None = None
        self._asked_again_at = 0.0
        self._marks: dict[str, bytes | None] = {}
        self.writes_lost = 0

    async def ask(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """What is there for each key; None where it is not, or cannot be had quickly."""
        if self._clock() >= self._asked_again_at:
            try:
                async with asyncio.timeout(_ASK_S):
                    return await self._store.get_entries(keys)
            except (StateUnavailable, TimeoutError):
                self._asked_again_at = self._clock() + _AFTER_TROUBLE_S
        return [None] * len(keys)

    def write(self, key: bytes, value: bytes, group: str, ttl_s: float) -> None:
        """Write it soon."""
        if len(self._writes) >= _WRITES_MAX and key not in self._writes:
            self.writes_lost += 1
            return
        self._writes[key] = value, group, ttl_s
        self.contents.add(key)
        if len(self._writes) >= _WRITTEN_AT_ONCE:
            self._has_many.set()
        if self._writing is None or self._writing.done():
            self._writing = self._tasks.spawn(self._write_all(), "write the cache")

    def drop(self, group: str) -> None:
        """Drop what was put under this group, as soon as it can be."""
        self._writes = {key: one for key, one in self._writes.items() if one[1] != group}
        self._owed_drops[group] = None
        if self._dropping is None or self._dropping.done():
            self._dropping = self._tasks.spawn(self._drop_all(), "drop from the cache's store")

    async def flush(self, limit_s: float) -> None:
        """Let what waits be written; what is not by then is lost, and is asked for anew."""
        self._has_many.set()
        under_way = [task for task in (self._writing, self._dropping) if task is not None]
        if under_way:
            await asyncio.wait(under_way, timeout=limit_s)

    async def watch_forever(
        self, groups: Callable[[], Iterable[str]], dropped: Callable[[str], object]
    ) -> None:
        """Tell of each of these groups when another host drops it."""
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            await self.look(groups, dropped)

    async def look(
        self, groups: Callable[[], Iterable[str]], dropped: Callable[[str], object]
    ) -> None:
        names = list(groups())
        try:
            marks = await self._store.get_entries([_mark_key(name) for name in names])
        except StateUnavailable:
            return
        for name, mark in zip(names, marks, strict=True):
            if mark is not None and mark != self._marks.get(name):
                self._marks[name] = mark
                dropped(name)

    async def _write_all(self) -> None:
        while self._writes:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._write_every_s):
                    await self._has_many.wait()
            async with self._at_store:
                await self._write_some()
            if len(self._writes) < _WRITTEN_AT_ONCE:
                self._has_many.clear()

    async def _write_some(self) -> None:
        some = list(islice(self._writes.items(), _WRITTEN_AT_ONCE))
        batches: dict[tuple[str, float], list[tuple[bytes, bytes]]] = {}
        for key, (value, group, ttl_s) in some:
            del self._writes[key]
            batches.setdefault((group, ttl_s), []).append((key, value))
        try:
            for (group, ttl_s), entries in batches.items():
                await self._store.put_entries(entries, group=group, ttl_s=ttl_s)
        except StateUnavailable:
            self.writes_lost += len(some)

    async def _drop_all(self) -> None:
        while self._owed_drops:
            group = next(iter(self._owed_drops))
            del self._owed_drops[group]
            try:
                # What is on its way there now was made before.
                async with self._at_store:
                    await self._store.drop_entries(group)
                if self.is_shared:
                    mark = repr(self._clock()).encode()
                    self._marks[group] = mark
                    entry = (_mark_key(group), mark)
                    await self._store.put_entries([entry], group=_MARKS, ttl_s=_MARK_S)
            except StateUnavailable as error:
                _log.warning("what %s answered is not dropped from the store yet: %s", group, error)
                self._owed_drops[group] = None
                await asyncio.sleep(_AFTER_TROUBLE_S)


def _mark_key(group: str) -> bytes:
    return hashlib.sha256(b"dropped\n" + group.encode()).digest()
