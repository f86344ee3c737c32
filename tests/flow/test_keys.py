"""Who a secret belongs to: known at once, asked once, revoked everywhere, and never a guess.

Two books on one store are two processes.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from router.errors import (
    Conflict,
    Forbidden,
    RateLimited,
    StateUnavailable,
    Unauthenticated,
    UnknownKey,
)
from router.flow import keys as keys_module
from router.flow.issuing import Issuer
from router.flow.keys import KeyBook
from router.flow.tasks import Tasks
from router.store.base import KeyRecord
from router.store.sqlite import SqliteStore
from router.types import Key, KeyLimits
from tests.fakes.clock import Clock


class CountingStore(SqliteStore):
    """The real one, that counts the questions, and keeps answers on the way while it is told to."""

    asked = 0
    at_once = 0
    at_once_max = 0
    on_the_way: asyncio.Event | None = None

    async def find_key(self, digest: str) -> KeyRecord | None:
        self.asked += 1
        self.at_once += 1
        self.at_once_max = max(self.at_once, self.at_once_max)
        try:
            found = await super().find_key(digest)
            if self.on_the_way is not None:
                await self.on_the_way.wait()
            return found
        finally:
            self.at_once -= 1


class Process:
    """One process: what it knows, and its desk for keys."""

    def __init__(self, store: SqliteStore, clock: Clock, tasks: Tasks, **file: str) -> None:
        self.book = KeyBook(store, tasks, clock)
        self.book.configure({_digest(secret): Key(name) for name, secret in file.items()})
        self.desk = Issuer(store, self.book, clock)

    async def who(self, secret: str) -> Key:
        return self.book.known(_digest(secret)) or await self.book.find(_digest(secret))

    async def is_refused(self, secret: str) -> bool:
        try:
            await self.who(secret)
        except Unauthenticated:
            return True
        return False


class State:
    """A store, its clock, and the processes that use it."""

    def __init__(self, store: CountingStore, tasks: Tasks) -> None:
        self.store = store
        self.clock = Clock()
        self._tasks = tasks

    def process(self, **file: str) -> Process:
        return Process(self.store, self.clock, self._tasks, **file)

    @asynccontextmanager
    async def held_up(self) -> AsyncIterator[None]:
        """The engine's one thread has other things to do."""
        may_go_on = threading.Event()
        busy = asyncio.ensure_future(self.store._file.run(lambda _: may_go_on.wait(10)))
        try:
            await asyncio.sleep(0)
            yield
        finally:
            may_go_on.set()
            await busy


@pytest.fixture
async def state() -> AsyncIterator[State]:
    store, tasks = await CountingStore.open(None), Tasks()
    assert isinstance(store, CountingStore)
    yield State(store, tasks)
    await tasks.aclose()
    await store.aclose()


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


# --- what is known ------------------------------------------------------------------------------


async def test_the_files_keys_are_known_without_a_question_after_the_first_look(
    state: State,
) -> None:
    one = state.process(alice="a")
    assert await one.book.refresh()
    state.store.asked = 0
    assert one.book.known(_digest("a")) == Key("alice")
    assert state.store.asked == 0


async def test_a_key_made_at_run_time_works_at_once_and_is_asked_for_once(state: State) -> None:
    one, other = state.process(), state.process()
    limits = {"usd_per_day": 0.5, "max_input_kib": 2}
    shown, secret = await one.desk.create("alice", {"ladders": ["chat"], "limits": limits})
    expected = Key(
        "alice",
        ladders=frozenset({"chat"}),
        limits=KeyLimits(usd_per_day=500_000_000, max_input_bytes=2048),
    )
    assert shown.key == expected
    assert secret not in str(shown)
    for process in (one, other):
        state.store.asked = 0
        callers = await asyncio.gather(*(process.who(secret) for _ in range(50)))
        assert callers == [expected] * 50
        assert state.store.asked == 1
        assert process.book.known(_digest(secret)) == expected


async def test_what_is_known_is_bounded(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_module, "_KNOWN_MAX", 3)
    monkeypatch.setattr(keys_module, "_UNKNOWN_MAX", 3)
    one = state.process()
    secrets = [(await one.desk.create(f"k{i}", {}))[1] for i in range(5)]
    for secret in secrets:
        await one.who(secret)
        # In use, so it stays.
        await one.who(secrets[0])
    assert one.book.known(_digest(secrets[0])) == Key("k0")
    assert one.book.known(_digest(secrets[1])) is None
    assert len(one.book._known) == len(one.book._families) == 3
    for i in range(9):
        assert await one.is_refused(f"wrong {i}")
    assert len(one.book._unknown) == 3


async def test_a_storm_of_wrong_keys_does_not_storm_the_store(state: State) -> None:
    one = state.process(alice="a")
    await one.book.refresh()
    for _ in range(100):
        assert await one.is_refused("wrong")
    assert state.store.asked == 2
    found = await asyncio.gather(
        *(one.who(f"wrong {i}") for i in range(3000)), return_exceptions=True
    )
    refused = sum(isinstance(error, Unauthenticated) for error in found)
    put_off = sum(isinstance(error, StateUnavailable) for error in found)
    assert (refused + put_off, refused > 0) == (3000, True)
    assert put_off >= 3000 - keys_module._ASKS_WAITING_MAX
    assert state.store.at_once_max <= keys_module._ASKS_AT_ONCE
    assert one.book.known(_digest("a")) == Key("alice")


async def test_being_unknown_is_forgotten_with_the_next_change_and_after_a_while(
    state: State,
) -> None:
    one, other = state.process(), state.process()
    await one.book.refresh()
    assert await one.is_refused("later")
    record = KeyRecord("late", {}, {_digest("later").hex(): None}, 0.0)
    assert await state.store.put_key(record, is_new=True)
    assert await one.is_refused("later")
    await one.book.refresh()
    assert await one.who("later") == Key("late")
    assert await other.is_refused("wrong")
    state.store.asked = 0
    state.clock.now += keys_module._UNKNOWN_S
    assert await other.is_refused("wrong")
    assert state.store.asked == 1


# --- changes ------------------------------------------------------------------------------------


async def test_revoked_in_one_process_is_refused_in_all_at_their_next_look(state: State) -> None:
    one, other = state.process(), state.process()
    _, secret = await one.desk.create("alice", {})
    await other.book.refresh()
    await other.who(secret)
    shown = await one.desk.revoke("alice")
    assert shown.revoked_at == state.clock.now
    assert await one.is_refused(secret)
    await other.book.refresh()
    with pytest.raises(Unauthenticated, match="revoked"):
        other.book.known(_digest(secret))
    # For good: neither can it be rotated, nor its name be taken, nor a late writer bring it back.
    with pytest.raises(Conflict) as caught:
        await other.desk.rotate("alice", 0)
    assert caught.value.code == "key_revoked"
    with pytest.raises(Conflict) as caught:
        await other.desk.create("alice", {})
    assert caught.value.code == "name_taken"
    late = KeyRecord("alice", {}, {_digest(secret).hex(): None}, 0.0)
    assert not await state.store.put_key(late, is_new=False)
    assert (await one.desk.revoke("alice")).revoked_at == shown.revoked_at


async def test_a_tombstone_holds_from_the_first_call_of_a_new_process(state: State) -> None:
    one = state.process(alice="a", bob="b")
    await one.book.refresh()
    assert (await one.desk.revoke("alice")).in_file
    assert await one.is_refused("a")
    started_later = state.process(alice="a", bob="b")
    with pytest.raises(Unauthenticated, match="revoked"):
        await started_later.who("a")
    await started_later.book.refresh()
    with pytest.raises(Unauthenticated, match="revoked"):
        started_later.book.known(_digest("a"))
    assert started_later.book.known(_digest("b")) == Key("bob")
    # Also under another name; and another secret under the name is another key.
    renamed = state.process(carol="a", alice="new")
    assert await renamed.is_refused("a")
    assert await renamed.who("new") == Key("alice")


async def test_a_reload_looks_up_what_is_new_and_keeps_what_was_revoked(state: State) -> None:
    one = state.process(alice="a", bob="b")
    await one.book.refresh()
    await one.desk.revoke("bob")
    one.book.configure({_digest("a"): Key("alice", tier="premium"), _digest("b"): Key("bob")})
    assert one.book.known(_digest("a")) == Key("alice", tier="premium")
    assert await one.is_refused("b")
    one.book.configure({_digest("c"): Key("carol")})
    assert one.book.known(_digest("c")) is None
    assert await one.who("c") == Key("carol")
    assert await one.is_refused("a")


async def test_a_rotated_key_has_two_secrets_for_a_while(state: State) -> None:
    one, other = state.process(), state.process()
    _, first = await one.desk.create("alice", {"tier": "premium"})
    await other.book.refresh()
    await other.who(first)
    shown, second = await one.desk.rotate("alice", 60)
    assert sorted(shown.digests.values(), key=str) == [state.clock.now + 60, None]
    await other.book.refresh()
    for process in (one, other):
        assert await process.who(first) == await process.who(second) == shown.key
    state.clock.now += 59.9
    assert not await other.is_refused(first)
    state.clock.now += 0.2
    with pytest.raises(Unauthenticated, match="expired"):
        await other.who(first)
    assert await one.is_refused(first)
    assert await other.who(second) == shown.key
    _, third = await one.desk.rotate("alice", 0)
    assert await one.is_refused(second)
    await other.book.refresh()
    assert await other.is_refused(second)
    assert await other.who(third) == shown.key


async def test_an_overlap_never_gives_an_old_secret_more_time(state: State) -> None:
    one = state.process()
    _, first = await one.desk.create("alice", {})
    await one.desk.rotate("alice", 10)
    shown, _ = await one.desk.rotate("alice", 1000)
    assert shown.digests[_digest(first).hex()] == state.clock.now + 10
    for _ in range(5):
        await one.desk.rotate("alice", 1000)
    with pytest.raises(Conflict, match="shorter overlap_s"):
        await one.desk.rotate("alice", 1000)
    shown, last = await one.desk.rotate("alice", 0)
    assert list(shown.digests) == [_digest(last).hex()]


async def test_the_files_keys_are_read_only(state: State) -> None:
    one = state.process(alice="a")
    with pytest.raises(Conflict) as caught:
        await one.desk.rotate("alice", 0)
    assert caught.value.code == "key_in_file"
    with pytest.raises(Conflict) as caught:
        await one.desk.create("alice", {})
    assert caught.value.code == "name_taken"
    for work in (one.desk.show("nobody"), one.desk.revoke("nobody"), one.desk.rotate("nobody", 0)):
        with pytest.raises(UnknownKey):
            await work


async def test_an_answer_that_a_change_overtook_is_used_once_and_not_remembered(
    state: State,
) -> None:
    one, other = state.process(), state.process()
    _, secret = await other.desk.create("alice", {})
    await one.book.refresh()
    state.store.on_the_way = asyncio.Event()
    asking = asyncio.ensure_future(one.who(secret))
    while not state.store.at_once:
        await asyncio.sleep(0)
    await other.desk.revoke("alice")
    await one.book.refresh()
    state.store.on_the_way.set()
    await asking
    assert one.book.known(_digest(secret)) is None
    assert await one.is_refused(secret)


async def test_who_leaves_does_not_end_the_question_of_others(state: State) -> None:
    one = state.process()
    _, secret = await one.desk.create("alice", {})
    state.store.on_the_way = asyncio.Event()
    leaving, staying = (asyncio.ensure_future(one.who(secret)) for _ in range(2))
    while not state.store.at_once:
        await asyncio.sleep(0)
    leaving.cancel()
    state.store.on_the_way.set()
    assert await staying == Key("alice")


async def test_keys_are_listed_by_name_in_pages(state: State) -> None:
    one = state.process(bob="b", zoe="z")
    for name in ("alice", "carol", "dave"):
        await one.desk.create(name, {})
    await one.desk.revoke("bob")
    found, after, has_more = [], "", True
    while has_more:
        page, has_more = await one.desk.page(after, 2)
        found += [(shown.key.name, shown.in_file, shown.revoked_at is not None) for shown in page]
        after = page[-1].key.name
    assert found == [
        ("alice", False, False),
        ("bob", True, True),
        ("carol", False, False),
        ("dave", False, False),
        ("zoe", True, False),
    ]
    assert await one.desk.page("zoe", 2) == ([], False)


# --- sessions -----------------------------------------------------------------------------------


async def test_a_session_has_its_keys_rights_but_admin_and_ends_by_itself(state: State) -> None:
    one, other = state.process(), state.process()
    settings = {"admin": True, "tier": "premium", "limits": {"usd_per_day": 1}}
    _, secret = await one.desk.create("alice", settings)
    parent = await one.who(secret)
    record, session = await one.desk.mint(parent, 60, 0.25)
    key = await other.who(session)
    assert (key.name, key.session, key.session_usd) == ("alice", record.name, 250_000_000)
    assert (key.admin, key.tier, key.limits) == (False, "premium", parent.limits)
    with pytest.raises(Forbidden):
        await other.desk.mint(key, 60, None)
    state.clock.now += 59.9
    assert not await other.is_refused(session)
    state.clock.now += 0.2
    assert await other.is_refused(session)
    assert await one.is_refused(session)


@pytest.mark.parametrize("is_in_file", [False, True])
async def test_a_session_ends_with_its_key(state: State, is_in_file: bool) -> None:
    file = {"alice": "a"} if is_in_file else {}
    one, other = state.process(**file), state.process(**file)
    secret = "a" if is_in_file else (await one.desk.create("alice", {}))[1]
    await other.book.refresh()
    _, known = await one.desk.mint(await one.who(secret), 600, None)
    _, unseen = await one.desk.mint(await one.who(secret), 600, None)
    await other.who(known)
    await one.desk.revoke("alice")
    await other.book.refresh()
    state.clock.now += 1
    for process in (one, other):
        for session in (known, unseen):
            with pytest.raises(Unauthenticated, match="the key of this session"):
                await process.who(session)
    if is_in_file:
        # Another secret under the name is another key, with sessions of its own.
        later = state.process(alice="new")
        assert await later.is_refused(known)
        _, own = await later.desk.mint(await later.who("new"), 600, None)
        assert (await later.who(own)).name == "alice"


async def test_a_session_follows_the_files_rights(state: State) -> None:
    one = state.process(alice="a")
    _, session = await one.desk.mint(await one.who("a"), 600, None)
    await one.who(session)
    one.book.configure({_digest("a"): Key("alice", tier="premium")})
    assert (await one.who(session)).tier == "premium"
    one.book.configure({})
    assert await one.is_refused(session)


async def test_a_session_is_ended_by_itself_its_key_or_an_admin(state: State) -> None:
    one, other = state.process(alice="a", bob="b"), state.process(alice="a", bob="b")
    alice, bob = await one.who("a"), await one.who("b")
    made = [await one.desk.mint(alice, 600, None) for _ in range(4)]
    ids = [record.name for record, _ in made]
    first, second = await other.who(made[0][1]), await other.who(made[1][1])
    for caller, id in ((bob, ids[0]), (second, ids[0]), (alice, "alice"), (alice, "none")):
        with pytest.raises(UnknownKey):
            await one.desk.end_session(caller, id)
    await one.desk.end_session(first, ids[0])
    await one.desk.end_session(alice, ids[1])
    await one.desk.end_session(Key("root", admin=True), ids[2])
    await other.book.refresh()
    for process in (one, other):
        refused = [await process.is_refused(secret) for _, secret in made]
        assert refused == [True, True, True, False]
    listed, has_more = await one.desk.sessions("alice", "", 3)
    assert ([record.name for record in listed], has_more) == (sorted(ids)[:3], True)
    listed, has_more = await one.desk.sessions("alice", sorted(ids)[2], 3)
    assert ([record.name for record in listed], has_more) == (sorted(ids)[3:], False)
    assert await one.desk.sessions("bob", "", 3) == ([], False)
    with pytest.raises(UnknownKey):
        await one.desk.show(ids[3])


async def test_a_key_makes_sessions_at_a_bounded_pace(
    state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.flow.issuing._SESSIONS_AT_ONCE", 3)
    one = state.process(alice="a", bob="b")
    alice, bob = await one.who("a"), await one.who("b")
    for _ in range(3):
        await one.desk.mint(alice, 60, None)
    with pytest.raises(RateLimited) as caught:
        await one.desk.mint(alice, 60, None)
    assert caught.value.retry_after_s == 1.0
    await one.desk.mint(bob, 60, None)
    state.clock.now += 1.0
    await one.desk.mint(alice, 60, None)
    with pytest.raises(RateLimited):
        await one.desk.mint(alice, 60, None)


async def test_ended_sessions_leave_the_store(state: State) -> None:
    one = state.process(alice="a")
    await one.desk.mint(await one.who("a"), 60, None)
    state.clock.now += 2 * 86_400
    watching = asyncio.ensure_future(one.book.watch_forever())
    async with asyncio.timeout(5):
        while (await one.desk.sessions("alice", "", 1))[0]:
            await asyncio.sleep(0)
    watching.cancel()


# --- the store is slow, gone, or another --------------------------------------------------------


async def test_with_the_store_gone_the_known_go_on_and_the_unknown_are_told_whose_fault_it_is(
    state: State,
) -> None:
    one = state.process(alice="a")
    _, secret = await one.desk.create("bob", {})
    _, rotated = await one.desk.rotate("bob", 60)
    _, unseen = await one.desk.create("carol", {})
    await one.book.refresh()
    await one.who(secret)
    assert await one.is_refused("wrong")
    await state.store.aclose()
    assert not await one.book.refresh()
    assert one.book.known(_digest("a")) == Key("alice")
    assert one.book.known(_digest(secret)) == Key("bob")
    for stranger in (unseen, "wrong", "other", rotated):
        with pytest.raises(StateUnavailable) as caught:
            await one.who(stranger)
        assert caught.value.status == 503
    # A key that is new in the file may have been revoked, and nobody can tell.
    one.book.configure({_digest("a"): Key("alice"), _digest("n"): Key("new")})
    assert await one.who("a") == Key("alice")
    with pytest.raises(StateUnavailable):
        await one.who("n")
    for work in (one.desk.create("x", {}), one.desk.revoke("bob"), one.desk.page("", 1)):
        with pytest.raises(StateUnavailable):
            await work


async def test_a_rotated_key_in_use_is_known_by_both_secrets_when_the_store_goes(
    state: State,
) -> None:
    one, other = state.process(), state.process()
    _, first = await one.desk.create("alice", {})
    await other.book.refresh()
    await other.who(first)
    _, second = await one.desk.rotate("alice", 60)
    await other.book.refresh()
    await state.store.aclose()
    assert await other.who(first) == await other.who(second) == Key("alice")


async def test_a_store_that_is_held_up_is_waited_for_a_moment_only(state: State) -> None:
    one = state.process(alice="a")
    await one.book.refresh()
    async with state.held_up(), asyncio.timeout(5):
        found = await asyncio.gather(
            *(one.who(f"unknown {i}") for i in range(100)), return_exceptions=True
        )
        assert all(isinstance(error, StateUnavailable) for error in found)
        assert one.book.known(_digest("a")) == Key("alice")
    # What was asked is answered, and known from then on; nobody asked in vain for the rest.
    await asyncio.gather(*one.book._asking.values())
    assert not one.book._asking
    assert state.store.asked <= keys_module._ASKS_AT_ONCE + 1
    state.store.asked = 0
    for i in range(keys_module._ASKS_AT_ONCE):
        assert await one.is_refused(f"unknown {i}")
    assert state.store.asked == 0


async def test_who_left_the_line_is_not_asked_for(state: State) -> None:
    one = state.process()
    places = keys_module._ASKS_AT_ONCE
    async with state.held_up():
        before = [asyncio.ensure_future(one.is_refused(f"before {i}")) for i in range(places)]
        leaving = asyncio.ensure_future(one.who("leaving"))
        staying = asyncio.ensure_future(one.is_refused("staying"))
        while len(one.book._asking) < places + 2:
            await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
    assert all(await asyncio.gather(*before))
    assert await staying
    await asyncio.gather(*one.book._asking.values())
    assert state.store.asked == places + 1
    assert not one.book._asking
    assert not one.book._hoping


async def test_settings_of_another_version_are_the_stores_fault(state: State) -> None:
    one = state.process()
    _, secret = await one.desk.create("known", {})
    await one.book.refresh()
    await one.who(secret)
    for name, digest in (("strange", _digest("s")), ("known", _digest(secret))):
        record = KeyRecord(name, {"colour": "blue"}, {digest.hex(): None}, 0.0)
        await state.store.put_key(record, is_new=False)
    assert await one.book.refresh()
    for stranger in ("s", secret):
        with pytest.raises(StateUnavailable, match="another version"):
            await one.who(stranger)


async def test_the_first_look_may_come_late(state: State) -> None:
    one, other = state.process(), state.process()
    _, secret = await one.desk.create("alice", {})
    await other.who(secret)
    await one.desk.revoke("alice")
    await other.book.refresh()
    assert await other.is_refused(secret)


async def test_other_books_than_before_are_believed_in_nothing(state: State) -> None:
    one = state.process(alice="a")
    _, secret = await one.desk.create("bob", {})
    await one.book.refresh()
    await one.who(secret)
    one.book._store = empty = await SqliteStore.open(None)
    await one.book.refresh()
    assert await one.is_refused(secret)
    assert await one.who("a") == Key("alice")
    await empty.aclose()
