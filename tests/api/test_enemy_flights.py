"""What an enemy tried on calls that several callers share: whoever works for all may leave."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest

from tests.api.test_cache import HI, PRICED, STREAM, ask, config, serving, text_of, usage_of
from tests.fakes.counting import Counting, words_of
from tests.fakes.upstream import FakeUpstream
from tests.house import House, open_house

SHARED = 'scope = "shared"'


async def until(is_so: Any) -> None:
    async with asyncio.timeout(10):
        while not is_so():
            await asyncio.sleep(0)


def settled(house: House) -> None:
    """Nothing is left of any call."""
    shared = house.shared
    assert not shared.ledger.open
    assert not shared.reuse.draining
    assert not shared.observer.in_flight
    assert not sum(purse.in_flight for purse in shared.ledger._purses.values())


@pytest.mark.parametrize("body", [HI, STREAM])
@pytest.mark.parametrize("turns", [0, 1, 3, 6, 10, 20])
async def test_who_does_the_work_leaves_at_any_turn_and_all_others_are_answered(
    body: Any, turns: int
) -> None:
    async with serving(cache=SHARED) as (house, model):
        model.may_answer.clear()
        leader = asyncio.create_task(ask(house, body))
        await until(lambda: model.chats)
        joined = [asyncio.create_task(ask(house, body, "bob")) for _ in range(50)]
        await until(lambda: house.shared.observer.in_flight == 51)
        model.may_answer.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        leader.cancel()
        answers = await asyncio.gather(*joined)
        assert [status for status, _, _ in answers] == [200] * 50
        assert {text_of(answer) for _, answer, _ in answers} == {words_of(HI)}
        await until(lambda: len(house.lines) == 51)
        assert (len(model.chats), model.left) == (1, 0)
        settled(house)
        paid = [line["cost_usd"] for line in house.lines if line.get("cost_usd")]
        assert paid == [0.000012], "one of them, whole"
        alice, bob = await usage_of(house), await usage_of(house, "bob")
        assert alice["nano_usd"] + bob["nano_usd"] == 12_000
        assert alice["requests"] + bob["requests"] == 51
        left = [line for line in house.lines if line["error"]]
        assert [(line["error"], line["key"]) for line in left] in ([], [("client_left", "alice")])


@pytest.mark.parametrize("turns", range(0, 12, 3))
async def test_one_joins_in_the_turns_in_which_the_only_caller_leaves(turns: int) -> None:
    """Whatever comes first: the one who joins is answered, by this work or by another."""
    async with serving(cache=SHARED) as (house, model):
        model.may_answer.clear()
        leader = asyncio.create_task(ask(house, HI))
        await until(lambda: model.chats)
        leader.cancel()
        for _ in range(turns):
            await asyncio.sleep(0)
        joiner = asyncio.create_task(ask(house, HI, "bob"))
        await until(lambda: house.lines)
        model.may_answer.set()
        status, answer, _ = await joiner
        assert (status, text_of(answer)) == (200, words_of(HI))
        await until(lambda: len(house.lines) == 2)
        settled(house)
        assert len(model.chats) == 1 + model.left
        assert (await usage_of(house, "bob"))["nano_usd"] == 12_000


@pytest.mark.parametrize("body", [HI, STREAM])
async def test_one_after_the_other_leaves_and_the_last_one_pays(body: Any) -> None:
    async with serving(cache=SHARED) as (house, model):
        model.may_answer.clear()
        calls = []
        for number in range(8):
            calls.append(asyncio.create_task(ask(house, body, ("alice", "bob")[number % 2])))
            await until(lambda at=number: house.shared.observer.in_flight == at + 1)
        await until(lambda: model.chats)
        for number, call in enumerate(calls[:-1]):
            call.cancel()
            await until(lambda at=number: len(house.lines) == at + 1)
            assert house.lines[-1]["error"] == "client_left"
        model.may_answer.set()
        status, answer, _ = await calls[-1]
        assert (status, text_of(answer)) == (200, words_of(HI))
        await until(lambda: len(house.lines) == 8)
        settled(house)
        assert [line.get("cost_usd", 0) for line in house.lines] == [0] * 7 + [0.000012]
        assert house.lines[-1]["attempts"] == [{"rung": "b0/org/m", "cause": "ok"}]
        assert (len(model.chats), model.left) == (1, 0)


async def test_when_the_last_one_leaves_the_work_of_the_first_ends() -> None:
    async with serving(cache=SHARED) as (house, model):
        model.may_answer.clear()
        leader = asyncio.create_task(ask(house, HI))
        await until(lambda: model.chats)
        joiner = asyncio.create_task(ask(house, HI, "bob"))
        await until(lambda: house.shared.observer.in_flight == 2)
        leader.cancel()
        await until(lambda: house.lines)
        joiner.cancel()
        await until(lambda: model.left == 1)
        await until(lambda: len(house.lines) == 2)
        settled(house)
        line = house.lines[1]
        assert (line["key"], line["error"]) == ("bob", "client_left")
        assert [one["cause"] for one in line["attempts"]] == ["cancelled"]
        assert round(line["cost_usd"] * 1e9) == (await usage_of(house, "bob"))["nano_usd"] > 0
        assert (await usage_of(house))["nano_usd"] == 0


async def test_the_daemon_ends_while_a_task_works_for_others_alone() -> None:
    async with serving(cache=SHARED) as (house, model):
        model.may_answer.clear()
        leader = asyncio.create_task(ask(house, HI))
        await until(lambda: model.chats)
        joined = [asyncio.create_task(ask(house, HI, "bob")) for _ in range(5)]
        await until(lambda: house.shared.observer.in_flight == 6)
        leader.cancel()
        await until(lambda: house.lines)
        pipeline = house.gateway.service.pipeline
        drain = asyncio.create_task(pipeline.drain(5))
        await asyncio.wait({drain}, timeout=0.05)
        assert not drain.done(), "it waits for the work"
        model.may_answer.set()
        assert [status for status, _, _ in await asyncio.gather(*joined)] == [200] * 5
        await drain
        settled(house)


async def test_a_fault_of_the_work_reaches_all_and_who_left_hears_nothing() -> None:
    async with serving(cache=SHARED) as (house, model):
        model.status = 400
        model.may_answer.clear()
        leader = asyncio.create_task(ask(house, HI))
        await until(lambda: model.chats)
        joined = [asyncio.create_task(ask(house, HI, "bob")) for _ in range(5)]
        await until(lambda: house.shared.observer.in_flight == 6)
        leader.cancel()
        await until(lambda: house.lines)
        model.may_answer.set()
        assert [status for status, _, _ in await asyncio.gather(*joined)] == [400] * 5
        await until(lambda: len(house.lines) == 6)
        settled(house)
        assert len(model.chats) == 1


@pytest.mark.parametrize("body", [HI, STREAM])
async def test_nobody_who_joined_can_pay_when_the_first_leaves(body: Any) -> None:
    """Bob has no money: he goes on alone, and is told so."""
    model = Counting()
    text = config("{url}", cache=SHARED)
    text = text.replace("[keys.bob.limits]\n", "[keys.bob.limits]\nusd_per_day = 0\n")
    async with FakeUpstream(model) as up, open_house(text.replace("{url}", up.url)) as house:
        model.may_answer.clear()
        leader = asyncio.create_task(ask(house, body))
        await until(lambda: model.chats)
        joined = [asyncio.create_task(ask(house, body, "bob")) for _ in range(3)]
        await until(lambda: house.shared.observer.in_flight == 4)
        leader.cancel()
        for status, answer, _ in await asyncio.gather(*joined):
            assert (status, answer["error"]["code"]) == (429, "insufficient_quota")
        await until(lambda: len(house.lines) == 4)
        settled(house)
        assert (await usage_of(house, "bob"))["nano_usd"] == 0
        spent = (await usage_of(house))["nano_usd"]
        assert round(sum(line.get("cost_usd", 0) for line in house.lines) * 1e9) == spent > 0


@pytest.mark.parametrize("body", [HI, STREAM])
async def test_who_leaves_while_the_work_waits_for_a_place_pays_nothing(body: Any) -> None:
    rung, ladder = f"{PRICED}\nmax_in_flight = 1", "queue_s = 60"
    async with serving(cache=SHARED, rung=rung, ladder=ladder) as (house, model):
        model.may_answer.clear()
        calls = []
        for key, asked in (("bob", {**HI, "seed": 1}), ("alice", body), ("bob", body)):
            calls.append(asyncio.create_task(ask(house, asked, key)))
            await until(lambda: house.shared.observer.in_flight == len(calls) and model.chats)
        calls[1].cancel()
        await until(lambda: house.lines)
        model.may_answer.set()
        await calls[0]
        status, answer, _ = await calls[2]
        assert (status, text_of(answer)) == (200, words_of(HI))
        await until(lambda: len(house.lines) == 3)
        settled(house)
        assert len(model.chats) == 2
        assert (await usage_of(house))["nano_usd"] == 0
        assert (await usage_of(house, "bob"))["nano_usd"] == 24_000


@pytest.mark.parametrize("body", [HI, STREAM])
@pytest.mark.parametrize("joins", [False, True])
async def test_who_drains_pays_when_all_have_left_while_the_work_waits_for_a_place(
    body: Any, joins: bool
) -> None:
    settings = {"rung": f"{PRICED}\nmax_in_flight = 1", "ladder": "queue_s = 60", "cache": SHARED}
    async with serving(key='on_disconnect = "drain"', **settings) as (house, model):
        model.may_answer.clear()
        calls = []
        for key, asked in (("bob", {**HI, "seed": 1}), ("alice", body), ("bob", body))[: 2 + joins]:
            calls.append(asyncio.create_task(ask(house, asked, key)))
            await until(lambda: house.shared.observer.in_flight == len(calls) and model.chats)
        for call in calls[1:]:
            call.cancel()
            await asyncio.wait({call})
        await until(lambda: len(house.shared.reuse.draining) == len(calls) - 1)
        model.may_answer.set()
        await calls[0]
        await until(lambda: len(house.lines) == len(calls) and not house.shared.reuse.draining)
        settled(house)
        assert len(model.chats) == 2
        paid = [(await usage_of(house, key))["nano_usd"] for key in ("alice", "bob")]
        assert sorted(paid) in ([12_000, 12_000], [0, 24_000])


@pytest.mark.parametrize("body", [HI, STREAM])
async def test_who_leaves_pays_nothing_of_an_attempt_beside_the_first(body: Any) -> None:
    slow, quick = Counting(), Counting()
    slow.may_answer.clear()
    hedge = "hedge_after_s = 0.3\nhedge_max_share = 1"
    async with FakeUpstream(slow) as one, FakeUpstream(quick) as two:
        text = config(one.url, two.url, cache=SHARED, ladder=hedge)
        async with open_house(text) as house:
            leader = asyncio.create_task(ask(house, body))
            await until(lambda: slow.chats)
            joiner = asyncio.create_task(ask(house, body, "bob"))
            await until(lambda: house.shared.observer.in_flight == 2)
            leader.cancel()
            await until(lambda: house.lines)
            assert not quick.chats
            status, answer, _ = await joiner
            assert (status, text_of(answer)) == (200, words_of(HI))
            await until(lambda: len(house.lines) == 2)
            settled(house)
            assert (await usage_of(house))["nano_usd"] == 0
            assert (await usage_of(house, "bob"))["nano_usd"] > 12_000


async def test_a_slow_reader_of_a_shared_stream_holds_up_nobody() -> None:
    """The first caller reads nothing; who joins has the whole stream, of megabytes, meanwhile."""
    pieces = 60

    async def upstream(request: Any, reply: Any) -> None:
        await reply.start(200, {"Content-Type": "text/event-stream"})
        for number in range(pieces):
            delta = {"content": f"{number} " + "x" * 60_000}
            choice = {"index": 0, "delta": delta, "finish_reason": None}
            await reply.send(b"data: " + orjson.dumps({"id": "c", "choices": [choice]}) + b"\n\n")
        last = {"index": 0, "delta": {}, "finish_reason": "stop"}
        await reply.send(b"data: " + orjson.dumps({"id": "c", "choices": [last]}) + b"\n\n")
        await reply.send(b"data: [DONE]\n\n")
        await reply.end()

    async with FakeUpstream(upstream) as up, open_house(config(up.url, cache=SHARED)) as house:
        url = house.url + "/v1/chat/completions"
        headers = {"Authorization": "Bearer sk-alice"}
        async with house.client.post(url, json=STREAM, headers=headers) as slow:
            async with asyncio.timeout(20):
                status, answer, told = await ask(house, STREAM, "bob")
            assert (status, told["x-rungway-cache"]) == (200, "joined")
            assert answer.count(b"xxx") >= pieces
            rest = await slow.read()
        assert text_of(rest) == text_of(answer)
        await house.idle()
        settled(house)
