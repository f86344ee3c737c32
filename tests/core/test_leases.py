"""Leases: whatever is lost, doubled or late, no overspend, nothing lost, nothing stranded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as some
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from router.core.accounts import Account, Meter
from router.core.leases import Ask, Grant, Lease, Row, grant

ACCOUNT = Account("alice", Meter.USD_DAY, 0)
LIMIT = 1_000


def make_ask(
    number: int,
    *,
    limit: int = LIMIT,
    spent: int = 0,
    floor: int = 0,
    need: int = 0,
    keep: bool = True,
) -> Ask:
    return Ask(ACCOUNT, number, limit, spent, floor, need, keep)


# --- one decision -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ask", "row", "others", "live", "expected"),
    [
        pytest.param(make_ask(1), Row(), 0, 1, Row(250, 0, 1), id="a quarter for the only one"),
        pytest.param(make_ask(1), Row(), 0, 4, Row(62, 0, 1), id="a sixteenth for one of four"),
        pytest.param(make_ask(1), Row(), 0, 0, Row(250, 0, 1), id="nobody known to live"),
        pytest.param(make_ask(1, need=600), Row(), 0, 1, Row(600, 0, 1), id="what a hold needs"),
        pytest.param(make_ask(1, need=600), Row(), 700, 1, Row(300, 0, 1), id="what there is"),
        pytest.param(make_ask(1, need=1), Row(), 1_200, 1, Row(0, 0, 1), id="others overspent"),
        pytest.param(
            make_ask(5, spent=90, floor=100), Row(80, 10, 4), 0, 1, Row(325, 90, 5), id="an overrun"
        ),
        pytest.param(
            make_ask(5, spent=5, floor=5), Row(200, 70, 4), 0, 1, Row(400, 70, 5), id="older spent"
        ),
        pytest.param(make_ask(4), Row(80, 10, 4), 0, 1, Row(80, 10, 4), id="said twice"),
        pytest.param(make_ask(3, floor=900), Row(80, 10, 4), 0, 1, Row(80, 10, 4), id="late"),
        pytest.param(
            make_ask(5, floor=30, keep=False), Row(80, 10, 4), 0, 1, Row(30, 10, 5), id="given back"
        ),
        pytest.param(
            make_ask(5, floor=30, keep=False, limit=10),
            Row(80, 10, 4),
            0,
            1,
            Row(30, 10, 5),
            id="given back under a smaller limit",
        ),
        pytest.param(
            make_ask(5, floor=30, need=60, keep=False),
            Row(80, 10, 4),
            910,
            1,
            Row(90, 10, 5),
            id="who waits gives nothing back",
        ),
    ],
)
def test_a_grant(ask: Ask, row: Row, others: int, live: int, expected: Row) -> None:
    assert grant(ask, row, others, live) == expected


def test_a_lease_holds_within_its_grant_and_settles_what_was_used() -> None:
    lease = Lease(ACCOUNT, LIMIT, granted=100)
    assert lease.has_room(60)
    lease.draw(60, 1.0)
    assert not lease.has_room(41)
    assert (lease.room, lease.held) == (40, 60)
    lease.settle(60, 70)
    assert (lease.room, lease.held, lease.spent) == (30, 0, 70)
    lease.settle(0, 50)
    assert lease.room == -20
    assert lease.has_room(0)
    assert not lease.has_room(1)


def test_a_lease_says_once_it_is_low_that_the_next_block_is_due() -> None:
    lease = Lease(ACCOUNT, LIMIT, granted=100, low=50, free=1)
    assert not lease.draw(50, 1.0)
    assert lease.draw(1, 2.0)
    assert (lease.held, lease.used_at) == (51, 2.0)
    lease.free = 0
    assert not lease.draw(1, 3.0), "nothing is to be had"


def test_a_lease_takes_no_older_answer_than_it_took() -> None:
    lease = Lease(ACCOUNT, LIMIT)
    lease.take(Grant(ACCOUNT, 2, 200, 20, 700))
    lease.take(Grant(ACCOUNT, 1, 900, 10, 0))
    assert (lease.granted, lease.settled, lease.free, lease.answered) == (200, 20, 700, 2)


# --- many processes and a bad wire ----------------------------------------------------------------


@dataclass
class Books:
    """The store's side of one account, in the fewest words."""

    rows: dict[int, Row] = field(default_factory=dict)
    # What ended processes spent, or may have.
    left: int = 0
    doubts: int = 0

    @property
    def granted(self) -> int:
        return sum(row.granted for row in self.rows.values())

    def answer(self, process: int, ask: Ask, live: int) -> Grant:
        mine = self.rows.get(process, Row())
        others = self.granted - mine.granted + self.left
        self.rows[process] = row = grant(ask, mine, others, live)
        spent = sum(row.spent for row in self.rows.values())
        free = max(0, ask.limit - others - row.granted)
        return Grant(ask.account, ask.number, row.granted, spent + self.left, free)


@dataclass
class Owner:
    """A process: a lease a window, the holds of its calls, and the numbers of its asks."""

    leases: dict[int, Lease] = field(default_factory=dict)
    holds: list[tuple[int, int]] = field(default_factory=list)
    number: int = 0

    def lease(self, window: int, limit: int) -> Lease:
        lease = self.leases.setdefault(window, Lease(ACCOUNT._replace(window=window), limit))
        lease.limit = limit
        return lease

    def ask(self, lease: Lease, need: int, keep: bool) -> Ask:
        self.number += 1
        lease.asked = self.number
        floor = lease.spent + lease.held
        if not keep and not need:
            # At once: nothing may be drawn on what is given back.
            lease.granted = floor
        return Ask(lease.account, self.number, lease.limit, lease.spent, floor, need, keep)


processes = some.integers(0, 3)
amounts = some.integers(0, LIMIT // 4)
needs = some.sampled_from((0, 0, 1, 50, LIMIT // 4))


class Budgets(RuleBasedStateMachine):
    """Four seats for processes, one budget a window, and messages that come when they like."""

    def __init__(self) -> None:
        super().__init__()
        self.limit = LIMIT
        self.highest_limit = LIMIT
        self.window = 0
        self.books: dict[int, Books] = {0: Books()}
        self.names = iter(range(10**9))
        self.owners: dict[int, Owner] = {}
        self.seats: dict[int, int] = {}
        # Processes that died, before anybody read their journals.
        self.lost: dict[int, Owner] = {}
        self.wire: list[tuple[int, int, Ask]] = []
        # By window: charged beyond its hold; all that was ever spent; what went in doubt and out.
        self.overrun: dict[int, int] = {}
        self.spent: dict[int, int] = {}
        self.in_doubt: dict[int, int] = {}

    def owner(self, seat: int) -> tuple[int, Owner]:
        if seat not in self.seats:
            self.seats[seat] = next(self.names)
            self.owners[self.seats[seat]] = Owner()
        return self.seats[seat], self.owners[self.seats[seat]]

    def deliver(self, process: int, window: int, ask: Ask) -> Grant | None:
        """What the store does with it; None: the process was ended, and its message is void."""
        if process not in self.owners and process not in self.lost:
            return None
        return self.books[window].answer(process, ask, max(1, len(self.owners)))

    @rule(seat=processes, need=needs, keep=some.booleans(), back=some.integers(0, 1))
    def exchange(self, seat: int, need: int, keep: bool, back: int) -> None:
        process, owner = self.owner(seat)
        window = max(0, self.window - back)
        lease = owner.lease(window, self.limit)
        message = owner.ask(lease, need, keep)
        answer = self.deliver(process, window, message)
        assert answer is not None
        assert answer.settled + answer.free <= max(self.limit, answer.settled)
        lease.take(answer)
        self.wire.append((process, window, message))

    @rule(seat=processes, need=needs, keep=some.booleans(), arrives=some.booleans())
    def exchange_in_vain(self, seat: int, need: int, keep: bool, arrives: bool) -> None:
        """It arrives now, or late by `come_late`, or never; its answer is lost either way."""
        process, owner = self.owner(seat)
        lease = owner.lease(self.window, self.limit)
        message = owner.ask(lease, need, keep)
        self.wire.append((process, self.window, message))
        if arrives:
            self.deliver(*self.wire[-1])

    @precondition(lambda self: self.wire)
    @rule(which=some.integers(0, 10**6))
    def come_late(self, which: int) -> None:
        self.deliver(*self.wire[which % len(self.wire)])

    @rule(seat=processes, amount=amounts)
    def hold(self, seat: int, amount: int) -> None:
        _, owner = self.owner(seat)
        lease = owner.lease(self.window, self.limit)
        if lease.has_room(amount):
            lease.draw(amount, 0.0)
            owner.holds.append((self.window, amount))

    @rule(seat=processes, used=some.floats(0, 1), beyond=some.sampled_from((0, 0, 0, 7)))
    def settle(self, seat: int, used: float, beyond: int) -> None:
        _, owner = self.owner(seat)
        if not owner.holds:
            return
        window, amount = owner.holds.pop(0)
        spent = int(amount * used)
        if beyond:
            spent = amount + beyond
            self.overrun[window] = self.overrun.get(window, 0) + beyond
        owner.leases[window].settle(amount, spent)
        self.spent[window] = self.spent.get(window, 0) + spent

    @rule(seat=processes)
    def die(self, seat: int) -> None:
        if seat in self.seats:
            process = self.seats.pop(seat)
            self.lost[process] = self.owners.pop(process)

    @precondition(lambda self: self.lost)
    @rule(which=some.integers(0, 3))
    def recover(self, which: int) -> None:
        """Its journal is read: what was settled is spent, what it held is in doubt."""
        process = sorted(self.lost)[which % len(self.lost)]
        owner = self.lost.pop(process)
        for window, lease in owner.leases.items():
            books = self.books[window]
            books.rows.pop(process, None)
            books.left += lease.spent + lease.held
            books.doubts += lease.held
            self.in_doubt[window] = self.in_doubt.get(window, 0) + lease.held

    @rule()
    def resolve(self) -> None:
        for window, books in self.books.items():
            books.left -= books.doubts
            self.in_doubt[window] = self.in_doubt.get(window, 0) - books.doubts
            books.doubts = 0

    @rule(limit=some.sampled_from((LIMIT // 2, LIMIT, LIMIT * 2)))
    def change_limit(self, limit: int) -> None:
        self.limit = limit
        self.highest_limit = max(limit, self.highest_limit)

    @rule()
    def open_next_window(self) -> None:
        self.window += 1
        self.books[self.window] = Books()

    def everybody(self) -> Iterable[Owner]:
        return [*self.owners.values(), *self.lost.values()]

    @invariant()
    def the_limit_is_never_passed(self) -> None:
        for window, books in self.books.items():
            most = self.highest_limit + self.overrun.get(window, 0)
            assert books.granted + books.left <= most
            leases = [owner.leases[window] for owner in self.everybody() if window in owner.leases]
            held = sum(lease.held for lease in leases)
            doubts = self.in_doubt.get(window, 0)
            assert self.spent.get(window, 0) + held + doubts <= most

    @invariant()
    def nobody_may_spend_more_than_the_store_knows_of(self) -> None:
        for process, owner in self.owners.items():
            for window, lease in owner.leases.items():
                known = self.books[window].rows.get(process, Row()).granted
                assert lease.granted <= max(known, lease.spent + lease.held)

    def teardown(self) -> None:
        """All come to their end: what is left is what was spent, and the rest can be had."""
        for seat in list(self.seats):
            self.die(seat)
        while self.lost:
            self.recover(0)
        for message in self.wire:
            assert self.deliver(*message) is None
        for window, books in self.books.items():
            assert books.left == self.spent.get(window, 0) + self.in_doubt.get(window, 0)
            answer = books.answer(-1, make_ask(1, limit=self.limit, need=10 * LIMIT), 1)
            assert answer.granted == max(0, self.limit - books.left)


TestBudgets = Budgets.TestCase
TestBudgets.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


# --- nearly all of a budget can be used -----------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 4, 7])
@pytest.mark.parametrize("amount", [1, 10, 37])
def test_nearly_the_whole_budget_can_be_spent_with_small_holds(count: int, amount: int) -> None:
    limit = 10_000
    books = Books()
    owners = [Owner() for _ in range(count)]
    spent = 0

    def call(process: int, owner: Owner) -> bool:
        lease = owner.lease(0, limit)
        if not lease.has_room(amount):
            lease.take(books.answer(process, owner.ask(lease, amount, True), count))
            if not lease.has_room(amount):
                return False
        lease.draw(amount, 0.0)
        lease.settle(amount, amount)
        return True

    while True:
        served = sum(call(process, owner) for process, owner in enumerate(owners))
        spent += served * amount
        if not served:
            break
        # Now and then one is idle, and gives back what it does not need.
        idle = spent % count
        lease = owners[idle].lease(0, limit)
        lease.take(books.answer(idle, owners[idle].ask(lease, 0, False), count))
    assert limit * 0.95 <= spent <= limit
    assert books.granted <= limit
