"""Places and the queue: the limit, the bound, the order; no waiter is lost or let in twice."""

from __future__ import annotations

import math

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from router.core.concurrency import FixedLimit, Outcome
from router.core.limiter import Full, Limiter, Ticket, Waiter


def limiter(limit: int = 1, queue_max: int = 3) -> Limiter:
    return Limiter(FixedLimit(limit), queue_max)


def placed(of: Limiter, now: float = 0.0) -> Ticket:
    ticket = of.enter(now, 0, 5)
    assert isinstance(ticket, Ticket)
    return ticket


def queued(of: Limiter, priority: int = 0, now: float = 0.0, wait_s: float = 5) -> Waiter:
    waiter = of.enter(now, priority, wait_s)
    assert isinstance(waiter, Waiter)
    return waiter


def test_places_up_to_the_limit_then_the_queue_then_neither() -> None:
    places = limiter(limit=2, queue_max=1)
    assert places.has_room()
    placed(places)
    placed(places)
    assert not places.has_room()
    queued(places)
    assert places.enter(0, 0, 5) is Full.FULL
    assert (places.in_flight, places.queued, places.limit) == (2, 1, 2)


def test_without_a_queue_nobody_waits() -> None:
    places = limiter(queue_max=0)
    placed(places)
    assert places.enter(0, 9, 5) is Full.FULL


def test_priority_goes_first_then_arrival() -> None:
    places = limiter(queue_max=4)
    ticket = placed(places)
    waiters = [queued(places, priority) for priority in (0, 5, 0, 5)]
    order = []
    for _ in waiters:
        (admitted,) = places.leave(1, ticket, Outcome.SERVED)
        assert admitted.ticket is not None
        ticket = admitted.ticket
        order.append(waiters.index(admitted))
    assert order == [1, 3, 0, 2]
    assert places.leave(2, ticket, Outcome.SERVED) == []
    assert places.in_flight == 0


def test_a_full_queue_lets_a_higher_priority_push_out_the_youngest_of_the_lowest() -> None:
    places = limiter(queue_max=3)
    placed(places)
    first, youngest, middle = queued(places, 0), queued(places, 0), queued(places, 1)
    urgent = queued(places, 2)
    assert urgent.displaced is youngest
    assert queued(places, 2).displaced is first
    assert queued(places, 2).displaced is middle
    assert places.enter(0, 2, 5) is Full.FULL
    assert places.queued == 3
    assert places.cancel(0, youngest) == []
    assert places.queued == 3


def test_a_place_is_given_back_once() -> None:
    places = limiter(limit=2)
    ticket = placed(places)
    placed(places)
    places.leave(1, ticket, Outcome.SERVED)
    assert places.leave(1, ticket, Outcome.SERVED) == []
    assert places.in_flight == 1


def test_a_deadline_ends_the_wait() -> None:
    places = limiter()
    placed(places)
    early, late = queued(places, wait_s=2), queued(places, wait_s=4)
    assert places.expire(1.9) == []
    assert places.expire(2) == [early]
    assert places.expire(10) == [late]
    assert places.queued == 0


def test_who_leaves_the_queue_makes_no_room_and_who_was_let_in_passes_the_place_on() -> None:
    places = limiter()
    ticket = placed(places)
    gone, next_one, last = queued(places), queued(places), queued(places)
    assert places.cancel(0, gone) == []
    assert places.leave(1, ticket, Outcome.SERVED) == [next_one]
    assert places.cancel(1, next_one) == [last]
    assert places.cancel(1, next_one) == []
    assert (places.in_flight, places.queued) == (1, 0)


def test_a_limit_that_rises_lets_several_in_and_one_that_falls_ends_nobody() -> None:
    limit = FixedLimit(1)
    places = Limiter(limit, 5)
    placed(places)
    waiters = [queued(places) for _ in range(3)]
    limit.value = 3
    assert places.restart(0) == waiters[:2]
    limit.value = 1
    assert places.in_flight == 3
    ticket = waiters[0].ticket
    assert ticket is not None
    assert places.leave(1, ticket, Outcome.OTHER) == []


def test_the_expected_wait_follows_the_calls_of_late() -> None:
    places = limiter(limit=2, queue_max=2)
    assert places.expected_wait_s(0) == 0
    first, _ = placed(places), placed(places)
    assert places.expected_wait_s(0) == 0, "no call has ended yet: nothing is known"
    places.leave(8, first, Outcome.SERVED)
    second = placed(places, 8)
    assert places.expected_wait_s(0) == 4
    places.leave(9, second, Outcome.OTHER)
    third = placed(places, 9)
    assert places.expected_wait_s(0) == 4, "a call that failed says nothing of how long calls are"
    places.leave(9, third, Outcome.BUSY)
    placed(places, 9)
    assert places.expected_wait_s(0) == pytest.approx(3.8)
    queued(places, 1)
    assert places.expected_wait_s(2) == pytest.approx(3.8)
    assert places.expected_wait_s(1) == pytest.approx(7.6)
    queued(places, 1)
    assert places.expected_wait_s(1) == math.inf
    assert places.expected_wait_s(2) == pytest.approx(3.8)


class Limiters(RuleBasedStateMachine):
    """Any order of events, against a plain list of who waits."""

    QUEUE_MAX = 4

    def __init__(self) -> None:
        super().__init__()
        self.limit = FixedLimit(2)
        self.places = Limiter(self.limit, self.QUEUE_MAX)
        self.now = 0.0
        self.tickets: list[Ticket] = []
        self.waiting: list[Waiter] = []
        self.ended: list[Waiter] = []

    @rule(seconds=st.floats(0, 4))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(priority=st.integers(-2, 2), wait_s=st.floats(0, 6))
    def enter(self, priority: int, wait_s: float) -> None:
        expected_s = self.places.expected_wait_s(priority)
        had_room = self.places.has_room()
        entry = self.places.enter(self.now, priority, wait_s)
        assert had_room is isinstance(entry, Ticket)
        assert (expected_s == math.inf) is (entry is Full.FULL)
        if isinstance(entry, Ticket):
            self.tickets.append(entry)
        elif entry is Full.FULL:
            assert len(self.waiting) == self.QUEUE_MAX
            assert min(waiter.priority for waiter in self.waiting) >= priority
        else:
            if entry.displaced is not None:
                lowest = min(self.waiting, key=lambda waiter: (waiter.priority, -waiter.order))
                assert entry.displaced is lowest
                assert lowest.priority < priority
                self.no_longer(lowest)
            self.waiting.append(entry)

    @rule(data=st.data(), outcome=st.sampled_from(Outcome))
    def leave(self, data: st.DataObject, outcome: Outcome) -> None:
        if self.tickets:
            ticket = data.draw(st.sampled_from(self.tickets))
            self.tickets.remove(ticket)
            self.admitted(self.places.leave(self.now, ticket, outcome))
            assert self.places.leave(self.now, ticket, outcome) == []

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """Also those who were let in, and those who are long gone."""
        if not (everybody := [*self.waiting, *self.ended]):
            return
        waiter = data.draw(st.sampled_from(everybody))
        if waiter in self.waiting:
            self.no_longer(waiter)
        elif waiter.ticket in self.tickets:
            self.tickets.remove(waiter.ticket)
        self.admitted(self.places.cancel(self.now, waiter))

    @rule()
    def expire(self) -> None:
        late = self.places.expire(self.now)
        assert set(late) == {waiter for waiter in self.waiting if waiter.deadline <= self.now}
        for waiter in late:
            self.no_longer(waiter)

    @rule(value=st.integers(1, 4))
    def change_the_limit(self, value: int) -> None:
        self.limit.value = value
        self.admitted(self.places.restart(self.now))

    def admitted(self, waiters: list[Waiter]) -> None:
        first = sorted(self.waiting, key=lambda waiter: (-waiter.priority, waiter.order))
        assert waiters == first[: len(waiters)]
        for waiter in waiters:
            assert waiter.ticket is not None
            self.no_longer(waiter)
            self.tickets.append(waiter.ticket)
        if waiters:
            assert self.places.in_flight <= self.limit.value

    def no_longer(self, waiter: Waiter) -> None:
        self.waiting.remove(waiter)
        assert waiter not in self.ended
        self.ended.append(waiter)

    @invariant()
    def the_counts_are_right(self) -> None:
        assert self.places.in_flight == len(self.tickets)
        assert self.places.queued == len(self.waiting) <= self.QUEUE_MAX
        assert not (self.waiting and self.places.has_room())


TestLimiters = Limiters.TestCase
