"""What only a file can suffer: locks, modes, damage, a full disk, being deleted or replaced."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from router.core.accounts import Account, Meter
from router.errors import StateUnavailable
from router.store import terms
from router.store.base import KeptAnswer, KeyRecord, RowKey, StateLost, StateRefused, Totals
from router.store.open import open_store
from router.store.sqlite import SqliteStore
from router.store.sqlite_file import SqliteFile
from tests.store.contract import DAY, NOW, REQUESTS, ROW, USD, SqliteRig, ask, left, say

NOBODY = 65_534


@pytest.fixture
async def books(tmp_path: Path) -> AsyncIterator[SqliteRig]:
    rig = SqliteRig(tmp_path)
    yield rig
    await rig.aclose()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder of an ordinary user, whom modes and owners bind: root may do everything."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    is_root = os.getuid() == 0
    if is_root:
        os.chown(folder, NOBODY, -1)
        os.seteuid(NOBODY)
    yield folder
    if is_root:
        os.seteuid(0)
    folder.chmod(0o700)
    shutil.rmtree(folder)


async def refusal(path: Path) -> str:
    with pytest.raises(StateRefused) as error:
        await SqliteStore.open(path)
    assert str(path) in str(error.value)
    return str(error.value)


# --- opening ------------------------------------------------------------------------------------


async def test_the_file_and_its_folder_are_the_owners_alone(books: SqliteRig) -> None:
    store = await books.open()
    await store.sync("p1", [], {})
    assert books.path.parent.stat().st_mode & 0o777 == 0o700
    for file in books.path.parent.iterdir():
        assert file.stat().st_mode & 0o777 == 0o600


async def test_many_that_open_a_new_file_at_once_find_the_same_books(books: SqliteRig) -> None:
    stores = await asyncio.gather(*(books.open() for _ in range(8)))
    assert len({await store.epoch() for store in stores}) == 1


async def test_what_was_kept_is_there_after_the_store_was_closed(books: SqliteRig) -> None:
    store = await books.open()
    await say(store, "p1", ask(USD, 1, spent=70, keep=False), rows={ROW: Totals(settled=70)})
    await store.aclose()
    with pytest.raises(StateUnavailable, match="closed"):
        await store.sync("p1", [], {})
    assert await left(await books.open(), USD) == (70, 930)


async def test_a_folder_in_the_place_of_the_file_is_refused(tmp_path: Path) -> None:
    assert "it is a folder" in await refusal(tmp_path)


async def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"")
    assert "Not a directory" in await refusal(tmp_path / "state" / "state.db")


async def test_a_device_in_the_place_of_the_file_is_refused() -> None:
    assert "not a plain file" in await refusal(Path("/dev/null"))


async def test_a_folder_that_may_not_be_written_is_refused(open_folder: Path) -> None:
    open_folder.chmod(0o500)
    for path in (open_folder / "state.db", open_folder / "new" / "state.db"):
        assert "Permission denied; give the daemon a folder" in await refusal(path)


async def test_a_file_that_may_not_be_written_is_refused(open_folder: Path) -> None:
    path = open_folder / "state.db"
    await (await SqliteStore.open(path)).aclose()
    path.chmod(0o400)
    assert "Permission denied" in await refusal(path)
    path.chmod(0o600)
    open_folder.chmod(0o500)
    assert "it or its folder cannot be written" in await refusal(path)


async def test_a_file_of_a_newer_version_is_refused_and_left_as_it_is(books: SqliteRig) -> None:
    await (await books.open()).aclose()
    with sqlite3.connect(books.path) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    before = books.path.read_bytes()
    assert "written by a newer Rungway (its version is 99" in await refusal(books.path)
    assert books.path.read_bytes() == before


async def test_another_programs_database_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE theirs (x)")
    database.close()
    before = path.read_bytes()
    assert "the database of another program" in await refusal(path)
    assert path.read_bytes() == before


async def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    path.write_bytes(b"budgets: none\n" * 1_000)
    assert "it is damaged" in await refusal(path)


async def test_a_file_with_a_damaged_page_is_refused(books: SqliteRig) -> None:
    store = await books.open()
    await store.sync("p1", [], {ROW._replace(key=f"k{n}"): Totals(settled=n) for n in range(2_000)})
    await store.aclose()
    content = bytearray(books.path.read_bytes())
    for page in range(10, len(content) // 4096):
        content[page * 4096 : page * 4096 + 200] = b"\xa5" * 200
    books.path.write_bytes(content)
    assert "damaged" in await refusal(books.path)


async def test_a_lock_that_nobody_gives_back_is_named(
    books: SqliteRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.store.sqlite_file._OPEN_LOCK_S", 0.05)
    books.path.parent.mkdir()
    other = sqlite3.connect(books.path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    assert "another process holds its lock" in await refusal(books.path)
    other.close()


# --- in use -------------------------------------------------------------------------------------


async def test_with_the_file_locked_reading_goes_on_and_writing_says_why(
    books: SqliteRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.store.sqlite_file._LOCK_S", 0.05)
    store = await books.open()
    await store.put_key(KeyRecord("alice", {}, {"aa": None}, NOW), is_new=True)
    other = sqlite3.connect(books.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StateUnavailable, match="another process holds its lock") as error:
        await say(store, "p1", ask(USD, 1, need=500))
    assert str(books.path) in error.value.message
    assert await store.find_key("aa") is not None
    other.execute("ROLLBACK")
    other.close()
    # Nothing of what failed happened.
    assert await left(store, USD) == (0, 1_000)


async def test_with_the_disk_full_nothing_happens_in_part(tmp_path: Path) -> None:
    file = SqliteFile(tmp_path / "state.db")
    await file.open()
    store = SqliteStore(file)
    await say(store, "p1", ask(USD, 1, spent=10, keep=False))

    def fill(database: sqlite3.Connection) -> None:
        [pages] = database.execute("PRAGMA page_count").fetchone()
        database.execute(f"PRAGMA max_page_count = {pages}")

    await file.run(fill)
    rows = {ROW._replace(key=f"k{n}"): Totals(settled=n) for n in range(2_000)}
    with pytest.raises(StateUnavailable, match="no space left"):
        await say(store, "p1", ask(USD, 2, spent=20, keep=False), rows=rows)
    assert await left(store, USD) == (10, 990)
    await file.run(lambda database: database.execute("PRAGMA max_page_count = 100000").fetchone())
    await say(store, "p1", ask(USD, 2, spent=20, keep=False), rows=rows)
    assert await left(store, USD) == (20, 980)
    await store.aclose()


async def test_a_damage_at_run_time_is_told_and_hurts_no_other_part(books: SqliteRig) -> None:
    store = await books.open()
    await store.put_entries([(b"%d" % n, b"x" * 3_000) for n in range(200)], group="m", ttl_s=60)
    await store.aclose()
    content = bytearray(books.path.read_bytes())
    for page in range(len(content) // 4096 - 150, len(content) // 4096):
        content[page * 4096 : (page + 1) * 4096] = b"\xa5" * 4096
    books.path.write_bytes(content)
    store = await books.open()
    with pytest.raises(StateUnavailable, match="damaged"):
        await store.get_entries([b"%d" % n for n in range(200)])
    assert await left(store, USD) == (0, 1_000)


@pytest.mark.parametrize("is_replaced", [False, True])
async def test_books_that_were_deleted_are_lost_until_somebody_says_go_on(
    books: SqliteRig, tmp_path: Path, is_replaced: bool
) -> None:
    store, other = await books.open(), await books.open()
    epoch = await store.epoch()
    await store.sync("p1", [], {ROW: Totals(settled=70)})
    await store.put_key(KeyRecord("alice", {}, {"aa": None}, NOW), is_new=True)
    for file in books.path.parent.iterdir():
        file.unlink()
    if is_replaced:
        await (await SqliteStore.open(books.path)).aclose()
    for _ in range(2):
        with pytest.raises(StateLost):
            await say(store, "p1", ask(USD, 1, need=1))
        with pytest.raises(StateLost):
            await store.find_key("aa")
        assert await store.epoch() != epoch
    adopted = await store.adopt_epoch()
    assert adopted != epoch
    assert await left(store, USD) == (0, 1_000)
    with pytest.raises(StateLost):
        await other.sync("p2", [], {})
    assert await other.adopt_epoch() == adopted


async def test_a_store_that_expects_other_books_takes_none(books: SqliteRig) -> None:
    epoch = await (await books.open()).epoch()
    store = await books.open()
    store.expect_epoch("before")
    with pytest.raises(StateLost, match=f"books {epoch}, expected before"):
        await store.sync("p1", [], {})
    store.expect_epoch(epoch)
    await store.sync("p1", [], {})


async def test_a_file_that_cannot_be_had_back_is_unavailable(books: SqliteRig) -> None:
    store = await books.open()
    for file in books.path.parent.iterdir():
        file.unlink()
    books.path.mkdir()
    with pytest.raises(StateUnavailable, match="it is a folder"):
        await store.adopt_epoch()
    with pytest.raises(StateUnavailable):
        await store.sync("p1", [], {})
    books.path.rmdir()
    await store.adopt_epoch()
    await store.sync("p1", [], {})


async def test_who_waits_is_counted_and_one_too_many_is_refused(tmp_path: Path) -> None:
    file = SqliteFile(tmp_path / "state.db")
    await file.open()
    release = threading.Event()
    waiting = [asyncio.ensure_future(file.run(lambda _: release.wait())) for _ in range(256)]
    await asyncio.sleep(0)
    with pytest.raises(StateUnavailable, match="too slow: 256 others"):
        await file.run(lambda _: None)
    # Who leaves the line makes room.
    waiting.pop().cancel()
    await asyncio.sleep(0)
    last = asyncio.ensure_future(file.run(lambda _: 7))
    await asyncio.sleep(0)
    release.set()
    assert await last == 7
    await asyncio.gather(*waiting)
    await file.aclose()


async def test_work_that_takes_too_long_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.store.sqlite_file._CALL_S", 0.1)
    file = SqliteFile(tmp_path / "state.db")
    await file.open()
    endless = (
        "WITH RECURSIVE n(x) AS (VALUES (1) UNION ALL SELECT x + 1 FROM n) SELECT max(x) FROM n"
    )
    with pytest.raises(StateUnavailable, match="did not answer"):
        await file.run(lambda database: database.execute(endless).fetchone())
    monkeypatch.undo()
    assert await file.run(lambda _: 7) == 7
    await file.aclose()


# --- the log ahead of the file ------------------------------------------------------------------


def log_bytes(path: Path) -> int:
    return Path(f"{path}-wal").stat().st_size


async def write(store: SqliteStore, first: int, count: int) -> None:
    """Entries of 4 KiB: a page or more of the log each."""
    entries = [(b"%031d" % (first + i), bytes(4096)) for i in range(count)]
    await store.put_entries(entries, group="g", ttl_s=60)


@pytest.mark.parametrize("is_link", [False, True])
async def test_a_long_log_is_carried_into_the_file_by_a_thread_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_link: bool
) -> None:
    path = tmp_path / "state.db"
    monkeypatch.setattr("router.store.sqlite_file._LOG_BYTES", 256 << 10)
    if is_link:
        (tmp_path / "link.db").symlink_to(path)
        path.touch(0o600)
    store = await SqliteStore.open(tmp_path / "link.db" if is_link else path)
    may_go_on = threading.Event()
    store._file._log_thread.submit(may_go_on.wait, 10)
    await write(store, 0, 256)
    assert log_bytes(path) > 1 << 20
    # While it is at it, or comes to nothing for long, others read and write.
    assert await store.get_entries([b"%031d" % 255]) == [bytes(4096)]
    await store.sync("p1", [ask(USD, 5)], {})
    may_go_on.set()
    store._file._log_thread.submit(int).result(10)
    await write(store, 1_000, 1)
    assert log_bytes(path) <= 256 << 10
    assert await store.get_entries([b"%031d" % 0, b"%031d" % 1_000]) == [bytes(4096)] * 2
    await store.aclose()


async def test_where_that_thread_is_stuck_the_log_is_bounded_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.db"
    monkeypatch.setattr("router.store.sqlite_file._LOG_BYTES", 64 << 10)
    monkeypatch.setattr("router.store.sqlite_file._LOG_PAGES_MAX", 256)
    store = await SqliteStore.open(path)
    may_go_on = threading.Event()
    store._file._log_thread.submit(may_go_on.wait, 10)
    sizes = []
    for i in range(8):
        await write(store, 1_000 * i, 64)
        sizes.append(log_bytes(path))
    assert max(sizes) <= (256 + 200) * 4120
    may_go_on.set()
    await store.aclose()


async def test_a_file_that_is_gone_is_not_made_anew_for_its_log(tmp_path: Path) -> None:
    file = SqliteFile(tmp_path / "state.db")
    await file.open()
    for name in os.listdir(tmp_path):
        (tmp_path / name).unlink()
    file._empty_log(tmp_path / "state.db")
    assert os.listdir(tmp_path) == []
    await file.aclose()


# --- what is forgotten --------------------------------------------------------------------------


async def test_what_is_of_no_use_any_more_is_forgotten(books: SqliteRig) -> None:
    store = await books.open()
    old = ROW._replace(day=DAY - 399 * 86_400)
    await store.end("p0", {old: Totals(settled=7)})
    await say(store, "p1", ask(REQUESTS, 1), ask(USD, 1, need=5), rows={ROW: Totals(settled=5)})
    await store.put_entries([(b"a", b"1")], group="m", ttl_s=60)
    await store.claim_answer("alice", "n", KeptAnswer("f", "p1"), ttl_s=60)

    def lines() -> dict[str, int]:
        with sqlite3.connect(books.path) as database:
            counts = {
                table: int(database.execute(f"SELECT count(*) FROM {table}").fetchone()[0])
                for table in ("leases", "usage", "cache", "answers", "processes")
            }
        database.close()
        return counts

    # Of the old row: its day and its month are forgotten by now. Of the newer: minute, day, month.
    assert lines() == {"leases": 3, "usage": 2, "cache": 1, "answers": 1, "processes": 2}
    books.clock.now += 3 * 86_400
    await store.sync("p1", [], {})
    assert lines() == {"leases": 2, "usage": 1, "cache": 0, "answers": 0, "processes": 2}
    books.clock.now += 6 * 86_400
    await store.sync("p1", [], {})
    assert lines()["leases"] == 1
    books.clock.now += 400 * 86_400
    await store.sync("p1", [], {})
    assert lines() == {"leases": 0, "usage": 1, "cache": 0, "answers": 0, "processes": 1}


async def test_a_clock_that_jumps_ahead_and_back_finds_its_budgets_again(books: SqliteRig) -> None:
    store = await books.open()
    await store.end("p1", {ROW: Totals(settled=70)})
    books.clock.now += 6 * 86_400
    await store.sync("p2", [], {})
    books.clock.now = NOW
    assert await left(store, USD) == (70, 930)


def test_a_process_of_before_the_machine_started_is_silent() -> None:
    assert terms.is_silent(1_000_000.0, 50.0, terms.LEASE_S)
    assert not terms.is_silent(50.0, 50.0, terms.LEASE_S)


# --- by its address -----------------------------------------------------------------------------


async def test_an_address_names_the_engine(tmp_path: Path) -> None:
    path = tmp_path / "a b" / "state.db"
    store = await open_store(f"sqlite://{path}")
    await store.sync("p1", [], {})
    await store.aclose()
    assert path.exists()
    store = await open_store("memory://")
    assert not store.is_shared
    await store.sync("p1", [], {})
    await store.aclose()
    with pytest.raises(StateRefused, match="must be sqlite:///path"):
        await open_store("mongodb://host")


async def test_a_server_without_its_package_is_refused_with_the_mend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [name for name in sys.modules if name.startswith("router.store.valkey")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "valkey", None)
    monkeypatch.setitem(sys.modules, "valkey.exceptions", None)
    with pytest.raises(StateRefused, match=r"pip install 'rungway\[valkey\]'"):
        await open_store("valkey://127.0.0.1:1/0")


async def test_keys_are_found_as_fast_among_many_as_among_few(books: SqliteRig) -> None:
    """By the plan of the query, which no load of the machine can bend."""
    await (await books.open()).aclose()
    database = sqlite3.connect(books.path)
    plan = database.execute(
        "EXPLAIN QUERY PLAN SELECT record FROM digests JOIN keys USING (name) WHERE digest = 'aa'"
    ).fetchall()
    database.close()
    assert plan
    assert all("SEARCH" in line[3] for line in plan)


async def test_a_budget_takes_few_lines_however_long_its_history_is(books: SqliteRig) -> None:
    store = await books.open()
    for number in range(30):
        rows = {RowKey(DAY, "alice", "", f"l{n}", "r"): Totals(settled=1) for n in range(20)}
        await store.end(f"p{number}", rows)
    with sqlite3.connect(books.path) as database:
        found = database.execute(
            "SELECT count(*) FROM leases WHERE owner = 'alice' AND meter = ?", (Meter.USD_DAY,)
        ).fetchone()
    database.close()
    assert found == (1,)
    assert await left(store, Account("alice", Meter.USD_DAY, DAY)) == (600, 400)
