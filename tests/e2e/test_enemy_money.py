"""What an enemy tried on the state of the daemon as a process."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

from tests.e2e.test_daemon import until
from tests.e2e.test_workers import answering, serving, workers_of, write_config
from tests.fakes.upstream import FakeUpstream


async def test_books_that_are_adopted_once_are_not_adopted_by_a_worker_that_comes_later(
    tmp_path: Path,
) -> None:
    log, state = tmp_path / "log", tmp_path / "state"
    state.mkdir()
    async with FakeUpstream(answering) as up:
        path = write_config(tmp_path, up.url)
        arguments = ("--config", str(path), "--adopt-state")
        async with serving(*arguments, log=log, STATE_DIRECTORY=str(state)) as running:
            for one in state.glob("state.db*"):
                one.unlink()
            os.kill(workers_of(running)[0], signal.SIGKILL)
            said = "its data was lost or replaced"
            await asyncio.to_thread(until, lambda: said in log.read_text())
