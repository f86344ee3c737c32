"""Keys take turns, equal inputs travel once, suspects alone, and shares add up."""

from __future__ import annotations

from collections.abc import Hashable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.batch import (
    Item,
    Limits,
    Queue,
    Suspects,
    callers_of,
    halves,
    is_searched,
    shares_of,
    split_exactly,
)
from router.errors import (
    CallerMistake,
    PromptTooLong,
    UpstreamBusy,
    UpstreamError,
    UpstreamFailed,
    UpstreamTooLarge,
)

ANY = 1 << 30


def trusts(_: Hashable) -> bool:
    return False


class Rig:
    """A queue whose callers are `key:number`, and whose identities are the texts themselves."""

    def __init__(self) -> None:
        self.queue: Queue[str] = Queue()

    def add(self, caller: str, *texts: str, tokens: int = 1) -> list[Item[str]]:
        key = caller.partition(":")[0]
        return [
            self.queue.add((key, text), text, tokens, key, caller, index)
            for index, text in enumerate(texts)
        ]

    def take(self, count: int = 32, room: int = ANY, **limits: int) -> list[str]:
        items = self.queue.take(Limits(count, **limits), room, trusts)
        return [str(item.input) for item in items]


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_keys_take_turns_and_each_keeps_its_order(rig: Rig) -> None:
    rig.add("big:1", *"abcdef")
    rig.add("small:1", "x", "y")
    assert rig.take(4) == ["a", "x", "b", "y"]
    assert rig.take(4) == ["c", "d", "e", "f"]
    assert rig.take(4) == []
    assert rig.queue.waiting == 0


def test_turns_are_measured_in_tokens(rig: Rig) -> None:
    rig.add("long:1", *"ABC", tokens=10)
    rig.add("short:1", *"abcdefghijklmnopqrstuvwxyz", tokens=1)
    assert "".join(rig.take(24)) == "AabcdefghijBklmnopqrstCu"


def test_who_comes_back_has_no_old_claim(rig: Rig) -> None:
    rig.add("one:1", "a")
    (item,) = rig.add("two:1", "b")
    rig.queue.leave(item, "two:1")
    rig.add("one:1", *"cdef")
    assert rig.take(5) == ["a", "c", "d", "e", "f"]
    rig.add("one:1", *"ghi")
    rig.add("two:1", *"jkl")
    rig.add("three:1", *"mno")
    assert rig.take(6) == ["j", "m", "g", "k", "n", "h"]


def test_a_row_that_was_emptied_starts_where_the_others_are(rig: Rig) -> None:
    rig.add("one:1", *"abcdefgh")
    (item,) = rig.add("two:1", "x")
    assert rig.take(1) == ["a"]
    rig.queue.leave(item, "two:1")
    rig.add("two:1", *"yz")
    assert rig.take(4) == ["y", "b", "z", "c"]


def test_limits_of_count_tokens_and_room(rig: Rig) -> None:
    rig.add("one:1", *"abc", tokens=6)
    rig.add("two:1", "x", tokens=4)
    assert rig.take(tokens_max=10) == ["a", "x"]
    assert rig.take(room=0) == []
    assert rig.take(tokens_max=5) == ["b"], "one that is too large by itself goes alone"
    assert rig.take(room=1) == ["c"]


def test_equal_inputs_are_one_until_it_is_over(rig: Rig) -> None:
    (item,) = rig.add("one:1", "a")
    assert rig.add("one:2", "a", "a") == [item, item]
    assert item.wants == [("one:1", 0), ("one:2", 0), ("one:2", 1)]
    assert rig.add("two:1", "a") != [item], "another key's is another's"
    assert rig.take(1) == ["a"]
    assert rig.add("one:3", "a") == [item], "also while it is under way"
    rig.queue.forget(item)
    rig.queue.forget(item)
    assert rig.add("one:4", "a") != [item]


def test_what_nobody_wants_is_not_sent(rig: Rig) -> None:
    items = rig.add("one:1", *"abc")
    rig.add("one:2", "b")
    for item in items:
        rig.queue.leave(item, "one:1")
    assert rig.queue.waiting == rig.queue.waiting_of("one") == 1
    assert rig.queue.waiting_of("two") == 0
    assert rig.take() == ["b"]
    rig.queue.leave(items[1], "one:2")
    assert rig.queue.waiting == 0
    assert rig.take() == []


def test_what_is_put_back_goes_before_what_waits_of_its_key(rig: Rig) -> None:
    (sent,) = rig.add("one", "a")
    assert rig.take(1) == ["a"]
    rig.queue.forget(sent)
    rig.add("one", "b")
    rig.queue.put_back(sent)
    assert rig.queue.waiting == 2
    assert rig.add("one", "a") == [sent], "who asks for it now joins"
    assert rig.take(4) == ["a", "b"]
    assert rig.queue.waiting == 0


def test_a_suspect_travels_with_its_key_s_suspects_only(rig: Rig) -> None:
    rig.add("one:1", "bad 1", "bad 2", "good")
    rig.add("two:1", "bad 3", "good too")

    def take() -> list[object]:
        found = rig.queue.take(Limits(), ANY, lambda identity: "bad" in str(identity))
        return [item.input for item in found]

    assert take() == ["bad 1", "bad 2"]
    assert take() == ["bad 3"]
    assert take() == ["good too", "good"]


def test_suspects_are_forgotten_by_time_and_by_number() -> None:
    suspects = Suspects(entries_max=2, keep_s=10.0)
    assert not suspects.has("a", 0.0)
    for name in "aba":
        suspects.mark(name, 1.0)
    suspects.mark("c", 5.0)
    assert [suspects.has(name, 6.0) for name in "abc"] == [True, False, True]
    assert [suspects.has(name, 11.0) for name in "abc"] == [False, False, True]


@pytest.mark.parametrize(
    ("error", "searched"),
    [
        (CallerMistake("bad"), True),
        (CallerMistake("bad", status=413), True),
        (CallerMistake("gone", status=409), False),
        (PromptTooLong("long"), True),
        (UpstreamTooLarge("large"), True),
        (UpstreamBusy("429"), False),
        (UpstreamFailed("500"), False),
    ],
)
def test_what_is_searched(error: UpstreamError, searched: bool) -> None:
    assert is_searched(error) is searched


def test_halves_keep_a_caller_s_inputs_together(rig: Rig) -> None:
    one, two = rig.add("one:1", "a", "b"), rig.add("two:1", "x", "y")
    mixed = [one[0], two[0], one[1], two[1]]
    assert callers_of(mixed) == ["one:1", "two:1"]
    assert halves(mixed) == (one, two)


@given(st.integers(0, 10**18), st.lists(st.integers(0, 10**9), min_size=1, max_size=40))
def test_shares_add_up_and_are_fair(total: int, weights: list[int]) -> None:
    shares = split_exactly(total, weights)
    assert sum(shares) == total
    whole = sum(weights) or len(weights)
    for share, weight in zip(shares, weights if any(weights) else [1] * len(weights), strict=True):
        assert abs(share * whole - total * weight) < whole, "off by less than one"


def test_shares_of_nobody_are_none() -> None:
    assert split_exactly(0, []) == []


@given(
    st.integers(0, 10**6),
    st.lists(
        st.tuples(st.integers(1, 50), st.lists(st.sampled_from("xyz"), min_size=1)), min_size=1
    ),
)
def test_who_shares_an_input_shares_its_part(total: int, told: list[tuple[int, list[str]]]) -> None:
    items: list[Item[str]] = []
    for tokens, callers in told:
        item: Item[str] = Item("", "", tokens, "")
        item.wants = [(caller, 0) for caller in callers]
        items.append(item)
    assert sum(share for _, share in shares_of(total, items)) == total
