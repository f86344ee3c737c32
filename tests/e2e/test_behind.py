"""A daemon has aiohttp in memory when a client needs it, and not before: read from the kernel's own
list of what the process has mapped.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import httpx
import pytest

from tests.e2e.conftest import Running
from tests.e2e.test_daemon import write_config
from tests.e2e.test_workers import ANSWER, CHAT, HI, answering, serving, workers_of
from tests.fakes.upstream import FakeUpstream

# What no daemon needs for a first answer. `aiohttp` alone is a fifth of an idle process.
LATE: tuple[str, ...] = (
    "aiohttp",
    "email",
    "http.client",
    "httpx",
    "prometheus_client",
    "urllib.request",
    "valkey",
)
LATE += ("router.backends.gradio_space", "router.backends.openai", "router.hub.detect")


def has_aiohttp(pid: int) -> bool:
    return "/aiohttp/" in Path(f"/proc/{pid}/maps").read_text()


async def in_chunks() -> AsyncIterator[bytes]:
    body = json.dumps(HI).encode()
    for at in range(0, len(body), 20):
        yield body[at : at + 20]


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    async with FakeUpstream(answering) as up:
        config = write_config(tmp_path, up.url)
        async with serving("--config", str(config), log=tmp_path / "log") as started:
            yield started


def test_a_start_imports_nothing_that_can_wait() -> None:
    ask = f"import sys, router.cli.serve; print([n for n in {LATE!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


async def test_plain_requests_need_no_aiohttp(running: Running) -> None:
    async with httpx.AsyncClient(base_url=running.url) as client:
        for method, path, status in (
            ("GET", "/", 200),
            ("GET", "/health", 200),
            ("HEAD", "/health", 200),
            ("GET", "/ready", 200),
            ("GET", "/metrics", 200),
            ("GET", "/v1/models?limit=5", 200),
            ("GET", "/v1/models/chat", 200),
            ("GET", "/router/v1/status", 200),
            ("GET", "/nothing", 404),
            ("DELETE", "/v1/models", 405),
            ("OPTIONS", "/v1/models", 405),
            ("PATCH", CHAT, 405),
            ("PUT", CHAT, 405),
        ):
            assert (await client.request(method, path)).status_code == status
        preflight = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
        assert (await client.options(CHAT, headers=preflight)).status_code == 403
        assert (await client.post("/router/v1/explain", json=HI)).status_code == 200
        assert (await client.post(CHAT, json=HI)).json()["choices"] == ANSWER["choices"]
    assert not has_aiohttp(running.process.pid)


async def test_a_body_in_chunks_may_be_the_very_first_request(running: Running) -> None:
    async with aiohttp.ClientSession(running.url) as client:
        async with client.post(CHAT, data=in_chunks()) as answer:
            assert answer.status == 200
            assert (await answer.json())["choices"] == ANSWER["choices"]
    assert has_aiohttp(running.process.pid)


async def test_bodies_in_chunks_and_plain_ones_are_served_side_by_side(running: Running) -> None:
    async with aiohttp.ClientSession(running.url) as client:

        async def ask(*, is_plain: bool) -> int:
            body = json.dumps(HI) if is_plain else in_chunks()
            async with client.post(CHAT, data=body) as answer:
                assert (await answer.json())["choices"] == ANSWER["choices"]
                return answer.status

        for _ in range(5):
            assert await ask(is_plain=True) == 200
        asked = [ask(is_plain=at % 3 > 0) for at in range(60)]
        assert await asyncio.gather(*asked) == [200] * 60
    assert has_aiohttp(running.process.pid)


async def test_old_clients_and_upgrades_may_be_the_first(running: Running) -> None:
    url = httpx.URL(running.url)

    async def first_line(data: bytes) -> bytes:
        reader, writer = await asyncio.open_connection(url.host, url.port)
        writer.write(data)
        try:
            async with asyncio.timeout(20):
                return await reader.readline()
        finally:
            writer.close()

    head = b"GET /health HTTP/%b\r\nHost: localhost\r\n%b\r\n"
    asked = [(b"1.0", b""), (b"1.1", b"Connection: Upgrade\r\nUpgrade: h2c\r\n"), (b"1.1", b"")]
    lines = await asyncio.gather(*(first_line(head % one) for one in asked))
    assert [line.split()[1] for line in lines] == [b"200"] * 3


async def test_each_worker_has_it_where_it_needs_it(tmp_path: Path) -> None:
    async with FakeUpstream(answering) as up:
        config = write_config(tmp_path, up.url)
        config.write_text(config.read_text().replace("[server]", "[server]\nworkers = 2"))
        async with serving("--config", str(config), log=tmp_path / "log") as running:
            async with aiohttp.ClientSession(running.url) as client:
                async with client.post(CHAT, data=in_chunks()) as answer:
                    assert answer.status == 200
                assert sorted(map(has_aiohttp, workers_of(running))) == [False, True]
                async with client.get("/health") as answer:
                    assert answer.status == 200
            assert not has_aiohttp(running.process.pid)
