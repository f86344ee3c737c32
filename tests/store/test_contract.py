"""Every engine, every scenario: the shared contract suite."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from dataclasses import replace

import pytest

from router.core.accounts import Account, Meter
from router.core.leases import Ask
from router.errors import StateUnavailable
from router.store.base import KeptAnswer, KeyRecord, RowKey, Store, Totals, UsageLine
from tests.store.contract import (
    DAY,
    MINUTE,
    NOW,
    PLACES,
    REQUESTS,
    ROW,
    SESSION_ROW,
    SHARE,
    SILENCE_S,
    TOKENS,
    USD,
    USD_MONTH,
    Rig,
    ask,
    left,
    say,
)

# --- leases -------------------------------------------------------------------------------------


async def test_a_block_is_a_share_of_what_is_left(rig: Rig) -> None:
    store, other = await rig.open(), await rig.open()
    [one] = await say(store, "p1", ask(USD, 1))
    [two] = await say(other, "p2", ask(USD, 1))
    assert (one.granted, one.free) == (250, 750)
    assert (two.granted, two.free) == (750 // 8, 750 - 750 // 8)


async def test_a_hold_that_waits_gets_what_it_needs_and_no_more_than_there_is(rig: Rig) -> None:
    store = await rig.open()
    assert (await say(store, "p1", ask(USD, 1, need=600)))[0].granted == 600
    assert (await say(store, "p2", ask(USD, 1, need=600)))[0].granted == 400
    assert (await say(store, "p3", ask(USD, 1, need=1)))[0].granted == 0


async def test_a_message_that_comes_again_or_late_changes_nothing(rig: Rig) -> None:
    store = await rig.open()
    asks = [
        ask(USD, 1, need=300),
        ask(USD, 2, spent=100, held=50),
        ask(USD, 3, spent=200, keep=False),
        ask(USD, 4, spent=200, need=40),
    ]
    answers = [await say(store, "p1", message) for message in asks]
    rows = {ROW: Totals(settled=200)}
    await say(store, "p1", rows=rows)
    for message in (*asks, *reversed(asks), asks[2], asks[2]):
        [again] = await say(store, "p1", message, rows=rows)
        assert again[2:] == answers[-1][0][2:]
    assert await left(store, USD) == (200, 1_000 - answers[-1][0].granted)


async def test_late_rows_change_nothing(rig: Rig) -> None:
    store = await rig.open()
    for settled in (10, 30, 20, 30):
        await say(store, "p1", rows={ROW: Totals(requests=settled, settled=settled)})
    # Columns grow each by itself.
    await say(store, "p1", rows={ROW: Totals(requests=1, input_tokens=7, settled=29)})
    assert await store.usage([], key=None, since=DAY, until=DAY + 1) == [
        UsageLine((), Totals(requests=30, input_tokens=7, settled=30))
    ]
    assert await left(store, USD) == (30, 970)


async def test_what_is_given_back_is_free_for_others(rig: Rig) -> None:
    store = await rig.open()
    await say(store, "p1", ask(USD, 1, need=1_000))
    await say(store, "p1", ask(USD, 2, spent=300, held=100, keep=False))
    assert await left(store, USD) == (300, 600)


async def test_a_charge_beyond_its_hold_counts_against_the_rest(rig: Rig) -> None:
    store = await rig.open()
    await say(store, "p1", ask(USD, 1, need=900))
    await say(store, "p1", ask(USD, 2, spent=1_200, keep=False), rows={ROW: Totals(settled=1_200)})
    assert await left(store, USD) == (1_200, 0)
    assert (await say(store, "p2", ask(USD, 1, need=1)))[0].granted == 0


async def test_a_smaller_limit_takes_nothing_and_gives_nothing(rig: Rig) -> None:
    store = await rig.open()
    await say(store, "p1", ask(USD, 1, need=800))
    [grant] = await say(store, "p1", ask(USD, 2, held=500, limit=600))
    assert (grant.granted, grant.free) == (800, 0)
    [grant] = await say(store, "p1", ask(USD, 3, held=500, limit=600, keep=False))
    assert (grant.granted, grant.free) == (500, 100)


async def test_grants_come_in_the_order_of_the_asks(rig: Rig) -> None:
    store = await rig.open()
    accounts = [USD, PLACES, TOKENS, USD_MONTH, REQUESTS, SHARE]
    grants = await say(store, "p1", *(ask(account, 1) for account in accounts))
    assert [grant.account for grant in grants] == accounts
    assert all(grant.granted == 250 and grant.number == 1 for grant in grants)


async def test_how_many_live_and_the_lease_are_told(rig: Rig) -> None:
    store, other = await rig.open(), await rig.open()
    first = await store.sync("p1", [], {})
    second = await other.sync("p2", [], {})
    assert (first.live, second.live, first.lease_s, first.version) == (1, 2, 30.0, 0)
    assert not second.is_behind
    rig.clock.now += SILENCE_S
    assert (await store.sync("p1", [], {})).live == 1


async def test_amounts_up_to_nine_million_dollars_are_exact(rig: Rig) -> None:
    store = await rig.open()
    limit = 9_007_199_254_740_991
    [grant] = await say(store, "p1", ask(USD, 1, limit=limit, need=limit - 2))
    assert (grant.granted, grant.free) == (limit - 2, 2)
    await say(store, "p1", rows={ROW: Totals(settled=limit - 2)})
    await store.end("p1", {ROW: Totals(settled=limit - 1)})
    assert await left(store, USD, limit=limit) == (limit - 1, 1)
    # Beyond it they are cut, not refused and not turned round.
    [grant] = await say(store, "p2", ask(USD_MONTH, 1, limit=10**30, need=10**30))
    assert grant.granted == 1


async def test_many_processes_at_once_never_get_more_than_the_limit(rig: Rig) -> None:
    stores = [await rig.open() for _ in range(4)]

    async def spend(store: Store, process: str) -> int:
        granted = 0
        for number in range(1, 20):
            [grant] = await say(store, process, ask(USD, number, held=granted, need=7))
            granted = grant.granted
        return granted

    grants = await asyncio.gather(
        *(spend(store, f"p{place}") for place, store in enumerate(stores))
    )
    assert 500 < sum(grants) <= 1_000


# --- what rows count in -------------------------------------------------------------------------


async def test_a_limit_that_is_new_knows_what_was_spent_before(rig: Rig) -> None:
    store = await rig.open()
    await store.sync("p1", [], {ROW: Totals(1, 30, 40, settled=100)})
    await store.sync("p2", [], {ROW: Totals(1, 3, 4, settled=11)})
    await store.end("p2", {SESSION_ROW: Totals(1, 1, 1, settled=5)})
    assert await left(store, USD) == (116, 884)
    assert await left(store, USD_MONTH) == (116, 884)
    assert await left(store, TOKENS) == (79, 921)
    assert await left(store, SHARE) == (5, 995)
    yesterday = replace_window(USD, DAY - 86_400)
    assert await left(store, yesterday) == (0, 1_000)


def replace_window(account: Account, window: int) -> Account:
    return account._replace(window=window)


async def test_a_row_and_a_lease_of_one_process_are_the_same_money(rig: Rig) -> None:
    store = await rig.open()
    await say(store, "p1", ask(USD, 1, need=200))
    await say(store, "p1", ask(USD, 2, spent=150), rows={ROW: Totals(settled=150)})
    assert (await left(store, USD))[0] == 150
    # A row that comes before its ask counts already.
    await say(store, "p1", rows={ROW: Totals(settled=190)})
    assert (await left(store, USD))[0] == 190
    [grant] = await say(store, "p1", ask(USD, 3, spent=190))
    assert grant.settled == 190


async def test_a_month_counts_its_days_and_no_others(rig: Rig) -> None:
    store = await rig.open()
    days = [DAY - 86_400 * back for back in (0, 1, 2, 3)]
    for place, day in enumerate(days):
        await store.sync("p1", [], {ROW._replace(day=day): Totals(settled=10**place)})
    await store.end("p1", {})
    # The second of October: two days of it, two of September.
    assert (await left(store, USD_MONTH, limit=10_000))[0] == 11


# --- ends ---------------------------------------------------------------------------------------


async def test_an_end_frees_what_was_not_spent(rig: Rig) -> None:
    store = await rig.open()
    for account in (USD, USD_MONTH, TOKENS, SHARE, PLACES):
        await say(store, "p1", ask(account, 1, need=900))
    rows = {SESSION_ROW: Totals(2, 20, 30, settled=70, overrun=3, estimated=4)}
    await store.end("p1", rows)
    assert await left(store, USD) == (70, 930)
    assert await left(store, USD_MONTH) == (70, 930)
    assert await left(store, TOKENS) == (50, 950)
    assert await left(store, SHARE) == (70, 930)
    assert await left(store, PLACES) == (0, 1_000)
    assert await store.usage(["key"], key=None, since=DAY, until=DAY + 1) == [
        UsageLine(("alice",), rows[SESSION_ROW])
    ]


async def test_an_end_that_is_said_again_changes_nothing(rig: Rig) -> None:
    store = await rig.open()
    rows = {ROW: Totals(requests=1, settled=70, in_doubt=7)}
    await say(store, "p1", ask(USD, 1, need=100), rows={ROW: Totals(settled=50)})
    for _ in range(3):
        await store.end("p1", rows)
    await store.end("p1", {ROW: Totals(requests=9, settled=999)})
    assert await left(store, USD) == (77, 923)
    with pytest.raises(StateUnavailable, match="p1 was ended"):
        await say(store, "p1", ask(USD, 2, need=100))
    assert await left(store, USD) == (77, 923)


async def test_the_end_of_a_process_that_nobody_heard_of_is_counted_once(rig: Rig) -> None:
    store = await rig.open()
    for _ in range(2):
        await store.end("p1", {ROW: Totals(requests=1, settled=70)})
    assert await left(store, USD) == (70, 930)


async def test_an_end_that_is_broken_off_goes_on_where_it_was(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.store.terms.END_BATCH", 7)
    monkeypatch.setattr("router.store.terms.SCRIPT_BATCH", 7)
    store = await rig.open()
    owners = [f"k{number}" for number in range(100)]
    asks = [
        ask(USD._replace(owner=owner), number, need=500) for number, owner in enumerate(owners, 1)
    ]
    rows = {ROW._replace(key=owner): Totals(settled=5, in_doubt=1) for owner in owners}
    grants = (await store.sync("p1", asks, rows)).grants
    assert [grant.granted for grant in grants] == [506] * 100
    is_ended = False
    tries = 0
    while not is_ended:
        tries += 1
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.002 * tries):
                await store.end("p1", rows)
                is_ended = True
    await store.end("p1", rows)
    for owner in owners:
        assert await left(store, USD._replace(owner=owner)) == (6, 994)
    assert await store.usage([], key=None, since=DAY, until=DAY + 1) == [
        UsageLine((), Totals(settled=500, in_doubt=100))
    ]


async def test_a_minutes_grant_counts_as_spent_when_its_process_ends(rig: Rig) -> None:
    store = await rig.open()
    await say(store, "p1", ask(REQUESTS, 1, need=100))
    await say(store, "p2", ask(REQUESTS, 1, need=10))
    await say(store, "p2", ask(REQUESTS, 2, spent=4, keep=False))
    await store.end("p1", {})
    await store.end("p2", {})
    assert await left(store, REQUESTS) == (250 + 4, 1_000 - 254)
    assert await left(store, REQUESTS._replace(window=MINUTE + 60)) == (0, 1_000)


async def test_doubts_count_until_they_are_resolved(rig: Rig) -> None:
    store = await rig.open()
    bob = ROW._replace(key="bob")
    await store.end("p1", {ROW: Totals(settled=10, in_doubt=40), bob: Totals(in_doubt=5)})
    assert await left(store, USD) == (50, 950)
    assert await store.resolve("alice", charge=False) == 40
    assert await left(store, USD) == (10, 990)
    assert await left(store, USD_MONTH) == (10, 990)
    assert await store.resolve(None, charge=True) == 5
    assert await store.resolve(None, charge=True) == 0
    assert await left(store, USD._replace(owner="bob")) == (5, 995)
    assert await store.usage(["key"], key=None, since=DAY, until=DAY + 1) == [
        UsageLine(("alice",), Totals(settled=10)),
        UsageLine(("bob",), Totals(settled=5, estimated=5)),
    ]


async def test_a_sessions_doubts_go_back_to_its_share(rig: Rig) -> None:
    store = await rig.open()
    await store.end("p1", {SESSION_ROW: Totals(settled=10, in_doubt=40)})
    await store.end("p2", {SESSION_ROW: Totals(settled=1, in_doubt=4)})
    assert await left(store, SHARE) == (55, 945)
    assert await store.resolve("alice", charge=False) == 44
    assert await left(store, SHARE) == (11, 989)
    assert await left(store, USD) == (11, 989)


# --- processes that are not heard of ------------------------------------------------------------


async def test_money_of_a_silent_process_is_neither_spent_nor_free(rig: Rig) -> None:
    store = await rig.open()
    await store.put_key(KeyRecord("session-1", {}, {}, NOW, parent="alice"), is_new=True)
    for account in (USD, USD_MONTH, SHARE, TOKENS):
        await say(store, "p1", ask(account, 1, spent=100, need=300))
    assert await store.silent() == {}
    rig.clock.now += SILENCE_S
    assert await left(store, USD) == (100, 600)
    # One hold stands in several accounts and is told once.
    assert await store.silent() == {"alice": 300}


async def test_places_of_a_silent_process_are_free_again(rig: Rig) -> None:
    store = await rig.open()
    await say(store, "p1", ask(PLACES, 1, limit=8, held=3, need=5))
    assert (await left(store, PLACES, limit=8))[1] == 0
    rig.clock.now += SILENCE_S
    [grant] = await say(store, "p2", ask(PLACES, 1, limit=8, need=6))
    assert grant.granted == 6
    # One that comes back has the places of its own calls, and no more than are left.
    [grant] = await say(store, "p1", ask(PLACES, 2, limit=8, held=1, need=4))
    assert grant.granted == 2


async def test_resolving_frees_what_silent_processes_hold(rig: Rig) -> None:
    store = await rig.open()
    bob = USD._replace(owner="bob")
    for account in (USD, bob):
        await say(store, "p1", ask(account, 1, spent=100, need=300))
    rig.clock.now += SILENCE_S
    assert await store.resolve("alice", charge=True) == 0
    assert await left(store, USD) == (100, 900)
    assert await left(store, bob) == (100, 600)
    assert await store.silent() == {"bob": 300}
    await store.resolve(None, charge=False)
    assert await left(store, bob) == (100, 900)
    # What it spent after all is counted: when it comes back, and when it ends.
    await say(store, "p1", ask(USD, 2, spent=150, keep=False))
    assert await left(store, USD) == (150, 850)
    await store.end("p1", {ROW: Totals(settled=160), ROW._replace(key="bob"): Totals(settled=210)})
    assert await left(store, USD) == (160, 840)
    assert await left(store, bob) == (210, 790)


async def test_a_clock_that_went_back_silences_nobody_who_speaks(rig: Rig) -> None:
    store = await rig.open()
    await say(store, "p1", ask(USD, 1, need=500))
    rig.clock.now -= 3_600
    [grant] = await say(store, "p1", ask(USD, 2, held=500, need=10))
    assert grant.granted >= 510
    assert (await store.sync("p1", [], {})).live == 1


# --- usage --------------------------------------------------------------------------------------


async def test_usage_adds_up_by_what_is_asked(rig: Rig) -> None:
    store = await rig.open()
    one = Totals(1, 2, 3, 4, 5, 6)
    for process, key, ladder, rung, day in itertools.product(
        ("p1", "p2"), ("alice", "bob"), ("a", "b"), ("x", "y"), (DAY - 86_400, DAY)
    ):
        await store.sync(process, [], {RowKey(day, key, "", ladder, rung): one})
    await store.end("p1", {})

    def times(number: int) -> Totals:
        return Totals(*(number * amount for amount in one))

    everything = {"key": None, "since": DAY - 86_400, "until": DAY + 1}
    assert await store.usage([], **everything) == [UsageLine((), times(32))]  # type: ignore[arg-type]
    assert await store.usage(["key"], **everything) == [  # type: ignore[arg-type]
        UsageLine(("alice",), times(16)),
        UsageLine(("bob",), times(16)),
    ]
    assert await store.usage(["day", "key"], key="bob", since=DAY - 86_400, until=DAY + 1) == [
        UsageLine(("2096-10-01", "bob"), times(8)),
        UsageLine(("2096-10-02", "bob"), times(8)),
    ]
    assert await store.usage(["rung", "ladder"], key="bob", since=DAY, until=DAY + 86_400) == [
        UsageLine((rung, ladder), times(2)) for rung in "xy" for ladder in "ab"
    ]
    assert await store.usage(["key"], key="carol", since=0, until=2**40) == []
    assert await store.usage([], key=None, since=DAY + 86_400, until=2**40) == []
    with pytest.raises(ValueError, match="grouped by"):
        await store.usage(["session"], key=None, since=0, until=2**40)


async def test_names_of_any_kind_are_kept_apart(rig: Rig) -> None:
    store = await rig.open()
    names = ["a", "a:b", ":a", "a\nb", "é😀", "a b/c", '"', "''; --", "{x}", "%s"]
    for number, name in enumerate(names, 1):
        row = RowKey(DAY, name, f"s{name}", name, name)
        await say(store, name, ask(USD._replace(owner=name), 1), rows={row: Totals(settled=number)})
        for key in (name, "b", "*", "a*"):
            lines = await store.usage([], key=key, since=DAY, until=DAY + 1)
            assert [line.totals.settled for line in lines] == ([number] if key == name else [])
        await store.end(name, {row: Totals(settled=number, in_doubt=1)})
    lines = await store.usage(["key", "ladder", "rung"], key=None, since=DAY, until=DAY + 1)
    assert {line.group: line.totals.settled for line in lines} == {
        (name, name, name): number for number, name in enumerate(names, 1)
    }
    for number, name in enumerate(names, 1):
        assert (await left(store, USD._replace(owner=name)))[0] == number + 1
        assert (await left(store, SHARE._replace(owner=f"s{name}")))[0] == number + 1
        assert await store.resolve(name, charge=False) == 1
        assert (await left(store, USD._replace(owner=name)))[0] == number


# --- both engines against each other --------------------------------------------------------------


async def test_a_long_random_story_ends_as_its_own_sums_say(rig: Rig) -> None:
    """Every message twice, some late, by turns; in the end all that was spent is there."""
    chance = random.Random(4)
    stores = [await rig.open() for _ in range(2)]
    limit, spent_by_all = 10_000, 0
    for generation in range(4):
        running = {f"p{generation}-{place}": (0, 0) for place in range(3)}
        said: list[tuple[str, Ask, dict[RowKey, Totals]]] = []
        for number in range(1, 25):
            process = chance.choice(sorted(running))
            granted, spent = running[process]
            spent = min(granted, spent + chance.randrange(200))
            message = ask(USD, number, limit=limit, spent=spent, need=chance.randrange(300))
            rows = {ROW: Totals(requests=number, settled=spent)}
            said.append((process, message, rows))
            for name, late, its_rows in (said[-1], said[-1], chance.choice(said)):
                [grant] = await say(chance.choice(stores), name, late, rows=its_rows)
                if late is message:
                    running[process] = (grant.granted, spent)
            assert sum(granted for granted, _ in running.values()) + spent_by_all <= limit
        for process, (_, spent) in running.items():
            for store in stores:
                await store.end(process, {ROW: Totals(settled=spent)})
            spent_by_all += spent
    assert await left(stores[0], USD, limit=limit) == (spent_by_all, limit - spent_by_all)
    assert spent_by_all > 0.5 * limit


# --- keys ---------------------------------------------------------------------------------------

ALICE = KeyRecord(
    name="alice",
    settings={"ladders": ["*"], "limits": {"usd_per_day": 5.0}, "admin": False},
    digests={"aa": None, "bb": NOW + 60.0},
    created_at=NOW,
)


async def test_a_key_is_found_by_each_of_its_digests_and_by_name(rig: Rig) -> None:
    store, other = await rig.open(), await rig.open()
    assert await store.put_key(ALICE, is_new=True)
    assert await other.find_key("aa") == ALICE
    assert await other.find_key("bb") == ALICE
    assert await other.get_key("alice") == ALICE
    assert await store.find_key("cc") is None
    assert await store.get_key("bob") is None


async def test_a_taken_name_stays_and_a_repeat_is_no_fault(rig: Rig) -> None:
    store = await rig.open()
    assert await store.put_key(ALICE, is_new=True)
    assert await store.put_key(ALICE, is_new=True)
    assert not await store.put_key(replace(ALICE, created_at=1.0), is_new=True)
    assert await store.get_key("alice") == ALICE


async def test_a_rotation_takes_the_old_digests_away(rig: Rig) -> None:
    store = await rig.open()
    await store.put_key(ALICE, is_new=True)
    newer = replace(ALICE, digests={"bb": NOW + 60.0, "dd": None}, revoked_at=float(NOW))
    assert await store.put_key(newer, is_new=False)
    assert await store.find_key("aa") is None
    assert await store.find_key("bb") == await store.find_key("dd") == newer
    # Revoked is for good, whoever writes last.
    assert not await store.put_key(replace(newer, revoked_at=None), is_new=False)
    assert await store.get_key("alice") == newer


async def test_keys_and_sessions_are_listed_in_order_page_by_page(rig: Rig) -> None:
    store = await rig.open()
    names = ["a", "B", "é", "b", "😀", "a2"]
    for name in names:
        await store.put_key(KeyRecord(name, {}, {}, NOW), is_new=True)
        await store.put_key(KeyRecord(f"s-{name}", {}, {}, NOW, parent=name), is_new=True)
    for sessions in (False, True):
        seen: list[str] = []
        while page := await store.list_keys(
            after=seen[-1] if seen else "", limit=2, sessions=sessions
        ):
            assert len(page) <= 2
            seen += [record.name for record in page]
        prefix = "s-" if sessions else ""
        assert seen == sorted((prefix + name for name in names), key=str.encode)


async def test_changes_are_told_once_and_in_order(rig: Rig) -> None:
    store, other = await rig.open(), await rig.open()
    assert await store.changed_keys(0) == (0, [])
    for name in "abc":
        await store.put_key(KeyRecord(name, {}, {}, NOW), is_new=True)
    await store.put_key(KeyRecord("a", {}, {}, NOW, revoked_at=1.0), is_new=False)
    version, records = await other.changed_keys(0)
    assert [record.name for record in records] == ["b", "c", "a"]
    assert (await other.sync("p1", [], {})).version == version
    assert await other.changed_keys(version) == (version, [])
    newer, records = await other.changed_keys(version - 1)
    assert (newer, [record.name for record in records]) == (version, ["a"])


async def test_sessions_that_ended_are_forgotten_with_their_budgets(rig: Rig) -> None:
    store = await rig.open()
    day = 86_400
    ended = KeyRecord("session-1", {}, {"s1": None}, NOW, NOW + 10.0, parent="alice")
    later = KeyRecord("session-2", {}, {"s2": None}, NOW, NOW + 10.0 + day, parent="alice")
    revoked = replace(later, name="session-3", digests={"s3": None}, revoked_at=float(NOW))
    forever = replace(later, name="session-4", digests={"s4": None}, expires_at=None)
    expired = replace(ended, name="plain", digests={"s5": None}, parent="")
    for record in (ended, later, revoked, forever, expired):
        await store.put_key(record, is_new=True)
    await say(store, "p1", ask(SHARE, 1, spent=7), rows={SESSION_ROW: Totals(settled=7)})
    assert await store.forget_expired(NOW + day + 1) == 1
    assert await store.find_key("s3") is None
    assert await store.forget_expired(NOW + day + 11) == 1
    assert await store.find_key("s1") is None
    assert await store.get_key("session-1") is None
    assert await left(store, SHARE) == (0, 1_000)
    assert await store.find_key("s2") == later
    assert await store.find_key("s4") == forever
    assert await store.find_key("s5") == expired
    assert await store.forget_expired(NOW + day + 11) == 0
    assert [record.name for record in await store.list_keys(after="", limit=9, sessions=True)] == [
        "session-2",
        "session-4",
    ]


# --- answers ------------------------------------------------------------------------------------

CLAIM = KeptAnswer("print", "p1")
ANSWER = KeptAnswer("print", "p1", b'{"a":"\xc3\xa9\x00"}', 201, {"x-a": "é", "b": ""})
OTHER = KeptAnswer("print", "p2")


async def test_one_process_claims_and_the_others_see_it_and_then_the_answer(rig: Rig) -> None:
    store, other = await rig.open(), await rig.open()
    assert await store.get_answer("alice", "n") is None
    assert await store.claim_answer("alice", "n", CLAIM, ttl_s=60) is None
    assert await store.claim_answer("alice", "n", CLAIM, ttl_s=60) is None
    seen = await other.claim_answer("alice", "n", OTHER, ttl_s=60)
    assert seen is not None
    assert (seen.fingerprint, seen.process, seen.body) == ("print", "p1", None)
    assert await other.claim_answer("bob", "n", OTHER, ttl_s=60) is None
    for _ in range(2):
        await store.keep_answer("alice", "n", ANSWER, ttl_s=60)
    assert await other.claim_answer("alice", "n", OTHER, ttl_s=60) == ANSWER
    assert await store.claim_answer("alice", "n", CLAIM, ttl_s=60) == ANSWER
    assert await other.get_answer("alice", "n") == ANSWER
    rig.clock.now += 61
    assert await other.get_answer("alice", "n") is None
    assert await other.claim_answer("alice", "n", OTHER, ttl_s=60) is None


async def test_another_body_under_the_same_name_is_told(rig: Rig) -> None:
    store = await rig.open()
    await store.claim_answer("alice", "n", CLAIM, ttl_s=60)
    seen = await store.claim_answer("alice", "n", CLAIM._replace(fingerprint="x"), ttl_s=60)
    assert seen is not None
    assert seen.fingerprint == "print"


async def test_a_claim_that_is_given_up_or_whose_process_is_gone_is_free(rig: Rig) -> None:
    store = await rig.open()
    for process in ("p1", "p2"):
        await store.sync(process, [], {})
    for name in ("dropped", "ended", "silent"):
        await store.claim_answer("alice", name, CLAIM, ttl_s=600)
    await store.drop_answer("alice", "dropped", "p2")
    assert await store.claim_answer("alice", "dropped", OTHER, ttl_s=60) is not None
    await store.drop_answer("alice", "dropped", "p1")
    assert await store.claim_answer("alice", "dropped", OTHER, ttl_s=60) is None
    rig.clock.now += SILENCE_S - 10
    await store.sync("p1", [], {})
    rig.clock.now += SILENCE_S - 10
    assert await store.claim_answer("alice", "silent", OTHER, ttl_s=60) is not None
    rig.clock.now += 20
    assert await store.claim_answer("alice", "silent", OTHER, ttl_s=60) is None
    # Its former owner comes too late.
    await store.keep_answer("alice", "silent", ANSWER, ttl_s=60)
    await store.drop_answer("alice", "silent", "p1")
    seen = await store.get_answer("alice", "silent")
    assert seen is not None
    assert (seen.process, seen.body) == ("p2", None)
    await store.sync("p1", [], {})
    await store.end("p1", {})
    assert await store.claim_answer("alice", "ended", OTHER, ttl_s=60) is None


async def test_answers_stay_within_their_bounds(rig: Rig) -> None:
    rig.bounds = rig.bounds._replace(
        answer_bytes_max=5_000, key_answers_bytes_max=10_000, answers_bytes_max=15_000
    )
    store = await rig.open()

    async def keep(key: str, name: str, size: int) -> None:
        await store.claim_answer(key, name, CLAIM, ttl_s=60)
        await store.keep_answer(key, name, CLAIM._replace(body=b"x" * size), ttl_s=60)

    async def kept(key: str, *names: str) -> str:
        found = [await store.get_answer(key, name) for name in names]
        return "".join("-" if answer is None else "+" for answer in found)

    await keep("alice", "large", 5_001)
    assert await kept("alice", "large") == "-"
    for name in "abcd":
        await keep("alice", name, 3_000)
    assert await kept("alice", *"abcd") == "-+++"
    for name in "abc":
        await keep("bob", name, 3_000)
    assert await kept("alice", *"abcd") + await kept("bob", *"abc") == "---+" + "+++"


async def test_how_many_answers_a_key_keeps_is_bounded(rig: Rig) -> None:
    rig.bounds = rig.bounds._replace(key_answers_max=3)
    store = await rig.open()
    for name in "abcde":
        await store.claim_answer("alice", name, CLAIM, ttl_s=60)
        await store.keep_answer("alice", name, ANSWER, ttl_s=60)
    found = [await store.get_answer("alice", name) is not None for name in "abcde"]
    assert found == [False, False, True, True, True]


# --- the cache ----------------------------------------------------------------------------------


async def test_entries_are_found_until_they_end_or_their_group_is_dropped(rig: Rig) -> None:
    store, other = await rig.open(), await rig.open()
    await store.put_entries([(b"\x00a", b"1"), (b"b\xff", b"\x00\xff")], group="m1", ttl_s=60)
    await store.put_entries([(b"c", b"3")], group="m2", ttl_s=600)
    await store.put_entries([], group="m2", ttl_s=600)
    asked = [b"c", b"nothing", b"\x00a", b"b\xff"]
    assert await other.get_entries(asked) == [b"3", None, b"1", b"\x00\xff"]
    assert await other.get_entries([]) == []
    await other.put_entries([(b"c", b"4")], group="m1", ttl_s=600)
    assert await store.drop_entries("m2") == 0
    rig.clock.now += 61
    assert await store.get_entries(asked) == [b"4", None, None, None]
    assert await store.drop_entries("m1") == 3
    assert await store.get_entries(asked) == [None] * 4
    assert await store.drop_entries("m1") == 0


async def test_the_keys_of_entries_are_read_in_parts_and_then_those_that_come(rig: Rig) -> None:
    store, other = await rig.open(), await rig.open()

    async def read(place: str, limit: int) -> tuple[list[bytes], str]:
        found: list[bytes] = []
        while True:
            part = await store.entry_keys(place, limit)
            assert len(part.keys) <= limit
            found += part.keys
            place = part.place
            if part.is_all:
                return found, place

    assert await read("", 3) == ([], (await read("", 3))[1])
    _, empty = await read("", 3)
    for name in (b"d", b"a", b"c", b"\x00b"):
        await other.put_entries([(name, b"1")], group="m", ttl_s=60)
    every = sorted((b"d", b"a", b"c", b"\x00b"))
    for limit in (1, 2, 3, 4, 5, 100):
        for start in ("", empty):
            assert sorted((await read(start, limit))[0]) == every, (limit, start)
    assert (await store.entry_keys("", 2)).entries == 4
    _, place = await read("", 2)
    assert (await read(place, 2))[0] == []
    await other.put_entries([(b"e", b"1"), (b"a", b"2")], group="m", ttl_s=60)
    await store.put_entries([(b"f", b"1")], group="m", ttl_s=60)
    found, place = await read(place, 2)
    assert sorted(found) == [b"a", b"e", b"f"]
    # What is written while the first ones are read is not missed.
    part = await store.entry_keys("", 2)
    await other.put_entries([(b"0", b"1"), (b"z", b"1")], group="m", ttl_s=60)
    found, _ = await read(part.place, 2)
    assert sorted({*part.keys, *found}) == sorted([*every, b"e", b"f", b"0", b"z"])
    await store.drop_entries("m")
    assert (await read(place, 2))[0] == []
    assert (await store.entry_keys("", 2)).entries == 0


async def test_at_a_place_of_other_books_the_keys_are_read_anew(rig: Rig) -> None:
    store = await rig.open()
    await store.put_entries([(b"first", b"1")], group="m", ttl_s=60)
    # These books had many more entries than there ever were here.
    for place in ("1000000:", "1000000:ff") if rig.kind != "valkey" else ("1000000",):
        found: list[bytes] = []
        here = place
        while True:
            part = await store.entry_keys(here, 2)
            found, here = found + part.keys, part.place
            if part.is_all:
                break
        assert found == [b"first"], place


async def test_an_entry_that_is_told_twice_at_once_is_its_last(rig: Rig) -> None:
    store = await rig.open()
    many = [(b"%d" % number, b"1") for number in range(150)]
    await store.put_entries([*many, (b"7", b"2")], group="m", ttl_s=60)
    assert await store.get_entries([b"7", b"149"]) == [b"2", b"1"]
    assert await store.drop_entries("m") == 150


async def test_the_oldest_entries_go_where_the_cache_is_full(rig: Rig) -> None:
    rig.bounds = rig.bounds._replace(cache_bytes_max=10_000)
    store = await rig.open()
    names = [b"%d" % number for number in range(20)]
    for name in names:
        await store.put_entries([(name, b"x" * 1_000)], group="m", ttl_s=60)
    await store.put_entries([(b"large", b"x" * 2_000)], group="m", ttl_s=60)
    found = await store.get_entries(names)
    assert [body is not None for body in found] == [False] * 12 + [True] * 8
    assert await store.get_entries([b"large"]) == [None]
    # Entries that are put again take no more room than they did.
    for _ in range(3):
        await store.put_entries([(name, b"y" * 1_000) for name in names[-8:]], group="m", ttl_s=60)
    assert await store.get_entries(names[-8:]) == [b"y" * 1_000] * 8
    assert await store.drop_entries("m") == 8


# --- the books ----------------------------------------------------------------------------------


async def test_books_have_an_id_that_stays(rig: Rig) -> None:
    store, other = await rig.open(), await rig.open()
    epoch = await store.epoch()
    assert epoch
    assert await other.epoch() == epoch
    assert await store.adopt_epoch() == epoch
    store.expect_epoch("of another time")
    with pytest.raises(StateUnavailable, match="expected of another time"):
        await store.sync("p1", [], {})
    with pytest.raises(StateUnavailable):
        await store.find_key("aa")
    assert await store.adopt_epoch() == epoch
    await store.sync("p1", [], {})


def test_the_test_clock_stands_in_one_window() -> None:
    assert USD.window == DAY
    assert Meter.USD_MONTH is USD_MONTH.meter
