"""Budgets of real processes: shared by several, and after `kill -9` at any moment.

`RUNGWAY_CRASHES=100` plays as many crashes as the promise speaks of; by default there are a few.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import signal
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from router.store.sqlite_schema import APPLICATION_ID
from router.types import Price
from tests.e2e.conftest import Running, daemon
from tests.e2e.test_daemon import rungway
from tests.fakes.metered import Metered
from tests.fakes.upstream import FakeUpstream
from tests.store.server import ValkeyServer

CRASHES = int(os.environ.get("RUNGWAY_CRASHES", "6"))
USD_PER_MTOK = 10
PRICE = Price.per_mtok(USD_PER_MTOK, USD_PER_MTOK)
A_TOKEN = 10_000
SECRET = "sk-alice"
MESSAGES: Any = [{"role": "user", "content": "Hi?"}]


def write_config(folder: Path, upstream: str, *, tokens: int, state: str, server: str = "") -> Path:
    """For a key that may spend so many tokens' worth, on this state."""
    path = folder / "rungway.toml"
    digest = hashlib.sha256(SECRET.encode()).hexdigest()
    path.write_text(
        f'[server]\n{server}\n[state]\nurl = "{state}"\n'
        f'[backends.b]\nkind = "openai"\nurl = "{upstream}"\n'
        "[ladders.chat]\nqueue_max = 1000\n"
        '[[ladders.chat.rungs]]\nbackend = "b"\nmodel = "org/m"\nmax_in_flight = 256\n'
        f"usd_per_mtok = {{ input = {USD_PER_MTOK}, output = {USD_PER_MTOK} }}\n"
        f'[keys.alice]\nsha256 = "{digest}"\nadmin = true\n'
        f"[keys.alice.limits]\nusd_per_day = {tokens * A_TOKEN / 1e9:.6f}\n"
        "concurrent = 300\nrequests_per_minute = 1000000\n"
    )
    return path


@asynccontextmanager
async def running(config: Path, name: str) -> AsyncIterator[Running]:
    """A daemon that starts and stops beside this loop, which its upstream needs."""
    opening = daemon("--config", str(config), log=config.parent / f"{name}.log")
    process = await asyncio.to_thread(opening.__enter__)
    try:
        yield process
    finally:
        await asyncio.to_thread(opening.__exit__, None, None, None)


async def usage_of(url: str) -> dict[str, int]:
    """Alice's nano-dollars."""
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {SECRET}"}) as client:
        body = (await client.get(f"{url}/router/v1/usage", timeout=10)).json()
    line: dict[str, int] = body["data"][0] if body["data"] else {}
    return {
        "settled": line.get("nano_usd", 0),
        **{name: line.get(f"{name}_nano_usd", 0) for name in ("held", "in_doubt", "overrun")},
        "silent": body["silent_nano_usd"].get("alice", 0),
    }


def sdk(url: str, **more: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=SECRET, timeout=30, **more)


async def call(client: openai.AsyncOpenAI, *, stream: bool) -> str:
    """One call to its end: "" or the code of its refusal, or "broken"."""
    try:
        answer = await client.chat.completions.create(
            model="chat", messages=MESSAGES, max_tokens=40, stream=stream
        )
        if isinstance(answer, openai.AsyncStream):
            async for _ in answer:
                pass
    except openai.APIStatusError as error:
        return str(error.code)
    except (openai.APIError, httpx.HTTPError):
        return "broken"
    return ""


async def spend_all(client: openai.AsyncOpenAI) -> None:
    """Call again and again, as the SDK is told to, until the budget is used up."""
    while (refused := await call(client, stream=True)) != "insufficient_quota":
        assert refused in ("", "budget_in_use", "rate_limit_exceeded"), refused


# --- several processes --------------------------------------------------------------------------


@dataclass(frozen=True)
class Fleet:
    """Processes that share one budget: daemons, each with so many workers, on a kind of state."""

    daemons: int
    state: str
    server: str = ""


FLEETS = {
    "two daemons on a file": Fleet(2, "sqlite"),
    "two daemons on a Valkey": Fleet(2, "valkey"),
    "two workers": Fleet(1, "sqlite", "workers = 2"),
}


@pytest.fixture
def valkey_url(tmp_path: Path) -> Iterator[str]:
    server = ValkeyServer(tmp_path)
    server.start()
    yield server.url
    server.kill()


@pytest.mark.parametrize("name", FLEETS)
async def test_processes_share_a_budget_to_the_last_and_never_pass_it(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    fleet, meter = FLEETS[name], Metered(tokens=40, pace=400)
    limit = 100 * 51
    if fleet.state == "valkey":
        state = request.getfixturevalue("valkey_url")
    else:
        state = f"sqlite://{tmp_path}/state.db"
    async with AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(FakeUpstream(meter))
        config = write_config(
            tmp_path, upstream.url, tokens=limit, state=state, server=fleet.server
        )
        starting = [running(config, f"d{place}") for place in range(fleet.daemons)]
        urls = [(await stack.enter_async_context(one)).url for one in starting]
        clients = [
            await stack.enter_async_context(sdk(urls[place % len(urls)], max_retries=0))
            for place in range(4)
        ]
        found = await asyncio.gather(
            *(call(clients[place % 4], stream=place % 8 < 4) for place in range(200))
        )
        assert set(found) <= {"", "budget_in_use", "rate_limit_exceeded", "insufficient_quota"}
        assert 50 < found.count("") <= 100
        assert meter.bill(PRICE) <= limit * A_TOKEN
        patient = [one.with_options(max_retries=12) for one in clients]
        await asyncio.gather(*(spend_all(one) for one in patient))
        used = await usage_of(urls[0])
        assert 0.95 * limit * A_TOKEN <= used["settled"] <= limit * A_TOKEN
        assert abs(used["settled"] - meter.bill(PRICE)) <= 0.01 * limit * A_TOKEN
        assert used["held"] == used["in_doubt"] == used["overrun"] == 0


# --- crashes ------------------------------------------------------------------------------------


async def test_after_any_number_of_crashes_nothing_is_lost_and_nothing_passes_the_limit(
    tmp_path: Path,
) -> None:
    meter = Metered(tokens=40, pace=100)
    # So that the budget is used up about when the crashes end.
    limit = CRASHES * 40 * 60 * A_TOKEN
    chance = random.Random(2026)
    async with FakeUpstream(meter) as upstream:
        config = write_config(
            tmp_path, upstream.url, tokens=limit // A_TOKEN, state=f"sqlite://{tmp_path}/state.db"
        )
        for number in range(CRASHES):
            async with running(config, "d") as process:
                before = await usage_of(process.url)
                counted = before["settled"] + before["in_doubt"]
                assert meter.bill(PRICE) <= counted <= limit, f"after {number} crashes"
                assert before["held"] == before["silent"] == 0
                async with sdk(process.url, max_retries=0) as client:
                    burst = [
                        asyncio.create_task(call(client, stream=place % 4 > 0))
                        for place in range(40)
                    ]
                    await asyncio.wait(burst, timeout=chance.uniform(0.02, 0.6))
                    process.stop(signal.SIGKILL)
                    await asyncio.gather(*burst)
            async with asyncio.timeout(5):
                while upstream.open_connections:
                    await asyncio.sleep(0)
        async with running(config, "d") as process:
            before = await usage_of(process.url)
            assert meter.bill(PRICE) <= before["settled"] + before["in_doubt"] <= limit
            assert before["in_doubt"] > 0
            async with httpx.AsyncClient(headers={"Authorization": f"Bearer {SECRET}"}) as client:
                answer = await client.post(
                    f"{process.url}/router/v1/usage/resolve", json={"charge": False}
                )
            assert answer.json()["nano_usd"] == before["in_doubt"]
            meter.pace = 2_000
            async with sdk(process.url, max_retries=12) as client:
                await asyncio.gather(*(spend_all(client) for _ in range(20)))
            after = await usage_of(process.url)
            assert after["in_doubt"] == after["held"] == after["silent"] == 0
            assert 0.95 * limit <= after["settled"] <= limit
            print(f"{CRASHES} crashes: billed {meter.bill(PRICE)}, before {before}, after {after}")


# --- a state that cannot be used ----------------------------------------------------------------


def damaged(path: Path) -> None:
    path.write_bytes(b"SQLite format 3\0" + b"\xff" * 5_000)


def newer(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute(f"PRAGMA application_id={APPLICATION_ID}")
        database.execute("PRAGMA user_version=999")


def of_another_program(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE notes (text)")


def a_folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (damaged, "it is damaged"),
        (newer, "written by a newer Rungway"),
        (of_another_program, "the database of another program"),
        (a_folder, "it is a folder"),
    ],
)
def test_a_state_that_cannot_be_used_stops_the_start_with_clear_words_and_is_left_alone(
    spoil: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "state.db"
    spoil(path)
    before = path.read_bytes() if path.is_file() else b""
    config = write_config(tmp_path, "http://127.0.0.1:9", tokens=1, state=f"sqlite://{path}")
    code, said, complaint = rungway("serve", "--port", "0", "--config", str(config), cwd=tmp_path)
    assert code == 1
    assert words in complaint
    assert str(path) in complaint
    assert "Traceback" not in complaint + said
    assert before == (path.read_bytes() if path.is_file() else b"")
