"""Embeddings of many callers through the whole house: never a wrong vector, index, count or length.

`python -m tests.api.test_batching 100000` plays so many requests (some minutes).
"""

from __future__ import annotations

import asyncio
import base64
import collections
import contextlib
import hashlib
import math
import random
import struct
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from router.core import vectors
from tests.fakes.counting import floats_of
from tests.fakes.upstream import FakeUpstream, Reply, Request
from tests.house import House, open_house

KEYS = ("alice", "bob")
INPUTS_MAX = 60
TEXTS = 700


def config(*urls: str, scope: str = "key") -> str:
    parts = [
        f'[cache]\nscope = "{scope}"\nmemory_mib = 1',
        '[ladders.embed]\ntask = "embeddings"\nqueue_max = 10000\nqueue_s = 30',
    ]
    for place, url in enumerate(urls):
        parts.append(f'[[ladders.embed.rungs]]\nbackend = "b{place}"\nmodel = "org/m"')
        parts.append(f'[backends.b{place}]\nkind = "openai"\nurl = "{url}"')
    for key in KEYS:
        digest = hashlib.sha256(f"sk-{key}".encode()).hexdigest()
        parts.append(f'[keys.{key}]\nsha256 = "{digest}"')
    return "\n".join(sorted(parts, key=lambda part: part.startswith("[keys")))


class Faulty:
    """A server of vectors that fails in every way, and answers in any order."""

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice
        self.requests = 0
        self.inputs = 0
        self.largest = 0

    async def __call__(self, request: Request, reply: Reply) -> None:
        dice, body = self.dice, request.json
        texts: list[str] = body["input"]
        self.requests += 1
        self.inputs += len(texts)
        for _ in range(dice.randrange(20)):
            await asyncio.sleep(0)
        if len(texts) > INPUTS_MAX:
            await reply.json(_error(f"at most {INPUTS_MAX} inputs", 413), 413)
            return
        self.largest = max(self.largest, len(texts))
        if any(text.startswith("bad") for text in texts):
            await reply.json(_error("an input cannot be read", 400), 400)
            return
        chance = dice.random()
        if chance < 0.002:
            await reply.json(_error("broke", 500), 500)
        elif chance < 0.003:
            reply.cut()
        elif chance < 0.004:
            await reply.json(_error("slow down", 429), 429)
        else:
            await self._answer(body, reply, skips=chance > 0.998)

    async def _answer(self, body: Any, reply: Reply, *, skips: bool) -> None:
        width = body.get("dimensions") or 8
        data = [
            {"object": "embedding", "index": index, "embedding": floats_of(text, width)}
            for index, text in enumerate(body["input"])
        ]
        self.dice.shuffle(data)
        usage = {"prompt_tokens": len(data), "total_tokens": len(data)}
        await reply.json({"object": "list", "data": data[skips:], "model": "m", "usage": usage})


class Fuzz:
    """Callers with overlapping texts, who leave, of two keys, with a cache between."""

    def __init__(self, house: House, dice: random.Random) -> None:
        self.house = house
        self.dice = dice
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.vectors = 0
        self.cached = 0

    def texts(self) -> list[str]:
        dice = self.dice
        count = dice.choice([1, 1, 1, 1, 2, 3, 8, 30])
        texts = [f"text {dice.randrange(TEXTS)}" for _ in range(count)]
        if dice.random() < 0.02:
            texts[dice.randrange(count)] = f"bad {dice.randrange(20)}"
        return texts

    async def request(self) -> None:
        dice, texts = self.dice, self.texts()
        body: dict[str, Any] = {"model": "embed", "input": texts}
        width = dice.choice([8, 8, 8, 4])
        if width != 8:
            body["dimensions"] = width
        if dice.random() < 0.5:
            body["encoding_format"] = "base64"
        headers = {"Authorization": f"Bearer sk-{dice.choice(KEYS)}"}
        if dice.random() < 0.1:
            headers["Cache-Control"] = dice.choice(["no-cache", "no-store", "max-age=0"])
        call = asyncio.create_task(self.house.post("/v1/embeddings", body, headers))
        if dice.random() < 0.04:
            for _ in range(dice.randrange(30)):
                await asyncio.sleep(0)
            call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            status, answer, told = await call
            self.check(texts, width, status, answer, told)
            return
        self.outcomes["left"] += 1

    def check(
        self, texts: list[str], width: int, status: int, answer: Any, told: Mapping[str, str]
    ) -> None:
        self.outcomes[str(status)] += 1
        if status != 200:
            is_mistake = status in (400, 413)
            assert not is_mistake or any(text.startswith("bad") for text in texts), answer
            return
        data = answer["data"]
        assert [item["index"] for item in data] == list(range(len(texts)))
        for text, item in zip(texts, data, strict=True):
            found = item["embedding"]
            if isinstance(found, str):
                found = list(struct.unpack(f"<{width}f", base64.b64decode(found)))
            assert found == floats_of(text, width), text
        self.vectors += len(texts)
        cached, _, inputs = told.get("x-rungway-cached-inputs", "0/0").partition("/")
        self.cached += int(cached)
        assert inputs in (str(len(texts)), "0")

    async def run(self, requests: int, callers: int = 48) -> None:
        left = iter(range(requests))

        async def caller() -> None:
            for number in left:
                if number % 500 == 0:
                    self.house.shared.reuse.cache.drop("b0/org/m")
                    self.house.shared.board.reopen()
                await self.request()

        await asyncio.gather(*(caller() for _ in range(callers)))


async def play(requests: int, scope: str, seed: int) -> tuple[Fuzz, Faulty, Any]:
    dice = random.Random(seed)
    server = Faulty(dice)
    async with FakeUpstream(server) as up, open_house(config(up.url, scope=scope)) as house:
        fuzz = Fuzz(house, dice)
        await fuzz.run(requests)
        async with asyncio.timeout(10):
            while house.shared.observer.in_flight:
                await asyncio.sleep(0)
        assert not house.shared.batches.lanes, "nothing is left behind"
        return fuzz, server, house.shared.batches.counts


@pytest.mark.parametrize("scope", ["key", "shared"])
async def test_no_vector_index_count_or_dimension_is_ever_wrong(scope: str) -> None:
    fuzz, server, counts = await play(1_000, scope, seed=7)
    assert fuzz.outcomes["200"] > 800
    assert {"left", "400"} <= fuzz.outcomes.keys()
    assert fuzz.cached > 300, "some inputs were known, and some not"
    assert counts.requests < counts.calls
    assert server.largest > 8


async def test_the_real_server_s_vectors_are_those_of_single_requests(
    real_models: Mapping[str, str],
) -> None:
    """llama.cpp's own batches move the last bits, so the angle is compared."""
    dice = random.Random(3)
    texts = [f"The number {at} of a list" + " that goes on" * (at % 7) for at in range(14)]
    async with open_house(config(real_models["embed"])) as house:
        headers = {"Authorization": "Bearer sk-alice"}

        async def ask(inputs: list[str], **more: str) -> list[list[float]]:
            body = {"model": "embed", "input": inputs}
            status, answer, _ = await house.post("/v1/embeddings", body, {**headers, **more})
            assert status == 200
            assert [item["index"] for item in answer["data"]] == list(range(len(inputs)))
            return [item["embedding"] for item in answer["data"]]

        alone = {text: (await ask([text], **{"Cache-Control": "no-store"}))[0] for text in texts}
        asked = [[dice.choice(texts) for _ in range(dice.choice([1, 2, 5]))] for _ in range(16)]
        for inputs, found in zip(asked, await asyncio.gather(*map(ask, asked)), strict=True):
            for text, vector in zip(inputs, found, strict=True):
                assert len(vector) == len(alone[text])
                assert vectors.cosine(vector, alone[text]) > 0.9999
                assert math.hypot(*vector) == pytest.approx(1, abs=1e-3)
        ranked = sorted(texts, key=lambda text: -vectors.cosine(alone[texts[0]], alone[text]))
        assert ranked[0] == texts[0], "the texts can be told apart"


def _error(words: str, code: int) -> Any:
    return {"error": {"message": words, "type": "x", "param": None, "code": code}}


if __name__ == "__main__":
    for name in ("key", "shared"):
        played, asked_of, batched = asyncio.run(play(int(sys.argv[1]) // 2, name, seed=1))
        print(
            f"scope {name}: {dict(played.outcomes)}, {played.vectors} vectors checked, "
            f"{played.cached} of them kept; upstream {asked_of.requests} requests, {batched}"
        )
