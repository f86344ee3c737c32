"""What an enemy tried on repeats, drains and limits: nothing runs twice, lies, or stays behind."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import orjson
import pytest

from router.app import make_service
from router.config.load import parse
from router.store import sqlite_file, sqlite_schema
from router.transport.http import HttpClient
from tests.api.test_budgets import ALICE, HI, PRICED, ask, config, usage_of, usd
from tests.api.test_idempotency import ONE, Counting
from tests.api.test_keys import KEYS, ROOT
from tests.fakes.metered import Metered
from tests.fakes.upstream import FakeUpstream
from tests.flow.test_ledger import desk, key
from tests.house import House, ladder_of, open_house

DRAINS = 'on_disconnect = "drain"'
STREAM = {**HI, "stream": True}


async def until(is_so: Any) -> None:
    async with asyncio.timeout(5):
        while not is_so():
            await asyncio.sleep(0)


async def line_of(house: House) -> Any:
    """The only call's line in the log."""
    await until(lambda: house.lines)
    (line,) = house.lines
    return line


async def test_a_name_whose_call_failed_when_its_client_had_left_is_free_again() -> None:
    upstream = Counting()
    async with FakeUpstream(upstream) as up, open_house(ladder_of(up.url)) as house:
        upstream.go.clear()
        upstream.status = 400
        first = asyncio.create_task(house.post("/v1/chat/completions", HI, ONE))
        await until(lambda: upstream.count)
        first.cancel()
        await until(lambda: not house.shared.observer.in_flight)
        upstream.go.set()
        await until(lambda: not house.shared.reuse.draining)
        upstream.status = 200
        other = {**HI, "temperature": 1}
        assert (await house.post("/v1/chat/completions", other, ONE))[0] == 200


@pytest.mark.parametrize("name", [b"\xe9", b"a\tb"])
async def test_a_name_that_no_store_can_write_is_refused(name: bytes) -> None:
    async with FakeUpstream(Counting()) as up, open_house(ladder_of(up.url)) as house:
        url, body = urlsplit(house.url), orjson.dumps(HI)
        reader, writer = await asyncio.open_connection(url.hostname, url.port)
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            b"Idempotency-Key: %b\r\nContent-Length: %d\r\n\r\n%b" % (name, len(body), body)
        )
        answer = await reader.read()
        writer.close()
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert b"invalid_idempotency_key" in answer


async def test_settings_of_a_key_that_no_store_can_write_are_refused() -> None:
    async with open_house(ladder_of("http://127.0.0.1:9", keys=KEYS)) as house:
        body = b'{"name": "x", "bill_to": "\\ud800"}'
        status, answer, _ = await house.post("/router/v1/keys", body, ROOT)
        assert (status, answer["error"]["param"]) == (400, "bill_to")


async def test_the_line_of_a_call_that_was_read_to_its_end_says_all_that_it_used() -> None:
    upstream = Metered(tokens=400, pace=4_000)
    text = config(("{url}", PRICED), key=DRAINS)
    async with FakeUpstream(upstream) as up, open_house(text.replace("{url}", up.url)) as house:
        caller = asyncio.create_task(ask(house, STREAM))
        await until(lambda: upstream.busy)
        caller.cancel()
        line = await line_of(house)
        assert (line["error"], line["rung"]) == ("client_left", "b0/org/m")
        assert line["attempts"] == [{"rung": "b0/org/m", "cause": "ok"}]
        assert line["output_tokens"] == 400
        used = await usage_of(house)
        assert round(line["cost_usd"] * 1e9) == used["settled"]
        assert (used["requests"], dict(house.shared.observer.attempts)) == (
            1,
            {("b0/org/m", "ok"): 1},
        )


async def test_an_attempt_that_another_call_goes_on_with_is_counted_once() -> None:
    upstream = Metered(tokens=400, pace=4_000)
    async with (
        FakeUpstream(upstream) as up,
        open_house(config((up.url, PRICED))) as house,
    ):
        body = {**STREAM, "temperature": 0}
        leader = asyncio.create_task(ask(house, body))
        await until(lambda: upstream.busy)
        joiner = asyncio.create_task(ask(house, body))
        await until(lambda: house.shared.observer.in_flight == 2)
        leader.cancel()
        status, answer, _ = await joiner
        assert status == 200
        await until(lambda: len(house.lines) == 2)
        left, paid = house.lines
        assert (left["error"], left["attempts"]) == ("client_left", [])
        assert paid["attempts"] == [{"rung": "b0/org/m", "cause": "ok"}]
        assert upstream.calls == 1
        assert f"cost_usd={paid['cost_usd']}".encode() in answer


async def test_the_line_of_a_shared_stream_that_a_budget_cut_says_what_it_cost() -> None:
    upstream = Metered(tokens=4_000, obeys=False)
    text = config(("{url}", PRICED), limits=f"usd_per_day = {usd(500)}")
    async with FakeUpstream(upstream) as up, open_house(text.replace("{url}", up.url)) as house:
        _, answer, _ = await ask(house, {**STREAM, "temperature": 0})
        assert b'"finish_reason":"length"' in answer
        line = await line_of(house)
        assert (line["status"], line["rung"]) == (200, "b0/org/m")
        assert round(line["cost_usd"] * 1e9) == (await usage_of(house))["settled"]


async def test_who_leaves_while_the_daemon_drains_is_still_read_to_the_end() -> None:
    upstream = Counting()
    text = config(("{url}", PRICED))
    async with FakeUpstream(upstream) as up, open_house(text.replace("{url}", up.url)) as house:
        upstream.go.clear()
        body, headers = {**HI, "temperature": 0}, {**ALICE, **ONE}
        caller = asyncio.create_task(house.post("/v1/chat/completions", body, headers))
        await until(lambda: upstream.count)
        pipeline = house.gateway.service.pipeline
        drain = asyncio.create_task(pipeline.drain(5))
        await asyncio.sleep(0)
        caller.cancel()
        await until(lambda: house.shared.reuse.draining)
        await asyncio.wait({drain}, timeout=0.2)
        upstream.go.set()
        await drain
        again = await house.post("/v1/chat/completions", body, headers)
        assert (again[0], again[2]["x-rungway-cache"], upstream.count) == (200, "hit", 1)


@pytest.mark.parametrize("headers", [ALICE, {**ALICE, **ONE}])
async def test_a_drain_that_is_over_leaves_nobody_reading(headers: dict[str, str]) -> None:
    upstream = Metered(tokens=4_000, pace=400)
    text = config(("{url}", PRICED), key=DRAINS)
    async with FakeUpstream(upstream) as up, open_house(text.replace("{url}", up.url)) as house:
        body = {**STREAM, "temperature": 0}
        url = house.url + "/v1/chat/completions"
        async with house.client.post(url, json=body, headers=headers) as answer:
            await answer.content.readany()
            await house.gateway.service.pipeline.drain(0)
            with pytest.raises(aiohttp.ClientPayloadError):
                await answer.content.read()
        await until(lambda: not house.shared.observer.in_flight)
        assert not house.shared.reuse.draining
        assert not house.shared.ledger.open
        assert (await line_of(house))["attempts"] == [{"rung": "b0/org/m", "cause": "cancelled"}]


async def test_an_answer_that_the_store_could_not_take_is_not_made_again(tmp_path: Path) -> None:
    upstream = Counting()
    text = config(("{url}", PRICED), state=f'[state]\nurl = "sqlite://{tmp_path}/s.db"')
    headers = {**ALICE, **ONE}
    async with FakeUpstream(upstream) as up:
        text = text.replace("{url}", up.url)
        async with open_house(text) as house, open_house(text) as other:
            upstream.go.clear()
            first = asyncio.create_task(house.post("/v1/chat/completions", HI, headers))
            await until(lambda: upstream.count)
            with closing(sqlite3.connect(tmp_path / "s.db", isolation_level=None)) as database:
                database.execute("BEGIN IMMEDIATE")
                upstream.go.set()
                assert (await first)[0] == 200
                again = await house.post("/v1/chat/completions", HI, headers)
                assert (again[0], again[2]["x-rungway-cache"]) == (200, "hit")
                another = await house.post("/v1/chat/completions", STREAM, headers)
                assert another[0] == 422
            there = await other.post("/v1/chat/completions", HI, headers)
            assert (there[0], there[2]["x-rungway-cache"]) == (200, "hit")
            assert upstream.count == 1


@pytest.mark.parametrize("engine", ["memory", "sqlite"])
async def test_a_limit_that_a_reload_lowers_holds_from_the_next_call_on(
    engine: str, tmp_path: Path
) -> None:
    upstream = Metered(tokens=10, pace=100)
    url = "memory://" if engine == "memory" else f"sqlite://{tmp_path}/s.db"
    client = HttpClient()

    def text(places: int) -> str:
        limits = f"concurrent = {places}\nusd_per_day = {places}"
        return config((up.url, PRICED), limits=limits, state=f'[state]\nurl = "{url}"')

    async with FakeUpstream(upstream) as up, open_house(text(100)) as house:
        body = {**HI, "max_tokens": 10}
        assert {(await ask(house, body))[0] for _ in range(2)} == {200}
        service = make_service(parse(text(2), "test.toml", {}), house.shared, client, {})
        house.gateway.service = service
        for _ in range(2):
            found = await asyncio.gather(*(ask(house, body) for _ in range(6)))
            assert sorted(status for status, _, _ in found) == [200, 200, 429, 429, 429, 429]
        for backend in service.backends.values():
            await backend.aclose()
    await client.aclose()


def test_a_state_that_another_process_is_just_making_is_not_taken_for_a_strangers(
    tmp_path: Path,
) -> None:
    path = tmp_path / "s.db"
    with (
        closing(sqlite3.connect(path, isolation_level=None)) as mine,
        closing(sqlite3.connect(path, isolation_level=None)) as other,
    ):
        other.execute("PRAGMA journal_mode=WAL")
        looks = []

        def make_it(statement: str) -> None:
            looks.append(statement)
            if len([one for one in looks if "BEGIN" not in one]) == 2:
                sqlite_file._migrate(other)

        mine.set_trace_callback(make_it)
        sqlite_file._check_whose(mine, path)
        mine.set_trace_callback(None)
        assert mine.execute("PRAGMA application_id").fetchone() == (sqlite_schema.APPLICATION_ID,)


async def test_vectors_of_who_has_left_are_read_and_charged_where_the_key_drains() -> None:
    upstream = Counting()
    text = config(("{url}", PRICED), key=DRAINS).replace("chat]", 'chat]\ntask = "embeddings"', 1)
    async with FakeUpstream(upstream) as up, open_house(text.replace("{url}", up.url)) as house:
        body = {"model": "chat", "input": ["a"]}
        warm = await house.post("/v1/embeddings", {**body, "input": ["warm"]}, ALICE)
        assert warm[0] == 200
        upstream.go.clear()
        asked = upstream.count
        caller = asyncio.create_task(house.post("/v1/embeddings", body, ALICE))
        await until(lambda: upstream.count > asked)
        caller.cancel()
        await until(lambda: not house.shared.observer.in_flight)
        upstream.go.set()
        await until(lambda: len(house.lines) == 2)
        line = house.lines[1]
        assert (line["error"], line["input_tokens"]) == ("client_left", 2)
        assert line["attempts"] == [{"rung": "b0/org/m", "cause": "ok"}]
        again = await house.post("/v1/embeddings", body, ALICE)
        assert (again[2]["x-rungway-cache"], upstream.count) == ("hit", asked + 1)


@pytest.mark.parametrize("gap", [3, 4, 7, 10])
async def test_nobody_is_refused_for_what_those_who_came_later_have_drawn(gap: int) -> None:
    async with desk() as d:
        limited = key(concurrent=100, requests_per_minute=100)
        calls = []
        for number in range(99):
            calls.append(asyncio.create_task(d.admit(limited)))
            for _ in range(gap if number % 5 == 0 else 0):
                await asyncio.sleep(0)
        assert len(await asyncio.gather(*calls)) == 99
