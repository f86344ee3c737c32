"""The books: what processes tell the store and get from it, and what is left when they end."""

from __future__ import annotations

from dataclasses import replace

import pytest

from router.errors import QuotaUsedUp
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
