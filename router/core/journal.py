"""The format of a process's journal: what its ledger did, as bytes that may end anywhere.

A line of text names the format, its version and the process; records follow, and zeros behind
them. The bytes may stop in the middle of anything, because the process was killed there:

- A record's first byte is its kind, and the writer puts it in last, by a store of one byte. A
  record without it is not there. (Measured beside it: a sum over the fields and CRC-32 cost two
  and four times as much as the byte, and a process that is killed leaves its stores in order.)
- Its last byte repeats the kind. That, and that nothing follows the end, is how a file is found out
  that lost pages with the power: such a file is `Damaged`, never read as if it were all.

Rows are the tuples of `store.base` (RowKey, Totals), which this room does not know.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from struct import Struct
from typing import NamedTuple, TypeVar
from zlib import crc32

Row = tuple[int, str, str, str, str]
RowT = TypeVar("RowT", bound=Row)
# requests, input_tokens, output_tokens, settled, overrun, estimated, in_doubt
Amounts = tuple[int, int, int, int, int, int, int]

AMOUNT_MAX = (1 << 63) - 1
# A rung's name is the longest, some 600 characters of at most four bytes.
NAME_BYTES_MAX = 4096

ROW, OPENED, GROWN, SETTLED = 1, 2, 3, 4
_ROW = Struct("<xq4H")  # day, lengths of the four names; then these, and the kind
OPENED_RECORD = Struct("<xQQQIB")  # hold, nanousd, tokens, row
GROWN_RECORD = Struct("<xQQQB")  # hold, nanousd, tokens
SETTLED_RECORD = Struct("<xQI7QB")  # hold, row, amounts
RECORD_BYTES_MAX = _ROW.size + 4 * NAME_BYTES_MAX + 1

_VERSION = 1
_HEADER = re.compile(rb"rungway journal (\d{1,9}) ([\w.-]{1,128}) ([0-9a-f]{8})\n", re.ASCII)
_HEADER_BYTES_MAX = 256
_REQUESTS, _OUTPUT_TOKENS, _IN_DOUBT = 0, 2, 6
_NOTHING: Amounts = (0, 0, 0, 0, 0, 0, 0)


class Damaged(ValueError):
    """These bytes are no journal, or not all of one; the text says where and how it shows."""


class FromNewer(ValueError):
    """A journal of a version of the format that is not known here yet."""


class Replay(NamedTuple):
    """What a journal says. `rows`: the last totals of each row, with its open holds in doubt."""

    process: str
    rows: dict[Row, Amounts]
    open_holds: int


def encode_header(process: str) -> bytes:
    """Raises ValueError for a process's id that is no word of at most 128 letters."""
    line = f"rungway journal {_VERSION} {process} ".encode()
    header = line + f"{crc32(line):08x}\n".encode()
    if not _HEADER.fullmatch(header):
        raise ValueError(f"the id of a process is a word of A-Z a-z 0-9 _ . -, not {process!r}")
    return header


def encode_row(row: Row) -> bytes:
    """The record that gives a row the next number, from 0, in the rest of the file."""
    day, *names = row
    encoded = [name.encode(errors="replace")[:NAME_BYTES_MAX] for name in names]
    return b"".join((_ROW.pack(day, *map(len, encoded)), *encoded, bytes((ROW,))))


def clamp(amount: int) -> int:
    return min(max(0, amount), AMOUNT_MAX)


def encode(
    process: str, rows: Mapping[RowT, Amounts], holds: Iterable[tuple[int, RowT, int, int]]
) -> tuple[bytes, dict[Row, int]]:
    """A journal that says this much and nothing else, and the numbers of its rows."""
    data = bytearray(encode_header(process))
    numbers: dict[Row, int] = {}

    def number(row: Row) -> int:
        if row not in numbers:
            numbers[row] = len(numbers)
            add(ROW, encode_row(row))
        return numbers[row]

    def add(kind: int, record: bytes) -> None:
        data.append(kind)
        data.extend(record[1:])

    for row, amounts in rows.items():
        at = number(row)
        add(SETTLED, SETTLED_RECORD.pack(0, at, *map(clamp, amounts), SETTLED))
    for hold, row, nanousd, tokens in holds:
        at = number(row)
        add(OPENED, OPENED_RECORD.pack(hold, clamp(nanousd), clamp(tokens), at, OPENED))
    return bytes(data), numbers


def replay(data: bytes) -> Replay:
    """What is said by these bytes, which may be cut anywhere. Raises Damaged or FromNewer."""
    process, at = _read_header(data)
    reader = _Reader(data, at)
    reader.read()
    return Replay(process, reader.rows_in_doubt(), len(reader.holds))


def _read_header(data: bytes) -> tuple[str, int]:
    match = _HEADER.match(data[:_HEADER_BYTES_MAX])
    if match is None:
        raise Damaged("it does not begin as a journal does")
    version, process, checksum = match.groups()
    if int(version) > _VERSION:
        raise FromNewer(f"its format is {int(version)}, of a newer version than this one")
    if int(checksum, 16) != crc32(data[: match.start(3)]):
        raise Damaged("its first line is damaged")
    return process.decode(), match.end()


class _Reader:
    """Reads records one after the other, up to the first that is not there."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data = data
        self._at = at
        self._rows: list[Row] = []
        self.amounts: dict[Row, Amounts] = {}
        self.holds: dict[int, tuple[Row, int, int]] = {}

    def read(self) -> None:
        data = self._data
        readers = {
            ROW: self._read_row,
            OPENED: self._read_opened,
            GROWN: self._read_grown,
            SETTLED: self._read_settled,
        }
        while self._at < len(data) and (kind := data[self._at]):
            if kind not in readers:
                raise Damaged(f"there is no record of kind {kind}, as at byte {self._at}")
            if not readers[kind]():
                return  # The file itself was cut short within a record.
        if len(data.rstrip(b"\0")) > self._at + RECORD_BYTES_MAX:
            raise Damaged(f"it goes on after its end at byte {self._at}")

    def rows_in_doubt(self) -> dict[Row, Amounts]:
        """The totals, and what open holds add to them: money in doubt, and tokens.

        Tokens have no column for doubts, and a limit must hold: they count as output. A request
        counts when it is settled.
        """
        rows = dict(self.amounts)
        for row, nanousd, tokens in self.holds.values():
            amounts = list(rows.get(row, _NOTHING))
            amounts[_OUTPUT_TOKENS] = clamp(amounts[_OUTPUT_TOKENS] + tokens)
            amounts[_IN_DOUBT] = clamp(amounts[_IN_DOUBT] + nanousd)
            rows[row] = _amounts(amounts)
        return rows

    def _take(self, record: Struct, kind: int) -> tuple[int, ...] | None:
        """The fields of a record of a fixed size; None where the data ends before it does."""
        if self._at + record.size > len(self._data):
            return None
        fields: tuple[int, ...] = record.unpack_from(self._data, self._at)
        self._check_end(kind, fields[-1])
        self._at += record.size
        return fields

    def _check_end(self, kind: int, end: int) -> None:
        if end != kind:
            raise Damaged(f"the record at byte {self._at} does not end as it begins")

    def _row(self, number: int) -> Row:
        if number >= len(self._rows):
            raise Damaged(f"before byte {self._at} there is no row {number}")
        return self._rows[number]

    def _read_row(self) -> bool:
        data, start = self._data, self._at
        if start + _ROW.size > len(data):
            return False
        day, *lengths = _ROW.unpack_from(data, start)
        if max(lengths) > NAME_BYTES_MAX:
            raise Damaged(f"a name at byte {start} is longer than any")
        at, names = start + _ROW.size, []
        if at + sum(lengths) + 1 > len(data):
            return False
        self._check_end(ROW, data[at + sum(lengths)])
        for length in lengths:
            # A name that was too long may have been cut within a character.
            names.append(data[at : at + length].decode(errors="ignore"))
            at += length
        key, session, ladder, rung = names
        self._rows.append((day, key, session, ladder, rung))
        self._at = at + 1
        return True

    def _read_opened(self) -> bool:
        if (fields := self._take(OPENED_RECORD, OPENED)) is None:
            return False
        hold, nanousd, tokens, row, _ = fields
        self.holds[hold] = (self._row(row), nanousd, tokens)
        return True

    def _read_grown(self) -> bool:
        if (fields := self._take(GROWN_RECORD, GROWN)) is None:
            return False
        hold, nanousd, tokens, _ = fields
        if hold in self.holds:
            self.holds[hold] = (self.holds[hold][0], nanousd, tokens)
        return True

    def _read_settled(self) -> bool:
        if (fields := self._take(SETTLED_RECORD, SETTLED)) is None:
            return False
        hold, row, *amounts = fields[:-1]
        self.holds.pop(hold, None)
        self.amounts[self._row(row)] = _amounts(amounts)
        return True


def _amounts(values: Iterable[int]) -> Amounts:
    """Bounded as stores are: a writer's field has one bit more."""
    requests, inputs, outputs, settled, overrun, estimated, in_doubt = map(clamp, values)
    return requests, inputs, outputs, settled, overrun, estimated, in_doubt
