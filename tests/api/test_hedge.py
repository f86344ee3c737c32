"""Hedging: a slow first rung costs its callers no more than it must, for a capped share."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest

from tests.api.test_chat import HI, STREAM, streamed
from tests.backends.contract import TEXT
from tests.backends.rigs.openai import OpenAiRig, error
from tests.fakes.upstream import FakeUpstream, Handler, Reply, Request
from tests.house import House, ladder_of, open_house

GOOD = OpenAiRig().handle
HEDGE = "hedge_after_s = 0.05\nhedge_max_share = 1"


def slow(seconds: float, then: Handler = GOOD) -> Handler:
    async def handle(request: Request, reply: Reply) -> None:
        waiting = asyncio.create_task(reply.client_left())
        done, _ = await asyncio.wait({waiting}, timeout=seconds)
        waiting.cancel()
        if done:
            reply.close()
        else:
            await then(request, reply)

    return handle


async def broken(request: Request, reply: Reply) -> None:
    await reply.json(error("broke"), 500)


async def ask(house: House, body: Any) -> tuple[str, str]:
    """The text of an answer and the rung that gave it."""
    if body.get("stream"):
        found, _, headers = await streamed(house, body)
        assert found.count(b"[DONE]") == 1
        chunks = [orjson.loads(one) for one in found[:-1]]
        text = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks)
        return text, headers["x-rungway-rung"]
    status, answer, plain = await house.post("/v1/chat/completions", body)
    assert status == 200
    return answer["choices"][0]["message"]["content"], plain["x-rungway-rung"]


async def left(*upstreams: FakeUpstream) -> None:
    async with asyncio.timeout(2):
        while any(one.open_connections for one in upstreams):
            await asyncio.sleep(0)


@pytest.mark.parametrize("body", [HI, STREAM])
async def test_a_later_rung_answers_for_a_slow_first_one(body: Any) -> None:
    async with FakeUpstream(slow(30)) as one, FakeUpstream(GOOD) as two:
        async with open_house(ladder_of(one.url, two.url, ladder=HEDGE)) as house:
            assert await ask(house, body) == (TEXT, "b1/org/m")
            await left(one)
            await house.idle()
            line = house.lines[0]
            assert [attempt["cause"] for attempt in line["attempts"]] == ["cancelled", "ok"]
            assert line["rung"] == "b1/org/m"
            # What the slow one may have produced unheard is counted too.
            assert line["output_tokens"] >= 7
            assert line["estimated"]
            assert b'rungway_hedges_total{ladder="chat"} 1.0' in (await house.get("/metrics"))[1]
            ladder = house.gateway.service.names.ladders["chat"]
            rows = house.shared.board.snapshot(ladder)
            assert [row["in_flight"] for row in rows] == [0, 0]


@pytest.mark.parametrize("body", [HI, STREAM])
async def test_a_first_rung_that_answers_in_time_is_alone(body: Any) -> None:
    async with FakeUpstream(GOOD) as one, FakeUpstream(GOOD) as two:
        async with open_house(ladder_of(one.url, two.url, ladder=HEDGE)) as house:
            assert await ask(house, body) == (TEXT, "b0/org/m")
            assert two.requests == []


@pytest.mark.parametrize("body", [HI, STREAM])
async def test_the_first_may_still_win_and_the_other_is_cancelled(body: Any) -> None:
    async with FakeUpstream(slow(0.2)) as one, FakeUpstream(slow(30)) as two:
        async with open_house(ladder_of(one.url, two.url, ladder=HEDGE)) as house:
            assert await ask(house, body) == (TEXT, "b0/org/m")
            assert len(two.requests) == 1
            await left(two)
            await house.idle()
            causes = [attempt["cause"] for attempt in house.lines[0]["attempts"]]
            assert causes == ["ok", "cancelled"]


@pytest.mark.parametrize("body", [HI, STREAM])
async def test_a_failure_of_either_leaves_the_call_to_the_other(body: Any) -> None:
    for handlers, rung in (
        ((slow(0.1, broken), slow(0.2)), "b1/org/m"),
        ((slow(0.2), slow(0.05, broken)), "b0/org/m"),
    ):
        async with FakeUpstream(handlers[0]) as one, FakeUpstream(handlers[1]) as two:
            async with open_house(ladder_of(one.url, two.url, ladder=HEDGE)) as house:
                assert await ask(house, body) == (TEXT, rung)


async def test_when_both_fail_each_reason_is_told() -> None:
    async with FakeUpstream(slow(0.1, broken)) as one, FakeUpstream(slow(0.1, broken)) as two:
        async with open_house(ladder_of(one.url, two.url, ladder=HEDGE)) as house:
            status, body, _ = await house.post("/v1/chat/completions", HI)
            assert status == 502
            reasons = [rung["reason"] for rung in body["error"]["rungs"]]
            assert all("broke" in reason for reason in reasons), reasons
            assert len(two.requests) == 1


async def test_hedges_are_a_share_of_the_calls() -> None:
    capped = "hedge_after_s = 0.01\nhedge_max_share = 0.1"
    async with FakeUpstream(slow(0.03)) as one, FakeUpstream(slow(30)) as two:
        async with open_house(ladder_of(one.url, two.url, ladder=capped)) as house:
            for _ in range(40):
                assert (await ask(house, HI))[1] == "b0/org/m"
            assert 1 <= len(two.requests) <= 1 + 40 * 0.1


async def test_a_client_that_leaves_cancels_both() -> None:
    async with FakeUpstream(slow(30)) as one, FakeUpstream(slow(30)) as two:
        async with open_house(ladder_of(one.url, two.url, ladder=HEDGE)) as house:
            call = asyncio.create_task(house.post("/v1/chat/completions", HI))
            async with asyncio.timeout(2):
                while not two.requests:
                    await asyncio.sleep(0)
            call.cancel()
            await left(one, two)
            await house.idle()
            assert house.lines[0]["error"] == "client_left"
            assert not house.shared.ledger.open


async def test_embeddings_are_hedged_too() -> None:
    async with FakeUpstream(slow(30)) as one, FakeUpstream(GOOD) as two:
        text = ladder_of(one.url, two.url).replace(
            'task = "embeddings"\n', f'task = "embeddings"\n{HEDGE}\n'
        )
        async with open_house(text) as house:
            body = {"model": "embed", "input": "a"}
            status, _, headers = await house.post("/v1/embeddings", body)
            assert (status, headers["x-rungway-rung"]) == (200, "b1/org/m")
