"""Vectors keep their values through all three forms, and nothing else passes for one."""

from __future__ import annotations

import base64
import math
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core import vectors

FLOATS = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1)


def test_openais_own_example() -> None:
    raw = vectors.pack([0.1, 0.2])
    assert vectors.to_base64(raw) == "zczMPc3MTD4="
    assert vectors.unpack(raw) == [0.10000000149011612, 0.20000000298023224]


@given(FLOATS)
def test_every_form_is_the_same_vector(values: list[float]) -> None:
    raw = vectors.pack(values)
    assert raw == struct.pack(f"<{len(values)}f", *values)
    assert vectors.unpack(raw) == values
    assert vectors.parse(values) == raw
    assert vectors.parse(vectors.to_base64(raw)) == raw


@pytest.mark.parametrize(
    "value",
    [
        [],
        "",
        None,
        {},
        3.5,
        ["a"],
        [None],
        [[1.0]],
        [float("nan")],
        [float("inf"), float("-inf")],
        [1e39],
        [10**400],
        "!!!!",
        "zczMPc3MTD4",
        "zcz\nMPc3MTD4=",
        "zcéM",
        base64.b64encode(b"123").decode(),
        base64.b64encode(struct.pack("<f", math.nan)).decode(),
        base64.b64encode(struct.pack("<f", math.inf)).decode(),
        base64.b64encode(struct.pack("<3f", 1.0, -math.nan, 2.0)).decode(),
        base64.b64encode(struct.pack("<3f", 1.0, 2.0, -math.inf)).decode(),
        base64.b64encode(bytes.fromhex("0000803f 010080ff")).decode(),
    ],
)
def test_what_is_no_vector(value: Any) -> None:
    with pytest.raises(ValueError, match="vector"):
        vectors.parse(value)


def test_the_largest_numbers_are_numbers() -> None:
    largest = [3.4028234663852886e38, -3.4028234663852886e38, 1.7014118346046923e38]
    assert vectors.unpack(vectors.from_base64(vectors.to_base64(vectors.pack(largest)))) == largest


def test_integers_are_numbers_too() -> None:
    assert vectors.unpack(vectors.pack([1, 0, -2])) == [1.0, 0.0, -2.0]


class TestShorten:
    def test_the_rest_is_brought_to_unit_length(self) -> None:
        assert vectors.unpack(vectors.shorten(vectors.pack([3.0, 4.0, 12.0]), 2)) == pytest.approx(
            [0.6, 0.8]
        )

    def test_its_own_length_changes_nothing(self) -> None:
        raw = vectors.pack([3.0, 4.0])
        assert vectors.shorten(raw, 2) is raw

    def test_nought_stays_nought(self) -> None:
        assert vectors.shorten(vectors.pack([0.0, 0.0, 1.0]), 2) == vectors.pack([0.0, 0.0])

    def test_more_than_there_are(self) -> None:
        with pytest.raises(ValueError, match="2 dimensions, fewer than 3"):
            vectors.shorten(vectors.pack([3.0, 4.0]), 3)

    @given(FLOATS.filter(lambda values: any(abs(value) > 1e-3 for value in values)), st.data())
    def test_length_and_direction(self, values: list[float], draw: st.DataObject) -> None:
        count = draw.draw(st.integers(1, len(values)))
        short = vectors.unpack(vectors.shorten(vectors.pack(values), count))
        assert len(short) == count
        if count < len(values) and any(abs(value) > 1e-3 for value in values[:count]):
            assert math.fsum(value * value for value in short) == pytest.approx(1, abs=1e-5)


class TestCosine:
    @pytest.mark.parametrize(
        ("one", "other", "cosine"),
        [
            ([1.0, 0.0], [0.0, 2.0], 0),
            ([1.0, 1.0], [2.0, 2.0], 1),
            ([1.0, 2.0], [-1.0, -2.0], -1),
            ([0.0, 0.0], [1.0, 2.0], 0),
        ],
    )
    def test_known_angles(self, one: list[float], other: list[float], cosine: float) -> None:
        assert vectors.cosine(one, other) == pytest.approx(cosine)

    def test_vectors_of_different_lengths_have_none(self) -> None:
        with pytest.raises(ValueError, match="shorter"):
            vectors.cosine([1.0, 2.0], [1.0])
