"""Every form of an embeddings request, and every wrong one."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core import embed_request
from router.errors import BadRequest


@pytest.mark.parametrize(
    ("value", "inputs"),
    [
        ("text", ["text"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_openais_four_forms(value: Any, inputs: Any) -> None:
    assert embed_request.read({"input": value}).inputs == inputs


@pytest.mark.parametrize(
    "value",
    ["", [], [""], ["a", 1], [1, "a"], [[1], "a"], [[]], [1, -2], [1.5], [True], {"a": 1}, 3,
     [["a"]], ["a"] * 2049, [[1]] * 2049],
)  # fmt: skip
def test_wrong_inputs(value: Any) -> None:
    with pytest.raises(BadRequest) as caught:
        embed_request.read({"input": value})
    assert caught.value.param == "input"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": "8"}, "dimensions"),
        ({"dimensions": True}, "dimensions"),
    ],
)
def test_wrong_parameters(fields: Any, param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        embed_request.read({"input": "a", **fields})
    assert caught.value.param == param


def test_parameters_are_told_from_what_is_relayed() -> None:
    body = {
        "model": "embed",
        "input": "a",
        "encoding_format": None,
        "dimensions": 8,
        "user": "u",
        "truncate": None,
    }
    read = embed_request.read(body)
    assert read == (["a"], False, 8, {"user": "u"})
    assert embed_request.read({"input": "a", "encoding_format": "base64"}).base64
    assert embed_request.read_inputs({"inputs": "a", "normalize": True}).extra == {
        "normalize": True
    }


def test_a_missing_input_and_a_body_that_is_no_object() -> None:
    wrong: list[Any] = [{}, {"input": None}, [], "x"]
    for body in wrong:
        with pytest.raises(BadRequest):
            embed_request.read(body)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=4),
        max_leaves=12,
    )
)
def test_any_input_is_read_or_refused(value: Any) -> None:
    try:
        read = embed_request.read({"input": value})
    except BadRequest:
        return
    assert len({type(one) for one in read.inputs}) == 1
    assert embed_request.needs_of(read.inputs).prompt_tokens_min >= 0


def test_the_longest_input_decides_the_need() -> None:
    assert embed_request.needs_of(["x" * 60, "y"]).prompt_tokens_min == 10
    assert embed_request.needs_of([[1], [1, 2, 3]]).prompt_tokens_min == 3
