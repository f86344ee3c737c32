"""Admission, holds and settlement: every hold once, whatever the order, and never above a limit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.errors import QuotaUsedUp, RateLimited, RouterError, StateUnavailable, TooLarge
from router.flow.ledger import Admission, Hold, Ledger
from router.flow.renewal import Books
from router.flow.tasks import Tasks
from router.store.base import Store
from router.store.sqlite import SqliteStore
from router.types import Key, KeyLimits, Price, Rung, Usage

DAY = 1_700_006_400.0  # 2023-11-15 00:00:00 UTC
RUNG = Rung("b", "m")
# A dollar for a thousand tokens: a nano-dollar sum is easy to read.
PRICE = Price(1_000_000, 1_000_000)
A_TOKEN = 1_000


@dataclass
class Desk:
    """A ledger on books of its own; `now` and `boot` are its clocks."""

    store: Store
    ledger: Ledger
    books: Books
    now: list[float]
    boot: list[float]

    async def admit(self, key: Key) -> Admission:
        return await self.ledger.admit(key, 1)

    async def hold(self, admission: Admission, tokens: int, price: Price = PRICE) -> Hold:
        return await self.ledger.hold(
            admission, "l", RUNG, price, input_tokens=tokens, output_tokens=0
        )

    async def settled(self, key: str) -> int:
        await self.books.flush()
        lines = await self.store.usage(["key"], key=key, since=0, until=2**40)
        return sum(line.totals.settled for line in lines)


@asynccontextmanager
async def desk(store: Store | None = None, name: str = "p") -> AsyncIterator[Desk]:
    now, boot = [DAY + 30], [1_000.0]
    own = store is None
    if store is None:
        store = await SqliteStore.open(None, wall_s=lambda: now[0], alive_s=lambda: boot[0])
    # A busy machine is no slow store.
    books = Books(store, name, lambda: boot[0], lambda: now[0], ask_s=10.0)
    ledger = Ledger(books, lambda: now[0])
    tasks = Tasks()
    await books.start(None)
    tasks.spawn(books.run(), "books")
    try:
        yield Desk(store, ledger, books, now, boot)
    finally:
        await tasks.aclose()
        await books.end()
        if own:
            await store.aclose()


def key(**limits: int) -> Key:
    return Key("k", limits=KeyLimits(**limits))


async def test_a_body_over_the_keys_limit_is_refused_and_counts_nothing() -> None:
    async with desk() as d:
        limited = key(max_input_bytes=10)
        with pytest.raises(TooLarge):
            await d.ledger.admit(limited, 11)
        d.ledger.leave(await d.ledger.admit(limited, 10), "l")
        await d.books.flush()
        (line,) = await d.store.usage(["key"], key="k", since=0, until=2**40)
        assert line.totals.requests == 1


async def test_a_hold_is_settled_once() -> None:
    async with desk() as d:
        hold = await d.hold(await d.admit(key()), 10)
        assert d.ledger.settle(hold, Usage(3, 4), answered=True) == 7 * A_TOKEN
        with pytest.raises(AssertionError):
            d.ledger.settle(hold, Usage(3, 4), answered=True)
        assert await d.settled("k") == 7 * A_TOKEN


async def test_a_used_up_budget_says_when_it_opens_again_and_what_is_free_goes_on() -> None:
    async with desk() as d:
        admission = await d.admit(key(usd_per_day=10 * A_TOKEN))
        d.ledger.settle(await d.hold(admission, 10), Usage(10, 0), answered=True)
        with pytest.raises(QuotaUsedUp, match="2023-11-16 00:00:00 UTC") as refused:
            await d.hold(admission, 1)
        assert refused.value.retry_after_s == 86_400 - 30
        assert not refused.value.should_retry
        d.ledger.settle(await d.hold(admission, 1, Price(0, 0)), Usage(1, 0), answered=False)


async def test_who_left_while_the_store_was_asked_pays_nothing() -> None:
    async with desk() as d:
        one, other = (replace(key(usd_per_day=100 * A_TOKEN), name=name) for name in "ab")
        old, new = await d.admit(one), await d.admit(other)
        asking = asyncio.create_task(d.hold(old, 10))
        await asyncio.sleep(0)
        assert not asking.done()
        assert d.ledger.hand_over(old, new)
        d.ledger.leave(old, "l")
        hold = await asking
        assert hold.admission is new
        assert [lease.held for lease in d.ledger.purse(one).money] == [0]
        assert [lease.held for lease in d.ledger.purse(other).money] == [10 * A_TOKEN]
        assert d.ledger.settle(hold, Usage(7, 0), answered=True) == new.charged == 7 * A_TOKEN
        assert (await d.settled("a"), await d.settled("b")) == (0, 7 * A_TOKEN)


async def test_who_pays_again_after_others_pays_for_what_is_held_next() -> None:
    async with desk() as d:
        one, other, last = [await d.admit(replace(key(), name=name)) for name in "abc"]
        for old, new in pairwise((one, one, other, one, last, other)):
            assert d.ledger.hand_over(old, new)
            assert {admission.payer().key.name for admission in (old, new)} == {new.key.name}
        hold = await d.hold(one, 10)
        assert hold.admission is other
        d.ledger.settle(hold, None, answered=False)


async def test_what_other_calls_hold_is_worth_waiting_for() -> None:
    async with desk() as d:
        admission = await d.admit(key(usd_per_day=10 * A_TOKEN))
        hold = await d.hold(admission, 9)
        with pytest.raises(RateLimited) as refused:
            await d.hold(admission, 2)
        assert refused.value.code == "budget_in_use"
        assert refused.value.should_retry
        d.ledger.settle(hold, Usage(1, 0), answered=True)
        d.ledger.settle(await d.hold(admission, 9), Usage(9, 0), answered=True)


async def test_a_new_window_is_a_new_budget_and_a_call_belongs_to_that_of_its_hold() -> None:
    async with desk() as d:
        limited = key(usd_per_day=10 * A_TOKEN)
        admission = await d.admit(limited)
        yesterdays = await d.hold(admission, 10)
        d.now[0] = DAY + 86_400 + 1
        todays = await d.hold(admission, 10)
        d.ledger.settle(yesterdays, Usage(10, 0), answered=True)
        d.ledger.settle(todays, Usage(10, 0), answered=True)
        with pytest.raises(QuotaUsedUp):
            await d.hold(admission, 1)
        await d.books.flush()
        lines = await d.store.usage(["day"], key="k", since=0, until=2**40)
        assert [(line.group, line.totals.settled) for line in lines] == [
            (("2023-11-15",), 10 * A_TOKEN),
            (("2023-11-16",), 10 * A_TOKEN),
        ]


async def test_a_clock_that_jumps_back_finds_what_was_spent_there() -> None:
    async with desk() as d:
        limited = key(usd_per_day=10 * A_TOKEN)
        admission = await d.admit(limited)
        d.ledger.settle(await d.hold(admission, 10), Usage(10, 0), answered=True)
        d.now[0] = DAY + 3 * 86_400
        d.ledger.settle(await d.hold(admission, 10), Usage(10, 0), answered=True)
        d.now[0] = DAY + 60
        with pytest.raises(QuotaUsedUp):
            await d.hold(admission, 1)


async def test_usage_above_a_hold_is_charged_whole_and_counts_before_the_next() -> None:
    async with desk() as d:
        admission = await d.admit(key(usd_per_day=10 * A_TOKEN))
        d.ledger.settle(await d.hold(admission, 1), Usage(25, 0), answered=True)
        with pytest.raises(QuotaUsedUp):
            await d.hold(admission, 1)
        await d.books.flush()
        (line,) = await d.store.usage(["key"], key="k", since=0, until=2**40)
        assert line.totals.settled == 25 * A_TOKEN
        assert line.totals.overrun == 24 * A_TOKEN


async def test_a_hold_grows_within_the_budget_and_no_further() -> None:
    async with desk() as d:
        admission = await d.admit(key(usd_per_day=10 * A_TOKEN))
        hold = await d.hold(admission, 4)
        await d.ledger.grow_from_store(hold, input_tokens=4, output_tokens=6)
        with pytest.raises(RateLimited):
            await d.ledger.grow_from_store(hold, input_tokens=4, output_tokens=7)
        assert not d.ledger.grow(hold, input_tokens=4, output_tokens=7)
        assert hold.nanousd == 10 * A_TOKEN
        d.ledger.settle(hold, Usage(4, 6), answered=True)
        assert await d.settled("k") == 10 * A_TOKEN


async def test_requests_and_tokens_have_minutes_and_concurrency_has_none() -> None:
    async with desk() as d:
        limited = key(requests_per_minute=2, concurrent=1)
        first = await d.admit(limited)
        with pytest.raises(RateLimited, match="in flight"):
            await d.admit(limited)
        d.ledger.leave(first, "l")
        d.ledger.leave(await d.admit(limited), "l")
        with pytest.raises(RateLimited, match="requests_per_minute") as refused:
            await d.admit(limited)
        assert refused.value.retry_after_s == 30
        d.now[0] += 30
        d.ledger.leave(await d.admit(limited), "l")


async def test_a_refused_call_holds_nothing_anywhere() -> None:
    async with desk() as d:
        limited = key(usd_per_day=100 * A_TOKEN, tokens_per_day=5, concurrent=1)
        admission = await d.admit(limited)
        with pytest.raises(RouterError):
            await d.hold(admission, 6)
        d.ledger.settle(await d.hold(admission, 5), Usage(5, 0), answered=True)
        d.ledger.leave(admission, "l")
        assert not d.ledger.open
        assert all(lease.held == 0 for lease in d.ledger.purse(limited).leases())


async def test_a_session_spends_its_own_share_and_its_parents_budget() -> None:
    async with desk() as d:
        parent = key(usd_per_day=10 * A_TOKEN)
        session = replace(parent, session="s1", session_usd=6 * A_TOKEN)
        admission = await d.admit(session)
        d.ledger.settle(await d.hold(admission, 6), Usage(6, 0), answered=True)
        with pytest.raises(QuotaUsedUp, match="session"):
            await d.hold(admission, 1)
        whole = await d.admit(parent)
        d.ledger.settle(await d.hold(whole, 4), Usage(4, 0), answered=True)
        with pytest.raises(QuotaUsedUp):
            await d.hold(whole, 1)


async def test_a_limit_that_is_new_counts_what_was_spent_before_it() -> None:
    async with desk() as d:
        d.ledger.settle(await d.hold(await d.admit(key()), 8), Usage(8, 0), answered=True)
        admission = await d.admit(key(usd_per_day=10 * A_TOKEN))
        with pytest.raises(QuotaUsedUp):
            await d.hold(admission, 3)
        d.ledger.settle(await d.hold(admission, 2), Usage(2, 0), answered=True)


async def test_without_the_store_calls_go_on_within_the_lease_and_then_it_is_blamed() -> None:
    store = await SqliteStore.open(None)
    async with desk(store) as d:
        limited = key(usd_per_day=1_000 * A_TOKEN)
        admission = await d.admit(limited)
        d.ledger.settle(await d.hold(admission, 1), Usage(1, 0), answered=True)
        await store.aclose()
        d.ledger.settle(await d.hold(admission, 1), Usage(1, 0), answered=True)
        with pytest.raises(StateUnavailable):
            await d.hold(admission, 900)
        d.boot[0] += 3_600
        with pytest.raises(StateUnavailable, match="the key itself is in order"):
            await d.hold(admission, 1)
        free = await d.hold(await d.admit(Key("other")), 5)
        d.ledger.settle(free, None, answered=False)


async def test_a_purse_that_idles_is_forgotten_and_its_budget_is_not() -> None:
    async with desk() as d:
        limited = key(usd_per_day=10 * A_TOKEN)
        admission = await d.admit(limited)
        d.ledger.settle(await d.hold(admission, 10), Usage(10, 0), answered=True)
        d.ledger.leave(admission, "l")
        d.now[0] += 3_600
        d.ledger.forget_idle(900)
        with pytest.raises(QuotaUsedUp):
            await d.hold(await d.admit(limited), 1)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), max_size=60))
def test_whatever_the_order_no_hold_passes_the_limit_and_nothing_stays_held(
    steps: list[tuple[int, int]],
) -> None:
    """0 and 1 hold, 2 settles the oldest, 3 lets the newest grow."""
    limit = 100 * A_TOKEN

    async def play() -> None:
        async with desk() as d:
            admission = await d.admit(key(usd_per_day=limit))
            (lease,) = d.ledger.purse(admission.key).money
            held: list[Hold] = []
            for step, tokens in steps:
                if step < 2:
                    try:
                        held.append(await d.hold(admission, tokens))
                    except StateUnavailable:
                        # A machine that is busy elsewhere may be too slow for a hold to wait.
                        continue
                    except RouterError:
                        assert lease.spent + lease.held + tokens * A_TOKEN > limit
                elif held and step == 2:
                    hold = held.pop(0)
                    d.ledger.settle(hold, Usage(hold.token_count, 0), answered=True)
                elif held:
                    last = held[-1]
                    d.ledger.grow(last, input_tokens=last.token_count, output_tokens=tokens)
                assert lease.spent + lease.held <= lease.granted <= limit
            for hold in held:
                d.ledger.settle(hold, None, answered=False)
            assert lease.held == 0
            assert await d.settled("k") == lease.spent

    asyncio.run(play())
