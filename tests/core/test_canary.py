"""Same space, or not: tiny noise agrees, everything that changes a vector's meaning does not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core import canary, vectors
from tests.backends.contract import vector_of

REFERENCE = [vectors.pack(vector_of(text, 32)) for text in canary.TEXTS]


def changed(change: object) -> list[bytes]:
    assert callable(change)
    return [
        vectors.pack([change(i, v) for i, v in enumerate(vectors.unpack(r))]) for r in REFERENCE
    ]


@given(st.floats(-1e-3, 1e-3))
def test_the_noise_of_another_precision_agrees(noise: float) -> None:
    assert canary.difference(REFERENCE, changed(lambda i, v: v * (1 + noise * (-1) ** i))) is None


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ([raw[:-4] for raw in REFERENCE], "31 dimensions where 32"),
        (changed(lambda i, v: -v), "cosine"),
        (changed(lambda i, v: v + 0.05 * (i % 2)), "cosine"),
        (changed(lambda i, v: v * 1.02), "norm"),
        (changed(lambda i, v: 0.0), "cosine"),
        (REFERENCE[1:] + REFERENCE[:1], "cosine"),
    ],
)
def test_another_space_is_told_apart(found: list[bytes], words: str) -> None:
    told = canary.difference(REFERENCE, found)
    assert told is not None
    assert words in told
