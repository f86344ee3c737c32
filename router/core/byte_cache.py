"""A cache bounded in bytes: what is cheap to make again, large or long unused goes first.

The order is GreedyDual-Size-Frequency's: an entry's priority is the cache's floor plus its worth
(what it costs to make again, for each byte) for every use; the floor rises to the priority of what
was evicted last, so that what nobody asks for ages. The least of a few entries is evicted, not the
least of all: with eight looked at it is nearly the same, and a million entries cost no more than
ten. Time is an argument, in seconds of one clock; entries are as old as their `made_s` says.

The bound holds what Python takes for each entry too (`ENTRY_BYTES`), measured. Entries lie in
columns, not objects: a million objects would make each full garbage collection a pause.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

Value = TypeVar("Value")

# A key of 32 bytes with its row in the dict (at its emptiest, after it grew), the row's number, and
# its places in the columns: between 175 and 220 bytes measured, by how full the dict is.
ENTRY_BYTES = 224
# A bytes object beside its bytes, rounded up as the allocator does.
BYTES_OBJECT_BYTES = 48
# What an answer is worth that costs nothing to make again: it costs time.
_WORTH_NANOUSD_MIN = 1_000
# As many uses count: what was popular once must be able to age.
_USES_MAX = 16
# One entry must not empty the cache.
_SHARE_MAX = 8
_LOOKED_AT = 8
# Large steps, coprime to nearly every length: neighbours came together and are alike.
_STRIDE = 1_000_003
# Old and dropped entries that each new one clears out of the way.
_SWEPT = 2


@dataclass(slots=True)
class Counts:
    """What the cache did so far, and what it holds."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    expired: int = 0
    dropped: int = 0
    entries: int = 0
    bytes: int = 0
    saved_nanousd: int = 0


# One row of figures: what a hit reads and writes lies side by side in memory.
_MADE, _PRIORITY, _WORTH, _COST, _BYTES, _GROUP, _FIGURES = range(7)


class _Group:
    """What is dropped together; `place` is where it stands among the groups."""

    __slots__ = ("entries", "is_live", "name", "place")

    def __init__(self, place: int) -> None:
        self.entries = 0
        self.is_live = True
        self.name = ""
        self.place = place


class ByteCache(Generic[Value]):
    """`ttl_s` may be changed while it runs: ages are compared, not dates."""

    def __init__(self, bytes_max: int, ttl_s: float) -> None:
        self.bytes_max = bytes_max
        # Where the bound moves, one entry's share is of something else.
        self.entry_bytes_max: int | None = None
        self.ttl_s = ttl_s
        self.counts = Counts()
        self._rows: dict[bytes, int] = {}
        self._keys: list[bytes] = []
        self._values: list[Value] = []
        self._figures = array("d")
        self._groups: list[_Group] = []
        self._free_places: list[int] = []
        self._live: dict[str, _Group] = {}
        self._floor = 0.0
        self._hand = 0

    def __len__(self) -> int:
        return len(self._keys)

    def get(self, cache_key: bytes, now_s: float, max_age_s: float | None = None) -> Value | None:
        """The entry's value, where it is there and no older than that."""
        return self.get_each((cache_key,), now_s, max_age_s)[0]

    def get_each(
        self, cache_keys: Iterable[bytes], now_s: float, max_age_s: float | None = None
    ) -> list[Value | None]:
        """One value or None for each key, in order."""
        ttl_s = self.ttl_s if max_age_s is None else min(self.ttl_s, max_age_s)
        oldest_s = now_s - ttl_s
        row_of, values, groups, figures = self._rows.get, self._values, self._groups, self._figures
        floor = self._floor
        hits = 0
        saved = 0.0
        found: list[Value | None] = []
        for cache_key in cache_keys:
            row = row_of(cache_key)
            if row is None:
                found.append(None)
                continue
            at = row * _FIGURES
            if figures[at + _MADE] <= oldest_s or not groups[int(figures[at + _GROUP])].is_live:
                found.append(None)
                continue
            hits += 1
            saved += figures[at + _COST]
            priority, worth = figures[at + _PRIORITY], figures[at + _WORTH]
            most = floor + worth * _USES_MAX
            if priority < most:
                raised = (priority if priority > floor else floor) + worth
                figures[at + _PRIORITY] = raised if raised < most else most
            found.append(values[row])
        counts = self.counts
        counts.hits += hits
        counts.misses += len(found) - hits
        counts.saved_nanousd += int(saved)
        return found

    def peek(self, cache_key: bytes) -> Value | None:
        """What lies there, however old, without counting as a use."""
        row = self._rows.get(cache_key)
        return None if row is None else self._values[row]

    def put(
        self,
        cache_key: bytes,
        value: Value,
        value_bytes: int,
        *,
        made_s: float,
        now_s: float,
        group: str = "",
        cost_nanousd: int = 0,
    ) -> bool:
        """Keep it, in place of what was there; False where it is too large or too old for that.

        `value_bytes` is what the value takes in memory.
        """
        if cache_key in self._rows:
            self.remove(cache_key)
        size = value_bytes + ENTRY_BYTES
        oldest_s = now_s - self.ttl_s
        share = self.entry_bytes_max
        most = self.bytes_max // _SHARE_MAX if share is None else min(share, self.bytes_max)
        if size > most or made_s <= oldest_s:
            return False
        self._sweep(oldest_s)
        counts = self.counts
        while counts.bytes + size > self.bytes_max:
            self._evict(oldest_s)
        worth = (_WORTH_NANOUSD_MIN + cost_nanousd) / size
        live = self._live.get(group) or self._begin(group)
        live.entries += 1
        self._rows[cache_key] = len(self._keys)
        self._keys.append(cache_key)
        self._values.append(value)
        self._figures.fromlist([made_s, self._floor + worth, worth, cost_nanousd, size, live.place])
        counts.entries += 1
        counts.bytes += size
        return True

    def remove(self, cache_key: bytes) -> None:
        if (row := self._rows.get(cache_key)) is not None:
            self._remove(row)

    def drop(self, group: str) -> int:
        """Nothing that was put under this group is found any more; how many entries that were.

        At once, whatever their number: their bytes come back as new entries come.
        """
        gone = self._live.pop(group, None)
        if gone is None:
            return 0
        gone.is_live = False
        self.counts.dropped += gone.entries
        return gone.entries

    def groups(self) -> set[str]:
        """The groups that have entries."""
        return set(self._live)

    def shrink(self, bytes_max: int, now_s: float) -> None:
        """Evict until no more bytes than these are left."""
        while self.counts.bytes > max(0, bytes_max):
            self._evict(now_s - self.ttl_s)

    def clear(self) -> None:
        """Forget all entries; the counts of the past stay."""
        self.counts.entries = self.counts.bytes = 0
        self._rows, self._keys, self._values = {}, [], []
        self._figures = array("d")
        self._groups, self._free_places, self._live = [], [], {}

    def _begin(self, name: str) -> _Group:
        if self._free_places:
            group = self._groups[self._free_places.pop()]
            group.is_live = True
        else:
            group = _Group(len(self._groups))
            self._groups.append(group)
        group.name = name
        self._live[name] = group
        return group

    def _sweep(self, oldest_s: float) -> None:
        keys, figures, groups = self._keys, self._figures, self._groups
        for _ in range(_SWEPT):
            if not keys:
                return
            self._hand = row = (self._hand + 1) % len(keys)
            at = row * _FIGURES
            # Of no use any more: too old, or of a dropped group.
            if figures[at + _MADE] <= oldest_s or not groups[int(figures[at + _GROUP])].is_live:
                self._discard(row)

    def _evict(self, oldest_s: float) -> None:
        """Make room by one entry: one that is of no use any more, else the least worth."""
        length, figures, groups = len(self._keys), self._figures, self._groups
        row, least, least_priority = self._hand, -1, 0.0
        for _ in range(_LOOKED_AT):
            row = (row + _STRIDE) % length
            at = row * _FIGURES
            if figures[at + _MADE] <= oldest_s or not groups[int(figures[at + _GROUP])].is_live:
                self._hand = row
                self._discard(row)
                return
            priority = figures[at + _PRIORITY]
            if least < 0 or priority < least_priority:
                least, least_priority = row, priority
        self._hand = row
        self._floor = max(self._floor, least_priority)
        self.counts.evictions += 1
        self._remove(least)

    def _discard(self, row: int) -> None:
        if self._groups[int(self._figures[row * _FIGURES + _GROUP])].is_live:
            self.counts.expired += 1
        self._remove(row)

    def _remove(self, row: int) -> None:
        """Take the row out, and put the last one in its place: the columns have no holes."""
        keys, values, figures = self._keys, self._values, self._figures
        at, last = row * _FIGURES, len(keys) - 1
        self.counts.bytes -= int(figures[at + _BYTES])
        self.counts.entries -= 1
        self._leave(self._groups[int(figures[at + _GROUP])])
        del self._rows[keys[row]]
        key, value, moved = keys.pop(), values.pop(), figures[last * _FIGURES :]
        del figures[last * _FIGURES :]
        if row != last:
            self._rows[key] = row
            keys[row], values[row] = key, value
            figures[at : at + _FIGURES] = moved

    def _leave(self, group: _Group) -> None:
        """One entry of the group is gone; once all are, so is the group."""
        group.entries -= 1
        if group.entries:
            return
        if group.is_live:
            group.is_live = False
            del self._live[group.name]
        self._free_places.append(group.place)
