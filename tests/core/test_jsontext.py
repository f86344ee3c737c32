"""What is legal JSON passes, and what is not stays refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core import jsontext


@pytest.mark.parametrize(
    "raw", [rb'"\ud83d"', rb'{"a":"x\uD83D","b":[1.5,null]}', b'{"a":"\\udc00"}']
)
def test_lone_surrogates_pass_both_ways(raw: bytes) -> None:
    value = jsontext.read(raw)
    assert value == json.loads(raw)
    assert jsontext.read(jsontext.write(value)) == value


def test_deeper_than_orjson_writes() -> None:
    raw = b"[" * 400 + b"]" * 400
    assert jsontext.write(jsontext.read(raw)) == raw


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"NaN",
        rb'["\ud83d", NaN]',
        rb'["\ud83d',
        b"[" * 100_000,
        rb'"\ud83d"' + b"[" * 9000,
    ],
)
def test_what_is_no_json_is_refused(raw: bytes) -> None:
    with pytest.raises(ValueError):
        jsontext.read(raw)


@pytest.mark.parametrize("value", [{"a": object()}, [{1, 2}]])
def test_what_cannot_be_written_is_a_value_error(value: Any) -> None:
    with pytest.raises(ValueError):
        jsontext.write(value)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(st.characters()),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=10,
    )
)
def test_round_trip(value: Any) -> None:
    assert jsontext.read(jsontext.write(value)) == value
