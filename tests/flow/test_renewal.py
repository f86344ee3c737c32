"""The books: what processes tell the store and get from it, and what is left when they end."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from router.errors import QuotaUsedUp, RateLimited, StateUnavailable
from router.flow.ledger import Hold, Ledger
from router.flow.opening import open_ledger
from router.flow.renewal import Books
from router.flow.tasks import Tasks
from router.store.base import StateRefused
from router.store.journal import Journal
from router.store.sqlite import SqliteStore
from router.types import Key, Usage
from tests.flow.test_ledger import A_TOKEN, DAY, PRICE, RUNG, desk, key


async def test_a_sessions_share_outlives_the_process_that_spent_it() -> None:
    store = await SqliteStore.open(None)
    session = replace(key(), session="k/s1", session_usd=10 * A_TOKEN)
    async with desk(store, "first") as d:
        hold = await d.hold(await d.admit(session), 8)
        d.ledger.settle(hold, Usage(8, 0), answered=True)
    async with desk(store, "second") as d:
        admission = await d.admit(session)
        with pytest.raises(QuotaUsedUp):
            await d.hold(admission, 3)
        d.ledger.settle(await d.hold(admission, 2), Usage(2, 0), answered=True)
    await store.aclose()


async def test_a_journals_folder_is_made_where_the_state_is_elsewhere(tmp_path: Path) -> None:
    store, tasks = await SqliteStore.open(None), Tasks()
    folder = tmp_path / "a" / "b"
    ledger, books = await open_ledger(store, folder, tasks)
    assert [path.suffix for path in folder.iterdir()] == [".journal"]
    assert folder.stat().st_mode & 0o777 == 0o700
    await tasks.aclose()
    await books.end()
    assert not any(folder.iterdir())
    assert ledger.open == {}
    await store.aclose()


async def test_a_place_for_journals_that_is_none_is_refused_with_its_name(tmp_path: Path) -> None:
    store, tasks = await SqliteStore.open(None), Tasks()
    (tmp_path / "file").touch()
    with pytest.raises(StateRefused, match=r"cannot make a journal in .*file/b"):
        await open_ledger(store, tmp_path / "file" / "b", tasks)
    await store.aclose()


async def test_more_keys_at_once_than_one_exchange_carries_are_all_let_in() -> None:
    async with desk() as d:

        async def call(number: int) -> None:
            limited = replace(key(concurrent=5), name=f"k{number}")
            d.ledger.leave(await d.ledger.admit(limited, 1), "l")

        await asyncio.gather(*(call(number) for number in range(1_050)))


async def test_places_that_idled_for_long_are_there_for_the_next_call() -> None:
    async with desk() as d:
        limited = key(concurrent=1)
        for _ in range(4):
            d.ledger.leave(await d.admit(limited), "l")
            for _ in range(3):
                d.boot[0] += 6
                await d.books.flush()


async def test_a_clock_set_back_within_the_day_finds_the_minute_it_shows() -> None:
    async with desk() as d:
        limited = key(requests_per_minute=1)
        d.ledger.leave(await d.admit(limited), "l")
        d.now[0] -= 30
        with pytest.raises(RateLimited):
            await d.admit(limited)
        d.now[0] -= 1
        d.ledger.leave(await d.admit(limited), "l")


async def test_a_full_journal_refuses_who_is_limited_until_there_is_room(tmp_path: Path) -> None:
    store = await SqliteStore.open(None)
    boot = [1_000.0]
    books = Books(store, "p", lambda: boot[0], lambda: DAY)
    ledger, tasks = Ledger(books, lambda: DAY), Tasks()
    # Both sizes are those of a page: it cannot grow.
    journal = Journal.create(
        tmp_path, "p", totals_of=books.totals_of, bytes_min=4_096, bytes_max=4_096
    )
    await books.start(journal)
    tasks.spawn(books.run(), "books")
    limited, free = key(usd_per_day=10**9), Key("free")

    async def hold(of: Key) -> Hold:
        admission = await ledger.admit(of, 1)
        return await ledger.hold(admission, "l", RUNG, PRICE, input_tokens=1, output_tokens=0)

    held = []
    with pytest.raises(StateUnavailable, match="cannot grow"):
        for _ in range(200):
            held.append(await hold(limited))
    (lease,) = ledger.purse(limited).money
    assert lease.held == len(held) * A_TOKEN
    with pytest.raises(StateUnavailable):
        ledger.grow(held[0], input_tokens=2, output_tokens=0)
    assert lease.held == len(held) * A_TOKEN
    # Nothing is refused for the sake of who has no limit; a crash would leave it out.
    ledger.settle(await hold(free), Usage(1, 0), answered=True)
    for one in held:
        ledger.settle(one, Usage(1, 0), answered=True)
    assert lease.held == 0
    boot[0] += 11
    ledger.settle(await hold(free), Usage(1, 0), answered=True)
    ledger.settle(await hold(limited), Usage(1, 0), answered=True)
    await tasks.aclose()
    await books.end()
    lines = await store.usage(["key"], key=None, since=0, until=2**40)
    assert {line.group: line.totals.settled for line in lines} == {
        ("free",): 2 * A_TOKEN,
        ("k",): (len(held) + 1) * A_TOKEN,
    }
    await store.aclose()


async def test_processes_that_each_lack_what_the_other_has_come_to_an_end() -> None:
    clock = [1_000.0]
    store = await SqliteStore.open(None, wall_s=lambda: DAY, alive_s=lambda: clock[0])
    limited = key(usd_per_day=100 * A_TOKEN)
    async with desk(store, "a") as a, desk(store, "b") as b:
        admissions = [(one, await one.admit(limited)) for one in (a, b)]
        for one, admission in admissions:
            one.ledger.settle(await one.hold(admission, 10), Usage(10, 0), answered=True)
        served = 0
        for _ in range(30):
            for one, admission in admissions:
                try:
                    hold = await one.hold(admission, 80)
                except RateLimited:
                    continue
                one.ledger.settle(hold, None, answered=False)
                served += 1
            clock[0] = a.boot[0] = b.boot[0] = clock[0] + 0.5
        assert served
    await store.aclose()
