"""Embeddings through the whole house, in every form that clients send and expect."""

from __future__ import annotations

import base64
import struct
from typing import Any

import pytest

from tests.backends.contract import vector_of
from tests.backends.rigs.openai import OpenAiRig
from tests.fakes.upstream import FakeUpstream
from tests.house import ladder_of, open_house

GOOD = OpenAiRig().handle


def decoded(value: Any) -> list[float]:
    if isinstance(value, str):
        raw = base64.b64decode(value, validate=True)
        return list(struct.unpack(f"<{len(raw) // 4}f", raw))
    assert isinstance(value, list)
    return value


@pytest.mark.parametrize("encoding", [None, "float", "base64"])
@pytest.mark.parametrize("value", ["one text", ["a", "b", "a longer one"]])
async def test_openais_route(encoding: str | None, value: Any) -> None:
    async with FakeUpstream(GOOD) as up, open_house(ladder_of(up.url)) as house:
        body = {"model": "embed", "input": value, "encoding_format": encoding}
        status, answer, headers = await house.post("/v1/embeddings", body)
    texts = [value] if isinstance(value, str) else value
    assert status == 200
    assert headers["x-rungway-rung"] == "b0/org/m"
    assert answer["object"] == "list"
    assert [item["index"] for item in answer["data"]] == list(range(len(texts)))
    for text, item in zip(texts, answer["data"], strict=True):
        assert isinstance(item["embedding"], str) is (encoding == "base64")
        assert decoded(item["embedding"]) == pytest.approx(vector_of(text), abs=1e-6)
    tokens = 3 * len(texts)
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


@pytest.mark.parametrize("ids", [[15339, 1917], [[15339, 1917], [15339]]])
async def test_langchains_token_ids_are_turned_back_into_text(ids: Any) -> None:
    async with FakeUpstream(GOOD) as up, open_house(ladder_of(up.url)) as house:
        status, _, _ = await house.post("/v1/embeddings", {"model": "embed", "input": ids})
        assert status == 200
        sent = up.last.json["input"]
    assert sent == ["hello world"] if isinstance(ids[0], int) else ["hello world", "hello"]


async def test_ids_that_no_tokenizer_has_are_refused() -> None:
    async with FakeUpstream(GOOD) as up, open_house(ladder_of(up.url)) as house:
        for ids in (b"[999999]", b"[18446744073709551615]"):
            raw = b'{"model": "embed", "input": ' + ids + b"}"
            status, body, _ = await house.post("/v1/embeddings", raw)
            assert status == 400
            assert body["error"]["param"] == "input"
        assert up.requests == []


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/"])
async def test_hugging_faces_inputs(path: str) -> None:
    async with FakeUpstream(GOOD) as up, open_house(ladder_of(up.url)) as house:
        status, answer, _ = await house.post(path, {"inputs": "hello", "normalize": True})
        assert status == 200
        assert answer == [pytest.approx(vector_of("hello"), abs=1e-6)]
        assert up.last.json["normalize"] is True
        status, answer, _ = await house.post(path, {"inputs": ["a", "b"]})
        assert [len(vector) for vector in answer] == [8, 8]


async def test_sentence_similarity() -> None:
    async with FakeUpstream(GOOD) as up, open_house(ladder_of(up.url)) as house:
        inputs = {"source_sentence": "a", "sentences": ["a", "something else"]}
        status, answer, _ = await house.post("/", {"inputs": inputs, "parameters": {}})
    assert status == 200
    assert answer[0] == pytest.approx(1)
    assert answer[1] < 0.999
    assert len(up.requests) == 1


async def test_the_next_rung_answers_when_the_first_is_down() -> None:
    async with FakeUpstream(GOOD) as up:
        async with open_house(ladder_of("http://127.0.0.1:1", up.url)) as house:
            status, _, headers = await house.post(
                "/v1/embeddings", {"model": "embed", "input": "a"}
            )
    assert status == 200
    assert headers["x-rungway-attempts"] == "2"


async def test_dimensions_that_a_backend_does_not_know_are_kept_all_the_same() -> None:
    async with FakeUpstream(GOOD) as up, open_house(ladder_of(up.url)) as house:
        body = {"model": "embed", "input": ["a", "b"], "dimensions": 4}
        _, answer, _ = await house.post("/v1/embeddings", body)
        for item in answer["data"]:
            assert len(item["embedding"]) == 4
            assert sum(value * value for value in item["embedding"]) == pytest.approx(1)
        assert up.last.json["dimensions"] == 4
        status, answer, _ = await house.post("/v1/embeddings", {**body, "dimensions": 9})
        assert status == 502
        assert "fewer than 9" in answer["error"]["message"]
