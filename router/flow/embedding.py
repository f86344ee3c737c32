"""Embeddings on their way: what is known comes from the cache, the rest goes in shared requests.

`Vectors` lies between an embeddings call and its caller: the rungs are asked only for the inputs
that no cache had, and what comes back is put together at its own indexes. `Batches` puts what
several calls ask of one rung into few requests, each of which is one place on the rung's gate.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from router.backends.base import Backend, EmbedAttempt
from router.core import jsontext
from router.core.embeddings import estimate_tokens
from router.errors import RouterError
from router.flow.batcher import Batcher, Counts, Tab
from router.flow.cache import Cache
from router.flow.observe import Record
from router.flow.sink import Provenance, Sink
from router.types import Answer, EmbedCall, Embeddings, Usage

_ALL = ""
Put = Callable[[EmbedAttempt], Awaitable[Embeddings]]


class Vectors:
    """A sink for the vectors that were not known; `found` has None for each of them.

    `is_at_odds`: those known are not of one length with each other, or with what the rung answers
    now. Nothing was sent then: another model is behind a rung, and all inputs are to be asked for.
    """

    def __init__(
        self,
        sink: Sink,
        cache: Cache,
        call: EmbedCall,
        keys: Sequence[bytes],
        found: list[bytes | None],
        record: Record,
    ) -> None:
        self._sink = sink
        self._cache = cache
        self._found = found
        self._record = record
        self._missing: Sequence[int] = range(len(found))
        self._keys = keys
        self._lengths = {len(vector) for vector in found if vector is not None}
        if self._lengths:
            self._missing = [index for index, vector in enumerate(found) if vector is None]
            self._keys = [keys[index] for index in self._missing]
        self._call = call
        self._asked_s = cache.clock()
        self.is_at_odds = len(self._lengths) > 1
        record.inputs = len(found)
        record.cached_inputs = len(found) - len(self._missing)

    @property
    def rest(self) -> EmbedCall | None:
        """The call for what is missing; None: nothing is."""
        if len(self._missing) == len(self._found):
            return self._call
        inputs: list[Any] = [self._call.inputs[index] for index in self._missing]
        return replace(self._call, inputs=inputs) if inputs else None

    @property
    def is_committed(self) -> bool:
        return self._sink.is_committed

    @property
    def is_started(self) -> bool:
        return self._sink.is_started

    async def send_known(self) -> None:
        """Everything was known: nothing goes upstream, and nothing is paid."""
        self._record.cache, self._record.status = "hit", 200
        provenance = Provenance(None, 0, cost_nanousd=0)
        await self._sink.send_embeddings(self._joined(Embeddings([], Usage())), provenance)

    async def send_embeddings(self, answer: Embeddings, provenance: Provenance) -> None:
        if self._lengths - {len(answer.vectors[0])}:
            self.is_at_odds = True
            return
        if provenance.rung is not None:
            cost = provenance.cost_nanousd or 0
            self._cache.keep_vectors(
                self._keys, answer.vectors, provenance.rung, cost, self._asked_s
            )
        await self._sink.send_embeddings(self._joined(answer), provenance)

    async def send_answer(self, answer: Answer, provenance: Provenance) -> None:
        await self._sink.send_answer(answer, provenance)

    async def write(self, frames: bytes, provenance: Provenance) -> None:
        await self._sink.write(frames, provenance)

    def write_now(self, frames: bytes) -> bool:
        return self._sink.write_now(frames)

    async def comment(self, frame: bytes) -> None:
        await self._sink.comment(frame)

    async def end(self, frames: bytes, provenance: Provenance) -> None:
        await self._sink.end(frames, provenance)

    async def cut(self, frames: bytes, provenance: Provenance) -> bool:
        return await self._sink.cut(frames, provenance)

    async def fail(self, error: RouterError) -> None:
        await self._sink.fail(error)

    def when_left(self, act: Callable[[], None] | None) -> None:
        self._sink.when_left(act)

    def _joined(self, answer: Embeddings) -> Embeddings:
        """All vectors at their own index, and the tokens of all inputs."""
        if len(self._missing) == len(self._found):
            return answer
        vectors, usage = answer.vectors, answer.usage
        whole = list(self._found)
        for index, vector in zip(self._missing, vectors, strict=True):
            whole[index] = vector
        known: list[Any] = [
            self._call.inputs[index]
            for index, vector in enumerate(self._found)
            if vector is not None
        ]
        usage = Usage(usage.input_tokens + estimate_tokens(known), 0, estimated=True)
        return Embeddings([vector for vector in whole if vector is not None], usage)


class Batches:
    """The shared requests of this process."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher

    @property
    def counts(self) -> Counts:
        return self._batcher.counts

    @property
    def lanes(self) -> int:
        """How many lanes have something waiting or under way."""
        return len(self._batcher)

    def embed(
        self,
        backend: Backend,
        attempt: EmbedAttempt,
        cost: Callable[[Usage], int],
        put: Put,
        tab: Tab,
        *,
        is_shared: bool,
    ) -> Awaitable[Embeddings]:
        """The call's vectors. `put` puts one request upstream, `cost` is its price; what the call
        has to pay goes on the tab, also where it fails. `is_shared`: equal inputs of all keys
        travel once. Raises UpstreamError.
        """
        call = attempt.call

        def send(inputs: Any) -> Awaitable[Embeddings]:
            if inputs == call.inputs:
                return put(attempt)
            return put(replace(attempt, call=replace(call, inputs=inputs)))

        return self._batcher.embed(
            _lane(backend, attempt),
            call.key.name,
            call.inputs,
            backend.embed_limits,
            send,
            owner=_ALL if is_shared else (call.key.name, call.key.session),
            cost=cost,
            tab=tab,
        )


def _lane(backend: Backend, attempt: EmbedAttempt) -> tuple[Any, ...]:
    """All that must be equal for inputs to travel together."""
    call, key = attempt.call, attempt.call.key
    own = (key.token, key.bill_to) if backend.takes_key_tokens else ()
    extra = b""
    if call.extra:
        extra = jsontext.write([[name, call.extra[name]] for name in sorted(call.extra)])
    return attempt.rung.name, own, call.dimensions, call.is_tokens, extra
