"""Several workers as processes: one port, one daemon to its clients, no call lost to a crash."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.conftest import ROOT, Running, daemon
from tests.e2e.test_daemon import is_alive, rungway, until
from tests.fakes.upstream import FakeUpstream, Reply, Request

CHAT = "/v1/chat/completions"
HI = {"model": "chat", "messages": [{"role": "user", "content": "Hi?"}]}
ANSWER = {
    "id": "x",
    "object": "chat.completion",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hi"},
            "finish_reason": "stop",
        }
    ],
    "usage": {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6},
}
CHUNK: Any = {"id": "a", "choices": [{"index": 0, "delta": {"content": "Hi"}}]}


async def answering(request: Request, reply: Reply) -> None:
    if request.method == "GET":
        await reply.json({"object": "list", "data": [{"id": "org/m"}]})
    else:
        await reply.json(ANSWER)


def write_config(
    folder: Path,
    url: str,
    *,
    ladder: str = "chat",
    server: str = "",
    rung: str = "",
    extra: str = "",
) -> Path:
    path = folder / "rungway.toml"
    path.write_text(
        f'[server]\nauth = "open"\nworkers = 2\n{server}\n'
        f'[backends.b]\nkind = "openai"\nurl = "{url}"\n[ladders.{ladder}]\n'
        f'[[ladders.{ladder}.rungs]]\nbackend = "b"\nmodel = "org/m"\n{rung}\n{extra}'
    )
    return path


@asynccontextmanager
async def serving(*arguments: str, log: Path, **environ: str) -> AsyncIterator[Running]:
    """The daemon, started and ended beside the loop, on which its upstream is."""
    process = daemon(*arguments, log=log, **environ)
    running = await asyncio.to_thread(process.__enter__)
    try:
        yield running
    finally:
        await asyncio.to_thread(process.__exit__, None, None, None)


def workers_of(running: Running) -> list[int]:
    pid = running.process.pid
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def who(headers: Any) -> str:
    """Which process answered: the ids of its requests begin alike."""
    return str(headers["x-request-id"])[:16]


@asynccontextmanager
async def connections(url: str) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of which each call has a connection of its own."""
    connector = aiohttp.TCPConnector(force_close=True, limit=0)
    async with aiohttp.ClientSession(url, connector=connector) as client:
        yield client


async def chat(client: aiohttp.ClientSession) -> tuple[int, str]:
    async with client.post(CHAT, json=HI) as answer:
        await answer.read()
        return answer.status, who(answer.headers)


async def of_both(client: aiohttp.ClientSession, path: str) -> dict[str, Any]:
    """What each worker says there."""
    found: dict[str, Any] = {}
    async with asyncio.timeout(10):
        while len(found) < 2:
            async with client.get(path) as answer:
                found[who(answer.headers)] = await answer.json()
    return found


async def scraped(client: aiohttp.ClientSession) -> dict[str, float]:
    async with client.get("/metrics") as answer:
        text = await answer.text()
    return {
        sample.name + "".join(f" {value}" for value in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith(("_bucket", "_created"))
    }


CALLS = "rungway_calls_total chat ok b/org/m"


async def test_both_serve_and_their_numbers_add_up(tmp_path: Path) -> None:
    async with FakeUpstream(answering) as up:
        config = write_config(tmp_path, up.url)
        async with serving("--config", str(config), log=tmp_path / "log") as running:
            assert len(workers_of(running)) == 2
            async with connections(running.url) as client:
                answers = await asyncio.gather(*(chat(client) for _ in range(64)))
                assert {status for status, _ in answers} == {200}
                spread = Counter(name for _, name in answers)
                assert len(spread) == 2
                assert min(spread.values()) >= 10, "a hash is no worse than this, nearly ever"
                for _ in range(3):
                    found = await scraped(client)
                    assert found[CALLS] == 64
                    assert found["rungway_tokens_total chat b/org/m input"] == 64 * 5
                    assert found["rungway_call_duration_seconds_count chat chat"] == 64
                    assert found["rungway_calls_in_flight"] == 0
                    assert found["rungway_rung_open b/org/m"] == 1
                    assert found["rungway_workers all"] == found["rungway_workers heard"] == 2
                for status in (await of_both(client, "/router/v1/status")).values():
                    assert status["workers"] == {"heard": 2, "all": 2}
                    (rung,) = status["ladders"]["chat"]["rungs"]
                    assert (rung["limit"], rung["in_flight"], rung["queued"]) == (None, 0, 0)
                    assert rung["total_ms"]["p50"] > 0
                for health in (await of_both(client, "/health")).values():
                    assert health["workers"] == {"heard": 2, "all": 2}
            assert await asyncio.to_thread(running.stop) == 0


async def test_a_killed_worker_comes_back_and_its_backlog_is_served(tmp_path: Path) -> None:
    async with FakeUpstream(answering) as up:
        config = write_config(tmp_path, up.url)
        log = tmp_path / "log"
        async with serving("--config", str(config), log=log) as running:
            async with connections(running.url) as client:
                for _ in range(4):
                    await asyncio.gather(*(chat(client) for _ in range(16)))
                assert (await scraped(client))[CALLS] == 64
                first, second = workers_of(running)
                # It accepts nothing more, and what the kernel took for it waits.
                os.kill(first, signal.SIGSTOP)
                calls = [asyncio.ensure_future(chat(client)) for _ in range(32)]
                served, waiting = await asyncio.wait(calls, timeout=0.5)
                assert served
                assert waiting
                found = await scraped_by_the_other(client)
                assert found["rungway_workers heard"] == 1
                assert found[CALLS] == 64 + len(served), "a counter never falls"
                os.kill(first, signal.SIGKILL)
                answers = await asyncio.gather(*calls)
                assert {status for status, _ in answers} == {200}
                assert second in workers_of(running)
                assert first not in workers_of(running)
                assert len(workers_of(running)) == 2
                found = await scraped(client)
                assert found[CALLS] == 64 + 32, "what the killed one had counted stays counted"
                assert found["rungway_worker_restarts_total"] == 1
                assert len(await of_both(client, "/health")) == 2
            assert await asyncio.to_thread(running.stop) == 0
        text = log.read_text()
        assert "was ended by signal 9: starting it again" in text
        assert "serves again" in text


async def scraped_by_the_other(client: aiohttp.ClientSession) -> dict[str, float]:
    """A scrape while one worker hangs: of several askers one comes to the other."""
    asks = [asyncio.ensure_future(scraped(client)) for _ in range(8)]
    done, late = await asyncio.wait(asks, return_when=asyncio.FIRST_COMPLETED)
    for one in late:
        one.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    return done.pop().result()


async def test_others_serve_while_one_is_killed_again_and_again(tmp_path: Path) -> None:
    """Who had a connection to the killed one may lose it; nobody else notices."""
    async with FakeUpstream(answering) as up:
        config = write_config(tmp_path, up.url)
        async with serving("--config", str(config), log=tmp_path / "log") as running:
            survivor = workers_of(running)[1]
            async with connections(running.url) as client:
                outcomes: Counter[str] = Counter()
                ended = asyncio.Event()

                async def load() -> None:
                    while not ended.is_set():
                        try:
                            status, _ = await chat(client)
                            outcomes[str(status)] += 1
                        except aiohttp.ClientError:
                            outcomes["lost"] += 1

                loads = [asyncio.ensure_future(load()) for _ in range(8)]
                async with asyncio.timeout(20):
                    for _ in range(3):
                        (victim,) = set(workers_of(running)) - {survivor}
                        os.kill(victim, signal.SIGKILL)
                        enough = outcomes["200"] + 50
                        while outcomes["200"] < enough or len(workers_of(running)) < 2:
                            await asyncio.sleep(0)
                ended.set()
                await asyncio.gather(*loads)
                assert set(outcomes) <= {"200", "lost"}
                assert outcomes["lost"] <= 3 * 8
                assert survivor in workers_of(running)


async def test_a_reload_is_taken_by_all_or_none(tmp_path: Path) -> None:
    async with FakeUpstream(answering) as up:
        config = write_config(tmp_path, up.url)
        log = tmp_path / "log"
        async with serving("--config", str(config), log=log) as running:
            async with connections(running.url) as client:

                async def models() -> list[list[str]]:
                    found = await of_both(client, "/v1/models")
                    return [[model["id"] for model in one["data"]] for one in found.values()]

                def reload() -> tuple[int, str, str]:
                    return rungway("reload", "--url", running.url, cwd=tmp_path)

                write_config(tmp_path, up.url, ladder="other", extra="[nonsense]\n")
                code, _, errors = await asyncio.to_thread(reload)
                assert code == 1
                assert "the file is refused, the old configuration stays:" in errors
                assert await models() == [["chat"]] * 2
                write_config(tmp_path, up.url, ladder="other")
                assert (await asyncio.to_thread(reload))[:2] == (0, "reloaded\n")
                assert await models() == [["other"]] * 2
                write_config(tmp_path, up.url, ladder="third")
                running.process.send_signal(signal.SIGHUP)
                async with asyncio.timeout(10):
                    while await models() != [["third"]] * 2:
                        pass
                # Who is started later has the configuration of the others.
                first = workers_of(running)[0]
                os.kill(first, signal.SIGKILL)
                await asyncio.to_thread(until, lambda: "serves again" in log.read_text())
                assert await models() == [["third"]] * 2
            assert log.read_text().count("reloaded: 1 ladders") == 2


async def test_a_drain_ends_the_calls_of_all(tmp_path: Path) -> None:
    may_end = asyncio.Event()

    async def streaming(request: Request, reply: Reply) -> None:
        if request.method == "GET":
            return await answering(request, reply)
        await reply.start()
        await reply.event(CHUNK)
        await may_end.wait()
        await reply.event({**CHUNK, "choices": [{**CHUNK["choices"][0], "finish_reason": "stop"}]})
        await reply.event(b"[DONE]")
        await reply.end()

    async with FakeUpstream(streaming) as up:
        config = write_config(tmp_path, up.url)
        async with serving("--config", str(config), log=tmp_path / "log") as running:
            async with connections(running.url) as client:
                answers = [await client.post(CHAT, json={**HI, "stream": True}) for _ in range(16)]
                assert len({who(answer.headers) for answer in answers}) == 2
                for answer in answers:
                    assert b"Hi" in await answer.content.readany()
                # systemd and a terminal tell every process; that is one word, not three.
                for pid in (*workers_of(running), running.process.pid):
                    os.kill(pid, signal.SIGTERM)
                host, port = running.url.removeprefix("http://").split(":")
                await asyncio.to_thread(until, lambda: _is_refused(host, int(port)))
                may_end.set()
                for answer in answers:
                    assert (await answer.read()).endswith(b"data: [DONE]\n\n")
            assert await asyncio.to_thread(running.process.wait, 10) == 0


def _is_refused(host: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) != 0


async def test_a_second_signal_ends_the_calls_of_all(tmp_path: Path) -> None:
    async def hanging(request: Request, reply: Reply) -> None:
        if request.method == "GET":
            return await answering(request, reply)
        await reply.start()
        await reply.event(CHUNK)
        await reply.client_left()

    async with FakeUpstream(hanging) as up:
        config = write_config(tmp_path, up.url)
        log = tmp_path / "log"
        async with serving("--config", str(config), log=log) as running:
            streams = [await raw_stream(running.url) for _ in range(16)]
            running.process.send_signal(signal.SIGINT)
            told = "stopping: waiting up to 30 s for"
            await asyncio.to_thread(until, lambda: log.read_text().count(told) == 2)
            running.process.send_signal(signal.SIGINT)
            for reader, writer in streams:
                raw = await reader.read()
                assert b'"code":"draining"' in raw
                assert b"[DONE]" not in raw
                writer.close()
            assert await asyncio.to_thread(running.process.wait, 10) == 0


async def raw_stream(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A streamed call whose first event has come."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = json.dumps({**HI, "stream": True})
    head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(f"{head}{body}".encode())
    await reader.readuntil(b'"Hi"')
    return reader, writer


async def test_nobody_joins_the_port(tmp_path: Path) -> None:
    async with FakeUpstream(answering) as up:
        config = write_config(tmp_path, up.url)
        alone = tmp_path / "alone.toml"
        alone.write_text(config.read_text().replace("workers = 2", "workers = 1"))
        async with serving("--config", str(config), log=tmp_path / "log") as running:
            port = running.url.rpartition(":")[2]
            for host in ("127.0.0.1", "localhost"):
                for path in (config, alone):
                    arguments = ("serve", "--config", str(path), "--host", host, "--port", port)
                    code, _, errors = await asyncio.to_thread(rungway, *arguments, cwd=tmp_path)
                    assert code == 1
                    assert f"{host}:{port} is taken, perhaps by another Rungway" in errors
                    assert "Traceback" not in errors


async def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    async with FakeUpstream(answering) as up:
        config = write_config(tmp_path, up.url)
        async with serving("--config", str(config), log=tmp_path / "log") as running:
            workers = workers_of(running)
            running.process.kill()
            await asyncio.to_thread(until, lambda: not any(is_alive(pid) for pid in workers))
        assert "the parent process is gone" in (tmp_path / "log").read_text()


async def test_what_one_worker_learns_of_a_rung_the_other_knows(tmp_path: Path) -> None:
    async def busy(request: Request, reply: Reply) -> None:
        if request.method == "GET":
            return await answering(request, reply)
        await reply.json({"error": {"message": "busy"}}, 429, {"retry-after": "60"})

    async with FakeUpstream(busy) as up:
        config = write_config(tmp_path, up.url)
        async with serving("--config", str(config), log=tmp_path / "log") as running:
            async with connections(running.url) as client:
                assert (await chat(client))[0] == 429
                asked = sum(one.method == "POST" for one in up.requests)
                async with asyncio.timeout(5):
                    while True:
                        async with client.get("/router/v1/status") as answer:
                            (rung,) = (await answer.json())["ladders"]["chat"]["rungs"]
                        if "states" not in rung:
                            break
                assert rung["state"] == "cooling"
                assert rung["until"] > 50
                answers = await asyncio.gather(*(chat(client) for _ in range(16)))
                assert {status for status, _ in answers} == {429}
                assert len({name for _, name in answers}) == 2
                assert sum(one.method == "POST" for one in up.requests) == asked


async def test_systemd_hears_of_the_parent_alone(tmp_path: Path) -> None:
    """The unit has NotifyAccess=main: the word of any other process would count for nothing."""
    async with FakeUpstream(answering) as up:
        config = write_config(tmp_path, up.url)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            path = str(tmp_path / "notify")
            manager.bind(path)
            manager.settimeout(10)
            manager.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)

            def hear() -> tuple[bytes, int]:
                data, extra, _, _ = manager.recvmsg(1000, 1000)
                return data.partition(b"\n")[0], int.from_bytes(extra[0][2][:4], sys.byteorder)

            log = tmp_path / "log"
            async with serving("--config", str(config), log=log, NOTIFY_SOCKET=path) as running:
                parent = running.process.pid
                assert hear() == (b"READY=1", parent)
                running.process.send_signal(signal.SIGHUP)
                assert hear() == (b"RELOADING=1", parent)
                assert await asyncio.to_thread(hear) == (b"READY=1", parent)
                running.process.send_signal(signal.SIGTERM)
                assert hear() == (b"STOPPING=1", parent)


CANNOT_START = """
import os
from pathlib import Path
from router.config.load import load
from router.daemon import StartError
from router.workers.parent import Parent

def read():
    return load(Path("rungway.toml"), {**os.environ, "GONE": "hf_x"})

try:
    Parent(read(), read, print).run()
except StartError as error:
    print("StartError:", error)
"""


def test_a_worker_that_cannot_start_fails_the_start_with_its_words(tmp_path: Path) -> None:
    config = write_config(tmp_path, "http://127.0.0.1:1", server="port = 0")
    config.write_text(config.read_text().replace("[ladders", 'token = "env:GONE"\n[ladders', 1))
    done = subprocess.run(
        [sys.executable, "-c", CANNOT_START],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
        check=False,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.startswith("StartError: ")
    assert "GONE" in done.stdout
    assert "Traceback" not in done.stderr


async def test_commands_see_one_daemon_with_the_limits_of_its_file(tmp_path: Path) -> None:
    async with FakeUpstream(answering) as up:
        config = write_config(tmp_path, up.url, rung="max_in_flight = 9")
        async with serving("--config", str(config), log=tmp_path / "log") as running:
            code, out, _ = await asyncio.to_thread(
                rungway, "explain", "--url", running.url, cwd=tmp_path, stdin=json.dumps(HI)
            )
            assert (code, "take  b/org/m" in out) == (0, True)
            ready = await asyncio.to_thread(httpx.get, f"{running.url}/ready")
            assert ready.status_code == 200
            code, out, _ = await asyncio.to_thread(
                rungway, "status", cwd=tmp_path, RUNGWAY_URL=running.url
            )
            assert (code, "b/org/m  closed  0 of 9 in flight" in out) == (0, True)
