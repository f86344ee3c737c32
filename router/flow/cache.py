"""The cache: whole chat answers and single vectors, in memory and behind it in the store.

Memory answers without awaiting. The store is asked for what memory does not have, for at most
`_ASK_S`, and is left alone for a while once it failed: it is a gain and never a need. What is kept
is written to it in the background, a bounded number of entries at a time.

A group is what is dropped together when a rung turns out to have another model behind it.
"""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import orjson

from router.core import cache_key
from router.core.byte_cache import BYTES_OBJECT_BYTES, ByteCache, Counts
from router.core.cache_key import CacheControl
from router.errors import StateUnavailable
from router.flow.tasks import Tasks
from router.store.base import CacheStore
from router.types import Call, ChatCall, EmbedCall, Key, Rung, Usage

_log = logging.getLogger("rungway")

_ASK_S = 0.05
# The store is left alone for so long after it failed or was too slow.
_AFTER_TROUBLE_S = 5.0
# Entries that wait to be written to the store; more are kept in memory alone.
_WRITES_MAX = 4_096
_WRITTEN_AT_ONCE = 512
# What a kept answer takes beside its body.
_ANSWER_BYTES = 400


class Kept(NamedTuple):
    """A whole chat answer. `made_s` is in unix seconds."""

    body: bytes
    rung: str
    usage: Usage | None
    made_s: float


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of one chat call in the cache, and what its `Cache-Control` allows."""

    key: bytes
    control: CacheControl


@dataclass(frozen=True, slots=True)
class CacheRules:
    """[cache] of a configuration. `backends` says of each backend's name what it stands for."""

    chat: str
    is_shared: bool
    backends: Mapping[str, str]


class Cache:
    """One process's. `clock` gives unix seconds, since other processes share the store."""

    def __init__(
        self,
        memory_bytes_max: int,
        ttl_s: float,
        store: CacheStore,
        tasks: Tasks,
        clock: Callable[[], float],
    ) -> None:
        self._answers: ByteCache[Kept] = ByteCache(memory_bytes_max, ttl_s)
        self._vectors: ByteCache[bytes] = ByteCache(memory_bytes_max, ttl_s)
        self._store = store
        self._tasks = tasks
        self._clock = clock
        self._writes: list[tuple[bytes, bytes, str]] = []
        self._writing: asyncio.Task[None] | None = None
        self._store_after = 0.0
        self.writes_lost = 0
        self.resize(memory_bytes_max, ttl_s)

    @property
    def is_on(self) -> bool:
        return self._answers.bytes_max > 0

    def resize(self, memory_bytes_max: int, ttl_s: float) -> None:
        """Answers and vectors have half of it each."""
        for part in (self._answers, self._vectors):
            part.bytes_max, part.ttl_s = memory_bytes_max // 2, ttl_s

    def counts(self) -> dict[str, Counts]:
        return {"chat": self._answers.counts, "embeddings": self._vectors.counts}

    # --- chat -----------------------------------------------------------------------------------

    def slot(self, call: ChatCall, control: CacheControl, rules: CacheRules) -> Slot | None:
        """None: this call's answer may neither be found nor kept."""
        if not self.is_on or control.no_store or not cache_key.may_cache(call.body, rules.chat):
            return None
        key = cache_key.of_chat(call.body, ladder=_ladder(call, rules), scope=_scope(call, rules))
        return None if key is None else Slot(key, control)

    async def find(self, slot: Slot) -> Kept | None:
        control, now = slot.control, self._clock()
        if control.no_cache:
            return None
        kept = self._answers.get(slot.key, now, control.max_age_s)
        if kept is not None:
            return kept
        (raw,) = await self._ask((slot.key,))
        kept = _decoded(raw)
        if kept is None or kept.made_s <= now - (control.max_age_s or self._answers.ttl_s):
            return None
        self._remember(slot, kept, 0)
        return kept

    def keep(self, slot: Slot, rung: Rung, body: bytes, usage: Usage | None, nanousd: int) -> None:
        kept = Kept(body, rung.name, usage, self._clock())
        self._remember(slot, kept, nanousd)
        self._write(slot.key, _encoded(kept), rung.name)

    def _remember(self, slot: Slot, kept: Kept, nanousd: int) -> None:
        self._answers.put(
            slot.key,
            kept,
            len(kept.body) + _ANSWER_BYTES,
            made_s=kept.made_s,
            now_s=self._clock(),
            group=kept.rung,
            cost_nanousd=nanousd,
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
            space=_ladder(call, rules),
            scope=_scope(call, rules),
            dimensions=call.dimensions,
            extra=call.extra,
        )

    async def find_vectors(
        self, keys: Sequence[bytes], control: CacheControl
    ) -> list[bytes | None]:
        """The vector of each input that is known, in order."""
        if control.no_cache:
            return [None] * len(keys)
        now = self._clock()
        found = self._vectors.get_each(keys, now, control.max_age_s)
        missing = [index for index, vector in enumerate(found) if vector is None]
        if missing and control.max_age_s is None:
            asked = await self._ask([keys[index] for index in missing])
            for index, raw in zip(missing, asked, strict=True):
                kept = _vector_in(raw)
                if kept is not None:
                    vector, rung, made_s = kept
                    found[index] = vector
                    self._remember_vector(keys[index], vector, rung, made_s, 0)
        return found

    def keep_vectors(
        self, keys: Sequence[bytes], vectors: Sequence[bytes], rung: Rung, nanousd: int
    ) -> None:
        now = self._clock()
        share = nanousd // max(1, len(keys))
        head = orjson.dumps([rung.name, now]) + b"\n"
        for key, vector in zip(keys, vectors, strict=True):
            self._remember_vector(key, vector, rung.name, now, share)
            self._write(key, head + vector, rung.name)

    def _remember_vector(
        self, key: bytes, vector: bytes, rung: str, made_s: float, nanousd: int
    ) -> None:
        self._vectors.put(
            key,
            vector,
            len(vector) + BYTES_OBJECT_BYTES,
            made_s=made_s,
            now_s=self._clock(),
            group=rung,
            cost_nanousd=nanousd,
        )

    # --- both -----------------------------------------------------------------------------------

    def drop(self, rung: str) -> int:
        """Forget what this rung answered: another model is behind it. Entries in memory that were.

        The store forgets in the background.
        """
        gone = self._answers.drop(rung) + self._vectors.drop(rung)
        self._writes = [one for one in self._writes if one[2] != rung]
        self._tasks.spawn(self._drop_in_store(rung), f"drop what {rung} answered")
        return gone

    async def _drop_in_store(self, rung: str) -> None:
        try:
            await self._store.drop_entries(rung)
        except StateUnavailable as error:
            _log.error("what %s answered could not be dropped from the store: %s", rung, error)

    async def _ask(self, keys: Sequence[bytes]) -> list[bytes | None]:
        if self._clock() >= self._store_after:
            try:
                async with asyncio.timeout(_ASK_S):
                    return await self._store.get_entries(keys)
            except (StateUnavailable, TimeoutError):
                self._store_after = self._clock() + _AFTER_TROUBLE_S
        return [None] * len(keys)

    def _write(self, key: bytes, value: bytes, group: str) -> None:
        if len(self._writes) >= _WRITES_MAX:
            self.writes_lost += 1
            return
        self._writes.append((key, value, group))
        if self._writing is None or self._writing.done():
            self._writing = self._tasks.spawn(self._write_all(), "write the cache")

    async def _write_all(self) -> None:
        while self._writes:
            some, self._writes = self._writes[:_WRITTEN_AT_ONCE], self._writes[_WRITTEN_AT_ONCE:]
            groups: dict[str, list[tuple[bytes, bytes]]] = {}
            for key, value, group in some:
                groups.setdefault(group, []).append((key, value))
            try:
                for group, entries in groups.items():
                    await self._store.put_entries(entries, group=group, ttl_s=self._answers.ttl_s)
            except StateUnavailable:
                self.writes_lost += len(some)


def _scope(call: Call, rules: CacheRules) -> bytes:
    key: Key = call.key
    return cache_key.scope_of(key, shared=rules.is_shared)


def _ladder(call: Call, rules: CacheRules) -> bytes:
    return cache_key.ladder_of(call.ladder, call.policy, rules.backends)


def _encoded(kept: Kept) -> bytes:
    usage = kept.usage
    counts = None if usage is None else [usage.input_tokens, usage.output_tokens, usage.estimated]
    return orjson.dumps([kept.rung, kept.made_s, counts]) + b"\n" + kept.body


def _decoded(raw: bytes | None) -> Kept | None:
    """None also where another version wrote something else there."""
    if raw is None:
        return None
    head, _, body = raw.partition(b"\n")
    try:
        rung, made_s, counts = orjson.loads(head)
        usage = None if counts is None else Usage(*counts)
        return Kept(body, str(rung), usage, float(made_s))
    except (ValueError, TypeError):
        return None


def _vector_in(raw: bytes | None) -> tuple[bytes, str, float] | None:
    if raw is None:
        return None
    head, _, vector = raw.partition(b"\n")
    try:
        rung, made_s = orjson.loads(head)
        if not vector or len(vector) % array("f").itemsize:
            return None
        return vector, str(rung), float(made_s)
    except (ValueError, TypeError):
        return None
