"""What is kept is found again, by whom it may be, while it is true; the store is a gain only."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from router.core.cache_key import CacheControl
from router.errors import StateUnavailable
from router.flow.cache import Cache, CacheRules, Slot
from router.flow.contents import Contents
from router.flow.second_tier import SecondTier
from router.flow.tasks import Tasks
from router.store.base import EntryKeys
from router.store.sqlite import SqliteStore
from router.types import (
    ChatCall,
    EmbedCall,
    Key,
    Ladder,
    Needs,
    Policy,
    Rung,
    Task,
    Usage,
)
from tests.fakes.clock import Clock

ANY = CacheControl()
RUNG = Rung("gpu", "org/m")
CHAT = Ladder("chat", Task.CHAT, (RUNG,))
EMBED = Ladder("embed", Task.EMBEDDINGS, (RUNG,))
OWN, SHARED = (CacheRules("deterministic", is_shared, {}) for is_shared in (False, True))
ALICE, BOB = Key("alice"), Key("bob")
VECTOR = b"\0\0\x80?" * 8
MIB = 1 << 20


class Shelf:
    """A store that two hosts may share; with `trouble` it is gone, with `is_slow` it hangs."""

    def __init__(self) -> None:
        self.entries: dict[bytes, tuple[bytes, str]] = {}
        self.trouble = False
        self.is_slow = False
        self.asked = 0
        self.written = 0

    async def get_entries(self, cache_keys: Sequence[bytes]) -> list[bytes | None]:
        self.asked += 1
        await self._reached()
        return [self.entries[key][0] if key in self.entries else None for key in cache_keys]

    async def entry_keys(self, place: str, limit: int) -> EntryKeys:
        await self._reached()
        start = int(place or 0)
        keys = list(self.entries)[start : start + limit]
        end = str(start + len(keys))
        return EntryKeys(keys, end, len(keys) < limit, len(self.entries))

    async def put_entries(
        self, entries: Sequence[tuple[bytes, bytes]], *, group: str, ttl_s: float
    ) -> None:
        await self._reached()
        self.written += len(entries)
        self.entries.update({key: (value, group) for key, value in entries})

    async def drop_entries(self, group: str) -> int:
        await self._reached()
        gone = [key for key, (_, of) in self.entries.items() if of == group]
        for key in gone:
            del self.entries[key]
        return len(gone)

    async def _reached(self) -> None:
        if self.is_slow:
            await asyncio.get_running_loop().create_future()
        await asyncio.sleep(0)
        if self.trouble:
            raise StateUnavailable("gone")


class House:
    """Processes with a cache each, over one store."""

    def __init__(self) -> None:
        self.tasks = Tasks()
        self.clock = Clock()
        self.shelf = Shelf()
        self.told: list[Any] = []

    def process(self, mib: int = 1, *, is_shared: bool = False) -> Cache:
        tier = SecondTier(
            self.shelf, self.tasks, self.clock, is_shared=is_shared, write_every_s=0.0
        )
        return Cache(mib * MIB, 60.0, tier, self.clock, self.told.append)


@pytest.fixture
async def house() -> AsyncIterator[House]:
    found = House()
    yield found
    await found.tasks.aclose()


def chat(key: Key = ALICE, **body: Any) -> ChatCall:
    said = {"model": "chat", "messages": [], "temperature": 0, **body}
    return ChatCall("id", key, CHAT, Policy.ORDER, said, False, False, Needs())


def embed(*inputs: str, key: Key = ALICE) -> EmbedCall:
    return EmbedCall("id", key, EMBED, Policy.ORDER, list(inputs), Needs())


def slot_of(
    cache: Cache, call: ChatCall, control: CacheControl = ANY, rules: CacheRules = OWN
) -> Slot:
    slot = cache.slot(call, control, rules)
    assert slot is not None
    return slot


def keys_of(cache: Cache, call: EmbedCall, rules: CacheRules = OWN) -> list[bytes]:
    keys = cache.input_keys(call, ANY, rules)
    assert keys is not None
    return keys


def keep_vector(cache: Cache, house: House, *inputs: str, vector: bytes = VECTOR) -> list[bytes]:
    keys = keys_of(cache, embed(*inputs))
    cache.keep_vectors(keys, [bytes(bytearray(vector)) for _ in keys], RUNG, 10, house.clock())
    return keys


async def settle() -> None:
    for _ in range(30):
        await asyncio.sleep(0)


# --- whose it is --------------------------------------------------------------------------------


async def test_an_entry_is_its_key_s_unless_it_is_shared(house: House) -> None:
    cache = house.process()
    session = Key("alice", session="s1")
    cache.keep(slot_of(cache, chat()), RUNG, b"answer", Usage(3, 4), 7)
    for key in (BOB, session):
        assert await cache.find(slot_of(cache, chat(key))) is None
    cache.keep(slot_of(cache, chat(), rules=SHARED), RUNG, b"for all", None, 7)
    for key in (ALICE, BOB, session):
        found = await cache.find(slot_of(cache, chat(key), rules=SHARED))
        assert found is not None
        assert found.body == b"for all"
    other_tier = Key("carol", tier="premium")
    assert await cache.find(slot_of(cache, chat(other_tier), rules=SHARED)) is None


async def test_what_nobody_knows_is_in_the_key(house: House) -> None:
    cache = house.process()
    cache.keep(slot_of(cache, chat()), RUNG, b"answer", None, 0)
    assert await cache.find(slot_of(cache, chat(user="x", stream=True))) is not None
    assert await cache.find(slot_of(cache, chat(new_setting=1))) is None


def test_what_is_not_to_be_kept_has_no_slot(house: House) -> None:
    cache = house.process()
    assert cache.slot(chat(temperature=0.5), ANY, OWN) is None
    assert cache.slot(chat(n=2), ANY, OWN) is None
    assert cache.slot(chat(temperature=0.5, n=2), ANY, CacheRules("always", False, {})) is not None
    assert cache.slot(chat(), ANY, CacheRules("off", False, {})) is None
    assert cache.slot(chat(), CacheControl(no_store=True), OWN) is None
    assert cache.input_keys(embed("a"), CacheControl(no_store=True), OWN) is None


# --- how old it is ------------------------------------------------------------------------------


@pytest.mark.parametrize("restarts", [False, True])
async def test_ages_hold_in_both_tiers(house: House, restarts: bool) -> None:
    first = house.process()
    first.keep(slot_of(first, chat()), RUNG, b"answer", Usage(3, 4, True), 7)
    keys = keep_vector(first, house, "a", "b")
    await settle()
    house.clock.now += 20

    async def found(**control: Any) -> tuple[bool, int]:
        # After a restart each look is the first of a process: memory is empty.
        cache = house.process() if restarts else first
        asked = CacheControl(**control)
        kept = await cache.find(slot_of(cache, chat(), asked))
        vectors = await cache.find_vectors(keys, asked)
        return kept is not None, sum(vector == VECTOR for vector in vectors)

    assert await found() == (True, 2)
    assert await found(max_age_s=30.0) == (True, 2)
    assert await found(max_age_s=10.0) == (False, 0)
    assert await found(max_age_s=0.0) == (False, 0)
    assert await found(no_cache=True) == (False, 0)
    house.clock.now += 41
    assert await found() == (False, 0)


async def test_a_shorter_life_is_for_what_the_store_has_too(house: House) -> None:
    first = house.process()
    keys = keep_vector(first, house, "a")
    await settle()
    house.clock.now += 20
    second = house.process()
    second.resize(MIB, 10.0)
    assert await second.find_vectors(keys, ANY) == [None]
    assert second.tier_counts()["embeddings"].misses == 1


async def test_the_store_gives_back_all_that_was_kept(house: House) -> None:
    first = house.process()
    first.keep(slot_of(first, chat()), RUNG, b"an\nanswer", Usage(3, 4, True), 7)
    await settle()
    second = house.process()
    found = await second.find(slot_of(second, chat()))
    assert found is not None
    assert (found.body, found.rung, found.usage) == (b"an\nanswer", "gpu/org/m", Usage(3, 4, True))
    third, asked = house.process(), house.shelf.asked
    assert await third.find(slot_of(third, chat()), in_memory=True) is None
    assert await second.find(slot_of(second, chat())) is not None
    assert house.shelf.asked == asked, "from memory the second time"
    assert second.tier_counts()["chat"].saved_nanousd == 7
    assert second.counts()["chat"].saved_nanousd == 7


@pytest.mark.parametrize("raw", [b"", b"odd", b"[]\nx", b'["r",1,"",0,[1,2,3,4]]\nx', b"7\nx"])
async def test_what_another_version_wrote_is_not_found(house: House, raw: bytes) -> None:
    cache = house.process()
    slot, keys = slot_of(cache, chat()), keys_of(cache, embed("a"))
    house.shelf.entries = dict.fromkeys((slot.key, *keys), (raw, "g"))
    assert await cache.find(slot) is None
    assert await cache.find_vectors(keys, ANY) == [None]


async def test_vectors_must_be_vectors(house: House) -> None:
    cache = house.process()
    keys = keys_of(cache, embed("a", "b"))
    for key, body in zip(keys, (b"", b"abc"), strict=True):
        house.shelf.entries[key] = (b'["gpu/org/m",100.0,"",0,null]\n' + body, "g")
    assert await cache.find_vectors(keys, ANY) == [None, None]


# --- another model ------------------------------------------------------------------------------


async def test_what_was_dropped_is_gone_everywhere_and_stays_gone(house: House) -> None:
    cache, other_worker = house.process(), house.process()
    early = slot_of(cache, chat(seed=1))
    asked_s = house.clock()
    for one in (cache, other_worker):
        one.keep(slot_of(one, chat()), RUNG, b"old", None, 0)
    keys = keep_vector(cache, house, "a")
    await settle()
    house.clock.now += 1
    cache.drop(RUNG.name)
    other_worker.hear(house.told.pop())
    await settle()
    assert not house.shelf.entries
    for one in (cache, other_worker):
        assert await one.find(slot_of(one, chat())) is None
    # What was asked for before the drop comes too late.
    cache.keep(early, RUNG, b"old", None, 0)
    cache.keep_vectors(keys, [VECTOR], RUNG, 0, asked_s)
    assert await cache.find(early) is None
    assert await cache.find_vectors(keys, ANY) == [None]
    house.clock.now += 1
    keep_vector(cache, house, "a")
    assert await cache.find_vectors(keys, ANY) == [VECTOR]


async def test_a_store_that_cannot_drop_does_so_later_and_serves_nothing_old(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    cache = house.process()
    keys = keep_vector(cache, house, "a")
    await settle()
    house.shelf.trouble = True
    house.clock.now += 1
    cache.drop(RUNG.name)
    await settle()
    assert "not dropped from the store yet" in caplog.text
    house.shelf.trouble = False
    assert await cache.find_vectors(keys, ANY) == [None], "the store still has it"
    assert house.shelf.entries


async def test_another_revision_than_the_entry_s_is_another_model(house: House) -> None:
    first = house.process()
    first.note_revision("gpu", "one", [RUNG.name])
    first.keep(slot_of(first, chat()), RUNG, b"of one", None, 0)
    first.note_revision("gpu", "one", [RUNG.name])
    assert await first.find(slot_of(first, chat())) is not None
    await settle()
    # The server was started with another revision while no process looked.
    second = house.process()
    second.note_revision("gpu", "two", [RUNG.name])
    assert await second.find(slot_of(second, chat())) is None
    third = house.process()
    assert await third.find(slot_of(third, chat())) is not None, "nothing is known to be wrong"
    third.note_revision("gpu", "one", [RUNG.name])
    assert await third.find(slot_of(third, chat())) is not None
    house.clock.now += 1
    third.note_revision("gpu", "two", [RUNG.name])
    assert await third.find(slot_of(third, chat())) is None


async def test_a_drop_is_seen_by_the_hosts_that_share_the_store(house: House) -> None:
    one, other = house.process(is_shared=True), house.process(is_shared=True)
    keys = keep_vector(one, house, "a")
    keep_vector(other, house, "a")
    assert one.tier is not None
    assert other.tier is not None
    await other.tier.look(other.groups, other.drop_from_memory)
    assert other.groups() == {RUNG.name}
    house.clock.now += 1
    one.drop(RUNG.name)
    await settle()
    await other.tier.look(other.groups, other.drop_from_memory)
    assert other.groups() == set()
    assert await other.find_vectors(keys, ANY) == [None]
    house.clock.now += 1
    for cache in (one, other):
        keep_vector(cache, house, "a")
        assert cache.tier is not None
        await cache.tier.look(cache.groups, cache.drop_from_memory)
        assert cache.groups() == {RUNG.name}, "a drop is heard once, and not by who made it"
    house.shelf.trouble = True
    await other.tier.look(other.groups, other.drop_from_memory)


# --- the store is never a need ------------------------------------------------------------------


@pytest.mark.parametrize("trouble", ["trouble", "is_slow"])
async def test_a_store_in_trouble_is_left_alone_for_a_while(house: House, trouble: str) -> None:
    cache = house.process()
    keys = keep_vector(cache, house, "a")
    await settle()
    second = house.process()
    setattr(house.shelf, trouble, True)
    assert await second.find_vectors(keys, ANY) == [None]
    asked = house.shelf.asked
    assert await second.find_vectors(keys, ANY) == [None]
    assert house.shelf.asked == asked
    setattr(house.shelf, trouble, False)
    house.clock.now += 6
    assert await second.find_vectors(keys, ANY) == [VECTOR]


async def test_writes_are_bounded_and_an_entry_waits_once(house: House) -> None:
    cache = house.process(mib=8)
    tier = cache.tier
    assert tier is not None
    for _ in range(3):
        keep_vector(cache, house, "a")
    keep_vector(cache, house, *(f"text {number}" for number in range(4_500)))
    assert tier.writes_lost == 405
    await tier.flush(5.0)
    assert house.shelf.written == 4_096
    house.shelf.trouble = True
    keep_vector(cache, house, "b")
    await tier.flush(5.0)
    assert tier.writes_lost == 406


async def test_who_shares_a_request_keeps_its_vectors_once(house: House) -> None:
    cache = house.process()
    keys = keys_of(cache, embed("a"))
    for _ in range(3):
        cache.keep_vectors(keys, [VECTOR], RUNG, 0, house.clock())
    await settle()
    assert house.shelf.written == 1


async def test_the_end_of_the_house_waits_for_what_is_to_be_written(house: House) -> None:
    cache = house.process()
    keys = keep_vector(cache, house, "a")
    assert cache.tier is not None
    await cache.tier.flush(5.0)
    assert set(keys) <= house.shelf.entries.keys()


async def test_entries_are_written_together_and_many_at_once(house: House) -> None:
    slow = SecondTier(house.shelf, house.tasks, house.clock, is_shared=False, write_every_s=3_600.0)
    cache = Cache(8 * MIB, 60.0, slow, house.clock)
    keep_vector(cache, house, *(f"text {number}" for number in range(511)))
    await settle()
    assert house.shelf.written == 0, "they wait for more"
    keep_vector(cache, house, "one more")
    await settle()
    assert house.shelf.written == 512
    keep_vector(cache, house, "the next")
    await settle()
    assert house.shelf.written == 512
    await slow.flush(5.0)
    assert house.shelf.written == 513


async def test_a_drop_takes_what_waits_to_be_written_and_comes_after_what_is_on_its_way(
    house: House,
) -> None:
    slow = SecondTier(house.shelf, house.tasks, house.clock, is_shared=False, write_every_s=3_600.0)
    cache = Cache(8 * MIB, 60.0, slow, house.clock)
    keep_vector(cache, house, *(f"text {number}" for number in range(512)))
    # The writer has begun with those.
    await asyncio.sleep(0)
    keep_vector(cache, house, "waits")
    house.clock.now += 1
    cache.drop(RUNG.name)
    await settle()
    assert not house.shelf.entries


# --- what the store may have --------------------------------------------------------------------


async def test_what_the_store_cannot_have_is_not_asked_for(house: House) -> None:
    first = house.process()
    kept = keep_vector(first, house, *(f"text {number}" for number in range(600)))
    first.keep(slot_of(first, chat()), RUNG, b"answer", None, 0)
    await settle()
    second = house.process()
    assert second.tier is not None
    await second.tier.contents.follow()
    unknown = keys_of(second, embed(*(f"unknown {number}" for number in range(100))))
    asked = house.shelf.asked
    assert await second.find_vectors(unknown, ANY) == [None] * 100
    assert await second.find(slot_of(second, chat(seed=1))) is None
    assert house.shelf.asked == asked
    assert second.tier_counts()["embeddings"].misses == 100
    assert second.tier_counts()["chat"].misses == 1
    found = await second.find_vectors([unknown[0], *kept, unknown[1]], ANY)
    assert found == [None, *[VECTOR] * 600, None]
    assert await second.find(slot_of(second, chat())) is not None
    assert house.shelf.asked == asked + 2


async def test_what_another_process_writes_is_known_after_the_next_look(house: House) -> None:
    first, second = house.process(), house.process()
    assert second.tier is not None
    await second.tier.contents.follow()
    keys = keep_vector(first, house, "a")
    await settle()
    assert await second.find_vectors(keys, ANY) == [None]
    await second.tier.contents.follow()
    assert await second.find_vectors(keys, ANY) == [VECTOR]


async def test_what_this_process_wrote_is_known_at_once(house: House) -> None:
    cache = house.process()
    assert cache.tier is not None
    await cache.tier.contents.follow()
    keys = keep_vector(cache, house, "a")
    await settle()
    cache.resize(0, 60.0)
    cache.resize(MIB, 60.0)
    assert await cache.find_vectors(keys, ANY) == [VECTOR]


async def test_what_cannot_be_followed_is_asked_for(house: House) -> None:
    first, second = house.process(), house.process()
    assert second.tier is not None
    await second.tier.contents.follow()
    house.shelf.trouble = True
    with pytest.raises(StateUnavailable):
        await second.tier.contents.follow()
    house.shelf.trouble = False
    keys = keep_vector(first, house, "a")
    await settle()
    assert await second.find_vectors(keys, ANY) == [VECTOR]


async def test_a_full_filter_is_made_anew_without_what_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("router.flow.contents._KEYS_MIN", 4_000)
    monkeypatch.setattr("router.flow.contents._PARTS_AT_ONCE", 1)
    store = await SqliteStore.open(None)
    contents = Contents(store)

    def keys(what: str, count: int) -> list[bytes]:
        return [hashlib.sha256(f"{what} {number}".encode()).digest() for number in range(count)]

    async def put(what: str, count: int) -> None:
        await store.put_entries([(key, b"") for key in keys(what, count)], group=what, ttl_s=60)

    def known(what: str, count: int) -> int:
        return sum(map(contents.may_have, keys(what, count)))

    await contents.follow()
    await put("gone", 4_200)
    await contents.follow()
    await store.drop_entries("gone")
    await put("there", 700)
    await contents.follow()
    # While the next one is filled, the full one is asked still, and told of what is new.
    await put("new", 100)
    await contents.follow()
    assert known("gone", 1_000) == 1_000
    assert known("there", 700) == 700
    assert known("new", 100) == 100
    assert known("unknown", 1_000) < 100
    [mine] = keys("mine", 1)
    contents.add(mine)
    for _ in range(20):
        await contents.follow()
    assert known("gone", 1_000) < 100
    assert known("there", 700) == 700
    assert known("new", 100) == 100
    assert contents.may_have(mine)
    await store.aclose()


# --- memory -------------------------------------------------------------------------------------


def test_both_kinds_together_hold_no_more_than_was_given(house: House) -> None:
    cache = Cache(MIB, 60.0, None, house.clock)
    answers, vectors = cache.counts()["chat"], cache.counts()["embeddings"]

    def keep_answers(count: int, base: int = 0) -> None:
        for number in range(base, base + count):
            cache.keep(slot_of(cache, chat(seed=number)), RUNG, b"x" * 20_000, None, 0)
            assert answers.bytes + vectors.bytes <= MIB

    def keep_vectors(count: int) -> None:
        for number in range(count):
            keep_vector(cache, house, f"text {number}", vector=VECTOR * 100)
            assert answers.bytes + vectors.bytes <= MIB

    keep_answers(100)
    assert answers.bytes > 0.9 * MIB, "the one may have it all"
    keep_vectors(1_000)
    assert MIB * 0.45 < vectors.bytes <= MIB * 0.51
    assert MIB * 0.4 < answers.bytes <= MIB * 0.51, "and gives back what is not its own"
    keep_answers(100, 1_000)
    assert MIB * 0.4 < vectors.bytes <= MIB * 0.51
    cache.resize(MIB // 4, 60.0)
    assert answers.bytes + vectors.bytes <= MIB // 4
    cache.resize(0, 60.0)
    assert (answers.bytes, vectors.bytes) == (0, 0)
    assert not cache.is_on
    assert cache.slot(chat(), ANY, OWN) is None
    cache.resize(MIB, 60.0)
    keep_answers(3)
    assert answers.entries == 3
