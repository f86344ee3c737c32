"""The cache: whole chat answers and single vectors, in memory and behind it in the store.

Memory answers without awaiting; `second_tier.py` is asked for what it does not have. Answers and
vectors share the memory: each may use what the other leaves, and half of it is sure to each.

A rung's entries are one group, dropped together when another model turns out to be behind it. What
was asked before a drop is not kept after it, and an entry of the store that was made under another
revision than the one that is known now is not used: it may be from before a restart.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson

from router.core import cache_key
from router.core.byte_cache import BYTES_OBJECT_BYTES, ENTRY_BYTES, ByteCache, Counts
from router.core.cache_key import CacheControl
from router.flow.second_tier import SecondTier
from router.types import Call, ChatCall, EmbedCall, Json, Policy, Rung, Usage

_log = logging.getLogger("rungway")

# What a kept answer takes beside its body.
_ANSWER_BYTES = 400
# One entry must not empty the cache.
_ENTRIES_MIN = 16
_NEVER_S = float("-inf")


class Kept(NamedTuple):
    """A whole chat answer. `made_s` is in unix seconds, `nanousd` what it cost."""

    body: bytes
    rung: str
    usage: Usage | None
    made_s: float
    nanousd: int = 0


@dataclass(slots=True)
class Slot:
    """The place of one chat call in the cache, and what its `Cache-Control` allows. `asked_s`:
    when it was asked for, in unix seconds."""

    key: bytes
    control: CacheControl
    asked_s: float


@dataclass(frozen=True, slots=True)
class CacheRules:
    """[cache] of a configuration. `backends` says of each backend's name what it stands for."""

    chat: str
    is_shared: bool
    backends: Mapping[str, str]
    # What `core/cache_key.py` says of each of its ladders, so that a long one costs no call more.
    _ladders: dict[tuple[str, Policy], bytes] = field(default_factory=dict, init=False)

    def ladder_of(self, call: Call) -> bytes:
        """`call` is of this configuration."""
        key = (call.ladder.name, call.policy)
        found = self._ladders.get(key)
        if found is None:
            found = cache_key.ladder_of(call.ladder, call.policy, self.backends)
            self._ladders[key] = found
        return found

    def scope_of(self, call: Call) -> bytes:
        return cache_key.scope_of(call.key, shared=self.is_shared)


@dataclass(slots=True)
class TierCounts:
    """What the second tier did for one kind of entries."""

    hits: int = 0
    misses: int = 0
    saved_nanousd: int = 0


class Cache:
    """One process's. `clock` gives unix seconds, since other processes share the store.

    `tell` hears what the caches of other workers should know, to be given to their `hear`.
    """

    def __init__(
        self,
        memory_bytes_max: int,
        ttl_s: float,
        tier: SecondTier | None = None,
        clock: Callable[[], float] = time.time,
        tell: Callable[[Json], None] = lambda event: None,
    ) -> None:
        self._answers: ByteCache[Kept] = ByteCache(memory_bytes_max, ttl_s)
        self._vectors: ByteCache[bytes] = ByteCache(memory_bytes_max, ttl_s)
        self.tier = tier
        self.clock = clock
        self._tell = tell
        self._bytes_max = 0
        # When each rung's entries were dropped, and each backend's revision as far as it told one.
        self._dropped_s: dict[str, float] = {}
        self._revisions: dict[str, str] = {}
        self._tier_counts = {"chat": TierCounts(), "embeddings": TierCounts()}
        self.resize(memory_bytes_max, ttl_s)

    @property
    def is_on(self) -> bool:
        return self._bytes_max > 0

    def resize(self, memory_bytes_max: int, ttl_s: float) -> None:
        """With less memory the least worth goes at once; with none, everything."""
        self._bytes_max = memory_bytes_max
        for part in (self._answers, self._vectors):
            part.ttl_s = ttl_s
            part.entry_bytes_max = memory_bytes_max // _ENTRIES_MIN
            if not memory_bytes_max:
                part.clear()
            elif self._bytes() > memory_bytes_max:
                part.shrink(memory_bytes_max // 2, self.clock())

    def counts(self) -> dict[str, Counts]:
        return {"chat": self._answers.counts, "embeddings": self._vectors.counts}

    def tier_counts(self) -> dict[str, TierCounts]:
        return self._tier_counts

    # --- chat -----------------------------------------------------------------------------------

    def slot(self, call: ChatCall, control: CacheControl, rules: CacheRules) -> Slot | None:
        """None: this call's answer may neither be found nor kept."""
        if not self.is_on or control.no_store or not cache_key.may_cache(call.body, rules.chat):
            return None
        key = cache_key.of_chat(call.body, ladder=rules.ladder_of(call), scope=rules.scope_of(call))
        return None if key is None else Slot(key, control, self.clock())

    async def find(self, slot: Slot, *, in_memory: bool = False) -> Kept | None:
        """What is kept for this call; `in_memory`: the store need not be asked."""
        control = slot.control
        if control.no_cache:
            return None
        kept = self._answers.get(slot.key, self.clock(), control.max_age_s)
        if kept is not None or self.tier is None or in_memory:
            return kept
        counts, found = self._tier_counts["chat"], None
        if self.tier.contents.may_have(slot.key):
            (raw,) = await self.tier.ask((slot.key,))
            found = _read(raw)
        if found is None or not self._is_good(found, control):
            counts.misses += 1
            return None
        counts.hits += 1
        counts.saved_nanousd += found.nanousd
        kept = Kept(found.body, found.rung, found.usage, found.made_s, found.nanousd)
        self._remember(slot, kept, self.clock())
        return kept

    def keep(self, slot: Slot, rung: Rung, body: bytes, usage: Usage | None, nanousd: int) -> None:
        if slot.asked_s <= self._dropped_s.get(rung.name, _NEVER_S):
            return
        now_s = self.clock()
        kept = Kept(body, rung.name, usage, now_s, nanousd)
        self._remember(slot, kept, now_s)
        if self.tier is not None:
            counts = None
            if usage is not None:
                counts = [usage.input_tokens, usage.output_tokens, usage.estimated]
            entry = self._head(rung.name, kept.made_s, nanousd, counts) + body
            self.tier.write(slot.key, entry, rung.name, self._answers.ttl_s)

    def _remember(self, slot: Slot, kept: Kept, now_s: float) -> None:
        size = len(kept.body) + _ANSWER_BYTES
        self._make_room(self._answers, self._vectors, size)
        self._answers.put(
            slot.key,
            kept,
            size,
            made_s=kept.made_s,
            now_s=now_s,
            group=kept.rung,
            cost_nanousd=kept.nanousd,
        )

    # --- embeddings -----------------------------------------------------------------------------

    def input_keys(
        self, call: EmbedCall, control: CacheControl, rules: CacheRules
    ) -> list[bytes] | None:
        """The cache_key of each input; None: this call bypasses the cache."""
        if not self.is_on or control.no_store:
            return None
        return cache_key.of_inputs(
            call.inputs,
            space=rules.ladder_of(call),
            scope=rules.scope_of(call),
            dimensions=call.dimensions,
            extra=call.extra,
        )

    async def find_vectors(
        self, keys: Sequence[bytes], control: CacheControl
    ) -> list[bytes | None]:
        """The vector of each input that is known, in order."""
        if control.no_cache:
            return [None] * len(keys)
        found = self._vectors.get_each(keys, self.clock(), control.max_age_s)
        if self.tier is None or None not in found:
            return found
        may_have, counts = self.tier.contents.may_have, self._tier_counts["embeddings"]
        likely = []
        for index, vector in enumerate(found):
            if vector is None:
                if may_have(keys[index]):
                    likely.append(index)
                else:
                    counts.misses += 1
        if not likely:
            return found
        asked = await self.tier.ask([keys[index] for index in likely])
        for index, raw in zip(likely, asked, strict=True):
            kept = _read(raw)
            if kept is None or not _is_vector(kept.body) or not self._is_good(kept, control):
                counts.misses += 1
                continue
            counts.hits += 1
            counts.saved_nanousd += kept.nanousd
            found[index] = kept.body
            now_s = self.clock()
            self._remember_vector(
                keys[index], kept.body, kept.rung, kept.made_s, now_s, kept.nanousd
            )
        return found

    def keep_vectors(
        self,
        keys: Sequence[bytes],
        vectors: Sequence[bytes],
        rung: Rung,
        nanousd: int,
        asked_s: float,
    ) -> None:
        """Keep what was asked for at `asked_s`; an input that is there twice is kept once."""
        if asked_s <= self._dropped_s.get(rung.name, _NEVER_S):
            return
        made_s = self.clock()
        share = nanousd // max(1, len(keys))
        head = b"" if self.tier is None else self._head(rung.name, made_s, share)
        for key, vector in zip(keys, vectors, strict=True):
            if self._vectors.peek(key) is vector:
                # Another caller of the same request was here before.
                continue
            self._remember_vector(key, vector, rung.name, made_s, made_s, share)
            if self.tier is not None:
                self.tier.write(key, head + vector, rung.name, self._vectors.ttl_s)

    def _remember_vector(
        self, key: bytes, vector: bytes, rung: str, made_s: float, now_s: float, nanousd: int
    ) -> None:
        size = len(vector) + BYTES_OBJECT_BYTES
        self._make_room(self._vectors, self._answers, size)
        self._vectors.put(
            key,
            vector,
            size,
            made_s=made_s,
            now_s=now_s,
            group=rung,
            cost_nanousd=nanousd,
        )

    # --- both -----------------------------------------------------------------------------------

    def drop(self, *rungs: str) -> None:
        """Forget what these rungs answered, here and in the other workers: another model is behind
        them. The store forgets in the background.
        """
        if rungs:
            self._drop(rungs)
            self._tell({"rungs": list(rungs)})

    def hear(self, event: Json) -> None:
        """What another worker's cache dropped."""
        self._drop(event["rungs"])

    def _drop(self, rungs: Iterable[str]) -> None:
        for rung in rungs:
            self.drop_from_memory(rung)
            if self.tier is not None:
                self.tier.drop(rung)

    def drop_from_memory(self, rung: str) -> int:
        self._dropped_s[rung] = self.clock()
        return self._answers.drop(rung) + self._vectors.drop(rung)

    def note_revision(self, backend: str, revision: str, rungs: Iterable[str]) -> None:
        """What a backend says of its model; these rungs are the backend's."""
        before = self._revisions.get(backend)
        self._revisions[backend] = revision
        if before is not None and before != revision:
            _log.info("%s has another revision of its model: %s", backend, revision)
            self._drop(rungs)

    def groups(self) -> set[str]:
        """The rungs that have entries in memory."""
        return self._answers.groups() | self._vectors.groups()

    def _bytes(self) -> int:
        return self._answers.counts.bytes + self._vectors.counts.bytes

    def _make_room(self, part: ByteCache[Any], other: ByteCache[Any], size: int) -> None:
        """Let the part have what the other leaves, of which the other gives up what is beyond its
        half where the part has less than its own."""
        half = self._bytes_max // 2
        wanted, most = part.counts.bytes + size + ENTRY_BYTES, self._bytes_max - other.counts.bytes
        if most < half and wanted > most:
            other.shrink(self._bytes_max - min(half, wanted), self.clock())
        part.bytes_max = max(0, self._bytes_max - other.counts.bytes)

    def _head(self, rung: str, made_s: float, nanousd: int, usage: Any = None) -> bytes:
        revision = self._revisions.get(_backend(rung), "")
        return orjson.dumps([rung, made_s, revision, nanousd, usage]) + b"\n"

    def _is_good(self, entry: _Entry, control: CacheControl) -> bool:
        """Whether what the store has may be used now."""
        max_age_s = self._answers.ttl_s
        if control.max_age_s is not None:
            max_age_s = min(max_age_s, control.max_age_s)
        known = self._revisions.get(_backend(entry.rung), "")
        return (
            entry.made_s > self.clock() - max_age_s
            and entry.made_s > self._dropped_s.get(entry.rung, _NEVER_S)
            and (not known or not entry.revision or known == entry.revision)
        )


class _Entry(NamedTuple):
    """What the store has under one key."""

    rung: str
    made_s: float
    revision: str
    nanousd: int
    usage: Usage | None
    body: bytes


def _read(raw: bytes | None) -> _Entry | None:
    """None also where another version wrote something else there."""
    if raw is None:
        return None
    head, _, body = raw.partition(b"\n")
    try:
        rung, made_s, revision, nanousd, counts = orjson.loads(head)
        usage = None if counts is None else Usage(*counts)
        return _Entry(str(rung), float(made_s), str(revision), int(nanousd), usage, body)
    except (ValueError, TypeError):
        return None


def _is_vector(raw: bytes) -> bool:
    return bool(raw) and len(raw) % array("f").itemsize == 0


def _backend(rung: str) -> str:
    return rung.partition("/")[0]
