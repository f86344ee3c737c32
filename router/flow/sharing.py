"""One call's work for several callers, which goes on for the others when one of them leaves.

The pipeline climbs into a `SharedSink`, which lies between the work and the seats of a flight
(`single_flight.py`); `follow` carries what comes there to one caller's own sink.

Nearly always nobody joins. So the first caller's own task does the work for a whole answer, and
goes on with it when its client has left and others have not. A stream, which callers read each at
its own pace, and what is read to its end when all have left, have a task of their own.
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
        self._kept_bytes_max = kept_bytes_max
        self._may_be_kept = True
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
        await self._flight.write(frames)

    def write_now(self, frames: bytes) -> bool:
        return self._flight.write_now(frames)

    async def comment(self, frame: bytes) -> None:
        with contextlib.suppress(ConnectionError):
            # A client that has left is its own task's matter.
            await self._flight.tell(frame)

    async def end(self, frames: bytes, provenance: Provenance) -> None:
        self._begin(provenance)
        before = self._flight.all_frames(self._kept_bytes_max - len(frames))
        kept = b"".join([*before, frames]) if self._may_be_kept and before is not None else None
        self.served = Served(provenance, last_frames=frames, frames=kept)

    async def cut(self, frames: bytes, provenance: Provenance) -> bool:
        self.cut_frames = frames
        self._may_be_kept = False
        return self._flight.cut_payer()

    async def fail(self, error: RouterError) -> None:
        raise error

    def when_left(self, act: Callable[[], None] | None) -> None:
        """Who leaves a flight is its own task's matter, and not the work's."""

    def close(self) -> None:
        """The work is over. The flight goes on to know this sink, but not this sink the flight:
        neither would be freed before the garbage collector comes."""
        del self._flight

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
            self._may_be_kept = False


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

    def share(
        self,
        flight_key: bytes,
        call: Call,
        sink: Sink,
        record: Record,
        work: Work,
        *,
        drains: bool,
    ) -> Awaitable[bool]:
        """Join the flight of this key, or begin it with `work`, and carry its answer to the sink.

        False, and nothing was sent: what comes of it is not for this call. `drains`: it is read to
        its end when its callers have left.
        """
        admission = record.admission
        assert admission is not None
        payer = Payer(admission, call.ladder.name)
        if flight_key in self._flights:
            record.cache = "joined"
        elif record.stream or drains:
            payer.record = Record(
                record.call_id,
                record.route,
                stream=record.stream,
                admission=admission,
                cache=record.cache,
            )
        else:
            return self._lead(flight_key, payer, sink, record, work)
        return self._ride(flight_key, payer, sink, record, work, drains=drains)

    async def _ride(
        self,
        flight_key: bytes,
        payer: Payer,
        sink: Sink,
        record: Record,
        work: Work,
        *,
        drains: bool,
    ) -> bool:
        """Take a seat in a flight whose work is a task of its own, or another caller's."""
        own = payer.record or record

        async def work_for_all(flight: SharedFlight) -> Served | None:
            shared = SharedSink(flight, KEPT_BYTES_MAX)
            flight.notes = shared
            try:
                await work(shared, own)
            finally:
                shared.close()
            return shared.served

        with self._flights.board(flight_key, payer, work_for_all) as seat:
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
                else:
                    seat.leave()
                    # Nobody of the others may have been able to pay.
                    await seat.settled(_SETTLE_S)
                raise
            finally:
                _absorb(seat, record)
        return True

    async def _lead(
        self, flight_key: bytes, payer: Payer, sink: Sink, record: Record, work: Work
    ) -> bool:
        """Do the work for a whole answer in the first caller's own task: nearly always nobody
        joins."""
        began_s = asyncio.get_running_loop().time()
        payer.record = record
        flight = self._flights.lead(flight_key)
        shared = flight.notes = SharedSink(flight, KEPT_BYTES_MAX)
        error: BaseException | None = None
        with flight.seat(payer) as seat:
            sink.when_left(lambda: self._leave_work(seat, record, began_s))
            try:
                await work(shared, record)
            except asyncio.CancelledError:
                # Of this task: who has joined goes on without it.
                error = GoAlone()
                raise
            except BaseException as fault:
                error = fault
                raise
            finally:
                sink.when_left(None)
                shared.close()
                flight.over(shared.served, error)
                del error
            if record.goes_on:
                raise ConnectionResetError("the client has left")
            await _send(seat.outcome(), seat, sink, record)
        return True

    def _leave_work(self, seat: SharedSeat, record: Record, began_s: float) -> None:
        """The client has left whose task does the work. That is for those who joined from now on,
        and ends where nobody has."""
        payer = seat.payer
        seat.leave()
        if seat.is_last:
            return
        line = replace(record, attempts=[], rung=None, usage=None, nanousd=0)
        line.error, line.status = "client_left", 499
        line.total_s = asyncio.get_running_loop().time() - began_s
        self._observer.in_flight -= 1
        self._observer.record(line)
        self._ledger.leave(payer.admission, payer.ladder)
        record.goes_on = True

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
    seat.hears, seat.takes = sink.comment, sink.write_now
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
    served = seat.outcome()
    _note(seat, record)
    await _send(served, seat, sink, record)


async def _send(served: Served, seat: SharedSeat, sink: Sink, record: Record) -> None:
    """How the work ended, told to one caller."""
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
