"""Time limits by phase, which move without cost and never swallow a cancellation."""

from __future__ import annotations

import asyncio

import pytest

from router.errors import UpstreamTimeout
from router.flow.patience import Patience


async def hang() -> None:
    await asyncio.get_running_loop().create_future()


async def test_a_phase_that_lasts_too_long_is_cut_by_its_name() -> None:
    with pytest.raises(UpstreamTimeout) as caught:
        with Patience("a/b") as patience:
            patience.wait("first_token", 0.02)
            await hang()
    assert caught.value.phase == "first_token"
    assert caught.value.cause == "timeout_first_token"
    assert "a/b" in caught.value.message
    assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]


async def test_a_longer_later_phase_replaces_a_shorter_one() -> None:
    with Patience("x") as patience:
        patience.wait("first_token", 0.02)
        patience.wait("idle", 5)
        await asyncio.sleep(0.05)


async def test_a_shorter_later_phase_replaces_a_longer_one() -> None:
    with pytest.raises(UpstreamTimeout) as caught:
        with Patience("x") as patience:
            patience.wait("first_token", 50)
            patience.wait("idle", 0.02)
            await hang()
    assert caught.value.phase == "idle"


async def test_nothing_is_limited_while_paused() -> None:
    with Patience("x") as patience:
        patience.wait("idle", 0.02)
        patience.pause()
        await asyncio.sleep(0.06)
        patience.wait("idle", 5)


async def test_a_cancellation_from_outside_stays_one() -> None:
    async def work() -> None:
        with Patience("x") as patience:
            patience.wait("idle", 5)
            await hang()

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_an_error_inside_passes() -> None:
    with pytest.raises(KeyError):
        with Patience("x") as patience:
            patience.wait("idle", 5)
            raise KeyError
