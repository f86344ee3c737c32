"""One rung's gate: places in order of priority, a breaker with one probe, nothing lost."""

from __future__ import annotations

import asyncio

import pytest

from router.errors import (
    ConnectFailed,
    PromptTooLong,
    StaleConnection,
    UpstreamBusy,
    UpstreamFailed,
)
from router.flow.gate import Gate, NotLetIn, Place
from tests.fakes.clock import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def gate(clock: Clock) -> Gate:
    return Gate(1, 2, clock, lambda: 0.5)


async def waiting(gate: Gate, count: int) -> None:
    async with asyncio.timeout(2):
        while gate.row()["queued"] != count:
            await asyncio.sleep(0)


async def test_places_are_given_by_priority_and_then_by_arrival(gate: Gate) -> None:
    first = await gate.enter(0, 1.0)
    order: list[str] = []

    async def call(name: str, priority: int) -> None:
        place = await gate.enter(priority, 5.0)
        order.append(name)
        gate.served(place, None)

    low = asyncio.create_task(call("low", 0))
    await waiting(gate, 1)
    high = asyncio.create_task(call("high", 5))
    await waiting(gate, 2)
    gate.served(first, None)
    await asyncio.gather(low, high)
    assert order == ["high", "low"]
    assert gate.in_flight == 0


async def test_a_full_queue_and_a_wait_that_is_over_are_told(gate: Gate) -> None:
    place = await gate.enter(0, 1.0)
    with pytest.raises(NotLetIn, match=r"within 0.01 s"):
        await gate.enter(0, 0.01)
    tasks = [asyncio.create_task(gate.enter(0, 5.0)) for _ in range(2)]
    await waiting(gate, 2)
    assert gate.full(0, 2) is not None
    assert gate.full(1, 2) is None, "one of higher priority would take a place in the queue"
    with pytest.raises(NotLetIn) as caught:
        await gate.enter(0, 5.0)
    assert caught.value.cause == "busy"
    tasks[0].cancel()
    await waiting(gate, 1)
    gate.served(place, None)
    gate.served(await tasks[1], None)
    assert (gate.in_flight, gate.row()["queued"]) == (0, 0)


async def test_one_of_higher_priority_takes_the_place_of_the_youngest_low_one(gate: Gate) -> None:
    place = await gate.enter(0, 1.0)
    low = [asyncio.create_task(gate.enter(0, 5.0)) for _ in range(2)]
    await waiting(gate, 2)
    high = asyncio.create_task(gate.enter(9, 5.0))
    with pytest.raises(NotLetIn):
        await low[1]
    gate.served(place, None)
    gate.served(await high, None)
    gate.served(await low[0], None)
    assert gate.in_flight == 0


async def fail(gate: Gate, times: int) -> None:
    for _ in range(times):
        gate.failed(await gate.enter(0, 0.0), ConnectFailed("refused"))


async def test_failures_in_a_row_close_it_and_one_probe_opens_it(gate: Gate, clock: Clock) -> None:
    await fail(gate, 5)
    shut = gate.closed()
    assert shut is not None
    with pytest.raises(NotLetIn) as caught:
        await gate.enter(0, 0.0)
    assert caught.value.cause == "breaker"
    clock.now += shut[1]
    probe = await gate.enter(0, 0.0)
    assert gate.closed() is not None, "one probe at a time"
    gate.served(probe, None)
    assert gate.closed() is None


async def test_a_probe_whose_caller_left_says_nothing(gate: Gate, clock: Clock) -> None:
    await fail(gate, 5)
    clock.now += 60
    gate.left(await gate.enter(0, 0.0))
    assert gate.closed() is None
    gate.served(await gate.enter(0, 0.0), None)


@pytest.mark.parametrize("error", [UpstreamBusy("429"), PromptTooLong("too long")])
async def test_what_is_not_broken_does_not_open_the_breaker(
    gate: Gate, error: UpstreamBusy
) -> None:
    for _ in range(20):
        gate.failed(await gate.enter(0, 0.0), error)
    assert gate.closed() is None


async def test_a_retry_is_paid_for_from_the_budget(gate: Gate) -> None:
    place: Place = await gate.enter(0, 0.0)
    error = UpstreamFailed("500")
    gate.failed(place, error)
    first = gate.retry(error, tries=1, has_next=False, left_s=60)
    assert first.wait_s == pytest.approx(0.125)
    second = gate.retry(error, tries=2, has_next=False, left_s=60)
    assert second.wait_s is None
    assert "budget" in second.reason
    assert gate.retry(error, tries=1, has_next=True, left_s=60).wait_s is None


async def test_a_reset_opens_it(gate: Gate) -> None:
    await fail(gate, 5)
    gate.reset()
    assert gate.closed() is None


async def test_a_stale_connection_says_nothing_of_the_rung_and_is_asked_again_once(
    gate: Gate,
) -> None:
    stale = StaleConnection("the upstream had closed the kept connection")
    for _ in range(30):
        gate.failed(await gate.enter(0, 1.0), stale)
    assert gate.closed() is None
    assert gate.retry(stale, tries=1, has_next=True, left_s=60.0).wait_s == 0.0
    assert gate.retry(stale, tries=2, has_next=True, left_s=60.0).wait_s is None
