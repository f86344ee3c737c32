"""Identical calls share one piece of work, which harms nobody when one of them leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from router.errors import Draining, UpstreamBroken, UpstreamFailed
from router.flow.single_flight import Flight, GoAlone, Seat, SingleFlight
from router.flow.tasks import Tasks

KEY = b"k"


class Work:
    """What a test does through a flight: writes what it is fed, ends when it is told to."""

    def __init__(self) -> None:
        self.begun = 0
        self.cancelled = 0
        self.feed: asyncio.Queue[bytes] = asyncio.Queue()
        self.end: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self.flight: Flight[str, str] | None = None

    async def __call__(self, flight: Flight[str, str]) -> str | None:
        self.begun += 1
        self.flight = flight
        try:
            while not (self.end.done() and self.feed.empty()):
                if self.feed.empty():
                    getter = asyncio.create_task(self.feed.get())
                    either: set[asyncio.Future[Any]] = {self.end, getter}
                    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                    if not getter.done():
                        getter.cancel()
                        continue
                    frame = getter.result()
                else:
                    frame = self.feed.get_nowait()
                await flight.write(frame)
            return self.end.result()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


class House:
    def __init__(self) -> None:
        self.tasks = Tasks()
        self.handed: list[tuple[str, str]] = []
        self.cannot_pay: set[str] = set()
        self.flights = SingleFlight[str, str](self.tasks, self.hand_over, buffer_bytes_max=10)
        self.work = Work()

    def hand_over(self, old: str, new: str) -> bool:
        self.handed.append((old, new))
        return new not in self.cannot_pay

    def board(self, payer: str) -> Seat[str, str]:
        return self.flights.board(KEY, payer, self.work)


@pytest.fixture
async def house() -> AsyncIterator[House]:
    found = House()
    yield found
    await found.tasks.aclose()
    assert not len(found.flights)


async def settle() -> None:
    """Let everything run that can."""
    for _ in range(20):
        await asyncio.sleep(0)


async def rest(seat: Seat[str, str]) -> bytes:
    found = b""
    while frames := await seat.read():
        found += b"".join(frames)
    return found


async def test_a_thousand_identical_calls_are_one(house: House) -> None:
    async def call(number: int) -> str:
        with house.board(str(number)) as seat:
            return await seat.result()

    calls = [asyncio.create_task(call(number)) for number in range(1000)]
    await settle()
    house.work.end.set_result("answer")
    assert await asyncio.gather(*calls) == ["answer"] * 1000
    assert house.work.begun == 1
    house.work = Work()
    later = asyncio.create_task(call(0))
    await settle()
    assert house.work.begun == 1, "what is over takes nobody more"
    house.work.end.set_result("again")
    assert await later == "again"


async def test_who_joins_a_stream_late_hears_it_from_the_beginning(house: House) -> None:
    first = house.board("a")
    house.work.feed.put_nowait(b"1")
    assert await first.read() == [b"1"]
    late = house.board("b")
    house.work.feed.put_nowait(b"2")
    assert await first.read() == [b"2"]
    assert await late.read() == [b"1", b"2"]
    assert (first.is_payer, late.is_payer) == (True, False)
    house.work.end.set_result("whole")
    assert await late.read() == []
    assert await first.result() == "whole"
    first.leave()
    assert not house.handed, "what is over needs nobody to pay"


async def test_a_slow_one_stalls_nobody_and_loses_its_place_when_too_far_behind(
    house: House,
) -> None:
    quick, slow, slower = house.board("a"), house.board("b"), house.board("c")
    for number in range(5):
        house.work.feed.put_nowait(b"%d.." % number)
        assert await quick.read() == [b"%d.." % number]
        if number == 1:
            assert await slow.read() == [b"0..", b"1.."]
    with pytest.raises(UpstreamBroken, match="more than 10 bytes"):
        await slower.read()
    assert await slow.read() == [b"2..", b"3..", b"4.."]
    house.work, before = Work(), house.work
    other = house.board("d")
    await settle()
    assert house.work.begun == 1, "its beginning is gone: nobody may join it"
    before.end.set_result(None)
    assert await quick.read() == []
    other.leave()
    await settle()
    assert house.work.cancelled == 1


async def test_nothing_is_written_ahead_of_the_fastest(house: House) -> None:
    seat = house.board("a")
    for _ in range(3):
        house.work.feed.put_nowait(b"x")
    await settle()
    assert house.work.feed.qsize() == 2
    assert await seat.read() == [b"x"]
    seat.leave()


async def test_the_leader_leaves_and_the_oldest_pays_on(house: House) -> None:
    seats = [house.board(name) for name in "abc"]
    house.work.feed.put_nowait(b"1")
    await settle()
    seats[0].leave()
    seats[0].leave()
    assert house.handed == [("a", "b")]
    assert seats[1].is_payer
    house.work.end.set_result("whole")
    assert await rest(seats[1]) == b"1"
    assert await seats[2].result() == "whole"
    assert house.work.cancelled == 0
    with pytest.raises(GoAlone):
        await seats[0].read()


async def test_a_caller_that_is_cancelled_has_left(house: House) -> None:
    async def call() -> None:
        with house.board("a") as seat:
            await seat.read()

    task = asyncio.create_task(call())
    await settle()
    other = house.board("b")
    task.cancel()
    await settle()
    assert task.cancelled()
    assert other.is_payer
    other.leave()
    await settle()
    assert house.work.cancelled == 1, "all have left"


async def test_who_cannot_pay_goes_on_alone(house: House) -> None:
    house.cannot_pay = {"b", "c"}
    seats = [house.board(name) for name in "abcd"]
    seats[0].leave()
    assert house.handed == [("a", "b"), ("a", "c"), ("a", "d")]
    for seat in seats[1:3]:
        with pytest.raises(GoAlone):
            await seat.read()
    house.work.end.set_result("whole")
    assert await seats[3].result() == "whole"


async def test_the_work_ends_where_nobody_can_pay(house: House) -> None:
    house.cannot_pay = {"b"}
    leader, other = house.board("a"), house.board("b")
    await settle()
    leader.leave()
    with pytest.raises(GoAlone):
        await other.result()
    await settle()
    assert house.work.cancelled == 1


async def test_a_failure_reaches_all_after_what_came_before_it(house: House) -> None:
    seats = [house.board(name) for name in "ab"]
    house.work.feed.put_nowait(b"1")
    assert await seats[0].read() == [b"1"]
    error = UpstreamFailed("500")
    house.work.end.set_exception(error)
    await settle()
    assert await seats[1].read() == [b"1"]
    for seat in seats:
        with pytest.raises(UpstreamFailed) as caught:
            await seat.read()
        assert caught.value is error


async def test_a_fault_of_ours_reaches_all_and_the_log(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    seat = house.board("a")
    house.work.end.set_exception(KeyError("ours"))
    with pytest.raises(KeyError):
        await seat.result()
    await settle()
    assert "shared call failed" in caplog.text


@pytest.mark.parametrize("steps", [0, 20])
async def test_at_the_end_of_the_house_all_hear_of_it(house: House, steps: int) -> None:
    seat = house.board("a")
    for _ in range(steps):
        await asyncio.sleep(0)
    await house.tasks.aclose()
    with pytest.raises(Draining):
        await seat.read()


async def test_a_cut_answer_is_not_for_the_others(house: House) -> None:
    leader, other = house.board("a"), house.board("b")
    await settle()
    assert house.work.flight is not None
    house.work.flight.send_others_away()
    with pytest.raises(GoAlone):
        await other.result()
    house.work.end.set_result("cut")
    assert await leader.result() == "cut"


async def test_the_stream_goes_on_for_the_others_when_the_payer_is_spent(house: House) -> None:
    leader, other = house.board("a"), house.board("b")
    house.work.feed.put_nowait(b"1")
    assert await other.read() == [b"1"]
    assert house.work.flight is not None
    assert house.work.flight.cut_payer()
    assert leader.is_cut
    assert await rest(leader) == b"1"
    with pytest.raises(GoAlone):
        await leader.result()
    assert other.is_payer
    house.work.feed.put_nowait(b"2")
    assert await other.read() == [b"2"]
    assert not house.work.flight.cut_payer(), "nobody is left to pay"
    assert not house.work.flight.seats
    house.work.end.set_result("over")
    assert await rest(other) == b""
    await settle()
    assert house.work.cancelled == 0, "the work ends by itself"


async def test_without_a_whole_answer_there_is_nothing_to_share(house: House) -> None:
    seat = house.board("a")
    house.work.end.set_result(None)
    with pytest.raises(GoAlone):
        await seat.result()


async def test_who_is_alone_and_reads_is_told_by_the_work_itself(house: House) -> None:
    taken: list[bytes] = []
    reads = True

    def take(frame: bytes) -> bool:
        if reads:
            taken.append(frame)
        return reads

    first = house.board("a")
    await settle()
    flight = house.work.flight
    assert flight is not None
    assert not flight.write_now(b"1"), "nobody said that it takes anything"
    house.work.feed.put_nowait(b"1")
    await settle()
    first.takes = take
    assert not flight.write_now(b"2"), "what came before is not read yet"
    assert await first.read() == [b"1"]
    assert flight.write_now(b"2")
    reads = False
    assert not flight.write_now(b"3"), "its client does not read"
    reads = True
    late = house.board("b")
    assert not flight.write_now(b"3"), "it is not alone"
    house.work.feed.put_nowait(b"3")
    assert await first.read() == [b"3"], "what it took is not told again"
    assert await late.read() == [b"1", b"2", b"3"]
    first.leave()
    late.takes = take
    assert flight.write_now(b"4")
    assert taken == [b"2", b"4"]
    late.leave()


async def test_what_one_took_at_once_is_bounded_too(house: House) -> None:
    taken: list[bytes] = []
    first = house.board("a")
    await settle()
    flight = house.work.flight
    assert flight is not None
    first.takes = lambda frame: not taken.append(frame)  # type: ignore[func-returns-value]
    for _ in range(3):
        assert flight.write_now(b"six...")
    assert flight.all_frames(1 << 20) is None, "all of it was forgotten"
    house.work, before = Work(), house.work
    house.board("b").leave()
    await settle()
    assert house.work.flight is not flight, "its beginning is gone: nobody may join it"
    before.end.set_result("whole")
    assert await first.result() == "whole"
    assert len(taken) == 3


async def test_a_task_may_do_the_work_of_a_flight_itself(house: House) -> None:
    ended: list[str] = []

    async def lead(payer: str) -> None:
        flight = house.flights.lead(KEY)
        seat = flight.seat(payer)
        leaving.append(seat)
        try:
            ended.append(str(await house.work.end))
        finally:
            flight.over("whole" if ended else None, None if ended else GoAlone())

    leaving: list[Seat[str, str]] = []
    first = asyncio.create_task(lead("a"))
    await settle()
    other = house.board("b")
    leaving[0].leave()
    assert (leaving[0].is_last, other.is_payer) == (False, True)
    house.work.end.set_result("")
    assert await other.result() == "whole"
    await first
    house.work = Work()
    second = asyncio.create_task(lead("a"))
    await settle()
    leaving[1].leave()
    assert leaving[1].is_last
    await settle()
    assert second.cancelled(), "nobody wants it"


async def test_who_leaves_when_the_work_is_over_ends_nothing_else_of_its_task(
    house: House,
) -> None:
    may_go_on = asyncio.Event()
    done: list[str] = []

    async def lead() -> None:
        flight = house.flights.lead(KEY)
        with flight.seat("a"):
            await house.work.end
            flight.over("whole", None)
        # As one does whose answer is kept under an Idempotency-Key.
        await may_go_on.wait()
        done.append("kept")

    first = asyncio.create_task(lead())
    await settle()
    with house.board("b") as other:
        house.work.end.set_result("")
        assert await other.result() == "whole"
        await settle()
        assert other.is_alone
        await other.stop(0)
    may_go_on.set()
    await first
    assert done == ["kept"]
