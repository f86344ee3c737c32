"""The journal's format: whatever was completely written is read again, wherever the bytes end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core import journal
from router.core.journal import Amounts, Damaged, FromNewer, Replay, Row, replay

A: Row = (1_700_000_000, "key", "", "ladder", "org/model")
B: Row = (1_700_086_400, "键", "session", "", "")
NOTHING: Amounts = (0, 0, 0, 0, 0, 0, 0)
SOME: Amounts = (1, 20, 300, 4_000, 50, 6, 0)
MORE: Amounts = (2, 40, 600, 8_000, 100, 12, 0)
HEADER = journal.encode_header("p1")


def done(record: bytes, kind: int) -> bytes:
    """A record as it is when its first byte was put in too."""
    return bytes((kind,)) + record[1:]


def a_row(row: Row) -> bytes:
    return done(journal.encode_row(row), journal.ROW)


def opened(hold: int, row: int, nanousd: int, tokens: int) -> bytes:
    record = journal.OPENED_RECORD.pack(hold, nanousd, tokens, row, journal.OPENED)
    return done(record, journal.OPENED)


def grown(hold: int, nanousd: int, tokens: int) -> bytes:
    return done(journal.GROWN_RECORD.pack(hold, nanousd, tokens, journal.GROWN), journal.GROWN)


def settled(hold: int, row: int, amounts: Amounts) -> bytes:
    return done(journal.SETTLED_RECORD.pack(hold, row, *amounts, journal.SETTLED), journal.SETTLED)


ROWS = a_row(A) + a_row(B)


@pytest.mark.parametrize(
    ("records", "rows", "open_holds"),
    [
        (b"", {}, 0),
        (ROWS, {}, 0),
        (settled(0, 0, SOME), {A: SOME}, 0),
        (settled(0, 0, SOME) + settled(0, 0, MORE) + settled(0, 1, SOME), {A: MORE, B: SOME}, 0),
        (opened(1, 0, 500, 7), {A: (0, 0, 7, 0, 0, 0, 500)}, 1),
        (opened(1, 0, 500, 7) + settled(1, 0, SOME), {A: SOME}, 0),
        (opened(1, 0, 500, 7) + grown(1, 900, 9), {A: (0, 0, 9, 0, 0, 0, 900)}, 1),
        (
            opened(1, 0, 500, 7) + opened(2, 0, 50, 3) + settled(1, 0, SOME),
            {A: (1, 20, 303, 4_000, 50, 6, 50)},
            1,
        ),
        # Said again, a hold moves to where it is said.
        (opened(1, 0, 500, 7) + opened(1, 1, 60, 8), {B: (0, 0, 8, 0, 0, 0, 60)}, 1),
        # Settled by another row than it was opened in: it is closed all the same.
        (opened(1, 0, 500, 7) + settled(1, 1, SOME), {B: SOME}, 0),
        # What grows after its end is over.
        (opened(1, 0, 500, 7) + settled(1, 0, SOME) + grown(1, 900, 9), {A: SOME}, 0),
        # More than a store can count is as much as it can.
        (
            opened(1, 0, (1 << 64) - 1, 1) + opened(2, 0, 5, 1),
            {A: (0, 0, 2, 0, 0, 0, journal.AMOUNT_MAX)},
            2,
        ),
        (settled(0, 0, ((1 << 64) - 1,) * 7), {A: (journal.AMOUNT_MAX,) * 7}, 0),
    ],
)
def test_what_was_written_is_read(
    records: bytes, rows: dict[Row, Amounts], open_holds: int
) -> None:
    said = Replay("p1", rows, open_holds)
    assert replay(HEADER + ROWS + records) == said
    assert replay(HEADER + ROWS + records + bytes(100)) == said


@pytest.mark.parametrize(
    "record",
    [
        journal.encode_row(A),
        journal.OPENED_RECORD.pack(1, 500, 7, 0, journal.OPENED),
        journal.GROWN_RECORD.pack(1, 900, 9, journal.GROWN),
        journal.SETTLED_RECORD.pack(1, 0, *SOME, journal.SETTLED),
    ],
)
def test_a_record_is_not_there_before_its_first_byte(record: bytes) -> None:
    said = replay(HEADER + ROWS + opened(1, 0, 5, 5))
    assert replay(HEADER + ROWS + opened(1, 0, 5, 5) + record) == said


@pytest.mark.parametrize("process", ["", "a b", "a/b", "ä", "x" * 129, "a\n"])
def test_a_process_has_a_plain_id(process: str) -> None:
    with pytest.raises(ValueError, match="the id of a process"):
        journal.encode_header(process)


def test_odd_names_do_no_harm() -> None:
    """A lone surrogate is no text, and a name beyond the limit is cut between two characters."""
    record = a_row((0, "\ud800", "", "é" * 3000, ""))
    assert len(record) < journal.RECORD_BYTES_MAX
    (row,) = replay(HEADER + record + settled(0, 0, SOME)).rows
    assert row == (0, "?", "", "é" * 2048, "")
    name = "x" * 5000
    longest = a_row((0, name, name, name, name))
    assert len(longest) == journal.RECORD_BYTES_MAX


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "does not begin"),
        (b"\0" * 4096, "does not begin"),
        (b"SQLite format 3\0", "does not begin"),
        (HEADER[:-1], "does not begin"),
        (HEADER.replace(b"p1", b"p2"), "first line is damaged"),
        (HEADER + b"\x09", "no record of kind 9"),
        (HEADER + ROWS + opened(1, 2, 5, 5), "no row 2"),
        (HEADER + settled(1, 0, SOME), "no row 0"),
        (HEADER + ROWS[:-1] + b"\0", "does not end as it begins"),
        (HEADER + ROWS + opened(1, 0, 5, 5)[:-1] + b"\0", "does not end as it begins"),
        (HEADER + ROWS + grown(1, 5, 5)[:-1] + b"\3", None),
        (HEADER + ROWS + grown(1, 5, 5)[:-1] + b"\4", "does not end as it begins"),
        (HEADER + ROWS + settled(1, 0, SOME)[:-1] + b"\0", "does not end as it begins"),
        (HEADER + b"\1" + b"\xff" * 16, "longer than any"),
        (HEADER + ROWS + bytes(journal.RECORD_BYTES_MAX) + ROWS, "goes on after its end"),
    ],
)
def test_damage_is_found(data: bytes, why: str | None) -> None:
    if why is None:
        replay(data)
        return
    with pytest.raises(Damaged, match=why):
        replay(data)


def test_a_newer_version_is_told_from_damage() -> None:
    with pytest.raises(FromNewer, match="its format is 2"):
        replay(HEADER.replace(b"journal 1", b"journal 2"))


NUMBERS = st.integers(0, 1 << 40)
AMOUNTS = st.tuples(*[NUMBERS] * 6, st.just(0))
RECORDS = st.lists(
    st.one_of(
        st.builds(opened, st.integers(1, 4), st.integers(0, 1), NUMBERS, NUMBERS),
        st.builds(grown, st.integers(1, 4), NUMBERS, NUMBERS),
        st.builds(settled, st.integers(0, 4), st.integers(0, 1), AMOUNTS),
    ),
    max_size=12,
)


@given(records=RECORDS, data=st.data())
def test_a_journal_may_end_anywhere(records: list[bytes], data: st.DataObject) -> None:
    """Cut short, torn by a kill (all but its first byte, in any state), or both: what was complete
    counts and nothing else. With its first byte and without its end it is damaged."""
    pieces = [HEADER, a_row(A), a_row(B), *records]
    last = data.draw(st.integers(1, len(pieces) - 1))
    whole, torn = b"".join(pieces[:last]), pieces[last]
    said = replay(whole)
    cut = data.draw(st.integers(0, len(torn) - 1))
    assert replay(whole + torn[:cut]) == said
    body = bytes(data.draw(st.permutations(torn[1:]))) if cut % 2 else torn[1:cut]
    assert replay(whole + b"\0" + body) == said
    assert replay(whole + b"\0" + body + bytes(64)) == said
    if cut:
        with pytest.raises(Damaged):
            replay(whole + torn[:cut] + bytes(len(torn) - cut))


@given(noise=st.binary(max_size=300), records=RECORDS)
def test_noise_is_read_or_damaged_and_nothing_else(noise: bytes, records: list[bytes]) -> None:
    for data in (noise, HEADER + noise, HEADER + ROWS + b"".join(records) + noise):
        try:
            said = replay(data)
        except Damaged:
            continue
        assert all(
            0 <= amount <= journal.AMOUNT_MAX for row in said.rows.values() for amount in row
        )


@given(
    rows=st.dictionaries(st.sampled_from([A, B]), AMOUNTS),
    holds=st.dictionaries(
        st.integers(1, 99), st.tuples(st.sampled_from([A, B]), NUMBERS, NUMBERS), max_size=5
    ),
)
def test_a_fresh_journal_says_what_it_was_told(
    rows: dict[Row, Amounts], holds: dict[int, tuple[Row, int, int]]
) -> None:
    data, numbers = journal.encode("p1", rows, [(hold, *what) for hold, what in holds.items()])
    in_doubt = dict.fromkeys([*rows, *(row for row, _, _ in holds.values())], 0)
    tokens = dict(in_doubt)
    for row, nanousd, held in holds.values():
        in_doubt[row] += nanousd
        tokens[row] += held
    said = replay(data)
    assert said.open_holds == len(holds)
    assert set(numbers) == set(said.rows) == set(in_doubt)
    for row, amounts in said.rows.items():
        told = rows.get(row, NOTHING)
        assert amounts[6] == in_doubt[row]
        assert amounts[2] == told[2] + tokens[row]
        assert (amounts[:2], amounts[3:6]) == (told[:2], told[3:6])
    # The numbers go on where they are: what is appended belongs to the same rows.
    for row, number in numbers.items():
        assert replay(data + settled(0, number, MORE)).rows[row][:2] == MORE[:2]
