"""Background tasks are kept, and their failures are told."""

from __future__ import annotations

import asyncio

import pytest

from router.flow.tasks import Tasks


async def test_a_failed_task_is_logged_with_its_name(caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        raise KeyError("odd")

    tasks = Tasks()
    task = tasks.spawn(fail(), "the odd one")
    with pytest.raises(KeyError):
        await task
    await asyncio.sleep(0)
    assert "the odd one" in caplog.text


async def test_closing_ends_what_runs() -> None:
    tasks = Tasks()
    task = tasks.spawn(asyncio.Event().wait(), "waits")
    await tasks.aclose()
    assert task.cancelled()
