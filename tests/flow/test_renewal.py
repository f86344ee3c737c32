"""The books: what processes tell the store and get from it, and what is left when they end."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from router.errors import QuotaUsedUp, RateLimited
from router.flow.opening import open_ledger
from router.flow.tasks import Tasks
from router.store.base import StateRefused
from router.store.sqlite import SqliteStore
from router.types import Usage
from tests.flow.test_ledger import A_TOKEN, desk, key


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
