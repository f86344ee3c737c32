"""An answer is waited for so long, not counting what the loop was held up."""

from __future__ import annotations

import asyncio
import time

from router.flow import asking
from router.flow.asking import is_answered


async def test_what_is_there_or_comes_soon_is_heard() -> None:
    loop = asyncio.get_running_loop()
    asked = loop.create_future()
    loop.call_soon(asked.set_result, 1)
    assert await is_answered(asked, 10.0)
    assert await is_answered(asked, 0.0)


async def test_what_does_not_come_is_given_up_and_goes_on() -> None:
    asked = asyncio.get_running_loop().create_future()
    assert not await is_answered(asked, 0.01)
    assert not asked.done()


async def test_what_the_loop_was_held_up_is_not_counted() -> None:
    loop = asyncio.get_running_loop()
    asked = loop.create_future()
    waiting = asyncio.ensure_future(is_answered(asked))
    await asyncio.sleep(0)
    hold_up(asking.ASK_S + 0.2)
    loop.call_later(0.02, asked.set_result, 1)
    assert await waiting


async def test_and_that_once_only() -> None:
    asked = asyncio.get_running_loop().create_future()
    waiting = asyncio.ensure_future(is_answered(asked, 0.05))
    await asyncio.sleep(0)
    loop = asyncio.get_running_loop()

    def again() -> None:
        if not waiting.done():
            hold_up(0.2)
            loop.call_soon(again)

    again()
    async with asyncio.timeout(10):
        assert not await waiting


def hold_up(for_s: float) -> None:
    """As a loop is that has much to do in one turn."""
    until = time.monotonic() + for_s
    while time.monotonic() < until:
        pass
