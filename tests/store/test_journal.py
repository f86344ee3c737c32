"""The journal as a file: what it holds after a kill, when it is full, and in the wrong hands."""

from __future__ import annotations

import logging
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.core.journal import Amounts
from router.store.base import RowKey, Totals
from router.store.journal import Journal, JournalFull, Recovered, recover
from tests.store import journal_writer
from tests.store.journal_writer import ROWS, Books

A, B = ROWS[:2]
SOME = Totals(requests=1, input_tokens=20, output_tokens=300, settled=4_000, overrun=50)
SMALL = 1 << 12


def recovered(folder: Path) -> dict[str, dict[RowKey, Totals]]:
    return {found.process: found.rows for found in recover(folder)}


def merged(known: Mapping[RowKey, Amounts], said: Mapping[RowKey, Amounts]) -> dict[RowKey, Totals]:
    """What a store knows after it was told: the larger number of each column."""
    none = Totals()
    return {
        row: Totals(*map(max, known.get(row, none), said.get(row, none)))
        for row in {**known, **said}
    }


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """As if the disk were full beyond files of this size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def somebody_else() -> Iterator[Path]:
    """A folder where this process, no longer root, may only read."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    was_root = os.geteuid() == 0
    if was_root:
        os.seteuid(65_534)
    else:
        folder.chmod(0o555)
    try:
        yield folder
    finally:
        if was_root:
            os.seteuid(0)
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_what_a_process_left_is_recovered_once(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, "p1")
    assert (tmp_path / "p1.journal").stat().st_mode & 0o777 == 0o600
    journal.opened(1, A, 500, 7)
    journal.opened(2, A, 50, 3)
    journal.grown(2, 90, 4)
    journal.opened(3, B, 10, 1)
    journal.settled(1, A, SOME)
    assert recovered(tmp_path) == {}, "it is alive"
    journal.close(delete=False)
    journal.close(delete=False)
    (found,) = recover(tmp_path)
    in_doubt = {
        A: SOME._replace(output_tokens=304, in_doubt=90),
        B: Totals(output_tokens=1, in_doubt=10),
    }
    assert found == Recovered("p1", in_doubt, 2, tmp_path / "p1.journal")
    # The store was gone when it was told: the next process tries again.
    (found,) = recover(tmp_path)
    assert found.discard()
    assert not found.discard(), "another process was quicker"
    assert list(recover(tmp_path)) == []
    assert list(tmp_path.iterdir()) == []


def test_a_journal_that_the_store_knows_whole_is_deleted(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, "p1")
    journal.settled(0, A, SOME)
    journal.close(delete=True)
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_recover() -> None:
    assert list(recover(Path("/nowhere/at/all"))) == []


def test_processes_of_one_folder_do_not_meet(tmp_path: Path) -> None:
    journals = {name: Journal.create(tmp_path, name) for name in ("p1", "p2", "p3")}
    for n, journal in enumerate(journals.values()):
        journal.settled(0, A, SOME._replace(requests=n))
    journals["p1"].close(delete=False)
    journals["p3"].close(delete=False)
    assert {name: rows[A].requests for name, rows in recovered(tmp_path).items()} == {
        "p1": 0,
        "p3": 2,
    }
    with pytest.raises(FileExistsError, match="an id of its own"):
        Journal.create(tmp_path, "p2")
    journals["p2"].close(delete=True)


def test_files_and_maps_are_given_back(tmp_path: Path) -> None:
    def in_use() -> tuple[int, int]:
        maps = Path("/proc/self/maps").read_text()
        return len(os.listdir("/proc/self/fd")), maps.count(str(tmp_path))

    before = in_use()
    journal = Journal.create(tmp_path, "p1", bytes_min=SMALL)
    during = in_use()
    for n in range(500):
        journal.settled(0, A, SOME._replace(requests=n))
    journal.rewrite({A: SOME}, [])
    journal.sync()
    assert in_use() == during
    with file_limit(SMALL), pytest.raises(OSError):
        journal.rewrite({A._replace(key=f"k{n}"): SOME for n in range(99)}, [])
    assert in_use() == during
    journal.close(delete=False)
    (tmp_path / "p2.journal").write_bytes(b"?")
    assert list(recovered(tmp_path)) == ["p1"]
    assert in_use() == before


@pytest.mark.parametrize("amount", [-1, 1 << 63, 1 << 64, 1 << 200])
def test_amounts_that_no_store_can_hold_are_bounded(tmp_path: Path, amount: int) -> None:
    journal = Journal.create(tmp_path, "p1")
    bounded = min(max(0, amount), (1 << 63) - 1)
    journal.opened(1, A, amount, 1)
    journal.opened(2, B, 1, 1)
    journal.grown(2, amount, amount)
    journal.settled(0, A, Totals(*(amount,) * 6))
    journal.close(delete=False)
    rows = recovered(tmp_path)["p1"]
    assert rows[A].settled == rows[A].in_doubt == rows[B].in_doubt == bounded
    assert rows[B].output_tokens == bounded


def test_a_journal_grows_where_nobody_rewrites_it(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, "p1", bytes_min=SMALL)
    rows = [A._replace(rung=f"{n}" * 580) for n in range(10)] * 20
    was_nearly_full = []
    for n, row in enumerate(rows):
        journal.opened(n, row, 1, 1)
        journal.grown(n, 2, 2)
        journal.settled(n, row, SOME._replace(requests=n))
        was_nearly_full.append(journal.is_nearly_full)
    assert (tmp_path / "p1.journal").stat().st_size == 8 * SMALL
    assert set(was_nearly_full) == {False, True}
    journal.close(delete=False)
    assert {row: totals.requests for row, totals in recovered(tmp_path)["p1"].items()} == {
        row: n for n, row in enumerate(rows)
    }


def test_a_rewrite_keeps_what_still_matters(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, "p1", bytes_min=SMALL)
    for n in range(40):
        journal.settled(0, A, SOME._replace(requests=n))
    journal.opened(1, B, 70, 7)
    journal.settled(0, ROWS[2], SOME)
    while not journal.is_nearly_full:
        journal.settled(0, A, SOME)
    many = {A._replace(key=f"key{n}"): SOME for n in range(100)}
    journal.rewrite(many, [(1, B, 70, 7)])
    assert [journal.is_nearly_full] == [False], "it was given the room that it needs"
    assert [path.name for path in tmp_path.iterdir()] == ["p1.journal"]
    journal.grown(1, 80, 8)
    journal.settled(0, A, SOME._replace(requests=99))
    journal.close(delete=False)
    left = {**many, B: Totals(output_tokens=8, in_doubt=80), A: SOME._replace(requests=99)}
    assert recovered(tmp_path) == {"p1": left}


def test_no_room_for_a_journal_fails_at_its_creation(tmp_path: Path) -> None:
    with file_limit(SMALL), pytest.raises(OSError, match="File too large"):
        Journal.create(tmp_path, "p1")
    assert list(tmp_path.iterdir()) == []


def test_a_journal_that_cannot_grow_refuses_holds_and_charges_nothing_twice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Hold 1 is settled when there is no room for it: it stays open here. Then no later totals,
    which have it in them, may be written beside it, even if there is room for these."""
    journal = Journal.create(tmp_path, "p1", bytes_min=SMALL)
    journal.opened(1, A, 500, 7)
    with file_limit(SMALL):
        with pytest.raises(JournalFull, match=r"the journal .*/p1\.journal cannot grow"):
            while True:
                journal.grown(1, 500, 7)
        journal.settled(1, A, SOME)
        journal.settled(0, B, SOME)
        for _ in range(2):
            with pytest.raises(JournalFull, match="cannot grow: File too large"):
                journal.opened(2, A, 1, 1)
            with pytest.raises(JournalFull):
                journal.opened(2, ROWS[3], 1, 1)
        with pytest.raises(OSError, match="File too large"):
            journal.rewrite({A._replace(key=f"k{n}"): SOME for n in range(99)}, [])
    # There is space again, but the gap is in it until it is rewritten.
    with pytest.raises(JournalFull):
        journal.grown(1, 1, 1)
    assert journal.is_nearly_full
    assert len(caplog.records) == 1
    shutil.copy(tmp_path / "p1.journal", tmp_path / "copy")
    journal.rewrite({A: SOME, B: SOME}, [])
    journal.opened(2, A, 1, 1)
    journal.settled(2, A, SOME._replace(requests=2))
    journal.close(delete=False)
    assert recovered(tmp_path)["p1"] == {A: SOME._replace(requests=2), B: SOME}
    (tmp_path / "copy").rename(tmp_path / "p1.journal")
    assert recovered(tmp_path)["p1"] == {A: Totals(output_tokens=7, in_doubt=500)}


def test_a_journal_has_a_largest_size(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, "p1", bytes_min=SMALL, bytes_max=2 * SMALL)
    with pytest.raises(JournalFull, match="larger than 8192 bytes"):
        while True:
            journal.opened(1, A, 1, 1)
    many = {A._replace(key=f"k{n}"): SOME for n in range(99)}
    with pytest.raises(OSError, match="larger than 8192 bytes"):
        journal.rewrite(many, [])
    # More than half of the largest size: it gets no more than there is.
    journal.rewrite(dict(list(many.items())[:60]), [])
    assert (tmp_path / "p1.journal").stat().st_size == 2 * SMALL
    journal.close(delete=False)
    assert len(recovered(tmp_path)["p1"]) == 60


def test_a_folder_that_may_only_be_read(caplog: pytest.LogCaptureFixture) -> None:
    with somebody_else() as folder:
        with pytest.raises(PermissionError):
            Journal.create(folder, "p1")
        assert list(recover(folder)) == []
    assert caplog.text == ""


def test_anothers_journal_stays_where_it_is(caplog: pytest.LogCaptureFixture) -> None:
    with somebody_else() as folder:
        # As whoever may write here, a journal that this process may not read, or not rename.
        uid = os.geteuid()
        if os.getuid() == 0:
            os.seteuid(0)
        folder.chmod(0o755)
        (folder / "p1.journal").write_bytes(b"?")
        (folder / "p1.journal").chmod(0o000)
        (folder / "p2.journal").write_bytes(b"?")
        if os.getuid() != 0:
            folder.chmod(0o555)
        os.seteuid(uid)
        assert list(recover(folder)) == []
        assert sorted(os.listdir(folder)) == ["p1.journal", "p2.journal"]
    assert caplog.text.count("which stays there: Permission denied") == 2


def damaged_header(data: bytes) -> bytes:
    return data.replace(b"p1", b"p7", 1)


def lost_page(data: bytes) -> bytes:
    return data[:100] + bytes(40) + data[140:]


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (damaged_header, "its first line is damaged"),
        (lost_page, "does not end as it begins"),
        (lambda data: b"", "does not begin as a journal does"),
        (lambda data: b"{}\n" * 1000, "does not begin as a journal does"),
        (lambda data: data + b"x" * SMALL, "it goes on after its end"),
        (lambda data: data * 9, "it is larger than any journal"),
    ],
)
def test_what_cannot_be_read_is_set_aside(
    tmp_path: Path, spoil: object, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert callable(spoil)
    journal = Journal.create(tmp_path, "p1", bytes_min=8 * SMALL)
    journal.settled(0, A, SOME)
    journal.close(delete=False)
    path = tmp_path / "p1.journal"
    (tmp_path / "p1.journal.damaged1").write_bytes(b"an older one")
    spoiled = spoil(path.read_bytes())
    path.write_bytes(spoiled)
    assert list(recover(tmp_path, bytes_max=64 * SMALL)) == []
    assert (tmp_path / "p1.journal.damaged2").read_bytes() == spoiled
    assert (tmp_path / "p1.journal.damaged1").read_bytes() == b"an older one"
    assert list(recover(tmp_path)) == [], "it is not tried again"
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    for words in (why, str(path), "p1.journal.damaged2", "rungway usage resolve"):
        assert words in record.getMessage()


def test_a_copy_never_speaks_for_its_process(tmp_path: Path) -> None:
    """It is not locked, so it looks as if a process had died that is alive."""
    journal = Journal.create(tmp_path, "p1", bytes_min=SMALL)
    shutil.copy(tmp_path / "p1.journal", tmp_path / "backup.journal")
    assert list(recover(tmp_path)) == []
    assert sorted(os.listdir(tmp_path)) == ["backup.journal.damaged1", "p1.journal"]
    journal.close(delete=True)


def test_a_newer_versions_journal_waits_for_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Journal.create(tmp_path, "p1", bytes_min=SMALL).close(delete=False)
    path = tmp_path / "p1.journal"
    path.write_bytes(path.read_bytes().replace(b"journal 1", b"journal 2"))
    for _ in range(2):
        assert list(recover(tmp_path)) == []
    assert path.exists()
    assert caplog.text.count("its format is 2, of a newer version than this one") == 1, "once"


def test_what_is_no_file_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.mkfifo(tmp_path / "pipe.journal")
    (tmp_path / "folder.journal").mkdir()
    (tmp_path / "link.journal").symlink_to("/etc/passwd")
    (tmp_path / "state.sqlite").write_bytes(b"?")
    before = sorted(os.listdir(tmp_path))
    assert list(recover(tmp_path)) == []
    assert sorted(os.listdir(tmp_path)) == before
    assert "link.journal, which stays there: Too many levels of symbolic links" in caplog.text


def test_a_crash_at_any_moment_of_a_rewrite_loses_nothing(tmp_path: Path) -> None:
    """Each state that the folder goes through: the new file at any length, then in place."""
    journal = Journal.create(tmp_path, "p1", bytes_min=SMALL)
    journal.settled(0, A, SOME)
    journal.opened(1, B, 70, 7)
    path = tmp_path / "p1.journal"
    before = path.read_bytes()
    journal.rewrite({A: SOME}, [(1, B, 70, 7)])
    after = path.read_bytes()
    journal.close(delete=True)
    said = {"p1": {A: SOME, B: Totals(output_tokens=7, in_doubt=70)}}
    written = len(after.rstrip(b"\0"))
    new = [b"", bytes(SMALL), *(after[:n] + bytes(SMALL - n) for n in range(0, written + 1, 7))]
    for state in new:
        path.write_bytes(before)
        (tmp_path / "p1.0.journal.new").write_bytes(state)
        assert recovered(tmp_path) == said
        assert os.listdir(tmp_path) == ["p1.journal"]
    path.write_bytes(after)
    assert recovered(tmp_path) == said
    # A process that died before it had a journal left nothing that matters.
    path.rename(tmp_path / "p2.0.journal.new")
    assert recovered(tmp_path) == {}
    assert os.listdir(tmp_path) == []


def test_recovery_never_touches_a_process_that_is_born_or_rewrites_meanwhile(
    tmp_path: Path,
) -> None:
    """A race in earnest: threads that recover as fast as they can, and journals that come."""
    is_over = threading.Event()
    found: list[Recovered] = []

    def hunt() -> None:
        while not is_over.is_set():
            found.extend(recover(tmp_path))

    hunters = [threading.Thread(target=hunt) for _ in range(2)]
    for hunter in hunters:
        hunter.start()
    try:
        for n in range(100):
            journal = Journal.create(tmp_path, f"p{n}", bytes_min=SMALL)
            for _ in range(3):
                journal.settled(0, A, SOME)
                journal.rewrite({A: SOME}, [])
                journal.sync() if n % 20 == 0 else None
            journal.close(delete=True)
    finally:
        is_over.set()
        for hunter in hunters:
            hunter.join()
    assert found == []
    assert os.listdir(tmp_path) == []


def test_a_sync_survives_rewrites_meanwhile(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, "p1", bytes_min=SMALL)
    is_over = threading.Event()
    errors: list[BaseException] = []

    def keep_syncing() -> None:
        try:
            while not is_over.is_set():
                journal.sync()
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=keep_syncing)
    thread.start()
    for n in range(200):
        journal.rewrite({A: SOME._replace(requests=n)}, [])
    is_over.set()
    thread.join()
    journal.close(delete=False)
    assert errors == []
    assert recovered(tmp_path)["p1"][A].requests == 199


@settings(max_examples=40, deadline=None)
@given(steps=st.integers(1, 400), data=st.data())
def test_the_file_says_the_steps_that_are_whole_in_it(steps: int, data: st.DataObject) -> None:
    """Steps with rewrites among them, and the file torn anywhere behind its last rewrite."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "p1.journal"
        books = Books()
        journal = Journal.create(path.parent, "p1", totals_of=books.totals.get, bytes_min=1 << 14)
        states: list[tuple[int, dict[RowKey, Totals]]] = []
        for number in range(steps):
            inode = path.stat().st_ino
            books.step(number, journal)
            if path.stat().st_ino != inode:
                states.clear()
            states.append((len(path.read_bytes().rstrip(b"\0")), books.in_doubt()))
        journal.close(delete=False)
        chosen = data.draw(st.integers(0, len(states) - 1))
        end, said = states[chosen]
        torn_end = states[min(chosen + 1, len(states) - 1)][0]
        whole = path.read_bytes()
        torn = whole[end + 1 : data.draw(st.integers(end, torn_end))]
        path.write_bytes(whole[:end] + b"\0" + torn + bytes(SMALL))
        assert merged(books.known, recovered(path.parent)["p1"]) == said


def test_a_killed_process_has_said_all_that_it_acknowledged(tmp_path: Path) -> None:
    """kill -9 in the midst of it, 20 times: what is recovered is the state after all steps that
    were acknowledged, or after one more."""
    chance = Random(4)
    for n in range(20):
        steps = kill_a_writer(tmp_path, f"p{n}", chance.randrange(1, 4000))
        (found,) = recover(tmp_path)
        found.discard()
        assert os.listdir(tmp_path) == [], "an abandoned rewrite is cleared away"
        books, possible = Books(), []
        for number in range(steps + 1):
            books.step(number, None)
            if number + 1 >= steps:
                possible.append((books.in_doubt(), dict(books.known)))
        assert any(merged(known, found.rows) == said for said, known in possible)


def kill_a_writer(folder: Path, name: str, steps_min: int) -> int:
    """Kill it after at least so many steps; how many it acknowledged."""
    process = subprocess.Popen(
        [sys.executable, "-m", journal_writer.__name__, str(folder), name],
        stdout=subprocess.PIPE,
        cwd=Path(journal_writer.__file__).parents[2],
    )
    with process:
        assert process.stdout is not None
        steps = len(process.stdout.read(steps_min))
        process.kill()
        return steps + len(process.stdout.read())
