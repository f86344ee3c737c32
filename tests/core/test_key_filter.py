"""What was added is always found; what was not seldom is."""

from __future__ import annotations

import hashlib

import pytest

from router.core.key_filter import KeyFilter


def keys(count: int, name: str = "key") -> list[bytes]:
    return [hashlib.sha256(b"%s %d" % (name.encode(), number)).digest() for number in range(count)]


def test_an_empty_one_has_nothing() -> None:
    empty = KeyFilter(1_000)
    assert not any(map(empty.may_have, keys(1_000)))
    assert len(empty) == 0
    assert not empty.is_full


@pytest.mark.parametrize("keys_max", [1, 7, 1_000, 20_000])
def test_full_it_has_all_of_its_own_and_few_others(keys_max: int) -> None:
    full = KeyFilter(keys_max)
    for key in keys(keys_max):
        full.add(key)
    assert all(map(full.may_have, keys(keys_max)))
    strangers = keys(20_000, "stranger")
    assert sum(map(full.may_have, strangers)) < 0.02 * len(strangers) or keys_max < 10


def test_it_counts_what_it_did_not_know() -> None:
    counted = KeyFilter(500)
    for _ in range(3):
        for key in keys(450):
            counted.add(key)
    assert 440 <= len(counted) <= 450
    assert not counted.is_full
    for key in keys(600):
        counted.add(key)
    assert counted.is_full


@pytest.mark.parametrize("odd", [b"", b"short", b"x" * 33])
def test_what_is_no_digest_is_passed_over(odd: bytes) -> None:
    empty = KeyFilter(100)
    empty.add(odd)
    assert len(empty) == 0
