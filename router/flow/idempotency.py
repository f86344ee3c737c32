"""An Idempotency-Key: the call under it is made once, however often it is asked for.

The first to come claims the name in the store, and its call is read to the end whoever leaves.
Repeats in this process follow that call; in others they wait for what it leaves. Another request
under the same name is refused. What failed is not kept: it runs anew, as it does after a crash. An
answer that the store cannot take is told again from here until it can.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import orjson

from router.errors import IdempotencyKeyReused, RateLimited, StateUnavailable
from router.flow.ledger import Ledger
from router.flow.observe import Observer, Record
from router.flow.sharing import Served, SharedSink, Sharing
from router.flow.sink import Provenance, Sink
from router.flow.tasks import Tasks
from router.store.base import AnswerStore, KeptAnswer
from router.types import Answer, Call, Embeddings, Rung, Usage

_log = logging.getLogger("rungway")

_KEPT_S = 86_400.0
# How often a process looks whether another one has the answer by now.
_LOOK_EVERY_S = 0.2
# Answers that wait for the store to take them; of more than these only the names are given up.
_LATE_MAX = 64
_LATE_AGAIN_S = 0.5
_LATE_AGAIN_S_MAX = 30.0

Run = Callable[[Sink, Record], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Again:
    """A request under an Idempotency-Key; `fingerprint` tells it from every other request."""

    name: str
    fingerprint: str


def fingerprint(route: str, body: bytes) -> str:
    return hashlib.sha256(route.encode() + b"\n" + body).hexdigest()


class Once:
    """`process` is the id that claims are made under."""

    def __init__(
        self, store: AnswerStore, ledger: Ledger, tasks: Tasks, observer: Observer, process: str
    ) -> None:
        self._store = store
        self._process = process
        self._sharing = Sharing(ledger, tasks, observer)
        self._tasks = tasks
        # The request under each name, as long as somebody waits for it or it is read to its end.
        self._under_way: dict[bytes, str] = {}
        self._working: set[bytes] = set()
        self._late: dict[bytes, KeptAnswer] = {}

    @property
    def draining(self) -> set[asyncio.Task[Any]]:
        return self._sharing.draining

    def end(self) -> None:
        """From now on calls end when their callers leave."""
        self._sharing.is_ending = True

    async def serve(self, call: Call, again: Again, sink: Sink, record: Record, run: Run) -> None:
        """Answer the call by `run`, by what it gave before, or by what it is giving now.

        Raises IdempotencyKeyReused, and StateUnavailable where the store cannot be asked.
        """
        owner = f"{call.key.name}~{call.key.session}" if call.key.session else call.key.name
        flight_key = _flight_key(owner, again)
        under_way = self._under_way.get(flight_key)
        if under_way not in (None, again.fingerprint):
            raise _reused()
        if flight_key in self._working and not self._sharing.has(flight_key):
            raise _later("its answer is too large to be followed from here")

        async def work(shared: SharedSink, own: Record) -> None:
            self._working.add(flight_key)
            task = asyncio.current_task()
            assert task is not None
            # Of a call whose callers have left, once its flight has ended; the others do it
            # themselves.
            task.add_done_callback(lambda _: self._forget(flight_key))
            try:
                await self._claim_and_run(owner, call, again, shared, own, run)
            finally:
                self._working.remove(flight_key)

        self._under_way[flight_key] = again.fingerprint
        try:
            if not await self._sharing.share(flight_key, call, sink, record, work, drains=True):
                raise _later("its answer cannot be told to several callers")
        finally:
            self._forget(flight_key)

    def _forget(self, flight_key: bytes) -> None:
        if flight_key not in self._working and not self._sharing.has(flight_key):
            self._under_way.pop(flight_key, None)

    async def _claim_and_run(
        self, owner: str, call: Call, again: Again, shared: SharedSink, own: Record, run: Run
    ) -> None:
        kept = await self._kept(owner, call, again)
        if kept is not None:
            own.cache = "hit"
            await _tell(kept, shared)
            return
        try:
            await run(shared, own)
        except BaseException:
            # Not awaited here: what ends this call may be the end of the process.
            self._tasks.spawn(self._drop(owner, again), "give up an Idempotency-Key")
            raise
        await self._keep(owner, again, shared.served)

    async def _kept(self, owner: str, call: Call, again: Again) -> KeptAnswer | None:
        """What was answered before; None: the name is ours now."""
        late = self._late.get(_flight_key(owner, again))
        if late is not None:
            if late.fingerprint != again.fingerprint:
                raise _reused()
            return late
        mine = KeptAnswer(again.fingerprint, self._process)
        try:
            async with asyncio.timeout(call.ladder.limits.total_s):
                while True:
                    there = await self._store.claim_answer(owner, again.name, mine, ttl_s=_KEPT_S)
                    if there is None:
                        return None
                    if there.fingerprint != again.fingerprint:
                        raise _reused()
                    if there.body is not None:
                        return there
                    # Another process makes it. There is no call of the store that waits.
                    await asyncio.sleep(_LOOK_EVERY_S)
        except TimeoutError:
            raise _later("another process makes its answer") from None

    async def _keep(self, owner: str, again: Again, served: Served | None) -> None:
        form = _written(again, self._process, served)
        try:
            await self._put(owner, again, form)
        except StateUnavailable as error:
            _log.error("an answer under an Idempotency-Key waits for the store: %s", error)
            if form is not None and len(self._late) < _LATE_MAX:
                self._late[_flight_key(owner, again)] = form
            self._tasks.spawn(self._put_late(owner, again), "keep an answer late")

    async def _put(self, owner: str, again: Again, form: KeptAnswer | None) -> None:
        if form is None:
            await self._store.drop_answer(owner, again.name, self._process)
        else:
            await self._store.keep_answer(owner, again.name, form, ttl_s=_KEPT_S)

    async def _put_late(self, owner: str, again: Again) -> None:
        """Otherwise other processes would wait for this one for as long as it lives."""
        flight_key, wait_s = _flight_key(owner, again), _LATE_AGAIN_S
        while True:
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, _LATE_AGAIN_S_MAX)
            if flight_key in self._working and flight_key not in self._late:
                # It runs anew, and leaves something itself.
                return
            with contextlib.suppress(StateUnavailable):
                await self._put(owner, again, self._late.get(flight_key))
                self._late.pop(flight_key, None)
                return

    async def _drop(self, owner: str, again: Again) -> None:
        try:
            await self._put(owner, again, None)
        except StateUnavailable as error:
            _log.error("the claim of an Idempotency-Key waits for the store: %s", error)
            await self._put_late(owner, again)


def _flight_key(owner: str, again: Again) -> bytes:
    return hashlib.sha256(f"{owner}\n{again.name}".encode()).digest()


def _later(why: str) -> RateLimited:
    words = f"the call under this Idempotency-Key is under way, and {why}; ask again later"
    return RateLimited(words, code="idempotency_key_in_use", retry_after_s=1.0)


def _reused() -> IdempotencyKeyReused:
    return IdempotencyKeyReused(
        "this Idempotency-Key was used with another request; send a new key with a new request"
    )


def _written(again: Again, process: str, served: Served | None) -> KeptAnswer | None:
    """None where the answer is too large to be kept whole."""
    if served is None or served.is_cut:
        return None
    rung = served.provenance.rung
    about = {"rung": "" if rung is None else rung.name}
    if served.provenance.clamped_to is not None:
        about["clamped"] = str(served.provenance.clamped_to)
    if served.answer is not None:
        body = served.answer.body
        about["form"] = "answer"
    elif served.embeddings is not None:
        vectors = served.embeddings.vectors
        about["form"], about["bytes"] = "vectors", str(len(vectors[0]))
        about["usage"] = orjson.dumps(
            [served.embeddings.usage.input_tokens, served.embeddings.usage.estimated]
        ).decode()
        body = b"".join(vectors)
    elif served.frames is not None:
        body = served.frames
        about["form"] = "stream"
    else:
        return None
    return KeptAnswer(again.fingerprint, process, body, 200, about)


async def _tell(kept: KeptAnswer, sink: Sink) -> None:
    """Tell what was kept once more; it costs nothing now."""
    assert kept.body is not None
    about, body = kept.headers, kept.body
    backend, _, model = about["rung"].partition("/")
    clamped = about.get("clamped")
    provenance = Provenance(
        Rung(backend, model) if backend else None,
        0,
        None if clamped is None else int(clamped),
        cost_nanousd=0,
    )
    if about["form"] == "answer":
        await sink.send_answer(Answer(body), provenance)
    elif about["form"] == "vectors":
        size = int(about["bytes"])
        tokens, estimated = orjson.loads(about["usage"])
        vectors = [body[at : at + size] for at in range(0, len(body), size)]
        await sink.send_embeddings(Embeddings(vectors, Usage(tokens, 0, estimated)), provenance)
    else:
        await sink.end(body, provenance)
