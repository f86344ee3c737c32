"""A value from outside that is kept: asked for once, and outliving a failure."""

from __future__ import annotations

import asyncio

import pytest

from router.errors import UpstreamError, UpstreamFailed
from router.hub.kept import Kept


class Source:
    def __init__(self) -> None:
        self.fetches = 0
        self.fails = False
        self.began = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()

    async def fetch(self) -> int:
        self.fetches += 1
        self.began.set()
        await self.gate.wait()
        if self.fails:
            raise UpstreamFailed("no")
        return self.fetches


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


async def test_it_is_fetched_again_only_when_too_old() -> None:
    clock, source = Clock(), Source()
    kept: Kept[int] = Kept(clock)
    assert await kept.get(source.fetch, age_s_max=10) == 1
    clock.now += 10
    assert await kept.get(source.fetch, age_s_max=10) == 1
    clock.now += 0.1
    assert await kept.get(source.fetch, age_s_max=10) == 2
    kept.forget()
    assert await kept.get(source.fetch, age_s_max=10) == 3


async def test_callers_at_the_same_time_share_one_fetch() -> None:
    kept, source = Kept[int](Clock()), Source()
    source.gate.clear()
    async with asyncio.TaskGroup() as group:
        calls = [group.create_task(kept.get(source.fetch, age_s_max=0)) for _ in range(5)]
        await source.began.wait()
        assert kept.is_fetching
        source.gate.set()
    assert [call.result() for call in calls] == [1] * 5


async def test_a_cancelled_caller_leaves_the_fetch_to_the_next() -> None:
    kept, source = Kept[int](Clock()), Source()
    source.gate.clear()
    async with asyncio.TaskGroup() as group:
        first = group.create_task(kept.get(source.fetch, age_s_max=0))
        await source.began.wait()
        second = group.create_task(kept.get(source.fetch, age_s_max=0))
        first.cancel()
        source.gate.set()
    assert first.cancelled()
    assert second.result() == 2


async def test_a_failure_keeps_the_value_and_is_not_asked_for_again_at_once() -> None:
    clock, source = Clock(), Source()
    kept: Kept[int] = Kept(clock)
    await kept.get(source.fetch, age_s_max=1)
    clock.now += 2
    source.fails = True
    for _ in range(3):
        with pytest.raises(UpstreamError, match="no"):
            await kept.get(source.fetch, age_s_max=1)
    assert (kept.value, source.fetches) == (1, 2)
    source.fails = False
    clock.now += 6
    assert await kept.get(source.fetch, age_s_max=1) == 3
