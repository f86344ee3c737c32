"""A vector is at its own index or the answer is refused."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core import embeddings, vectors
from router.errors import CallerMistake, PromptTooLong, UpstreamBroken, UpstreamBusy
from router.types import Embeddings, Usage

WHO = "gpu/org/m"


def item(index: int | None, value: Any) -> Any:
    found = {"object": "embedding", "embedding": value}
    return found if index is None else {**found, "index": index}


def answer(*items: Any, **fields: Any) -> bytes:
    return orjson.dumps({"object": "list", "data": list(items), **fields})


def values_of(found: Embeddings) -> list[list[float]]:
    return [vectors.unpack(raw) for raw in found.vectors]


class TestReadOpenAi:
    @given(st.permutations(range(12)), st.booleans())
    def test_any_order_is_put_right(self, order: list[int], as_text: bool) -> None:
        def coded(i: int) -> Any:
            raw = vectors.pack([float(i)])
            return vectors.to_base64(raw) if as_text else [float(i)]

        body = answer(*(item(i, coded(i)) for i in order))
        found = embeddings.read_openai(body, 12, who=WHO)
        assert values_of(found) == [[float(i)] for i in range(12)]

    def test_without_an_index_the_position_counts(self) -> None:
        body = answer(item(None, [1.0]), item(None, [2.0]))
        assert values_of(embeddings.read_openai(body, 2, who=WHO)) == [[1.0], [2.0]]

    def test_usage_is_read_or_to_be_estimated(self) -> None:
        body = answer(item(0, [1.0]), usage={"prompt_tokens": 7, "total_tokens": 7})
        assert embeddings.read_openai(body, 1, who=WHO).usage == Usage(7, 0)
        for usage in ({}, {"prompt_tokens": -1}, {"prompt_tokens": "7"}, None, 7):
            body = answer(item(0, [1.0]), usage=usage)
            assert embeddings.read_openai(body, 1, who=WHO).usage.estimated

    @pytest.mark.parametrize(
        ("body", "words"),
        [
            (answer(item(0, [1.0])), r"without the vectors \[1\]"),
            (answer(item(0, [1.0]), item(0, [1.0])), "repeated index at 1"),
            (answer(item(0, [1.0]), item(2, [1.0])), "wrong or repeated index at 1"),
            (answer(item(-1, [1.0]), item(1, [1.0])), "index at 0"),
            (answer(item(True, [1.0]), item(1, [1.0])), "index at 0"),
            (answer(*(item(i, [1.0]) for i in range(3))), "index at 2"),
            (answer("x", item(1, [1.0])), "index at 0"),
            (answer(item(0, []), item(1, [1.0])), "at index 0: a vector must be a non-empty"),
            (answer(item(0, [1.0]), item(1, "!")), "at index 1: a vector is not valid base64"),
            (answer(item(0, [1.0]), item(1, [1.0, 2.0])), "different lengths"),
            (b"<html>", "not JSON"),
            (b"[]", "not an embeddings list"),
            (b'{"data": 5}', "not an embeddings list"),
        ],
    )
    def test_what_is_refused(self, body: bytes, words: str) -> None:
        with pytest.raises(UpstreamBroken, match=words) as caught:
            embeddings.read_openai(body, 2, who=WHO)
        assert WHO in caught.value.message

    def test_an_error_in_a_200_says_what_it_is(self) -> None:
        body = orjson.dumps({"error": "Model is overloaded", "error_type": "overloaded"})
        with pytest.raises(UpstreamBusy):
            embeddings.read_openai(body, 1, who=WHO)


class TestReadNested:
    @pytest.mark.parametrize(
        ("value", "count", "found"),
        [
            ([[1.0, 2.0]], 1, [[1.0, 2.0]]),
            ([[1.0], [2.0]], 2, [[1.0], [2.0]]),
            ([1.0, 2.0], 1, [[1.0, 2.0]]),
            ([[[1.0, 2.0]]], 1, [[1.0, 2.0]]),
            ([[[1.0]], [[2.0]]], 2, [[1.0], [2.0]]),
        ],
    )
    def test_shapes(self, value: Any, count: int, found: list[list[float]]) -> None:
        read = embeddings.read_nested(orjson.dumps(value), count, who=WHO, usage=Usage(3))
        assert values_of(read) == found
        assert read.usage == Usage(3)

    @pytest.mark.parametrize(
        ("value", "count"),
        [
            ([[1.0]], 2),
            ([[1.0], [2.0], [3.0]], 2),
            ([1.0, 2.0], 2),
            ([[[1.0], [2.0]]], 1),
            ([], 1),
            ([[]], 1),
            (["x"], 1),
            ({}, 1),
            (5, 1),
        ],
    )
    def test_what_is_refused(self, value: Any, count: int) -> None:
        with pytest.raises(UpstreamBroken):
            embeddings.read_nested(orjson.dumps(value), count, who=WHO)

    def test_an_error_in_a_200_says_what_it_is(self) -> None:
        too_long = "`inputs` must have less than 512 tokens. Given: 600"
        for text, kind in ((too_long, PromptTooLong), ("Input validation error: x", CallerMistake)):
            with pytest.raises(kind):
                embeddings.read_nested(orjson.dumps({"error": text}), 1, who=WHO)

    def test_no_usage_is_to_be_estimated(self) -> None:
        assert embeddings.read_nested(b"[[1.0]]", 1, who=WHO).usage.estimated


@given(st.lists(st.tuples(st.lists(st.binary(min_size=4, max_size=4)), st.integers(0, 99))))
def test_joining_keeps_order_and_adds_usage(parts: list[tuple[list[bytes], int]]) -> None:
    joined = embeddings.join([Embeddings(raws, Usage(tokens)) for raws, tokens in parts])
    assert joined.vectors == [raw for raws, _ in parts for raw in raws]
    assert joined.usage == Usage(sum(tokens for _, tokens in parts))


def test_one_estimate_makes_the_sum_one() -> None:
    parts = [Embeddings([], Usage(3)), Embeddings([], Usage(4, estimated=True))]
    assert embeddings.join(parts).usage == Usage(7, 0, estimated=True)


class TestWrite:
    found = Embeddings([vectors.pack([0.5, -1.0]), vectors.pack([0.25, 2.0])], Usage(9))

    def test_openai_in_numbers(self) -> None:
        value = orjson.loads(embeddings.write_openai(self.found, model="embed", base64=False))
        assert value == {
            "object": "list",
            "model": "embed",
            "data": [
                {"object": "embedding", "index": 0, "embedding": [0.5, -1.0]},
                {"object": "embedding", "index": 1, "embedding": [0.25, 2.0]},
            ],
            "usage": {"prompt_tokens": 9, "total_tokens": 9},
        }

    def test_openai_in_base64_is_read_back(self) -> None:
        body = embeddings.write_openai(self.found, model="embed", base64=True)
        assert embeddings.read_openai(body, 2, who=WHO) == self.found

    def test_nested(self) -> None:
        assert orjson.loads(embeddings.write_nested(self.found)) == [[0.5, -1.0], [0.25, 2.0]]

    def test_similarity_is_the_cosine_with_the_first(self) -> None:
        found = Embeddings([vectors.pack(v) for v in ([1.0, 0.0], [2.0, 0.0], [0.0, 1.0])], Usage())
        assert orjson.loads(embeddings.write_similarity(found)) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("inputs", "tokens"),
    [(["x" * 40], 10), (["a", "b"], 2), ([[1, 2, 3], [4]], 4), (["ö" * 4], 2)],
)
def test_estimates(inputs: Any, tokens: int) -> None:
    assert embeddings.estimate_tokens(inputs) == tokens
