"""The ladder survives its backends: retries, breakers, queues and spilling, on real sockets."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import pytest

from tests.api.test_chat import GOOD, HI, answering, streamed
from tests.backends.rigs.openai import chunk, error
from tests.fakes.upstream import FakeUpstream, Reply, Request
from tests.house import House, ladder_of, open_house


def limited(*urls: str, first: int = 1, **parts: str) -> str:
    """The first rung takes so many calls at once."""
    text = ladder_of(*urls, **parts)
    rung = 'backend = "b0"\nmodel = "org/m"\n'
    return text.replace(rung, rung + f"max_in_flight = {first}\n", 1)


class Crowd:
    """An upstream that answers well and notes how many were inside at once."""

    def __init__(self) -> None:
        self.inside = self.most = 0

    async def __call__(self, request: Request, reply: Reply) -> None:
        self.inside += 1
        self.most = max(self.most, self.inside)
        await asyncio.sleep(0.01)
        self.inside -= 1
        await GOOD(request, reply)


async def ask(house: House, **headers: str) -> tuple[int, Any, dict[str, str]]:
    return await house.post("/v1/chat/completions", HI, headers)


async def test_the_only_rung_is_asked_again_after_a_passing_failure() -> None:
    count = 0

    async def fails_once(request: Request, reply: Reply) -> None:
        nonlocal count
        count += 1
        if count == 1:
            await reply.json(error("broke"), 500)
        else:
            await GOOD(request, reply)

    async with FakeUpstream(fails_once) as up, open_house(ladder_of(up.url)) as house:
        status, _, headers = await ask(house)
        assert status == 200
        assert headers["x-rungway-attempts"] == "2"


async def test_retries_are_a_share_of_the_traffic() -> None:
    async with FakeUpstream(answering(429, error("busy"), {"retry-after": "0"})) as up:
        async with open_house(ladder_of(up.url)) as house:
            for _ in range(60):
                assert (await ask(house))[0] == 429
        assert len(up.requests) <= 60 + 1 + 60 * 0.1 + 2


async def test_a_dead_rung_is_left_alone_while_others_answer() -> None:
    async with FakeUpstream(answering(500, error("broke"))) as bad, FakeUpstream(GOOD) as good:
        async with open_house(ladder_of(bad.url, good.url)) as house:
            for _ in range(30):
                assert (await ask(house))[0] == 200
            assert len(bad.requests) == 5
            status, body, _ = await house.get("/router/v1/status")
            row = body["ladders"]["chat"]["rungs"][0]
            assert row["state"] == "open"
            assert row["until"] > 0
            assert row["error_share"] == 1
            plan = (await house.post("/router/v1/explain", HI))[1]["rungs"][0]
            assert plan["take"] is False
            assert "breaker" in plan["reason"]


async def test_with_every_rung_dead_the_answer_says_when_to_come_back() -> None:
    async with FakeUpstream(answering(500, error("broke"))) as bad:
        async with open_house(ladder_of(bad.url)) as house:
            while len(bad.requests) < 5:
                assert (await ask(house))[0] == 502
            before = len(bad.requests)
            status, body, headers = await ask(house)
            assert status == 502
            assert len(bad.requests) == before
            assert int(headers["retry-after"]) >= 1
            assert "breaker" in body["error"]["rungs"][0]["reason"]


async def test_work_spills_to_the_next_rung_before_anybody_waits() -> None:
    go = asyncio.Event()

    async def slow(request: Request, reply: Reply) -> None:
        await go.wait()
        await GOOD(request, reply)

    async with FakeUpstream(slow) as one, FakeUpstream(GOOD) as two:
        async with open_house(limited(one.url, two.url)) as house:
            first = asyncio.create_task(ask(house))
            async with asyncio.timeout(2):
                while not one.requests:
                    await asyncio.sleep(0)
            for _ in range(3):
                assert (await ask(house))[2]["x-rungway-rung"] == "b1/org/m"
            go.set()
            assert (await first)[2]["x-rungway-rung"] == "b0/org/m"


async def test_where_no_other_rung_has_room_callers_wait_their_turn() -> None:
    crowd = Crowd()
    async with FakeUpstream(crowd) as up, open_house(limited(up.url)) as house:
        answers = await asyncio.gather(*(ask(house) for _ in range(8)))
        assert [status for status, _, _ in answers] == [200] * 8
        assert crowd.most == 1
        assert (
            house.shared.board.snapshot(house.gateway.service.names.ladders["chat"])[0]["in_flight"]
            == 0
        )


async def test_a_queue_has_an_end_and_a_wait_has_one() -> None:
    go = asyncio.Event()

    async def slow(request: Request, reply: Reply) -> None:
        await go.wait()
        await GOOD(request, reply)

    async with FakeUpstream(slow) as up:
        text = limited(up.url, ladder="queue_max = 1\nqueue_s = 0.2")
        async with open_house(text) as house:
            tasks = [asyncio.create_task(ask(house)) for _ in range(4)]
            done, _ = await asyncio.wait(tasks, timeout=2, return_when=asyncio.FIRST_COMPLETED)
            async with asyncio.timeout(3):
                while sum(task.done() for task in tasks) < 3:
                    await asyncio.sleep(0.01)
            go.set()
            statuses = sorted(status for status, _, _ in await asyncio.gather(*tasks))
            assert statuses == [200, 429, 429, 429]
            assert done


async def test_a_caller_who_leaves_the_queue_leaves_nothing_behind() -> None:
    go = asyncio.Event()

    async def slow(request: Request, reply: Reply) -> None:
        await go.wait()
        await GOOD(request, reply)

    async with FakeUpstream(slow) as up, open_house(limited(up.url)) as house:
        first = asyncio.create_task(ask(house))
        second = asyncio.create_task(ask(house))
        ladder = house.gateway.service.names.ladders["chat"]
        async with asyncio.timeout(2):
            while house.shared.board.snapshot(ladder)[0]["queued"] != 1:
                await asyncio.sleep(0)
            second.cancel()
            while house.shared.board.snapshot(ladder)[0]["queued"]:
                await asyncio.sleep(0)
        go.set()
        assert (await first)[0] == 200
        assert (await ask(house))[0] == 200
        assert len(up.requests) == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_a_space_is_never_asked_twice(stream: bool) -> None:
    """What a Space was told to do goes on though nobody listens: a retry would do it twice."""
    async with FakeUpstream(answering(500, error("broke"))) as up:
        async with open_house(ladder_of(up.url)) as house:
            house.gateway.service.backends["b0"].may_repeat = False
            if stream:
                await streamed(house)
            else:
                await ask(house)
            assert len(up.requests) == 1


async def test_ladders_that_share_a_rung_share_its_places() -> None:
    """Also where they differ in what they say of it; and looking changes nothing."""
    crowd = Crowd()
    async with FakeUpstream(crowd) as up, open_house(limited(up.url)) as house:

        async def look() -> None:
            for _ in range(20):
                await house.get("/router/v1/status")

        async def embed() -> int:
            return (await house.post("/v1/embeddings", {"model": "embed", "input": "a"}))[0]

        answers = await asyncio.gather(look(), *(ask(house) for _ in range(4)), embed(), embed())
        assert crowd.most == 1
        assert answers[-1] == 200


async def test_one_of_higher_priority_goes_before_those_who_wait() -> None:
    go = asyncio.Event()
    order: list[str] = []

    async def slow(request: Request, reply: Reply) -> None:
        order.append(request.json["user"])
        await go.wait()
        await GOOD(request, reply)

    keys = ""
    for name, rank in (("low", 0), ("high", 9)):
        digest = hashlib.sha256(name.encode()).hexdigest()
        keys += f'[keys.{name}]\nsha256 = "{digest}"\npriority = {rank}\n'
    async with FakeUpstream(slow) as up:
        text = limited(up.url, ladder="queue_max = 1", keys=keys)
        async with open_house(text) as house:
            ladder = house.gateway.service.names.ladders["chat"]

            async def call(name: str, user: str) -> int:
                headers = {"Authorization": f"Bearer {name}"}
                body = {**HI, "user": user}
                return (await house.post("/v1/chat/completions", body, headers))[0]

            async def queued(count: int) -> None:
                async with asyncio.timeout(2):
                    while house.shared.board.snapshot(ladder)[0]["queued"] != count:
                        await asyncio.sleep(0)

            first = asyncio.create_task(call("low", "first"))
            async with asyncio.timeout(2):
                while not order:
                    await asyncio.sleep(0)
            low = asyncio.create_task(call("low", "low"))
            await queued(1)
            high = asyncio.create_task(call("high", "high"))
            assert await low == 429
            go.set()
            assert [await first, await high] == [200, 200]
            assert order == ["first", "high"]


async def test_a_probe_whose_stream_flows_opens_the_rung_to_others() -> None:
    sick, go = True, asyncio.Event()

    async def flows(request: Request, reply: Reply) -> None:
        if sick:
            await reply.json(error("broke"), 500)
            return
        await reply.start()
        await reply.event(chunk({"content": "Hi"}))
        if request.json.get("stream"):
            await go.wait()
        await reply.event(chunk({}, "stop"))
        await reply.end()

    async with FakeUpstream(flows) as up, open_house(ladder_of(up.url)) as house:
        chat = house.gateway.service.names.ladders["chat"]
        gate = house.shared.board.gate(chat, chat.rungs[0])
        while gate.closed() is None:
            await ask(house)
        sick = False
        gate._breaker._until = 0.0  # its interval is over
        streaming = asyncio.create_task(streamed(house))
        async with asyncio.timeout(2):
            while gate.closed() is not None or gate.in_flight != 1:
                await asyncio.sleep(0)
        go.set()
        assert (await streaming)[0][-1] == b"[DONE]"
