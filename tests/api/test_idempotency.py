"""An Idempotency-Key makes a call once: repeated, followed, left by its client, or broken off."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson

from tests.fakes.upstream import FakeUpstream, Reply, Request
from tests.house import House, ladder_of, open_house

HI: dict[str, Any] = {"model": "chat", "messages": [{"role": "user", "content": "Hi?"}]}
ONE = {"Idempotency-Key": "one"}


def chunk(text: str, finish: str | None = None) -> bytes:
    delta = {"content": text} if text else {}
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return b"data: " + orjson.dumps({"id": "c", "choices": [choice]}) + b"\n\n"


class Counting:
    """Numbers its answers, and holds each back until `go` is set."""

    def __init__(self) -> None:
        self.count = 0
        self.go = asyncio.Event()
        self.go.set()
        self.status = 200

    async def __call__(self, request: Request, reply: Reply) -> None:
        self.count += 1
        text = f"answer {self.count}"
        body = orjson.loads(request.body)
        if body.get("stream"):
            await reply.start(200, {"Content-Type": "text/event-stream"})
            await reply.send(chunk(text))
            await self.go.wait()
            await reply.send(chunk("", "stop") + b"data: [DONE]\n\n")
            await reply.end()
            return
        await self.go.wait()
        if "input" in body:
            data = [
                {"index": index, "embedding": [float(self.count), float(index)]}
                for index, _ in enumerate(body["input"])
            ]
            await reply.json({"data": data, "usage": {"prompt_tokens": 2}}, self.status)
            return
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        await reply.json({"id": "c", "choices": [choice]}, self.status)


async def ask(
    house: House, body: Any = HI, headers: Any = ONE, path: str = "/chat/completions"
) -> Any:
    status, answer, sent = await house.post(f"/v1{path}", body, headers)
    return status, answer, sent


async def test_a_repeat_is_answered_without_asking_again_and_costs_nothing() -> None:
    upstream = Counting()
    async with FakeUpstream(upstream) as up, open_house(ladder_of(up.url)) as house:
        first = await ask(house)
        again = await ask(house)
        assert first[0] == again[0] == 200
        assert first[1] == again[1]
        assert again[2]["x-rungway-cache"] == "hit"
        assert again[2]["x-rungway-rung"] == "b0/org/m"
        assert again[2]["x-rungway-cost-usd"] == "0"
        assert upstream.count == 1
        assert (await ask(house, headers={"Idempotency-Key": "two"}))[1] != first[1]


async def test_streams_and_vectors_are_repeated_as_they_were() -> None:
    upstream = Counting()
    async with FakeUpstream(upstream) as up, open_house(ladder_of(up.url)) as house:
        stream = {**HI, "stream": True}
        assert (await ask(house, stream))[1] == (await ask(house, stream))[1]
        vectors = {"model": "embed", "input": ["a", "b"]}
        two = {"Idempotency-Key": "two"}
        first = await ask(house, vectors, two, "/embeddings")
        assert first[1]["data"][1]["embedding"] == [2.0, 1.0]
        assert (await ask(house, vectors, two, "/embeddings"))[1] == first[1]
        assert upstream.count == 2


async def test_a_stream_that_may_be_kept_too_flows_and_is_repeated() -> None:
    upstream = Counting()
    stream = {**HI, "stream": True, "temperature": 0}
    config = ladder_of("{url}", cache="")
    async with (
        FakeUpstream(upstream) as up,
        open_house(config.replace("{url}", up.url)) as house,
        asyncio.timeout(10),
    ):
        upstream.go.clear()
        body = orjson.dumps(stream)
        url = house.url + "/v1/chat/completions"
        async with house.client.post(url, data=body, headers=ONE) as answer:
            # Its first content comes before its end does.
            assert b"answer 1" in await answer.content.readany()
            upstream.go.set()
            assert (await answer.content.read()).endswith(b"data: [DONE]\n\n")
        assert b"answer 1" in (await ask(house, stream))[1]
        assert b"answer 1" in (await ask(house, stream, {}))[1]
        assert upstream.count == 1


async def test_another_request_under_the_same_key_is_refused_also_while_it_runs() -> None:
    upstream = Counting()
    async with FakeUpstream(upstream) as up, open_house(ladder_of(up.url)) as house:
        upstream.go.clear()
        first = asyncio.create_task(ask(house))
        while not upstream.count:
            await asyncio.sleep(0)
        for other in ({**HI, "stream": True}, {**HI, "temperature": 1}):
            status, answer, sent = await ask(house, other)
            assert (status, answer["error"]["code"]) == (422, "idempotency_key_reused")
            assert sent["x-should-retry"] == "false"
        upstream.go.set()
        assert (await first)[0] == 200
        assert (await ask(house, {**HI, "temperature": 1}))[0] == 422
        assert upstream.count == 1


async def test_a_repeat_while_it_runs_follows_the_same_call() -> None:
    upstream = Counting()
    async with FakeUpstream(upstream) as up, open_house(ladder_of(up.url)) as house:
        upstream.go.clear()
        calls = [asyncio.create_task(ask(house, {**HI, "stream": True})) for _ in range(5)]
        while not upstream.count:
            await asyncio.sleep(0)
        upstream.go.set()
        answers = await asyncio.gather(*calls)
        assert len({answer[1] for answer in answers}) == 1
        assert upstream.count == 1


async def test_a_call_whose_client_left_is_read_to_its_end_and_kept() -> None:
    upstream = Counting()
    async with FakeUpstream(upstream) as up, open_house(ladder_of(up.url)) as house:
        upstream.go.clear()
        first = asyncio.create_task(ask(house))
        while not upstream.count:
            await asyncio.sleep(0)
        first.cancel()
        while house.shared.observer.in_flight:
            await asyncio.sleep(0)
        upstream.go.set()
        status, answer, _ = await ask(house)
        assert (status, answer["choices"][0]["message"]["content"]) == (200, "answer 1")
        assert upstream.count == 1
        assert [line["error"] for line in house.lines] == ["client_left", None]


async def test_what_failed_runs_anew() -> None:
    upstream = Counting()
    async with FakeUpstream(upstream) as up, open_house(ladder_of(up.url)) as house:
        upstream.status = 400
        assert (await ask(house))[0] == 400
        upstream.status = 200
        status, answer, _ = await ask(house)
        assert (status, answer["choices"][0]["message"]["content"]) == (200, "answer 2")


async def test_keys_do_not_see_each_others_names() -> None:
    upstream = Counting()
    keys = "".join(
        f'[keys.{name}]\nsha256 = "{digest}"\n'
        for name, digest in (
            ("a", "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"),
            ("b", "3e23e8160039594a33894f6564e1b1348bbd7a0088d42c4acb73eeaed59c009d"),
        )
    )
    async with FakeUpstream(upstream) as up, open_house(ladder_of(up.url, keys=keys)) as house:
        answers = [
            (await ask(house, headers={**ONE, "Authorization": f"Bearer {secret}"}))[1]
            for secret in ("a", "b")
        ]
        assert answers[0] != answers[1]
        assert upstream.count == 2


async def test_a_name_that_is_no_name_is_refused() -> None:
    async with FakeUpstream(Counting()) as up, open_house(ladder_of(up.url)) as house:
        for name in ("", "x" * 256):
            status, answer, _ = await ask(house, headers={"Idempotency-Key": name})
            assert (status, answer["error"]["code"]) == (400, "invalid_idempotency_key")


async def test_without_the_store_nothing_runs_that_might_run_twice() -> None:
    upstream = Counting()
    async with FakeUpstream(upstream) as up, open_house(ladder_of(up.url)) as house:
        await house.shared.store.aclose()
        status, answer, _ = await ask(house)
        assert (status, answer["error"]["code"]) == (503, "state_unavailable")
        assert upstream.count == 0
