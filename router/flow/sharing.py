"""One call's work apart from its callers: it may go on when they leave, and answer several of them.

The pipeline climbs into a `SharedSink`, which lies between the work and the seats of a flight
(`single_flight.py`); `follow` carries what comes there to one caller's own sink. So a call is read
to its end for a cache, for a key that drains, or for an Idempotency-Key, whoever still listens.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from router.errors import InternalFault, RouterError, UpstreamBroken
from router.flow.ledger import Admission, Ledger
from router.flow.observe import Observer, Record
from router.flow.single_flight import Flight, GoAlone, Seat, SingleFlight
from router.flow.sink import Provenance, Sink
from router.flow.tasks import Tasks
from router.types import Answer, Call, Embeddings

# A larger answer is neither kept nor told again.
KEPT_BYTES_MAX = 1 << 20
# How long work that nobody wants any more may take to settle what it used.
_SETTLE_S = 1.0


class Served(NamedTuple):
    """How the work ended well: a whole answer, or the stream's last frames. `frames` are all of a
    stream's but those, None where they are too many to keep."""

    provenance: Provenance
    answer: Answer | None = None
    embeddings: Embeddings | None = None
    last_frames: bytes = b""
    frames: bytes | None = None
    is_cut: bool = False


@dataclass(slots=True)
class Payer:
    """Who pays for the work now. `record` is the work's own: of its attempts and what they used."""

    admission: Admission
    ladder: str
    record: Record | None = None


def hand_over(ledger: Ledger) -> Callable[[Payer, Payer], bool]:
    """Passes the holds of a call to another one that takes part in it."""

    def pass_on(old: Payer, new: Payer) -> bool:
        if not ledger.hand_over(old.admission, new.admission):
            return False
        new.record = old.record
        if new.record is not None:
            new.record.admission = new.admission
        return True

    return pass_on


class SharedSink:
    """Where the work of a flight puts its answer. What is written is content: it commits.

    An answer that the payer's budget made shorter is for the payer, and one that two rungs gave
    together is not kept.
    """

    def __init__(self, flight: SharedFlight, kept_bytes_max: int) -> None:
        self._flight = flight
        self._kept: list[bytes] | None = []
        self._kept_bytes = 0
        self._kept_bytes_max = kept_bytes_max
        self.served: Served | None = None
        self.provenance: Provenance | None = None
        self.is_committed = False
        self.cut_frames = b""

    @property
    def is_started(self) -> bool:
        # What goes wrong is raised to the seats, and each tells its own client.
        return False

    async def send_answer(self, answer: Answer, provenance: Provenance) -> None:
        self._begin(provenance)
        self.served = Served(provenance, answer)

    async def send_embeddings(self, answer: Embeddings, provenance: Provenance) -> None:
        self._begin(provenance)
        self.served = Served(provenance, embeddings=answer)

    async def write(self, frames: bytes, provenance: Provenance) -> None:
        self._begin(provenance)
        self._keep(frames)
        await self._flight.write(frames)

    def write_now(self, frames: bytes) -> bool:
        # The seats are to be asked who waits for it.
        return False

    async def comment(self, frame: bytes) -> None:
        with contextlib.suppress(ConnectionError):
            # A client that has left is its own task's matter.
            await self._flight.tell(frame)

    async def end(self, frames: bytes, provenance: Provenance) -> None:
        self._begin(provenance)
        self._keep(frames)
        kept = None if self._kept is None else b"".join(self._kept)
        self.served = Served(provenance, last_frames=frames, frames=kept)

    async def cut(self, frames: bytes, provenance: Provenance) -> bool:
        self.cut_frames = frames
        self._kept = None
        return self._flight.cut_payer()

    async def fail(self, error: RouterError) -> None:
        raise error

    def when_left(self, act: Callable[[], None] | None) -> None:
        """Who leaves a flight is its own task's matter, and not the work's."""

    def keep_for_payer(self) -> None:
        """What comes now is for nobody else."""
        self._flight.send_others_away()

    def _begin(self, provenance: Provenance) -> None:
        self.is_committed = True
        before, self.provenance = self.provenance, provenance
        if before is None:
            if provenance.is_short:
                self.keep_for_payer()
        elif before is not provenance and before.rung != provenance.rung:
            self._kept = None

    def _keep(self, frames: bytes) -> None:
        if self._kept is None:
            return
        self._kept.append(frames)
        self._kept_bytes += len(frames)
        if self._kept_bytes > self._kept_bytes_max:
            self._kept = None


SharedFlight = Flight[Payer, Served]
SharedSeat = Seat[Payer, Served]


Work = Callable[[SharedSink, Record], Awaitable[None]]


class Sharing:
    """The flights of one kind, and what goes on in them for nobody."""

    def __init__(self, ledger: Ledger, tasks: Tasks, observer: Observer) -> None:
        self._ledger = ledger
        self._tasks = tasks
        self._observer = observer
        self._flights: SingleFlight[Payer, Served] = SingleFlight(tasks, hand_over(ledger))
        self.draining: set[asyncio.Task[Any]] = set()
        # Nothing more is read for those who have left.
        self.is_ending = False

    def has(self, flight_key: bytes) -> bool:
        """Whether a flight of this key may be joined."""
        return flight_key in self._flights

    async def share(
        self,
        flight_key: bytes,
        call: Call,
        sink: Sink,
        record: Record,
        work: Work,
        *,
        drains: bool,
    ) -> bool:
        """Join the flight of this key, or begin it with `work`, and carry its answer to the sink.

        False, and nothing was sent: what comes of it is not for this call. `drains`: it is read to
        its end when its callers have left.
        """
        assert record.admission is not None
        own = Record(record.call_id, record.route, admission=record.admission, cache=record.cache)
        own.of_call(call)
        payer = Payer(record.admission, call.ladder.name, own)

        async def work_for_all(flight: SharedFlight) -> Served | None:
            shared = SharedSink(flight, KEPT_BYTES_MAX)
            flight.notes = shared
            await work(shared, own)
            return shared.served

        with self._flights.board(flight_key, payer, work_for_all) as seat:
            if not seat.is_payer:
                record.cache, payer.record = "joined", None
            try:
                await follow(seat, sink, record)
            except GoAlone:
                if sink.is_committed:
                    words = "the call that this one had joined ended in a way that is not for it"
                    raise UpstreamBroken(words) from None
                return False
            except (asyncio.CancelledError, ConnectionError):
                if drains and seat.is_payer and not self.is_ending:
                    self._drain(seat, payer, record)
                elif seat.is_alone:
                    await seat.stop(_SETTLE_S)
                raise
            finally:
                _absorb(seat, record)
        return True

    def _drain(self, seat: SharedSeat, payer: Payer, record: Record) -> None:
        """Read the rest for nobody: whoever pays has left."""
        payer.admission.parts += 1
        rest = seat.stay(payer)
        record.goes_on = True

        async def read() -> None:
            with rest:
                try:
                    await rest.result()
                except (GoAlone, RouterError):
                    # It failed, or somebody else pays for it now: nobody is left to be told.
                    return
                except asyncio.CancelledError:
                    if rest.is_alone:
                        await rest.stop(_SETTLE_S)
                    raise
                finally:
                    self._ledger.leave(payer.admission, payer.ladder)
                    _absorb(rest, record)
                    self._observer.record(record)

        task = self._tasks.spawn(read(), "read an answer to its end")
        self.draining.add(task)
        task.add_done_callback(self.draining.discard)


async def follow(seat: SharedSeat, sink: Sink, record: Record) -> None:
    """Carry a flight's answer to this caller. Raises what the work raised, and GoAlone where the
    rest is not for this call.
    """
    seat.hears = sink.comment
    while frames := await seat.read():
        seat.hears = None
        _note(seat, record)
        await sink.write(b"".join(frames), _told(seat, _shared(seat).provenance))
    if seat.is_cut:
        shared = _shared(seat)
        provenance = _told(seat, shared.provenance)
        record.rung, record.status = provenance.rung, 200
        await sink.end(shared.cut_frames, provenance)
        await seat.settled(_SETTLE_S)
        return
    served = await seat.result()
    _note(seat, record)
    provenance = _told(seat, served.provenance)
    record.rung, record.status = provenance.rung, 200
    if served.answer is not None:
        await sink.send_answer(served.answer, provenance)
    elif served.embeddings is not None:
        await sink.send_embeddings(served.embeddings, provenance)
    else:
        await sink.end(served.last_frames, provenance)


def _absorb(seat: SharedSeat, record: Record) -> None:
    """What the work used belongs to the call that paid for it in the end."""
    work = seat.payer.record
    if seat.is_over and seat.is_payer and work is not None:
        record.absorb(work)


def _note(seat: SharedSeat, record: Record) -> None:
    """What the work found out about the cache, for the headers of the one who pays for it."""
    work = seat.payer.record
    if seat.is_payer and work is not None:
        record.cache = work.cache
        record.inputs, record.cached_inputs = work.inputs, work.cached_inputs


def _shared(seat: SharedSeat) -> SharedSink:
    shared = seat.notes
    assert isinstance(shared, SharedSink), "the work of a flight begins with its sink"
    return shared


def _told(seat: SharedSeat, provenance: Provenance | None) -> Provenance:
    """The same for one who pays for it, and for one who does not."""
    if provenance is None:
        raise InternalFault("an answer came from nowhere")
    return provenance if seat.is_payer or seat.is_cut else replace(provenance, cost_nanousd=0)
