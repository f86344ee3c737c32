"""What lies between one piece of work and the callers it is for: who hears what, what is kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from router.errors import UpstreamBroken
from router.flow.sharing import KEPT_BYTES_MAX, SharedFlight, SharedSink
from router.flow.single_flight import GoAlone, Seat, SingleFlight
from router.flow.sink import Provenance
from router.flow.tasks import Tasks
from router.types import Answer, Rung

ONE, TWO = Rung("b0", "org/m"), Rung("b1", "org/m")
FROM_ONE, FROM_TWO = Provenance(ONE, 1), Provenance(TWO, 2)


class House:
    """One flight at a time; its work is what the test does with `sink`."""

    def __init__(self) -> None:
        self.tasks = Tasks()
        self.flights: SingleFlight[Any, Any] = SingleFlight(self.tasks, lambda old, new: True)
        self.end = asyncio.Event()
        self.sink: Any = None

    def board(self, payer: str) -> Seat[Any, Any]:
        async def work(flight: SharedFlight) -> Any:
            self.sink = SharedSink(flight, KEPT_BYTES_MAX)
            await self.end.wait()
            return self.sink.served

        return self.flights.board(b"k", payer, work)

    async def take(self, *payers: str) -> list[Seat[Any, Any]]:
        self.seats = [self.board(payer) for payer in payers]
        await asyncio.sleep(0)
        return self.seats


@pytest.fixture
async def house() -> AsyncIterator[House]:
    found = House()
    yield found
    await found.tasks.aclose()


async def read_all(seat: Seat[Any, Any], into: list[bytes]) -> None:
    while frames := await seat.read():
        into += frames


def hears(into: list[bytes]) -> Callable[[bytes], Any]:
    async def hear(words: bytes) -> None:
        into.append(words)

    return hear


async def test_all_who_wait_hear_what_the_backend_says_meanwhile(house: House) -> None:
    seats = await house.take("alice", "bob", "carol")
    heard: list[list[bytes]] = [[], []]
    seats[0].hears, seats[1].hears = hears(heard[0]), hears(heard[1])

    async def left(words: bytes) -> None:
        raise ConnectionResetError

    seats[2].hears = left
    await house.sink.comment(b": place 2\n\n")
    assert heard == [[b": place 2\n\n"]] * 2


@pytest.mark.parametrize(("second", "kept"), [(FROM_ONE, b"abend"), (FROM_TWO, None)])
async def test_what_two_rungs_gave_together_is_not_kept(
    house: House, second: Provenance, kept: bytes | None
) -> None:
    (seat,) = await house.take("alice")
    found: list[bytes] = []
    reading = house.tasks.spawn(read_all(seat, found), "reader")
    await house.sink.write(b"a", FROM_ONE)
    await house.sink.write(b"b", second)
    await house.sink.end(b"end", second)
    house.end.set()
    await reading
    served = await seat.result()
    assert (served.frames, served.last_frames) == (kept, b"end")
    assert found == [b"a", b"b"]


async def test_what_is_too_large_is_told_and_not_kept(house: House) -> None:
    (seat,) = await house.take("alice")
    found: list[bytes] = []
    reading = house.tasks.spawn(read_all(seat, found), "reader")
    for _ in range(3):
        await house.sink.write(b"x" * (KEPT_BYTES_MAX // 2), FROM_ONE)
    await house.sink.end(b"end", FROM_ONE)
    house.end.set()
    await reading
    assert sum(map(len, found)) == KEPT_BYTES_MAX // 2 * 3
    assert (await seat.result()).frames is None


@pytest.mark.parametrize("whole", [True, False])
async def test_what_the_payer_s_budget_made_shorter_is_the_payer_s(
    house: House, *, whole: bool
) -> None:
    seats = await house.take("alice", "bob")
    provenance = Provenance(ONE, 1, 8, is_short=True)
    if whole:
        await house.sink.send_answer(Answer(b"{}"), provenance)
    else:
        await house.sink.end(b"end", provenance)
    house.end.set()
    with pytest.raises(GoAlone):
        await seats[1].result()
    assert (await seats[0].result()).provenance.clamped_to == 8


async def test_a_limit_of_everybody_s_is_everybody_s_answer(house: House) -> None:
    seats = await house.take("alice", "bob")
    await house.sink.send_answer(Answer(b"{}"), Provenance(ONE, 1, 8))
    house.end.set()
    assert [(await seat.result()).answer.body for seat in seats] == [b"{}"] * 2


async def test_who_paid_is_who_paid_when_the_others_are_told_later(house: House) -> None:
    first, second = await house.take("alice", "bob")
    await house.sink.send_answer(Answer(b"{}"), FROM_ONE)
    house.end.set()
    await first.result()
    assert (first.is_payer, second.is_payer) == (True, False)
    first.leave()
    assert not second.is_payer


async def test_what_fails_is_raised_to_the_seats_and_not_told_by_the_work(house: House) -> None:
    await house.take("alice")
    assert not house.sink.is_started
    with pytest.raises(UpstreamBroken):
        await house.sink.fail(UpstreamBroken("cut"))
