"""The backend against a real Gradio app in a process of its own (`tests/fakes/gradio_app.py`).

The app is started once for the file; each test has its own backend, and nothing is shared but the
app's queue.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from queue import Empty, Queue
from threading import Thread

import orjson
import pytest

from router.backends.base import EventKind, State
from router.backends.gradio_space import GradioSpaceBackend
from router.config.secrets import Credential
from router.core.vectors import unpack
from router.errors import RungRefused, UpstreamFailed
from router.hub.spaces import Spaces
from router.transport.http import HttpClient
from router.types import Rung
from tests.backends.contract import chat_attempt, embed_attempt, read_to_end, text_of

APP = Path(__file__).parent.parent / "fakes" / "gradio_app.py"
RUNG = Rung("space", "app")
_START_S = 60.0
_SAID_S = 10.0


class App:
    """The running app: where it is served, and what it says."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._lines: Queue[str | None] = Queue()
        self._said: list[str] = []
        self._process = subprocess.Popen(
            # -P: the app's own folder has a gradio.py that is not Gradio.
            [sys.executable, "-P", "-W", "ignore", str(APP), str(port)],
            env={**os.environ, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line.strip())
        self._lines.put(None)

    def wait_for(self, line: str, within_s: float) -> None:
        """Wait until the app says this line; fails with what it said instead."""
        deadline = time.monotonic() + within_s
        try:
            while (said := self._lines.get(timeout=max(0.0, deadline - time.monotonic()))) != line:
                assert said is not None, "\n".join(["the app ended:", *self._said[-20:]])
                self._said.append(said)
        except Empty:
            told = "\n".join(self._said[-20:])
            pytest.fail(f"the app did not say {line!r} within {within_s:g} s:\n{told}")

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()


@pytest.fixture(scope="module")
def app() -> Iterator[App]:
    running = App()
    try:
        running.wait_for("ready", _START_S)
        yield running
    finally:
        running.stop()


@pytest.fixture
async def backend(app: App) -> AsyncIterator[GradioSpaceBackend]:
    client = HttpClient()
    space = GradioSpaceBackend(
        "space",
        url=app.url,
        space=None,
        api_name=None,
        inputs=None,
        client=client,
        credential=Credential(),
        spaces=Spaces(client),
    )
    yield space
    await space.aclose()
    await client.aclose()


def said(text: str, *, system: str = "") -> list[dict[str, str]]:
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": text}]


async def test_a_stream_brings_each_word_once(backend: GradioSpaceBackend) -> None:
    attempt = chat_attempt(RUNG, stream=True, messages=said("one two three"))
    stream = await backend.stream_chat(attempt)
    events = await read_to_end(stream)
    text, watch = text_of(events)
    assert text == "one two three | be nice | 64 | 0"
    assert watch.is_complete
    assert sum(event.kind is EventKind.CHUNK for event in events) > 2
    assert events[-1].kind is EventKind.DONE


async def test_system_prompt_and_max_tokens_have_their_own_inputs(
    backend: GradioSpaceBackend,
) -> None:
    attempt = chat_attempt(RUNG, messages=said("hi", system="be terse"), max_tokens=9999)
    answer = orjson.loads((await backend.complete_chat(attempt)).body)
    assert answer["choices"][0]["message"]["content"] == "hi | be terse | 512 | 0"


async def test_the_same_backend_embeds(backend: GradioSpaceBackend) -> None:
    answer = await backend.embed(embed_attempt(RUNG, ["a", "four"]))
    assert [unpack(raw) for raw in answer.vectors] == [[1.0, 0.5, -1.0], [4.0, 0.5, -1.0]]


async def test_an_error_of_the_apps_is_told(backend: GradioSpaceBackend) -> None:
    with pytest.raises(UpstreamFailed, match="the model exploded"):
        await backend.complete_chat(chat_attempt(RUNG, messages=said("boom")))


async def test_a_quota_closes_the_rung_for_as_long_as_it_says(backend: GradioSpaceBackend) -> None:
    with pytest.raises(RungRefused, match="ZeroGPU") as caught:
        await backend.complete_chat(chat_attempt(RUNG, messages=said("quota")))
    assert caught.value.cool_s == 3723


async def test_a_crash_tells_nothing_of_the_app(backend: GradioSpaceBackend) -> None:
    with pytest.raises(UpstreamFailed, match="without saying why") as caught:
        await backend.complete_chat(chat_attempt(RUNG, messages=said("crash")))
    assert "secret" not in caught.value.message


async def test_leaving_a_stream_stops_the_generator(app: App, backend: GradioSpaceBackend) -> None:
    stream = await backend.stream_chat(chat_attempt(RUNG, stream=True, messages=said("endless")))
    while not any(event.kind is EventKind.CHUNK for event in await stream.read()):
        continue
    stream.close()
    await asyncio.to_thread(app.wait_for, "left", _SAID_S)


async def test_a_probe_finds_it_up(backend: GradioSpaceBackend) -> None:
    assert (await backend.probe()).state is State.UP
