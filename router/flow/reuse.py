"""An answer that is there already, or on its way, is used again: kept, joined, or told once more.

The order for a call: its Idempotency-Key, the cache, an identical call in flight, its own climb.
Who climbs where others may join does it into a `SharedSink`, and goes on when its own client leaves
where the key drains, where an Idempotency-Key was given, or where somebody joined.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import orjson

from router.core import replay, sse
from router.core.cache_key import CacheControl
from router.errors import RouterError
from router.flow.cache import Cache, CacheRules, Kept, Slot
from router.flow.embedding import Vectors
from router.flow.idempotency import Again, Once
from router.flow.ledger import Ledger
from router.flow.observe import Observer, Record
from router.flow.sharing import KEPT_BYTES_MAX, Served, SharedSink, Sharing
from router.flow.sink import Provenance, Sink
from router.flow.tasks import Tasks
from router.types import Answer, Call, ChatCall, EmbedCall, Json, Rung, Usage

_ANY_AGE = CacheControl()
# Whose flight ended in a way that is not for it begins another, and then climbs by itself.
_FLIGHTS_MAX = 2
Climb = Callable[[Call, Sink, Record], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a request's headers ask for beside its body."""

    control: CacheControl = _ANY_AGE
    again: Again | None = None


class Reuse:
    """For the calls of all configurations of this process."""

    def __init__(
        self, cache: Cache, once: Once, ledger: Ledger, tasks: Tasks, observer: Observer
    ) -> None:
        self.cache = cache
        self._sharing = Sharing(ledger, tasks, observer)
        self._once = once

    @property
    def draining(self) -> set[asyncio.Task[Any]]:
        """Work that goes on for callers who have left."""
        return self._sharing.draining | self._once.draining

    def end(self) -> None:
        """From now on calls end when their callers leave."""
        self._sharing.is_ending = True
        self._once.end()

    def serve(
        self,
        call: Call,
        wishes: Wishes,
        rules: CacheRules,
        sink: Sink,
        record: Record,
        climb: Climb,
    ) -> Awaitable[None]:
        """Answer the call into the sink, by climbing only where nothing else answers it."""
        again = wishes.again
        if again is None:
            return self._serve(call, wishes, rules, sink, record, climb)

        def run(sink: Sink, record: Record) -> Awaitable[None]:
            return self._serve(call, wishes, rules, sink, record, climb)

        return self._once.serve(call, again, sink, record, run)

    async def _serve(
        self,
        call: Call,
        wishes: Wishes,
        rules: CacheRules,
        sink: Sink,
        record: Record,
        climb: Climb,
    ) -> None:
        if isinstance(call, EmbedCall):
            if not call.key.drains:
                await self._embed(call, wishes, rules, sink, record, climb)
                return

            def embed(sink: Sink, record: Record) -> Awaitable[None]:
                return self._embed(call, wishes, rules, sink, record, climb)

            key = call.id.encode()
            await self._sharing.share(key, call, sink, record, embed, drains=True)
            return
        slot = self.cache.slot(call, wishes.control, rules)
        if slot is None and not call.key.drains:
            await climb(call, sink, record)
            return
        flight_key = _flight_key(call, slot)
        if slot is not None:
            record.cache = "miss"
            # Whom one may join has asked the store, and found nothing.
            is_asked = self._sharing.has(flight_key)
            kept = await self.cache.find(slot, in_memory=is_asked)
            if kept is not None and await _tell(kept, call, sink, record):
                return
        await self._share(call, slot, flight_key, sink, record, climb)

    async def _embed(
        self,
        call: EmbedCall,
        wishes: Wishes,
        rules: CacheRules,
        sink: Sink,
        record: Record,
        climb: Climb,
    ) -> None:
        """Climb only for the inputs that are not known."""
        keys = self.cache.input_keys(call, wishes.control, rules)
        if keys is None:
            await climb(call, sink, record)
            return
        record.cache = "miss"
        found = await self.cache.find_vectors(keys, wishes.control)
        vectors = Vectors(sink, self.cache, call, keys, found, record)
        if not vectors.is_at_odds:
            rest = vectors.rest
            if rest is None:
                await vectors.send_known()
                return
            await climb(rest, vectors, record)
        if vectors.is_at_odds:
            self.cache.drop(*(rung.name for rung in call.ladder.rungs))
            unknown = Vectors(sink, self.cache, call, keys, [None] * len(keys), record)
            await climb(call, unknown, record)

    async def _share(
        self,
        call: ChatCall,
        slot: Slot | None,
        flight_key: bytes,
        sink: Sink,
        record: Record,
        climb: Climb,
    ) -> None:
        """Join an identical call in flight, or climb for whoever will join."""

        async def work(shared: SharedSink, own: Record) -> None:
            try:
                await climb(call, shared, own)
            except RouterError as error:
                if error.lacks_money:
                    # The payer's, and maybe not that of another key that shares its cache.
                    shared.keep_for_payer()
                raise
            if slot is not None and shared.served is not None:
                self._keep(slot, call, shared.served, own)

        drains = call.key.drains
        for _ in range(_FLIGHTS_MAX):
            if await self._sharing.share(flight_key, call, sink, record, work, drains=drains):
                return
            record.cache = "bypass" if slot is None else "miss"
        await climb(call, sink, record)

    def _keep(self, slot: Slot, call: ChatCall, served: Served, work: Record) -> None:
        """Keep what is complete, not shorter than was asked for because money was short, and an
        answer that its ladder wants: the last one of an escalation may be the best to be had now.
        """
        provenance = served.provenance
        if provenance.rung is None or provenance.is_short:
            return
        if all(attempt.cause for attempt in work.attempts):
            return
        body = served.answer.body if served.answer is not None else _whole(served.frames, work)
        if body is None or len(body) > KEPT_BYTES_MAX:
            return
        # A bound that the client did not set is a part of the answer only where it was reached.
        if provenance.clamped_to == call.clamped_to or not replay.is_cut(body):
            self.cache.keep(slot, provenance.rung, body, work.usage, work.nanousd)


def _flight_key(call: ChatCall, slot: Slot | None) -> bytes:
    """Streams and whole answers do not share a flight, nor do streams with and without usage."""
    if slot is None:
        return call.id.encode()
    return slot.key + bytes((call.stream, call.stream and call.wants_usage, slot.control.no_cache))


async def _tell(kept: Kept, call: ChatCall, sink: Sink, record: Record) -> bool:
    """Tell a kept answer as the call wants it; False where it cannot be."""
    backend, _, model = kept.rung.partition("/")
    rung = Rung(backend, model)
    provenance = Provenance(rung, 0, call.clamped_to, cost_nanousd=0)
    if not call.stream:
        record.cache, record.rung, record.status = "hit", rung, 200
        await sink.send_answer(Answer(kept.body, kept.usage), provenance)
        return True
    try:
        payloads = replay.payloads_of(orjson.loads(kept.body), include_usage=call.wants_usage)
    except ValueError:
        return False
    record.cache, record.rung, record.status = "hit", rung, 200
    await sink.end(b"".join(map(sse.frame, payloads)), provenance)
    return True


def _whole(frames: bytes | None, work: Record) -> bytes | None:
    """The whole answer that a stream's frames say; None where that would be a guess."""
    if frames is None:
        return None
    payloads = [
        line.removeprefix(b"data: ") for line in frames.split(b"\n\n") if line.startswith(b"data: ")
    ]
    try:
        answer = replay.whole_of(payloads)
    except ValueError:
        return None
    if answer is None:
        return None
    if answer.get("usage") is None and work.usage is not None:
        # The stream was not asked for it, and who is told the answer again may be.
        answer["usage"] = _usage_field(work.usage)
    return orjson.dumps(answer)


def _usage_field(usage: Usage) -> Json:
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
    }
