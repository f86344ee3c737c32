"""To the real SDKs, through the real daemon, a stream from the cache is as good as a live one."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import daemon
from tests.fakes.upstream import FakeUpstream, Reply, Request
from tests.flow.test_replay_sdk import HEAD, LIVE, USAGE

SCRIPT = Path(__file__).parent / "openai_cache.py"
PYTHONS = {"newest": sys.executable, "openai 2": os.environ.get("RUNGWAY_TEST_OPENAI2_PYTHON", "")}


async def serve(request: Request, reply: Reply) -> None:
    """The stream that is named in the question."""
    if request.method == "GET":
        await reply.json({"object": "list", "data": [{"id": "org/m", "object": "model"}]})
        return
    body = request.json
    assert body["stream"], "what is whole is told from the stream that was kept"
    await reply.start()
    for chunk in LIVE[body["messages"][0]["content"]]:
        await reply.event(chunk)
    await reply.event({**HEAD, "choices": [], "usage": USAGE})
    await reply.event(b"[DONE]")
    await reply.end()


@pytest.mark.parametrize("version", [name for name, python in PYTHONS.items() if python])
async def test_the_sdk_cannot_tell_a_kept_stream_from_a_live_one(
    version: str, tmp_path: Path
) -> None:
    async with FakeUpstream(serve) as up:
        config = tmp_path / "rungway.toml"
        config.write_text(
            f'[server]\nauth = "open"\n[state]\nurl = "sqlite://{tmp_path}/state.db"\n'
            f'[cache]\nchat = "always"\n[backends.b]\nkind = "openai"\nurl = "{up.url}"\n'
            '[ladders.chat]\nrungs = [{ backend = "b", model = "org/m" }]\n'
        )
        with daemon("--config", str(config), log=tmp_path / "log") as running:
            command = [PYTHONS[version], str(SCRIPT), running.url, *LIVE]
            done = await asyncio.to_thread(
                subprocess.run, command, capture_output=True, text=True, timeout=60
            )
            assert done.returncode == 0, done.stderr
            major = "2." if version == "openai 2" else "3."
            assert done.stdout.startswith(major)
            asked = sum(request.method == "POST" for request in up.requests)
            assert asked == len(LIVE)
