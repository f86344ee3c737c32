"""TEI's limits: what `/info` says, and cuts that cover every input once and in order."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core import tei
from router.types import Abilities

INFO: dict[str, Any] = {
    "model_id": "org/m",
    "served_model_name": "m",
    "model_type": {"embedding": {"pooling": "cls"}},
    "max_concurrent_requests": 100,
    "max_input_length": 512,
    "max_client_batch_size": 64,
}


class TestInfo:
    def test_an_embedding_model(self) -> None:
        info = tei.info_in(INFO)
        assert info is not None
        assert (info.task, info.complaint) == ("embedding", None)
        assert info.models == ("org/m", "m")
        assert info.limits == tei.Limits(64, 100)
        assert info.abilities == Abilities(context=512)

    @pytest.mark.parametrize("kind", ["reranker", "classifier", "Reranker"])
    def test_other_models_say_that_they_embed_nothing(self, kind: str) -> None:
        info = tei.info_in({**INFO, "model_type": {kind: {"id2label": {}}}})
        assert info is not None
        assert info.complaint is not None
        assert f"org/m there, a {kind.lower()}" in info.complaint

    def test_capitals_and_a_bare_word_are_read_alike(self) -> None:
        kinds: list[Any] = ["embedding", "Embedding", {"Embedding": {}}]
        for kind in kinds:
            info = tei.info_in({**INFO, "model_type": kind})
            assert info is not None
            assert info.complaint is None

    @pytest.mark.parametrize("told", [None, 0, -1, "32", 1.5, True])
    def test_what_is_no_limit_leaves_teis_own(self, told: Any) -> None:
        names = ("max_client_batch_size", "max_concurrent_requests", "max_input_length")
        info = tei.info_in({**INFO, **dict.fromkeys(names, told)})
        assert info is not None
        assert info.limits == tei.Limits(32, 512)
        assert info.abilities.context is None

    @pytest.mark.parametrize(
        "value",
        [
            None,
            [],
            {},
            {"model_id": "m"},
            {"model_id": "m", "router": "text-generation-router"},
            {"model_id": "m", "model_type": {}},
            {"model_id": "m", "model_type": {"a": 1, "b": 2}},
            {"model_id": "m", "model_type": 5},
            {"model_id": 5, "model_type": "embedding"},
        ],
    )
    def test_what_is_no_tei(self, value: Any) -> None:
        assert tei.info_in(value) is None


def test_one_request_never_needs_more_permits_than_there_are() -> None:
    assert tei.Limits(batch_max=64, permits=16).slice_max == 16
    assert tei.Limits().slice_max == 32


@pytest.mark.parametrize(
    ("message", "limit"),
    [
        ("gpu/m: batch size 33 > maximum allowed batch size 32", 32),
        ("batch size 5 > maximum allowed batch size 0", 1),
        ("`inputs` cannot be empty", None),
    ],
)
def test_the_limit_that_a_refusal_names(message: str, limit: int | None) -> None:
    assert tei.batch_limit_in(message) == limit


class TestSlices:
    @given(
        st.lists(st.text(max_size=20) | st.lists(st.integers(0, 9), max_size=9), max_size=60),
        st.integers(1, 9),
        st.integers(1, 60),
    )
    def test_they_cover_every_input_once_in_order_within_both_limits(
        self, inputs: list[str | list[int]], count_max: int, bytes_max: int
    ) -> None:
        cuts = tei.slices(inputs, count_max, bytes_max)
        assert [one for cut in cuts for one in inputs[cut]] == inputs
        for cut in cuts:
            part = inputs[cut]
            assert 1 <= len(part) <= count_max
            assert len(part) == 1 or sum(len(orjson.dumps(one)) + 1 for one in part) <= bytes_max

    @given(st.integers(0, 300), st.integers(1, 64))
    def test_no_more_of_them_than_needed(self, count: int, count_max: int) -> None:
        cuts = tei.slices(["x"] * count, count_max, tei.BODY_BYTES_MAX)
        assert len(cuts) == -(-count // count_max)

    def test_an_input_that_is_too_large_goes_alone(self) -> None:
        assert tei.slices(["a", "x" * 99, "b"], 32, 50) == [slice(0, 1), slice(1, 2), slice(2, 3)]


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ({}, None),
        ({"user": "u"}, None),
        ({"normalize": True}, None),
        ({"normalize": None, "truncate": None}, None),
        ({"normalize": False, "user": "u"}, {"normalize": False}),
        ({"truncate": False}, {"truncate": False}),
        (
            {"truncate": True, "truncation_direction": "Left"},
            {"truncate": True, "truncation_direction": "Left"},
        ),
        ({"prompt_name": "query", "normalize": True}, {"prompt_name": "query", "normalize": True}),
    ],
)
def test_what_needs_the_native_route(extra: dict[str, Any], told: Any) -> None:
    body = tei.native_body(["a"], extra, None)
    assert body == (None if told is None else {"inputs": ["a"], **told})


def test_the_native_body_keeps_dimensions() -> None:
    body = tei.native_body([[1, 2]], {"truncate": True}, 64)
    assert body == {"inputs": [[1, 2]], "truncate": True, "dimensions": 64}
