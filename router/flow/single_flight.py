"""Identical calls in flight share one: each has a seat, and the work belongs to none of them.

The task of the work is cancelled only when all have left. One seat pays; when it leaves,
`hand_over` passes what it holds to the oldest of the others, and whoever cannot take that on goes
on alone, as do all the others once the work says so (an answer that a budget cut is not for them).

A stream's frames lie in one list in which each seat has its own place, so who comes later begins at
the beginning and who is slow stalls nobody: the work waits for the fastest alone. What lies unread
is bounded: a seat that is left too far behind loses its place. A flight whose beginning is gone
takes nobody more. Who is alone and reads is told by the work itself.

No clock: each caller limits its own waiting, and leaves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from router.errors import Draining, RouterError, UpstreamBroken
from router.flow.tasks import Tasks

Payer = TypeVar("Payer")
Result = TypeVar("Result")

# Of one stream: most answers are far smaller, and beyond it nobody more may join.
BUFFER_BYTES_MAX = 4 << 20


class GoAlone(Exception):
    """This seat's call is not served by the flight any more: it is to be made by itself."""


class SingleFlight(Generic[Payer, Result]):
    """`hand_over(old, new)` passes on what the old payer holds; False: the new one cannot pay."""

    def __init__(
        self,
        tasks: Tasks,
        hand_over: Callable[[Payer, Payer], bool],
        buffer_bytes_max: int = BUFFER_BYTES_MAX,
    ) -> None:
        self._tasks = tasks
        self._hand_over = hand_over
        self._buffer_bytes_max = buffer_bytes_max
        self._flights: dict[bytes, Flight[Payer, Result]] = {}

    def __len__(self) -> int:
        return len(self._flights)

    def __contains__(self, cache_key: bytes) -> bool:
        return cache_key in self._flights

    def board(
        self,
        cache_key: bytes,
        payer: Payer,
        work: Callable[[Flight[Payer, Result]], Awaitable[Result | None]],
    ) -> Seat[Payer, Result]:
        """A seat in the flight of this key; the first to come starts it, with its own `work`."""
        flight = self._flights.get(cache_key)
        if flight is None:
            flight = self._listed(cache_key)
            flight.begin(self._tasks, work)
        return flight.seat(payer)

    def lead(self, cache_key: bytes) -> Flight[Payer, Result]:
        """A flight of this key, of which there is none, whose work is the task that asks: it says
        when it is `over`."""
        flight = self._listed(cache_key)
        flight.task = asyncio.current_task()
        return flight

    def _listed(self, cache_key: bytes) -> Flight[Payer, Result]:
        # Not `Flight[Payer, Result](…)`, which takes three times as long as the object itself.
        flight: Flight[Payer, Result] = Flight(
            self._flights, cache_key, self._hand_over, self._buffer_bytes_max
        )
        self._flights[cache_key] = flight
        return flight


class Flight(Generic[Payer, Result]):
    """One shared call, as its work sees it; in `listed` as long as somebody may join it."""

    __slots__ = (
        "_buffer_bytes_max",
        "_bytes",
        "_cache_key",
        "_caught_up",
        "_frames",
        "_frames_gone",
        "_hand_over",
        "_listed",
        "_seats",
        "error",
        "is_over",
        "notes",
        "payer",
        "result",
        "task",
    )

    def __init__(
        self,
        listed: dict[bytes, Flight[Payer, Result]],
        cache_key: bytes,
        hand_over: Callable[[Payer, Payer], bool],
        buffer_bytes_max: int,
    ) -> None:
        self._listed = listed
        self._cache_key = cache_key
        self._hand_over = hand_over
        self._buffer_bytes_max = buffer_bytes_max
        self._seats: list[Seat[Payer, Result]] = []
        self._frames: list[bytes] = []
        self._frames_gone = 0
        self._bytes = 0
        self._caught_up: asyncio.Future[None] | None = None
        self.task: asyncio.Task[Any] | None = None
        self.is_over = False
        # Who pays now, or paid when it ended, was cut or all had left.
        self.payer: Payer | None = None
        self.error: BaseException | None = None
        self.result: Result | None = None
        # What the work wants its seats to know besides the frames.
        self.notes: object = None

    @property
    def seats(self) -> int:
        return len(self._seats)

    @property
    def end(self) -> int:
        """How many frames there have been."""
        return self._frames_gone + len(self._frames)

    def begin(
        self,
        tasks: Tasks,
        work: Callable[[Flight[Payer, Result]], Awaitable[Result | None]],
    ) -> None:
        self.task = tasks.spawn(self._run(work), "shared call")
        # Not in the task's own finally: cancelled before its first step, it never runs at all.
        self.task.add_done_callback(self._ended)

    def seat(self, payer: Payer) -> Seat[Payer, Result]:
        seat = Seat(self, payer)
        self._seats.append(seat)
        self.payer = self._seats[0].payer
        return seat

    def write_now(self, frame: bytes) -> bool:
        """Some more for the only caller, who takes it at once; False: it is for `write`."""
        if len(self._seats) != 1:
            return False
        seat = self._seats[0]
        if seat.takes is None or seat.position != self.end or not seat.takes(frame):
            return False
        self._frames.append(frame)
        self._bytes += len(frame)
        seat.position += 1
        if self._bytes > self._buffer_bytes_max:
            self._close()
            self._shed()
        return True

    async def write(self, frame: bytes) -> None:
        """Some more of the stream for all seats. Returns when one of them has read it, or had been
        waiting for it: what nobody wants yet is not read from upstream."""
        self._frames.append(frame)
        self._bytes += len(frame)
        if self._bytes > self._buffer_bytes_max:
            self._close()
            self._shed()
        if self._wake():
            return
        self._caught_up = asyncio.get_running_loop().create_future()
        await self._caught_up

    def over(self, result: Result | None, error: BaseException | None) -> None:
        """The work has ended."""
        self.result, self.error = result, error
        self.is_over = True
        self._close()
        self._wake()
        self._let_go()

    def send_others_away(self) -> None:
        """What comes now is for the payer alone."""
        self._close()
        for seat in self._seats[1:]:
            self._remove(seat, GoAlone())

    def cut_payer(self) -> bool:
        """The payer can pay no more: its stream ends here, `Seat.is_cut`. Whether another pays now;
        if not, the work is to end."""
        self._close()
        seat = self._seats[0]
        seat.is_cut = True
        self._remove(seat, None)
        return bool(self._seats)

    def leave(self, seat: Seat[Payer, Result]) -> None:
        if seat not in self._seats:
            return
        if not self.is_over:
            self._remove(seat, GoAlone())
            return
        self._seats.remove(seat)
        self._let_go()

    async def stop(self, limit_s: float) -> None:
        """Cancel the work, and wait until it has put its things in order."""
        self._close()
        # Whose task did the work may have more to do.
        if self.task is not None and not self.is_over:
            self.task.cancel()
            await asyncio.wait({self.task}, timeout=limit_s)

    async def settled(self, limit_s: float) -> None:
        """Wait until the work that nobody is on board of any more has put its things in order."""
        if self.task is not None and not self._seats and not self.is_over:
            await asyncio.wait({self.task}, timeout=limit_s)

    async def tell(self, words: bytes) -> None:
        """Something for whoever waits, which is no part of the answer."""
        for seat in list(self._seats):
            if seat.hears is not None and seat in self._seats:
                await seat.hears(words)

    def caught_up(self) -> None:
        """One seat has read all there is."""
        if self._caught_up is not None and not self._caught_up.done():
            self._caught_up.set_result(None)

    def all_frames(self, bytes_max: int) -> list[bytes] | None:
        """All there have been; None where they are more than that."""
        return self._frames if not self._frames_gone and self._bytes <= bytes_max else None

    def frames_from(self, position: int) -> list[bytes]:
        return self._frames[position - self._frames_gone :]

    def _remove(self, seat: Seat[Payer, Result], reason: BaseException | None) -> None:
        """Take the seat out; where it paid, the oldest that can pay takes over."""
        paid = self._seats[0] is seat
        self._seats.remove(seat)
        seat.gone(reason)
        if paid:
            while self._seats and not self._hand_over(seat.payer, self._seats[0].payer):
                self._seats.pop(0).gone(GoAlone())
        if self._seats:
            self.payer = self._seats[0].payer
        else:
            self._close()
            if self.task is not None and not seat.is_cut:
                self.task.cancel()

    def _shed(self) -> None:
        """Forget what all have read, and whoever is too far behind for that to help."""
        while True:
            read = min((seat.position for seat in self._seats), default=self.end)
            gone = self._frames[: read - self._frames_gone]
            self._frames_gone = read
            del self._frames[: len(gone)]
            self._bytes -= sum(map(len, gone))
            others = [seat for seat in self._seats if seat.position > read]
            if self._bytes <= self._buffer_bytes_max or not others:
                return
            words = f"more than {self._buffer_bytes_max} bytes of the answer waited to be read"
            for seat in [one for one in self._seats if one.position == read]:
                self._remove(seat, UpstreamBroken(words))

    def _let_go(self) -> None:
        """Of an error that nobody will be told: its frames know the flight."""
        if not self._seats:
            self.error = None

    def _close(self) -> None:
        """Nobody more may join."""
        if self._listed.get(self._cache_key) is self:
            del self._listed[self._cache_key]

    def _wake(self) -> bool:
        """Whether somebody was waiting."""
        was_waiting = False
        for seat in self._seats:
            was_waiting |= seat.wake()
        return was_waiting

    async def _run(self, work: Callable[[Flight[Payer, Result]], Awaitable[Result | None]]) -> None:
        try:
            result = await work(self)
        except RouterError as error:
            self.over(None, error)
        except asyncio.CancelledError:
            # A task that ends as cancelled keeps that with all its frames, and they the task.
            self._cancelled()
        else:
            self.over(result, None)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            self._cancelled()
        elif (fault := task.exception()) is not None:
            self.over(None, fault)

    def _cancelled(self) -> None:
        self.over(None, Draining("Rungway is going down and could not wait for this answer"))


class Seat(Generic[Payer, Result]):
    """One caller's place in a flight: `with flights.board(...) as seat`. Leaving it is leaving."""

    __slots__ = (
        "_flight",
        "_left_at",
        "_reason",
        "_rest",
        "_waiting",
        "hears",
        "is_cut",
        "payer",
        "position",
        "takes",
    )

    def __init__(self, flight: Flight[Payer, Result], payer: Payer) -> None:
        self._flight = flight
        self._waiting: asyncio.Future[None] | None = None
        self._reason: BaseException | None = None
        self._left_at: int | None = None
        self._rest: list[bytes] = []
        self.payer = payer
        self.position = 0
        self.is_cut = False
        # Takes what the work says while its callers wait.
        self.hears: Callable[[bytes], Awaitable[None]] | None = None
        # Takes more frames from the work itself, or says that it is to read them.
        self.takes: Callable[[bytes], bool] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.leave()

    @property
    def notes(self) -> object:
        return self._flight.notes

    @property
    def is_payer(self) -> bool:
        return self._flight.payer is self.payer

    @property
    def is_over(self) -> bool:
        """Whether the work has ended."""
        return self._flight.is_over

    @property
    def is_alone(self) -> bool:
        return self._left_at is None and self._flight.seats == 1

    @property
    def is_last(self) -> bool:
        """Whether nobody was on board any more when it had left."""
        return self._left_at is not None and not self._flight.seats

    async def stop(self, limit_s: float) -> None:
        """The caller wants no more, and nobody else does: the work ends first."""
        await self._flight.stop(limit_s)

    async def settled(self, limit_s: float) -> None:
        """The caller was cut: where nobody goes on with it, the work ends before this returns."""
        await self._flight.settled(limit_s)

    async def read(self) -> list[bytes]:
        """All frames that came since the last read, [] at the end. Raises what the work raised, or
        GoAlone where the rest is not for this call."""
        while True:
            if self._left_at is not None:
                frames, self._rest = self._rest, []
                if frames or self._reason is None:
                    return frames
                raise self._reason.with_traceback(None)
            flight = self._flight
            if self.position < flight.end:
                frames = flight.frames_from(self.position)
                self.position = flight.end
                flight.caught_up()
                return frames
            if flight.is_over:
                if flight.error is not None:
                    raise flight.error.with_traceback(None)
                return []
            self._waiting = asyncio.get_running_loop().create_future()
            try:
                await self._waiting
            finally:
                self._waiting = None

    async def result(self) -> Result:
        """What the work returned; frames are passed over. Raises as `read` does and `outcome`."""
        while await self.read():
            pass
        return self.outcome()

    def outcome(self) -> Result:
        """What the work returned, when all is read. Raises GoAlone where that is None: nothing that
        can be shared."""
        result = self._flight.result
        if self._left_at is not None or result is None:
            raise GoAlone
        return result

    def stay(self, payer: Payer) -> Seat[Payer, Result]:
        """Another seat beside this one, for what comes from now on."""
        seat = self._flight.seat(payer)
        seat.position = self._flight.end
        # The work may wait for this one to read what it will not read any more.
        self._flight.caught_up()
        return seat

    def leave(self) -> None:
        """The caller wants no more; the last to leave cancels the work. May be called again."""
        self._flight.leave(self)

    def gone(self, reason: BaseException | None) -> None:
        """The flight's word: no longer on board. One that was cut may still read what was there."""
        if self.is_cut:
            self._rest = self._flight.frames_from(self.position)
        self._left_at, self._reason = self.position, reason
        self.wake()

    def wake(self) -> bool:
        """Whether it was waiting."""
        if self._waiting is None or self._waiting.done():
            return False
        self._waiting.set_result(None)
        return True
