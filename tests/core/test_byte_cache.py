"""Bounded in bytes as Python takes them, the least worth goes first, nothing old is served."""

from __future__ import annotations

import gc
import tracemalloc

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from router.core.byte_cache import BYTES_OBJECT_BYTES, ENTRY_BYTES, ByteCache

NAMES = [b"%032d" % number for number in range(60)]


def put(cache: ByteCache[bytes], name: bytes, size: int = 100, **fields: float) -> bool:
    group = f"group {int(fields.pop('group', 0))}"
    cost = int(fields.pop("cost", 0))
    made_s, now_s = fields.pop("made_s", 0.0), fields.pop("now_s", 0.0)
    return cache.put(name, name, size, made_s=made_s, now_s=now_s, group=group, cost_nanousd=cost)


@pytest.fixture
def cache() -> ByteCache[bytes]:
    """Room for ten entries of a hundred bytes, and none of more than an eighth."""
    return ByteCache(10 * (100 + ENTRY_BYTES), 60.0)


def there(cache: ByteCache[bytes]) -> list[int]:
    return [at for at, name in enumerate(NAMES) if cache.get(name, 0.0) is not None]


def test_hits_misses_and_what_they_saved(cache: ByteCache[bytes]) -> None:
    put(cache, NAMES[0], cost=7)
    put(cache, NAMES[1], cost=5)
    found = cache.get_each([NAMES[0], NAMES[2], NAMES[1], NAMES[0]], 1.0)
    assert found == [NAMES[0], None, NAMES[1], NAMES[0]]
    counts = cache.counts
    assert (counts.hits, counts.misses, counts.saved_nanousd) == (3, 1, 19)
    assert (counts.entries, counts.bytes) == (len(cache), 2 * (100 + ENTRY_BYTES))


def test_age_by_ttl_and_by_the_caller_s_wish(cache: ByteCache[bytes]) -> None:
    put(cache, NAMES[0], made_s=10.0, now_s=10.0)
    assert cache.get(NAMES[0], 69.9) is not None
    assert cache.get(NAMES[0], 70.0) is None
    assert cache.get(NAMES[0], 15.0, max_age_s=5.0) is None
    assert cache.get(NAMES[0], 15.0, max_age_s=99.0) is not None
    assert not put(cache, NAMES[1], made_s=10.0, now_s=70.0)
    cache.ttl_s = 3.0
    assert cache.get(NAMES[0], 15.0) is None


def test_one_entry_does_not_empty_it(cache: ByteCache[bytes]) -> None:
    put(cache, NAMES[0])
    assert not put(cache, NAMES[1], size=cache.bytes_max // 8)
    assert not put(cache, NAMES[0], size=cache.bytes_max // 8)
    assert there(cache) == [], "what was replaced in vain is gone too"


def test_what_is_asked_for_stays_and_what_nobody_asks_for_ages(cache: ByteCache[bytes]) -> None:
    for name in NAMES:
        put(cache, name)
        cache.get(NAMES[0], 0.0)
    assert 0 in there(cache)
    assert there(cache)[-1] == 59
    assert cache.counts.evictions == 50


def test_what_costs_more_to_make_stays_longer(cache: ByteCache[bytes]) -> None:
    dear = range(3)
    for at in dear:
        put(cache, NAMES[at], cost=100_000)
    for name in NAMES[3:]:
        put(cache, name)
    assert there(cache)[:3] == list(dear)
    rounds = 0
    while any(NAMES[at] in cache._rows for at in dear):
        rounds += 1
        assert rounds < 100_000, "never aged"
        put(cache, b"%032d" % (100 + rounds))


def test_a_dropped_group_is_gone_at_once_and_its_bytes_later(cache: ByteCache[bytes]) -> None:
    for at in range(6):
        put(cache, NAMES[at], group=at % 2)
    assert cache.drop("group 1") == 3
    assert cache.drop("group 1") == 0
    assert there(cache) == [0, 2, 4]
    put(cache, NAMES[1], group=1)
    assert there(cache) == [0, 1, 2, 4]
    for at in range(10, 20):
        put(cache, NAMES[at], group=1)
    assert cache.counts.dropped == 3
    assert len(cache._live) == len([group for group in cache._groups if group.entries])
    assert cache.drop("group 1") > 0
    for at in range(20, 40):
        put(cache, NAMES[at], group=at)
    assert len(cache._groups) < 20


def test_what_is_old_goes_before_what_is_cheap(cache: ByteCache[bytes]) -> None:
    for at in range(10):
        put(cache, NAMES[at], cost=10**6)
    for at in range(10, 20):
        put(cache, NAMES[at], made_s=60.0, now_s=60.0)
    assert (cache.counts.evictions, cache.counts.expired) == (0, 10)
    cache.clear()
    put(cache, NAMES[0])
    put(cache, NAMES[1], made_s=60.0, now_s=60.0)
    assert len(cache) == 1, "the last one there is may be swept too"
    assert list(cache._live) == ["group 0"], "a group without entries is forgotten"


def test_what_is_old_makes_room_before_anything_good() -> None:
    cache: ByteCache[bytes] = ByteCache(80 * (100 + ENTRY_BYTES), 60.0)
    for number in range(80):
        put(cache, b"%032d" % number)
    put(cache, NAMES[0], size=8 * (100 + ENTRY_BYTES), made_s=60.0, now_s=60.0)
    assert (cache.counts.evictions, cache.counts.expired) == (0, 8)


def test_removed_and_cleared(cache: ByteCache[bytes]) -> None:
    for at in range(3):
        put(cache, NAMES[at])
    cache.remove(NAMES[0])
    cache.remove(NAMES[0])
    assert there(cache) == [1, 2]
    assert (cache.peek(NAMES[1]), cache.peek(NAMES[0])) == (NAMES[1], None)
    assert cache.groups() == {"group 0"}
    cache.clear()
    assert (len(cache), cache.counts.bytes, cache.groups()) == (0, 0, set())
    assert put(cache, NAMES[0])
    assert there(cache) == [0]


def test_shrunk_until_so_much_is_left(cache: ByteCache[bytes]) -> None:
    for at in range(8):
        put(cache, NAMES[at], cost=at)
    cache.shrink(3 * (100 + ENTRY_BYTES), 0.0)
    assert len(cache) == 3
    assert cache.counts.evictions == 5
    cache.shrink(-1, 0.0)
    assert len(cache) == 0


class Against(RuleBasedStateMachine):
    """Whatever happens, it holds no more than it may, and serves nothing but what was put."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: ByteCache[tuple[bytes, int]] = ByteCache(8_000, 50.0)
        self.put: dict[bytes, tuple[int, float, int]] = {}
        self.now_s = 0.0
        self.number = 0

    @rule(
        name=st.sampled_from(NAMES),
        size=st.integers(0, 1_200),
        group=st.integers(0, 2),
        age_s=st.floats(0, 60),
    )
    def keep(self, name: bytes, size: int, group: int, age_s: float) -> None:
        self.number += 1
        made_s = self.now_s - age_s
        value = (name, self.number)
        self.put.pop(name, None)
        if self.cache.put(name, value, size, made_s=made_s, now_s=self.now_s, group=str(group)):
            self.put[name] = (self.number, made_s, group)

    @rule(name=st.sampled_from(NAMES), max_age_s=st.none() | st.floats(0, 60))
    def ask(self, name: bytes, max_age_s: float | None) -> None:
        found = self.cache.get(name, self.now_s, max_age_s)
        if found is not None:
            number, made_s, _ = self.put[name]
            assert found == (name, number)
            assert self.now_s - made_s < min(50.0, 60.0 if max_age_s is None else max_age_s) + 1e-9

    @rule(name=st.sampled_from(NAMES))
    def forget(self, name: bytes) -> None:
        self.cache.remove(name)
        self.put.pop(name, None)

    @rule(group=st.integers(0, 2))
    def drop(self, group: int) -> None:
        self.cache.drop(str(group))
        self.put = {name: told for name, told in self.put.items() if told[2] != group}

    @rule(seconds=st.floats(0, 30))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @invariant()
    def it_is_consistent(self) -> None:
        cache = self.cache
        assert cache.counts.bytes <= cache.bytes_max
        assert cache.counts.entries == len(cache) == len(cache._rows) == len(cache._values)
        assert all(cache._keys[row] == name for name, row in cache._rows.items())
        assert sum(group.entries for group in cache._groups) == len(cache)
        assert len(cache._groups) <= 3 + len(cache)
        assert set(cache._live) <= {"0", "1", "2"}


TestAgainst = Against.TestCase
TestAgainst.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("value_bytes", [64, 1536])
def test_the_bound_is_true(value_bytes: int) -> None:
    """What the interpreter takes is at most the bound, and not much less than what is counted."""
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        cache: ByteCache[bytes] = ByteCache(4 << 20, 60.0)
        for number in range(15_000):
            name, value = b"%032d" % number, bytes(value_bytes)
            cache.put(name, value, value_bytes + BYTES_OBJECT_BYTES, made_s=0.0, now_s=0.0)
            if number % 500 == 499:
                taken = tracemalloc.get_traced_memory()[0] - before
                assert taken <= cache.bytes_max * 1.01
                assert 0.75 < taken / cache.counts.bytes < 1.02
        assert cache.counts.evictions > 0
    finally:
        tracemalloc.stop()


def test_the_share_of_an_entry_where_the_bound_moves(cache: ByteCache[bytes]) -> None:
    cache.entry_bytes_max = 5_000
    assert put(cache, NAMES[0], 2_000)
    cache.bytes_max = 1_000
    assert not put(cache, NAMES[1], 2_000)
