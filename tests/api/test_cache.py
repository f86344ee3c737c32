"""Answers used again, through the whole house: what they say, cost and count, and for whom."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest

from router.app import make_service
from router.config.load import parse
from router.flow.probes import probe_all
from router.transport.http import HttpClient
from tests.fakes.counting import Counting, floats_of, words_of
from tests.fakes.upstream import FakeUpstream
from tests.house import House, open_house

HI = {"model": "chat", "messages": [{"role": "user", "content": "Hi?"}], "temperature": 0}
STREAM = {**HI, "stream": True}
USAGE = {"stream_options": {"include_usage": True}}
KEYS = ("alice", "bob")
# A dollar for a million: a token is a thousand nano-dollars.
PRICED = "usd_per_mtok = { input = 1, output = 1 }"


def auth(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer sk-{key}"}


def config(
    *urls: str,
    cache: str = "",
    limits: str = "",
    ladder: str = "",
    server: str = "",
    key: str = "",
    rung: str = PRICED,
    kind: str = "openai",
    state: str = "",
) -> str:
    parts = [f"[server]\n{server}\n{state}\n[cache]\n{cache}"]
    for task in ("chat", "embeddings")[kind == "tei" :]:
        name = "chat" if task == "chat" else "embed"
        parts.append(f'[ladders.{name}]\ntask = "{task}"\nqueue_max = 5000\n')
        parts.append(ladder if task == "chat" else "")
        parts += [
            f'[[ladders.{name}.rungs]]\nbackend = "b{place}"\nmodel = "org/m"\n{rung}'
            for place in range(len(urls))
        ]
    for place, url in enumerate(urls):
        parts.append(f'[backends.b{place}]\nkind = "{kind}"\nurl = "{url}"')
    for name in KEYS:
        digest = hashlib.sha256(f"sk-{name}".encode()).hexdigest()
        parts.append(f'[keys.{name}]\nsha256 = "{digest}"\nadmin = true\n{key}')
        parts.append(f"[keys.{name}.limits]\n{limits if name == 'alice' else ''}")
    return "\n".join(parts)


@asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[tuple[House, Counting]]:
    model = Counting()
    async with (
        FakeUpstream(model) as up,
        open_house(config(up.url, **settings), HUB_SECRET="s3cret") as house,
    ):
        yield house, model


async def ask(
    house: House, body: Any, key: str = "alice", **headers: str
) -> tuple[int, Any, dict[str, str]]:
    return await house.post("/v1/chat/completions", body, {**auth(key), **headers})


async def embed(
    house: House, texts: list[str], key: str = "alice", more: Any = (), **headers: str
) -> tuple[int, Any, dict[str, str]]:
    body = {"model": "embed", "input": texts, **dict(more)}
    return await house.post("/v1/embeddings", body, {**auth(key), **headers})


def said(raw: bytes) -> tuple[str, list[Any], bool]:
    """A stream's text, its chunks, and whether it ended well."""
    chunks = [orjson.loads(one) for one in re.findall(rb"data: (\{.*)\n\n", raw)]
    texts = [one["choices"][0]["delta"].get("content") or "" for one in chunks if one["choices"]]
    return "".join(texts), chunks, raw.count(b"data: [DONE]") == 1


def text_of(answer: Any) -> str:
    if isinstance(answer, bytes):
        text, _, is_whole = said(answer)
        assert is_whole
        return text
    return str(answer["choices"][0]["message"]["content"])


async def usage_of(house: House, key: str = "alice") -> dict[str, int]:
    status, body, _ = await house.get("/router/v1/usage?group=key", auth(key))
    assert status == 200
    lines = [line for line in body["data"] if line["key"] == key]
    if not lines:
        return {"requests": 0, "tokens": 0, "nano_usd": 0}
    (line,) = lines
    tokens = line["input_tokens"] + line["output_tokens"]
    return {
        "requests": line["requests"],
        "tokens": tokens,
        "nano_usd": line["nano_usd"],
    }


async def vectors_are_right(answer: Any, texts: list[str], generation: int = 0) -> None:
    assert [item["index"] for item in answer["data"]] == list(range(len(texts)))
    for text, item in zip(texts, answer["data"], strict=True):
        assert item["embedding"] == floats_of(text, generation=generation), text


# --- chat: found again --------------------------------------------------------------------------


@pytest.mark.parametrize("first", [HI, STREAM, {**STREAM, **USAGE}])
@pytest.mark.parametrize("second", [HI, STREAM, {**STREAM, **USAGE}])
async def test_an_answer_is_told_again_in_any_form(first: Any, second: Any) -> None:
    async with serving() as (house, model):
        _, live, told = await ask(house, first)
        status, again, headers = await ask(house, second)
        assert (status, len(model.chats)) == (200, 1)
        assert text_of(live) == text_of(again) == words_of(HI)
        assert (told["x-rungway-cache"], headers["x-rungway-cache"]) == ("miss", "hit")
        assert headers["x-rungway-rung"] == "b0/org/m"
        assert headers["x-rungway-attempts"] == "0"
        if isinstance(again, bytes):
            assert b": rungway cost_usd=0\n" in again
            _, chunks, _ = said(again)
            assert (chunks[-1]["choices"] == []) is ("stream_options" in second)
            usage = chunks[-1].get("usage")
        else:
            assert headers["x-rungway-cost-usd"] == "0"
            assert again["choices"][0]["message"]["reasoning"] == "Hm."
            usage = again["usage"]
        if second is not STREAM:
            assert usage == {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
        await house.idle()
        assert [line["cache"] for line in house.lines] == ["miss", "hit"]
        assert house.lines[1]["rung"] == "b0/org/m"
        assert house.lines[1]["attempts"] == []
        # A request, and no tokens.
        assert await usage_of(house) == {"requests": 2, "tokens": 12, "nano_usd": 12_000}


async def test_what_was_asked_otherwise_is_another_question() -> None:
    others: list[Any] = [
        {**HI, "seed": 7},
        {**HI, "messages": [{"role": "user", "content": "Hi!"}]},
        {**HI, "made_up": 1},
        {**HI, "model": "chat:cheapest"},
        {**HI, "tools": [{"type": "function", "function": {"name": "f"}}]},
        {**HI, "response_format": {"type": "json_object"}},
    ]
    async with serving() as (house, model):
        for body in (HI, *others, HI, *others):
            status, _, _ = await ask(house, body)
            assert status == 200
        assert len(model.chats) == 1 + len(others)


async def test_by_chance_is_not_kept_unless_it_is_wished() -> None:
    chances = [{**HI, "temperature": 0.7}, {**HI, "n": 2}]
    async with serving() as (house, model):
        for body in chances * 2:
            _, _, headers = await ask(house, body)
            assert headers["x-rungway-cache"] == "bypass"
        assert len(model.chats) == 4
    async with serving(cache='chat = "always"') as (house, model):
        for body in chances * 2:
            status, answer, _ = await ask(house, body)
            assert (status, len(answer["choices"])) == (200, body.get("n", 1))
        _, raw, headers = await ask(house, {**chances[1], "stream": True})
        assert headers["x-rungway-cache"] == "hit"
        _, chunks, _ = said(raw)
        assert {one["choices"][0]["index"] for one in chunks} == {0, 1}
        assert len(model.chats) == 2


async def test_the_request_s_cache_control_is_obeyed() -> None:
    async with serving() as (house, model):
        await ask(house, HI)
        for control, cache in (
            ("max-age=60", "hit"),
            ("no-cache", "miss"),
            ("max-age=0", "miss"),
            ("no-store", "bypass"),
        ):
            _, _, headers = await ask(house, HI, **{"Cache-Control": control})
            assert headers["x-rungway-cache"] == cache
        assert len(model.chats) == 4


@pytest.mark.parametrize("body", [HI, STREAM])
async def test_what_is_not_whole_or_failed_is_not_kept(body: Any) -> None:
    async with serving(ladder="total_s = 5") as (house, model):
        model.status = 400
        status, _, _ = await ask(house, body)
        assert status == 400
        model.status = 200
        if body is STREAM:
            model.cuts = True
            with pytest.raises(aiohttp.ClientPayloadError):
                await ask(house, body)
            model.cuts = False
        before = len(model.chats)
        _, answer, headers = await ask(house, body)
        assert text_of(answer) == words_of(HI)
        assert headers["x-rungway-cache"] == "miss"
        assert len(model.chats) == before + 1


async def test_off_and_none_at_all() -> None:
    for cache in ('chat = "off"', "memory_mib = 0"):
        async with serving(cache=cache) as (house, model):
            for _ in range(2):
                _, _, headers = await ask(house, HI)
                assert headers["x-rungway-cache"] == "bypass"
            assert len(model.chats) == 2


async def test_a_reload_s_rules_hold_from_then_on() -> None:
    model = Counting()
    async with FakeUpstream(model) as up, open_house(config(up.url)) as house:

        def reload(cache: str) -> None:
            file = parse(config(up.url, cache=cache), "test.toml", {})
            client = HttpClient()
            house.gateway.service = make_service(file, house.shared, client, {})

        await ask(house, HI)
        reload('chat = "off"')
        assert (await ask(house, HI))[2]["x-rungway-cache"] == "bypass"
        reload("")
        assert (await ask(house, HI))[2]["x-rungway-cache"] == "hit"
        reload('scope = "shared"')
        assert (await ask(house, HI))[2]["x-rungway-cache"] == "miss"
        assert (await ask(house, HI, "bob"))[2]["x-rungway-cache"] == "hit"
        reload("memory_mib = 0")
        assert (await ask(house, HI))[2]["x-rungway-cache"] == "bypass"
        assert house.shared.reuse.cache.counts()["chat"].bytes == 0


# --- whose it is --------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["key", "shared"])
async def test_nothing_of_one_key_is_another_s_unless_it_is_shared(scope: str) -> None:
    async with serving(cache=f'scope = "{scope}"') as (house, model):
        for key in KEYS:
            _, answer, _ = await ask(house, HI, key)
            assert text_of(answer) == words_of(HI)
            _, answer, _ = await embed(house, ["a", "b"], key)
            await vectors_are_right(answer, ["a", "b"])
        times = 1 if scope == "shared" else 2
        assert (len(model.chats), model.inputs) == (times, ["a", "b"] * times)
        spent = 0 if scope == "shared" else 12_000 + 6_000
        assert (await usage_of(house, "bob"))["nano_usd"] == spent


@pytest.mark.parametrize("scope", ["key", "shared"])
async def test_what_is_on_its_way_is_joined_within_the_scope(scope: str) -> None:
    async with serving(cache=f'scope = "{scope}"') as (house, model):
        model.may_answer.clear()
        calls = [asyncio.create_task(ask(house, HI, key)) for key in KEYS for _ in range(5)]
        calls += [asyncio.create_task(embed(house, ["a"], key)) for key in KEYS for _ in range(5)]
        wanted = 1 if scope == "shared" else 2
        async with asyncio.timeout(5):
            while house.shared.observer.in_flight < 20 or len(model.chats) < wanted:
                await asyncio.sleep(0)
        model.may_answer.set()
        answers = await asyncio.gather(*calls)
        assert all(status == 200 for status, _, _ in answers)
        assert (len(model.chats), model.inputs) == (wanted, ["a"] * wanted)


async def test_a_session_is_a_key_of_its_own() -> None:
    async with serving() as (house, model):
        await ask(house, HI)
        opened = await house.post("/router/v1/sessions", {"ttl_s": 60}, auth("alice"))
        secret = {"Authorization": f"Bearer {opened[1]['key']}"}
        _, _, headers = await house.post("/v1/chat/completions", HI, secret)
        assert headers["x-rungway-cache"] == "miss"
        assert len(model.chats) == 2


# --- money --------------------------------------------------------------------------------------


async def test_a_key_that_has_spent_all_still_gets_what_is_kept() -> None:
    async with serving(limits="usd_per_day = 0.000060") as (house, model):
        assert (await ask(house, {**HI, "max_tokens": 8}))[0] == 200
        assert (await embed(house, ["a"]))[0] == 200
        for seed in range(9):
            status, body, headers = await ask(house, {**HI, "seed": seed, "max_tokens": 8})
        assert (status, body["error"]["code"]) == (429, "insufficient_quota")
        assert headers["x-rungway-cache"] == "miss"
        asked = len(model.chats)
        for _ in range(3):
            status, _, headers = await ask(house, {**HI, "max_tokens": 8})
            assert (status, headers["x-rungway-cache"]) == (200, "hit")
            status, _, headers = await embed(house, ["a"])
            assert (status, headers["x-rungway-cached-inputs"]) == (200, "1/1")
        assert (len(model.chats), len(model.embeds)) == (asked, 1)


@pytest.mark.parametrize("body", [HI, STREAM])
async def test_what_a_budget_made_shorter_is_the_payer_s_alone(body: Any) -> None:
    """Alice can pay for few tokens, so what she is given is not kept and not Bob's."""
    settings: Any = {"cache": 'scope = "shared"', "limits": "usd_per_day = 0.000060"}
    async with serving(**settings) as (house, model):
        model.may_answer.clear()
        poor = asyncio.create_task(ask(house, {**body, "max_tokens": 500}))
        async with asyncio.timeout(5):
            await model.arrived.wait()
        rich = asyncio.create_task(ask(house, {**body, "max_tokens": 500}, "bob"))
        async with asyncio.timeout(5):
            while house.shared.observer.in_flight < 2:
                await asyncio.sleep(0)
        model.may_answer.set()
        (_, _, poor_headers), (status, answer, headers) = await asyncio.gather(poor, rich)
        assert int(poor_headers["x-rungway-clamped"]) < 500
        assert (status, text_of(answer)) == (200, words_of(HI))
        assert "x-rungway-clamped" not in headers
        assert model.chats[-1]["max_tokens"] == 500
        assert len(model.chats) == 2
        status, _, headers = await ask(house, {**body, "max_tokens": 500}, "bob")
        assert headers["x-rungway-cache"] == "hit", "what Bob paid for is kept"


async def test_want_of_one_key_s_money_is_not_another_s_failure() -> None:
    settings: Any = {"cache": 'scope = "shared"', "limits": "usd_per_day = 0"}
    async with serving(**settings) as (house, _):
        (first, _, _), *others = await asyncio.gather(
            ask(house, HI), *(ask(house, HI, "bob") for _ in range(4))
        )
        assert first in (200, 429)
        assert [status for status, _, _ in others] == [200] * 4
        assert (await ask(house, HI))[0] == 200, "and what is kept is for her too"


# --- on its way ---------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [HI, STREAM, {**STREAM, **USAGE}])
async def test_hundreds_of_identical_calls_are_one_upstream(body: Any) -> None:
    async with serving() as (house, model):
        model.may_answer.clear()
        calls = [asyncio.create_task(ask(house, body)) for _ in range(300)]
        async with asyncio.timeout(20):
            while house.shared.observer.in_flight < 100:
                await asyncio.sleep(0)
        model.may_answer.set()
        answers = await asyncio.gather(*calls)
        assert len(model.chats) == 1
        assert {text_of(answer) for _, answer, _ in answers} == {words_of(HI)}
        told = [headers["x-rungway-cache"] for _, _, headers in answers]
        assert told.count("miss") == 1
        assert set(told) <= {"miss", "joined", "hit"}
        if body is HI:
            costs = sorted(headers["x-rungway-cost-usd"] for _, _, headers in answers)
            assert costs == ["0"] * 299 + ["0.000012"]
        await house.idle()
        paid = [line for line in house.lines if line.get("cost_usd")]
        assert [line["cache"] for line in paid] == ["miss"]
        assert all(line["rung"] == "b0/org/m" for line in house.lines)
        assert await usage_of(house) == {"requests": 300, "tokens": 12, "nano_usd": 12_000}


async def test_hundreds_of_identical_embeddings_are_one_upstream() -> None:
    texts = ["a", "b", "a"]
    async with serving() as (house, model):
        model.may_answer.clear()
        calls = [asyncio.create_task(embed(house, texts)) for _ in range(300)]
        async with asyncio.timeout(20):
            while house.shared.observer.in_flight < 100:
                await asyncio.sleep(0)
        model.may_answer.set()
        for status, answer, _ in await asyncio.gather(*calls):
            assert status == 200
            await vectors_are_right(answer, texts)
        assert model.embeds == [["a", "b"]]
        assert (await usage_of(house))["nano_usd"] == 6_000


@pytest.mark.parametrize("body", [HI, STREAM])
@pytest.mark.parametrize("other", KEYS)
async def test_the_leader_s_leaving_harms_nobody_and_who_stays_pays(body: Any, other: str) -> None:
    async with serving(cache='scope = "shared"') as (house, model):
        model.may_answer.clear()
        leader = asyncio.create_task(ask(house, body))
        async with asyncio.timeout(5):
            await model.arrived.wait()
        joined = [asyncio.create_task(ask(house, body, other)) for _ in range(2)]
        async with asyncio.timeout(5):
            while house.shared.observer.in_flight < 3:
                await asyncio.sleep(0)
            leader.cancel()
            while house.shared.observer.in_flight > 2:
                await asyncio.sleep(0)
        model.may_answer.set()
        answers = await asyncio.gather(*joined)
        assert [text_of(answer) for _, answer, _ in answers] == [words_of(HI)] * 2
        assert (len(model.chats), model.left) == (1, 0)
        await house.idle()
        assert (await usage_of(house, other))["nano_usd"] == 12_000
        paid = [line.get("cost_usd", 0) for line in house.lines]
        assert sorted(paid) == [0, 0, 0.000012]
        assert house.lines[0]["error"] == "client_left"


@pytest.mark.parametrize("body", [HI, STREAM])
async def test_when_all_have_left_the_upstream_is_left_and_the_line_tells_the_cost(
    body: Any,
) -> None:
    async with serving() as (house, model):
        model.may_answer.clear()
        calls = [asyncio.create_task(ask(house, body)) for _ in range(3)]
        async with asyncio.timeout(5):
            while house.shared.observer.in_flight < 3 or not model.chats:
                await asyncio.sleep(0)
            for call in calls:
                call.cancel()
            while house.shared.observer.in_flight or not model.left:
                await asyncio.sleep(0)
        spent = await usage_of(house)
        assert spent["nano_usd"] > 0
        lines = [line.get("cost_usd", 0.0) for line in house.lines]
        assert round(sum(lines) * 1e9) == spent["nano_usd"]
        last = next(line for line in house.lines if line.get("cost_usd"))
        assert [one["cause"] for one in last["attempts"]] == ["cancelled"]


@pytest.mark.parametrize("body", [HI, STREAM])
async def test_a_failure_reaches_all_and_a_next_rung_serves_all(body: Any) -> None:
    bad, good = Counting(), Counting()
    bad.status = 500
    for stands in (False, True):
        bad.may_answer.clear()
        bad.arrived.clear()
        before = len(bad.chats)
        async with (
            FakeUpstream(bad) as one,
            FakeUpstream(good) as two,
            open_house(config(one.url, *[two.url] * stands)) as house,
        ):
            calls = [asyncio.create_task(ask(house, body)) for _ in range(5)]
            async with asyncio.timeout(5):
                await bad.arrived.wait()
                while house.shared.observer.in_flight < 5:
                    await asyncio.sleep(0)
            asked = len(bad.chats)
            bad.may_answer.set()
            answers = await asyncio.gather(*calls)
            assert asked == before + 1
            if stands:
                assert [text_of(answer) for _, answer, _ in answers] == [words_of(HI)] * 5
                assert {headers["x-rungway-rung"] for _, _, headers in answers} == {"b1/org/m"}
                assert len(good.chats) == 1
            else:
                assert {status for status, _, _ in answers} == {502}


async def test_at_the_end_of_the_house_all_who_joined_hear_of_it() -> None:
    async with serving() as (house, model):
        model.may_answer.clear()
        calls = [asyncio.create_task(ask(house, HI)) for _ in range(3)]
        calls += [asyncio.create_task(embed(house, ["a"])) for _ in range(3)]
        async with asyncio.timeout(5):
            while house.shared.observer.in_flight < 6 or not (model.chats and model.embeds):
                await asyncio.sleep(0)
            await house.gateway.service.pipeline.drain(0)
            answers = await asyncio.gather(*calls)
        assert {status for status, _, _ in answers} == {503}
        assert {body["error"]["code"] for _, body, _ in answers} == {"draining"}


async def test_the_last_of_an_escalation_is_not_kept() -> None:
    """A better rung may answer the next time."""
    weak, strong = Counting(), Counting()
    weak.finish = "content_filter"
    strong.status = 500
    async with (
        FakeUpstream(weak) as one,
        FakeUpstream(strong) as two,
        open_house(config(one.url, two.url, ladder='escalate_on = ["content_filter"]')) as house,
    ):
        _, answer, headers = await ask(house, HI)
        assert answer["choices"][0]["finish_reason"] == "content_filter"
        strong.status = 200
        house.shared.board.reopen()
        _, answer, headers = await ask(house, HI)
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert headers["x-rungway-cache"] == "miss"
        assert (await ask(house, HI))[2]["x-rungway-cache"] == "hit"


# --- embeddings ---------------------------------------------------------------------------------


async def test_only_what_is_not_known_goes_upstream() -> None:
    async with serving() as (house, model):
        _, answer, headers = await embed(house, ["b", "d"])
        assert headers["x-rungway-cached-inputs"] == "0/2"
        texts = ["a", "b", "c", "b", "d", "a"]
        _, answer, headers = await embed(house, texts)
        await vectors_are_right(answer, texts)
        assert (headers["x-rungway-cache"], headers["x-rungway-cached-inputs"]) == ("miss", "3/6")
        assert headers["x-rungway-cost-usd"] == "0.000006"
        assert answer["usage"]["prompt_tokens"] == 6 + 3
        _, answer, headers = await embed(house, texts)
        await vectors_are_right(answer, texts)
        assert (headers["x-rungway-cache"], headers["x-rungway-cached-inputs"]) == ("hit", "6/6")
        assert (headers["x-rungway-cost-usd"], answer["usage"]["prompt_tokens"]) == ("0", 6)
        assert model.embeds == [["b", "d"], ["a", "c"]]
        _, answer, _ = await embed(house, ["b"], more={"encoding_format": "base64"})
        raw = base64.b64decode(answer["data"][0]["embedding"])
        assert list(struct.unpack("<8f", raw)) == floats_of("b")
        await house.idle()
        assert [(line["cached_inputs"], line["inputs"]) for line in house.lines] == [
            (0, 2),
            (3, 6),
            (6, 6),
            (1, 1),
        ]
        assert (await usage_of(house))["tokens"] == 12


async def test_dimensions_and_what_is_not_known_are_in_the_key() -> None:
    async with serving() as (house, model):
        for more in ({}, {"dimensions": 4}, {"made_up": True}) * 2:
            status, answer, _ = await embed(house, ["a"], more=more)
            assert status == 200
            width = more.get("dimensions", 8)
            assert answer["data"][0]["embedding"] == floats_of("a", width)
        assert len(model.embeds) == 3


async def test_vectors_of_another_length_are_never_mixed() -> None:
    """The model behind the rung changes, and nothing said so."""
    async with serving() as (house, model):
        await embed(house, ["a"])
        model.width, model.generation = 16, 1
        for texts in (["a", "b"], ["b", "a", "c"]):
            status, answer, headers = await embed(house, texts)
            assert status == 200
            for text, item in zip(texts, answer["data"], strict=True):
                assert item["embedding"] == floats_of(text, 16, 1)
        assert headers["x-rungway-cached-inputs"] == "2/3"
    async with serving() as (house, model):
        await embed(house, ["a"])
        model.width, model.generation = 16, 1
        await embed(house, ["b"])
        _, answer, headers = await embed(house, ["a", "b"])
        assert [len(item["embedding"]) for item in answer["data"]] == [16, 16]
        assert headers["x-rungway-cached-inputs"] == "0/2"


# --- another model ------------------------------------------------------------------------------


async def test_a_tei_server_with_another_revision_is_asked_anew() -> None:
    async with serving(kind="tei") as (house, model):
        service, board = house.gateway.service, house.shared.board

        async def probe() -> None:
            (found,) = await probe_all(service.backends.values(), board)
            service.note_probe("b0", found)

        model.revision = "one"
        await probe()
        for _ in range(2):
            await probe()
            await embed(house, ["a"])
        assert model.inputs == ["a"]
        model.revision, model.generation = "two", 1
        await probe()
        _, answer, _ = await embed(house, ["a"])
        await vectors_are_right(answer, ["a"], generation=1)


async def test_a_rung_whose_canaries_change_is_asked_anew() -> None:
    one, two = Counting(), Counting()
    async with (
        FakeUpstream(one) as first,
        FakeUpstream(two) as second,
        open_house(config(first.url, second.url)) as house,
    ):
        await embed(house, ["a"])
        cache = house.shared.reuse.cache
        assert cache.groups() == {"b0/org/m"}
        one.status = 500
        await embed(house, ["b"])
        assert cache.groups() == {"b0/org/m", "b1/org/m"}
        one.status, one.generation = 200, 1
        house.shared.board.reopen()
        _, answer, _ = await embed(house, ["c"])
        await vectors_are_right(answer, ["c"])
        assert cache.groups() == {"b1/org/m"}


EVENT = {
    "event": {"action": "update", "scope": "repo.content"},
    "repo": {"type": "model", "name": "org/m"},
}
SECRET = {"X-Webhook-Secret": "s3cret"}
HOOKS = 'hub_webhook_secret = "env:HUB_SECRET"'


async def test_the_hub_s_word_drops_what_the_old_model_said() -> None:
    async with serving(server=HOOKS) as (house, model):
        await ask(house, HI)
        await embed(house, ["a"])
        status, body, _ = await house.post("/hooks/hub", EVENT, SECRET)
        assert (status, body) == (200, {"dropped": ["b0/org/m"]})
        assert (await ask(house, HI))[2]["x-rungway-cache"] == "miss"
        assert (await embed(house, ["a"]))[2]["x-rungway-cache"] == "miss"
        other = {**EVENT, "repo": {"type": "model", "name": "org/other"}}
        assert (await house.post("/hooks/hub", other, SECRET))[1] == {"dropped": []}
        assert (await ask(house, HI))[2]["x-rungway-cache"] == "hit"
        assert len(model.chats) == 2


async def test_a_model_by_another_name_is_dropped_too() -> None:
    async with serving(server=HOOKS, kind="tei") as (house, model):
        model.repository = "org/original"
        await probe_all(house.gateway.service.backends.values(), house.shared.board)
        event = {**EVENT, "repo": {"type": "model", "name": "org/original"}}
        _, body, _ = await house.post("/hooks/hub", event, SECRET)
        assert body == {"dropped": ["b0/org/m"]}


async def test_another_worker_s_drop_is_this_one_s_too() -> None:
    async with serving() as (house, _):
        await ask(house, HI)
        house.shared.events.heard("cache_drop", {"rungs": ["b0/org/m"]})
        assert (await ask(house, HI))[2]["x-rungway-cache"] == "miss"


@pytest.mark.parametrize("headers", [{}, {"X-Webhook-Secret": "s3cre"}, {"X-Webhook-Secret": "é"}])
async def test_a_webhook_without_the_secret_is_refused_unread(headers: dict[str, str]) -> None:
    async with serving(server=HOOKS) as (house, _):
        await ask(house, HI)
        status, body, _ = await house.post("/hooks/hub", b"not JSON", headers)
        assert (status, body["error"]["code"]) == (403, "wrong_webhook_secret")
        assert "s3cret" not in str(body)
        assert (await ask(house, HI))[2]["x-rungway-cache"] == "hit"


async def test_a_webhook_that_nobody_expects_or_understands() -> None:
    async with serving() as (house, _):
        status, body, _ = await house.post("/hooks/hub", EVENT, SECRET)
        assert (status, "hub_webhook_secret" in body["error"]["message"]) == (404, True)
    async with serving(server=HOOKS) as (house, _):
        for raw in (b"[]", b"{}", b"nonsense"):
            assert (await house.post("/hooks/hub", raw, SECRET))[0] == 400


# --- the second tier, and what is counted -------------------------------------------------------


async def test_what_was_kept_is_there_after_a_restart(tmp_path: Path) -> None:
    state = f'[state]\nurl = "sqlite://{tmp_path}/state.db"'
    model = Counting()
    async with FakeUpstream(model) as up:
        async with open_house(config(up.url, state=state)) as house:
            await ask(house, STREAM)
            await embed(house, ["a", "b"])
        async with open_house(config(up.url, state=state)) as house:
            for _ in range(2):
                _, answer, headers = await ask(house, HI)
                assert (text_of(answer), headers["x-rungway-cache"]) == (words_of(HI), "hit")
                _, answer, headers = await embed(house, ["b", "a"])
                await vectors_are_right(answer, ["b", "a"])
                assert headers["x-rungway-cache"] == "hit"
            _, text, _ = await house.get("/metrics", auth("alice"))
            assert b'cache_lookups_total{kind="embeddings",result="hit",tier="store"} 2.0' in text
            assert b'cache_lookups_total{kind="chat",result="hit",tier="memory"} 1.0' in text
    assert (len(model.chats), model.inputs) == (1, ["a", "b"])


async def test_what_the_store_cannot_have_is_not_asked_for(tmp_path: Path) -> None:
    state = f'[state]\nurl = "sqlite://{tmp_path}/state.db"'
    async with FakeUpstream(Counting()) as up, open_house(config(up.url, state=state)) as house:
        tier = house.shared.reuse.cache.tier
        assert tier is not None
        # It is read in the background, from the start on.
        async with asyncio.timeout(5):
            while tier.contents.may_have(bytes(32)):
                await asyncio.sleep(0)
        assert (await ask(house, HI))[2]["x-rungway-cache"] == "miss"
        assert (await ask(house, HI))[2]["x-rungway-cache"] == "hit"
        _, text, _ = await house.get("/metrics", auth("alice"))
        assert b'cache_lookups_total{kind="chat",result="miss",tier="store"} 1.0' in text


async def test_memory_s_state_has_no_second_copy() -> None:
    async with serving() as (house, _):
        assert house.shared.reuse.cache.tier is None


async def test_hits_bytes_and_dollars_are_counted() -> None:
    async with serving() as (house, _):
        for _ in range(3):
            await ask(house, HI)
            await embed(house, ["a", "b"])
        _, text, _ = await house.get("/metrics", auth("alice"))
        for line in (
            b'rungway_cache_lookups_total{kind="chat",result="hit",tier="memory"} 2.0',
            b'rungway_cache_lookups_total{kind="chat",result="miss",tier="memory"} 1.0',
            b'rungway_cache_lookups_total{kind="embeddings",result="hit",tier="memory"} 4.0',
            b'rungway_cache_entries{kind="embeddings"} 2.0',
            b'rungway_cache_removed_total{kind="chat",why="evicted"} 0.0',
            b'rungway_cache_saved_usd_total{kind="chat"} 2.4e-05',
            b'rungway_cache_saved_usd_total{kind="embeddings"} 1.2e-05',
            b'rungway_embeddings_inputs_total{which="sent"} 2.0',
            b'rungway_embeddings_requests_total{which="requests"} 1.0',
        ):
            assert line in text, line
        assert re.search(rb'rungway_cache_bytes\{kind="chat"\} [1-9]', text)
        durations = rb"gen_ai_client_operation_duration_seconds_count\{[^}]*chat[^}]*\} 1.0"
        assert re.search(durations, text), "no model was asked for a hit"
