"""What a call leaves is freed with it: nothing of it waits for the garbage collector.

A call that did would keep its body, its connection and its frames for as long as the collector
takes to come, which under load is tens of megabytes and pauses.
"""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest

from tests.api.test_cache import HI, STREAM, auth, config
from tests.fakes.counting import Counting
from tests.fakes.upstream import FakeUpstream
from tests.house import House, open_house

UNKEPT: dict[str, Any] = {**HI, "temperature": 1.0}
EMBED = {"model": "embed", "input": ["a"]}
Case = Callable[[House, Counting, Any], Awaitable[None]]


def another(body: Any, number: int) -> Any:
    """What was not asked before."""
    if "input" in body:
        return {**body, "input": [f"text {number}"]}
    return {**body, "messages": [{"role": "user", "content": f"Hi {number}?"}]}


async def ask(house: House, body: Any, **headers: str) -> int:
    path = "/v1/embeddings" if "input" in body else "/v1/chat/completions"
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    status, _, _ = await house.post(path, body, {**auth("alice"), **named})
    return status


async def answered(house: House, model: Counting, body: Any) -> None:
    assert await ask(house, body) == 200


async def failed(house: House, model: Counting, body: Any) -> None:
    model.status = 400
    assert await ask(house, body) == 400


async def without_a_rung(house: House, model: Counting, body: Any) -> None:
    model.status = 401
    assert await ask(house, body) in (502, 503)


async def left(house: House, model: Counting, body: Any) -> None:
    model.may_answer.clear()
    model.arrived.clear()
    leaving = asyncio.ensure_future(ask(house, body))
    await model.arrived.wait()
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)


async def joined(house: House, model: Counting, body: Any) -> None:
    model.may_answer.clear()
    model.arrived.clear()
    callers = [asyncio.ensure_future(ask(house, body)) for _ in range(3)]
    while house.shared.observer.in_flight < 3:
        await asyncio.sleep(0)
    await model.arrived.wait()
    callers.pop(0).cancel()
    model.may_answer.set()
    assert await asyncio.gather(*callers) == [200, 200]


@pytest.mark.parametrize("case", [answered, failed, without_a_rung, left, joined])
@pytest.mark.parametrize("body", [HI, STREAM, UNKEPT, {**UNKEPT, "stream": True}, EMBED])
async def test_a_call_leaves_nothing_to_the_collector(case: Case, body: Any) -> None:
    async with serving() as (house, model):
        await found_by(case, house, model, body)


@pytest.mark.parametrize("case", [answered, failed, without_a_rung, left])
@pytest.mark.parametrize("rules", ["hedge_after_s = 9", 'rescue = "continue"'])
@pytest.mark.parametrize("body", [HI, STREAM])
async def test_nor_does_one_of_a_ladder_that_does_more(case: Case, rules: str, body: Any) -> None:
    async with serving(rules) as (house, model):
        await found_by(case, house, model, body)


@pytest.mark.parametrize("body", [HI, STREAM, EMBED])
async def test_nor_does_one_with_a_name(body: Any) -> None:
    async with serving() as (house, model):

        async def named(house: House, model: Counting, body: Any) -> None:
            assert await ask(house, body, idempotency_key=str(body)) == 200

        await found_by(named, house, model, body)


async def found_by(case: Case, house: House, model: Counting, body: Any) -> None:
    # What is made once is not the calls'.
    await case(house, model, another(body, -1))
    await settled(house)
    with collected() as found:
        for number in range(5):
            before = len(house.lines)
            await case(house, model, another(body, number))
            await settled(house, before)
    assert not found, "of Rungway's own, unreachable but not freed"


@asynccontextmanager
async def serving(rules: str = "") -> AsyncIterator[tuple[House, Counting]]:
    model = Counting()
    async with FakeUpstream(model) as up, open_house(config(up.url, up.url, ladder=rules)) as house:
        yield house, model


async def settled(house: House, lines: int = 0) -> None:
    """All calls are over, and what they did last is done."""
    async with asyncio.timeout(10):
        while house.shared.observer.in_flight or len(house.lines) <= lines:
            await asyncio.sleep(0)
    # A question of its own: what was to be done soon after the calls is done by then.
    await house.get("/health", auth("alice"))


@contextmanager
def collected() -> Iterator[Counter[str]]:
    """The garbage of the time inside, by Rungway's own types."""
    found: Counter[str] = Counter()
    gc.collect()
    gc.disable()
    try:
        yield found
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        found.update(
            type(one).__qualname__
            for one in gc.garbage
            if type(one).__module__.startswith("router.")
        )
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
