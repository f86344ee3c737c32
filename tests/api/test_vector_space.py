"""An embeddings ladder never answers from another vector space."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from router.core.canary import TEXTS
from tests.backends.contract import vector_of
from tests.backends.rigs.openai import OpenAiRig, error
from tests.fakes.upstream import FakeUpstream, Handler, Reply, Request
from tests.house import House, ladder_of, open_house

GOOD = OpenAiRig().handle


def embedding(**behaviour: Any) -> Handler:
    """A server whose vectors are scaled, and which fails while `behaviour["down"]` is true."""

    async def handle(request: Request, reply: Reply) -> None:
        if behaviour.get("down"):
            await reply.json(error("down"), 500)
            return
        texts = request.json["input"]
        mirror = -1 if behaviour.get("other") else 1
        data = [
            {"index": i, "embedding": [v * mirror**k for k, v in enumerate(vector_of(text))]}
            for i, text in enumerate(texts)
        ]
        await reply.json({"data": data, "usage": {"prompt_tokens": 1, "total_tokens": 1}})

    handle.behaviour = behaviour  # type: ignore[attr-defined]
    return handle


async def ask(house: House) -> tuple[int, Any, str]:
    body = {"model": "embed", "input": "a text"}
    status, answer, headers = await house.post("/v1/embeddings", body)
    return status, answer, headers.get("x-rungway-rung", "")


async def test_a_rung_of_another_space_never_answers(caplog: pytest.LogCaptureFixture) -> None:
    first = embedding()
    async with FakeUpstream(first) as one, FakeUpstream(embedding(other=True)) as two:
        async with open_house(ladder_of(one.url, two.url)) as house:
            assert (await ask(house))[::2] == (200, "b0/org/m")
            first.behaviour["down"] = True  # type: ignore[attr-defined]
            with caplog.at_level(logging.ERROR):
                status, answer, _ = await ask(house)
            assert status == 502
            assert "another space" in answer["error"]["message"]
            assert "ALARM" in caplog.text
            assert "a text" not in [request.json["input"] for request in two.requests]
            first.behaviour["down"] = False  # type: ignore[attr-defined]
            assert (await ask(house))[::2] == (200, "b0/org/m")


async def test_rungs_of_one_space_stand_in_for_each_other_and_are_asked_once() -> None:
    first = embedding()
    async with FakeUpstream(first) as one, FakeUpstream(embedding()) as two:
        async with open_house(ladder_of(one.url, two.url)) as house:
            for _ in range(3):
                assert (await ask(house))[::2] == (200, "b0/org/m")
            first.behaviour["down"] = True  # type: ignore[attr-defined]
            for _ in range(3):
                status, answer, rung = await ask(house)
                assert (status, rung) == (200, "b1/org/m")
                assert answer["data"][0]["embedding"] == pytest.approx(
                    vector_of("a text"), abs=1e-6
                )
            for upstream in (one, two):
                asked = [request.json["input"] for request in upstream.requests]
                assert asked.count(list(TEXTS)) == (1 if upstream is two else 3)


async def test_what_comes_back_is_asked_again() -> None:
    first = embedding()
    async with FakeUpstream(first) as one, FakeUpstream(embedding()) as two:
        async with open_house(ladder_of(one.url, two.url)) as house:
            await ask(house)
            first.behaviour["down"] = True  # type: ignore[attr-defined]
            assert (await ask(house))[2] == "b1/org/m"
            first.behaviour.update(down=False, other=True)  # type: ignore[attr-defined]
            assert (await ask(house))[2] == "b1/org/m"
            first.behaviour.update(other=False)  # type: ignore[attr-defined]
            house.shared.board.reopen()
            assert (await ask(house))[2] == "b0/org/m"


async def test_a_ladder_of_one_rung_is_not_asked() -> None:
    async with FakeUpstream(GOOD) as up, open_house(ladder_of(up.url)) as house:
        assert (await ask(house))[0] == 200
        assert len(up.requests) == 1
