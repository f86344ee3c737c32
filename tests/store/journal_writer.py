"""A process that journals until it is killed, and says on its standard output what it has done.

Step n does the same whenever it is taken, so whoever counts the bytes that came out knows what the
journal has to say: that of all these steps, or of one more that nobody heard of.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from router.store.base import RowKey, Totals
from router.store.journal import Journal

ROWS = [RowKey(1_700_000_000, f"key{n}", "", "ladder", f"org/model-{n}") for n in range(7)]
STEPS_A_REWRITE = 150
BYTES_MIN = 1 << 14


class Books:
    """What the steps so far add up to."""

    def __init__(self) -> None:
        self.totals: dict[RowKey, Totals] = {}
        self.holds: dict[int, tuple[RowKey, int, int]] = {}
        # What the store was told at the last rewrite.
        self.known: dict[RowKey, Totals] = {}

    def in_doubt(self) -> dict[RowKey, Totals]:
        """The totals of each row that counts anything, with the open holds in doubt."""
        found = dict(self.totals)
        for row, nanousd, tokens in self.holds.values():
            amounts = found.get(row, Totals())
            found[row] = amounts._replace(
                output_tokens=amounts.output_tokens + tokens, in_doubt=amounts.in_doubt + nanousd
            )
        return found

    def step(self, number: int, journal: Journal | None) -> None:
        """One record at most, and now and then a rewrite. Two holds are open at a time."""
        call, part = divmod(number, 5)
        first, second = 2 * call + 1, 2 * call + 2
        if part == 0:
            self._open(first, ROWS[call % len(ROWS)], journal)
        elif part == 1:
            self._grow(first, journal)
        elif part == 2:
            self._open(second, ROWS[-1 - call % len(ROWS)], journal)
        elif part == 3 and call:
            self._settle(second - 2, journal)
        elif part == 4:
            self._settle(first, journal)
        if number % STEPS_A_REWRITE == STEPS_A_REWRITE - 1:
            self._rewrite(journal)

    def _open(self, hold: int, row: RowKey, journal: Journal | None) -> None:
        self.holds[hold] = row, 1_000_000 + hold, 100
        if journal is not None:
            journal.opened(hold, row, 1_000_000 + hold, 100)

    def _grow(self, hold: int, journal: Journal | None) -> None:
        row, nanousd, tokens = self.holds[hold]
        self.holds[hold] = row, nanousd * 2, tokens * 2
        if journal is not None:
            journal.grown(hold, nanousd * 2, tokens * 2)

    def _settle(self, hold: int, journal: Journal | None) -> None:
        row, nanousd, tokens = self.holds.pop(hold)
        had = self.totals.get(row, Totals())
        self.totals[row] = had._replace(
            requests=had.requests + 1,
            output_tokens=had.output_tokens + tokens - 1,
            settled=had.settled + nanousd - 1,
        )
        if journal is not None:
            journal.settled(hold, row, self.totals[row])

    def _rewrite(self, journal: Journal | None) -> None:
        """The store knows all rows but one, which it was not told of since the last time."""
        self.known |= self.totals
        if ROWS[0] in self.known:
            del self.known[ROWS[0]]
        if journal is not None:
            rows = {row: totals for row, totals in self.totals.items() if row not in self.known}
            journal.rewrite(rows, [(hold, *what) for hold, what in self.holds.items()])


def main() -> None:
    folder, process = sys.argv[1:]
    books, number = Books(), 0
    journal = Journal.create(Path(folder), process, totals_of=books.totals.get, bytes_min=BYTES_MIN)
    while True:
        books.step(number, journal)
        os.write(1, b".")
        number += 1


if __name__ == "__main__":
    main()
