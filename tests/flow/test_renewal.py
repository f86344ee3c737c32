"""The books: what processes tell the store and get from it, and what is left when they end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from router.errors import QuotaUsedUp
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
